"""The inner activation of a gated feed-forward layer, act(gate) ⊙ up ⊙ vector, and its gradient.

Written out in PyTorch, the backward pass needs gate (for the activation), and act(gate) and up (for
the products). Here gate and up are enough: act(gate) is computed again. That is a third less than
the frozen model keeps of the same layer. Nothing is divided by the vector, so that its zeros are no
special case.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

GateActivation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True)
class _Function:
    """A function of the gate.

    Attributes:
        value: the function.
        into: `(gate, out)`: writes its values.
        gradient_into: `(grad, gate, out)`: writes grad times its derivative.
    """

    value: Callable[[Tensor], Tensor]
    into: Callable[[Tensor, Tensor], object]
    gradient_into: Callable[[Tensor, Tensor, Tensor], object]


_ATEN = torch.ops.aten


def _gelu(approximate: str) -> _Function:
    return _Function(
        lambda gate: functional.gelu(gate, approximate=approximate),
        lambda gate, out: _ATEN.gelu.out(gate, approximate=approximate, out=out),
        lambda grad, gate, out: _ATEN.gelu_backward.grad_input(
            grad, gate, approximate=approximate, grad_input=out
        ),
    )


FUNCTIONS: dict[GateActivation, _Function] = {
    "silu": _Function(
        functional.silu,
        lambda gate, out: _ATEN.silu.out(gate, out=out),
        lambda grad, gate, out: _ATEN.silu_backward.grad_input(grad, gate, grad_input=out),
    ),
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
    "relu": _Function(
        functional.relu,
        lambda gate, out: torch.clamp_min(gate, 0, out=out),
        lambda grad, gate, out: _ATEN.threshold_backward.grad_input(grad, gate, 0, grad_input=out),
    ),
}

# How many values of a tensor a CPU works on at a time: what one step of a chunk writes is in the
# cache when the next one reads it.
CHUNK = 1 << 17


def gated_product(
    gate: Tensor, up: Tensor, vector: Tensor | None, activation: GateActivation
) -> Tensor:
    """act(gate) ⊙ up ⊙ vector, which keeps only gate, up and the vector for the backward pass.

    Half precision is computed in float32 and rounded once, where separate operations round after
    each.

    Args:
        gate: `[..., dim]`, any floating dtype.
        up: `[..., dim]`.
        vector: `[dim]`, which may be of a wider dtype; ones for `None`.
        activation: the function of the gate.

    Returns:
        `[..., dim]` in the dtype that gate and up promote to.
    """
    if _is_worth_it(gate, up, vector):
        product: Tensor = _GatedProduct.apply(gate, up, vector, activation)  # type: ignore[no-untyped-call]
        return product
    return _formula(gate, up, vector, activation)


def _formula(gate: Tensor, up: Tensor, vector: Tensor | None, activation: GateActivation) -> Tensor:
    wide = _wide(gate, up, vector)
    product = FUNCTIONS[activation].value(gate.to(wide)) * up.to(wide)
    product = product if vector is None else product * vector
    return product.to(torch.promote_types(gate.dtype, up.dtype))


def _is_worth_it(gate: Tensor, up: Tensor, vector: Tensor | None) -> bool:
    """Whether these are ordinary tensors, and there is something to gain."""
    # A compiler fuses the formula itself, and chooses what to keep.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if type(gate) is not Tensor or type(up) is not Tensor or gate.is_nested or gate.is_meta:
        return False
    if gate.shape != up.shape or gate.device != up.device or gate.numel() == 0:
        return False
    if not torch.is_grad_enabled() and gate.device.type == "cpu" and gate.numel() <= CHUNK:
        # One chunk, of which nothing is kept: as of a token that is decoded.
        return False
    if vector is None:
        return True
    # Where the vector alone trains, act(gate) ⊙ up is all that the formula keeps.
    vector_alone = vector.requires_grad and not (gate.requires_grad or up.requires_grad)
    return vector.shape == gate.shape[-1:] and not (vector_alone and torch.is_grad_enabled())


def _wide(gate: Tensor, up: Tensor, vector: Tensor | None) -> torch.dtype:
    """The dtype to compute in."""
    wide = torch.promote_types(torch.promote_types(gate.dtype, up.dtype), torch.float32)
    return wide if vector is None else torch.promote_types(wide, vector.dtype)


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, vector: Tensor | None, activation: GateActivation
    ) -> Tensor:
        ctx.save_for_backward(gate, up, vector)
        ctx.activation = activation
        wide = _wide(gate, up, vector)
        result = _empty(gate, torch.promote_types(gate.dtype, up.dtype))
        if _has_kernels(gate):
            from . import gated_kernels

            gated_kernels.write_product(gate, up, vector, activation, wide, result)
        else:
            _write_product(gate, up, vector, activation, wide, result)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        gate, up, vector = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return *_differentiable(grad, (gate, up, vector), ctx.activation, needed), None
        wide = _wide(gate, up, vector)
        of_gate = _empty(gate, gate.dtype) if needed[0] else None
        of_up = _empty(up, up.dtype) if needed[1] else None
        if _has_kernels(gate):
            from . import gated_kernels

            sums = gated_kernels.write_gradients(
                grad, gate, up, vector, ctx.activation, wide, of_gate, of_up, needed[2]
            )
        else:
            sums = _write_gradients(
                grad, gate, up, vector, ctx.activation, wide, of_gate, of_up, needed[2]
            )
        return of_gate, of_up, None if sums is None else sums.sum(0).to(vector.dtype), None


def _differentiable(
    grad: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor | None],
    activation: GateActivation,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients as a function that can be differentiated again."""
    # Views: gate and up may be one tensor, whose gradients must be told apart.
    gate, up, vector = (None if t is None else t.view_as(t) for t in inputs)
    assert gate is not None
    assert up is not None
    product = _formula(gate, up, vector, activation)
    wanted = [
        t for t, need in zip((gate, up, vector), needed, strict=False) if need and t is not None
    ]
    found = iter(torch.autograd.grad(product, wanted, grad, create_graph=True))
    return [next(found) if need else None for need in needed[:3]]


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _has_kernels(gate: Tensor) -> bool:
    return gate.is_cuda and _has_triton()


