"""What enters the lowest block that is trained, computed once an example.

Few-shot training passes the same few examples again and again. Below the lowest block with anything
to train nothing changes between the steps, so that what enters that block is the same each time: it
is computed before the first step, and all passes begin there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ...base.loading import BaseModel
from ...targets.structure import block_lists
from ..prompts.encoding import EncodedExample
from .choices import longest_sequence, longest_shared
from .shared_prompt import (
    ONE_ROW,
    PROBE_TOLERANCE,
    Targets,
    TreeRow,
    compute_dtype,
    evaluating,
    output_layer,
    project_only,
    shared_scores,
    tree_inputs,
    tree_length,
)

# What is kept takes at most as many bytes as this share of the model's weights.
SHARE_OF_MODEL = 1.0
# In float32 rounding alone lies between scores with and without what is kept.
FLOAT32_TOLERANCE = 1e-4


class KeptStates:
    """The hidden states that enter a block, of examples that come again.

    They are computed before the first step, whatever will be drawn: a run that goes on from a
    checkpoint has the same bits.

    Args:
        base: the model; nothing of it below `blocks[lowest]` changes while states are kept.
        blocks: all of its blocks, in the order in which they are computed.
        lowest: the index of the block, above 0.
    """

    def __init__(self, base: BaseModel, blocks: Sequence[nn.Module], lowest: int) -> None:
        self._base = base
        self._blocks = list(blocks)
        self._lowest = lowest
        # Of each block, how many values it returns in a tuple; 0 where it returns a tensor.
        self._returned = [0] * len(blocks)
        # `[own row's length, dim]`
        self._states: dict[EncodedExample, Tensor] = {}

    def __contains__(self, example: EncodedExample) -> bool:
        """Whether the states of this example are kept."""
        return example in self._states

    @property
    def bytes(self) -> int:
        """The memory that the states take."""
        return sum(states.numel() * states.element_size() for states in self._states.values())

    @contextmanager
    def instead_of_lower_blocks(
        self, rows: Sequence[TreeRow], examples: Sequence[EncodedExample]
    ) -> Iterator[None]:
        """Within the context the model computes nothing below the block for these rows.

        Args:
            rows: all that the model is called with, of one length.
            examples: that the rows are of, each one of those that are kept.
        """
        states = self._packed(rows, examples)

        def kept(hidden: Tensor) -> Tensor:
            # Reentrant gradient checkpointing gives no gradients behind an input without.
            return states.requires_grad_(hidden.requires_grad)

        below = range(self._lowest)
        steps = {i: kept if i == self._lowest - 1 else _untouched for i in below}
        with self._replaced(steps):
            yield

    def _packed(self, rows: Sequence[TreeRow], examples: Sequence[EncodedExample]) -> Tensor:
        """`[rows, length, dim]`: of what the prompts share, each example's rest, and padding."""
        packed = []
        for row in rows:
            own = [self._states[examples[i]] for i in row.members]
            # An example's part of a row is its own row less what is shared, in the same order.
            packed.append(torch.cat([own[0][: row.shared], *(s[row.shared :] for s in own)]))
        return pad_sequence(packed, batch_first=True)

    def _computed(self, examples: Sequence[EncodedExample]) -> list[Tensor]:
        """The states of examples that are put into one row, `[own row's length, dim]` of each."""
        row = TreeRow(0)
        ends = []
        for i, example in enumerate(examples):
            row.append(i, example, 0, Targets())
            ends.append(len(row.ids))
        entered: list[Tensor] = []

        def entering(hidden: Tensor) -> Tensor:
            entered.append(hidden)
            return hidden

        base = self._base
        from_lowest = range(self._lowest, len(self._blocks))
        steps = {i: entering if i == self._lowest else _untouched for i in from_lowest}
        first = torch.tensor([0], device=base.device)
        with evaluating(base.model), project_only(base.model, first), self._replaced(steps):
            base.model(**tree_inputs(base, [row]), use_cache=False)
        (hidden,) = entered
        return list(hidden[0].clone().tensor_split(ends[:-1]))

    @contextmanager
    def _replaced(self, steps: Mapping[int, Callable[[Tensor], Tensor]]) -> Iterator[None]:
        """Within the context these blocks do this to the hidden states instead."""
        before = {i: vars(self._blocks[i]).get("forward") for i in steps}
        for i, step in steps.items():
            vars(self._blocks[i])["forward"] = partial(_as_block, step, self._returned[i])
        try:
            yield
        finally:
            for i, forward in before.items():
                if forward is None:
                    del vars(self._blocks[i])["forward"]
                else:
                    vars(self._blocks[i])["forward"] = forward

    def _proves_equal(self) -> bool:
        """Whether the model scores the same with and without what is kept, in its present mode.

        Tried out with states in the wrong order too, for scale.
        """
        base = self._base
        vocabulary = int(output_layer(base.model).get_parameter("weight").shape[0])
        ids = [(17 + 7919 * i) % vocabulary for i in range(16)]
        examples = [
            EncodedExample(tuple(ids[:6]), (tuple(ids[6:9]), tuple(ids[9:11]))),
            EncodedExample((*ids[:2], *ids[11:13]), ((ids[13],), tuple(ids[14:16]))),
        ]
        handles = [
            block.register_forward_hook(partial(self._note_returned, i))
            for i, block in enumerate(self._blocks)
        ]
        with torch.no_grad(), torch.random.fork_rng():
            try:
                whole = shared_scores(base, examples).log_probs
            finally:
                for handle in handles:
                    handle.remove()
            try:
                self._states = dict(zip(examples, self._computed(examples), strict=True))
                kept = shared_scores(base, examples, kept=self).log_probs
                self._states = {e: states.flip(0) for e, states in self._states.items()}
                wrong = shared_scores(base, examples, kept=self).log_probs
            except Exception:
                # Blocks that take or give more than hidden states fail in as many ways.
                return False
            finally:
                self._states = {}
        error, scale = (kept - whole).abs().max(), (wrong - whole).abs().max()
        narrow = compute_dtype(base.model) != torch.float32 or torch.is_autocast_enabled(
            base.device.type
        )
        tolerance = PROBE_TOLERANCE if narrow else FLOAT32_TOLERANCE
        return bool(scale > 0 and error <= tolerance * scale)

    def _note_returned(self, index: int, module: nn.Module, args: Any, output: Any) -> None:
        self._returned[index] = 0 if isinstance(output, Tensor) else len(output)

    def _keep(self, examples: Iterable[EncodedExample]) -> None:
        """Compute the states of these examples, the first ones that fit into the memory given."""
        left = SHARE_OF_MODEL * sum(
            p.numel() * p.element_size() for p in self._base.model.parameters()
        )
        for row in _rows(examples):
            states = self._computed(row)
            left -= sum(each.numel() * each.element_size() for each in states)
            if left < 0:
                return
            self._states.update(zip(row, states, strict=True))


