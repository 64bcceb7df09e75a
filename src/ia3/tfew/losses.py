"""The three loss terms of T-Few (paper section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


@dataclass(frozen=True)
class TokenScores:
    """What a model says of every token of every answer choice.

    Attributes:
        log_probs: `[batch, choices, length]`, float32, natural logarithms; 0 where there is no
            token.
        mask: `[batch, choices, length]`, bool, true where there is a token. A choice with no token
            is no choice.
    """

    log_probs: Tensor
    mask: Tensor

    def mean_log_probs(self) -> Tensor:
        """`[batch, choices]`: β of equation 2; minus infinity where there is no choice."""
        counts = self.mask.sum(-1)
        means = self.log_probs.sum(-1) / counts.clamp(min=1)
        return means.masked_fill(counts == 0, -torch.inf)


@dataclass(frozen=True)
class TFewLoss:
    """The terms of T-Few's loss, each a scalar; `total` is their plain sum."""

    total: Tensor
    lm: Tensor
    length_norm: Tensor
    unlikelihood: Tensor


def token_loss(scores: TokenScores, labels: Tensor) -> TFewLoss:
    """The loss from token log-probabilities.

    Args:
        scores: of all choices of a batch.
        labels: `[batch]`, int64, the index of each right choice.

    Returns:
        `lm`: mean cross-entropy of the right choices' tokens. `length_norm`: cross-entropy of the
        softmax over β (equation 2). `unlikelihood`: mean of −log(1 − p + 1e-2) over the wrong
        choices' tokens (equation 1, with the constant of the authors' code); 0 where none is wrong.
    """
    log_probs, mask = scores.log_probs, scores.mask
    right = F.one_hot(labels, log_probs.shape[1]).bool()[:, :, None] & mask
    wrong = mask & ~right
    lm = -log_probs[right].mean()
    length_norm = F.cross_entropy(scores.mean_log_probs(), labels)
    unlikely = -torch.log1p(1e-2 - log_probs[wrong].exp())
    unlikelihood = unlikely.sum() / max(unlikely.numel(), 1)
    return TFewLoss(lm + length_norm + unlikelihood, lm, length_norm, unlikelihood)
