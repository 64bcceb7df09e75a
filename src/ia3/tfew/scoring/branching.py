"""Prompts that many adapters share: computed once below the lowest block that one of them touches.

The same tokens stand in two layouts. Below, equal prompts stand once, with the choices of all that
ask them; above, each example has its prompt and its choices. A hook on the lowest touched block
hands it, for each token above, that token's hidden state from below. This block and those after it
get the mask and the positions of the layout above.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...base.loading import BaseModel
from ..prompts.encoding import EncodedExample
from .answer_tokens import Routing, TokenScores, answer_scores, routed
from .expanded import expanded_scores
from .probe import proves_equal
from .shared_prompt import (
    ONE_ROW,
    Pack,
    PackedRows,
    common_prefix,
    packed_rows,
    packed_tokens,
    shared_scores,
    tree_inputs,
    tree_length,
)

# Where more of the tokens stand below, what is saved is not worth the two layouts.
MOST_BELOW = 0.8


def branching_scores(
    base: BaseModel,
    examples: Sequence[EncodedExample],
    *,
    touched: Sequence[nn.Module],
    routing: Routing | None = None,
    pack: Pack | None = None,
) -> TokenScores:
    """`shared_scores`, without gradients, where the `routing` touches nothing but these blocks.

    They are the model's uppermost ones, in its order; it is one that `branches` at them.
    """
    different, which = _different(examples)
    below = packed_rows(base, different, common_prefix(different), pack)
    above = packed_rows(base, examples, (), pack)
    if below.example_of.shape == above.example_of.shape:
        # It could not be told which layout a tensor is of.
        return shared_scores(base, examples, routing=routing)
    inputs = tree_inputs(base, below.rows)
    mask = tree_inputs(base, above.rows)["attention_mask"]
    moved = _Moved(inputs["attention_mask"], mask, _sources(examples, which, below, above))
    first = torch.tensor([which.index(place) for place in range(len(different))])
    # Below, no adapter multiplies: nor one that is active.
    with routed(routing, first[below.example_of]), ExitStack() as hooks, ExitStack() as route:

        def branch(_: nn.Module, args: Any, kwargs: Any) -> Any:
            route.enter_context(routed(routing, above.example_of))
            return moved(args), moved(kwargs)

        def follow(_: nn.Module, args: Any, kwargs: Any) -> Any:
            return (*args[:1], *moved(args[1:])), moved(kwargs)

        for block in touched:
            hook = branch if block is touched[0] else follow
            hooks.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
        leave = touched[-1].register_forward_hook(lambda *_: route.close(), always_call=True)
        hooks.callback(leave.remove)
        return answer_scores(base, examples, above.answers, inputs)


class _Moved:
    """What a block is given, as the layout above has it.

    Tensors of the rows below, `[rows, length, ...]`, are gathered by their tokens; the mask is
    another one. All else stays.
    """

    def __init__(self, mask_below: Tensor, mask: Tensor, source: Tensor) -> None:
        self._below = mask_below.shape
        self._mask, self._source = mask, source
        # Each tensor that came, and what it became: blocks get the same ones.
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, given: Any) -> Any:
        if isinstance(given, Tensor):
            if id(given) not in self._known:
                self._known[id(given)] = given, self._move(given)
            return self._known[id(given)][1]
        if type(given) in (tuple, list):
            return type(given)(map(self, given))
        if type(given) is dict:
            return {name: self(value) for name, value in given.items()}
        return given

    def _move(self, given: Tensor) -> Tensor:
        rows, _, length, _ = self._below
        if given.shape == self._below:
            return self._mask.to(given.device, given.dtype)
        if given.shape[:2] != (rows, length):
            return given
        source = self._source.to(given.device)
        tokens = given.flatten(0, 1).index_select(0, source.flatten())
        return tokens.reshape(*source.shape, *given.shape[2:])


def _different(examples: Sequence[EncodedExample]) -> tuple[list[EncodedExample], list[int]]:
    """Each prompt with the choices of examples that have it; and which one is each example's.

    A prompt stands again where its row would be longer than `ONE_ROW`, of which most is masked.
    """
    different: list[EncodedExample] = []
    which: list[int] = []
    latest: dict[tuple[int, ...], int] = {}
    for example in examples:
        place = latest.get(example.prompt)
        if place is not None:
            choices = dict.fromkeys((*different[place].choices, *example.choices))
            both = EncodedExample(example.prompt, tuple(choices))
            if tree_length(both) <= ONE_ROW or len(both.choices) == len(different[place].choices):
                different[place] = both
            else:
                place = None
        if place is None:
            place = latest[example.prompt] = len(different)
            different.append(example)
        which.append(place)
    return different, which


def _sources(
    examples: Sequence[EncodedExample], which: Sequence[int], below: PackedRows, above: PackedRows
) -> Tensor:
    """For each token above its place in the flattened rows below, `[rows, length]`."""
    # Padding above may be anything.
    source = torch.zeros(above.example_of.numel(), dtype=torch.int64)
    for i, example in enumerate(examples):
        length, place_of = len(example.prompt), below.after[which[i]]
        here = [*above.of_prompt(i, length), *above.after[i].values()]
        there = [*below.of_prompt(which[i], length), *(place_of[b] for b in above.after[i])]
        source[torch.tensor(here)] = torch.tensor(there)
    return source.reshape(above.example_of.shape)


def saves(examples: Sequence[EncodedExample]) -> bool:
    """Whether enough of the tokens stand once below."""
    different, _ = _different(examples)
    below = packed_tokens(different, common_prefix(different))
    return below <= MOST_BELOW * packed_tokens(examples, ())


def branches(base: BaseModel, touched: Sequence[nn.Module]) -> bool:
    """Whether the model scores the same where its blocks up to these compute equal prompts once."""
    faster = partial(_tried_out, touched=touched)
    return proves_equal(base, faster, expanded_scores, key=(branching_scores, len(touched)))


def _tried_out(
    base: BaseModel, examples: Sequence[EncodedExample], *, touched: Sequence[nn.Module]
) -> TokenScores:
    """Each example twice: of one the first scores count, of the others the second.

    Below, each has a row of its own; above, all have one, and have another again. Neither the
    number of tokens nor that of a row is the same.
    """
    twice, count = [*examples, *examples], len(examples)

    def pack(lengths: Sequence[int], _: int) -> list[list[int]]:
        if len(lengths) == count:
            return [[i] for i in range(count)]
        return [[*range(count)], [*range(count, 2 * count)]]

    found = branching_scores(base, twice, touched=touched, pack=pack)
    rows = [0, *range(count + 1, 2 * count)]
    return TokenScores(found.log_probs[rows], found.mask[rows])
