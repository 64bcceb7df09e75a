"""`gated_product` on a GPU: one pass over memory forward, one backward, in Triton.

Imported only where it is used: Triton comes with PyTorch's builds for CUDA and ROCm, and with no
other.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# A program's share of the rows and columns. Backward, it adds up its rows' share of the vector's
# gradient.
ROWS = 32
COLUMNS = 256
# How many of its rows a program has in registers at a time.
ROWS_AT_ONCE = 4

_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def write_product(
    gate: Tensor,
    up: Tensor,
    vector: Tensor | None,
    activation: str,
    wide: torch.dtype,
    result: Tensor,
) -> None:
    """Write act(gate) ⊙ up ⊙ vector, computed in `wide`."""
    gate, up = _rows(gate), _rows(up)
    with torch.cuda.device_of(gate):  # type: ignore[no-untyped-call]
        _product[_grid(gate)](
            gate,
            up,
            gate if vector is None else vector.contiguous(),
            result,
            *gate.shape,
            **_constants(vector, activation, wide),
        )


def write_gradients(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    vector: Tensor | None,
    activation: str,
    wide: torch.dtype,
    of_gate: Tensor | None,
    of_up: Tensor | None,
    for_vector: bool,
) -> Tensor | None:
    """Write the gradients of gate and up, where there is a tensor for them.

    Returns:
        `[parts, dim]`, the sum of which is the vector's gradient, the same at every call; `None`
        unless `for_vector`.
    """
    grad, gate, up = _rows(grad), _rows(gate), _rows(up)
    grid = _grid(gate)
    sums = gate.new_empty(grid[0], gate.shape[1], dtype=wide) if for_vector else None
    with torch.cuda.device_of(gate):  # type: ignore[no-untyped-call]
        _gradients[grid](
            grad,
            gate,
            up,
            gate if vector is None else vector.contiguous(),
            # What is not wanted is not written.
            gate if of_gate is None else of_gate,
            gate if of_up is None else of_up,
            gate if sums is None else sums,
            *gate.shape,
            **_constants(vector, activation, wide),
            FOR_GATE=of_gate is not None,
            FOR_UP=of_up is not None,
            FOR_VECTOR=for_vector,
        )
    return sums


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


def _grid(rows: Tensor) -> tuple[int, int]:
    return triton.cdiv(rows.shape[0], ROWS), triton.cdiv(rows.shape[1], COLUMNS)


def _constants(vector: Tensor | None, activation: str, wide: torch.dtype) -> dict[str, Any]:
    return {
        "HAS_VECTOR": vector is not None,
        "ACTIVATION": activation,
        "WIDE": _DTYPES[wide],
        "ROWS": ROWS,
        "COLUMNS": COLUMNS,
        "ROWS_AT_ONCE": ROWS_AT_ONCE,
    }


@triton.jit
def _sigmoid(x):  # type: ignore[no-untyped-def]
    """Its values and one minus them, each as exact as the dtype allows."""
    small = tl.exp(-tl.abs(x))
    larger = 1.0 / (1.0 + small)
    smaller = small * larger
    return tl.where(x < 0, smaller, larger), tl.where(x < 0, larger, smaller)


@triton.jit  # type: ignore[untyped-decorator]
def _activate(gate, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """The activation's values and its derivatives."""
    if ACTIVATION == "relu":
        # NaN stays NaN.
        value = tl.where(gate < 0, 0.0, gate)
        slope = tl.where(gate > 0, 1.0, 0.0)
    elif ACTIVATION == "silu":
        share, rest = _sigmoid(gate)
        value = gate * share
        slope = share * (1.0 + gate * rest)
    elif ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        value = gate * share
        slope = share + gate * tl.exp(-0.5 * gate * gate) * 0.3989422804014327
    else:
        # (1 + tanh(z)) / 2 = sigmoid(2z)
        twice = 1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate)
        share, rest = _sigmoid(twice)
        value = gate * share
        twice_slope = 1.5957691216057308 * (1.0 + 0.134145 * gate * gate)
        slope = share + value * rest * twice_slope
    return value, slope


@triton.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    gate_pointer,
    up_pointer,
    vector_pointer,
    result_pointer,
    count,
    dim,
    HAS_VECTOR: tl.constexpr,  # noqa: N803
    ACTIVATION: tl.constexpr,  # noqa: N803
    WIDE: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    ROWS_AT_ONCE: tl.constexpr,  # noqa: N803
):
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    if HAS_VECTOR:
        vector = tl.load(vector_pointer + columns, mask=columns < dim).to(WIDE)
    for start in range(0, ROWS, ROWS_AT_ONCE):
        rows = tl.program_id(0) * ROWS + start + tl.arange(0, ROWS_AT_ONCE)[:, None]
        inside = (rows < count) & (columns < dim)
        # A tensor may have more values than 32 bits can count.
        at = rows.to(tl.int64) * dim + columns
        gate = tl.load(gate_pointer + at, mask=inside, other=0.0).to(WIDE)
        up = tl.load(up_pointer + at, mask=inside, other=0.0).to(WIDE)
        value, _ = _activate(gate, ACTIVATION)
        product = value * up
        if HAS_VECTOR:
            product *= vector
        tl.store(result_pointer + at, product.to(result_pointer.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _gradients(  # type: ignore[no-untyped-def]
    grad_pointer,
    gate_pointer,
    up_pointer,
    vector_pointer,
    of_gate_pointer,
    of_up_pointer,
    sums_pointer,
    count,
    dim,
    HAS_VECTOR: tl.constexpr,  # noqa: N803
    ACTIVATION: tl.constexpr,  # noqa: N803
    WIDE: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    ROWS_AT_ONCE: tl.constexpr,  # noqa: N803
    FOR_GATE: tl.constexpr,  # noqa: N803
    FOR_UP: tl.constexpr,  # noqa: N803
    FOR_VECTOR: tl.constexpr,  # noqa: N803
):
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    if HAS_VECTOR:
        vector = tl.load(vector_pointer + columns, mask=columns < dim).to(WIDE)
    total = tl.zeros((ROWS_AT_ONCE, COLUMNS), dtype=WIDE)
    for start in range(0, ROWS, ROWS_AT_ONCE):
        rows = tl.program_id(0) * ROWS + start + tl.arange(0, ROWS_AT_ONCE)[:, None]
        inside = (rows < count) & (columns < dim)
        at = rows.to(tl.int64) * dim + columns
        grad = tl.load(grad_pointer + at, mask=inside, other=0.0).to(WIDE)
        gate = tl.load(gate_pointer + at, mask=inside, other=0.0).to(WIDE)
        up = tl.load(up_pointer + at, mask=inside, other=0.0).to(WIDE)
        value, slope = _activate(gate, ACTIVATION)
        if FOR_VECTOR:
            total += grad * value * up
        if HAS_VECTOR:
            grad *= vector
        if FOR_UP:
            of_up = (grad * value).to(of_up_pointer.dtype.element_ty)
            tl.store(of_up_pointer + at, of_up, mask=inside)
        if FOR_GATE:
            of_gate = (grad * up * slope).to(of_gate_pointer.dtype.element_ty)
            tl.store(of_gate_pointer + at, of_gate, mask=inside)
    if FOR_VECTOR:
        sums = tl.sum(total, axis=0)[None, :]
        at = tl.program_id(0).to(tl.int64) * dim + columns
        tl.store(sums_pointer + at, sums, mask=columns < dim)
