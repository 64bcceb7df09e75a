"""Every choice in a row of its own: the layout that any language model takes.

A decoder-only model gets the prompt again in each row; an encoder-decoder encodes it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from ...base.loading import BaseModel
from ..prompts.encoding import EncodedExample
from .answer_tokens import (
    AnswerTokens,
    Routing,
    TokenScores,
    answer_scores,
    compute_dtype,
    padded,
    routed,
)


def expanded_scores(
    base: BaseModel, examples: Sequence[EncodedExample], *, routing: Routing | None = None
) -> TokenScores:
    """Score every choice in a row of its own, behind its prompt."""
    ids, mask, answers, example_of = _rows(base, examples, [e.prompt for e in examples])
    inputs = {"input_ids": ids, "attention_mask": mask}
    with routed(routing, example_of):
        return answer_scores(base, examples, answers, inputs)


def shared_keys_scores(base: BaseModel, examples: Sequence[EncodedExample]) -> TokenScores:
    """`encoder_decoder_scores`, with the keys and values of each prompt computed once."""
    return encoder_decoder_scores(base, examples, keys_once=True)


def encoder_decoder_scores(
    base: BaseModel,
    examples: Sequence[EncodedExample],
    *,
    keys_once: bool = False,
    routing: Routing | None = None,
) -> TokenScores:
    """Encode every prompt once, and decode every choice in a row of its own.

    With `keys_once` some rows are prompts and others choices, so that there is no `routing`.
    """
    model: Any = base.model
    prompts, seen = padded(base, [e.prompt for e in examples])
    with routed(routing, torch.arange(len(examples), device=base.device)):
        encoded = model.get_encoder()(input_ids=prompts, attention_mask=seen)[0]
    start = int(model.config.decoder_start_token_id)
    ids, mask, answers, example_of = _rows(base, examples, [(start,)] * len(examples))

    def new_cache() -> EncoderDecoderCache:
        return EncoderDecoderCache(DynamicCache(), _Repeating(example_of))

    if keys_once:
        # Of four dimensions: the model would make a mask with one row for each prompt.
        dtype = compute_dtype(base.model)
        seen = (1 - seen[:, None, None]).to(dtype) * torch.finfo(dtype).min
    inputs = {
        "encoder_outputs": (encoded if keys_once else encoded[example_of],),
        "attention_mask": seen[example_of],
        "decoder_input_ids": ids,
        "decoder_attention_mask": mask,
    }
    with routed(routing, example_of):
        return answer_scores(base, examples, answers, inputs, new_cache if keys_once else None)


def _rows(
    base: BaseModel, examples: Sequence[EncodedExample], before: Sequence[tuple[int, ...]]
) -> tuple[Tensor, Tensor, AnswerTokens, Tensor]:
    """A row a choice, behind `before`: ids and mask `[rows, length]`, answers, rows' examples."""
    rows = [(i, c, choice) for i, e in enumerate(examples) for c, choice in enumerate(e.choices)]
    ids, mask = padded(base, [(*before[i], *choice[:-1]) for i, _, choice in rows])
    answers = AnswerTokens()
    for row, (i, c, choice) in enumerate(rows):
        first = row * ids.shape[1] + len(before[i]) - 1
        for t, token in enumerate(choice):
            answers.add(first + t, token, (i, c, t))
    return ids, mask, answers, torch.tensor([i for i, _, _ in rows], device=base.device)


class _Repeating(DynamicCache):  # type: ignore[misc]
    """A cache that stores nothing: it repeats each example's keys and values for its choices."""

    def __init__(self, example_of: Tensor) -> None:
        super().__init__()
        self._example_of = example_of

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        rows = self._example_of.to(key_states.device)
        return key_states[rows], value_states[rows]
