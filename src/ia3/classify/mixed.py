"""Texts of many classifiers in one batch: each row has an adapter, labels and a head of its own."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..arguments import instance, listed
from ..bank.bank import AdapterBank, Version
from ..base.encoders import SentenceEncoder, load_base
from ..base.loading import BaseModel
from ..base.torch_state import usual_state
from ..core.sites import Site
from ..errors import IA3Error, InvalidTypeError, MissingFileError, StateError, naming, shown
from ..files.saved import TASK_NAME
from ..model.adapters import check_string
from ..sentences.embedding import embeddings, tokenized
from ..sentences.head import Head
from ..targets.structure import block_lists
from ..tfew.prompts.encoding import EncodedExample, Encoder, warn_of_cut_texts
from ..tfew.prompts.labels import Label, Text
from ..tfew.prompts.templates import Template
from ..tfew.scoring.choices import choice_scores
from .encoder import check_embeds_so, fields_joined
from .engine import ENCODER, KINDS, LANGUAGE_MODEL
from .estimator import cut_for, read_task
from .inputs import check_fields, example_of, rows_of, with_field
from .task_file import EngineName, TaskFile
from .text_classifier import not_finite

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Classified:
    """What a classifier says of a text.

    Attributes:
        label: the most probable one.
        probability: of that label.
        probabilities: label -> its probability, in the order of the classifier's `classes_`.
        labels: all that the text has: `label` alone; of a classifier whose texts have several, each
            whose probability is at least one half.
    """

    label: Label
    probability: float
    probabilities: dict[Label, float]
    labels: list[Label]


class Ranking(Protocol):
    """Scores choices in the place of the bank's model, which may have no values then."""

    def __call__(
        self,
        prompts: Sequence[EncodedExample],
        places: Sequence[int],
        values: Mapping[Site, Tensor],
    ) -> Tensor:
        """Length-normalised log-probabilities, `[prompts, choices]`, as `choice_scores` has them.

        Each prompt is asked with the values in its place, site -> `[adapters, dim]`; where there
        are no sites, of the base model.
        """


