"""Merging into quantized weights: their constants multiplied by a vector.

A quantized weight is small integers times constants, and where no constant spans two rows, scaling
a row is scaling its constants: the integers stay, nothing is quantized a second time, and the
result is as exact as the constants' own dtype. Columns share constants with each other, so that a
vector on a layer's input cannot be merged this way.

HQQ's weights have no such rule here, they are only dequantised. None of these libraries is imported
here unless the module at hand comes from it.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import IA3Error

# The slots of `scaled_rows`, after where each library keeps its constants.
STATE = "weight.quant_state"  # bitsandbytes, 4-bit: a `FourBit`
ROW_MAXIMA = "weight.SCB"  # bitsandbytes, 8-bit: Tensor[out], float32
SCALE = "weight.scale"  # torchao: Tensor[out, groups]


@dataclass(frozen=True)
class FourBit:
    """A 4-bit weight: packed integers with their constants, as the forward may repack both."""

    data: Tensor  # uint8
    storage: torch.dtype  # that the module holds them as; FSDP wants that of its other weights
    state: Any  # a `bitsandbytes.functional.QuantState` that no module holds
    may_repack: bool


def is_quantized(module: nn.Module) -> bool:
    """Whether a module's weight is integers and constants, of bitsandbytes, torchao or HQQ."""
    kinds = (_is_four_bit, _is_eight_bit, _is_torchao, _is_hqq)
    return any(is_kind(module) for is_kind in kinds)


def method_of(module: nn.Module) -> str | None:
    """How a module's weight is quantized, in PEFT's words; `None` where it is not."""
    methods = {"bnb 4bit": _is_four_bit, "bnb 8bit": _is_eight_bit, "torchao": _is_torchao}
    return next((name for name, is_it in methods.items() if is_it(module)), None)


def scaled_rows(module: nn.Module, vector: Tensor) -> dict[str, Any]:
    """What the slots of a quantized layer become when its output is scaled.

    The vector is `[out]`, of any floating dtype, sign and zeros. Products are taken in float32 and
    rounded once; the constants of a 4-bit weight come out in float32 even where they were quantized
    themselves. Raises `IA3Error` where a constant spans several rows, or is not found.
    """
    if _is_hqq(module):
        raise IA3Error("no rule for which rows share a constant of HQQ's")
    weight: Any = module.weight
    vector = vector.detach().to(weight.device, torch.float32)
    if _is_four_bit(module):
        values: dict[str, Any] = {STATE: _scaled_four_bit(module, vector)}
    elif _is_eight_bit(module):
        values = {ROW_MAXIMA: _row_maxima(module) * vector}
    else:
        values = {SCALE: _scaled_torchao(weight, vector)}
    bias = module._parameters.get("bias")
    if bias is not None:
        values["bias"] = (bias.detach().float() * vector).to(bias.dtype)
    return values


def read_slot(module: nn.Module, slot: str) -> Any:
    """What is in a slot now; `write_slot` brings back these very bits."""
    weight: Any = module.weight
    if slot == ROW_MAXIMA:
        return _row_maxima(module)
    if slot == SCALE:
        return weight.scale
    may_repack: Any = module.support_avx512bf16_for_cpu
    # A copy, as bitsandbytes changes the state in place when it repacks.
    state = copy.copy(_state(module))
    return FourBit(weight.data.view(torch.uint8), weight.dtype, state, may_repack)


def write_slot(module: nn.Module, slot: str, value: Any) -> None:
    """Put a value from `scaled_rows` or `read_slot` into its slot, on the module's device."""
    weight: Any = module.weight
    if slot == ROW_MAXIMA:
        # The first forward moves them from the weight to the layer's state.
        holder: Any = module.state if getattr(weight, "SCB", None) is None else weight
        holder.SCB = value.to(weight.device)
    elif slot == SCALE:
        # The model may have been moved or cast since the value was read.
        weight.scale = value.to(weight.scale.device, weight.scale.dtype)
    else:
        # Copies, so that the value can be written once more.
        state = copy.copy(value.state)
        state.to(weight.device)
        weight.data = value.data.to(weight.device).view(value.storage)
        weight.quant_state = state
        if getattr(module, "quant_state", None) is not None:
            module.quant_state = state
        module.support_avx512bf16_for_cpu = value.may_repack


