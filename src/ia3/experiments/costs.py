"""What each method costs: floating-point operations and bytes, by the paper's accounting (4.2).

The accounting is a rule of thumb (Kaplan et al. 2020, arXiv 2001.08361): a forward pass multiplies
and adds once a parameter and token, a backward pass twice as much, and attention over the context
comes for nothing. In an encoder-decoder a token meets the encoder or the decoder, half of the
parameters. It compares methods and models; seconds have to be measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..core.experts import is_experts
from ..model.status import value_count
from ..tfew.prompts.encoding import EncodedExample

# A stored token is an integer of 4 bytes (table 1: 41 · 98 · 4 = 16 kB).
TOKEN_BYTES = 4


@dataclass(frozen=True)
class ModelSize:
    """What the accounting knows of a model."""

    parameters: float  # that a token may meet, N
    is_encoder_decoder: bool  # a token meets one half of them

    @property
    def forward_flops(self) -> float:
        """A token, forward: 2N; N in an encoder-decoder (section 4.2)."""
        return self.parameters * (1 if self.is_encoder_decoder else 2)

    @property
    def training_flops(self) -> float:
        """A token, forward and backward: 6N; 3N in an encoder-decoder (section 4.2)."""
        return 3 * self.forward_flops


@dataclass(frozen=True)
class Cost:
    """A row of the paper's table 1: floating-point operations, and bytes beside the model."""

    flops_an_answer: float  # to rank the choices for one text
    flops_before: float  # before the first answer: training, or demonstrations computed once
    stored_bytes: int


def model_size(model: nn.Module) -> ModelSize:
    """A loaded model's size.

    Shared parameters count once, 4-bit ones with all the values they hold. Of experts held as 3-D
    parameters those are counted that a token is sent to.
    """
    config: Any = getattr(model, "config", None)
    total = float(sum(value_count(parameter) for parameter in model.parameters()))
    for module in model.modules():
        if is_experts(module):
            weights = [p for p in module.parameters() if p.dim() == 3]
            share = _experts_a_token(config) / weights[0].shape[0]
            total -= (1 - min(1.0, share)) * sum(p.numel() for p in weights)
    return ModelSize(total, bool(getattr(config, "is_encoder_decoder", False)))


def answer_tokens(examples: Sequence[EncodedExample]) -> float:
    """The mean number of tokens of a prompt with all its choices (103 in section 4.2).

    The prompt counts once, as it is computed once.
    """
    return sum(len(e.prompt) + sum(map(len, e.choices)) for e in examples) / len(examples)


def zero_shot_cost(size: ModelSize, tokens: float) -> Cost:
    """An untuned model: one forward pass over a text with all choices."""
    return Cost(size.forward_flops * tokens, 0.0, 0)


def tfew_cost(
    size: ModelSize, tokens: float, *, steps: int = 1000, batch_size: float = 8, stored_bytes: int
) -> Cost:
    """T-Few: an answer is one forward pass; training is steps · batch · tokens · 6N, or 3N.

    `tokens` are those of a text with all choices. The vectors are too few to count (section 4.2).
    """
    training = size.training_flops * tokens * steps * batch_size
    return Cost(size.forward_flops * tokens, training, stored_bytes)


def in_context_cost(
    size: ModelSize, tokens: float, shown: float, *, members: int = 1, cached: bool = False
) -> Cost:
    """In-context learning: an answer is a forward pass over demonstrations and text.

    Args:
        size: of the model.
        tokens: of a text with all choices.
        shown: tokens of all prompts' demonstrations together; these are stored.
        members: prompts that are averaged, each with the text in it. The paper counts an ensemble
            of one-shot prompts as one prompt with all demonstrations.
        cached: compute the demonstrations once, not for every answer as the paper counts.
    """
    demonstrations = size.forward_flops * shown
    text = size.forward_flops * tokens * members
    stored = round(TOKEN_BYTES * shown)
    if cached:
        return Cost(text, demonstrations, stored)
    return Cost(demonstrations + text, 0.0, stored)


def _experts_a_token(config: Any) -> float:
    text = config.get_text_config(decoder=True)
    for name in ("num_experts_per_tok", "moe_top_k", "top_k_experts", "moe_topk"):
        value = getattr(text, name, None)
        if isinstance(value, int):
            return float(value)
    return float("inf")
