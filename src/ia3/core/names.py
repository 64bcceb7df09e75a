"""What the other folders share: what modules are called, where vectors are, what a target is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    # Reading an adapter's files needs no torch, which takes seconds to import.
    from torch import nn

    from .activations import Activation, Side

T = TypeVar("T")

# The name under which a module's vectors are registered on it.
ATTRIBUTE = "ia3_l"

# What torch's wrappers call the module in them: activation checkpointing's, `torch.compile`'s and
# FSDP 1's. It is part of the name of every module below, and of no name in a file.
WRAPPED = ("_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module")

# Half-open ranges of a vector that stay exactly one: the query part of a fused projection.
Frozen = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Target:
    """A module to rescale: its name, which side of it, and the activation there."""

    name: str
    side: Side
    activation: Activation
    frozen: Frozen = ()
    why: str = ""


def model_type_of(model: nn.Module) -> str:
    """The architecture, as its config names it: `"llama"`."""
    return str(getattr(getattr(model, "config", None), "model_type", None))


def own_name(name: str) -> str:
    """The name of a module, a parameter or a key without what wrappers have put into it."""
    if not any(wrapped in name for wrapped in WRAPPED):
        return name
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def own_names(values: Mapping[str, T]) -> dict[str, T]:
    """The same values, a state dict's or `named_modules`', under own names.

    A wrapper has the name of what it wraps, which comes after it and takes its place.
    """
    together = " ".join(values)
    if not any(wrapped in together for wrapped in WRAPPED):
        return dict(values)
    return {own_name(name): value for name, value in values.items()}


def unwrapped(module: nn.Module) -> nn.Module:
    """What a module wraps, and what that wraps, to the last; a module that is no wrapper itself."""
    while (name := _wrapped_in(module)) is not None:
        module = module.get_submodule(name)
    return module


def _wrapped_in(module: nn.Module) -> str | None:
    return next((name for name in WRAPPED if name in module._modules), None)


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """A model's modules by their own names, itself as `""`; of a wrapper, what it wraps."""
    return own_names(dict(model.named_modules()))


def module_at(model: nn.Module, name: str) -> nn.Module:
    """The module of that own name; an `AttributeError` where there is none."""
    module = unwrapped(model)
    for part in name.split(".") if name else ():
        module = unwrapped(module.get_submodule(part))
    return module


def put_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Have another module under that own name, within the wrappers that are there."""
    parent, _, last = name.rpartition(".")
    holder = module_at(model, parent)
    while (inside := _wrapped_in(held := holder.get_submodule(last))) is not None:
        holder, last = held, inside
    setattr(holder, last, module)


def base_modules(model: nn.Module) -> list[str]:
    """The names of the model's own modules: not what adapters have put on them."""
    return own_modules(modules_of(model))


def own_modules(modules: Mapping[str, nn.Module]) -> list[str]:
    """Those of a model's modules that are its own, by name: not what adapters have put on them."""
    return [name for name in modules if name and ATTRIBUTE not in name.split(".")]


def starred(name: str) -> str:
    """A module's name with a star for the number of its layer: `layers.*.k_proj`."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
