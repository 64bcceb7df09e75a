"""Mixture-of-experts blocks whose experts are 3-D parameters: one vector per expert.

No submodule of such a block has the inner activation as its input: the forward picks an expert's
`down_proj` and multiplies by it. So the forward runs on a shallow copy of the block whose
`down_proj` is a `_ScaledWeight`: the weight, and the vectors of its inner axis. A matrix product
with it scales the other operand, and knows from how the weight was indexed which expert a row
belongs to. Any other operation gets the weight multiplied by the vectors: exact, only slower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import IA3Error
from .patch import Patch, patch, rebound, slot_for
from .rescale import DIVIDING_DTYPES, is_traced

# These multiply by `module.down_proj` with the functions below; others hand it to kernels of their
# own, which want a tensor.
READABLE_IMPLEMENTATIONS = (None, "eager", "batched_mm", "grouped_mm")
PRODUCTS = ("linear", "bmm", "mm", "matmul", "__matmul__")
GROUPED_PRODUCTS = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")


def is_experts(module: nn.Module) -> bool:
    """Whether a module has experts as 3-D parameters: `gate_up_proj` or `up_proj`, `down_proj`."""
    gate_up, up, down = map(module._parameters.get, ("gate_up_proj", "up_proj", "down_proj"))
    up = up if gate_up is None else gate_up
    if up is None or down is None:
        return False
    # Identity experts have no use for a down_proj.
    return up.dim() == down.dim() == 3 and up.shape[0] >= down.shape[0]


def experts_shape(module: nn.Module) -> tuple[int, int]:
    """The shape of a block's vectors: the number of experts, and of inner values of each."""
    down = module.get_parameter("down_proj")
    return down.shape[0], down.shape[_inner_axis(module)]


def attach(module: nn.Module, vector: Callable[[], Tensor | None]) -> Patch:
    """Have each expert's inner activation multiplied by a vector of its own, until `remove()`.

    `vector` is called at each forward for the vectors, `[experts, inner]`, or `None`.
    """
    check_forward(module)
    return _RescaledForward(module, vector).patch


def check_forward(module: nn.Module) -> None:
    """Raise `IA3Error` where a block's forward cannot be run on a copy of the block."""
    before = module.__dict__.get(slot_for(module))
    if before is not None and rebound(before, module, module) is None:
        raise IA3Error(
            f"the forward of this {type(module).__name__} was replaced by {before!r}, which cannot "
            "be run on a copy of the module: attach the vectors first, then replace it"
        )


def scaled_weights(module: nn.Module, vectors: Tensor) -> dict[str, Tensor]:
    """What a merge puts in place of `down_proj`: its inner axis times vectors `[experts, inner]`.

    The product is taken in float32 or wider and rounded once to the parameter's dtype.
    """
    down = module.get_parameter("down_proj").detach()
    wide = torch.promote_types(down.dtype, torch.float32)
    factors = vectors.detach().to(down.device, wide).unsqueeze(3 - _inner_axis(module))
    scaled = torch.empty_like(down)
    # One expert at a time: all of them in float32 can be more than there is memory for.
    for expert, factor in enumerate(factors):
        scaled[expert] = down[expert].to(wide) * factor
    return {"down_proj": scaled}


# -- the block -------------------------------------------------------------------------------------


