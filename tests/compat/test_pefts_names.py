"""Whatever PEFT has that can apply to (IA)³ is here, under its name and with its arguments."""

import inspect

import peft
import pytest
import torch
from peft.tuners.ia3 import IA3Model as PeftsTuner
from support.versions import since
from transformers import LlamaConfig, LlamaForCausalLM

import ia3

# What PEFT has and this library has not, by the reason.
NAMES = {
    "for models with adapters of several kinds": {"PEFT_TYPE_TO_MIXED_MODEL_MAPPING"},
    "of prompt tuning": {
        "PromptLearningConfig",
        "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
        "bloom_model_postprocess_past_key_value",
        "shift_tokens_right",
    },
    "of LoRA": {"find_kappa_target_modules", "replace_lora_weights_loftq"},
    "the category of LoRA's warnings": {"PeftWarning"},
}
ATTRIBUTES = {
    "of prompt tuning": {"get_prompt", "get_prompt_embedding_to_save"},
    "how PEFT's classes work inside": {
        *("base_model_prepare_inputs_for_generation", "get_model_config", "inject_adapter"),
        *("prefix", "special_peft_forward_args", "tuner_layer_cls", "uses_shared_state"),
    },
    "of adapters on parameters": {"targeted_parameter_names"},
}
CONFIG_ATTRIBUTES = {"a hook for PEFT's subclasses": {"check_kwargs"}}
# Defaults that say the same in another way.
DEFAULTS = {"max_shard_size", "peft_type", "autocast_adapter_dtype"}


def left_out(reasons):
    return set().union(*reasons.values())


def public(thing):
    return {name for name in dir(thing) if not name.startswith("_")}


def of_another_kind(name):
    """Whether a name is defined where PEFT has its other adapters."""
    home = getattr(getattr(peft, name), "__module__", None) or ""
    return home.startswith("peft.tuners.") and not home.startswith("peft.tuners.ia3")


def test_every_name_that_can_apply_is_here_or_has_a_reason_not_to_be():
    missing = {name for name in peft.__all__ if not hasattr(ia3, name)}
    assert {name for name in missing if not of_another_kind(name)} == left_out(NAMES)
    assert set(ia3.TaskType) == {task.value for task in peft.TaskType}
    assert set(ia3.__all__) >= {name for name in peft.__all__ if hasattr(ia3, name)}


@since("transformers", "5.23", "it has other attributes")
@pytest.mark.parametrize("task", [None, *ia3.TaskType])
def test_every_attribute_of_a_model_is_here_or_has_a_reason_not_to_be(make_model, task):
    modules = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    theirs, ours = (
        library.get_peft_model(make_model("llama"), library.IA3Config(task_type=task, **modules))
        for library in (peft, ia3)
    )
    expected = public(theirs) | public(theirs.base_model)
    missing = {name for name in expected if not hasattr(ours, name)}
    assert missing - left_out(ATTRIBUTES) == set()
    # What is not simply the base model's own is a part of the class, with a docstring.
    own = {name for name in expected & public(type(ours)) if name not in public(torch.nn.Module())}
    assert expected - left_out(ATTRIBUTES) <= own | public(ours.get_base_model())
    documented = [getattr(type(ours), name).__doc__ for name in own - {"peft_type"}]
    assert all(documented)


def test_every_attribute_of_a_config_is_here_or_has_a_reason_not_to_be():
    missing = public(peft.IA3Config()) - public(ia3.IA3Config())
    assert missing == left_out(CONFIG_ATTRIBUTES)


METHODS = sorted(
    name
    for name in public(ia3.IA3Model)
    for theirs in [getattr(peft.PeftModel, name, None) or getattr(PeftsTuner, name, None)]
    if callable(theirs) and not hasattr(torch.nn.Module, name)
)
PAIRS = [
    *((f"IA3Model.{name}", (peft.PeftModel, PeftsTuner), ia3.IA3Model) for name in METHODS),
    ("IA3Model.forward", (peft.PeftModel,), ia3.IA3Model),
    ("IA3Model.__init__", (peft.PeftModel,), ia3.IA3Model),
    *(
        (f"IA3Config.{name}", (peft.IA3Config,), ia3.IA3Config)
        for name in sorted(
            {*public(peft.IA3Config), "__init__"} & {*public(ia3.IA3Config), "__init__"}
        )
        if callable(getattr(peft.IA3Config, name))
    ),
    ("AutoPeftModel.from_pretrained", (peft.AutoPeftModel,), ia3.AutoPeftModel),
    *(
        (name, (peft,), ia3)
        for name in sorted(set(peft.__all__) & set(ia3.__all__))
        if inspect.isfunction(getattr(peft, name))
    ),
]


