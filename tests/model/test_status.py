"""What adapters are doing on a model, told as PEFT tells it."""

import copy
from dataclasses import asdict

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

import ia3
from ia3 import IA3Error

SITES = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
QUERIES = {"target_modules": ["q_proj"], "feedforward_modules": []}


@pytest.fixture
def pair():
    """Ours and PEFT's, each with two adapters of other sites and a head."""
    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_labels": 3}
    small = LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0)
    base = LlamaForSequenceClassification(small).eval()
    models = []
    for library in (ia3, peft):
        config = library.IA3Config(task_type="SEQ_CLS", **SITES)
        model = library.get_peft_model(copy.deepcopy(base), config)
        model.add_adapter("other", library.IA3Config(task_type="SEQ_CLS", **QUERIES))
        models.append(model)
    return models


def told(library, model):
    layers = [asdict(layer) for layer in library.get_layer_status(model)]
    return layers, asdict(library.get_model_status(model))


def first(model):
    pass


def switched(model):
    model.set_adapter("other")


def both_train(model):
    model.set_requires_grad(["default", "other"])


def none_trains(model):
    model.set_requires_grad("default", requires_grad=False)


def partly(model):
    next(p for n, p in model.named_parameters() if "ia3_l.default" in n).requires_grad = False


@pytest.mark.parametrize("change", [first, switched, both_train, none_trains, partly])
def test_a_models_status_is_what_peft_says(pair, change):
    for model in pair:
        change(model)
    ours, theirs = told(ia3, pair[0]), told(peft, pair[1])
    assert ours == theirs
    methods = [asdict(layer) for layer in pair[0].get_layer_status()]
    assert (methods, asdict(pair[0].get_model_status())) == ours
    for name in ("has_active_enabled_adapter", "base_model_torch_dtype"):
        assert getattr(pair[0], name) == getattr(pair[1], name)
    # PEFT names the heads of all models.
    assert {"score"} <= pair[0].modules_to_save <= pair[1].modules_to_save
    assert pair[0].peft_type == pair[1].peft_type.value
    assert pair[0].supports_lora_conversion() is pair[1].supports_lora_conversion() is False
    # PEFT lists the latest adapter's alone.
    assert set(pair[0].targeted_module_names) >= set(pair[1].targeted_module_names)
    trained = [{n for n, p in model.named_parameters() if p.requires_grad} for model in pair]
    assert len(trained[0]) == len(trained[1])


def test_merged_and_disabled_adapters_are_told(tiny_llama, make_model):
    ours = ia3.get_peft_model(tiny_llama, ia3.IA3Config(**SITES))
    theirs = peft.get_peft_model(make_model("llama"), peft.IA3Config(**SITES))
    for model in (ours, theirs):
        model.merge_adapter()
    assert told(ia3, ours) == told(peft, theirs)
    assert ours.get_model_status().merged_adapters == ["default"]
    for model in (ours, theirs):
        model.unmerge_adapter()
        with model.disable_adapter():
            assert not model.has_active_enabled_adapter
            assert model.get_model_status().enabled is False
            assert not any(layer.enabled for layer in model.get_layer_status())
        assert model.has_active_enabled_adapter


def test_injected_compiled_and_inner_models_have_a_status(make_model):
    ours = ia3.inject_adapter_in_model(ia3.IA3Config(**SITES), make_model("llama"))
    theirs = peft.inject_adapter_in_model(peft.IA3Config(**SITES), make_model("llama"))
    expected = told(peft, theirs)
    assert told(ia3, ours) == expected
    wrapped = ia3.get_peft_model(make_model("llama"), ia3.IA3Config(**SITES))
    around = torch.nn.ModuleDict({"inner": wrapped})
    assert [layer.name for layer in ia3.get_layer_status(around)] == [
        f"inner.model.{layer['name']}" for layer in expected[0]
    ]
    status = ia3.get_model_status(torch.compile(wrapped))
    assert status == wrapped.get_model_status()
    assert status.adapter_model_type == "IA3Model"


def test_a_model_without_adapters_has_none(tiny_llama):
    for ask in (ia3.get_layer_status, ia3.get_model_status):
        with pytest.raises(IA3Error, match="no adapter on this LlamaForCausalLM"):
            ask(tiny_llama)
    model = ia3.get_peft_model(tiny_llama, ia3.IA3Config())
    model.delete_adapter("default")
    with pytest.raises(IA3Error, match="no adapter on this LlamaForCausalLM"):
        model.get_layer_status()
    assert not model.has_active_enabled_adapter
    with pytest.raises(
        IA3Error, match=r"no adapter is active.*add_adapter\(\) and set_adapter\(\)"
    ):
        _ = model.active_peft_config
    model.add_adapter("new", ia3.IA3Config())
    with pytest.raises(IA3Error, match=r"which has \['new'\]: set_adapter\(\) first"):
        _ = model.active_peft_config
    model.set_adapter("new")
    assert model.active_peft_config is model.peft_config["new"]
    assert model.modules_to_save is None
    model.unload()
    with pytest.raises(IA3Error, match="this model was unloaded: make a new one"):
        _ = model.active_peft_config


def test_setting_which_adapters_train_lasts_until_they_are_switched(pair):
    model, _ = pair
    model.set_requires_grad("other")
    assert model.get_model_status().requires_grad == {"default": True, "other": True}
    model.set_adapter("default")
    assert model.get_model_status().requires_grad == {"default": True, "other": False}
    with pytest.raises(IA3Error, match="no adapter 'third'"):
        model.set_requires_grad(["other", "third"])
    assert not model.vectors("other")["model.layers.0.self_attn.q_proj"].requires_grad
