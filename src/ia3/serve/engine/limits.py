"""Where a model's texts end, and how long they may be: by its config and its generation config."""

from __future__ import annotations

from typing import Any

from ...base.loading import BaseModel
from ...errors import IA3Error
from .bases import ServedBase
from .interface import Generation

# Options of a generation config that `generate` is not needed for.
PLAIN_OPTIONS = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("do_sample", "temperature", "top_p", "top_k", "max_length", "max_new_tokens"),
    *("repetition_penalty", "use_cache", "cache_implementation", "transformers_version"),
    *("output_attentions", "output_hidden_states", "output_scores", "return_dict_in_generate"),
}


def end_tokens(base: BaseModel) -> frozenset[int]:
    """The tokens that end a text, by the model's generation config."""
    config: Any = getattr(base.model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    if ends is None:
        ends = base.tokenizer.eos_token_id
    return frozenset(ends if isinstance(ends, list | tuple) else () if ends is None else (ends,))


def repetition_penalty(base: BaseModel) -> float:
    """What the scores of a row's own tokens are divided by; often 1."""
    config: Any = getattr(base.model, "generation_config", None)
    penalty = getattr(config, "repetition_penalty", None)
    return 1.0 if penalty is None else float(penalty)


def further_options(base: BaseModel) -> set[str]:
    """Options of the generation config that change the scores: only `generate` knows them."""
    config: Any = getattr(base.model, "generation_config", None)
    if config is None:
        return set()
    return {
        name
        for name, value in config.to_diff_dict().items()
        if not name.startswith("_") and value is not None and name not in PLAIN_OPTIONS
    }


def context_of(base: BaseModel) -> int | None:
    """How many tokens the model has positions for; `None` where there is no end."""
    config: Any = base.model.config
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return context if isinstance(context, int) and context > 0 else None


def most_tokens(base: BaseModel, asked: Generation) -> int:
    """How many tokens may be generated; none where the prompt is too long."""
    context = context_of(base)
    if context is None:
        return asked.max_tokens
    room = context - len(asked.prompt)
    if base.is_encoder_decoder and room >= 0:
        room = context - 1
    return min(asked.max_tokens, max(room, 0))


def check_fits(served: ServedBase, asked: Generation) -> int:
    """How many tokens may be generated, at least one.

    Raises:
        IA3Error: the prompt leaves no room in the model's context, or has tokens that the model has
            no embedding of.
    """
    base = served.base
    assert isinstance(base, BaseModel)
    base.check_tokens([asked.prompt])
    most = most_tokens(base, asked)
    if most < 1:
        raise IA3Error(
            f"the prompt has {len(asked.prompt):,} tokens, and the context of {served.name!r} is "
            f"{context_of(base):,}, of which one at least is for the answer: shorten the prompt"
        )
    return most
