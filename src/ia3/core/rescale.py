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

from ..errors import StateError

# Entries of a vector nearer to zero cannot be divided out of y′ again. In the training forward this
# replaces them: y · 1e-20 vanishes beside anything it is added to, and the gradient stays exact.
# float16 cannot hold it and takes the plain product.
SMALLEST_DIVISOR = 1e-20
DIVIDING_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def is_traced() -> bool:
    """Whether calls are becoming a graph: by a compiler, `torch.func` or `torch.jit.trace`.

    Such a graph is to be the same with and without gradients, and has no operations of our own.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
    )


class _KeepResult(torch.autograd.Function):
    """The scaled result, and the activation as far as autograd is concerned.

    The second output takes no memory, and only the backward pass uses it. Where that pass is to be
    differentiated, y is the value of y′ / l with this output's place in the graph: differentiating
    y′ / l itself would take the difference of two large numbers where l is small.
    """

    @staticmethod
    def forward(
        ctx: Any, activation: Tensor, vector: Tensor, in_place: bool
    ) -> tuple[Tensor, Tensor]:
        near_zero = vector.abs() < SMALLEST_DIVISOR
        divisor = vector.masked_fill(near_zero, SMALLEST_DIVISOR)
        place = divisor.as_strided(activation.shape, [0] * activation.dim())
        if in_place:
            scaled = activation.mul_(divisor)
            ctx.mark_dirty(scaled)
        else:
            scaled = (activation * divisor).to(activation.dtype)
        ctx.save_for_backward(scaled, divisor, vector, place)
        ctx.set_materialize_grads(False)
        return scaled, place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        grad, grad_place = grads
        try:
            scaled, divisor, vector, place = ctx.saved_tensors
        except RuntimeError as error:
            if "inplace" not in str(error):  # a graph that has been freed, memory that has run out
                raise
            raise StateError(
                f"a rescaled activation, or the vector, was written over before the backward pass "
                f"that needs it: where the model does so, use_plain_product() on the IA3Model "
                f"keeps another activation ({error})"
            ) from error
        if grad is None:
            return grad_place, None, None
        grad_activation = grad_vector = None
        differentiated = torch.is_grad_enabled()
        if ctx.needs_input_grad[0]:
            grad_activation = (grad * (vector if differentiated else divisor)).to(grad.dtype)
            if grad_place is not None:
                grad_activation = grad_activation + grad_place
        if ctx.needs_input_grad[1]:
            wide = torch.promote_types(grad.dtype, divisor.dtype)
            if differentiated:
                activation = scaled.detach().to(wide) / divisor + (place - place.detach())
                grad_vector = (grad.to(wide) * activation).sum_to_size(divisor.shape)
            else:
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
            kept. Ignored where that would not be exact (float16) and in what `is_traced`.
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
    if activation.is_nested or is_traced():
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
        scaled, _ = _KeepResult.apply(activation, vector, in_place)  # type: ignore[no-untyped-call]
        return scaled  # type: ignore[no-any-return]
    if in_place and not (activation.requires_grad and activation._is_view()):
        return activation.mul_(vector)
    return (activation * vector).to(activation.dtype)