@pytest.mark.parametrize(("name", "theirs", "ours"), PAIRS, ids=[name for name, _, _ in PAIRS])
def test_arguments_are_pefts_in_pefts_order_with_pefts_defaults(name, theirs, ours):
    name = name.rpartition(".")[2]
    holder = next(each for each in theirs if hasattr(each, name))
    expected = inspect.signature(getattr(holder, name)).parameters
    found = inspect.signature(getattr(ours, name)).parameters
    by_place = [
        [n for n, p in each.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        for each in (found, expected)
    ]
    assert by_place[0][: len(by_place[1])] == by_place[1]
    for parameter in expected.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            assert any(p.kind is p.VAR_KEYWORD for p in found.values())
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            default = found[parameter.name].default
            if parameter.name == "import_allowlist":
                assert default is None
            assert default == parameter.default or parameter.name in DEFAULTS


def test_the_import_lines_of_pefts_ia3_notebooks_work():
    scope = {}
    exec(
        "from ia3 import (get_peft_config, get_peft_model, get_peft_model_state_dict, "
        "set_peft_model_state_dict, IA3Config, PeftType, TaskType)",
        scope,
    )
    config = scope["get_peft_config"]({"peft_type": "IA3", "task_type": "SEQ_2_SEQ_LM"})
    assert config == ia3.IA3Config(task_type=ia3.TaskType.SEQ_2_SEQ_LM)
    assert ia3.PEFT_TYPE_TO_CONFIG_MAPPING["IA3"] is ia3.IA3Config
    assert ia3.MODEL_TYPE_TO_PEFT_MODEL_MAPPING["CAUSAL_LM"] is ia3.PeftModelForCausalLM
    with pytest.raises(ia3.IA3Error, match="peft_type is 'LORA', expected 'IA3'"):
        scope["get_peft_config"]({"peft_type": "LORA", "r": 8})


def test_mixed_models_are_refused_by_a_sentence_that_helps(tiny_llama):
    config = ia3.IA3Config()
    for make in (ia3.PeftMixedModel, ia3.PeftMixedModel.from_pretrained):
        with pytest.raises(ia3.IA3Error, match=r"use get_peft_model, and set_adapter\(\[...\]\)"):
            make(tiny_llama, config)
    assert not isinstance(ia3.get_peft_model(tiny_llama, config), ia3.PeftMixedModel)


@pytest.mark.parametrize("catch", [ia3.NoMatchingPeftModuleError, ia3.PeftError, ValueError])
def test_targets_that_match_nothing_raise_pefts_error(tiny_llama, tmp_path, catch):
    with pytest.raises(catch, match="'nothing' matches nothing"):
        ia3.get_peft_model(tiny_llama, ia3.IA3Config(target_modules=["nothing"]))
    with pytest.raises(catch, match="matches no whole name"):
        ia3.get_peft_model(tiny_llama, ia3.IA3Config(target_modules="nothing"))
    # Also where the message names a folder.
    ia3.get_peft_model(tiny_llama, ia3.IA3Config()).save_pretrained(tmp_path)
    config = ia3.IA3Config(target_modules="nothing")
    other = LlamaForCausalLM(
        LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(catch, match="no module of LlamaForCausalLM is left"):
        ia3.PeftModel.from_pretrained(other, tmp_path, config=config)


def test_the_base_models_own_state_dict_is_read_and_loaded(make_model):
    model = ia3.get_peft_model(make_model("llama"), ia3.IA3Config(modules_to_save=["lm_head"]))
    base = make_model("llama").state_dict()
    found = ia3.get_base_model_state_dict(model)
    theirs = peft.get_peft_model(make_model("llama"), peft.IA3Config(modules_to_save=["lm_head"]))
    assert found.keys() == peft.get_base_model_state_dict(theirs).keys() == base.keys()
    changed = {name: value + 1 for name, value in base.items()}
    ia3.set_base_model_state_dict(model, changed)
    assert all(torch.equal(v, changed[n]) for n, v in ia3.get_base_model_state_dict(model).items())
    with pytest.raises(RuntimeError, match="Missing key"):
        ia3.set_base_model_state_dict(model, {})
    assert ia3.set_base_model_state_dict(model, {}, strict=False).missing_keys


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_does_not_train_takes_half_precision_and_vectors_never_do(make_model, dtype):
    model = ia3.get_peft_model(make_model("llama"), ia3.IA3Config(modules_to_save=["lm_head"]))
    model.add_adapter("other", ia3.IA3Config())
    model.register_buffer("counts", torch.zeros(3, dtype=torch.int64))
    model.model.packed = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    ia3.cast_mixed_precision_params(model, dtype)
    for name, parameter in model.named_parameters():
        vector = ".ia3_l.other" in name or parameter.requires_grad
        expected = torch.float32 if vector else torch.uint8 if "packed" in name else dtype
        assert parameter.dtype == expected, name
    theirs = peft.get_peft_model(make_model("llama"), peft.IA3Config())
    peft.cast_mixed_precision_params(theirs, dtype)
    q_proj = "model.layers.0.self_attn.q_proj"
    expected = theirs.get_base_model().get_submodule(q_proj).weight
    assert torch.equal(model.get_base_model().get_submodule(q_proj).weight, expected)
    with pytest.raises(ia3.IA3Error, match=r"dtype is torch.int8, expected torch.float16"):
        ia3.cast_mixed_precision_params(model, torch.int8)
