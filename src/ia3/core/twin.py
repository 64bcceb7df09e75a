"""Run a module's forward on a shallow copy of it, with other forwards in some of its parts.

The module stays untouched, so that other threads may be calling it meanwhile.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .hooks import InputHook, OutputHook
from .patch import SLOTS, rebound

# A part of a module -> the forward that runs in the place of the part's.
StandIns = Mapping[nn.Module, Callable[[Tensor], Tensor]]


def run_twin(module: nn.Module, stand_ins: StandIns, training: bool, given: Tensor) -> Any:
    """The result of a module's own forward, without patches and without the hooks of adapters.

    Hooks of parts run; hooks of the module itself do not, as they may expect the very module.

    Args:
        training: the mode of all parts.
        given: the forward's argument.

    Raises:
        ValueError: a forward was replaced by a function that works for that module alone, or
            computes with a weight of a part that has a stand-in.
        Exception: what the forward itself raises.
    """
    twin = _twin(module, stand_ins, training, {})
    with _Untouched(stand_ins):
        return twin.forward(given)


class _Untouched(TorchFunctionMode):
    """Raises where an operation uses a parameter of these modules."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self._parameters = {id(p) for module in modules for p in module.parameters()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [*args, *(kwargs or {}).values()]
        result = func(*args, **(kwargs or {}))
        # Asking for a weight's dtype or shape is no use of its values.
        if isinstance(result, Tensor) and any(id(value) in self._parameters for value in given):
            raise ValueError("it computes with the weight of a layer without calling the layer")
        return result


def _twin(
    module: nn.Module, stand_ins: StandIns, training: bool, made: dict[nn.Module, nn.Module]
) -> nn.Module:
    """A module's copy; `made` holds those of the modules that have one already."""
    within = any(part in stand_ins for part in module.modules())
    if not within and isinstance(module, torch.jit.ScriptModule):
        return module
    if module in made:
        return made[module]
    twin = made[module] = object.__new__(type(module))
    own = twin.__dict__
    own.update(module.__dict__, training=training)
    # What was compiled has the module's own weights in it.
    own.pop("_compiled_call_impl", None)
    for slot in ("_forward_hooks", "_forward_pre_hooks"):
        hooks = [(k, h) for k, h in own[slot].items() if not isinstance(h, InputHook | OutputHook)]
        own[slot] = OrderedDict(hooks)
    own["_modules"] = {
        name: None if child is None else _twin(child, stand_ins, training, made)
        for name, child in module._modules.items()
    }
    if module in stand_ins:
        own["forward"] = stand_ins[module]
        return twin
    for slot in set(SLOTS) & own.keys():
        forward = rebound(own[slot], module, twin)
        if forward is None and within:
            raise ValueError("its forward was replaced by a function that works for itself alone")
        own[slot] = forward or own[slot]
    return twin
