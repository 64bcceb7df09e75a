"""The paper's sites from structure: expectations written from the modeling files, and an oracle.

The oracle needs no names: within one layer, keys and values are what a token's other tokens see of
it, and queries, feed-forward activations and everything else are not.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.pytorch_utils import Conv1D

from ia3 import IA3Error
from ia3.core.activations import activation_of
from ia3.core.names import Target
from ia3.targets.matching import matches, matches_feedforward, names_or_suffixes
from ia3.targets.structure import feedforward_targets, paper_targets

HIDDEN, INNER, HEADS, HEAD_DIM = 32, 48, 4, 8
VOCABULARY, TOKENS = 40, 5

Row = tuple[str, str, int, tuple[tuple[int, int], ...]]


@dataclass(frozen=True)
class Case:
    """How to build a model of so many layers, its sites (with a `#` for each layer's number), what
    its forward takes, and modules that other tokens see something of that is no key or value."""

    build: Callable[[int], nn.Module]
    sites: Sequence[Row]
    inputs: Callable[[], dict[str, Tensor]]
    seen_too: str = ""


def ids() -> Tensor:
    return torch.tensor([[7, 3, 21, 14, 9]])


def text() -> dict[str, Tensor]:
    return {"input_ids": ids()}


def text_to_text() -> dict[str, Tensor]:
    return {"input_ids": ids(), "decoder_input_ids": ids() + 1}


def images() -> dict[str, Tensor]:
    return {"pixel_values": torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8).sin()}


def texts_and_images() -> dict[str, Tensor]:
    return {**text(), **images()}


def speech_to_text() -> dict[str, Tensor]:
    features = torch.linspace(-9, 9, 8 * 12).reshape(1, 8, 12).sin()
    return {"input_features": features, "decoder_input_ids": ids()}


def made(model: str, config: str, layers: str = "num_hidden_layers", **fixed: Any) -> Any:
    """Builds a class of transformers from a config with so many layers."""

    def build(count: int) -> nn.Module:
        counts = dict.fromkeys(layers.split(), count)
        return getattr(hf, model)(getattr(hf, config)(**fixed, **counts))

    return build


# The usual words for sizes, so that a case names only what is its own.
USUAL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: dict[str, Any] = {**USUAL, "num_key_value_heads": 2, "head_dim": HEAD_DIM}
BART: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER + 8,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "d_kv": 6,
    "d_ff": INNER,
    "num_heads": HEADS,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}


def key_value(attention: str, size: int, key: str = "k_proj", value: str = "v_proj") -> list[Row]:
    return [(f"{attention}.{name}", "output", size, ()) for name in (key, value)]


def inner(name: str, size: int = INNER) -> Row:
    return (name, "input", size, ())


def experts(name: str, size: int) -> Row:
    return (name, "inner", size, ())


def fused(name: str, size: int, *queries: tuple[int, int]) -> Row:
    return (name, "output", size, queries)


def llama_like(keys: int = 16, down: str = "mlp.down_proj") -> list[Row]:
    """Grouped keys and values (2 of 4 heads) unless said otherwise."""
    layer = "model.layers.#"
    return [*key_value(f"{layer}.self_attn", keys), inner(f"{layer}.{down}")]


def bart_like(feed_forward: int = INNER, decoder_feed_forward: int = INNER + 8) -> list[Row]:
    encoder, decoder = "model.encoder.layers.#", "model.decoder.layers.#"
    return [
        *key_value(f"{encoder}.self_attn", HIDDEN),
        inner(f"{encoder}.fc2", feed_forward),
        *key_value(f"{decoder}.self_attn", HIDDEN),
        *key_value(f"{decoder}.encoder_attn", HIDDEN),
        inner(f"{decoder}.fc2", decoder_feed_forward),
    ]


T5_SITES = [
    *key_value("encoder.block.#.layer.0.SelfAttention", 24, "k", "v"),
    inner("encoder.block.#.layer.1.DenseReluDense.wo"),
    *key_value("decoder.block.#.layer.0.SelfAttention", 24, "k", "v"),
    *key_value("decoder.block.#.layer.1.EncDecAttention", 24, "k", "v"),
    inner("decoder.block.#.layer.2.DenseReluDense.wo"),
]


def bert_like(prefix: str, key: str = "key", value: str = "value") -> list[Row]:
    layer = f"{prefix}.encoder.layer.#"
    return [
        *key_value(f"{layer}.attention.self", HIDDEN, key, value),
        inner(f"{layer}.output.dense"),
    ]


# Fused outputs. Three equal parts, queries first; or that for every head.
THIRD = (0, HIDDEN)
PER_HEAD = ((0, 8), (24, 32), (48, 56), (72, 80))
GPT2_SIZES = {"n_embd": HIDDEN, "n_head": HEADS, "n_inner": INNER, "n_positions": 16}
SPECIAL = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
VISION = {"image_size": 8, "patch_size": 4, "num_channels": 3}


def falcon(queries: Sequence[tuple[int, int]], size: int, **kind: Any) -> Case:
    return Case(
        made(
            "FalconForCausalLM",
            "FalconConfig",
            **SPECIAL,
            hidden_size=HIDDEN,
            num_attention_heads=HEADS,
            ffn_hidden_size=INNER,
            **kind,
        ),
        [
            fused("transformer.h.#.self_attention.query_key_value", size, *queries),
            inner("transformer.h.#.mlp.dense_4h_to_h"),
        ],
        text,
    )


def gpt_bigcode(queries: Sequence[tuple[int, int]], size: int, **kind: Any) -> Case:
    return Case(
        made(
            "GPTBigCodeForCausalLM", "GPTBigCodeConfig", "n_layer", **SPECIAL, **GPT2_SIZES, **kind
        ),
        [
            fused("transformer.h.#.attn.c_attn", size, *queries),
            inner("transformer.h.#.mlp.c_proj"),
        ],
        text,
    )


def causal(
    name: str,
    sites: Sequence[Row],
    usual: dict[str, Any] = USUAL,
    seen_too: str = "",
    **own: Any,
) -> Case:
    build = made(f"{name}ForCausalLM", f"{name}Config", **{**usual, **own})
    return Case(build, sites, text, seen_too)


def clip(layers: int) -> nn.Module:
    tower = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_hidden_layers": layers,
    }
    config = hf.CLIPConfig(
        text_config={**SPECIAL, **tower, "max_position_embeddings": 16},
        vision_config={**VISION, **tower},
        projection_dim=16,
    )
    return hf.CLIPModel(config)


CASES: dict[str, Case] = {
    # -- encoder-decoders
    "t5": Case(
        made("T5ForConditionalGeneration", "T5Config", "num_layers num_decoder_layers", **T5),
        T5_SITES,
        text_to_text,
    ),
    "mt5": Case(
        made("MT5ForConditionalGeneration", "MT5Config", "num_layers num_decoder_layers", **T5),
        T5_SITES,
        text_to_text,
    ),
    "bart": Case(
        made("BartForConditionalGeneration", "BartConfig", "encoder_layers decoder_layers", **BART),
        bart_like(),
        text_to_text,
    ),
    "marian": Case(
        made("MarianMTModel", "MarianConfig", "encoder_layers decoder_layers", **BART),
        bart_like(),
        text_to_text,
    ),
    "pegasus": Case(
        made(
            "PegasusForConditionalGeneration",
            "PegasusConfig",
            "encoder_layers decoder_layers",
            **BART,
        ),
        bart_like(),
        text_to_text,
    ),
    "whisper": Case(
        made(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            "encoder_layers decoder_layers",
            **{k: v for k, v in BART.items() if k != "max_position_embeddings"},
            num_mel_bins=8,
            max_source_positions=6,
            max_target_positions=16,
            suppress_tokens=[],
            begin_suppress_tokens=[],
        ),
        bart_like(),
        speech_to_text,
    ),
    # -- fused projections
    "gpt2": Case(
        made("GPT2LMHeadModel", "GPT2Config", "n_layer", **SPECIAL, **GPT2_SIZES),
        [
            fused("transformer.h.#.attn.c_attn", 96, THIRD),
            inner("transformer.h.#.mlp.c_proj"),
        ],
        text,
    ),
    "gpt2 with cross-attention": Case(
        made(
            "GPT2LMHeadModel",
            "GPT2Config",
            "n_layer",
            **SPECIAL,
            **GPT2_SIZES,
            add_cross_attention=True,
        ),
        [
            fused("transformer.h.#.attn.c_attn", 96, THIRD),
            fused("transformer.h.#.crossattention.c_attn", 64),
            inner("transformer.h.#.mlp.c_proj"),
        ],
        lambda: {**text(), "encoder_hidden_states": torch.linspace(-1, 1, 192).reshape(1, 6, 32)},
    ),
    "gpt_bigcode multi-query": gpt_bigcode([THIRD], 48, multi_query=True),
    "gpt_bigcode multi-head": gpt_bigcode(PER_HEAD, 96, multi_query=False),
    "bloom": Case(
        made("BloomForCausalLM", "BloomConfig", "n_layer", **SPECIAL, hidden_size=32, n_head=HEADS),
        [
            fused("transformer.h.#.self_attention.query_key_value", 96, *PER_HEAD),
            inner("transformer.h.#.mlp.dense_4h_to_h", 128),
        ],
        text,
    ),
    "falcon of the first kind": falcon(
        PER_HEAD, 96, new_decoder_architecture=False, multi_query=False
    ),
    "falcon multi-query": falcon([THIRD], 48, new_decoder_architecture=False, multi_query=True),
    # Two groups of two queries, a key and a value.
    "falcon new": falcon([(0, 16), (32, 48)], 64, new_decoder_architecture=True, num_kv_heads=2),
    "gpt_neox": causal(
        "GPTNeoX",
        [
            fused("gpt_neox.layers.#.attention.query_key_value", 96, *PER_HEAD),
            inner("gpt_neox.layers.#.mlp.dense_4h_to_h"),
        ],
    ),
    "phi3": causal(
        "Phi3",
        [
            fused("model.layers.#.self_attn.qkv_proj", 64, THIRD),
            inner("model.layers.#.mlp.down_proj"),
        ],
        num_key_value_heads=2,
    ),
    "mpt": Case(
        made(
            "MptForCausalLM",
            "MptConfig",
            "n_layers",
            vocab_size=VOCABULARY,
            d_model=HIDDEN,
            n_heads=HEADS,
            max_seq_len=16,
        ),
        [
            fused("transformer.blocks.#.attn.Wqkv", 96, THIRD),
            inner("transformer.blocks.#.ffn.down_proj", 128),
        ],
        text,
    ),
    # Four parts, each queries, then values, then keys.
    "codegen": Case(
        made(
            "CodeGenForCausalLM", "CodeGenConfig", "n_layer", **SPECIAL, **GPT2_SIZES, rotary_dim=4
        ),
        [
            fused("transformer.h.#.attn.qkv_proj", 96, *PER_HEAD),
            inner("transformer.h.#.mlp.fc_out"),
        ],
        text,
    ),
    "persimmon": causal(
        "Persimmon",
        [
            fused("model.layers.#.self_attn.query_key_value", 96, *PER_HEAD),
            inner("model.layers.#.mlp.dense_4h_to_h"),
        ],
    ),
    "deberta": Case(
        made("DebertaForMaskedLM", "DebertaConfig", **USUAL, legacy=False),
        [
            fused("deberta.encoder.layer.#.attention.self.in_proj", 96, *PER_HEAD),
            inner("deberta.encoder.layer.#.output.dense"),
        ],
        text,
    ),
    # Linear attention: two groups of queries, keys, two values and two values' gates.
    "qwen3_next": Case(
        lambda layers: hf.Qwen3NextForCausalLM(
            hf.Qwen3NextConfig(
                **GROUPED,
                **MOE,
                num_hidden_layers=layers,
                layer_types=["linear_attention"] * layers,
                shared_expert_intermediate_size=20,
                linear_num_key_heads=2,
                linear_num_value_heads=4,
                linear_key_head_dim=8,
                linear_value_head_dim=4,
                linear_conv_kernel_dim=1,  # no convolution across tokens
            )
        ),
        [
            fused(
                "model.layers.#.linear_attn.in_proj_qkvz", 64, (0, 8), (24, 32), (32, 40), (56, 64)
            ),
            experts("model.layers.#.mlp.experts", 12),
            inner("model.layers.#.mlp.shared_expert.down_proj", 20),
        ],
        text,
        seen_too="in_proj_ba",  # how much a token is written and how much is forgotten
    ),
    # -- keys and values apart
    "gptj": Case(
        made("GPTJForCausalLM", "GPTJConfig", "n_layer", **SPECIAL, **GPT2_SIZES, rotary_dim=4),
        [*key_value("transformer.h.#.attn", HIDDEN), inner("transformer.h.#.mlp.fc_out")],
        text,
    ),
    "gpt_neo": Case(
        lambda layers: hf.GPTNeoForCausalLM(
            hf.GPTNeoConfig(
                **SPECIAL,
                hidden_size=HIDDEN,
                num_heads=HEADS,
                intermediate_size=INNER,
                max_position_embeddings=16,
                num_layers=layers,
                attention_types=[[["global"], layers]],
            )
        ),
        [
            *key_value("transformer.h.#.attn.attention", HIDDEN),
            inner("transformer.h.#.mlp.c_proj"),
        ],
        text,
    ),
    "opt": causal(
        "OPT",
        [
            *key_value("model.decoder.layers.#.self_attn", HIDDEN),
            inner("model.decoder.layers.#.fc2"),
        ],
        ffn_dim=INNER,
        word_embed_proj_dim=HIDDEN,
    ),
    "llama": causal("Llama", llama_like(), GROUPED),
    "mistral": causal("Mistral", llama_like(), GROUPED),
    "qwen2": causal("Qwen2", llama_like(), GROUPED),
    "qwen3": causal("Qwen3", llama_like(), GROUPED),
    "gemma": causal("Gemma", llama_like(), GROUPED),
    "gemma2": causal("Gemma2", llama_like(), GROUPED),
    "gemma3_text": Case(
        made("Gemma3ForCausalLM", "Gemma3TextConfig", **GROUPED), llama_like(), text
    ),
    "phi": causal("Phi", llama_like(HIDDEN, "mlp.fc2")),
    "olmo2": causal("Olmo2", llama_like(), {k: v for k, v in GROUPED.items() if k != "head_dim"}),
    "starcoder2": causal("Starcoder2", llama_like(16, "mlp.c_proj"), num_key_value_heads=2),
    "cohere": causal("Cohere", llama_like(), num_key_value_heads=2),
    "stablelm": causal("StableLm", llama_like(), num_key_value_heads=2),
    # -- experts
    "mixtral": causal(
        "Mixtral",
        [
            *key_value("model.layers.#.self_attn", 16),
            experts("model.layers.#.mlp.experts", INNER),
        ],
        GROUPED,
        num_local_experts=4,
    ),
    "qwen2_moe": causal(
        "Qwen2Moe",
        [
            *key_value("model.layers.#.self_attn", 16),
            experts("model.layers.#.mlp.experts", 12),
            inner("model.layers.#.mlp.shared_expert.down_proj", 20),
        ],
        num_key_value_heads=2,
        shared_expert_intermediate_size=20,
        **MOE,
    ),
    "qwen3_moe": causal(
        "Qwen3Moe",
        [*key_value("model.layers.#.self_attn", 16), experts("model.layers.#.mlp.experts", 12)],
        GROUPED,
        **MOE,
    ),
    "gpt_oss": causal(
        "GptOss",
        [*key_value("model.layers.#.self_attn", 16), experts("model.layers.#.mlp.experts", INNER)],
        GROUPED,
        num_local_experts=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
    "switch_transformers": Case(
        lambda layers: hf.SwitchTransformersForConditionalGeneration(
            hf.SwitchTransformersConfig(
                **T5,
                num_layers=layers,
                num_decoder_layers=layers,
                num_sparse_encoder_layers=layers,
                num_sparse_decoder_layers=layers,
                num_experts=2,
            )
        ),
        [
            *key_value("encoder.block.#.layer.0.SelfAttention", 24, "k", "v"),
            inner("encoder.block.#.layer.1.mlp.experts.expert_0.wo"),
            inner("encoder.block.#.layer.1.mlp.experts.expert_1.wo"),
            *key_value("decoder.block.#.layer.0.SelfAttention", 24, "k", "v"),
            *key_value("decoder.block.#.layer.1.EncDecAttention", 24, "k", "v"),
            inner("decoder.block.#.layer.2.mlp.experts.expert_0.wo"),
            inner("decoder.block.#.layer.2.mlp.experts.expert_1.wo"),
        ],
        text_to_text,
    ),
    # Keys of 4 values without and 2 with positions, values of 6, of 4 heads.
    "deepseek_v3": causal(
        "DeepseekV3",
        [
            fused("model.layers.#.self_attn.kv_a_proj_with_mqa", 18, (0, 16)),
            fused("model.layers.#.self_attn.kv_b_proj", 40),
            experts("model.layers.#.mlp.experts", 12),
            inner("model.layers.#.mlp.shared_experts.down_proj", 12),
        ],
        seen_too="kv_a_proj_with_mqa",  # the latent
        num_key_value_heads=HEADS,
        q_lora_rank=20,
        kv_lora_rank=16,
        qk_nope_head_dim=4,
        qk_rope_head_dim=2,
        v_head_dim=6,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=12,
        first_k_dense_replace=0,
    ),
    # -- encoders
    "bert": Case(made("BertForMaskedLM", "BertConfig", **USUAL), bert_like("bert"), text),
    "roberta": Case(
        made("RobertaForMaskedLM", "RobertaConfig", **USUAL), bert_like("roberta"), text
    ),
    "electra": Case(
        made("ElectraForMaskedLM", "ElectraConfig", **USUAL, embedding_size=24),
        bert_like("electra"),
        text,
    ),
    "deberta-v2": Case(
        made("DebertaV2ForMaskedLM", "DebertaV2Config", **USUAL),
        bert_like("deberta", "key_proj", "value_proj"),
        text,
    ),
    "distilbert": Case(
        made(
            "DistilBertForMaskedLM",
            "DistilBertConfig",
            "n_layers",
            vocab_size=VOCABULARY,
            dim=HIDDEN,
            hidden_dim=INNER,
            n_heads=HEADS,
            max_position_embeddings=16,
        ),
        [
            *key_value("distilbert.transformer.layer.#.attention", HIDDEN, "k_lin", "v_lin"),
            inner("distilbert.transformer.layer.#.ffn.lin2"),
        ],
        text,
    ),
    "albert": Case(
        made("AlbertForMaskedLM", "AlbertConfig", **USUAL, embedding_size=24),
        [
            *key_value(
                "albert.encoder.albert_layer_groups.0.albert_layers.0.attention",
                HIDDEN,
                "key",
                "value",
            ),
            inner("albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output"),
        ],
        text,
    ),
    "xlm": Case(
        made(
            "XLMWithLMHeadModel",
            "XLMConfig",
            "n_layers",
            n_words=VOCABULARY,
            emb_dim=HIDDEN,
            n_heads=HEADS,
            max_position_embeddings=16,
        ),
        [
            *key_value("transformer.attentions.#", HIDDEN, "k_lin", "v_lin"),
            inner("transformer.ffns.#.lin2", 128),
        ],
        text,
    ),
    "vit": Case(
        made(
            "ViTForImageClassification",
            "ViTConfig",
            **VISION,
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            num_attention_heads=HEADS,
        ),
        [*key_value("vit.layers.#.attention", HIDDEN), inner("vit.layers.#.mlp.fc2")],
        images,
    ),
    "clip": Case(
        clip,
        [
            row
            for tower in ("text_model", "vision_model")
            for row in (
                *key_value(f"{tower}.encoder.layers.#.self_attn", HIDDEN),
                inner(f"{tower}.encoder.layers.#.mlp.fc2"),
            )
        ],
        texts_and_images,
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def small(build: Callable[[int], nn.Module], layers: int) -> nn.Module:
    """The model with all its weights random, biases and norms too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(layers).eval()
        for parameter in model.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)
    return model


