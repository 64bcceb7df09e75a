"""Which modules have an activation that a vector can rescale, and that vector's shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from ..errors import StateError
from .experts import experts_shape, is_experts

# "inner": within a module of experts, whose inner activation is no submodule's input or output.
Side = Literal["output", "input", "inner"]

SUPPORTED = "Linear, Conv1D, Conv1d, Conv2d, Conv3d, Embedding (output) or a module of 3-D experts"


@dataclass(frozen=True)
class Activation:
    """One side of a module: its `dim` channels, or values an expert, and a vector's shapes."""

    dim: int
    # PEFT's, in memory and on disk: [dim, 1] on a linear layer's output, [1, dim] on its input,
    # [1, dim, 1, ...] on a convolution, [experts, dim] within experts.
    shape: tuple[int, ...]
    # As it multiplies the activation's last axes: [dim], [dim, 1, ...] or [experts, dim].
    factor_shape: tuple[int, ...]


def activation_of(module: nn.Module, side: Side) -> Activation | None:
    """The module's activation on that side; `None` if it has none that can be rescaled."""
    if is_experts(module):
        if side != "inner":
            return None
        experts, inner = experts_shape(module)
        return Activation(inner, (experts, inner), (experts, inner))
    if side == "inner":
        return None
    if isinstance(module, nn.Embedding):
        dim = module.embedding_dim
        # An embedding's input is token ids.
        return Activation(dim, (dim, 1), (dim,)) if side == "output" else None
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        axes = len(module.kernel_size)
        dim = module.out_channels if side == "output" else module.in_channels
        return Activation(dim, (1, dim, *[1] * axes), (dim, *[1] * axes))
    features = linear_features(module)
    if features is None:
        return None
    dim = features[1] if side == "output" else features[0]
    return Activation(dim, (dim, 1) if side == "output" else (1, dim), (dim,))


def refuse_lazy(modules: Mapping[str, nn.Module]) -> None:
    """Raise `IA3Error` where one of a model's modules has no weights before its first call."""
    for name, module in modules.items():
        lazy: Any = module
        if isinstance(module, LazyModuleMixin) and lazy.has_uninitialized_params():
            raise StateError(
                f"module {name!r} is a {type(module).__name__}, whose size is not known before its "
                "first call: call the model once, then put adapters on it"
            )


def is_wrapper(module: nn.Module) -> bool:
    """Whether a module of PEFT's computes with the base module, and others, that it holds."""
    return hasattr(type(module), "adapter_layer_names")


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """`(in, out)` of a linear layer, quantized or not; `None` for anything else."""
    if isinstance(module, Conv1D):
        # Not the weight's shape, which FSDP 1 flattens.
        return module.nx, module.nf
    if is_read(module):
        return None
    # Quantized linear layers (GPTQ, AWQ, HQQ) are classes of their own.
    if not isinstance(module, nn.Linear) and "Linear" not in type(module).__name__:
        return None
    inputs = getattr(module, "in_features", None)
    outputs = getattr(module, "out_features", None)
    return (inputs, outputs) if isinstance(inputs, int) and isinstance(outputs, int) else None


def is_read(module: nn.Module) -> bool:
    """Whether `nn.MultiheadAttention` reads the module's weight and never calls it."""
    return isinstance(module, NonDynamicallyQuantizableLinear)


def dtype_of(module: nn.Module) -> torch.dtype:
    """A weight's dtype, or what it computes in; float32 where it is quantized and does not say."""
    weight = next(module.parameters(), None)
    dtypes = (getattr(module, "compute_dtype", None), None if weight is None else weight.dtype)
    whole = (d for d in dtypes if d is not None and d.is_floating_point and d.itemsize > 1)
    return next(whole, torch.float32)


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes; `cpu` for one without tensors."""
    tensor: Tensor | None = next(chain(module.parameters(), module.buffers()), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    # Under accelerate's offloading the weights wait on the meta device between two calls.
    executes_on = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if device.type == "meta" and executes_on is not None:
        return torch.device(executes_on)
    return device
