"""How 77 choices are scored at once: a prompt and all its choices in one sequence.

A decoder-only model gets rows of token ids `[rows, length]`: a prompt, its choices one after the
other, then the next example. Each token has the position (`position_ids`, `[rows, length]`) that it
would have in a sequence of its prompt and its choice alone, and a tree mask
`[rows, 1, length, length]` lets it see nothing but these, so that its hidden state is the same as
there. What several choices begin with stands in a row once, as does what all prompts begin with; a
choice's last token predicts nothing and is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from ...base.loading import BaseModel
from ..prompts.encoding import EncodedExample
from .answer_tokens import (
    AnswerTokens,
    Routing,
    TokenScores,
    answer_scores,
    compute_dtype,
    pad_token,
    routed,
)

# A batch of up to `ONE_ROW` tokens is one row. Longer rows would spend attention on what the mask
# hides; rows shorter than `PACKED_LENGTH` leave more padding at their ends.
ONE_ROW = 384
PACKED_LENGTH = 192


def shared_scores(
    base: BaseModel,
    examples: Sequence[EncodedExample],
    *,
    hide_others: bool = True,
    routing: Routing | None = None,
) -> TokenScores:
    """Score every prompt once with all its choices; what all prompts begin with, once a row.

    `hide_others=False` gives the scores of a model that ignores the tree mask. With `routing` no
    beginning is shared: it may be another one with another adapter.
    """
    packed = packed_rows(base, examples, common_prefix(examples) if routing is None else ())
    inputs = tree_inputs(base, packed.rows, hide_others=hide_others)
    with routed(routing, packed.example_of):
        return answer_scores(base, examples, packed.answers, inputs)


# From the lengths of examples, and of what they share, to the indices of those of each row.
Pack = Callable[[Sequence[int], int], list[list[int]]]


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Examples in rows of one length, behind what `shared` first tokens of all prompts are.

    `example_of` has an index for each token, `[rows, length]`. `after` has for each example the
    places, in the flattened batch, of its choices' beginnings; that of none is its prompt's last
    token.
    """

    rows: list[TreeRow]
    example_of: Tensor
    answers: AnswerTokens
    shared: int
    after: list[dict[tuple[int, ...], int]]

    def of_prompt(self, index: int, length: int) -> list[int]:
        """The places, in the flattened batch, of the tokens of an example's prompt."""
        last = self.after[index][()]
        start = last - last % self.example_of.shape[1]
        return [
            *range(start, start + self.shared),
            *range(last + 1 - length + self.shared, last + 1),
        ]


def packed_rows(
    base: BaseModel,
    examples: Sequence[EncodedExample],
    prefix: tuple[int, ...],
    pack: Pack | None = None,
) -> PackedRows:
    """The examples in rows, behind a `prefix` of all prompts that stands once in each row."""
    lengths = [tree_length(e) - len(prefix) for e in examples]
    members_of_rows = (pack or _packed)(lengths, len(prefix))
    length = len(prefix) + max(sum(lengths[i] for i in members) for members in members_of_rows)
    answers = AnswerTokens()
    rows, example_of = [], []
    after: list[dict[tuple[int, ...], int]] = [{}] * len(examples)
    for r, members in enumerate(members_of_rows):
        row, of_row = TreeRow(r * length, prefix), [members[0]] * length
        for i in members:
            start = len(row.ids)
            after[i] = row.append(i, examples[i], len(prefix), answers)
            of_row[start : len(row.ids)] = [i] * lengths[i]
        # At position 0 no other token sees it.
        padding = length - len(row.ids)
        row.ids += [pad_token(base)] * padding
        row.positions += [0] * padding
        rows.append(row)
        example_of.append(of_row)
    return PackedRows(rows, torch.tensor(example_of), answers, len(prefix), after)


def packed_tokens(examples: Sequence[EncodedExample], prefix: tuple[int, ...]) -> int:
    """How many tokens the rows of `packed_rows` have, with padding."""
    lengths = [tree_length(e) - len(prefix) for e in examples]
    sums = [sum(lengths[i] for i in members) for members in _packed(lengths, len(prefix))]
    return len(sums) * (len(prefix) + max(sums))