def found(model: nn.Module) -> list[Row]:
    rows = []
    for target in paper_targets(model):
        activation = activation_of(model.get_submodule(target.name), target.side)
        assert activation is not None
        rows.append((target.name, target.side, activation.dim, target.frozen))
    return rows


def test_sites(case: Case) -> None:
    expected = {
        (name.replace("#", layer), *row) for name, *row in case.sites for layer in ("0", "1")
    }
    rows = found(case.build(2))
    assert set(rows) == expected
    assert len(rows) == len(expected)


def test_order_and_feedforward_part(case: Case) -> None:
    model = case.build(2)
    order = [name for name, _ in model.named_modules()]
    targets = paper_targets(model)
    assert [target.name for target in targets] == sorted(
        (target.name for target in targets), key=order.index
    )
    feedforward = [
        target
        for target in targets
        if target.why in ("feed-forward inner activation", "experts' inner activation")
    ]
    assert feedforward_targets(model) == feedforward
    assert {target.side for target in feedforward} <= {"input", "inner"}
    assert {target.side for target in targets if target not in feedforward} == {"output"}


# -- the oracle ------------------------------------------------------------------------------------


def views(model: nn.Module, inputs: dict[str, Tensor]) -> list[tuple[nn.Module, dict[str, Tensor]]]:
    """The parts to look at by themselves: each is one stack of layers on top of its inputs."""
    if isinstance(model, hf.CLIPModel):
        return [
            (model.text_model, {"input_ids": inputs["input_ids"]}),
            (model.vision_model, {"pixel_values": inputs["pixel_values"]}),
        ]
    if model.config.is_encoder_decoder:
        first = next(iter(inputs))
        return [(model.get_encoder(), {first: inputs[first]}), (model, inputs)]
    return [(model.base_model, inputs)]


