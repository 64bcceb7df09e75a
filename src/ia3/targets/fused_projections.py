"""Fused projections: which values of their output are queries.

The order of queries, keys and values cannot be told from a projection's shape. It is known here for
classes of transformers; a class of the same name elsewhere may have another order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..core.names import Frozen
from ..errors import IA3Error

# Of an attention and the size of its fused output: how many equal groups the output consists of,
# and which values of each group are neither keys nor values.
Layout = Callable[[Any, int], tuple[int, Frozen]]


def fused_queries(attention: nn.Module, name: str, size: int) -> Frozen:
    """The ranges of a fused projection's output, of this size, that are neither keys nor values.

    Raises:
        IA3Error: the order of queries, keys and values is not known for the attention's class.
    """
    for kind in type(attention).__mro__:
        if kind.__name__ in _LAYOUTS and kind.__module__.startswith("transformers."):
            groups, ranges = _LAYOUTS[kind.__name__](attention, size)
            starts = range(0, size, size // groups)
            return tuple((at + start, at + end) for at in starts for start, end in ranges)
    raise IA3Error(
        f"{name!r} gives queries, keys and values at once, in an order that is not known for "
        f"{type(attention).__name__}: name what to rescale in target_modules"
    )


def _first_third(attention: Any, size: int) -> tuple[int, Frozen]:
    """All queries, then all keys, then all values (or values, then keys)."""
    return 1, ((0, size // 3),)


def _first(queries: Callable[[Any], int]) -> Layout:
    """All queries, then fewer keys and values."""
    return lambda attention, size: (1, ((0, queries(attention)),))


def _by_groups(groups: Callable[[Any], int]) -> Layout:
    """Groups, each a third queries first."""
    return lambda attention, size: (groups(attention), ((0, size // groups(attention) // 3),))


def _falcon(attention: Any, size: int) -> tuple[int, Frozen]:
    heads, head_dim = attention.num_heads, attention.head_dim
    if attention.new_decoder_architecture:
        return attention.num_kv_heads, ((0, heads // attention.num_kv_heads * head_dim),)
    return (1, ((0, heads * head_dim),)) if attention.multi_query else (heads, ((0, head_dim),))


def _gpt_bigcode(attention: Any, size: int) -> tuple[int, Frozen]:
    if attention.multi_query:
        return 1, ((0, attention.embed_dim),)
    return attention.num_heads, ((0, attention.head_dim),)


def _qwen3_next(attention: Any, size: int) -> tuple[int, Frozen]:
    """Groups of queries, keys, values and the output's gate."""
    queries = attention.head_k_dim
    values = attention.num_v_heads // attention.num_k_heads * attention.head_v_dim
    start = 2 * queries + values
    return attention.num_k_heads, ((0, queries), (start, start + values))


_LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(
        (
            "Attention", "BarkSelfAttention", "Blip2Attention", "BlipAttention",
            "CohereCompassVisionAttention", "DecisionTransformerGPT2Attention",
            "DeepseekOcr2SamVisionAttention", "Dots3NoteVisionAttention",
            "Ernie4_5_VLMoeVisionAttention", "Florence2VisionChannelAttention",
            "Florence2VisionWindowAttention", "GPT2Attention", "Glm4vMoeVisionAttention",
            "Glm4vVisionAttention", "Glm5NextVisionAttention", "GlmImageVisionAttention",
            "GlmOcrVisionAttention", "GotOcr2VisionAttention", "HieraMaskUnitAttention",
            "ImageGPTAttention", "InstructBlipAttention", "InstructBlipVideoAttention",
            "LayoutLMv2SelfAttention", "MgpstrAttention", "ModernBertAttention", "MptAttention",
            "PPFormulaNetVisionAttention", "PPOCRV5MobileRecAttention",
            "PPOCRV5ServerRecAttention", "PPOCRV6SmallRecAttention", "Qwen2_5_VLVisionAttention",
            "Qwen3OmniMoeVisionAttention", "Qwen3VLMoeVisionAttention", "Qwen3VLVisionAttention",
            "Qwen3_5MoeVisionAttention", "Qwen3_5VisionAttention", "Qwen4ExpVisionAttention",
            "SLANeXtVisionAttention", "Sam2MultiScaleAttention", "SamHQVisionAttention",
            "SamVisionAttention", "SegGptAttention", "TimesformerSelfAttention",
            "UnlimitedOcrSamVisionAttention", "VisionAttention", "VitDetAttention",
        ),
        _first_third,
    ),
    **dict.fromkeys(("BloomAttention", "PersimmonAttention"), _by_groups(lambda a: a.num_heads)),
    **dict.fromkeys(
        ("DisentangledSelfAttention", "GPTNeoXJapaneseAttention", "MiniMaxLightningAttention"),
        _by_groups(lambda a: a.num_attention_heads),
    ),
    "GPTNeoXAttention": _by_groups(lambda a: a.config.num_attention_heads),
    # Cut in four for the machines it was trained on.
    "CodeGenAttention": _by_groups(lambda a: 4),
    **dict.fromkeys(
        ("Phi3Attention", "Phi4MultimodalAttention"),
        _first(lambda a: a.config.num_attention_heads * a.head_dim),
    ),
    "DbrxAttention": _first(lambda a: a.num_heads * a.head_dim),
    "Exaone4_5_VisionAttention": _first(lambda a: a.q_dim),
    **dict.fromkeys(
        ("Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet", "Qwen4ExpTextGatedDeltaNet"),
        _first(lambda a: a.key_dim),
    ),
    "Qwen3NextGatedDeltaNet": _qwen3_next,
    "FalconAttention": _falcon,
    "GPTBigCodeAttention": _gpt_bigcode,
}  # fmt: skip
