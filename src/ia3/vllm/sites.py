"""The product in vLLM's layers: each token's activation times its adapter's vector.

A layer that may be rescaled has a table for its output and one for its input, a row a slot of
vLLM's and a last one of ones, which is the base model's. The layer's `forward` is replaced by one
that multiplies the input, calls vLLM's, and multiplies the output; LoRA's product is vLLM's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)

from ..errors import IA3Error
from .products import CPUProducts


class Rows:
    """Which row of the tables each token of a batch takes: a buffer that stays where it is.

    `eager` says that Python runs at every step, so that what changes nothing may be left out. What
    is compiled, or captured, does the same every time.
    """

    def __init__(self, slots: int, tokens: int, device: torch.device, eager: bool) -> None:
        self.base = slots
        self.device = device
        self.eager = eager
        self.of_tokens = torch.full((tokens,), slots, dtype=torch.long, device=device)
        # A graph is made before the first batch: what it leaves out then stays out.
        self.idle = eager
        # While texts are continued each step has the rows of the one before. What a site took for
        # so many tokens, where Python runs at every step; never larger than the site's table.
        self.taken: dict[tuple[Site, int], Tensor] | None = None

    def reset(self) -> None:
        """Have every token be the base model's."""
        self.of_tokens.fill_(self.base)
        self.taken = None

    def set(self, rows: Sequence[int]) -> None:
        """Each token's row, for the batch that comes; `base` for none of an adapter."""
        # What is padded behind them reads some row or other, and is thrown away.
        self.of_tokens[: len(rows)].copy_(torch.tensor(rows, dtype=torch.long))
        self.idle = self.eager and all(row == self.base for row in rows)
        self.taken = {} if self.eager and len(rows) <= self.base else None


class Site:
    """One side of a layer: its vectors, `[slots + 1, width]` in float32.

    Where a step is eager the table is not made before the first vector.
    """

    def __init__(self, width: int, rows: Rows) -> None:
        self.width = width
        self.rows = rows
        self.table: Tensor | None = None if rows.eager else self._ones()

    def _ones(self) -> Tensor:
        # What is made in inference mode, in which a step runs, could not be written to outside it.
        with torch.inference_mode(False):
            return torch.ones(self.rows.base + 1, self.width, device=self.rows.device)

    def set(self, slot: int, vector: Tensor | None) -> None:
        """The vector, `[width]`, of what is in a slot; `None` is ones."""
        self.rows.taken = None
        if self.table is None:
            if vector is None:
                return
            self.table = self._ones()
        if vector is None:
            self.table[slot] = 1
        else:
            self.table[slot].copy_(vector)

    def reset(self) -> None:
        """Have every slot be empty, and what the base model multiplies with be ones again."""
        self.rows.taken = None
        if self.table is not None:
            self.table.fill_(1)

    def factors(self, activation: Tensor) -> Tensor | None:
        """What to multiply an activation `[..., tokens, width]` with; `None` is with nothing."""
        if self.table is None or self.rows.idle:
            return None
        tokens, taken = activation.shape[-2], self.rows.taken
        if taken is None:
            return self._take(self.table, tokens)
        if (self, tokens) not in taken:
            taken[self, tokens] = self._take(self.table, tokens)
        return taken[self, tokens]

    def _take(self, table: Tensor, tokens: int) -> Tensor:
        # A third of the time that indexing takes.
        return table.index_select(0, self.rows.of_tokens[:tokens])

    def multiplied(self, activation: Tensor) -> Tensor:
        """A layer's input `[..., tokens, width]` times its factors; others hold it, so it stays."""
        factors = self.factors(activation)
        return activation if factors is None else (activation * factors).to(activation.dtype)

    def multiply_(self, activation: Tensor) -> None:
        """Multiply a layer's output `[..., tokens, width]` in place."""
        factors = self.factors(activation)
        if factors is not None:
            activation.mul_(factors)


@dataclass(frozen=True)
class Local:
    """The vectors of one layer that this process multiplies with, `[width]`; `None` is ones."""

    output: Tensor | None
    input: Tensor | None


