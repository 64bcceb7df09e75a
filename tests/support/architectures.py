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
    """How to build a tiny model of one architecture, and what to feed it."""

    new: Callable[[], PreTrainedModel]
    inputs: Callable[[], Inputs]
    # Where PEFT has no working defaults.
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

# What most decoders and encoders call their sizes, and what the others do.
LAYERS: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4}
BLOCK: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": INNER, **LAYERS}
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, **BLOCK, "max_position_embeddings": POSITIONS}
GPT: dict[str, Any] = {"n_embd": WIDTH, "n_inner": INNER, "n_positions": POSITIONS}
GPT |= {"n_layer": 2, "n_head": 4}
T5: dict[str, Any] = {"d_model": WIDTH, "d_kv": HEAD, "d_ff": INNER, "num_layers": 2}
T5 |= {"num_heads": 4, "decoder_start_token_id": 0, "dropout_rate": 0.0}
T5 |= {"bos_token_id": None}
BART: dict[str, Any] = {"d_model": WIDTH}
for _part in ("encoder", "decoder"):
    BART |= {f"{_part}_layers": 2, f"{_part}_attention_heads": 4, f"{_part}_ffn_dim": INNER}
WHISPER: dict[str, Any] = {**BART, "num_mel_bins": 8, "decoder_start_token_id": 1}
WHISPER |= {"max_source_positions": POSITIONS, "max_target_positions": POSITIONS}
WHISPER |= {"suppress_tokens": None, "begin_suppress_tokens": None}
BART |= {"max_position_embeddings": POSITIONS, "decoder_start_token_id": 2}
MPT: dict[str, Any] = {"d_model": WIDTH, "n_heads": 4, "n_layers": 2}
MPT |= {"expansion_ratio": 2, "max_seq_len": POSITIONS}
NEO: dict[str, Any] = {**SIZES, "num_layers": 2, "num_heads": 4, "window_size": 4}
NEO |= {"attention_types": [[["global", "local"], 1]]}
TEXT: dict[str, Any] = {"vocab_size": VOCABULARY}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
GEMMA: dict[str, Any] = {**GROUPED, "head_dim": HEAD}
WINDOW: dict[str, Any] = {"sliding_window": 4}
NO_DROPOUT: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
DEBERTA: dict[str, Any] = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
K_V_FC2 = {"target_modules": ["k_proj", "v_proj", "fc2"], "feedforward_modules": ["fc2"]}


def _new(model: Any, sizes: dict[str, Any] = SIZES, **more: Any) -> Callable[[], PreTrainedModel]:
    """What makes a model of text, by what its config calls the sizes."""
    return lambda: model(model.config_class(**{**TEXT, **sizes, **more}))


def _vit() -> PreTrainedModel:
    config = hf.ViTConfig(image_size=8, patch_size=4, num_labels=5, **BLOCK)
    return hf.ViTForImageClassification(config)


def _clip() -> PreTrainedModel:
    of = {"vision_config": {**BLOCK, "image_size": 8, "patch_size": 4}}
    of |= {"text_config": {**TEXT, **SIZES}}
    return hf.CLIPModel(hf.CLIPConfig(**of, projection_dim=16))


# PEFT's default for Mixtral's feed-forward layers, w2, matches nothing.
MIXTRAL = {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []}
MPT_MODULES = {"target_modules": ["Wqkv", "down_proj"], "feedforward_modules": ["down_proj"]}
_mt5 = _new(hf.MT5ForConditionalGeneration, T5, feed_forward_proj="gated-gelu")
_bart = _new(hf.BartForConditionalGeneration, BART, forced_eos_token_id=None)
_whisper = _new(hf.WhisperForConditionalGeneration, WHISPER)
_mixtral = _new(hf.MixtralForCausalLM, **GROUPED, num_local_experts=4)
_bloom = {"hidden_size": WIDTH, "n_layer": 2, "n_head": 4}
_falcon = {"hidden_size": WIDTH, "ffn_hidden_size": INNER, **LAYERS}
_opt = {"hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": INNER, **LAYERS}
_opt |= {"max_position_embeddings": POSITIONS}

ARCHITECTURES: dict[str, Architecture] = {
    "t5": Architecture(_new(hf.T5ForConditionalGeneration, T5), _text_to_text),
    "mt5": Architecture(_mt5, _text_to_text),
    "bart": Architecture(_bart, _text_to_text),
    "whisper": Architecture(_whisper, _sound, K_V_FC2),
    "gpt2": Architecture(_new(hf.GPT2LMHeadModel, GPT, **NO_DROPOUT), _text),
    "gpt_bigcode": Architecture(_new(hf.GPTBigCodeForCausalLM, GPT, **NO_DROPOUT), _text),
    "gptj": Architecture(_new(hf.GPTJForCausalLM, GPT, rotary_dim=4), _text),
    "gpt_neo": Architecture(_new(hf.GPTNeoForCausalLM, NEO), _text),
    "gpt_neox": Architecture(_new(hf.GPTNeoXForCausalLM), _text),
    "llama": Architecture(_new(hf.LlamaForCausalLM, **GROUPED), _text),
    "mistral": Architecture(_new(hf.MistralForCausalLM, **GROUPED, **WINDOW), _text),
    "mixtral": Architecture(_mixtral, _text, MIXTRAL),
    "qwen2": Architecture(_new(hf.Qwen2ForCausalLM, **GROUPED), _text),
    "qwen3": Architecture(_new(hf.Qwen3ForCausalLM, **GEMMA), _text),
    "gemma": Architecture(_new(hf.GemmaForCausalLM, **GEMMA), _text),
    "gemma2": Architecture(_new(hf.Gemma2ForCausalLM, **GEMMA, **WINDOW), _text),
    "gemma3": Architecture(_new(hf.Gemma3ForCausalLM, **GEMMA, **WINDOW), _text),
    "phi": Architecture(_new(hf.PhiForCausalLM), _text),
    "falcon": Architecture(_new(hf.FalconForCausalLM, _falcon), _text),
    "bloom": Architecture(_new(hf.BloomForCausalLM, _bloom), _text),
    "mpt": Architecture(_new(hf.MptForCausalLM, MPT), _text, MPT_MODULES),
    "opt": Architecture(_new(hf.OPTForCausalLM, _opt), _text),
    "bert": Architecture(_new(hf.BertForMaskedLM), _text),
    "roberta": Architecture(_new(hf.RobertaForMaskedLM), _text),
    "deberta": Architecture(_new(hf.DebertaForMaskedLM, **DEBERTA), _text),
    "deberta-v2": Architecture(_new(hf.DebertaV2ForMaskedLM, **DEBERTA), _text),
    "vit": Architecture(_vit, _picture, K_V_FC2),
    "clip": Architecture(_clip, _text_and_picture, K_V_FC2, output="logits_per_text"),
}
