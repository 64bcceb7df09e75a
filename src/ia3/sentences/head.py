"""The head of a classifier on a sentence encoder: a logistic regression on the embeddings."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import IA3Error
from .targets import are_lists, membership, share_right

# The inverse strength of the regularisation. It decides little of what is right, and much of how
# sure the answers are: at this one they are about as sure as they are right (docs/benchmarks.md).
STRENGTH = 100.0
ITERATIONS = 1000
# Held-out answers that tell enough. Of fewer texts folds are drawn anew, but not without end.
ANSWERS = 500
MOST_DRAWS = 5


@dataclass(frozen=True)
class Head:
    """Scores of the classes: `embedding @ weight.T + bias`.

    Attributes:
        weight: `[classes, dim]`, float32.
        bias: `[classes]`, float32.
    """

    weight: Tensor
    bias: Tensor

    def check_fits(self, dim: int) -> None:
        """Raise `IA3Error` where embeddings of so many values are another encoder's."""
        if self.weight.shape[1] != dim:
            raise IA3Error(
                f"the head is for embeddings of {self.weight.shape[1]} values, and those of the "
                f"encoder have {dim}: it was fitted on another one, or on one that pools otherwise"
            )

    def probabilities(self, embeddings: Tensor, temperature: float, *, multilabel: bool) -> Tensor:
        """`[texts, classes]`, float64: of one class a text, or of each class by itself."""
        scaled = self.scores(embeddings) / temperature
        return scaled.sigmoid() if multilabel else scaled.softmax(-1)

    def scores(self, embeddings: Tensor) -> Tensor:
        """`[texts, classes]`, of embeddings `[texts, dim]`; float64."""
        return embeddings.double() @ self.weight.double().T + self.bias.double()


def fit_head(
    embeddings: Tensor, targets: Sequence[Any], classes: int, weights: Tensor | None = None
) -> Head:
    """The logistic regression on embeddings `[texts, dim]`, float32.

    Args:
        embeddings: `[texts, dim]`.
        targets: the classes' indices, `[texts]`, or a list of them for each text: the head then
            has a regression for each class, whether a text has it. A class that none has gets a
            bias that it is never chosen with.
        classes: how many there are.
        weights: of the texts, `[texts]`; in the regression of each class, `[texts, classes]`.
    """
    if are_lists(targets):
        return _fit_one_each(embeddings, targets, classes, weights)
    found = np.array(targets)
    model = _fitted(embeddings, found, weights)
    weight = torch.zeros(classes, embeddings.shape[1], dtype=torch.float32)
    bias = torch.full((classes,), -1e4, dtype=torch.float32)
    coefficients, intercepts = model.coef_, model.intercept_
    if len(model.classes_) == 2:
        # scikit-learn keeps the second class's score alone.
        coefficients = np.concatenate([-coefficients, coefficients]) / 2
        intercepts = np.concatenate([-intercepts, intercepts]) / 2
    weight[model.classes_] = torch.tensor(coefficients, dtype=torch.float32)
    bias[model.classes_] = torch.tensor(intercepts, dtype=torch.float32)
    return Head(weight, bias)


def _fit_one_each(
    embeddings: Tensor, targets: Sequence[Sequence[int]], classes: int, weights: Tensor | None
) -> Head:
    """A regression for each class, whether a text has it or not."""
    weight = torch.zeros(classes, embeddings.shape[1], dtype=torch.float32)
    bias = torch.zeros(classes, dtype=torch.float32)
    for place, has in enumerate(membership(targets, classes).numpy().T):
        counts = np.ones(len(has), bool) if weights is None else (weights[:, place] > 0).numpy()
        if len({*has[counts].tolist()}) < 2:
            # All alike: by the rule of succession, with as many texts on one side.
            odds = math.log(int(counts.sum()) + 1)
            bias[place] = odds if has[counts].any() else -odds
            continue
        of_class = None if weights is None else weights[:, place]
        model = _fitted(embeddings, has, of_class)
        weight[place] = torch.tensor(model.coef_[0], dtype=torch.float32)
        bias[place] = float(model.intercept_[0])
    return Head(weight, bias)


def _fitted(embeddings: Tensor, found: Any, weights: Tensor | None) -> Any:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=STRENGTH, max_iter=ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged, to a digit that shows nothing
        of_texts = None if weights is None else weights.numpy()
        model.fit(embeddings.double().numpy(), found, sample_weight=of_texts)
    return model


def folds(targets: Sequence[Any], seed: int, most: int = 5) -> list[tuple[list[int], list[int]]]:
    """Stratified folds, as indices to train on and indices held out.

    There are as many as the largest class has texts, `most` at most. The only text of a class is
    always trained on; where each is the only one, there are no folds. Of texts with several labels
    the folds are drawn as they come.
    """
    from sklearn.model_selection import KFold, StratifiedKFold

    if are_lists(targets):
        parts = KFold(min(most, len(targets)), shuffle=True, random_state=seed).split(targets)
        return [(train.tolist(), part.tolist()) for train, part in parts]
    found = np.array(targets)
    counts = np.bincount(found)
    split = np.flatnonzero(counts[found] > 1)
    if not len(split):
        return []
    splitter = StratifiedKFold(min(most, int(counts.max())), shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a class has fewer texts than there are folds
        held_out_of = [split[part] for _, part in splitter.split(split, found[split])]
    everything = np.arange(len(found))
    return [(np.setdiff1d(everything, part).tolist(), part.tolist()) for part in held_out_of]


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Answers to texts by heads that were fitted without them.

    Attributes:
        texts: the places of those that were ever held out, in order.
        probabilities: the mean over the draws of the folds, `[texts, classes]`, float64.
        right: how much of a text's classes is right, `[texts]`, the mean over the draws.
    """

    texts: list[int]
    probabilities: Tensor
    right: Tensor


def held_out_answers(
    embeddings: Tensor,
    targets: Sequence[Any],
    classes: int,
    seed: int,
    weights: Tensor | None = None,
    always: int = 0,
) -> HeldOut:
    """What heads answer to the texts that `folds` hold out.

    Of few texts the folds are drawn several times, as it is much by chance who is held out
    together. The arguments are those of `fit_head`, and `always` is how many of the last texts each
    head is fitted with.
    """
    asks = len(targets) - always
    multilabel, draws = are_lists(targets), max(1, min(MOST_DRAWS, ANSWERS // asks))
    probabilities = torch.zeros(asks, classes, dtype=torch.float64)
    right = torch.zeros(asks, dtype=torch.float64)
    asked: set[int] = set()
    for draw in range(draws):
        for rest, held_out in folds(targets[:asks], (seed + draw) % 2**32):
            train = [*rest, *range(asks, len(targets))]
            of_fold = None if weights is None else weights[train]
            head = fit_head(embeddings[train], [targets[i] for i in train], classes, of_fold)
            found = head.probabilities(embeddings[held_out], 1.0, multilabel=multilabel)
            probabilities[held_out] += found / draws
            right[held_out] += share_right(found, [targets[i] for i in held_out]) / draws
            asked |= {*held_out}
    texts = sorted(asked)
    return HeldOut(texts, probabilities[texts], right[texts])
