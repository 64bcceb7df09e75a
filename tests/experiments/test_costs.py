"""Costs: the paper's table, and counts of operations that torch makes on real forward passes."""

import io

import pytest
import torch
from support.tfew import random_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSeq2SeqLM, LlamaConfig, MixtralConfig, T5Config

from ia3 import IA3Config, IA3Model
from ia3.experiments import costs
from ia3.experiments.costs import ModelSize
from ia3.tfew.prompts.encoding import EncodedExample

# (IA)³ on T0 (section 3.3): 24 blocks a side, d_k = d_v, d_ff; a decoder block has two attentions.
T0_VALUES = 24 * (2 + 4) * 4096 + 24 * 2 * 10240
T0 = ModelSize(11e9, is_encoder_decoder=True)
# The medians in the paper (section 4.2): tokens of an answer, and of 41 demonstrations.
TOKENS_ASKED, TOKENS_SHOWN = 103, 41 * 98
TABLE = {
    "T-Few": costs.tfew_cost(T0, TOKENS_ASKED, stored_bytes=4 * T0_VALUES),
    "T0": costs.zero_shot_cost(T0, TOKENS_ASKED),
    "T5+LM": costs.in_context_cost(T0, TOKENS_ASKED, TOKENS_SHOWN),
    **{
        f"GPT-3 {name}": costs.in_context_cost(ModelSize(n, False), TOKENS_ASKED, TOKENS_SHOWN)
        for name, n in (("6.7B", 6.7e9), ("13B", 13e9), ("175B", 175e9))
    },
}


def two_digits(value):
    return f"{value:.1e}"


def test_the_costs_are_those_of_table_1():
    figures = {"T-Few": "1.1e+12", "T0": "1.1e+12", "T5+LM": "4.5e+13", "GPT-3 175B": "1.4e+15"}
    assert {name: two_digits(TABLE[name].flops_an_answer) for name in figures} == figures
    # The entries of two rows are those of the 41 demonstrations alone, without the query.
    for name, figure in (("GPT-3 6.7B", "5.4e+13"), ("GPT-3 13B", "1.0e+14")):
        cost = TABLE[name].flops_an_answer
        assert two_digits(cost * TOKENS_SHOWN / (TOKENS_SHOWN + TOKENS_ASKED)) == figure
    assert two_digits(TABLE["T-Few"].flops_before) == "2.7e+16"
    assert {cost.flops_before for name, cost in TABLE.items() if name != "T-Few"} == {0}
    # Demonstrations take 16 kilobytes.
    assert round(TABLE["T5+LM"].stored_bytes / 1000) == 16
    assert TABLE["T0"].stored_bytes == 0


def test_vectors_take_4_megabytes():
    with torch.device("meta"):
        sizes = {"d_model": 4096, "d_kv": 64, "num_heads": 64, "d_ff": 10240, "num_layers": 24}
        kind = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
        model = AutoModelForSeq2SeqLM.from_config(T5Config(vocab_size=32128, **sizes, **kind))
    assert costs.model_size(model).parameters == pytest.approx(11e9, rel=0.02)
    vectors = IA3Model(model, IA3Config(task_type="SEQ_2_SEQ_LM")).vectors("default")
    assert sum(vector.numel() for vector in vectors.values()) == T0_VALUES
    assert TABLE["T-Few"].stored_bytes == 4 * T0_VALUES
    # The paper weighs the file, in which each tensor has a header.
    file = io.BytesIO()
    tensors = {f"{name}.multi_lora_b": torch.empty(v.numel(), 1) for name, v in vectors.items()}
    torch.save(tensors, file)
    assert round(file.tell() / 2**20, 1) == 4.2


# -- a model of one's own --------------------------------------------------------------------------

LLAMA = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 4}
T5 = {"vocab_size": 64, "d_model": 128, "d_kv": 32, "num_heads": 4, "d_ff": 512, "num_layers": 3}
TOKENS = 16


def counted(model, *, train=False, **inputs) -> int:
    """The operations of matrix products, as torch counts them."""
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
        logits = model(**inputs).logits
        if train:
            logits.sum().backward()
    return counter.get_total_flops()


IDS = torch.randint(3, 60, (1, TOKENS), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("config", [LlamaConfig(**LLAMA), T5Config(**T5, dropout_rate=0.0)])
def test_a_model_does_what_is_said(config, train):
    model = random_model(config)
    size = costs.model_size(model)
    assert size.is_encoder_decoder == config.is_encoder_decoder
    flops = (size.training_flops if train else size.forward_flops) * TOKENS
    if config.is_encoder_decoder:
        # The same number of tokens on both sides, as the halves are taken for equal.
        made = counted(model, train=train, input_ids=IDS, decoder_input_ids=IDS)
        assert made == pytest.approx(2 * flops, rel=0.15)
    else:
        assert counted(model, train=train, input_ids=IDS) == pytest.approx(flops, rel=0.06)


def test_of_experts_those_count_that_a_token_meets():
    config = MixtralConfig(**LLAMA, num_local_experts=8, num_experts_per_tok=2)
    model = random_model(config)
    size = costs.model_size(model)
    everything = sum(p.numel() for p in model.parameters())
    assert size.parameters < 0.5 * everything
    model.set_experts_implementation("eager")
    made = counted(model, input_ids=IDS)
    assert made == pytest.approx(size.forward_flops * TOKENS, rel=0.06)


def test_shared_parameters_count_once():
    tied, untied = (
        costs.model_size(random_model(LlamaConfig(**LLAMA, tie_word_embeddings=tie))).parameters
        for tie in (True, False)
    )
    assert untied - tied == 64 * 128


@pytest.mark.quantized
def test_packed_parameters_count_with_all_their_values():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = random_model(LlamaConfig(**LLAMA))
    plain = costs.model_size(model).parameters
    for layer in model.model.layers:
        weight = layer.mlp.up_proj.weight.detach()
        layer.mlp.up_proj = bitsandbytes.nn.Linear4bit(128, 256, bias=False)
        layer.mlp.up_proj.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False).to("cpu")
    assert model.model.layers[0].mlp.up_proj.weight.numel() < 128 * 256
    assert costs.model_size(model).parameters == plain


def test_a_prompt_counts_once_with_all_its_choices():
    examples = ((1, 2, 3, 4), ((5,), (6, 7))), ((1, 2), ((5, 6, 7), (8,), (9,)))
    assert costs.answer_tokens([EncodedExample(*example) for example in examples]) == 7
