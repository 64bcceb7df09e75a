"""Which token comes next, by a row's own temperature, `top_p` and seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from torch import Tensor

from ...errors import StateError
from .interface import Generation

# JSON has no infinity: what cannot come at all is said to have this, as by OpenAI.
LEAST_LOGPROB = -9999.0
# Temperatures below take the likeliest token anyway.
LOWEST = 1e-20


@dataclass(frozen=True)
class Picked:
    """A token, its log-probability, and the likeliest tokens with theirs, where they are told."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Picks a row's tokens. One number is drawn a token, so that a seed gives the same ones."""

    def __init__(self, asked: Generation) -> None:
        self.asked = asked
        self.random = Random(asked.seed)

    def draw(self, scaled: Tensor) -> int:
        """A token by logits over the temperature, `[vocabulary]`, of which the largest is 0."""
        probabilities = scaled.softmax(-1)
        ids = None
        if self.asked.top_p < 1:
            ids = _nucleus(probabilities, self.asked.top_p)
            probabilities = probabilities[ids]
        # In the order of ids: rounding changes that of probabilities.
        sums = probabilities.cumsum(-1, dtype=torch.float64)
        place = int(torch.searchsorted(sums, sums[-1] * self.random.random(), right=True))
        # Rounding may end the sums before the last token that has a probability.
        place = min(place, len(sums) - 1)
        return place if ids is None else int(ids[place])


def pick(scores: Tensor, samplers: Sequence[Sampler]) -> list[Picked | StateError]:
    """The next token of each row by its logits, `[rows, vocabulary]`, float32."""
    most, likeliest = scores.max(-1)
    picked: list[Picked | StateError] = []
    for row, (sampler, highest, token) in enumerate(
        zip(samplers, most.tolist(), likeliest.tolist(), strict=True)
    ):
        asked = sampler.asked
        if not math.isfinite(highest):
            picked.append(StateError("the model's scores are not finite: no token can be chosen"))
            continue
        if asked.temperature > 0:
            # A lower one would be 0 in float32.
            token = sampler.draw((scores[row] - highest) / max(asked.temperature, LOWEST))
        if asked.logprobs is None:
            picked.append(Picked(token))
            continue
        logprobs = scores[row].log_softmax(-1).clamp(min=LEAST_LOGPROB)
        values, ids = logprobs.topk(min(asked.logprobs, len(logprobs)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        picked.append(Picked(token, float(logprobs[token]), top))
    return picked


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The likeliest tokens that have so much probability together, at least one, by their ids."""
    # numpy's sort takes a fiftieth of torch's on a CPU, and of equals the first ids are taken.
    ordered = torch.from_numpy(np.sort(probabilities.cpu().numpy())).flip(0)
    before = ordered.cumsum(-1, dtype=torch.float64) - ordered
    count = int((before < top_p).sum())
    least = float(ordered[count - 1])
    taken = probabilities > least
    equals = (probabilities == least).nonzero().flatten()
    taken[equals[: count - int(taken.sum())]] = True
    return taken.nonzero().flatten()