def _inner_axis(module: nn.Module) -> int:
    """The inner axis of `down_proj`: 2 where weights are `[experts, out, in]`, 1 if transposed."""
    parts = 1 if module._parameters.get("gate_up_proj") is None else 2
    up = module.get_parameter("up_proj" if parts == 1 else "gate_up_proj")
    down = module.get_parameter("down_proj")
    for weight in (up, down):
        if weight.dtype not in (*DIVIDING_DTYPES, torch.float16):
            raise IA3Error(
                f"the experts of a {type(module).__name__} are {weight.dtype}, expected weights "
                "of 16, 32 or 64-bit floats: load the model without quantizing its experts"
            )
    fits = {
        2: tuple(up.shape[1:]) == (parts * down.shape[2], down.shape[1]),
        1: tuple(up.shape[1:]) == (down.shape[2], parts * down.shape[1]),
    }
    # Both can fit without a gate. Should neither the block nor the shapes tell, it is taken for
    # nn.Linear's layout, and a product along the other axis will raise.
    transposed = getattr(module, "is_transposed", not fits[2])
    axis = 1 if transposed else 2
    if not fits[axis]:
        raise IA3Error(
            f"the experts of a {type(module).__name__} have weights of {list(up.shape)} and "
            f"{list(down.shape)}{', transposed' if transposed else ''}, which do not fit each "
            f"other: expected [experts, {parts} * inner, hidden] and [experts, hidden, inner], "
            "both with the last two axes exchanged if transposed"
        )
    return axis


