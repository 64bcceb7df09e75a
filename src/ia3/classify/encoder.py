"""The engine on a sentence encoder: contrastive training, and a linear head on the embeddings."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ..adapter.files import Adapter
from ..adapter.fingerprint import fingerprint
from ..base.encoders import SentenceEncoder
from ..base.processes import processes
from ..base.progress import working
from ..base.threads import Threads
from ..errors import IA3Error, counted, shown, warn_caller
from ..model.ia3_model import IA3Model
from ..sentences.checkpoint import Checkpoint, EncoderStep
from ..sentences.embedding import embeddings, tokenized
from ..sentences.head import ANSWERS, fit_head, folds, held_out_answers
from ..sentences.targets import share_right
from ..sentences.training import EncoderRecipe, EncoderTraining
from ..targets.config import IA3Config, TaskType
from ..tfew.prompts.labels import Label, are_words, readable
from ..tfew.prompts.templates import Template
from ..tfew.temporary_adapter import temporary_adapter
from .engine import (
    ENCODER,
    Fit,
    Seen,
    Settings,
    check_trainable,
    seen_of,
    threads_of,
    trained_adapter,
)
from .head_file import check_head_size
from .inputs import check_fields
from .ranking import check_has_fields, checked_templates
from .task_file import Embedding
from .text_classifier import LabelledTexts
from .weights import text_weights

# Between the fields of a text that has several.
BETWEEN = ". "
# Texts of which it is timed how many threads they take.
AT_ONCE = 64
# What an embedding has digests of -> what to say where these differ.
DIGESTS = {
    "dense": "its Dense layers are others",
    "tokens": "its tokenizer splits texts otherwise",
}
# Trainings at most whose answers are weighed against a language model's.
FOLDS = 4
# An expression of a pooler, and of the modules in one.
POOLER = r"(.*\.)?pooler(\..*)?"


@dataclass(frozen=True)
class EncoderTask:
    """What a training needs, checked.

    Each label's name is learned from as one more text of it, where a text has one label and labels
    are words. Names that are the same to the encoder are not.

    Attributes:
        ids: the token ids of the texts and then of the names, `[texts + names]`.
        named: the indices of the classes whose names these are, `[names]`.
    """

    data: LabelledTexts
    template: Template
    recipe: EncoderRecipe
    ids: list[list[int]]
    named: list[int]
    start: Adapter | None
    settings: Settings
    base: SentenceEncoder

    @property
    def templates(self) -> list[Template]:
        """What makes a text of an example."""
        return [self.template]

    @property
    def targets(self) -> list[Any]:
        """Those of the texts and of the names, `[texts + names]`."""
        return [*self.data.targets, *self.named]

    @property
    def weights(self) -> Tensor | None:
        """Those of the texts and of the names; a name's is the mean of its label's texts."""
        weights = self.data.weights
        if weights is None or not self.named:
            return weights
        targets = torch.tensor(self.data.targets)
        of_names = [weights[targets == own].mean() for own in self.named]
        return torch.cat([weights, torch.stack(of_names)])

    @property
    def text_weights(self) -> Tensor | None:
        """One a text and a name, `[texts + names]`, whose mean is 1; `None` is 1 each."""
        return None if self.weights is None else text_weights(self.weights)

    def described(self) -> dict[str, Any]:
        """What the vectors depend on, and what is saved with them, as values of JSON."""
        texts = hashlib.sha256(repr(self.ids).encode())
        start, first = self.start, hashlib.sha256()
        tensors = {} if start is None else {**start.copies, **start.vectors}
        for name, value in sorted(tensors.items()):
            first.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
        return {
            **asdict(self.recipe),
            "engine": ENCODER,
            "steps": self.settings.steps,
            "base model": fingerprint(self.base.model).to_json(),
            "embedding": self.base.described(),
            "texts": texts.hexdigest(),
            "labels": self.data.classes,
            "targets": self.targets,
            **self.data.described_weights(),
            "first vectors": first.hexdigest(),
            "frozen": {} if start is None else start.frozen,
            "templates": [self.template.source],
            "fields": list(self.data.examples[0]),
            **self.settings.bound,
        }


class EncoderEngine:
    """(IA)³ vectors on a sentence encoder, and a logistic regression on its embeddings."""

    def __init__(self, base: SentenceEncoder, settings: Settings) -> None:
        self.base = base
        self.settings = settings

    def prepare(
        self, data: LabelledTexts, template: str | Sequence[str] | None, start: Adapter | None
    ) -> EncoderTask:
        """Check the settings and tokenize the texts, before the model changes."""
        settings = self.settings
        for name, value, default in (
            ("chat", settings.chat, False),
            ("upper_blocks", settings.upper_blocks, None),
        ):
            if value != default:
                raise IA3Error(
                    f"{name} is {value}, which is a language model's: {self.base.name!r} is a "
                    "sentence encoder; leave it out, or name a language model"
                )
        check_trainable(settings, self.base)
        check_head_size(len(data.classes), self.base.dimension)
        read_in = _template(template, data.examples[0])
        check_fields(data.examples, list(data.examples[0]), [read_in], data.rows)
        ids = tokenized(self.base, _texts(data.examples, read_in))
        _warn_of_cut_texts(self.base, ids)
        named: list[int] = []
        if are_words(data.classes) and not data.multilabel:
            names = self._names(data.classes)
            # A label that no text has is never answered.
            named = [place for place in sorted({*data.targets}) if names.count(names[place]) == 1]
            ids += [names[place] for place in named]
        recipe = self._recipe(len(data.examples))
        return EncoderTask(data, read_in, recipe, ids, named, start, settings, self.base)

    def _recipe(self, texts: int) -> EncoderRecipe:
        settings = self.settings
        recipe = EncoderRecipe.of(texts, settings.steps, settings.seed)
        if settings.learning_rate is None:
            return recipe
        return replace(recipe, learning_rate=settings.learning_rate)

    def _names(self, labels: Iterable[Label]) -> list[list[int]]:
        return tokenized(self.base, list(map(readable, labels)))

    def train(
        self,
        task: EncoderTask,
        on_step: Callable[[EncoderStep], None] | None = None,
        checkpoints: str | Path | None = None,
        seen: Sequence[Seen] | None = None,
    ) -> Fit:
        """Train an adapter, then the head on what it embeds.

        `seen` is what was seen of several engines; else it is this one, frozen.

        Raises:
            IA3Error: the embeddings are not finite.
        """
        base, data, history = self.base, task.data, []
        named = [data.classes[place] for place in task.named]
        checkpoint = None if checkpoints is None else Checkpoint(checkpoints, task.described())
        if seen is None:
            seen = self.seen(task)
        recipe = task.recipe
        if self.settings.learning_rate is None:
            candidates = [each.candidate for each in seen]
            frozen = next(each for each in candidates if each.engine == ENCODER)
            recipe = recipe.after(frozen.accuracy)
        begin = task.start or encoder_sites(base)
        with self._carrying(begin, "init_from") as model, self._threads() as threads:
            if self.settings.steps > 0:
                texts = task.ids, task.targets
                most = self.settings.max_tokens
                training = EncoderTraining(
                    base, model, *texts, recipe, max_tokens=most, weights=task.text_weights
                )
                training.run(on_step, checkpoint, threads)
                history = training.history
            found = self._embeddings(task.ids, model, threads, "reading the texts again", named)
            adapter = trained_adapter(model)
        with working("fitting the head"):
            head = fit_head(found, task.targets, len(data.classes), task.weights)
        return Fit(
            engine=ENCODER,
            model=self.base.name,
            classes=data.classes,
            choices=[readable(label) for label in data.classes],
            templates=[task.template.source],
            fields=list(data.examples[0]),
            adapter=adapter,
            settings=self.settings.kept(recipe.learning_rate),
            threads=threads.count if history else None,
            head=head,
            multilabel=data.multilabel,
            embedding=Embedding(**base.described()),
            history=history,
            candidates=[each.candidate for each in seen],
            held_out=list(seen),
        )

    def read(
        self,
        fit: Fit,
        examples: list[Mapping[str, Any]],
        progress: Callable[[int], None] | None,
    ) -> tuple[Tensor, Tensor]:
        """Probabilities, `[examples, classes]`, and embeddings, `[examples, dim]`."""
        assert fit.head is not None
        check_embeds_so(self.base, fit.embedding)
        fit.head.check_fits(self.base.dimension)
        ids = tokenized(self.base, _texts(examples, Template(fit.templates[0])))
        _warn_of_cut_texts(self.base, ids)
        with self._carrying(fit.adapter) as model:
            found = embeddings(
                self.base, ids, model=model, max_tokens=self.settings.max_tokens, progress=progress
            )
        said = fit.head.probabilities(found, fit.temperature, multilabel=fit.multilabel)
        return said, found

    def seen(self, task: EncoderTask) -> list[Seen]:
        """How well a head on frozen embeddings does on training texts that it is fitted without.

        With one text a class there is no such text: the label whose name is nearest counts then.

        Raises:
            IA3Error: the embeddings are not finite.
        """
        data, targets = task.data, task.data.targets
        learned = [data.classes[place] for place in task.named]
        # Of ones: they change no bit.
        with self._carrying(encoder_sites(self.base)) as model, self._threads() as threads:
            found = self._embeddings(task.ids, model, threads, "reading the texts", learned)
        with working("asking the frozen encoder"):
            held_out = held_out_answers(
                found,
                task.targets,
                len(data.classes),
                self.settings.seed,
                task.weights,
                always=len(task.named),
            )
        rows, right, how = held_out.texts, held_out.right, "frozen, held-out folds"
        probabilities = held_out.probabilities if rows else None
        if not rows:
            rows, how = list(range(len(targets))), "frozen, by the labels' names"
            right = share_right(self._nearness(found[: len(targets)], data.classes), targets)
        seen = seen_of(ENCODER, self.base.name, data, rows, right, how, probabilities)
        return processes().from_first(lambda: [seen])

    def _nearness(self, found: Tensor, labels: Sequence[Label]) -> Tensor:
        """Cosines of texts' frozen embeddings `[texts, dim]` with the names', `[texts, labels]`."""
        with self._carrying(encoder_sites(self.base)) as model, self._threads() as threads:
            names = self._names(labels)
            named = self._embeddings(names, model, threads, "reading the labels", labels)
        return F.normalize(found) @ F.normalize(named).T

    def seen_trained(self, task: EncoderTask, seen: Sequence[Seen]) -> Seen:
        """How well it does, trained, on training texts that it was trained without.

        Of many texts not every fold is trained without: `ANSWERS` of them tell enough. It takes one
        thread unless it is told another number: what is faster would change the last bits, and so
        the answers.

        Args:
            task: with folds, which `seen` was asked by too.
            seen: before any training.

        Raises:
            IA3Error, DivergedError: as of `train`.
        """
        data, targets = task.data, task.data.targets
        parts = folds(targets, self.settings.seed, FOLDS)
        parts = parts[: math.ceil(ANSWERS / len(parts[0][1]))]
        tasks = [self._without(task, {*held_out}) for _, held_out in parts]
        answers = torch.zeros(len(targets), len(data.classes), dtype=torch.float64)
        steps = sum(part.recipe.steps for part in tasks)
        engine = EncoderEngine(
            self.base, replace(self.settings, threads=self.settings.threads or 1)
        )
        with working("training the encoder without a part of the texts", steps) as progress:
            for part, (_, held_out) in zip(tasks, parts, strict=True):
                fit = engine.train(part, lambda step: progress(1), seen=seen)
                answers[held_out] = engine._answers(fit, [task.ids[text] for text in held_out])
        rows = sorted(text for _, held_out in parts for text in held_out)
        right = share_right(answers[rows], [targets[text] for text in rows])
        how = "trained, held-out folds"
        trained = seen_of(ENCODER, self.base.name, data, rows, right, how, answers[rows])
        return processes().from_first(lambda: trained)

    def _answers(self, fit: Fit, ids: list[list[int]]) -> Tensor:
        """Probabilities of training texts, `[texts, classes]`."""
        assert fit.head is not None
        with self._carrying(fit.adapter) as model, self._threads() as threads:
            found = self._embeddings(ids, model, threads, "asking the trained encoder")
        return fit.head.probabilities(found, fit.temperature, multilabel=fit.multilabel)

    def _without(self, task: EncoderTask, held_out: Collection[int]) -> EncoderTask:
        """The task without some of its texts."""
        data = task.data
        kept = [text for text in range(len(data.examples)) if text not in held_out]
        part = replace(
            data,
            examples=[data.examples[text] for text in kept],
            labels=[data.labels[text] for text in kept],
            weights=None if data.weights is None else data.weights[kept],
            rows=None,
        )
        ids = [task.ids[text] for text in kept] + task.ids[len(data.examples) :]
        return replace(task, data=part, ids=ids, recipe=self._recipe(len(kept)))

    @contextmanager
    def _carrying(
        self, adapter: Adapter | IA3Config, source: str = "adapter"
    ) -> Iterator[IA3Model]:
        """The base with an adapter, in evaluation mode: dropout would draw numbers."""
        with temporary_adapter(self.base, adapter, source=source) as model:
            self.base.model.eval()  # each module's mode is put back with the adapter's end
            yield model

    def _threads(self) -> Threads:
        return threads_of(self.settings, self.base)

    def _embeddings(
        self,
        ids: list[list[int]],
        model: nn.Module,
        threads: Threads,
        what: str,
        labels: Sequence[Label] = (),
    ) -> Tensor:
        """Of training texts, `[texts, dim]`, checked; `what` is shown meanwhile.

        The last of them are the names of the `labels`. Several processes embed a part each.
        """
        most, job = self.settings.max_tokens, processes()
        own = job.own(ids)
        parts = [torch.zeros(0, self.base.dimension)]
        with working(what, len(own)) as progress:
            for start in range(0, len(own), AT_ONCE):
                part = own[start : start + AT_ONCE]
                compute = partial(embeddings, self.base, part, model=model, max_tokens=most)
                parts.append(threads.step(compute, sum(map(len, part))))
                progress(len(part))
        found = torch.cat(job.gather(torch.cat(parts)))
        for text in (~found.isfinite().all(1)).nonzero()[:1].flatten().tolist():
            names = [f"text {place}" for place in range(len(ids) - len(labels))]
            names += [f"the label {label!r}" for label in labels]
            raise IA3Error(
                f"the model's embedding of {names[text]} is not finite: its weights or the vectors "
                "are broken, or its dtype is too narrow"
            )
        return found


def encoder_sites(base: SentenceEncoder) -> IA3Config:
    """The config that rescales every linear layer's output, or the feed-forward input.

    A pooler is left out, where there is one: sentence encoders pool without it.
    """
    has_pooler = any(re.fullmatch(POOLER, name) for name, _ in base.model.named_modules())
    return IA3Config(
        task_type=TaskType.FEATURE_EXTRACTION,
        target_modules="all-linear",
        exclude_modules=POOLER if has_pooler else None,
    )


def check_embeds_so(base: SentenceEncoder, fitted: Embedding | None) -> None:
    """Raise `IA3Error` where an encoder embeds otherwise than a classifier was fitted with."""
    if fitted is None:  # an earlier version's file does not say it
        return
    now = base.described()
    differing = [
        DIGESTS.get(name) or f"{name} is {shown(now[name])}, and was {shown(was)}"
        for name, was in fitted
        if now[name] != was
    ]
    if differing:
        raise IA3Error(
            f"the encoder {base.name or type(base.model).__name__!r} embeds texts otherwise than "
            f"the classifier was fitted with: {'; '.join(differing)}: give the encoder as it was, "
            "or fit the classifier again"
        )


def _template(template: str | Sequence[str] | None, example: Mapping[str, Any]) -> Template:
    """What makes a text of an example: its fields, joined, where nothing else is said."""
    check_has_fields(example)
    if template is None:
        template = fields_joined(example)
    templates = checked_templates(template)
    if len(templates) > 1:
        raise IA3Error(
            f"there are {len(templates)} templates: a sentence encoder reads a text once, expected "
            "one"
        )
    return templates[0]


def fields_joined(names: Iterable[str]) -> str:
    """The template that writes the fields, one after the other."""
    return BETWEEN.join(f"{{{{ fields[{name!r}] }}}}" for name in names)


def _warn_of_cut_texts(base: SentenceEncoder, ids: Sequence[Sequence[int]]) -> None:
    full = sum(len(of_text) >= base.max_length for of_text in ids)
    if full:
        fill = "fills" if full == 1 else "fill"
        warn_caller(
            f"{full} of {counted(len(ids), 'text')} {fill} the {base.max_length} tokens that "
            f"{base.name!r} reads: what they have beyond these is not read"
        )


def _texts(examples: Sequence[Mapping[str, Any]], template: Template) -> list[str]:
    return [template.render(example, []) for example in examples]
