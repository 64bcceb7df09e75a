"""The operation of (IA)³, activation ⊙ vector, and its gradient (paper section 3.3).

The plain product keeps the activation y for the backward pass. The vector's gradient can be had
from the scaled result y′ instead, which the next operation saves anyway:

    ∂loss/∂l = Σ (g ⊙ y) = Σ (g ⊙ y′) / l

And where the activation is fresh (nothing else holds it), y′ can be written over it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import IA3Error

# Entries of a vector nearer to zero cannot be divided out of y′ again. In the training forward this
# replaces them: y · 1e-20 vanishes beside anything it is added to, and the gradient stays exact.
# float16 cannot hold it and takes the plain product.
SMALLEST_DIVISOR = 1e-20
DIVIDING_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


class _KeepResult(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: Tensor, vector: Tensor, in_place: bool) -> Tensor:
        near_zero = vector.abs() < SMALLEST_DIVISOR
        divisor = vector.masked_fill(near_zero, SMALLEST_DIVISOR)
        if in_place:
            scaled = activation.mul_(divisor)
            ctx.mark_dirty(scaled)
        else:
            scaled = (activation * divisor).to(activation.dtype)
        ctx.save_for_backward(scaled, divisor)
        return scaled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        try:
            scaled, divisor = ctx.saved_tensors
        except RuntimeError as error:
            raise IA3Error(
                f"the model writes over a rescaled activation, which its vector's gradient is "
                f"computed from: use_plain_product() on the IA3Model keeps another ({error})"
            ) from error
        grad_activation = grad_vector = None
        if ctx.needs_input_grad[0]:
            grad_activation = (grad * divisor).to(grad.dtype)
        if ctx.needs_input_grad[1]:
            wide = torch.promote_types(grad.dtype, divisor.dtype)
            product = grad.to(wide) * scaled.to(wide)
            grad_vector = product.sum_to_size(divisor.shape) / divisor
        return grad_activation, grad_vector, None


def rescale(
    activation: Tensor, vector: Tensor, *, keep_result: bool = False, in_place: bool = False
) -> Tensor:
    """Multiply the last axis of an activation by a vector, or each row's by one of its own.

    Args:
        activation: `[..., dim]`, any floating dtype; the result has its dtype, and is taken in
            the wider of the two and rounded once.
        vector: `[dim]`, or any shape that broadcasts over the activation, as `[rows, 1, dim]`. With
            one axis more, each row is for k rows of the activation that follow each other.
        keep_result: take the vector's gradient from the result, so that the activation need not be
            kept. Ignored where that would not be exact or not be traceable (float16,
            `torch.compile`, `torch.func`).
        in_place: the activation is fresh: write over it, which keeps the result too. A view is not
            written over where gradients are wanted.
    """
    if activation.is_nested and activation.layout is torch.strided:
        parts = [rescale(part, vector) for part in activation.unbind()]
        return torch.nested.as_nested_tensor(parts)
    if vector.dim() > activation.dim():
        rows, *rest = activation.shape
        apart = activation.view(vector.shape[0], rows // vector.shape[0], *rest)
        scaled = rescale(apart, vector, keep_result=keep_result, in_place=in_place)
        return activation if scaled is apart else scaled.flatten(0, 1)
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if traced or activation.is_nested:
        return (activation * vector).to(activation.dtype)
    if torch.is_grad_enabled() and vector.requires_grad:
        in_place = in_place and not activation._is_view()
        axes = zip(reversed(vector.shape), reversed(activation.shape), strict=False)
        if (
            not (keep_result or in_place)
            or activation.dtype not in DIVIDING_DTYPES
            or vector.dtype not in DIVIDING_DTYPES
            or activation.dim() < 2
            or any(size not in (1, whole) for size, whole in axes)
        ):
            return (activation * vector).to(activation.dtype)
        return _KeepResult.apply(activation, vector, in_place)  # type: ignore[no-any-return, no-untyped-call]
    if in_place and not (activation.requires_grad and activation._is_view()):
        return activation.mul_(vector)
    return (activation * vector).to(activation.dtype)
