"""Tensors that are spread over processes: FSDP's, and those of tensor parallelism.

FSDP 2 and tensor parallelism hold a `DTensor`, of which each process has a part. FSDP 1 holds its
parameters in one flat tensor a unit; between calls of the unit each is a piece of that. Nothing of
torch.distributed is imported where nothing is spread.

Under tensor parallelism activations are spread too. The vectors stay whole on each process, which
multiplies its part of an activation by a `Part` of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StateError
from .activations import Side
from .names import Target, module_at, starred

# What transformers and torch mark the modules with that they have spread.
_BY_TRANSFORMERS, _BY_TORCH = "_is_hooked", "_distribute_module_applied"

_ADDED_UP: ContextVar[bool] = ContextVar("added up", default=False)

# The side of a module that each process has a part of, by the style that transformers' plan gives
# the module. Of a side that is whole the gradient is too.
_SPLIT: Mapping[str, Side | None] = {
    "colwise": "output",
    "rowwise": "input",
    **dict.fromkeys(("colwise_gather_output", "colwise_rep", "rowwise_split_input"), None),
    **dict.fromkeys(("rowwise_rep", "embedding_rowwise", "embedding_colwise", "replicate"), None),
}


def is_spread(tensor: Tensor) -> bool:
    """Whether a parameter is spread over processes; true of FSDP 1's also while they are whole."""
    return _is_dtensor(tensor) or getattr(tensor, "_fsdp_flattened", False)


def any_spread(module: nn.Module) -> bool:
    """Whether any parameter of a module, or of one within it, is spread over processes.

    Also where FSDP 2 has left it whole after a call.
    """
    return any(map(is_spread, module.parameters())) or _is_managed(module)


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a `DTensor`, for which all its processes must ask at once; without gradients."""
    if not _is_dtensor(tensor):
        # FSDP 1 frees the memory that a parameter of it is whole in.
        return tensor.detach().clone() if is_spread(tensor) else tensor.detach()
    spread: Any = tensor.detach()
    # Offloaded to the CPU, it is gathered where its processes can talk to each other.
    return spread.to(spread.device_mesh.device_type).full_tensor()  # type: ignore[no-any-return]


def spread_like(value: Tensor, tensor: Tensor) -> Tensor:
    """A value that every process has, spread as another tensor is: nothing is sent."""
    if not _is_dtensor(tensor) or _is_dtensor(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    like: Any = tensor
    value = value.to(like.device_mesh.device_type)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def is_fsdp(model: nn.Module) -> bool:
    """Whether FSDP has spread a model, or a part of it."""
    return any(getattr(p, "_fsdp_flattened", False) for p in model.parameters()) or _is_managed(
        model
    )


@contextmanager
def gradients_added_up() -> Iterator[None]:
    """Within the context, whoever trains adds up the gradients of vectors over all processes."""
    token = _ADDED_UP.set(True)
    try:
        yield
    finally:
        _ADDED_UP.reset(token)


def trains_apart(model: nn.Module) -> bool:
    """Whether vectors that are put on a model now would train on each process for itself."""
    return not _ADDED_UP.get() and is_fsdp(model)


def is_tensor_parallel(module: nn.Module) -> bool:
    """Whether a module has parts of its weights, of which it computes parts of activations."""
    # FSDP's modules have neither mark. Some versions of transformers hold parts as plain tensors.
    if _BY_TRANSFORMERS in module.__dict__:
        return True
    return _BY_TORCH in module.__dict__ and any(_is_sharded(p) for p in module.parameters())


def check_examples_can_be_shared_out(model: nn.Module) -> None:
    """Raise `StateError` where all processes compute each example together."""
    if any(map(is_tensor_parallel, model.modules())):
        raise StateError(
            f"{type(model).__name__} is spread over processes by tensor parallelism, which all "
            "have to be given the same examples: train it in a loop of your own, as an IA3Model; "
            "or load it with shard=True"
        )


@dataclass(frozen=True, eq=False)
class Part:
    """What a process has of an activation's last axis; `group` are the processes with the rest."""

    index: slice
    group: Any

    def of(self, factor: Tensor) -> Tensor:
        """The part of a factor, whose gradient is put together from all processes' parts."""
        return _Part.apply(factor, self.index, self.group)  # type: ignore[no-any-return, no-untyped-call]


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, factor: Tensor, index: slice, group: Any) -> Tensor:
        ctx.shape, ctx.index, ctx.group = factor.shape, index, group
        return factor[..., index]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        from torch import distributed

        whole = grad.new_zeros(ctx.shape)
        whole[..., ctx.index] = grad
        distributed.all_reduce(whole, group=ctx.group)
        return whole, None, None


def part_of(model: nn.Module, module: nn.Module, target: Target) -> Part | None:
    """What this process has of a target's activation; `None` for all of it.

    Raises `IA3Error` where that is not known: each process would multiply by something else.
    """
    if not is_tensor_parallel(module):
        return None
    name, side = target.name, target.side
    # A model has the plan of its class also where it is torch's that was applied.
    style = None if _BY_TORCH in module.__dict__ else _style(model, name)
    if style is None or style not in _SPLIT or side == "inner":
        what = "a plan of torch's" if style is None else f"the style {style!r}"
        raise StateError(
            f"module {name!r} is spread over processes by {what}, under which it is not known what "
            f"each of them has of its {'inner activation' if side == 'inner' else side}: load the "
            "base model without tensor parallelism, or leave the module out (exclude_modules); "
            "FSDP and device_map work"
        )
    if _SPLIT[style] != side:
        return None
    weight: Any = module._parameters["weight"]
    axis, dim = (0 if side == "output" else 1), target.activation.dim
    if not _is_sharded(weight) or weight.device_mesh.ndim != 1 or weight.shape[axis] != dim:
        raise StateError(
            f"module {name!r} is spread over processes by tensor parallelism, and its weight does "
            f"not say how its {side} is (quantized, spread by FSDP as well, or by a version of "
            "transformers before 5.23): load the base model as floating-point numbers, or without "
            "tensor parallelism"
        )
    places = torch.arange(dim).reshape((-1, 1) if side == "output" else (1, -1))
    own: Any = spread_like(places, weight)
    here = own.to_local().flatten().tolist()
    start = here[0] if here else 0
    return Part(slice(start, start + len(here)), weight.device_mesh.get_group())


def _style(model: nn.Module, name: str) -> str | None:
    """What the plan of transformers, of the model or of one within it, gives a module."""
    parts = name.split(".")
    for count in range(len(parts)):
        plan = getattr(module_at(model, ".".join(parts[:count])), "_tp_plan", None)
        if plan:
            return plan.get(starred(".".join(parts[count:])))  # type: ignore[no-any-return]
    return None


def _is_managed(module: nn.Module) -> bool:
    """Whether FSDP 2 has a module, or one within it.

    It gives its units another class at once, and hooks to the modules in them in the first call.
    """
    return any(
        any(kind.__name__ == "FSDPModule" for kind in type(each).__mro__)
        or any(
            "_fully_shard" in getattr(hook, "__module__", "")
            for hook in each._state_dict_pre_hooks.values()
        )
        for each in module.modules()
    )


def _is_dtensor(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _is_sharded(tensor: Any) -> bool:
    return _is_dtensor(tensor) and any(p.is_shard() for p in tensor.placements)
