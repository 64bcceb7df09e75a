"""What a model says of every token of every answer choice."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenScores:
    """What a model says of every token of every answer choice.

    Attributes:
        log_probs: `[batch, choices, length]`, float32 or float64, natural logarithms; 0 where there
            is no token.
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
