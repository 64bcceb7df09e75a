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

# A program works on this many values of a row, and, backward, on this many rows: its share of the
# vector's gradient is one row of the partial sums.
COLUMNS = 256
ROWS = 64
# Values a program has in registers at a time.
ROWS_AT_ONCE = 4

_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def _activate(gate, ACTIVATION: tl.constexpr):  # noqa: N803
    """The activation's value and its derivative."""
    if ACTIVATION == "relu":
        # Written so that NaN stays NaN.
        value = tl.where(gate < 0, 0.0, gate)
        slope = tl.where(gate > 0, 1.0, 0.0)
    elif ACTIVATION == "silu":
        share = 1.0 / (1.0 + tl.exp(-gate))
        value = gate * share
        slope = share * (1.0 + gate * (1.0 - share))
    elif ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.math.erf(gate * 0.7071067811865476))
        value = gate * share
        slope = share + gate * tl.exp(-0.5 * gate * gate) * 0.3989422804014327
    else:
        # x · (1 + tanh(z)) / 2 = x · sigmoid(2z)
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        share = 1.0 / (1.0 + tl.exp(-inner))
        value = gate * share
        inner_slope = 1.5957691216057308 * (1.0 + 0.134145 * gate * gate)
        slope = share + gate * share * (1.0 - share) * inner_slope
    return value, slope