@usual_state()
def classify(
    bank: AdapterBank,
    texts: Sequence[Text],
    names: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[Classified]:
    """Classify texts in one batch, each by the classifier of its name.

    Each row is computed with the adapter of its classifier, and read by its head, or asked by its
    templates for its choices: as `FewShotClassifier.predict_proba` of that classifier alone. Labels
    and vectors are those of one save: what `refresh` takes up counts for calls that begin later.

    Args:
        bank: of the model that the classifiers were fitted on. Each is added by the folder that
            `FewShotClassifier.save` wrote, e.g. `bank.add("customer-a", "classifiers/a")`.
        texts: strings, or mappings from field names to values, `[texts]`.
        names: of the bank's classifiers, one a text.
        tokenizer: for a model whose config does not say where it came from.

    Returns:
        `[texts]`: a list, as each classifier has labels of its own.

    Raises:
        InvalidTypeError: an argument, a name or a text is of another type.
        UnknownNameError: the bank has no adapter of a name.
        MissingFileError: an adapter is no classifier: it has no task beside it, or no head.
        BrokenFileError: a classifier's task or head is damaged, or of other vectors.
        StateError: an adapter cannot be loaded, all slots are pinned, the bank was closed, its
            model's adapters are merged or disabled, or its encoder is in training mode.
        IA3Error: there is not one name a text; a text lacks a field or has one that is
            no text, finite number or date; the bank's model has no tokenizer, or is not the one
            that a classifier was fitted on; or scores are not finite.

    Example:
        >>> from transformers import AutoModel
        >>> import ia3
        >>> from ia3.base.embedded import embedded_encoder_folder
        >>> classifier = ia3.FewShotClassifier("all-minilm-l6-v2", steps=2)
        >>> texts = ["I was charged twice.", "The courier left my parcel in the rain."]
        >>> classifier.fit(texts, ["billing", "delivery"]).save("customer-a")
        >>> bank = ia3.AdapterBank(AutoModel.from_pretrained(embedded_encoder_folder()))
        >>> bank.add("customer-a", "customer-a")
        >>> ia3.classify(bank, ["Charged again!"], ["customer-a"])[0].label
        'billing'
    """
    instance("bank", bank, AdapterBank, "an AdapterBank")
    expected = "a list of names, one a text"
    if isinstance(names, Set):
        raise InvalidTypeError(f"names is {shown(names)}, which has no order: expected {expected}")
    asked = listed("names", names, expected)
    for name in asked:
        check_string(name)
    given = rows_of(texts)
    if len(asked) != len(given):
        raise IA3Error(f"there are {len(asked)} names and {len(given)} texts: expected one each")
    answers = _Answers([None] * len(given), raising=True)
    _answer(answers, bank, given, asked, tokenizer, _How())
    return [found for found in answers.found if isinstance(found, Classified)]


@usual_state()
def classify_each(
    bank: AdapterBank,
    texts: Sequence[Text],
    names: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    untuned: bool = False,
    ranking: Ranking | None = None,
) -> list[Classified | IA3Error]:
    """As `classify`, but a text that cannot be classified has its error in its place, `[texts]`.

    With `untuned` the answers are those of the base model, a language model, without any vectors:
    in the templates of each classifier, for its choices, at temperature 1. With a `ranking` the
    choices of a language model are scored by that.

    Raises:
        IA3Error: the bank's model has no tokenizer.
    """
    answers = _Answers([None] * len(texts), raising=False)
    _answer(answers, bank, texts, names, tokenizer, _How(untuned, ranking))
    return [found for found in answers.found if found is not None]


@dataclass(frozen=True)
class _How:
    """How a language model is asked; see `classify_each`."""

    untuned: bool = False
    ranking: Ranking | None = None


@dataclass(frozen=True, eq=False)
class _Answers:
    """What is known of each text by now, `[texts]`: its answer, or why there is none.

    With `raising` an error is raised instead, before any text has an answer where that can be.
    """

    found: list[Classified | IA3Error | None]
    raising: bool

    @contextmanager
    def of(self, rows: Iterable[int]) -> Iterator[None]:
        """Within the context, an `IA3Error` is the answer of these texts."""
        try:
            yield
        except IA3Error as error:
            if self.raising:
                raise
            for row in rows:
                self.found[row] = error

    def called(self, row: int) -> str:
        """What messages call a text; an error in its place needs no number."""
        return f"text {row}" if self.raising else "the text"


def _answer(
    answers: _Answers,
    bank: AdapterBank,
    texts: Sequence[Any],
    names: Sequence[str],
    tokenizer: Any,
    how: _How,
) -> None:
    """Fill the answers in."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    # The values and what is beside them, at once: a task never meets another version's vectors.
    values, versions = _versions(answers, bank, rows)
    if not versions:
        return
    served = _served(bank, tokenizer)
    asked = _checked(answers, served, texts, rows, versions)
    batch = _Batch(bank, served, values, answers, how)
    try:
        found = batch.probabilities(asked)
        broken = [row for row, each in found.items() if not math.isfinite(sum(each))]
        # What is not finite spreads to others in a packed row.
        for row in broken if len(found) > 1 else ():
            found |= batch.probabilities({row: asked[row]})
    except IA3Error as error:
        if answers.raising:
            raise
        # One whose adapter, say, cannot be routed: which one, each says for itself.
        for row in asked:
            each = _Answers([error], raising=False)
            if len(texts) > 1:
                _answer(each, bank, [texts[row]], [names[row]], tokenizer, how)
            answers.found[row] = each.found[0]
        return
    for row, probabilities in found.items():
        with answers.of([row]):
            if not math.isfinite(sum(probabilities)):
                raise not_finite(answers.called(row))
            answers.found[row] = _classified(asked[row].task.file, probabilities)


def _checked(
    answers: _Answers,
    served: _Served,
    texts: Sequence[Any],
    rows: Mapping[str, list[int]],
    versions: Mapping[str, Version | None],
) -> dict[int, _Asked]:
    """What the texts that can be asked are asked with, by row; `rows` are by adapter."""
    asked: dict[int, _Asked] = {}
    for place, (name, version) in enumerate(versions.items()):
        with answers.of(rows[name]):
            task = served.task(name, version)
            read = {}
            for row in rows[name]:
                with answers.of([row]):
                    read[row] = task.example(texts[row], row, answers)
            cut = cut_for(served.base, [*read.values()], task.file.max_words)
            for row, example in zip(read, cut, strict=True):
                asked[row] = _Asked(name, place, task, example)
    return dict(sorted(asked.items()))


def _versions(
    answers: _Answers, bank: AdapterBank, rows: Mapping[str, list[int]]
) -> tuple[Mapping[Site, Tensor], dict[str, Version | None]]:
    """The values of the adapters that can be had, in the order of the versions beside them."""
    names = [*rows]
    try:
        values, versions = bank.versions(names)
        return values, dict(zip(names, versions, strict=True))
    except IA3Error:
        if answers.raising:
            raise
    # Which one it is, each says for itself.
    found: dict[str, Mapping[Site, Tensor]] = {}
    beside: dict[str, Version | None] = {}
    for name in names:
        with answers.of(rows[name]):
            found[name], (beside[name],) = bank.versions([name])
    ones = {site: torch.ones_like(value) for each in found.values() for site, value in each.items()}
    together = {
        site: torch.cat([each.get(site, absent) for each in found.values()])
        for site, absent in ones.items()
    }
    return together, beside


def _classified(file: TaskFile, probabilities: list[float]) -> Classified:
    most, labels = max(probabilities), file.labels
    label = labels[probabilities.index(most)]
    by_label = dict(zip(labels, probabilities, strict=True))
    own = [name for name, p in by_label.items() if p >= 0.5] if file.multilabel else [label]
    return Classified(label, most, by_label, own)


@dataclass(frozen=True, eq=False)
class _Task:
    """A classifier besides its vectors; an encoder's head is float64."""

    file: TaskFile
    templates: list[Template]
    encoder: Encoder | None = None
    head: Head | None = None

    def example(self, text: Any, row: int, answers: _Answers) -> Mapping[str, Any]:
        """A text as this classifier reads it, checked."""
        fields = self.file.fields
        examples = with_field([example_of(text, answers.called(row))], fields)
        check_fields(examples, fields, self.templates, [row], answers.called)
        return examples[0]


@dataclass(frozen=True, eq=False)
class _Served:
    """The base model of a bank, and its classifiers' tasks: each is read once a version."""

    base: SentenceEncoder | BaseModel
    tasks: weakref.WeakKeyDictionary[Version, _Task] = field(
        default_factory=weakref.WeakKeyDictionary
    )

    def task(self, name: str, version: Version | None) -> _Task:
        """The task of a classifier, checked against the base model."""
        if version is None:
            raise MissingFileError(
                f"adapter {name!r} is no classifier: it has no {TASK_NAME} beside it; save the "
                "FewShotClassifier, and add the folder that it was saved in"
            )
        task = self.tasks.get(version)
        if task is None:
            with naming(f"adapter {name!r}"):
                task = self.tasks[version] = _read(version, self.base)
        return task

    @cached_property
    def _blocks(self) -> tuple[str, list[nn.Module]]:
        """The name of the list of the model's blocks, and these; none where there are several."""
        lists = block_lists(self.base.model)
        if len(lists) != 1:
            return "", []
        ((name, blocks),) = lists.items()
        return name, list(blocks)

    def touched(self, modules: Sequence[str]) -> Sequence[nn.Module]:
        """The model's uppermost blocks that these modules are in; none, where one is elsewhere."""
        name, blocks = self._blocks
        places = [
            module.removeprefix(f"{name}.").split(".")[0] if module.startswith(f"{name}.") else ""
            for module in modules
        ]
        if not all(place.isdecimal() for place in places):
            return []
        # What touches none shares all but the last one.
        lowest = min(map(int, places), default=len(blocks) - 1)
        return blocks[lowest:] if lowest > 0 else []


def _read(version: Version, base: SentenceEncoder | BaseModel) -> _Task:
    file, head = read_task(version.beside)
    engine: EngineName = ENCODER if isinstance(base, SentenceEncoder) else LANGUAGE_MODEL
    if file.engine != engine:
        raise IA3Error(
            f"it is a classifier on a {KINDS[file.engine]}, and the bank's model is a "
            f"{KINDS[engine]}: add it to a bank of {file.model or 'the model it was fitted on'!r}"
        )
    if version.base is not None and (other := version.base.difference(base.model)):
        raise IA3Error(f"it was fitted on another model than the bank's: {other}")
    templates = [Template(source) for source in file.templates]
    if isinstance(base, BaseModel):
        return _Task(file, templates, Encoder(base, file.choices, chat=file.chat))
    assert head is not None
    templates = templates or [Template(fields_joined(file.fields))]
    check_embeds_so(base, file.embedding)
    head.check_fits(base.dimension)
    return _Task(file, templates, None, Head(head.weight.double(), head.bias.double()))


# By bank. A reference to the base keeps it, and with it its tokenizer, in memory.
_of_banks: weakref.WeakKeyDictionary[AdapterBank, _Served] = weakref.WeakKeyDictionary()


def _served(bank: AdapterBank, tokenizer: Any) -> _Served:
    """What was read for a bank before, or is now: with this tokenizer, or with whichever."""
    found = _of_banks.get(bank)
    if found is None or tokenizer not in (None, found.base.tokenizer):
        model = bank.model.get_base_model()
        found = _of_banks[bank] = _Served(load_base(model, tokenizer=tokenizer))
    return found


@dataclass(frozen=True, eq=False)
class _Asked:
    """What one text is asked with: a classifier's name and task, and the place of its values."""

    name: str
    place: int
    task: _Task
    example: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class _Batch:
    """How the texts of a call are asked, by row; what comes up goes to the `answers`."""

    bank: AdapterBank
    served: _Served
    values: Mapping[Site, Tensor]
    answers: _Answers
    how: _How

    def probabilities(self, asked: Mapping[int, _Asked]) -> dict[int, list[float]]:
        """What the texts are by their heads, or by their choices: row -> `[classes]`."""
        base = self.served.base
        if isinstance(base, SentenceEncoder):
            return self._by_embeddings(base, asked)
        return self._by_ranking(base, asked)

    def _by_embeddings(
        self, base: SentenceEncoder, asked: Mapping[int, _Asked]
    ) -> dict[int, list[float]]:
        if self.how.untuned:
            raise IA3Error(
                "a sentence encoder says nothing without its classifier's head: untuned answers "
                "are a language model's"
            )
        if base.model.training:
            raise StateError("the bank's encoder is in training mode: call eval() on it first")
        places = {each.name: each.place for each in asked.values()}

        def routed(adapter_names: Sequence[str], **inputs: Any) -> Any:
            index = torch.tensor([places[name] for name in adapter_names])
            with self._routed(index):
                return base.model(**inputs)

        ids = self._tokenized(base, asked)
        names = [asked[row].name for row in ids]
        found = embeddings(base, [*ids.values()], model=routed, adapter_names=names)
        # Name -> the places of its texts among these.
        members: dict[str, list[int]] = {}
        for place, name in enumerate(names):
            members.setdefault(name, []).append(place)
        rows = [*ids]
        probabilities: dict[int, list[float]] = {}
        for of_name in members.values():
            task = asked[rows[of_name[0]]].task
            assert task.head is not None
            by_head = task.head.probabilities(
                found[of_name], task.file.temperature, multilabel=task.file.multilabel
            )
            of_rows = (rows[place] for place in of_name)
            probabilities.update(zip(of_rows, by_head.tolist(), strict=True))
        return probabilities

    def _tokenized(
        self, base: SentenceEncoder, asked: Mapping[int, _Asked]
    ) -> dict[int, list[int]]:
        """Each text's token ids in its template."""
        texts = {}
        for row, each in asked.items():
            with self.answers.of([row]):
                texts[row] = each.task.templates[0].render(each.example, [])
        # One text may be asked of many classifiers.
        different = [*dict.fromkeys(texts.values())]
        try:
            ids_of = dict(zip(different, tokenized(base, different), strict=True))
            return {row: ids_of[text] for row, text in texts.items()}
        except IA3Error:
            if self.answers.raising:
                raise
            ids = {}
            for row, text in texts.items():
                with self.answers.of([row]):
                    (ids[row],) = tokenized(base, [text])
            return ids

    def _by_ranking(self, base: BaseModel, asked: Mapping[int, _Asked]) -> dict[int, list[float]]:
        """The probabilities of the choices, averaged over the templates, row -> `[classes]`."""
        prompts = self._prompts(base, asked)
        places = [asked[row].place for row, each in prompts.items() for _ in each]
        together = [prompt for each in prompts.values() for prompt in each]
        rank = self.how.ranking or partial(self._ranked_here, base)
        scores = rank(together, places, self._values)
        probabilities = {}
        of_texts = torch.split(scores, [*map(len, prompts.values())])
        for row, of_templates in zip(prompts, of_texts, strict=True):
            file = asked[row].task.file
            temperature = 1.0 if self.how.untuned else file.temperature
            of_choices = of_templates[:, : len(file.labels)].double() / temperature
            probabilities[row] = of_choices.softmax(-1).mean(0).tolist()
        return probabilities

    def _ranked_here(
        self,
        base: BaseModel,
        prompts: Sequence[EncodedExample],
        places: Sequence[int],
        values: Mapping[Site, Tensor],
    ) -> Tensor:
        """A `Ranking` by the bank's model."""
        place_of = torch.tensor(places)
        # Scoring catches the input of the output layer, for one thread at a time.
        with base.lock:
            return choice_scores(
                base,
                prompts,
                routing=lambda examples: self._routed(place_of[examples.cpu()]),
                touched=self.served.touched(self.bank.model.routes.names(values)),
            )

    def _prompts(
        self, base: BaseModel, asked: Mapping[int, _Asked]
    ) -> dict[int, list[EncodedExample]]:
        """Each text in each template of its task, row -> `[templates]`."""
        prompts, cut = {}, 0
        for row, each in asked.items():
            encoder, templates = each.task.encoder, each.task.templates
            assert encoder is not None
            # A task's encoder is that of all threads.
            with base.lock:
                encoder.truncated = 0
                with self.answers.of([row]):
                    prompts[row] = [encoder.encode(each.example, own) for own in templates]
                cut += encoder.truncated
        warn_of_cut_texts(cut, sum(map(len, prompts.values())))
        return prompts

    def _routed(self, index: Tensor) -> AbstractContextManager[None]:
        """Rows, or tokens, have the values of these places; none of them, where it is untuned."""
        return self.bank.model.routes.entered_with(self._values, index)

    @property
    def _values(self) -> Mapping[Site, Tensor]:
        return {} if self.how.untuned else self.values
