"""Half precision for what does not train."""

from __future__ import annotations

import torch
from torch import nn

from ..arguments import instance
from ..core.inventory import contents
from ..core.route import LOCK
from ..errors import InvalidTypeError, shown


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Give what does not train another dtype, and what trains float32, for mixed precision.

    Vectors stay float32, whether they train or not. Integers stay too: a quantized weight is not
    a number that could be cast.

    Args:
        model: with or without adapters, changed in place.
        dtype: `torch.float16` or `torch.bfloat16`.

    Raises:
        InvalidTypeError: it is no module, or the dtype is not a floating one.
    """
    instance("model", model, nn.Module, "a torch.nn.Module")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InvalidTypeError(f"dtype is {shown(dtype)}, expected torch.float16 or torch.bfloat16")
    with LOCK:
        vectors = {id(v) for _, _, site in contents(model).sites for v in site.vectors.values()}
        for parameter in model.parameters():
            if parameter.is_floating_point() and type(parameter.data) is torch.Tensor:
                trains = parameter.requires_grad or id(parameter) in vectors
                parameter.data = parameter.data.to(torch.float32 if trains else dtype)