def kept_states(
    base: BaseModel, examples: Iterable[EncodedExample], draws: int
) -> KeptStates | None:
    """What enters the lowest block that is trained, if anything is gained by keeping it.

    Args:
        base: the model, in the mode and with the adapters that it will be trained with.
        examples: that will be drawn.
        draws: how many will be drawn, each as often as it happens.

    Returns:
        `None` where the model would not compute the same, or not less: it does not share prompts,
        has dropout, trains its first block or something outside its blocks, fails when it is tried
        out, or the draws are no more than the examples. Otherwise the states of those examples that
        fit into the memory given.
    """
    limit = longest_shared(base)
    if limit == 0 or _has_dropout(base.model):
        return None
    short = [e for e in dict.fromkeys(examples) if longest_sequence(e) <= limit]
    found = _lowest_trained(base.model)
    if found is None or len(short) >= draws:
        return None
    states = KeptStates(base, *found)
    if not states._proves_equal():
        return None
    states._keep(short)
    return states


def _lowest_trained(model: nn.Module) -> tuple[list[nn.Module], int] | None:
    """The blocks that hold all that is trained, and the index, above 0, of the first that does."""
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    for name, blocks in block_lists(model).items():
        start = f"{name}."
        if trained and all(parameter.startswith(start) for parameter in trained):
            lowest = min(int(p.removeprefix(start).partition(".")[0]) for p in trained)
            return ([*blocks], lowest) if lowest > 0 else None
    return None


def _has_dropout(model: nn.Module) -> bool:
    """Whether something may be dropped in training: by a module, or by a rate that one holds."""
    return any(
        isinstance(value, float) and value > 0
        for module in model.modules()
        for name, value in vars(module).items()
        if "drop" in name or (name == "p" and "Dropout" in type(module).__name__)
    )


def _rows(examples: Iterable[EncodedExample]) -> Iterator[list[EncodedExample]]:
    """The examples in groups, in their order, that have at most `ONE_ROW` tokens or are alone."""
    row: list[EncodedExample] = []
    length = 0
    for example in examples:
        own = tree_length(example)
        if row and length + own > ONE_ROW:
            yield row
            row, length = [], 0
        row.append(example)
        length += own
    if row:
        yield row


def _untouched(hidden: Tensor) -> Tensor:
    return hidden


def _as_block(
    step: Callable[[Tensor], Tensor], returned: int, *args: Any, **kwargs: Any
) -> Tensor | tuple[Tensor | None, ...]:
    """A step on the hidden states with the arguments of a block, and in the form of its result."""
    hidden = step(args[0] if args else kwargs["hidden_states"])
    return (hidden, *[None] * (returned - 1)) if returned else hidden
