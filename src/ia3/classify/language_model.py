"""The engine on a language model: T-Few's training, and answers by ranking."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..adapter.files import Adapter
from ..adapter.fingerprint import fingerprint
from ..base.loading import BaseModel
from ..base.processes import processes
from ..base.progress import working
from ..core.spread import any_spread
from ..tfew.prompts.encoding import EncodedExample, Encoder, TrainingExample
from ..tfew.prompts.templates import Template
from ..tfew.scoring.choices import USUAL_TEMPERATURE
from ..tfew.scoring.prefix import ranking_scores
from ..tfew.scoring.shared_prompt import tree_length
from ..tfew.temporary_adapter import all_linear, temporary_adapter, without_adapter
from ..tfew.training.recipe import TFewConfig
from .engine import LANGUAGE_MODEL, Fit, Settings, check_trainable, threads_of, trained_adapter
from .ranking import Prompts, encode_all, read_prompts
from .text_classifier import LabelledTexts

if TYPE_CHECKING:
    from ..tfew.training.steps import TrainingStep

LEARNING_RATE = 1e-2
# Texts of which it is timed how many threads they take.
AT_ONCE = 8


@dataclass(frozen=True)
class RankingTask:
    """What a training needs, checked: `start` is the adapter to begin with, `None` for ones."""

    data: LabelledTexts
    prompts: Prompts
    recipe: TFewConfig
    examples: list[TrainingExample]
    start: Adapter | None
    settings: Settings
    base: BaseModel

    @property
    def templates(self) -> list[Template]:
        """What makes prompts of an example."""
        return self.prompts.templates

    def described(self) -> dict[str, Any]:
        """What the vectors depend on, and what is saved with them, as values of JSON."""
        from ..tfew.training.trainer import described_run

        start = self.start
        # Sorted, as an adapter from a file may have another order than the same one in memory.
        first = [] if start is None else [dict(sorted({**start.copies, **start.vectors}.items()))]
        return {
            **described_run(fingerprint(self.base.model), first, self.examples, self.recipe),
            "engine": LANGUAGE_MODEL,
            "steps": self.settings.steps,
            "chat": self.settings.chat,
            "upper_blocks": self.settings.upper_blocks,
            "frozen": {} if start is None else start.frozen,
            "labels": self.data.classes,
            "choices": self.prompts.choices,
            "templates": [template.source for template in self.prompts.templates],
            "fields": list(self.data.examples[0]),
            **self.settings.bound,
        }


class LanguageModelEngine:
    """T-Few on a language model (paper section 3)."""

    def __init__(self, base: BaseModel, settings: Settings) -> None:
        self.base = base
        self.settings = settings

    def prepare(
        self,
        data: LabelledTexts,
        template: str | Sequence[str] | None,
        words: Mapping[Any, str] | None,
        start: Adapter | None,
        *,
        advise: bool = True,
    ) -> RankingTask:
        """Check the settings and encode the examples, before the model changes.

        Args:
            data: the labelled texts.
            template: one or several, or `None` for the default one.
            words: label -> its words, or `None` for the labels' own names.
            start: the adapter to begin with.
            advise: warn of labels that say nothing.
        """
        settings = self.settings
        check_trainable(settings, self.base)
        prompts = read_prompts(data, template, words, advise=advise)
        rate = LEARNING_RATE if settings.learning_rate is None else settings.learning_rate
        # The untuned model takes no step; its other settings are checked all the same.
        recipe = TFewConfig(
            steps=max(settings.steps, 1),
            learning_rate=rate,
            seed=settings.seed,
            max_tokens=settings.max_tokens,
            stop_at_plateau=True,
        )
        encoder = Encoder(self.base, prompts.choices, chat=settings.chat)
        encoded = encode_all(encoder, data.examples, prompts.templates)
        given = data.text_weights
        weights = [1.0] * len(encoded) if given is None else given.tolist()
        examples = [TrainingExample(*of) for of in zip(encoded, data.targets, weights, strict=True)]
        return RankingTask(data, prompts, recipe, examples, start, settings, self.base)

    def train(
        self,
        task: RankingTask,
        on_step: Callable[[TrainingStep], None] | None = None,
        checkpoints: str | Path | None = None,
    ) -> Fit:
        """Train an adapter by the T-Few recipe."""
        # Imported here, as prediction needs no Trainer, whose import takes seconds.
        from ..tfew.training.trainer import train

        base, history, data = self.base, [], (task.examples, task.recipe)
        threads = threads_of(self.settings, base)
        begin = task.start or all_linear(base, self.settings.upper_blocks)
        with temporary_adapter(base, begin, source="init_from") as model:
            if self.settings.steps > 0:
                history = train(
                    base, model, *data, on_step, checkpoints=checkpoints, threads=threads
                )
            adapter = trained_adapter(model)
        return Fit(
            engine=LANGUAGE_MODEL,
            model=self.base.name,
            classes=task.data.classes,
            choices=task.prompts.choices,
            templates=[template.source for template in task.prompts.templates],
            fields=list(task.data.examples[0]),
            adapter=adapter,
            settings=self.settings.kept(task.recipe.learning_rate),
            # An untuned model's scores are not so far apart.
            temperature=USUAL_TEMPERATURE if history or task.start is not None else 1.0,
            threads=threads.count if history else None,
            history=history,
        )

    def probabilities(
        self,
        fit: Fit,
        examples: list[Mapping[str, Any]],
        progress: Callable[[int], None] | None,
    ) -> Tensor:
        """The softmax of the choices' mean log-probabilities over the temperature."""
        encoder = Encoder(self.base, fit.choices, chat=self.settings.chat)
        encoded = encode_all(encoder, examples, [Template(source) for source in fit.templates])
        with temporary_adapter(self.base, fit.adapter):
            scores = [
                ranking_scores(
                    self.base, list(prompts), max_tokens=self.settings.max_tokens, progress=progress
                )
                for prompts in zip(*encoded, strict=True)
            ]
        return (torch.stack(scores).double() / fit.temperature).softmax(-1).mean(0)

    def read(
        self,
        fit: Fit,
        examples: list[Mapping[str, Any]],
        progress: Callable[[int], None] | None,
    ) -> tuple[Tensor, Tensor]:
        """Probabilities, `[examples, classes]`, and their roots, which are vectors of length 1."""
        found = self.probabilities(fit, examples, progress)
        return found, found.sqrt()

    def to_ask(self, task: RankingTask, most_tokens: int) -> list[int]:
        """Training texts, drawn with the seed: so many tokens, with their choices, at most."""
        lengths = [sum(map(tree_length, example.encoded)) for example in task.examples]
        order = list(range(len(lengths)))
        random.Random(self.settings.seed).shuffle(order)
        sums = accumulate(lengths[index] for index in order)
        return [index for index, tokens in zip(order, sums, strict=True) if tokens <= most_tokens]

    def untuned_answers(self, task: RankingTask, asked: Sequence[int]) -> Tensor:
        """The untuned model's scores of some of the training texts, `[asked, classes]`.

        They are log-probabilities, averaged over the templates, less each class's mean over the
        texts (Zhou et al. 2023, arXiv 2309.17249). Untuned, a model answers the same to most texts;
        what tells them apart are the differences. Of one that stays untuned nothing is taken off.
        Several processes ask a part each, unless the model is spread over them.
        """
        job = processes()
        # Each pass of a model that is spread is the work of all.
        together = any_spread(self.base.model)
        own = asked if together else job.own(asked)
        parts = [torch.zeros(0, len(task.prompts.choices), dtype=torch.float64)]
        with (
            without_adapter(self.base),
            threads_of(self.settings, self.base) as threads,
            working("asking the untuned language model", len(own)) as progress,
        ):
            for start in range(0, len(own), AT_ONCE):
                part = [task.examples[i].encoded for i in own[start : start + AT_ONCE]]
                parts.append(threads.step(partial(self._scores, part), len(part)))
                progress(len(part))
        found = torch.cat(parts) if together else torch.cat(job.gather(torch.cat(parts)))
        return found - found.mean(0) if self.settings.steps else found

    def _scores(self, encoded: Sequence[tuple[EncodedExample, ...]]) -> Tensor:
        """The log-probabilities of the classes, `[texts, classes]`, averaged over the templates."""
        most = self.settings.max_tokens
        scores = [
            ranking_scores(self.base, list(prompts), max_tokens=most)
            for prompts in zip(*encoded, strict=True)
        ]
        return torch.stack(scores).double().log_softmax(-1).mean(0)