class TreeRow:
    """Examples whose choices branch off from their prompts, depth first, behind a `prefix`.

    `positions` are those of each token in a row of its own; the row begins at `start` in the
    flattened batch.
    """

    def __init__(self, start: int = 0, prefix: Sequence[int] = ()) -> None:
        self.ids = list(prefix)
        self.positions = list(range(len(prefix)))
        self._start = start

    def append(
        self, index: int, example: EncodedExample, shared: int, answers: AnswerTokens
    ) -> dict[tuple[int, ...], int]:
        """Add an example without the first `shared` tokens of its prompt, which stand elsewhere.

        What each beginning of a choice is last at, in the flattened batch.
        """
        self._extend(example.prompt[shared:], shared)
        predicts: dict[tuple[int, ...], int] = {(): self._last}
        for beginning in _beginnings(example.choices):
            self._extend(beginning[-1:], len(example.prompt) + len(beginning) - 1)
            predicts[beginning] = self._last
        for c, choice in enumerate(example.choices):
            for t, token in enumerate(choice):
                answers.add(predicts[choice[:t]], token, (index, c, t))
        return predicts

    def ends(self) -> list[int]:
        """Up to which place each token is seen: until a token of its position or a lower one."""
        ends = [len(self.ids)] * len(self.ids)
        path: list[int] = []
        for place, position in enumerate(self.positions):
            while path and self.positions[path[-1]] >= position:
                ends[path.pop()] = place
            path.append(place)
        return ends

    @property
    def _last(self) -> int:
        return self._start + len(self.ids) - 1

    def _extend(self, ids: Sequence[int], position: int) -> None:
        self.ids += ids
        self.positions += range(position, position + len(ids))


def tree_length(example: EncodedExample) -> int:
    """How many tokens an example has in a row of its own."""
    return len(example.prompt) + len(_beginnings(example.choices))


def _beginnings(choices: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """What choices begin with, less their last tokens: each once, before its continuations."""
    return sorted({choice[:t] for choice in choices for t in range(1, len(choice))})


def tree_inputs(
    base: BaseModel, rows: Sequence[TreeRow], *, hide_others: bool = True
) -> dict[str, Tensor]:
    """The model's arguments for rows of one length; `hide_others` as in `shared_scores`."""
    of_rows = [row.ends() if hide_others else [len(row.ids)] * len(row.ids) for row in rows]
    ends = torch.tensor(of_rows, device=base.device)
    places = torch.arange(ends.shape[1], device=ends.device)
    sees = (places[:, None] >= places) & (places[:, None] < ends[:, None, :])
    # Additive: 0 where a token sees, else the minimum.
    dtype = compute_dtype(base.model)
    mask = torch.zeros(sees.shape, dtype=dtype, device=ends.device)
    mask = mask.masked_fill(~sees, torch.finfo(dtype).min)[:, None]
    return {
        "input_ids": torch.tensor([row.ids for row in rows], device=base.device),
        "attention_mask": mask,
        "position_ids": torch.tensor([row.positions for row in rows], device=base.device),
    }


def common_prefix(examples: Sequence[EncodedExample]) -> tuple[int, ...]:
    """What all prompts begin with, less the last token of the shortest, which predicts answers."""
    first = min(e.prompt for e in examples)
    last = max(e.prompt for e in examples)
    limit = min(len(e.prompt) for e in examples) - 1
    # What the least and the greatest sequence share, every sequence between them shares.
    pairs = zip(first, last, strict=False)
    return tuple(a for a, _ in takewhile(lambda ab: ab[0] == ab[1], pairs))[:limit]


def _packed(lengths: Sequence[int], shared: int) -> list[list[int]]:
    """Indices of the examples in each row, first-fit decreasing; `shared` tokens come on top."""
    if shared + sum(lengths) <= ONE_ROW:
        return [list(range(len(lengths)))]
    # Where much is shared, every row computes it again: fewer and longer rows then.
    capacity = max(PACKED_LENGTH + 2 * shared, *lengths)
    rows: list[list[int]] = []
    free: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, room in enumerate(free) if room >= lengths[i]), None)
        if row is None:
            rows.append([])
            free.append(capacity)
            row = len(rows) - 1
        rows[row].append(i)
        free[row] -= lengths[i]
    return rows
