"""The records of a training's steps, and how it ends before its last one."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar, cast

from ...errors import BrokenFileError, IA3Error, shown

Step = TypeVar("Step")


@dataclass(frozen=True)
class TrainingStep:
    """The loss of one optimizer step and its terms, which are not weighted.

    `steps` is the last step's number, as far as it is known: with `stop_at_plateau` it is at first
    the recipe's, and lower once the loss has stopped falling.
    """

    step: int
    steps: int
    loss: float
    lm: float
    length_norm: float
    unlikelihood: float


class DivergedError(IA3Error):
    """The loss, a gradient or a vector is not finite any more, as of the optimizer step `step`."""

    def __init__(self, step: int, what: str) -> None:
        advice = "lower the learning rate, or look for texts that are empty or out of place"
        super().__init__(f"training diverged at step {step}: {what}; {advice}")
        self.step = step


class StopTraining(Exception):  # noqa: N818
    """Raised by an `on_step`: the training ends with this step, as if it were the last one."""


def steps_of(kind: type[Step], history: Any, where: str) -> list[Step]:
    """What a run's `history` in a file says, a list of steps of one kind as JSON has them.

    Raises:
        BrokenFileError: it is something else; the message begins with `where`.
    """
    kinds = {field.name: field.type for field in fields(cast(Any, kind))}
    if not isinstance(history, list):
        raise BrokenFileError(f"{where} is a {type(history).__name__}, expected a list of steps")
    for place, step in enumerate(history, 1):
        if not isinstance(step, dict) or step.keys() != kinds.keys():
            raise BrokenFileError(f"{where}: step {place} has not {', '.join(kinds)} and no other")
        for name, type_ in kinds.items():
            value = step[name]
            expected = (int,) if type_ == "int" else (int, float)
            if isinstance(value, bool) or not isinstance(value, expected):
                raise BrokenFileError(f"{where}: step {place} has {name}={value!r}, no {type_}")
    return [kind(**step) for step in history]


def threads_kept(value: Any, where: str) -> int | None:
    """What a checkpoint says of a step's number of threads; `None` where it was not known.

    Raises:
        BrokenFileError: it is no such number; the message begins with `where`.
    """
    if value is None or (type(value) is int and value >= 1):
        return value
    raise BrokenFileError(f"{where} is {shown(value)}, expected a whole number, at least 1")
