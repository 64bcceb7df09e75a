"""The nearest LoRA to an adapter: in PEFT, and against numpy's decomposition in float64."""

from __future__ import annotations

import json
import warnings

import numpy as np
import peft
import pytest
import torch
from support.pairs import randomize, vectors
from support.tfew import random_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    MixtralConfig,
    Qwen2Config,
)

import ia3
from ia3.core.names import module_at
from ia3.model.lora import nearest_lora

# The largest side of a tiny model's weights that is the smaller one.
FULL = 32


def qwen2() -> nn.Module:
    """Its keys and values have biases."""
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = random_model(Qwen2Config(**sizes, **heads))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.normal_(generator=torch.Generator().manual_seed(len(name)))
    return model


def adapted(base, **config):
    model = ia3.get_peft_model(base, ia3.IA3Config(**config))
    randomize(vectors(model), 0)
    return model.eval()


def logits_of(model, inputs):
    given = {key: value for key, value in inputs.items() if key != "labels"}
    if getattr(model.config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = inputs["labels"]
    with torch.no_grad():
        return model(**given).logits


def in_peft(base, folder):
    """PEFT's model with the LoRA; what PEFT warns of is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(base, folder).eval()


@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_at_full_rank_peft_computes_as_the_adapter_does(
    make_model, make_inputs, tmp_path, kind, targets
):
    base, inputs = make_model(kind), make_inputs(kind)
    plain = logits_of(base, inputs)
    model = adapted(base, target_modules=targets)
    expected = logits_of(model, inputs)
    assert (expected - plain).abs().max() > 1e-2
    # GPT-2's layers have biases, all of them.
    nearest_lora(model, FULL, bias=kind == "gpt2").save_pretrained(tmp_path)
    found = logits_of(in_peft(make_model(kind), tmp_path), inputs)
    assert (found - expected).abs().max() < 1e-4


def test_a_bias_moves_with_the_vector_where_that_is_asked_for(make_inputs, tmp_path):
    inputs = make_inputs("llama")
    model = adapted(qwen2(), target_modules=["k_proj", "v_proj"])
    expected = logits_of(model, inputs)
    for bias, (least, most) in {True: (0, 1e-4), False: (1e-2, 100)}.items():
        nearest_lora(model, 16, bias=bias).save_pretrained(tmp_path / str(bias))
        found = logits_of(in_peft(qwen2(), tmp_path / str(bias)), inputs)
        assert least <= (found - expected).abs().max() <= most


def test_what_is_left_out_of_a_bias_is_told():
    model = adapted(qwen2())
    for bias in (True, False):
        for loss in nearest_lora(model, 4, bias=bias).losses:
            constant = module_at(model.model, loss.site).bias
            moved = 0.0
            if constant is not None and not bias:
                vector = model.vectors("default")[loss.site].flatten()
                moved = (((vector - 1) * constant).norm() / constant.norm()).item()
            assert loss.bias == pytest.approx(moved, rel=1e-5)


@pytest.mark.parametrize("rank", [3, 31])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_no_matrix_of_that_rank_is_nearer(make_model, kind, rank):
    model = adapted(make_model(kind), target_modules="all-linear")
    found = nearest_lora(model, rank)
    assert [loss.site for loss in found.losses] == [*model.vectors("default")]
    sides = set()
    for loss in found.losses:
        vector = model.vectors("default")[loss.site].detach().double().numpy()
        weight = module_at(model.model, loss.site).weight.detach().double().numpy()
        weight = weight.T if kind == "gpt2" else weight
        # [dim, 1] on an output, [1, dim] on an input.
        change = (vector - 1) * weight
        sides.add(vector.shape.index(1))
        singular = np.linalg.svd(change, compute_uv=False)
        left = np.sqrt((singular[rank:] ** 2).sum() / (singular**2).sum())
        assert loss.change == pytest.approx(left, rel=1e-4, abs=1e-6)
        factors = found.factors[loss.site]
        assert factors.a.shape == (rank, weight.shape[1])
        assert factors.b.shape == (weight.shape[0], rank)
        product = factors.b.double() @ factors.a.double()
        assert np.linalg.norm(change - product.numpy()) / np.linalg.norm(change) == pytest.approx(
            left, rel=1e-4, abs=1e-6
        )
    assert sides == {0, 1}


def test_a_vector_of_ones_changes_nothing_and_loses_nothing(tiny_llama):
    found = nearest_lora(ia3.get_peft_model(tiny_llama, ia3.IA3Config()), 2)
    assert {(loss.change, loss.bias) for loss in found.losses} == {(0.0, 0.0)}
    assert not any((own.b @ own.a).any() for own in found.factors.values())


def test_it_is_the_same_while_the_adapter_is_merged(tiny_llama):
    model = adapted(tiny_llama)
    before = nearest_lora(model, 3)
    model.merge_adapter()
    after = nearest_lora(model, 3)
    assert after.losses == before.losses
    for name, own in before.factors.items():
        assert torch.equal(after.factors[name].a, own.a)
        assert torch.equal(after.factors[name].b, own.b)


def test_a_head_goes_with_it(make_inputs, tmp_path):
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}

    def bert():
        config = BertConfig(**sizes, num_attention_heads=4, num_labels=3, initializer_range=0.2)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return BertForSequenceClassification(config).eval()

    inputs = make_inputs("llama")
    model = adapted(bert(), task_type="SEQ_CLS")
    with torch.no_grad():
        for value in model.get_base_model().classifier.parameters():
            value.zero_()
        next(p for n, p in model.named_parameters() if n.endswith("default.weight")).normal_()
    expected = logits_of(model, inputs)
    nearest_lora(model, FULL, bias=True).save_pretrained(tmp_path)
    found = in_peft(bert(), tmp_path)
    assert (logits_of(found, inputs) - expected).abs().max() < 1e-4


def test_targets_are_named_as_peft_matches_them(tiny_llama, tmp_path):
    one = "model.layers.1.self_attn.k_proj"
    model = adapted(tiny_llama, target_modules=[one])
    model.add_adapter("both", ia3.IA3Config(target_modules=["k_proj"]))
    for name, expected in {"default": [one], "both": ["k_proj"]}.items():
        nearest_lora(model, 2, name).save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["target_modules"] == expected
        found = peft.LoraConfig.from_pretrained(tmp_path / name)
        assert (found.r, found.lora_alpha, found.inference_mode) == (2, 2, True)


def test_within_its_context_the_base_model_computes_with_it(tiny_gpt2, make_inputs):
    inputs = make_inputs("gpt2")
    model = adapted(tiny_gpt2)
    expected = logits_of(model, inputs)
    found = nearest_lora(model, FULL, bias=True)
    base = model.unload()
    plain = logits_of(base, inputs)
    with found.on(base):
        assert (logits_of(base, inputs) - expected).abs().max() < 1e-4
    assert torch.equal(logits_of(base, inputs), plain)


@pytest.mark.parametrize(
    ("rank", "said"), [(33, "rank is 33, expected at most 32"), (0, "rank is 0, expected a whole")]
)
def test_a_rank_that_no_weight_has_is_refused(tiny_llama, rank, said):
    with pytest.raises(ia3.IA3Error, match=said):
        nearest_lora(adapted(tiny_llama, target_modules="all-linear"), rank)


def test_what_lora_cannot_say_is_refused_by_name(tiny_llama):
    embedding = adapted(tiny_llama, target_modules=["embed_tokens"])
    with pytest.raises(
        ia3.IA3Error, match=r"'model\.embed_tokens' is a Embedding, expected linear"
    ):
        nearest_lora(embedding, 1)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    mixture = adapted(random_model(MixtralConfig(vocab_size=48, **sizes, **heads)))
    with pytest.raises(ia3.IA3Error, match="expected linear layers alone"):
        nearest_lora(mixture, 1)


def test_an_unknown_adapter_is_refused(tiny_llama):
    with pytest.raises(ia3.UnknownNameError, match="no adapter 'other'"):
        nearest_lora(adapted(tiny_llama), 1, "other")