def _empty(like: Tensor, dtype: torch.dtype) -> Tensor:
    # Not empty_like: it may take over strides of which rows are no view.
    return torch.empty(like.shape, dtype=dtype, device=like.device)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _chunks(rows: Tensor) -> Iterator[slice]:
    count, dim = rows.shape
    step = max(1, CHUNK // dim) if rows.device.type == "cpu" else count
    for start in range(0, count, step):
        yield slice(start, start + step)


def _write_product(
    gate: Tensor,
    up: Tensor,
    vector: Tensor | None,
    activation: GateActivation,
    wide: torch.dtype,
    result: Tensor,
) -> None:
    gate, up, result = _rows(gate), _rows(up), _rows(result)
    for chunk in _chunks(gate):
        gates, results = gate[chunk].to(wide), result[chunk]
        product = results if results.dtype == wide else torch.empty_like(gates)
        FUNCTIONS[activation].into(gates, product)
        product.mul_(up[chunk])
        if vector is not None:
            product.mul_(vector)
        if product is not results:
            results.copy_(product)


def _write_gradients(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    vector: Tensor | None,
    activation: GateActivation,
    wide: torch.dtype,
    of_gate: Tensor | None,
    of_up: Tensor | None,
    for_vector: bool,
) -> Tensor | None:
    """Write the gradients of gate and up, where there is a tensor for them.

    Returns:
        `[parts, dim]`, the sum of which is the vector's gradient; `None` unless `for_vector`.
    """
    function = FUNCTIONS[activation]
    grad, gate, up = _rows(grad), _rows(gate), _rows(up)
    sums = []
    for chunk in _chunks(gate):
        grads, gates, ups = (tensor[chunk].to(wide) for tensor in (grad, gate, up))
        scratch = torch.empty_like(gates)
        if of_up is not None or for_vector:
            up_grads = None if of_up is None else _rows(of_up)[chunk]
            in_place = up_grads is not None and up_grads.dtype == wide
            product = up_grads if in_place else torch.empty_like(gates)
            assert product is not None
            function.into(gates, product)
            product.mul_(grads)
            if for_vector:
                sums.append(torch.mul(product, ups, out=scratch).sum(0))
            if up_grads is not None and vector is not None:
                product.mul_(vector)
            if up_grads is not None and not in_place:
                up_grads.copy_(product)
        if of_gate is not None:
            gate_grads = _rows(of_gate)[chunk]
            torch.mul(grads, ups, out=scratch)
            if vector is not None:
                scratch.mul_(vector)
            in_place = gate_grads.dtype == wide
            function.gradient_into(scratch, gates, gate_grads if in_place else scratch)
            if not in_place:
                gate_grads.copy_(scratch)
    return torch.stack(sums) if for_vector else None