class Layer:
    """A layer of vLLM's that takes LoRA, with the names that adapters have for its parts.

    Args:
        layer: with LoRA's tables, which are not touched.
        parts: what adapters call it: its own name, or those of the projections that it computes as
            one (`q_proj`, `k_proj` and `v_proj` for `qkv_proj`).
        rows: which row each token takes.
    """

    def __init__(self, layer: Any, parts: Sequence[str], rows: Rows) -> None:
        self.layer = layer
        self.base = base = layer.base_layer
        self.parts = parts
        split = layer.tp_size > 1
        columns, in_rows = (isinstance(base, c) for c in (ColumnParallelLinear, RowParallelLinear))
        # What the layer gets and gives is whole where it splits, sums or gathers itself.
        self.splits_output = split and columns and not base.gather_output
        self.splits_input = split and in_rows and base.input_is_parallel
        sizes = _sizes(base)
        self.sizes = sizes if len(parts) > 1 else [sum(sizes)]
        self.gathers_parts = split and columns and base.gather_output and len(sizes) > 1
        self.output_slices = list(layer.output_slices)
        width = sum(self.output_slices) if self.splits_output else sum(sizes)
        self.output = Site(width, rows)
        self.input = Site(layer.input_size if self.splits_input else base.input_size, rows)
        products = layer.punica_wrapper
        self._products = products if isinstance(products, CPUProducts) else None
        self._forward_with_lora = layer.forward
        layer.forward = self._forward

    def _forward(self, activation: Tensor, *others: Any) -> Any:
        # On CPUs a batch without LoRA rows is spared the Python around LoRA's product.
        forward = self.base if self._is_without_lora() else self._forward_with_lora
        output = forward(self.input.multiplied(activation), *others)
        self.output.multiply_(output[0] if isinstance(output, tuple) else output)
        return output

    def _is_without_lora(self) -> bool:
        return self._products is not None and self._products.no_lora

    def local(self, vectors: Mapping[str, Tensor]) -> Local:
        """This process's part of the `vectors`, by the name of the part; raises `IA3Error`."""
        inputs = {name: v for name, v in vectors.items() if v.shape[0] == 1 < v.shape[1]}
        outputs = {name: v for name, v in vectors.items() if name not in inputs}
        return Local(self._output(outputs), self._input(inputs))

    def put(self, slot: int, local: Local | None) -> None:
        """Have a slot's rows be these vectors; `None` is ones."""
        self.output.set(slot, local.output if local else None)
        self.input.set(slot, local.input if local else None)

    def reset(self) -> None:
        """Have every slot be empty."""
        self.output.reset()
        self.input.reset()

    def _output(self, vectors: Mapping[str, Tensor]) -> Tensor | None:
        if not vectors:
            return None
        first = next(iter(vectors))
        if len(self.sizes) != len(self.parts) or self.gathers_parts:
            raise IA3Error(f"{first!r} is computed by vLLM in a layer whose parts cannot be told")
        if self.base.skip_bias_add and self.base.bias is not None:
            raise IA3Error(
                f"{first!r} leaves adding its bias to another layer in vLLM: the vector on its "
                "output would not multiply it"
            )
        whole = [vectors.get(part) for part in self.parts]
        for part, vector, size in zip(self.parts, whole, self.sizes, strict=True):
            if vector is not None and len(vector) != size:
                raise _another_size(part, len(vector), size, "output")
        filled = [
            torch.ones(size, 1) if vector is None else vector
            for vector, size in zip(whole, self.sizes, strict=True)
        ]
        if not self.splits_output:
            return torch.cat(filled).flatten()
        # LoRA's B, whose rows are the layer's outputs, is split in the same way.
        parts = filled if len(filled) > 1 else list(torch.split(filled[0], _sizes(self.base)))
        alone = self.layer.n_slices == 1
        sliced = self.layer.slice_lora_b(torch.cat(parts) if alone else parts)
        return (sliced if alone else torch.cat(sliced)).flatten()

    def _input(self, vectors: Mapping[str, Tensor]) -> Tensor | None:
        if not vectors:
            return None
        (name, vector), *_ = vectors.items()
        if len(self.parts) > 1:
            raise IA3Error(
                f"the vector of {name!r} is on its input, which vLLM computes together with "
                f"{_all_but(name, self.parts)}: only vectors on their outputs can be served"
            )
        if vector.shape[1] != self.base.input_size:
            raise _another_size(name, vector.shape[1], self.base.input_size, "input")
        return (self.layer.slice_lora_a(vector) if self.splits_input else vector).flatten()


def _sizes(base: Any) -> list[int]:
    """The widths of what a layer computes side by side, over all processes."""
    if isinstance(base, QKVParallelLinear):
        keys = base.total_num_kv_heads
        return [
            base.total_num_heads * base.head_size,
            keys * base.head_size,
            keys * base.v_head_size,
        ]
    return [int(size) for size in getattr(base, "output_sizes", [base.output_size])]


def _another_size(name: str, found: int, expected: int, side: str) -> IA3Error:
    return IA3Error(
        f"the vector of {name!r} has {found} values, expected {expected}, the width of its {side}: "
        "the adapter is of another base model"
    )


def _all_but(name: str, parts: Sequence[str]) -> str:
    return " and ".join(repr(part.rpartition(".")[2]) for part in parts if part != name)