def seen_by_others(
    model: nn.Module, part: nn.Module, inputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    """For each linear layer in a layer of the part: `[dim]`, how much the last token's output
    depends on the layer's values at the other tokens."""
    outputs: dict[str, list[Tensor]] = {}
    encoder = set(model.get_encoder().modules()) if model.config.is_encoder_decoder else set()
    encoder = set() if part in encoder else encoder
    handles = [
        module.register_forward_hook(
            lambda _module, _args, output, name=name: outputs.setdefault(name, []).append(output)
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and any(piece.isdigit() for piece in name.split("."))
        and "expert_" not in name  # these get some of the tokens only
        and module not in encoder
    ]
    result = part(**inputs, use_cache=False) if "pixel_values" not in inputs else part(**inputs)
    for handle in handles:
        handle.remove()
    last = result[0][0, -1]
    assert last.dim() == 1
    looked_at = (last * torch.linspace(-1, 1, len(last), dtype=last.dtype).cos()).sum()
    names = list(outputs)
    assert all(len(calls) == 1 for calls in outputs.values())
    gradients = torch.autograd.grad(
        looked_at, [outputs[name][0] for name in names], allow_unused=True
    )
    influence = {}
    for name, gradient in zip(names, gradients, strict=True):
        assert gradient is not None, name
        influence[name] = gradient.reshape(-1, gradient.shape[-1])[:-1].abs().amax(0)
    return influence


def test_other_tokens_see_keys_and_values_and_nothing_else(case: Case) -> None:
    model = small(case.build, 1)
    outputs = {t.name: t for t in paper_targets(model) if t.side == "output"}
    looked_at = set()
    for part, inputs in views(model, case.inputs()):
        for name, influence in seen_by_others(model, part, inputs).items():
            looked_at.add(name)
            stays = torch.ones(len(influence), dtype=torch.bool)
            if name in outputs:
                stays[:] = False
                for start, end in outputs[name].frozen:
                    stays[start:end] = True
            assert (influence[~stays] > 0).all(), name
            if not (case.seen_too and case.seen_too in name):
                assert (influence[stays] == 0).all(), name
    assert looked_at >= outputs.keys()


# -- what is left out ------------------------------------------------------------------------------


def names(targets: Sequence[Target]) -> set[str]:
    return {target.name for target in targets}


@pytest.mark.parametrize(
    ("model", "config", "own", "heads"),
    [
        ("BertForSequenceClassification", "BertConfig", USUAL, {"classifier", "bert.pooler.dense"}),
        ("RobertaForTokenClassification", "RobertaConfig", USUAL, {"classifier"}),
        # Its two layers have the sizes of a feed-forward layer.
        (
            "RobertaForSequenceClassification",
            "RobertaConfig",
            {**USUAL, "num_labels": HIDDEN},
            {"classifier.dense", "classifier.out_proj"},
        ),
        ("LlamaForSequenceClassification", "LlamaConfig", GROUPED, {"score"}),
        ("BertForQuestionAnswering", "BertConfig", USUAL, {"qa_outputs"}),
    ],
)
def test_a_head_changes_nothing(
    model: str, config: str, own: dict[str, Any], heads: set[str]
) -> None:
    headed = made(model, config, **own)(1)
    targets = paper_targets(headed)
    assert heads <= {name for name, _ in headed.named_modules()}
    prefix = f"{headed.base_model_prefix}."
    bare = {prefix + target.name for target in paper_targets(headed.base_model)}
    assert names(targets) == bare


def test_projectors_and_pooling_heads_are_left_out() -> None:
    """A vision-language model whose projector has a feed-forward layer's sizes and names."""
    vision = {**VISION, "hidden_size": HIDDEN, "intermediate_size": INNER}
    config = hf.LlavaConfig(
        text_config={"model_type": "llama", **GROUPED, "num_hidden_layers": 1},
        vision_config={
            "model_type": "siglip_vision_model",
            **vision,
            "num_attention_heads": HEADS,
            "num_hidden_layers": 1,
            "vision_use_head": True,
        },
        image_token_index=3,
    )
    model = hf.LlavaForConditionalGeneration(config)
    projector = model.get_submodule("model.multi_modal_projector")
    assert projector.linear_1.weight.shape == projector.linear_2.weight.shape == (HIDDEN, HIDDEN)
    tower, language = "model.vision_tower.encoder.layers.0", "model.language_model.layers.0"
    assert any("head.attention" in name for name, _ in model.named_modules())
    assert names(paper_targets(model)) == {
        f"{tower}.self_attn.k_proj",
        f"{tower}.self_attn.v_proj",
        f"{tower}.mlp.fc2",
        f"{language}.self_attn.k_proj",
        f"{language}.self_attn.v_proj",
        f"{language}.mlp.down_proj",
    }


def test_state_space_mixers_are_left_out_and_their_feedforward_layers_are_not() -> None:
    """Mamba's layers project to twice their inner size and back, as a gated layer does."""
    config = hf.JambaConfig(
        **{k: v for k, v in GROUPED.items() if k not in ("max_position_embeddings", "head_dim")},
        num_hidden_layers=2,
        attn_layer_offset=1,
        attn_layer_period=2,
        expert_layer_offset=1,
        expert_layer_period=2,
        num_experts=2,
        mamba_d_state=4,
        mamba_dt_rank=2,
        use_mamba_kernels=False,
    )
    model = hf.JambaForCausalLM(config)
    mixer = model.get_submodule("model.layers.0.mamba")
    assert mixer.in_proj.out_features == 2 * mixer.out_proj.in_features
    assert names(paper_targets(model)) == {
        "model.layers.0.feed_forward.down_proj",
        "model.layers.1.self_attn.k_proj",
        "model.layers.1.self_attn.v_proj",
        "model.layers.1.feed_forward.experts",
    }


def test_a_bottleneck_adapter_is_no_feedforward_layer() -> None:
    config = hf.XmodConfig(
        **USUAL, num_hidden_layers=1, languages=["en_XX"], default_language="en_XX"
    )
    model = hf.XmodModel(config)
    assert any("adapter_modules.en_XX.dense2" in name for name, _ in model.named_modules())
    layer = "encoder.layer.0"
    assert names(paper_targets(model)) == {
        f"{layer}.attention.self.key",
        f"{layer}.attention.self.value",
        f"{layer}.output.dense",
    }


def test_keys_of_a_choice_of_tokens_are_left_out() -> None:
    """DeepSeek's indexer has keys, by which it picks tokens; they are not attended to."""
    model = hf.DeepseekV32Model(
        hf.DeepseekV32Config(
            **USUAL,
            num_hidden_layers=1,
            num_key_value_heads=HEADS,
            q_lora_rank=20,
            kv_lora_rank=16,
            qk_nope_head_dim=4,
            qk_rope_head_dim=2,
            v_head_dim=6,
            index_n_heads=2,
            index_head_dim=4,
            first_k_dense_replace=1,
        )
    )
    assert any("indexer.wk" in name for name, _ in model.named_modules())
    assert names(paper_targets(model)) == {
        "layers.0.self_attn.kv_a_proj_with_mqa",
        "layers.0.self_attn.kv_b_proj",
        "layers.0.mlp.down_proj",
    }


# -- models that nobody knows ----------------------------------------------------------------------


class Block(nn.Module):
    """A transformer block in one's own words."""

    def __init__(self, attention: nn.Module, feed_forward: nn.Module) -> None:
        super().__init__()
        self.mixing, self.thinking = attention, feed_forward
        self.norm = nn.LayerNorm(HIDDEN)


class Separate(nn.Module):
    def __init__(self, key: str = "to_k", value: str = "to_v", query: str = "to_q") -> None:
        super().__init__()
        for name in (query, key, value, "to_out"):
            self.add_module(name, nn.Linear(HIDDEN, HIDDEN))


class CausalSelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.c_proj = nn.Linear(HIDDEN, HIDDEN)


class GatedLayer(nn.Module):
    """No usual names: told by its sizes alone."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(HIDDEN, INNER), nn.Linear(HIDDEN, INNER)
        self.back = nn.Linear(INNER, HIDDEN)


def plain_layer() -> nn.Module:
    return nn.Sequential(nn.Linear(HIDDEN, INNER), nn.GELU(), nn.Linear(INNER, HIDDEN))


def in_layers(block: Callable[[], nn.Module]) -> nn.Module:
    layers = nn.ModuleList([block(), block()])
    return nn.ModuleDict({"layers": layers, "projector": plain_layer()})


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("to_k", "to_v", "to_q"), {"to_k", "to_v"}),
        (("Wk", "Wv", "Wq"), {"Wk", "Wv"}),
        (("key_layer", "value_layer", "query_layer"), {"key_layer", "value_layer"}),
        (("projKey", "projValue", "projQuery"), {"projKey", "projValue"}),
    ],
)
def test_own_attention_with_usual_words(words: tuple[str, str, str], expected: set[str]) -> None:
    model = in_layers(lambda: Block(Separate(*words), plain_layer()))
    assert names(paper_targets(model)) == {
        f"layers.{layer}.{name}"
        for layer in (0, 1)
        for name in (*(f"mixing.{name}" for name in expected), "thinking.2")
    }


def test_feedforward_layer_by_its_sizes() -> None:
    model = in_layers(lambda: Block(Separate(), GatedLayer()))
    assert {target.name for target in feedforward_targets(model)} == {
        "layers.0.thinking.back",
        "layers.1.thinking.back",
    }


def test_one_block_by_itself() -> None:
    assert names(paper_targets(Block(Separate(), plain_layer()))) == {
        "mixing.to_k",
        "mixing.to_v",
        "thinking.2",
    }


def test_keys_that_serve_as_values() -> None:
    attention = Separate()
    attention.to_v = None
    model = in_layers(lambda: Block(attention, plain_layer()))
    assert "layers.0.mixing.to_k" in names(paper_targets(model))


def test_a_layer_that_several_places_share_is_one_site() -> None:
    block = Block(Separate(), plain_layer())
    model = in_layers(lambda: block)
    assert names(paper_targets(model)) == {
        "layers.0.mixing.to_k",
        "layers.0.mixing.to_v",
        "layers.0.thinking.2",
    }


def test_order_of_a_subclass_is_its_parents() -> None:
    class Own(GPT2Attention):
        pass

    model = hf.GPT2LMHeadModel(hf.GPT2Config(**SPECIAL, **GPT2_SIZES, n_layer=1))
    model.transformer.h[0].attn = Own(model.config, layer_idx=0)
    assert paper_targets(model)[0].frozen == ((0, HIDDEN),)


# -- errors ----------------------------------------------------------------------------------------


class ParallelExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, INNER, HIDDEN))


@pytest.mark.parametrize(
    ("attention", "feed_forward", "expected"),
    [
        # Nothing says in what order it is, whatever other classes of that name do.
        (CausalSelfAttention, plain_layer, "'layers.0.mixing.c_attn'.*order.*CausalSelfAttention"),
        (
            lambda: Separate("query_key", "value", "norm"),
            plain_layer,
            "'layers.0.mixing.query_key' .*queries and keys at once",
        ),
        (
            lambda: nn.MultiheadAttention(HIDDEN, HEADS),
            plain_layer,
            "'layers.0.mixing' is a torch.nn.MultiheadAttention",
        ),
        (lambda: nn.Linear(HIDDEN, HIDDEN), plain_layer, "no attention .* in ModuleDict"),
        (Separate, lambda: nn.Linear(HIDDEN, HIDDEN), "no feed-forward layer .* in ModuleDict"),
        (Separate, ParallelExperts, r"'layers.0.thinking' \(ParallelExperts\) holds experts"),
    ],
)
def test_what_cannot_be_told_is_an_error(
    attention: Callable[[], nn.Module], feed_forward: Callable[[], nn.Module], expected: str
) -> None:
    model = in_layers(lambda: Block(attention(), feed_forward()))
    with pytest.raises(IA3Error, match=f"{expected}.*target_modules"):
        paper_targets(model)


@pytest.mark.parametrize(
    ("model", "config", "own"),
    [
        ("MambaForCausalLM", "MambaConfig", {"state_size": 4, "hidden_size": HIDDEN}),
        (
            "RwkvForCausalLM",
            "RwkvConfig",
            {"hidden_size": HIDDEN, "attention_hidden_size": HIDDEN, "intermediate_size": INNER},
        ),
    ],
)
def test_a_model_without_attention_is_an_error(
    model: str, config: str, own: dict[str, Any]
) -> None:
    made_model = made(model, config, vocab_size=VOCABULARY, **own)(2)
    with pytest.raises(IA3Error, match=f"no attention.*{model}.*target_modules"):
        paper_targets(made_model)


# -- names that PEFT reads -------------------------------------------------------------------------


def entries(model: nn.Module) -> tuple[list[str], list[str]]:
    """`target_modules` and `feedforward_modules` of the paper's sites."""
    targets = paper_targets(model)
    outputs = [target.name for target in targets if target.side != "input"]
    inputs = [target.name for target in targets if target.side == "input"]
    feedforward = names_or_suffixes(model, inputs, apart_from=outputs)
    return [*names_or_suffixes(model, outputs), *feedforward], feedforward


def test_peft_reads_the_entries_as_the_same_sites(case: Case) -> None:
    model = case.build(2)
    targets = paper_targets(model)
    chosen, feedforward = entries(model)
    if any(target.side == "inner" for target in targets):
        # PEFT has no layer for experts, but matches names alike.
        everything = [name for name, _ in model.named_modules()]
        assert {name for name in everything if matches(name, chosen)} == names(targets)
        return
    expected = {
        target.name: tuple(activation.shape)
        for target in targets
        if (activation := activation_of(model.get_submodule(target.name), target.side))
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Conv1D and fan_in_fan_out
        adapted = peft.get_peft_model(
            model, peft.IA3Config(target_modules=chosen, feedforward_modules=feedforward)
        )
    assert {
        name.removeprefix("base_model.model.").split(".ia3_l.")[0]: tuple(parameter.shape)
        for name, parameter in adapted.named_parameters()
        if ".ia3_l." in name
    } == expected


@pytest.mark.parametrize(
    ("case_name", "expected"),
    [
        ("t5", ["k", "v", "wo"]),
        ("llama", ["down_proj", "k_proj", "v_proj"]),
        ("bert", ["0.output.dense", "1.output.dense", "key", "value"]),
        ("gpt2", ["c_attn", "mlp.c_proj"]),
        ("gpt_neo", ["c_proj", "k_proj", "v_proj"]),
        ("mixtral", ["experts", "k_proj", "v_proj"]),
    ],
)
def test_entries_are_short(case_name: str, expected: list[str]) -> None:
    chosen, _ = entries(CASES[case_name].build(2))
    assert sorted(chosen) == expected


def tree(paths: Sequence[str]) -> nn.Module:
    """A module with submodules by these names."""
    root = nn.Module()
    for path in paths:
        parent = root
        for part in path.split("."):
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
    return root


PARTS = st.sampled_from(["a", "b", "ab", "0"])
PATHS = st.lists(st.lists(PARTS, min_size=1, max_size=4).map(".".join), min_size=1, max_size=8)


@given(paths=PATHS, data=st.data())
@settings(deadline=None, max_examples=150)
def test_entries_select_exactly_the_names_and_none_can_be_spared(
    paths: list[str], data: st.DataObject
) -> None:
    model = tree(paths)
    everything = [name for name, _ in model.named_modules() if name]
    wanted = data.draw(st.lists(st.sampled_from(everything), min_size=1, unique=True))
    others = set(everything) - set(wanted)

    def selected(entries: Sequence[str]) -> set[str]:
        return {name for name in everything if matches(name, entries)}

    try:
        found = names_or_suffixes(model, wanted)
    except IA3Error as error:
        (name,) = [name for name in wanted if repr(name) in str(error)]
        assert any(other.endswith(f".{name}") for other in others)
        return
    assert selected(found) == set(wanted)
    for spared in found:
        assert selected([entry for entry in found if entry != spared]) != set(wanted)
    apart = data.draw(st.lists(st.sampled_from(sorted(others)), unique=True)) if others else []
    try:
        found = names_or_suffixes(model, wanted, apart_from=apart)
    except IA3Error:
        return
    assert selected(found) == set(wanted)
    assert not any(matches_feedforward(name, found) for name in apart)


def test_entry_of_a_name_that_is_not_there() -> None:
    with pytest.raises(IA3Error, match=r"'q_proj' of Module .*regular expression"):
        names_or_suffixes(tree(["layers.0.k_proj"]), ["q_proj"])


def test_feedforward_entry_is_no_end_of_another_targets_name() -> None:
    """PEFT's rule for feed-forward modules has no dot: `o` would be the end of `wo` too."""
    model = tree(["layer.o", "layer.wo"])
    assert names_or_suffixes(model, ["layer.o"]) == ["o"]
    assert names_or_suffixes(model, ["layer.o"], apart_from=["layer.wo"]) == ["layer.o"]
