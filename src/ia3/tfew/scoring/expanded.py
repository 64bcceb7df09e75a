"""Every choice in a row of its own: the layout that any language model takes.

A decoder-only model gets the prompt again in each row; an encoder-decoder encodes it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...base.loading import BaseModel
from ..prompts.encoding import EncodedExample
from .answer_tokens import AnswerTokens, answer_scores, compute_dtype, padded
from .token_scores import TokenScores


def expanded_scores(base: BaseModel, examples: Sequence[EncodedExample]) -> TokenScores:
    """Score every choice in a row of its own, behind its prompt."""
    ids, mask, answers, _ = _rows(base, examples, [e.prompt for e in examples])
    inputs = {"input_ids": ids, "attention_mask": mask}
    return answer_scores(base, examples, answers, inputs)


def encoder_decoder_scores(base: BaseModel, examples: Sequence[EncodedExample]) -> TokenScores:
    """Encode every prompt once, and decode every choice in a row of its own."""
    prompts, prompt_mask = padded(base, [e.prompt for e in examples])
    encoded = _encoded(base, prompts, prompt_mask)
    ids, mask, answers, example_of = _decoder_rows(base, examples)
    inputs = {
        "encoder_outputs": (encoded[example_of],),
        "attention_mask": prompt_mask[example_of],
        "decoder_input_ids": ids,
        "decoder_attention_mask": mask,
    }
    return answer_scores(base, examples, answers, inputs)


def shared_keys_scores(base: BaseModel, examples: Sequence[EncodedExample]) -> TokenScores:
    """`encoder_decoder_scores`, with the keys and values of each prompt computed once."""
    from transformers import DynamicCache, EncoderDecoderCache

    prompts, prompt_mask = padded(base, [e.prompt for e in examples])
    encoded = _encoded(base, prompts, prompt_mask)
    ids, mask, answers, example_of = _decoder_rows(base, examples)
    # Of four dimensions: the model would make a mask with one row for each prompt.
    dtype = compute_dtype(base.model)
    additive = (1 - prompt_mask[:, None, None]).to(dtype) * torch.finfo(dtype).min
    inputs = {
        "encoder_outputs": (encoded,),
        "attention_mask": additive[example_of],
        "decoder_input_ids": ids,
        "decoder_attention_mask": mask,
    }

    def new_cache() -> Any:
        return EncoderDecoderCache(DynamicCache(), _repeating_cache(example_of))

    return answer_scores(base, examples, answers, inputs, new_cache)


def _encoded(base: BaseModel, prompts: Tensor, mask: Tensor) -> Tensor:
    """`[batch, length, dim]`."""
    model: Any = base.model
    encoded: Tensor = model.get_encoder()(input_ids=prompts, attention_mask=mask)[0]
    return encoded


def _decoder_rows(
    base: BaseModel, examples: Sequence[EncodedExample]
) -> tuple[Tensor, Tensor, AnswerTokens, Tensor]:
    model: Any = base.model
    start = int(model.config.decoder_start_token_id)
    return _rows(base, examples, [(start,)] * len(examples))


def _rows(
    base: BaseModel, examples: Sequence[EncodedExample], before: Sequence[tuple[int, ...]]
) -> tuple[Tensor, Tensor, AnswerTokens, Tensor]:
    """A row for each choice, behind what stands before it.

    Args:
        base: the model.
        examples: `[batch]`.
        before: the tokens before the choices of each example, `[batch]`.

    Returns:
        Token ids and mask `[rows, length]`, the answers, and each row's example `[rows]`.
    """
    rows = [(i, c, choice) for i, e in enumerate(examples) for c, choice in enumerate(e.choices)]
    ids, mask = padded(base, [(*before[i], *choice[:-1]) for i, _, choice in rows])
    answers = AnswerTokens()
    for row, (i, c, choice) in enumerate(rows):
        first = row * ids.shape[1] + len(before[i]) - 1
        for t, token in enumerate(choice):
            answers.add(first + t, token, (i, c, t))
    return ids, mask, answers, torch.tensor([i for i, _, _ in rows], device=base.device)


def _repeating_cache(example_of: Tensor) -> Any:
    """A cache that stores nothing: it repeats each example's keys and values for its choices."""
    from transformers import DynamicCache

    class Repeating(DynamicCache):  # type: ignore[misc]
        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            rows = example_of.to(key_states.device)
            return key_states[rows], value_states[rows]

    return Repeating()
