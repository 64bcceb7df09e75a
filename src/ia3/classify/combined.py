"""One classifier of several that tell the same classes apart, on the same base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..adapter.files import Adapter
from ..errors import shown
from ..sentences.head import Head
from .engine import Fit

# What has to be the same in all of them, in words.
_SAME = {
    "engine": "kinds of model",
    "multilabel": "values of multilabel",
    "classes": "labels",
    "choices": "words for the labels",
    "templates": "templates",
    "fields": "columns of text",
}


def no_classifier(fits: Sequence[tuple[str, Fit]], weights: Sequence[float]) -> str | None:
    """Why these classifiers, `(name, fit)`, cannot become one; `None` where they can."""
    (first, fit), *others = fits
    for name, other in others:
        for attribute, words in _SAME.items():
            one, another = getattr(fit, attribute), getattr(other, attribute)
            if one != another:
                values = f"{shown(one)} and {shown(another)}"
                return f"{first} and {name} have different {words}: {values}"
        # A file of an earlier version does not say it.
        if other.embedding != fit.embedding and None not in (fit.embedding, other.embedding):
            return f"{first} and {name} were trained on encoders that embed texts otherwise"
        if fit.settings["chat"] != other.settings["chat"]:
            return f"one of {first} and {name} was trained with the chat template, and one without"
    if fit.head is not None and not sum(weights) > 0:
        return f"the weights {list(weights)} add up to {sum(weights):g}: there is no mean head"
    return None


def combined_fit(fits: Sequence[Fit], weights: Sequence[float], adapter: Adapter) -> Fit:
    """The classifier with an adapter that was combined of theirs, with these weights.

    An encoder's head is the mean of the heads, weighted as the vectors are. The heads are of
    embeddings by adapters near each other, and no text is left to fit another one with
    (docs/benchmarks.md). All else is the first one's.
    """
    head = None
    if fits[0].head is not None:
        heads = [fit.head for fit in fits if fit.head is not None]
        head = Head(
            _mean([each.weight for each in heads], weights),
            _mean([each.bias for each in heads], weights),
        )
    changed: dict[str, Any] = {"threads": None, "history": [], "candidates": []}
    return replace(fits[0], adapter=adapter, head=head, **changed)


def _mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    stack = torch.stack([value.double() for value in values])
    of_all = torch.tensor(weights, dtype=torch.float64)
    mean: Tensor = torch.tensordot(of_all / of_all.sum(), stack, 1)
    return mean.float()
