"""One module's weights multiplied by vectors.

The product is taken in float32 or wider and rounded once. Where values are read and written is a
*slot*: a parameter's name, or where a quantized weight keeps its constants (see `quantized`).
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import IA3Error
from . import experts, quantized
from .activations import Side, is_wrapper
from .names import ATTRIBUTE
from .tried import scales_with_weight


def products(module: nn.Module, name: str, vectors: Mapping[Side, Tensor]) -> dict[str, Any]:
    """What a module's slots become when vectors are merged into it: values for `write`.

    Vectors are `[dim]` a side, or `[experts, dim]` within experts. Raises `IA3Error` where the
    weights cannot take them exactly; a quantized weight takes one on its output alone.
    """
    if quantized.is_quantized(module):
        try:
            return quantized.scaled_rows(module, vectors["output"])
        except IA3Error as error:
            raise IA3Error(
                f"cannot merge into {name!r}: {error}; merge with dequantise=True"
            ) from error
    if not _is_offloaded(module):
        return _products(module, name, vectors)
    from accelerate.utils import align_module_device  # type: ignore[import-untyped]

    with align_module_device(module):
        return _products(module, name, vectors)


def is_finite(value: object) -> bool:
    """Whether a slot's value is: a tensor, or the constants of a quantized weight."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    return all(is_finite(part) for part in getattr(value, "__dict__", {}).values())


def read(module: nn.Module, slot: str) -> Any:
    """What is in a slot now."""
    if slot not in module._parameters:
        return quantized.read_slot(module, slot)
    if _is_offloaded(module):
        hook: Any = module._hf_hook
        return hook.weights_map[slot]
    return module.get_parameter(slot).data


def write(module: nn.Module, slot: str, value: Any) -> None:
    """Put a value in a slot, on the module's device."""
    if slot not in module._parameters:
        quantized.write_slot(module, slot, value)
    elif _is_offloaded(module):
        _write_offloaded(module._hf_hook, slot, value)
    else:
        parameter = module.get_parameter(slot)
        # The model may have been moved or cast since the value was read.
        value = value.to(parameter.device, parameter.dtype)
        if parameter.is_inference() and not value.is_inference():
            # What was made in inference mode computes there with such data alone.
            with torch.inference_mode():
                value = value.clone()
        parameter.data = value
        if slot == "weight" and hasattr(getattr(module, "state", None), "reset_grads"):
            # bitsandbytes computes with a quantized copy that it keeps of an ordinary weight.
            module.state.reset_grads()  # type: ignore[operator, union-attr]


def _is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate has taken the module's weights away until its next call."""
    return bool(getattr(getattr(module, "_hf_hook", None), "offload", False)) and _is_empty(module)


def _is_empty(module: nn.Module) -> bool:
    return any(p.is_meta for p in module._parameters.values() if p is not None)


def _write_offloaded(hook: Any, slot: str, value: Tensor) -> None:
    """Lay a value over the one that accelerate keeps, which may be on a disk and stays there."""
    if not isinstance(hook.weights_map, ChainMap):
        hook.weights_map = ChainMap({}, hook.weights_map)
    over, originals = hook.weights_map.maps
    value = value.to("cpu")  # the product was taken where the module computes
    if torch.equal(originals[slot], value):
        over.pop(slot, None)
    else:
        over[slot] = value
    if not over:
        hook.weights_map = originals


def _products(module: nn.Module, name: str, vectors: Mapping[Side, Tensor]) -> dict[str, Tensor]:
    if _is_empty(module):
        raise IA3Error(f"cannot merge into {name!r}: its weights are not there (meta device)")
    if "inner" in vectors:
        return experts.scaled_weights(module, vectors["inner"])
    if is_wrapper(module):
        raise IA3Error(
            f"cannot merge into {name!r}: another adapter is between the vectors and the weights "
            f"({type(module).__module__}.{type(module).__name__}): merge that first, by PEFT's "
            "merge_and_unload() before this one is put on the model"
        )
    kind = f"cannot merge into {name!r}, a {type(module).__name__}"
    weight = module._parameters.get("weight")
    if weight is None:
        own = [key for key in module.state_dict() if ATTRIBUTE not in key.split(".")]
        raise IA3Error(
            f"{kind} whose weight is no parameter but made from {own}: if its library unpacks it "
            "in a call, call the model once before, else load the model as floating-point numbers"
        )
    # Numbers of one byte would have to be rounded to so few bits that little is left of the vector.
    if not weight.is_floating_point() or weight.itemsize < 2:
        raise IA3Error(
            f"{kind} with {weight.dtype} weights: expected floating-point weights of 16 bits or "
            "more"
        )
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        raise IA3Error(f"cannot merge into {name!r}: max_norm would undo the vector")
    for side, vector in vectors.items():
        if not scales_with_weight(module, side, vector, partial(_scaled, module)):
            raise IA3Error(
                f"cannot merge into {name!r}: in the forward of a {type(module).__name__} a scaled "
                f"weight does not scale its {side}; keep the adapter on the model"
            )
    return _scaled(module, vectors)


def _scaled(module: nn.Module, vectors: Mapping[Side, Tensor]) -> dict[str, Tensor]:
    weight = module.get_parameter("weight")
    factors = [_across_weight(module, weight, side, vector) for side, vector in vectors.items()]
    values = {"weight": _product(weight, *factors)}
    bias = module._parameters.get("bias")
    if "output" in vectors and bias is not None:
        values["bias"] = _product(bias, vectors["output"])
    return values


def _across_weight(module: nn.Module, weight: Tensor, side: Side, vector: Tensor) -> Tensor:
    if isinstance(module, Conv1D | nn.Embedding):
        return vector if side == "output" else vector[:, None]
    trailing = [1] * (weight.dim() - 2)
    if side == "output":
        return vector.reshape(-1, 1, *trailing)
    # Each group of a convolution's output channels sees its own slice of the input channels.
    groups: Any = getattr(module, "groups", 1)
    rows = vector.reshape(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1)
    return rows.reshape(weight.shape[0], -1, *trailing)


def _product(tensor: Tensor, *factors: Tensor) -> Tensor:
    """The product in float32 or wider, rounded once to the tensor's dtype."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    product = tensor.detach().to(wide)
    for factor in factors:
        product = product * factor.detach().to(tensor.device, wide)
    return product.to(tensor.dtype)