def dequantised(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Linear:
    """An ordinary linear layer with the values that a quantized one stands for.

    What a layer does to its input (torchao's dynamic quantization of activations) is left out. The
    values are rounded once to `dtype`, by default the one the layer computes in, which for 8-bit
    layers is not written down: the bias's, else float16.
    """
    weight: Any = getattr(module, "weight", None)
    bias: Any = getattr(module, "bias", None)  # HQQ's is no parameter
    if _is_hqq(module):
        values = module.dequantize()  # type: ignore[operator]
        own = values.dtype
    elif _is_four_bit(module):
        data, state = _clean(module)
        own = getattr(module, "compute_dtype", None) or state.dtype
        state.dtype = torch.float32
        values = sys.modules["bitsandbytes"].functional.dequantize_4bit(data, state)
    elif _is_eight_bit(module):
        values = weight.data.float() * (_row_maxima(module)[:, None] / 127)
        own = torch.float16 if bias is None else bias.dtype
    else:
        values = weight.dequantize()
        if getattr(weight, "act_pre_scale", None) is not None:
            values = values * weight.act_pre_scale
        own = values.dtype
    dtype = dtype or own
    rows, columns = values.shape
    linear = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(values.to(dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=False)
    return linear.train(module.training)


# -- bitsandbytes, 4-bit: NF4 and FP4, one constant ("absmax") a block -----------------------------


def _is_four_bit(module: nn.Module) -> bool:
    library: Any = sys.modules.get("bitsandbytes")
    if library is None or not isinstance(module, library.nn.Linear4bit):
        return False
    return _state(module) is not None


def _state(module: nn.Module) -> Any:
    # FSDP loses the weight's, and the forward recovers it from the module's.
    return getattr(module.weight, "quant_state", None) or getattr(module, "quant_state", None)


def _clean(module: nn.Module) -> tuple[Tensor, Any]:
    """The packed integers and a state of float32 constants `[blocks]`, in the usual order.

    Undoes, on copies, what bitsandbytes may have done to them: quantized the constants too, or
    repacked the weight for the CPU with constants `[blocks a row, out]` in bfloat16.
    """
    functional = sys.modules["bitsandbytes"].functional
    weight: Any = module.weight
    data, state = weight.data, _state(module)
    dtype, constants = state.dtype, state.absmax
    if state.nested:
        constants = functional.dequantize_blockwise(constants, state.state2) + state.offset
    elif getattr(state, "packing_format_for_cpu", False):
        # Its inverse for the constants quantizes them again, or leaves them in the new order.
        data, _ = functional._convert_weight_packed_for_cpu_inverse(data, copy.copy(state))
        dtype, constants = state.original_dtype, constants.T
    return data, type(state)(
        absmax=constants.float().reshape(-1),
        shape=state.shape,
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=dtype,
    )


def _scaled_four_bit(module: nn.Module, vector: Tensor) -> FourBit:
    data, state = _clean(module)
    rows, columns = state.shape
    if rows != len(vector):
        raise IA3Error(
            f"its 4-bit weight is {list(state.shape)}, expected [{len(vector)}, ...]: it was "
            "quantized the other way round; quantize it again from [out, in]"
        )
    if columns % state.blocksize:
        raise IA3Error(
            f"its {state.quant_type.upper()} weight has rows of {columns} values in blocks of "
            f"{state.blocksize}, so that one constant spans two rows"
        )
    state.absmax = (state.absmax.reshape(rows, -1) * vector[:, None]).reshape(-1)
    # Repacked, the constants would be rounded to bfloat16, and a state dict taken afterwards would
    # hold them in the wrong order (bitsandbytes 0.50).
    return FourBit(data.view(torch.uint8), data.dtype, state, may_repack=False)


# -- bitsandbytes, 8-bit: one constant ("SCB", the row's largest magnitude) a row ------------------


def _is_eight_bit(module: nn.Module) -> bool:
    library: Any = sys.modules.get("bitsandbytes")
    if library is None or not isinstance(module, library.nn.Linear8bitLt):
        return False
    # With has_fp16_weights the weight is an ordinary one, quantized anew in each forward.
    return module.weight.dtype == torch.int8 and _row_maxima(module) is not None


def _row_maxima(module: nn.Module) -> Any:
    state: Any = module.state
    maxima = getattr(module.weight, "SCB", None)
    return state.SCB if maxima is None else maxima


# -- torchao: tensor subclasses, one constant a row or a group within a row ------------------------

# Of these it is known where the zero point stands, and that rows come first.
TORCHAO_TENSORS = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")


def _is_torchao(module: nn.Module) -> bool:
    library: Any = sys.modules.get("torchao.utils")
    if library is None or not isinstance(module, nn.Linear):
        return False
    return isinstance(module._parameters.get("weight"), library.TorchAOBaseTensor)


def _scaled_torchao(weight: Any, vector: Tensor) -> Tensor:
    kind = type(weight).__name__
    if kind not in TORCHAO_TENSORS:
        raise IA3Error(f"no rule for where torchao's {kind} keeps its constants")
    if weight.block_size[0] != 1:
        raise IA3Error(
            f"its {kind} weight has blocks of {list(weight.block_size)}, so that one constant "
            "spans several rows"
        )
    product: Tensor = weight.scale.float() * vector[:, None]
    return product.to(weight.scale.dtype)


# -- HQQ -------------------------------------------------------------------------------------------


def _is_hqq(module: nn.Module) -> bool:
    library: Any = sys.modules.get("hqq.core.quantize")
    return library is not None and isinstance(module, library.HQQLinear)