class _RescaledForward:
    """A block's forward, run on a shallow copy of the block with a scaled `down_proj`."""

    def __init__(self, module: nn.Module, vector: Callable[[], Tensor | None]) -> None:
        self.module, self.vector = module, vector
        self.patch = patch(module, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module, vectors = self.module, self.vector()
        if vectors is None:
            return self.patch.below(*args, **kwargs)
        copy = type(module).__new__(type(module))
        copy.__dict__.update(module.__dict__)
        down = _ScaledWeight(module.get_parameter("down_proj"), vectors, _inner_axis(module) - 3)
        kernels = getattr(getattr(module, "config", None), "_experts_implementation", None)
        readable = kernels in READABLE_IMPLEMENTATIONS
        # The copy's own attribute comes before the parameter of that name.
        copy.__dict__["down_proj"] = down if readable else down.multiplied()
        forward = rebound(self.patch.below, module, copy)
        assert forward is not None
        return forward(*args, **kwargs)


# -- the weight ------------------------------------------------------------------------------------


class _ScaledWeight:
    """A weight, `[experts, ., .]` or less, that is yet to be multiplied by vectors along one axis.

    `vectors` is `[experts, inner]`, or `[inner]` of one expert; `axis` the inner axis, -1 or -2;
    `rows`, `[batch]`, the expert of each matrix of a gathered weight.
    """

    def __init__(
        self, weight: Tensor, vectors: Tensor, axis: int, rows: Tensor | None = None
    ) -> None:
        self.weight, self.vectors, self.axis, self.rows = weight, vectors, axis, rows

    def __getitem__(self, index: Any) -> Any:
        """One expert's weight (by its number), or each row's weight (by a list of numbers)."""
        if self.weight.dim() == 3 and self.rows is None:
            if isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0):
                return _ScaledWeight(self.weight[index], self.vectors[index], self.axis)
            if isinstance(index, Tensor) and index.dim() == 1 and index.dtype != torch.bool:
                return _ScaledWeight(self.weight[index], self.vectors, self.axis, rows=index)
        return self.multiplied()[index]

    def transpose(self, first: int, second: int) -> Any:
        """With two axes exchanged."""
        dims = self.weight.dim()
        if {first % dims, second % dims} != {dims - 2, dims - 1}:
            return self.multiplied().transpose(first, second)
        weight = self.weight.transpose(first, second)
        return _ScaledWeight(weight, self.vectors, -3 - self.axis, self.rows)

    def __matmul__(self, other: Any) -> Any:
        return torch.matmul(self, other)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        # Of these attributes the vectors change nothing.
        as_it_is = name in ("dtype", "device", "shape")
        return getattr(self.weight if as_it_is else self.multiplied(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(arg: Any) -> Any:
            return arg.multiplied() if isinstance(arg, cls) else arg

        kwargs = kwargs or {}
        product = _product(func, args, kwargs)
        if product is not None:
            return product
        return func(*map(plain, args), **{name: plain(arg) for name, arg in kwargs.items()})

    def multiplied(self) -> Tensor:
        """The tensor that this stands for."""
        return _scaled(self.weight, self.vectors, self.rows, self.axis)


def _product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """A matrix product of a tensor and a scaled weight; `None` where `func` is none we know."""
    name = func.__name__
    ours = [isinstance(arg, _ScaledWeight) for arg in args[:2]]
    if name not in (*PRODUCTS, *GROUPED_PRODUCTS) or len(args) < 2 or sum(ours) != 1:
        return None
    at = ours.index(True)
    weight, other = args[at], args[1 - at]
    dims, rows = weight.weight.dim(), weight.rows
    if name in GROUPED_PRODUCTS:
        offsets = kwargs.get("offs")
        if at == 0 or dims != 3 or rows is not None or offsets is None:
            return None
        # Rows are sorted by expert. Those behind the last group get the number of no expert.
        numbers = torch.arange(other.shape[0], device=offsets.device, dtype=offsets.dtype)
        rows = torch.searchsorted(offsets, numbers, right=True)
    elif other.dim() < 2 or (dims == 3 and other.dim() != 3):
        return None
    # The axis of the other operand that is contracted, and the weight's.
    place = -1 if at == 1 else -2
    contracted = -2 if at == 1 and name != "linear" else -1
    if weight.axis != contracted:
        raise IA3Error(
            f"the experts' down_proj, {list(weight.shape)}, is multiplied along what was taken for "
            "its output axis: its block needs an attribute is_transposed=True"
        )
    operands = list(args)
    operands[at] = weight.weight
    operands[1 - at] = _scale(other, weight.vectors, rows, place)
    return func(*operands, **kwargs)  # type: ignore[no-any-return]


# -- the operation ---------------------------------------------------------------------------------
#
# values: [batch, inner] of one expert, or each row of the expert in `rows`; or [batch, n, inner],
# each batch entry of one expert. With axis -2 the last two axes are exchanged. Products are taken
# in the wider dtype and rounded once.


def _scale(values: Tensor, vectors: Tensor, rows: Tensor | None, axis: int) -> Tensor:
    """values ⊙ vectors, in the dtype of the values."""
    if rows is not None and torch.is_grad_enabled() and not is_traced():
        return _Scale.apply(values, vectors, rows, axis)  # type: ignore[no-any-return, no-untyped-call]
    return _scaled(values, vectors, rows, axis)


class _Scale(torch.autograd.Function):
    """Saves the values, and not the vectors gathered for them."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, vectors: Tensor, rows: Tensor, axis: int) -> Tensor:
        ctx.axis = axis
        ctx.save_for_backward(values if ctx.needs_input_grad[1] else None, vectors, rows)
        return _scaled(values, vectors, rows, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        values, vectors, rows = ctx.saved_tensors
        grad_values = grad_vectors = None
        if ctx.needs_input_grad[0]:
            grad_values = _scaled(grad, vectors, rows, ctx.axis)
        if ctx.needs_input_grad[1]:
            wide = torch.promote_types(grad.dtype, torch.float32)
            product = grad.to(wide) * values
            if product.dim() == 3:
                product = product.sum(-3 - ctx.axis)
            sums = _with_no_expert(torch.zeros_like(vectors, dtype=product.dtype))
            grad_vectors = sums.index_add_(0, rows, product)[:-1]
        return grad_values, grad_vectors, None, None


def _scaled(values: Tensor, vectors: Tensor, rows: Tensor | None, axis: int) -> Tensor:
    if vectors.dim() == 1:
        factor = vectors if axis == -1 else vectors.unsqueeze(-1)
    elif rows is None:
        factor = vectors.unsqueeze(-3 - axis)
    else:
        factor = _with_no_expert(vectors).index_select(0, rows)
        factor = factor if values.dim() == 2 else factor.unsqueeze(-3 - axis)
    return (values * factor).to(values.dtype)


def _with_no_expert(vectors: Tensor) -> Tensor:
    """The vectors, and zeros for rows of no expert, whose values and gradients are undefined."""
    return functional.pad(vectors, (0, 0, 0, 1))
