"""A task's score under each of its templates, and their median, as the paper reports it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ...arguments import check_callable, flag, instance, listed, number, whole
from ...base.loading import BaseModel
from ...errors import IA3Error
from ..prompts.encoding import EncodedExample, Encoder
from ..prompts.tasks import Task, encode_labelled
from .choices import MAX_TOKENS
from .prefix import ranking_scores

BASE = "a BaseModel, as load_base_model gives it"
ENCODED = "a list of EncodedExample, as Encoder.encode gives them"


@dataclass(frozen=True)
class Spread:
    """The median of some scores, and the quartiles on either side of it."""

    median: float
    lower: float
    upper: float


def spread(scores: Sequence[float]) -> Spread:
    """The median and the quartiles, linear between two scores.

    Raises:
        InvalidTypeError: one is no number.
        IA3Error: there is no score.
    """
    given = [number("a score", score, "a number") for score in listed("scores", scores, "a list")]
    if not given:
        raise IA3Error("no scores to take the median of")
    lower, median, upper = np.percentile(given, [25, 50, 75])
    return Spread(float(median), float(lower), float(upper))


@dataclass(frozen=True)
class TemplateScore:
    """The accuracy under one template, over the examples that it asks something of."""

    template: str
    score: float
    examples: int


@dataclass(frozen=True)
class Evaluation:
    """A task's scores, one a template."""

    task: str
    templates: tuple[TemplateScore, ...]

    @property
    def spread(self) -> Spread:
        """Over the templates."""
        return spread([template.score for template in self.templates])


def evaluate(
    base: BaseModel, task: Task, *, chat: bool = False, max_tokens: int = MAX_TOKENS
) -> Evaluation:
    """Rank the choices of every test example, under every template (paper section 3.5).

    Args:
        base: the model, with the adapter to evaluate active on it.
        task: its `test` examples are labelled.
        chat: put each prompt into the tokenizer's chat template.
        max_tokens: computed in one forward pass, unless one example alone is longer.

    Raises:
        InvalidTypeError: an argument is of another type.
        IA3Error: there are no test examples, one has no answer, a template asks nothing of any of
            them, or the model's scores are not finite.
    """
    instance("base", base, BaseModel, BASE)
    instance("task", task, Task, "a Task")
    whole("max_tokens", max_tokens, 1)
    if not task.test:
        raise IA3Error(f"task {task.name!r} has no test examples to evaluate")
    encoder = Encoder(base, chat=flag("chat", chat))
    scores = []
    for template in task.templates:
        rendered = [encode_labelled(encoder, template, row) for row in task.test]
        asked = [example for example in rendered if example is not None]
        if not asked:
            raise IA3Error(f"template {template.name!r} asks nothing of any test example")
        predicted = predict_choices(base, [encoded for encoded, _ in asked], max_tokens=max_tokens)
        right = sum(p == answer for p, (_, answer) in zip(predicted, asked, strict=True))
        scores.append(TemplateScore(template.name, right / len(asked), len(asked)))
    return Evaluation(task.name, tuple(scores))


def predict_choices(
    base: BaseModel,
    examples: Sequence[EncodedExample],
    *,
    max_tokens: int = MAX_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> list[int]:
    """The index of each example's most likely choice, by length-normalised log-probability.

    Args:
        base, max_tokens: as in `evaluate`.
        examples: each with any number of choices.
        progress: called with the number of examples done since the last call.

    Raises:
        InvalidTypeError: an argument is of another type.
        IA3Error: `max_tokens` is below 1, or the model's scores are not finite.
    """
    instance("base", base, BaseModel, BASE)
    whole("max_tokens", max_tokens, 1)
    check_callable("progress", progress)
    for example in listed("examples", examples, ENCODED):
        instance("an example", example, EncodedExample, ENCODED)
    predicted = [0] * len(examples)
    for count in sorted({len(example.choices) for example in examples}):
        rows = [i for i, example in enumerate(examples) if len(example.choices) == count]
        part = [examples[i] for i in rows]
        scores = ranking_scores(base, part, max_tokens=max_tokens, progress=progress)
        if not torch.isfinite(scores).all():
            causes = "its weights or the vectors are broken, or its dtype is too narrow"
            raise IA3Error(f"the model's scores are not finite: {causes}")
        for i, best in zip(rows, scores.argmax(1).tolist(), strict=True):
            predicted[i] = best
    return predicted
