"""The head of a classifier on a sentence encoder: a logistic regression on the embeddings."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import IA3Error

# The inverse strength of the regularisation. It decides little of what is right, and much of how
# sure the answers are: at this one they are about as sure as they are right (docs/benchmarks.md).
STRENGTH = 100.0
ITERATIONS = 1000


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

    def scores(self, embeddings: Tensor) -> Tensor:
        """`[texts, classes]`, of embeddings `[texts, dim]`; float64."""
        return embeddings.double() @ self.weight.double().T + self.bias.double()


def fit_head(embeddings: Tensor, targets: Sequence[int], classes: int) -> Head:
    """The logistic regression on embeddings `[texts, dim]`, float32.

    `targets` are the classes' indices, `[texts]`. A class that none of them has gets a bias that it
    is never chosen with.
    """
    from sklearn.linear_model import LogisticRegression

    found = np.array(targets)
    model = LogisticRegression(C=STRENGTH, max_iter=ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged, to a digit that shows nothing
        model.fit(embeddings.double().numpy(), found)
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


def folds(targets: Sequence[int], seed: int, most: int = 5) -> list[tuple[list[int], list[int]]]:
    """Stratified folds, as indices to train on and indices held out.

    There are as many as the largest class has texts, `most` at most. The only text of a class is
    always trained on; where each is the only one, there are no folds.
    """
    from sklearn.model_selection import StratifiedKFold

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


def held_out_scores(
    embeddings: Tensor, targets: Sequence[int], classes: int, seed: int
) -> tuple[list[int], Tensor]:
    """The texts that `folds` hold out, and their scores by heads that were fitted without them.

    The scores are `[texts held out, classes]`, float64.
    """
    asked: list[int] = []
    scores = [torch.zeros(0, classes, dtype=torch.float64)]
    for train, held_out in folds(targets, seed):
        head = fit_head(embeddings[train], [targets[i] for i in train], classes)
        asked += held_out
        scores.append(head.scores(embeddings[held_out]))
    return asked, torch.cat(scores)
