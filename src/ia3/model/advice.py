"""What is said when transformers' `Trainer` begins to train vectors with settings for other things.

People keep LoRA's learning rate and find (IA)³ weak. Nothing is asked of them: the Trainer's list
of default callbacks gets one more, which looks at what is about to train.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn

from ..core.inventory import sites
from ..errors import warn_caller

# LoRA's rates end about here, those of (IA)³ begin at twice as much.
LORA_RATE = 5e-4
# Between the caller's line and this file.
BETWEEN = ("transformers", "accelerate", "trl", "torch", "functools", "contextlib")


def offer_advice() -> None:
    """Have Trainers that are made from now on give advice, if the Trainer has been imported.

    An `IA3Model` calls this when it is made and, as the Trainer may be imported later, when it is
    asked for an attribute of the base model. Of other models such a Trainer says nothing.
    """
    trainer: Any = sys.modules.get("transformers.trainer")
    callbacks = getattr(trainer, "DEFAULT_CALLBACKS", None)
    if callbacks is not None and _advice(trainer.TrainerCallback) not in callbacks:
        callbacks.append(_advice(trainer.TrainerCallback))


@cache
def _advice(callback: Any) -> Any:
    class Advice(callback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            model, optimizer = given.get("model"), given.get("optimizer")
            if model is not None and optimizer is not None and state.is_world_process_zero:
                for sentence in advice(model, optimizer):
                    warn_caller(sentence, BETWEEN)

    return Advice


def advice(model: nn.Module, optimizer: Any) -> Iterator[str]:
    """Sentences on how an optimizer is set for the vectors that it trains; none without such."""
    trained = {id(v) for _, _, s in sites(model) for v in s.vectors.values() if v.requires_grad}
    groups = [
        group
        for group in getattr(optimizer, "param_groups", ())
        if any(id(parameter) in trained for parameter in group["params"])
    ]
    rates = [rate for group in groups if (rate := _highest_rate(group)) > 0]
    kind = type(getattr(optimizer, "optimizer", optimizer)).__name__  # of what accelerate wraps
    # Other optimizers' rates are on other scales.
    if rates and max(rates) <= LORA_RATE and "ada" in kind.lower():
        yield (
            f"the vectors train at a learning rate of {max(rates):g}, as is usual for LoRA: (IA)³ "
            "has few values, which start at one, and wants 1e-3 to 1e-2"
        )
    decay = max((float(group.get("weight_decay") or 0) for group in groups), default=0.0)
    if decay > 0:
        yield (
            f"a weight decay of {decay:g} pulls the vectors towards 0, where the identity is 1: "
            "give them weight_decay=0"
        )


def _highest_rate(group: dict[str, Any]) -> float:
    """A group's rate once it is warmed up; 0 where the optimizer finds its own."""
    return max(float(group.get(name) or 0) for name in ("lr", "initial_lr", "max_lr"))
