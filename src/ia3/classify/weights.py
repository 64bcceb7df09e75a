"""How much each text counts in training: `sample_weight` and `class_weight`, as numbers.

A weight counts as so many copies of a text would: one of 0 leaves it out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arguments import listed
from ..errors import IA3Error, InvalidTypeError, did_you_mean, shown
from ..tfew.prompts.labels import Label
from .inputs import labels_of

BALANCED = "balanced"
_EXPECTED = "a number for each text"
# Sums of larger weights, and losses by them, need not be finite.
MOST = 1e9


def sample_weights(given: Any, count: int) -> Tensor | None:
    """The argument `sample_weight`, float64 `[texts]`.

    Raises:
        InvalidTypeError: it is no list, or a weight is no number.
        IA3Error: there are not as many as texts, one is below 0 or not finite, or all are 0.
    """
    if given is None:
        return None
    if isinstance(given, set | frozenset | Mapping):
        raise InvalidTypeError(f"sample_weight is {shown(given)}, expected {_EXPECTED}")
    if hasattr(given, "__array__") and not isinstance(given, Iterable):
        given = np.asarray(given)
    values = listed("sample_weight", given, _EXPECTED)
    weights = [_weight(value, f"sample_weight[{row}]") for row, value in enumerate(values)]
    if len(weights) != count:
        raise IA3Error(f"sample_weight has {len(weights)} numbers for {count} texts")
    if not any(weights):
        raise IA3Error("each number of sample_weight is zero: expected one above 0")
    return torch.tensor(weights, dtype=torch.float64)


def check_class_weight(given: Any, classes: Sequence[Label]) -> dict[Label, float] | str | None:
    """The argument `class_weight`: `None`, `"balanced"`, or label -> weight.

    Raises:
        InvalidTypeError: it is none of these, or a weight is no number.
        IA3Error: a label is not among `classes`, or a weight is below 0 or not finite.
    """
    if given is None or (isinstance(given, str) and given == BALANCED):
        return given
    if not isinstance(given, Mapping):
        expected = f"None, {BALANCED!r} or a mapping from labels to weights"
        raise InvalidTypeError(f"class_weight is {shown(given)}, expected {expected}")
    _, labels = labels_of([], given)
    for label in labels:
        if label not in classes or type(label) is not type(classes[0]):
            hint = did_you_mean(str(label), map(str, classes))
            raise IA3Error(
                f"class_weight has the label {label!r}, which is not among {list(classes)}{hint}"
            )
    values = [_weight(value, f"class_weight[{label!r}]") for label, value in given.items()]
    return dict(zip(labels, values, strict=True))


def weights_of_texts(
    samples: Tensor | None,
    of_classes: dict[Label, float] | str | None,
    classes: Sequence[Label],
    targets: Sequence[int],
) -> Tensor | None:
    """The weight of each text, float64 `[texts]`: the product of its own and its class's.

    `"balanced"` gives all classes that occur the same sum, as scikit-learn does. `None` is 1 each.
    """
    if of_classes is None:
        return samples
    found = torch.tensor(targets)
    own = torch.ones(len(found), dtype=torch.float64) if samples is None else samples
    if isinstance(of_classes, Mapping):
        each = torch.tensor([of_classes.get(label, 1.0) for label in classes], dtype=torch.float64)
    else:
        sums = torch.bincount(found, own, minlength=len(classes))
        # What has no text with a weight counts nothing.
        each = torch.where(sums > 0, own.sum() / (sums * sums.count_nonzero()), 0.0)
    return own * each[found]


def weights_of_answers(
    samples: Tensor | None,
    of_classes: dict[Label, float] | str | None,
    classes: Sequence[Label],
    has: Tensor,
) -> Tensor | None:
    """The weight of each text in the answer of each label, float64 `[texts, labels]`.

    A label's weight counts for the texts that have it (`has`, bool `[texts, labels]`). `"balanced"`
    gives those that have a label and those that do not the same sum.
    """
    if samples is None and of_classes is None:
        return None
    own = torch.ones(len(has), dtype=torch.float64) if samples is None else samples
    weights = own[:, None].expand(has.shape)
    if isinstance(of_classes, Mapping):
        each = torch.tensor([of_classes.get(label, 1.0) for label in classes], dtype=torch.float64)
        return torch.where(has, weights * each, weights)
    if of_classes is None:
        return weights.clone()
    having = (weights * has).sum(0).clamp(min=1e-300)
    others = (weights * ~has).sum(0).clamp(min=1e-300)
    return torch.where(has, weights / having, weights / others) * own.sum() / 2


def text_weights(weights: Tensor) -> Tensor:
    """One weight a text, `[texts]`, whose mean is 1, of weights `[texts]` or `[texts, labels]`."""
    of_texts = weights.reshape(len(weights), -1).mean(1)
    return of_texts / of_texts.mean()


def _weight(value: Any, called: str) -> float:
    if isinstance(value, Tensor) and not value.dim():
        value = value.item()
    if not isinstance(value, Real | np.bool_):
        kind = type(value).__name__
        raise InvalidTypeError(f"{called} is {shown(value)} ({kind}), expected a number")
    try:
        weight = float(value)
    except OverflowError:
        weight = math.inf
    if not 0 <= weight < math.inf:
        raise IA3Error(f"{called} is {shown(value)}, expected a finite number, at least 0")
    if weight > MOST:
        raise IA3Error(f"{called} is {shown(value)}, expected at most {MOST:g}")
    return weight
