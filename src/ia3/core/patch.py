"""Where a forward is put in a module's own place, and how the module gets that back.

accelerate puts a forward of its own before what it finds, and keeps that as `_old_forward`. What is
put there stays inside accelerate's, so that either may come or go first.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, NoReturn

from torch import nn

from ..errors import IA3Error

SLOTS = ("forward", "_old_forward")


def slot_for(module: nn.Module) -> str:
    """The attribute to put a forward in."""
    return "_old_forward" if "_old_forward" in module.__dict__ else "forward"


def own_forward(module: nn.Module) -> MethodType:
    """The forward of the module's class."""
    return MethodType(type(module).forward, module)


def give_back(module: nn.Module, slot: str, before: Callable[..., Any] | None = None) -> None:
    """Take what is in a slot away.

    Args:
        before: what was there; if nothing was, the module has its class's forward again.
    """
    if before is not None:
        module.__dict__[slot] = before
    elif slot == "forward":
        del module.__dict__[slot]
    else:
        module.__dict__[slot] = own_forward(module)


def refuse_replica(module: nn.Module) -> NoReturn:
    """In place of `nn.Module._replicate_for_data_parallel`, which copies a module for each GPU.

    Each of the copies would have the first one's forward and hooks, and compute with its weights.
    """
    raise IA3Error(
        "nn.DataParallel cannot copy a model with adapters: run a process a GPU (torchrun, "
        "accelerate launch), or show this one a single GPU (CUDA_VISIBLE_DEVICES=0)"
    )
