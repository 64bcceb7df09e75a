"""Merging: a vector folded into a module's weights, and the weights put back.

The product is taken in float32 and rounded once. What was there before is kept, so that unmerging
restores the very bits (dividing by the vector, as is often done, does not).
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import IA3Error
from . import experts, quantized
from . import mlp as hoisting
from .activations import Side


@dataclass(frozen=True)
class Change:
    """A new value for one part of a module: its weight, its bias, a quantization constant."""

    name: str
    slot: str
    value: Any


def owner_of(model: nn.Module, name: str, side: Side) -> tuple[str, Side]:
    """Whose weights take a vector, on which side: the module's own, or those of the layer before.

    The columns of a quantized weight share constants, its rows do not, so that a vector on the
    input of a quantized layer goes into the rows of the layer that feeds it.

    Raises:
        IA3Error: there is no such layer.
    """
    module = model.get_submodule(name)
    if side != "input" or not quantized.is_quantized(module):
        return name, side
    before = hoisting.up_projection(model, name)
    if before is None:
        raise IA3Error(
            f"cannot merge into {name!r}: a vector on the input of a quantized "
            f"{type(module).__name__} scales its columns, which share constants, and no layer "
            "before it can take the vector instead; merge with dequantise=True"
        )
    return before, "output"


def fold(module: nn.Module, name: str, scales: Mapping[Side, Tensor]) -> list[Change]:
    """What merging into a module would change; nothing is changed yet.

    Args:
        module: the module, as `owner_of` names it.
        name: its name in its model.
        scales: `[dim]` a side, or `[experts, dim]` within experts.

    Raises:
        IA3Error: the weights cannot take the vector exactly.
    """
    if quantized.is_quantized(module):
        try:
            values: Mapping[str, Any] = quantized.fold_rows(module, scales["output"])
        except IA3Error as error:
            raise IA3Error(
                f"cannot merge into {name!r}: {error}; merge with dequantise=True"
            ) from error
    elif _is_offloaded(module):
        from accelerate.utils import align_module_device  # type: ignore[import-untyped]

        with align_module_device(module):
            values = _fold(module, name, scales)
    else:
        values = _fold(module, name, scales)
    return [Change(name, slot, value) for slot, value in values.items()]


def is_finite(value: object) -> bool:
    """Whether a slot's value is: a tensor, or what a quantized weight keeps its constants in."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    return all(is_finite(part) for part in getattr(value, "__dict__", {}).values())


def read(module: nn.Module, slot: str) -> Any:
    """What stands in a slot now."""
    if slot not in module._parameters:
        return quantized.read_slot(module, slot)
    if _is_offloaded(module):
        hook: Any = module._hf_hook
        return hook.weights_map[slot]
    return module.get_parameter(slot).data


def write(module: nn.Module, slot: str, value: Any) -> None:
    """Put a value in a slot."""
    if slot not in module._parameters:
        quantized.write_slot(module, slot, value)
    elif _is_offloaded(module):
        _write_offloaded(module._hf_hook, slot, value)
    else:
        parameter = module.get_parameter(slot)
        # The model may have been moved or cast since the value was read.
        parameter.data = value.to(parameter.device, parameter.dtype)
        if slot == "weight" and hasattr(getattr(module, "state", None), "reset_grads"):
            # bitsandbytes computes with a quantized copy that it keeps of an ordinary weight.
            module.state.reset_grads()  # type: ignore[operator, union-attr]


def _is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate has taken the module's weights away until its next call."""
    offloads = getattr(getattr(module, "_hf_hook", None), "offload", False)
    return bool(offloads) and _is_empty(module)


def _is_empty(module: nn.Module) -> bool:
    parameters = (p for p in module._parameters.values() if p is not None)
    return any(parameter.device.type == "meta" for parameter in parameters)


def _write_offloaded(hook: Any, slot: str, value: Tensor) -> None:
    """Lay a value over the one that accelerate keeps, which may be on a disk and stays there."""
    if not isinstance(hook.weights_map, ChainMap):
        hook.weights_map = ChainMap({}, hook.weights_map)
    over, kept = hook.weights_map.maps
    if torch.equal(kept[slot], value):
        over.pop(slot, None)
    else:
        over[slot] = value.to("cpu")
    if not over:
        hook.weights_map = kept


def _fold(module: nn.Module, name: str, scales: Mapping[Side, Tensor]) -> dict[str, Tensor]:
    if _is_empty(module):
        raise IA3Error(f"cannot merge into {name!r}: its weights are not there (meta device)")
    if "inner" in scales:
        return experts.fold(module, scales["inner"])
    weight = module._parameters.get("weight")
    # Numbers of one byte would have to be rounded to so few bits that little is left of the vector.
    if weight is None or not weight.is_floating_point() or weight.itemsize < 2:
        kind = "no" if weight is None else f"{weight.dtype}"
        raise IA3Error(
            f"cannot merge into {name!r}, a {type(module).__name__} with {kind} weights: expected "
            "floating-point weights of 16 bits or more"
        )
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            raise IA3Error(f"cannot merge into {name!r}: max_norm would undo the vector")
        return {"weight": _scaled(weight, [scales["output"]])}
    factors = [_across_weight(module, weight, side, scale) for side, scale in scales.items()]
    folded = {"weight": _scaled(weight, factors)}
    bias = module._parameters.get("bias")
    if "output" in scales and bias is not None:
        folded["bias"] = _scaled(bias, [scales["output"]])
    return folded


def _across_weight(module: nn.Module, weight: Tensor, side: Side, scale: Tensor) -> Tensor:
    """The scale, shaped to multiply the weight."""
    if isinstance(module, Conv1D):
        return scale if side == "output" else scale[:, None]
    trailing = [1] * (weight.dim() - 2)
    if side == "output":
        return scale.reshape(-1, 1, *trailing)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups > 1:
        # Each group of output channels sees its own slice of the input channels.
        groups = scale.reshape(module.groups, 1, -1)
        per_group = module.out_channels // module.groups
        rows = groups.expand(-1, per_group, -1).reshape(module.out_channels, -1)
        return rows.reshape(*rows.shape, *trailing)
    return scale.reshape(1, -1, *trailing)


def _scaled(tensor: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """The product in float32 or wider, rounded once to the tensor's dtype."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    product = tensor.detach().to(wide)
    for factor in factors:
        product = product * factor.detach().to(tensor.device, wide)
    return product.to(tensor.dtype)
