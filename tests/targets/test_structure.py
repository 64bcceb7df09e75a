"""The paper's sites from structure: expectations written from the modeling files, and an oracle.

The oracle needs no names: within one layer, keys and values are what a token's other tokens see of
it, and queries, feed-forward activations and everything else are not.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from support.pairs import vectors
from torch import Tensor, nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.pytorch_utils import Conv1D

from ia3 import IA3Config, IA3Error
from ia3.core.names import Target
from ia3.targets.matching import rule
from ia3.targets.resolve import resolve
from ia3.targets.structure import feedforward_targets, paper_targets

HIDDEN, INNER, HEADS, HEAD_DIM = 32, 48, 4, 8
VOCABULARY, TOKENS = 40, 5

Row = tuple[str, str, int, tuple[tuple[int, int], ...]]
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """How to build a model of so many layers, its sites (with a `#` for each layer's number), what
    its forward takes, and modules that other tokens see something of that is no key or value."""

    build: Callable[[int], nn.Module]
    sites: Sequence[Row]
    inputs: Inputs
    seen_too: str = ""


IDS = torch.tensor([[7, 3, 21, 14, 9]])
TEXT = {"input_ids": IDS}
TEXT_TO_TEXT = {**TEXT, "decoder_input_ids": IDS + 1}
IMAGES = {"pixel_values": torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8).sin()}
SPEECH = torch.linspace(-9, 9, 8 * 12).reshape(1, 8, 12).sin()
SPEECH_TO_TEXT = {"input_features": SPEECH, "decoder_input_ids": IDS}
WITH_ENCODER = {**TEXT, "encoder_hidden_states": torch.linspace(-1, 1, 192).reshape(1, 6, 32)}


def made(model: str, config: str, layers: str = "num_hidden_layers", **fixed: Any) -> Any:
    """Builds a class of transformers from a config with so many layers."""

    def build(count: int) -> nn.Module:
        counts = dict.fromkeys(layers.split(), count)
        return getattr(hf, model)(getattr(hf, config)(**fixed, **counts))

    return build


# The usual words for sizes, so that a case names only what is its own.
SPECIAL = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TOWER = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": HEADS}
USUAL: dict[str, Any] = {**SPECIAL, **TOWER, "max_position_embeddings": 16}
GROUPED: dict[str, Any] = {**USUAL, "num_key_value_heads": 2, "head_dim": HEAD_DIM}
# fmt: off
BART: dict[str, Any] = {
    **SPECIAL, "d_model": HIDDEN, "decoder_start_token_id": 2, "forced_eos_token_id": 2,
    "encoder_ffn_dim": INNER, "encoder_attention_heads": HEADS,
    "decoder_ffn_dim": INNER + 8, "decoder_attention_heads": HEADS,
}
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 6, "d_ff": INNER, "num_heads": HEADS,
    "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0,
}
# fmt: on
GPT2 = {**SPECIAL, "n_embd": HIDDEN, "n_head": HEADS, "n_inner": INNER, "n_positions": 16}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
VISION = {"image_size": 8, "patch_size": 4, "num_channels": 3}
LATENT: dict[str, Any] = {"num_key_value_heads": HEADS, "q_lora_rank": 20, "kv_lora_rank": 16}
LATENT |= {"qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 6}


def key_value(attention: str, size: int, key: str = "k_proj", value: str = "v_proj") -> list[Row]:
    return [(f"{attention}.{name}", "output", size, ()) for name in (key, value)]


def inner(name: str, size: int = INNER) -> Row:
    return (name, "input", size, ())


def experts(name: str, size: int) -> Row:
    return (name, "inner", size, ())


def fused(name: str, size: int, *queries: tuple[int, int]) -> Row:
    return (name, "output", size, queries)


def llama_like(keys: int = 16, down: Row | str = "mlp.down_proj", *more: Row) -> list[Row]:
    """Grouped keys and values (2 of 4 heads) unless said otherwise."""
    layer = "model.layers.#"
    rows = [inner(down) if isinstance(down, str) else down, *more]
    return [
        *key_value(f"{layer}.self_attn", keys),
        *((f"{layer}.{name}", *row) for name, *row in rows),
    ]


def bert_like(prefix: str, key: str = "key", value: str = "value") -> list[Row]:
    layer = f"{prefix}.encoder.layer.#"
    return [
        *key_value(f"{layer}.attention.self", HIDDEN, key, value),
        inner(f"{layer}.output.dense"),
    ]


ENCODER, DECODER = "model.encoder.layers.#", "model.decoder.layers.#"
BART_SITES = [
    *key_value(f"{ENCODER}.self_attn", HIDDEN),
    inner(f"{ENCODER}.fc2"),
    *key_value(f"{DECODER}.self_attn", HIDDEN),
    *key_value(f"{DECODER}.encoder_attn", HIDDEN),
    inner(f"{DECODER}.fc2", INNER + 8),
]
T5_KEYS = [
    *key_value("encoder.block.#.layer.0.SelfAttention", 24, "k", "v"),
    *key_value("decoder.block.#.layer.0.SelfAttention", 24, "k", "v"),
    *key_value("decoder.block.#.layer.1.EncDecAttention", 24, "k", "v"),
]
T5_SITES = [
    *T5_KEYS,
    inner("encoder.block.#.layer.1.DenseReluDense.wo"),
    inner("decoder.block.#.layer.2.DenseReluDense.wo"),
]

# Fused outputs. Three equal parts, queries first; or that for every head.
THIRD = (0, HIDDEN)
PER_HEAD = ((0, 8), (24, 32), (48, 56), (72, 80))
H = "transformer.h.#"


def t5(name: str) -> Case:
    layers = "num_layers num_decoder_layers"
    build = made(f"{name}ForConditionalGeneration", f"{name}Config", layers, **T5)
    return Case(build, T5_SITES, TEXT_TO_TEXT)


def bart(model: str, config: str, inputs: Inputs = TEXT_TO_TEXT, **own: Any) -> Case:
    build = made(model, config, "encoder_layers decoder_layers", **BART, **own)
    return Case(build, BART_SITES, inputs)


def causal(
    name: str,
    sites: Sequence[Row],
    usual: dict[str, Any] = USUAL,
    seen_too: str = "",
    layers: str = "num_hidden_layers",
    suffix: str = "ForCausalLM",
    **own: Any,
) -> Case:
    build = made(f"{name}{suffix}", f"{name}Config", layers, **{**usual, **own})
    return Case(build, sites, TEXT, seen_too)


def gpt2_like(name: str, sites: Sequence[Row], **own: Any) -> Case:
    suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    return causal(name, sites, GPT2, layers="n_layer", suffix=suffix, **own)


def falcon(queries: Sequence[tuple[int, int]], size: int, **kind: Any) -> Case:
    query_key_value = fused(f"{H}.self_attention.query_key_value", size, *queries)
    sites = [query_key_value, inner(f"{H}.mlp.dense_4h_to_h")]
    return causal("Falcon", sites, ffn_hidden_size=INNER, **kind)


def gpt_bigcode(queries: Sequence[tuple[int, int]], size: int, **kind: Any) -> Case:
    sites = [fused(f"{H}.attn.c_attn", size, *queries), inner(f"{H}.mlp.c_proj")]
    return gpt2_like("GPTBigCode", sites, **kind)


def masked(name: str, sites: Sequence[Row], **own: Any) -> Case:
    return causal(name, sites, suffix="ForMaskedLM", **own)


def clip(layers: int) -> nn.Module:
    tower = {**TOWER, "num_hidden_layers": layers}
    text = {**SPECIAL, **tower, "max_position_embeddings": 16}
    config = hf.CLIPConfig(text_config=text, vision_config={**VISION, **tower}, projection_dim=16)
    return hf.CLIPModel(config)


def gpt_neo(layers: int) -> nn.Module:
    kinds = {"num_layers": layers, "attention_types": [[["global"], layers]]}
    sizes = {**SPECIAL, "hidden_size": HIDDEN, "num_heads": HEADS, "intermediate_size": INNER}
    return hf.GPTNeoForCausalLM(hf.GPTNeoConfig(**sizes, **kinds, max_position_embeddings=16))


def qwen3_next(layers: int) -> nn.Module:
    """Linear attention: two groups of queries, keys, two values and two values' gates."""
    kinds = {"num_hidden_layers": layers, "layer_types": ["linear_attention"] * layers}
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    sizes = {"linear_key_head_dim": 8, "linear_value_head_dim": 4}
    # With this kernel there is no convolution across tokens.
    own = {"shared_expert_intermediate_size": 20, "linear_conv_kernel_dim": 1}
    config = hf.Qwen3NextConfig(**GROUPED, **MOE, **kinds, **heads, **sizes, **own)
    return hf.Qwen3NextForCausalLM(config)


SWITCH = made(
    "SwitchTransformersForConditionalGeneration",
    "SwitchTransformersConfig",
    "num_layers num_decoder_layers num_sparse_encoder_layers num_sparse_decoder_layers",
    **{**T5, "num_experts": 2},
)
WHISPER_POSITIONS = {"max_source_positions": 6, "max_target_positions": 16}
XLM = {"n_words": VOCABULARY, "emb_dim": HIDDEN, "n_heads": HEADS}
ALBERT = "albert.encoder.albert_layer_groups.0.albert_layers.0"

# fmt: off
CASES: dict[str, Case] = {
    # -- encoder-decoders
    "t5": t5("T5"),
    "mt5": t5("MT5"),
    "bart": bart("BartForConditionalGeneration", "BartConfig", max_position_embeddings=16),
    "marian": bart("MarianMTModel", "MarianConfig", max_position_embeddings=16),
    "pegasus": bart("PegasusForConditionalGeneration", "PegasusConfig", max_position_embeddings=16),
    "whisper": bart(
        "WhisperForConditionalGeneration", "WhisperConfig", SPEECH_TO_TEXT, num_mel_bins=8,
        suppress_tokens=[], begin_suppress_tokens=[], **WHISPER_POSITIONS,
    ),
    # -- fused projections
    "gpt2": gpt2_like("GPT2", [fused(f"{H}.attn.c_attn", 96, THIRD), inner(f"{H}.mlp.c_proj")]),
    "gpt2 with cross-attention": replace(
        gpt2_like("GPT2", [
            fused(f"{H}.attn.c_attn", 96, THIRD), fused(f"{H}.crossattention.c_attn", 64),
            inner(f"{H}.mlp.c_proj"),
        ], add_cross_attention=True),
        inputs=WITH_ENCODER,
    ),
    "gpt_bigcode multi-query": gpt_bigcode([THIRD], 48, multi_query=True),
    "gpt_bigcode multi-head": gpt_bigcode(PER_HEAD, 96, multi_query=False),
    "bloom": causal("Bloom", [
        fused(f"{H}.self_attention.query_key_value", 96, *PER_HEAD),
        inner(f"{H}.mlp.dense_4h_to_h", 128),
    ], SPECIAL, layers="n_layer", hidden_size=HIDDEN, n_head=HEADS),
    "falcon of the first kind":
        falcon(PER_HEAD, 96, new_decoder_architecture=False, multi_query=False),
    "falcon multi-query": falcon([THIRD], 48, new_decoder_architecture=False, multi_query=True),
    # Two groups of two queries, a key and a value.
    "falcon new": falcon([(0, 16), (32, 48)], 64, new_decoder_architecture=True, num_kv_heads=2),
    "gpt_neox": causal("GPTNeoX", [
        fused("gpt_neox.layers.#.attention.query_key_value", 96, *PER_HEAD),
        inner("gpt_neox.layers.#.mlp.dense_4h_to_h"),
    ]),
    "phi3": causal("Phi3", [
        fused("model.layers.#.self_attn.qkv_proj", 64, THIRD),
        inner("model.layers.#.mlp.down_proj"),
    ], num_key_value_heads=2),
    "mpt": causal("Mpt", [
        fused("transformer.blocks.#.attn.Wqkv", 96, THIRD),
        inner("transformer.blocks.#.ffn.down_proj", 128),
    ], {"vocab_size": VOCABULARY, "d_model": HIDDEN, "n_heads": HEADS}, layers="n_layers",
        max_seq_len=16),
    # Four parts, each queries, then values, then keys.
    "codegen": gpt2_like("CodeGen", [
        fused(f"{H}.attn.qkv_proj", 96, *PER_HEAD), inner(f"{H}.mlp.fc_out"),
    ], rotary_dim=4),
    "persimmon": causal("Persimmon", [
        fused("model.layers.#.self_attn.query_key_value", 96, *PER_HEAD),
        inner("model.layers.#.mlp.dense_4h_to_h"),
    ]),
    "deberta": masked("Deberta", [
        fused("deberta.encoder.layer.#.attention.self.in_proj", 96, *PER_HEAD),
        inner("deberta.encoder.layer.#.output.dense"),
    ], legacy=False),
    "qwen3_next": Case(qwen3_next, [
        fused("model.layers.#.linear_attn.in_proj_qkvz", 64, (0, 8), (24, 32), (32, 40), (56, 64)),
        experts("model.layers.#.mlp.experts", 12),
        inner("model.layers.#.mlp.shared_expert.down_proj", 20),
    ], TEXT, seen_too="in_proj_ba"),  # how much a token is written and how much is forgotten
    # -- keys and values apart
    "gptj": gpt2_like(
        "GPTJ", [*key_value(f"{H}.attn", HIDDEN), inner(f"{H}.mlp.fc_out")], rotary_dim=4
    ),
    "gpt_neo": Case(
        gpt_neo, [*key_value(f"{H}.attn.attention", HIDDEN), inner(f"{H}.mlp.c_proj")], TEXT
    ),
    "opt": causal("OPT", [
        *key_value("model.decoder.layers.#.self_attn", HIDDEN), inner("model.decoder.layers.#.fc2"),
    ], ffn_dim=INNER, word_embed_proj_dim=HIDDEN),
    **{
        name.lower(): causal(name, llama_like(), GROUPED)
        for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2")
    },
    "gemma3_text": Case(
        made("Gemma3ForCausalLM", "Gemma3TextConfig", **GROUPED), llama_like(), TEXT
    ),
    "phi": causal("Phi", llama_like(HIDDEN, "mlp.fc2")),
    "olmo2": causal("Olmo2", llama_like(), num_key_value_heads=2),
    "starcoder2": causal("Starcoder2", llama_like(16, "mlp.c_proj"), num_key_value_heads=2),
    "cohere": causal("Cohere", llama_like(), num_key_value_heads=2),
    "stablelm": causal("StableLm", llama_like(), num_key_value_heads=2),
    # -- experts
    "mixtral": causal(
        "Mixtral", llama_like(16, experts("mlp.experts", INNER)), GROUPED, num_local_experts=4
    ),
    "qwen2_moe": causal(
        "Qwen2Moe",
        llama_like(16, experts("mlp.experts", 12), inner("mlp.shared_expert.down_proj", 20)),
        num_key_value_heads=2, shared_expert_intermediate_size=20, **MOE,
    ),
    "qwen3_moe": causal("Qwen3Moe", llama_like(16, experts("mlp.experts", 12)), GROUPED, **MOE),
    "gpt_oss": causal(
        "GptOss", llama_like(16, experts("mlp.experts", INNER)), GROUPED, num_local_experts=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
    "switch_transformers": Case(SWITCH, [
        *T5_KEYS,
        *(
            inner(f"{layer}.mlp.experts.expert_{expert}.wo")
            for layer in ("encoder.block.#.layer.1", "decoder.block.#.layer.2")
            for expert in (0, 1)
        ),
    ], TEXT_TO_TEXT),
    # Keys of 4 values without and 2 with positions, values of 6, of 4 heads.
    "deepseek_v3": causal("DeepseekV3", [
        fused("model.layers.#.self_attn.kv_a_proj_with_mqa", 18, (0, 16)),
        fused("model.layers.#.self_attn.kv_b_proj", 40),
        experts("model.layers.#.mlp.experts", 12),
        inner("model.layers.#.mlp.shared_experts.down_proj", 12),
    ], seen_too="kv_a_proj_with_mqa",  # the latent
        **LATENT, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        moe_intermediate_size=12, first_k_dense_replace=0),
    # -- encoders
    "bert": masked("Bert", bert_like("bert")),
    "roberta": masked("Roberta", bert_like("roberta")),
    "electra": masked("Electra", bert_like("electra"), embedding_size=24),
    "deberta-v2": masked("DebertaV2", bert_like("deberta", "key_proj", "value_proj")),
    "distilbert": causal("DistilBert", [
        *key_value("distilbert.transformer.layer.#.attention", HIDDEN, "k_lin", "v_lin"),
        inner("distilbert.transformer.layer.#.ffn.lin2"),
    ], {"vocab_size": VOCABULARY, "dim": HIDDEN, "hidden_dim": INNER, "n_heads": HEADS},
        layers="n_layers", suffix="ForMaskedLM", max_position_embeddings=16),
    "albert": masked("Albert", [
        *key_value(f"{ALBERT}.attention", HIDDEN, "key", "value"), inner(f"{ALBERT}.ffn_output"),
    ], embedding_size=24),
    "xlm": causal("XLM", [
        *key_value("transformer.attentions.#", HIDDEN, "k_lin", "v_lin"),
        inner("transformer.ffns.#.lin2", 128),
    ], XLM, layers="n_layers", suffix="WithLMHeadModel", max_position_embeddings=16),
    "vit": Case(
        made("ViTForImageClassification", "ViTConfig", **VISION, **TOWER),
        [*key_value("vit.layers.#.attention", HIDDEN), inner("vit.layers.#.mlp.fc2")],
        IMAGES,
    ),
    "clip": Case(clip, [
        row
        for tower in ("text_model", "vision_model")
        for row in (
            *key_value(f"{tower}.encoder.layers.#.self_attn", HIDDEN),
            inner(f"{tower}.encoder.layers.#.mlp.fc2"),
        )
    ], {**TEXT, **IMAGES}),
}
# fmt: on


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def small(build: Callable[[int], nn.Module], layers: int) -> nn.Module:
    """The model with all its weights random, biases and norms too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(layers).eval()
        for parameter in model.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)
    return model


def test_sites(case):
    expected = {
        (name.replace("#", layer), *row) for name, *row in case.sites for layer in ("0", "1")
    }
    model = case.build(2)
    targets = paper_targets(model)
    found = [(t.name, t.side, t.activation.dim, t.frozen) for t in targets]
    assert set(found) == expected
    assert len(found) == len(expected)
    order = [name for name, _ in model.named_modules()]
    assert [name for name, *_ in found] == sorted((row[0] for row in found), key=order.index)
    assert feedforward_targets(model) == [t for t in targets if t.side != "output"]
    assert all(("inner activation" in t.why) == (t.side != "output") for t in targets)


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
    looked_at = (last * torch.linspace(-1, 1, len(last), dtype=last.dtype).cos()).sum()
    assert all(len(calls) == 1 for calls in outputs.values())
    # Of a layer that the last token does not depend on at all, this raises.
    gradients = torch.autograd.grad(looked_at, [calls[0] for calls in outputs.values()])
    return {
        name: gradient.reshape(-1, gradient.shape[-1])[:-1].abs().amax(0)
        for name, gradient in zip(outputs, gradients, strict=True)
    }


def test_other_tokens_see_keys_and_values_and_nothing_else(case):
    model = small(case.build, 1)
    outputs = {t.name: t for t in paper_targets(model) if t.side == "output"}
    looked_at = set()
    for part, inputs in views(model, case.inputs):
        for name, influence in seen_by_others(model, part, inputs).items():
            looked_at.add(name)
            stays = torch.full([len(influence)], name not in outputs)
            for start, end in outputs[name].frozen if name in outputs else ():
                stays[start:end] = True
            assert (influence[~stays] > 0).all(), name
            if not (case.seen_too and case.seen_too in name):
                assert (influence[stays] == 0).all(), name
    assert looked_at >= outputs.keys()


# -- what is left out ------------------------------------------------------------------------------


WIDE_HEAD = {**USUAL, "num_labels": HIDDEN}


def names(targets: Sequence[Target]) -> set[str]:
    return {target.name for target in targets}


@pytest.mark.parametrize(
    ("model", "task", "own", "heads"),
    [
        ("Bert", "SequenceClassification", USUAL, "classifier bert.pooler.dense"),
        ("Roberta", "TokenClassification", USUAL, "classifier"),
        # Its two layers have the sizes of a feed-forward layer.
        ("Roberta", "SequenceClassification", WIDE_HEAD, "classifier.dense classifier.out_proj"),
        ("Llama", "SequenceClassification", GROUPED, "score"),
        ("Bert", "QuestionAnswering", USUAL, "qa_outputs"),
    ],
)
def test_a_head_changes_nothing(model, task, own, heads):
    headed = made(f"{model}For{task}", f"{model}Config", **own)(1)
    assert set(heads.split()) <= {name for name, _ in headed.named_modules()}
    prefix = f"{headed.base_model_prefix}."
    bare = {prefix + target.name for target in paper_targets(headed.base_model)}
    assert names(paper_targets(headed)) == bare


def llava() -> nn.Module:
    tower = {**VISION, **TOWER, "num_hidden_layers": 1, "vision_use_head": True}
    config = hf.LlavaConfig(
        text_config={"model_type": "llama", **GROUPED, "num_hidden_layers": 1},
        vision_config={"model_type": "siglip_vision_model", **tower},
        image_token_index=3,
    )
    return hf.LlavaForConditionalGeneration(config)


def jamba() -> nn.Module:
    sizes = {k: v for k, v in GROUPED.items() if k not in ("max_position_embeddings", "head_dim")}
    layers = {"num_hidden_layers": 2, "attn_layer_offset": 1, "attn_layer_period": 2}
    sparse = {"expert_layer_offset": 1, "expert_layer_period": 2, "num_experts": 2}
    mixer = {"mamba_d_state": 4, "mamba_dt_rank": 2, "use_mamba_kernels": False}
    return hf.JambaForCausalLM(hf.JambaConfig(**sizes, **layers, **sparse, **mixer))


def xmod() -> nn.Module:
    languages = {"languages": ["en_XX"], "default_language": "en_XX"}
    return hf.XmodModel(hf.XmodConfig(**USUAL, num_hidden_layers=1, **languages))


def deepseek_v32() -> nn.Module:
    own = {"num_hidden_layers": 1, "index_n_heads": 2, "index_head_dim": 4}
    config = hf.DeepseekV32Config(**USUAL, **LATENT, **own, first_k_dense_replace=1)
    return hf.DeepseekV32Model(config)


@pytest.mark.parametrize(
    ("build", "left_out", "expected"),
    [
        # A projector with a feed-forward layer's sizes and names, and a head that pools.
        (
            llava,
            ["model.multi_modal_projector.linear_2", "head.attention"],
            {
                "model.vision_tower.encoder.layers.0": "self_attn.k_proj self_attn.v_proj mlp.fc2",
                "model.language_model.layers.0": "self_attn.k_proj self_attn.v_proj mlp.down_proj",
            },
        ),
        # Mamba's layers project to twice their inner size and back, as a gated layer does.
        (
            jamba,
            ["model.layers.0.mamba.in_proj", "model.layers.0.mamba.out_proj"],
            {
                "model.layers.0": "feed_forward.down_proj",
                "model.layers.1": "self_attn.k_proj self_attn.v_proj feed_forward.experts",
            },
        ),
        # A bottleneck adapter.
        (
            xmod,
            ["adapter_modules.en_XX.dense2"],
            {"encoder.layer.0": "attention.self.key attention.self.value output.dense"},
        ),
        # DeepSeek's indexer has keys, by which it picks tokens; they are not attended to.
        (
            deepseek_v32,
            ["indexer.wk"],
            {"layers.0": "self_attn.kv_a_proj_with_mqa self_attn.kv_b_proj mlp.down_proj"},
        ),
    ],
)
def test_what_looks_like_attention_or_a_feedforward_layer_is_left_out(build, left_out, expected):
    model = build()
    for part in left_out:
        assert any(part in name for name, _ in model.named_modules())
    found = {f"{layer}.{name}" for layer, line in expected.items() for name in line.split()}
    assert names(paper_targets(model)) == found


# -- models that transformers does not have --------------------------------------------------------


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


class CausalSelfAttention(nn.ModuleDict):
    pass


def plain_layer() -> nn.Module:
    return nn.Sequential(nn.Linear(HIDDEN, INNER), nn.GELU(), nn.Linear(INNER, HIDDEN))


def in_layers(block: Callable[[], nn.Module]) -> nn.Module:
    layers = nn.ModuleList([block(), block()])
    return nn.ModuleDict({"layers": layers, "projector": plain_layer()})


def told(model: nn.Module) -> set[str]:
    """The sites of a model by `in_layers`, which must be the same in both layers."""
    found = sorted(names(paper_targets(model)))
    first = [name.removeprefix("layers.0.") for name in found if name.startswith("layers.0.")]
    assert found == [f"layers.{layer}.{name}" for layer in (0, 1) for name in first]
    return set(first)


@pytest.mark.parametrize("form", ["to_{}", "W{}", "{}_layer", "proj{}"])
def test_own_attention_with_usual_words(form):
    words = {"{}_layer": ("key", "value", "query"), "proj{}": ("Key", "Value", "Query")}
    key, value, query = map(form.format, words.get(form, "kvq"))
    model = in_layers(lambda: Block(Separate(key, value, query), plain_layer()))
    assert told(model) == {f"mixing.{key}", f"mixing.{value}", "thinking.2"}


def test_feedforward_layer_by_its_sizes():
    ups = {"left": nn.Linear(HIDDEN, INNER), "right": nn.Linear(HIDDEN, INNER)}
    gated = nn.ModuleDict({**ups, "back": nn.Linear(INNER, HIDDEN)})
    model = in_layers(lambda: Block(Separate(), copy.deepcopy(gated)))
    assert told(model) == {"mixing.to_k", "mixing.to_v", "thinking.back"}


def test_one_block_by_itself_in_several_places_and_without_values():
    block = Block(Separate(), plain_layer())
    expected = {"mixing.to_k", "mixing.to_v", "thinking.2"}
    assert names(paper_targets(block)) == expected
    shared = in_layers(lambda: block)
    assert names(paper_targets(shared)) == {f"layers.0.{name}" for name in expected}
    block.mixing.to_v = None  # the keys serve as values
    assert names(paper_targets(block)) == expected - {"mixing.to_v"}


def test_order_of_a_subclass_is_its_parents():
    class Own(GPT2Attention):
        pass

    model = hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, n_layer=1))
    model.transformer.h[0].attn = Own(model.config, layer_idx=0)
    assert paper_targets(model)[0].frozen == ((0, HIDDEN),)


class ParallelExperts(nn.ParameterDict):
    pass


EXPERTS = ParallelExperts({"weight": torch.zeros(2, INNER, HIDDEN)})
FUSED = CausalSelfAttention({"c_attn": nn.Linear(8, 24)})


@pytest.mark.parametrize(
    ("attention", "feed_forward", "expected"),
    [
        (FUSED, None, "'layers.0.mixing.c_attn'.*order.*CausalSelfAttention"),
        (Separate("query_key", "value", "norm"), None, "query_key' .*queries and keys at once"),
        (nn.MultiheadAttention(8, 2), None, "'layers.0.mixing' is a torch.nn.MultiheadAttention"),
        (nn.Linear(8, 8), None, "no attention .* in ModuleDict"),
        (Separate(), nn.Linear(8, 8), "no feed-forward layer .* in ModuleDict"),
        (Separate(), EXPERTS, r"'layers.0.thinking' \(ParallelExperts\) holds experts"),
    ],
)
def test_what_cannot_be_told_is_an_error(attention, feed_forward, expected):
    model = in_layers(lambda: Block(attention, feed_forward or plain_layer()))
    with pytest.raises(IA3Error, match=f"{expected}.*target_modules"):
        paper_targets(model)


def test_a_block_whose_feedforward_layer_is_not_found_among_others_with_one():
    """As in FLUX's single blocks, its last layer takes attention and inner activation at once."""
    up, down = nn.Linear(HIDDEN, INNER), nn.Linear(HIDDEN + INNER, HIDDEN)
    at_once = nn.ModuleDict({"attention": Separate(), "proj_mlp": up, "proj_out": down})
    usual = nn.ModuleList([Block(Separate(), plain_layer())])
    model = nn.ModuleDict({"usual": usual, "single": nn.ModuleList([at_once])})
    message = r"feed-forward layer of block 'single.0' \(ModuleDict\) could .*'single.0.proj_mlp'"
    with pytest.raises(IA3Error, match=f"{message}.*target_modules"):
        paper_targets(model)
    # A block of attention alone has none, and needs none.
    del at_once["proj_mlp"], at_once["proj_out"]
    assert "single.0.attention.to_k" in names(paper_targets(model))


@pytest.mark.parametrize("kind", ["Mamba", "Rwkv"])
def test_a_model_without_attention_is_an_error(kind):
    sizes = {"hidden_size": HIDDEN, "attention_hidden_size": HIDDEN, "intermediate_size": INNER}
    model = made(f"{kind}ForCausalLM", f"{kind}Config", vocab_size=VOCABULARY, **sizes)(2)
    with pytest.raises(IA3Error, match=f"no attention.*{kind}ForCausalLM.*target_modules"):
        paper_targets(model)


def test_peft_reads_the_entries_as_the_same_sites(case):
    model = case.build(2)
    config, targets = resolve(model, IA3Config(paper_sites=True))
    chosen, feedforward = config.target_modules, config.feedforward_modules
    if any(target.side == "inner" for target in targets):
        # PEFT has no layer for experts, but matches names alike.
        everything = [name for name, _ in model.named_modules()]
        assert set(filter(rule("target_modules", chosen), everything)) == names(targets)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Conv1D and fan_in_fan_out
        theirs = peft.IA3Config(target_modules=chosen, feedforward_modules=feedforward)
        adapted = vectors(peft.get_peft_model(model, theirs))
    found = {name: tuple(vector.shape) for name, vector in adapted.items()}
    assert found == {target.name: target.activation.shape for target in targets}


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
def test_entries_are_short(case_name, expected):
    config, _ = resolve(CASES[case_name].build(2), IA3Config(paper_sites=True))
    assert sorted(config.target_modules) == expected
