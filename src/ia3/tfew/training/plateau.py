"""When learning has stopped: a rule on the training loss, so that it needs no held-out examples.

All it knows is the losses so far. A run that goes on from a checkpoint decides the same again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

# Steps whose mean counts as learned, and what the mean cross-entropy over the choices is then: on
# average, the right choice has 95% of the probability.
LEARNED_STEPS = 10
LEARNED = 0.05
# The mean over so many steps is at its lowest; so many steps later, no mean was lower by a share.
MEAN_STEPS = 20
PATIENCE = 30
LEAST_FALL = 0.02
# In so many steps the learning rate then goes to 0: a stop at a full rate costs accuracy.
DECAY_STEPS = 10


class Plateau:
    """Follows a training's losses, and says at which step it is to end.

    Args:
        bound: the steps that are taken where the loss goes on falling.
    """

    def __init__(self, bound: int) -> None:
        self.last_step = bound
        self._seen = 0
        self._decay_begins: int | None = None
        self._lowest = math.inf
        self._lowest_at = 0

    def follow(self, losses: Sequence[float], choice_losses: Sequence[float]) -> None:
        """Read the steps that are new: all losses from the first step on, `[steps]`.

        `losses` is what is trained on; `choice_losses` is the cross-entropy over the choices.
        """
        for step in range(self._seen + 1, len(losses) + 1):
            if self._decay_begins is None and self._has_stopped(step, losses, choice_losses):
                self._decay_begins = step
                self.last_step = min(self.last_step, step + DECAY_STEPS)
        self._seen = len(losses)

    def share_of_rate(self, step: int) -> float:
        """What the learning rate of the step after `step` steps is multiplied by."""
        if self._decay_begins is None or self._decay_begins + DECAY_STEPS > self.last_step:
            return 1.0  # so near to the bound, the schedule's own decay is all there is
        return max(self.last_step - step, 0) / DECAY_STEPS

    def _has_stopped(
        self, step: int, losses: Sequence[float], choice_losses: Sequence[float]
    ) -> bool:
        if step >= LEARNED_STEPS and _mean(choice_losses[step - LEARNED_STEPS : step]) < LEARNED:
            return True
        if step < MEAN_STEPS:
            return False
        mean = _mean(losses[step - MEAN_STEPS : step])
        if mean < self._lowest * (1 - LEAST_FALL):
            self._lowest, self._lowest_at = mean, step
        return step - self._lowest_at >= PATIENCE


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
