"""The hyper-parameters of T-Few (paper section 3.5)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...arguments import instance, number, whole
from ...errors import IA3Error
from ..scoring.choices import MAX_TOKENS

_TERMS = ("lm", "length_norm", "unlikelihood")


@dataclass(frozen=True)
class TFewConfig:
    """The paper's hyper-parameters, the same for every task (section 3.5).

    Args:
        steps: optimizer steps, at least 1; with `stop_at_plateau`, the most there may be.
        batch_size: examples a step, each with all its choices, at least 1.
        learning_rate: of Adafactor, at its peak, above 0.
        warmup_ratio: the share of the steps, 0 to less than 1, in which the rate rises linearly
            from 0. It then falls linearly to 0. A training of one step has none.
        max_grad_norm: gradients are clipped to this norm.
        seed: of the order of the examples and of the templates drawn, 0 to 2**32 - 1.
        lm, length_norm, unlikelihood: the loss terms' weights, at least 0, one of them above 0.
        max_tokens: computed at once; a step of more is computed in parts, with the same gradients
            but for rounding. Lower it where memory runs out.
        stop_at_plateau: end before `steps` when the training loss has stopped falling (`plateau`
            says when that is): the rate then goes to 0 within a few more steps. The paper's recipe
            takes all steps.

    Raises:
        InvalidTypeError: a value is of another type.
        IA3Error: a value is out of its range.
    """

    steps: int = 1000
    batch_size: int = 8
    learning_rate: float = 3e-3
    warmup_ratio: float = 0.06
    max_grad_norm: float = 1.0
    seed: int = 0
    lm: float = 1.0
    length_norm: float = 1.0
    unlikelihood: float = 1.0
    max_tokens: int = MAX_TOKENS
    stop_at_plateau: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "max_tokens"):
            whole(name, getattr(self, name), 1, expected="at least 1")
        expected = "a number above 0"
        if not 0 < number("learning_rate", self.learning_rate, expected) < math.inf:
            raise IA3Error(f"learning_rate is {self.learning_rate}, expected {expected}")
        expected = "0 to less than 1"
        if not 0 <= number("warmup_ratio", self.warmup_ratio, expected) < 1:
            raise IA3Error(f"warmup_ratio is {self.warmup_ratio}, expected {expected}")
        expected = "a number, at least 0"
        if not number("max_grad_norm", self.max_grad_norm, expected) >= 0:
            raise IA3Error(f"max_grad_norm is {self.max_grad_norm}, expected {expected}")
        whole("seed", self.seed, 0, 2**32 - 1, "0 to 2**32 - 1")
        for name, weight in self.weights.items():
            expected = "0 or a number above 0"
            if not 0 <= number(name, weight, expected) < math.inf:
                raise IA3Error(f"{name} is {weight}, expected {expected}")
        if not any(self.weights.values()):
            raise IA3Error(f"{', '.join(_TERMS)} are all 0: there is no loss to train with")
        instance("stop_at_plateau", self.stop_at_plateau, bool, "True or False")

    @property
    def weights(self) -> dict[str, float]:
        """The weights of the loss's terms, by name."""
        return {name: getattr(self, name) for name in _TERMS}
