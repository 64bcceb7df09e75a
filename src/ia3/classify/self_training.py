"""Self-training: a classifier's own answers to texts without labels, learned from once.

Whether that helps is measured inside the training set first. Each fold of it is held out from two
trainings: one on the other texts, and one on these and on what the first is sure of. Only where
more of the texts held out are right then, the whole is trained so too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import eq
from typing import Any, TypeVar

import torch

from ..base.processes import processes
from ..errors import warn_caller
from ..sentences.head import folds
from .engine import Candidate, Fit, Step, candidate
from .inputs import key_of
from .task_file import EngineName
from .text_classifier import LabelledTexts

# An answer this probable counts as a label.
SURE = 0.8

Examples = Sequence[Mapping[str, Any]]
T = TypeVar("T")


@dataclass(frozen=True)
class _Counted:
    """A step of one of several trainings, counted over all of them."""

    step: int
    steps: int
    loss: float


class _Progress:
    """Hands on the steps of so many trainings, one after the other, as those of one."""

    def __init__(self, on_step: Callable[[Step], None] | None, trainings: int) -> None:
        self._on_step = on_step
        self._trainings = trainings
        self._before = 0
        self._in_this = 0

    def next_training(self) -> None:
        self._before, self._in_this = self._before + self._in_this, 0
        self._trainings -= 1

    def __call__(self, step: Step) -> None:
        self._in_this = step.step
        if self._on_step is not None:
            # What follows is as long as this one.
            total = self._before + step.steps * (1 + self._trainings)
            self._on_step(_Counted(self._before + step.step, total, step.loss))


def self_trained(
    new: Callable[[EngineName | None], Any],
    data: LabelledTexts,
    unlabelled: Examples,
    seed: int,
    on_step: Callable[[Step], None] | None,
) -> Fit:
    """What a classifier is fitted as with the answers to `unlabelled`, or without them.

    Args:
        new: makes a classifier that is not fitted, of an engine; of `None` it chooses one itself.
        data: the labelled texts, on which alone the engine is chosen.
        unlabelled: the others. Those that are labelled texts too, or there twice, count once.
        seed: of the folds.
        on_step: called after each step of each training.

    Returns:
        A fit whose candidates end with the two that were compared; with a warning the first one
        alone where there is nothing to compare.
    """
    parts = folds(data.targets, seed)
    progress = _Progress(on_step, 2 + 2 * len(parts))
    different = {key_of(example): example for example in unlabelled}
    for example in data.examples:
        different.pop(key_of(example), None)
    others = list(different.values())

    def trained(engine: EngineName | None, texts: Examples, labels: Sequence[Any]) -> Any:
        progress.next_training()
        return new(engine).fit(texts, labels, on_step=progress)

    first = trained(None, data.examples, data.labels)
    fit: Fit = first._fit
    if not others or not parts:
        one = "each text is a labelled one" if not others else "no labelled text can be held out"
        warn_caller(f"unlabelled: {one}, so that nothing is learned from these texts")
        return fit
    engine: EngineName = first.engine_
    right: list[bool] = []
    right_with: list[bool] = []
    # What there is to say of the texts was said by the first training.
    with warnings.catch_warnings(action="ignore"):
        for train, held_out in parts:
            texts, labels = [data.examples[i] for i in train], [data.labels[i] for i in train]
            asked = [data.examples[i] for i in held_out]
            truth = [data.labels[i] for i in held_out]
            without = learned = trained(engine, texts, labels)
            answered, answers = _of_first(_sure(without, others))
            if answered:
                more = [*texts, *answered], [*labels, *answers]
                learned = trained(engine, *more)
            right += _of_first(list(map(eq, without.predict(asked).tolist(), truth)))
            right_with += _of_first(list(map(eq, learned.predict(asked).tolist(), truth)))
        answered, answers = _of_first(_sure(first, others))
        taken = sum(right_with) > sum(right)
        if taken:
            more = [*data.examples, *answered], [*data.labels, *answers]
            learned = trained(engine, *more)._fit
            # What was seen of the labelled texts stays that of the first training.
            changed = ("adapter", "head", "temperature", "settings", "threads", "history")
            fit = replace(fit, **{name: getattr(learned, name) for name in changed})
    with_them = f"and on {len(answered):,} of {len(others):,} unlabelled"
    seen = [
        _seen(first, right, "trained on the labelled"),
        _seen(first, right_with, f"{with_them}, {'taken' if taken else 'left out'}"),
    ]
    return replace(fit, candidates=[*fit.candidates, *seen])


def _of_first(said: T) -> T:
    """What the first of several processes says, as what is learned next is to be the same."""
    return processes().from_first(lambda: said)


def _sure(classifier: Any, texts: Examples) -> tuple[list[Any], list[Any]]:
    """The texts that it is sure of, and its answers."""
    if not texts:
        return [], []
    probabilities = classifier.predict_proba(texts)
    labels = classifier.classes_at(probabilities).tolist()
    sure = [row for row, of_row in enumerate(probabilities) if of_row.max() >= SURE]
    return [texts[row] for row in sure], [labels[row] for row in sure]


def _seen(fitted: Any, right: Sequence[bool], how: str) -> Candidate:
    """How many of the texts held out were right."""
    how = f"{how}: held-out folds"
    return candidate(fitted.engine_, fitted.base.name, torch.tensor(right), how)
