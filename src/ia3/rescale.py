"""The operation of (IA)³, activation ⊙ vector, and its gradient (paper section 3.3).

The plain product keeps a copy of the activation for the backward pass. Where the activation is
fresh (nobody else holds it), it can be scaled in place and the vector's gradient had from the
scaled result y′ instead, which the next operation tends to save anyway:

    ∂loss/∂l = Σ (g ⊙ y) = Σ (g ⊙ y′) / l
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Entries of a vector nearer to zero than this cannot be divided out of y′ again. They are replaced
# by it in the training forward: y · 1e-20 vanishes beside anything it is added to, and the gradient
# stays exact. float16 cannot hold it and takes the plain product.
SMALLEST_DIVISOR = 1e-20
IN_PLACE_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


class _RescaleInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: Tensor, vector: Tensor) -> Tensor:
        near_zero = vector.abs() < SMALLEST_DIVISOR
        divisor = vector.masked_fill(near_zero, SMALLEST_DIVISOR)
        activation.mul_(divisor)
        ctx.mark_dirty(activation)
        ctx.save_for_backward(activation, divisor)
        return activation

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,) = grads
        scaled, divisor = ctx.saved_tensors
        grad_activation = grad_vector = None
        if ctx.needs_input_grad[0]:
            grad_activation = (grad * divisor).to(grad.dtype)
        if ctx.needs_input_grad[1]:
            wide = torch.promote_types(grad.dtype, divisor.dtype)
            product = grad.to(wide) * scaled.to(wide)
            grad_vector = product.flatten(0, -2).sum(0) / divisor
        return grad_activation, grad_vector


def rescale(activation: Tensor, vector: Tensor, *, in_place: bool = False) -> Tensor:
    """Multiply the last axis of an activation by a vector.

    Args:
        activation: `[..., dim]`, any floating dtype.
        vector: `[dim]`. The product is taken in the wider of the two dtypes and rounded once.
        in_place: the activation is fresh, so that it may be overwritten. Ignored where that would
            not be exact or not be traceable (float16, views, `torch.compile`, `torch.func`).

    Returns:
        `[..., dim]` in the activation's dtype; the same tensor object when written in place.
    """
    if activation.is_nested:
        parts = [rescale(part, vector) for part in activation.unbind()]
        return torch.nested.as_nested_tensor(parts)
    if (
        not in_place
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or activation.dtype not in IN_PLACE_DTYPES
        or vector.dtype not in IN_PLACE_DTYPES
        or activation._is_view()
        or activation.dim() < 2
    ):
        return (activation * vector).to(activation.dtype)
    if torch.is_grad_enabled() and vector.requires_grad:
        return _RescaleInPlace.apply(activation, vector)  # type: ignore[no-any-return, no-untyped-call]
    return activation.mul_(vector)
