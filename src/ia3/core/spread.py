"""Tensors that are spread over processes: FSDP's, and those of tensor parallelism.

FSDP 2 and tensor parallelism hold a `DTensor`, of which each process has a part. FSDP 1 holds its
parameters in one flat tensor a unit; between calls of the unit each is a piece of that. Nothing of
torch.distributed is imported where nothing is spread.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import StateError


def is_spread(tensor: Tensor) -> bool:
    """Whether a parameter is spread over processes; true of FSDP 1's also while they are whole."""
    return _is_dtensor(tensor) or getattr(tensor, "_fsdp_flattened", False)


def any_spread(module: nn.Module) -> bool:
    """Whether any parameter of a module, or of one within it, is spread over processes.

    Also where FSDP 2 has left it whole after a call.
    """
    return any(map(is_spread, module.parameters())) or any(
        "_fully_shard" in getattr(hook, "__module__", "")
        for each in module.modules()
        for hook in each._state_dict_pre_hooks.values()
    )


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


def refuse_tensor_parallel(module: nn.Module, name: str) -> None:
    """Raise `IA3Error` where processes compute parts of a module's activations."""
    # transformers and torch each leave their own mark; FSDP's modules have none.
    marks = module.__dict__.keys() & {"_is_hooked", "_distribute_module_applied"}
    if marks and any(_is_sharded(p) for p in module.parameters()):
        raise StateError(
            f"module {name!r} is spread over processes by tensor parallelism, each of which sees a "
            "part of its activation: load the base model without tp_plan; FSDP and device_map work"
        )


def _is_dtensor(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _is_sharded(tensor: Any) -> bool:
    return _is_dtensor(tensor) and any(p.is_shard() for p in tensor.placements)
