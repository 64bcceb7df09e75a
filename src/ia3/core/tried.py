"""Whether a layer with a forward of its own is what its class promises, found by running it.

A subclass of a linear layer may give a tuple, or the outputs of groups; one of a convolution may
normalise its weight, so that scaling the weight changes nothing. Names do not say so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .activations import Side
from .names import ATTRIBUTE

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, Conv1D)
_PLAIN = {(kind.forward, getattr(kind, "_conv_forward", None)) for kind in _KINDS}


def gives_channels(module: nn.Module, dim: int) -> bool:
    """Whether a module gives one tensor with `dim` channels where a vector multiplies them.

    Only shapes are computed. What cannot be run so is taken to be as it says.
    """
    if not _can_be_tried(module):
        return True
    try:
        # Not a decorator: most modules are not tried, and each load of an adapter asks of all.
        with torch.no_grad():
            twin = _copy(module, lambda tensor: torch.empty_like(tensor, device="meta"))
            found = type(module).forward(twin, _input(module, torch.device("meta")))
    except Exception:  # of a forward that this library knows nothing about
        return True
    axis = _axis(module)
    return isinstance(found, Tensor) and found.dim() >= -axis and found.shape[axis] == dim


@torch.no_grad()
def scales_with_weight(
    module: nn.Module,
    side: Side,
    vector: Tensor,
    scaled: Callable[[Mapping[Side, Tensor]], Mapping[str, Tensor]],
) -> bool:
    """Whether weights scaled by a vector compute the scaled activation, in evaluation.

    Args:
        side, vector: the side of the module that the vector is on, and its values, `[dim]`.
        scaled: the module's weights times vectors `[dim]` on its sides, by name.
    """
    if not _can_be_tried(module):
        return True
    parts = (part for name, part in module.named_children() if name != ATTRIBUTE)
    if any(True for part in parts for _ in part.parameters()):
        return False  # these are not scaled
    weight = module.get_parameter("weight")
    # Far from one, so that what goes wrong is no matter of rounding, and of the vector's own signs:
    # a ReLU lets positive factors through.
    sizes = torch.arange(len(vector), device=weight.device).cos().exp2()
    tried = sizes.copysign(vector.to(weight.device)).to(weight.dtype)
    across = tried.view(-1, *[1] * (-1 - _axis(module)))
    given = _input(module, weight.device)
    try:
        forward, twin = type(module).forward, _copy(module, _but_buffers)
        expected = forward(twin, given * across if side == "input" else given)
        expected = expected * across if side == "output" else expected
        twin = _copy(module, _but_buffers)
        twin._parameters |= scaled({side: tried})  # type: ignore[arg-type]
        found = forward(twin, given)
        return bool((found - expected).norm() <= 0.05 * expected.norm())
    except Exception:  # as above
        return True


def _can_be_tried(module: nn.Module) -> bool:
    """Whether it has a forward of its own, and an ordinary weight: a call changes nothing then."""
    kind, weight = type(module), module._parameters.get("weight")
    if (kind.forward, getattr(kind, "_conv_forward", None)) in _PLAIN:
        return False
    # Quantized layers have parameters of classes of their own, or of one byte.
    return type(weight) is nn.Parameter and weight.is_floating_point() and weight.itemsize > 1


def _copy(module: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of a module and of all within it, each tensor changed, with all else shared.

    It is in evaluation mode: no two calls of a dropout give the same.
    """
    twin = type(module).__new__(type(module))
    twin.__dict__.update(module.__dict__, training=False)
    for names in ("_parameters", "_buffers"):
        own = module.__dict__[names].items()
        twin.__dict__[names] = {n: None if t is None else change(t) for n, t in own}
    parts = module._modules.items()
    twin.__dict__["_modules"] = {n: None if p is None else _copy(p, change) for n, p in parts}
    return twin


def _but_buffers(tensor: Tensor) -> Tensor:
    """The very parameter; a copy of a buffer, which a call may change."""
    return tensor if isinstance(tensor, nn.Parameter) else tensor.clone()


def _input(module: Any, device: torch.device) -> Tensor:
    """What a module takes, the same every time."""
    dtype = module.weight.dtype
    if isinstance(module, nn.Embedding):
        return torch.arange(min(module.num_embeddings, 4), device=device)[None]
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        sizes = zip(module.kernel_size, module.dilation, strict=True)
        shape = [2, module.in_channels, *(reach * (size - 1) + 4 for size, reach in sizes)]
    else:
        # As many tokens as most numbers of groups divide.
        features = module.nx if isinstance(module, Conv1D) else module.in_features
        shape = [2, 48, features]
    count = torch.Size(shape).numel()
    return torch.arange(count, device=device).mul(0.7).sin().reshape(shape).to(dtype)


def _axis(module: nn.Module) -> int:
    """Which axis of a module's input and output has the channels."""
    return -1 - len(module.kernel_size) if isinstance(module, nn.modules.conv._ConvNd) else -1
