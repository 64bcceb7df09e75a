"""Tiny random models of many architectures, built from their configs: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from transformers import PreTrainedModel

VOCABULARY = 64
WIDTH = 32
INNER = 48
HEAD = 8
POSITIONS = 32

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Architecture:
    """How to build a tiny model of one architecture, and what to feed it.

    Attributes:
        new: a model, its weights yet to be drawn.
        inputs: a batch, the same every time.
        modules: `target_modules` and `feedforward_modules` where PEFT has no working defaults.
        output: the field of the model's output to compare.
    """

    new: Callable[[], PreTrainedModel]
    inputs: Callable[[], Inputs]
    modules: dict[str, Any] = field(default_factory=dict)
    output: str = "logits"


def build(kind: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model in evaluation mode; the same bits every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ARCHITECTURES[kind].new()
        _draw(model)
    return model.to(dtype).eval()


def batch(kind: str, dtype: torch.dtype = torch.float32) -> Inputs:
    """Inputs for that kind of model; pictures and sound come in `dtype`."""
    inputs = ARCHITECTURES[kind].inputs()
    return {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in inputs.items()
    }


def output(kind: str, model: Any) -> Tensor:
    """What a model of that kind, adapted or not, computes for its batch: its logits."""
    dtype = next(p.dtype for name, p in model.named_parameters() if "ia3_l" not in name)
    result: Tensor = getattr(model(**batch(kind, dtype)), ARCHITECTURES[kind].output)
    return result


def _draw(model: nn.Module) -> None:
    # Models of this width with the usual deviation of 0.02 attend evenly to everything: the
    # gradients of queries and keys would be rounding and nothing else. Much larger ones amplify
    # bfloat16's rounding.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.7 * parameter[0].numel() ** -0.5)
                if name.endswith("Attention.q.weight"):  # T5 does not divide its scores
                    parameter.mul_(HEAD**-0.5)
            elif parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


# -- inputs ----------------------------------------------------------------------------------------


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _ids(*shape: int) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=_generator())


def _text() -> Inputs:
    ids, mask = _ids(3, 7), torch.ones(3, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _text_to_text() -> Inputs:
    return {**_text(), "decoder_input_ids": _ids(3, 5)}


def _numbers(*shape: int) -> Tensor:
    # Exact in bfloat16, so that models of both dtypes are fed the same.
    return torch.randn(shape, generator=_generator()).bfloat16().float()


def _picture() -> Inputs:
    return {"pixel_values": _numbers(3, 3, 8, 8)}


def _text_and_picture() -> Inputs:
    return {**_text(), **_picture()}


def _sound() -> Inputs:
    return {"input_features": _numbers(3, 8, 2 * POSITIONS), "decoder_input_ids": _ids(3, 5)}


# -- models ----------------------------------------------------------------------------------------

# What most decoders and encoders call their sizes.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}
TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_VOCABULARY: dict[str, Any] = {"vocab_size": VOCABULARY, **TOKENS}
_GROUPED: dict[str, Any] = {**SIZES, **TOKENS, "num_key_value_heads": 2}
_GEMMA: dict[str, Any] = {**_GROUPED, "head_dim": HEAD}
_TOWER = {name: SIZES[name] for name in SIZES if name.startswith(("hidden", "inter", "num"))}
_VISION: dict[str, Any] = {**_TOWER, "image_size": 8, "patch_size": 4}
# fmt: off
_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": HEAD, "d_ff": INNER, "num_layers": 2,
    "num_heads": 4, "decoder_start_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
    "dropout_rate": 0.0,
}
_GPTJ: dict[str, Any] = {
    **_VOCABULARY, "n_positions": POSITIONS, "n_embd": WIDTH, "n_inner": INNER, "n_layer": 2,
    "n_head": 4,
}
_GPT2: dict[str, Any] = {**_GPTJ, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_BART: dict[str, Any] = {
    **_VOCABULARY, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
}
# fmt: on


def _new(
    name: str, head: str = "ForCausalLM", sizes: dict[str, Any] | None = None, **own: Any
) -> Callable[[], PreTrainedModel]:
    """Makes a class of transformers from its config; sizes by their usual names by default."""
    given = {**(sizes or {**SIZES, **TOKENS}), **own}
    model, config = (
        getattr(hf, name + head),
        getattr(hf, f"{name}Config".replace("Gemma3", "Gemma3Text")),
    )
    return lambda: model(config(**given))


def _clip() -> PreTrainedModel:
    towers = {"text_config": {**SIZES, **TOKENS}, "vision_config": _VISION}
    return hf.CLIPModel(hf.CLIPConfig(**towers, projection_dim=16))


_K_V_FC2 = {"target_modules": ["k_proj", "v_proj", "fc2"], "feedforward_modules": ["fc2"]}
_DEBERTA: dict[str, Any] = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
_TO_TEXT = "ForConditionalGeneration"
_SPEECH = {"max_source_positions": POSITIONS, "max_target_positions": POSITIONS}
_SPEECH |= {"num_mel_bins": 8, "decoder_start_token_id": 1}

# fmt: off
ARCHITECTURES: dict[str, Architecture] = {
    "t5": Architecture(_new("T5", _TO_TEXT, _T5), _text_to_text),
    "mt5": Architecture(_new("MT5", _TO_TEXT, _T5, feed_forward_proj="gated-gelu"), _text_to_text),
    "bart": Architecture(_new(
        "Bart", _TO_TEXT, _BART, max_position_embeddings=POSITIONS, decoder_start_token_id=2,
        forced_eos_token_id=None,
    ), _text_to_text),
    "whisper": Architecture(_new(
        "Whisper", _TO_TEXT, _BART, **_SPEECH, suppress_tokens=None, begin_suppress_tokens=None,
    ), _sound, _K_V_FC2),
    "gpt2": Architecture(_new("GPT2", "LMHeadModel", _GPT2), _text),
    "gpt_bigcode": Architecture(_new("GPTBigCode", sizes=_GPT2), _text),
    "gptj": Architecture(_new("GPTJ", sizes=_GPTJ, rotary_dim=4), _text),
    "gpt_neo": Architecture(_new(
        "GPTNeo", sizes=_VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER, num_layers=2,
        num_heads=4, attention_types=[[["global", "local"], 1]], window_size=4,
        max_position_embeddings=POSITIONS,
    ), _text),
    "gpt_neox": Architecture(_new("GPTNeoX"), _text),
    "llama": Architecture(_new("Llama", sizes=_GROUPED), _text),
    "mistral": Architecture(_new("Mistral", sizes=_GROUPED, sliding_window=4), _text),
    # PEFT's default for its feed-forward layers, w2, matches nothing.
    "mixtral": Architecture(
        _new("Mixtral", sizes=_GROUPED, num_local_experts=4),
        _text, {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []},
    ),
    "qwen2": Architecture(_new("Qwen2", sizes=_GROUPED), _text),
    "qwen3": Architecture(_new("Qwen3", sizes=_GEMMA), _text),
    "gemma": Architecture(_new("Gemma", sizes=_GEMMA), _text),
    "gemma2": Architecture(_new("Gemma2", sizes=_GEMMA, sliding_window=4), _text),
    "gemma3": Architecture(_new("Gemma3", sizes=_GEMMA, sliding_window=4), _text),
    "phi": Architecture(_new("Phi"), _text),
    "falcon": Architecture(_new(
        "Falcon", sizes=_VOCABULARY, hidden_size=WIDTH, ffn_hidden_size=INNER, num_hidden_layers=2,
        num_attention_heads=4,
    ), _text),
    "bloom": Architecture(
        _new("Bloom", sizes=_VOCABULARY, hidden_size=WIDTH, n_layer=2, n_head=4), _text
    ),
    "mpt": Architecture(
        _new("Mpt", sizes=_VOCABULARY, d_model=WIDTH, n_heads=4, n_layers=2, expansion_ratio=2,
             max_seq_len=POSITIONS),
        _text, {"target_modules": ["Wqkv", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "opt": Architecture(_new("OPT", word_embed_proj_dim=WIDTH, ffn_dim=INNER), _text),
    "bert": Architecture(_new("Bert", "ForMaskedLM"), _text),
    "roberta": Architecture(_new("Roberta", "ForMaskedLM"), _text),
    "deberta": Architecture(_new("Deberta", "ForMaskedLM", **_DEBERTA), _text),
    "deberta-v2": Architecture(_new("DebertaV2", "ForMaskedLM", **_DEBERTA), _text),
    "vit": Architecture(
        _new("ViT", "ForImageClassification", _VISION, num_labels=5), _picture, _K_V_FC2
    ),
    "clip": Architecture(_clip, _text_and_picture, _K_V_FC2, output="logits_per_text"),
}
# fmt: on
