"""What is to be said of texts: the index of each one's class, or a list of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def are_lists(targets: Sequence[Any]) -> bool:
    """Whether a text may have several classes."""
    return isinstance(targets[0], list)


def membership(targets: Sequence[Sequence[int]], classes: int) -> Tensor:
    """Which of so many classes each text has, bool `[texts, classes]`."""
    has = torch.zeros(len(targets), classes, dtype=torch.bool)
    for text, own in enumerate(targets):
        has[text, own] = True
    return has


def share_right(answers: Tensor, targets: Sequence[Any]) -> Tensor:
    """How much of each text's classes is right, 0 to 1, float64 `[texts]`.

    All where the highest answer, `[texts, classes]`, is the text's class. Where a text has several,
    it is given each whose answer is at least one half, and what counts is the share of the classes
    that it both has and is given among those of either.
    """
    if not are_lists(targets):
        return (answers.argmax(1) == torch.tensor(targets)).double()
    has, said = membership(targets, answers.shape[1]), answers >= 0.5
    either = (has | said).sum(1)
    # What has no class, and is given none, is right.
    return torch.where(either > 0, (has & said).sum(1) / either.clamp(min=1), 1.0).double()
