"""Code that catches what PEFT raises catches what is raised here: the same misuse of both."""

import builtins
import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ia3

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
NOWHERE = {"target_modules": ["nope"], "feedforward_modules": []}


def base(**sizes):
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **sizes})).eval()


def model(lib, **config):
    return lib.get_peft_model(base(), lib.IA3Config(**config))


def two_copies(lib):
    first = model(lib, modules_to_save=["lm_head"])
    first.add_adapter("b", lib.IA3Config(modules_to_save=["lm_head"]))
    return first


def other_sizes(lib):
    return {k: v.new_ones(3, 1) for k, v in lib.get_peft_model_state_dict(model(lib)).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders with an adapter, and with what is wrong with one."""
    root = tmp_path_factory.mktemp("adapters")
    model(peft, task_type="CAUSAL_LM").save_pretrained(root / "good")
    wide = peft.get_peft_model(base(hidden_size=32), peft.IA3Config())
    wide.save_pretrained(root / "wide")
    for name in ("nonsense", "no_weights", "no_config", "not_json"):
        shutil.copytree(root / "good", root / name)
    config = root / "nonsense" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "peft_type": "NONSENSE"}))
    (root / "no_weights" / "adapter_model.safetensors").unlink()
    (root / "no_config" / "adapter_config.json").unlink()
    (root / "not_json" / "adapter_config.json").write_text("{")
    return root


# Of each a call that both refuse.
MISUSE = {
    "a name in a config that matches nothing": lambda lib, at: model(lib, **NOWHERE),
    "a feed-forward module that is no target": lambda lib, at: lib.IA3Config(
        target_modules=["k_proj"], feedforward_modules=["down_proj"]
    ),
    "an unknown field of a config": lambda lib, at: lib.IA3Config(rank=8),
    "a field of another type": lambda lib, at: model(lib, target_modules=5),
    "another kind of adapter": lambda lib, at: lib.get_peft_config({"peft_type": "NONSENSE"}),
    "an unknown task": lambda lib, at: model(lib, task_type="NONSENSE"),
    "a model without defaults": lambda lib, at: lib.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(3, 3)), lib.IA3Config()
    ),
    "an unknown adapter, to activate": lambda lib, at: model(lib).set_adapter("nope"),
    "an unknown adapter, to delete": lambda lib, at: model(lib).delete_adapter("nope"),
    "an unknown adapter, to combine": lambda lib, at: model(lib).add_weighted_adapter(
        ["nope", "default"], [1, 1], "new"
    ),
    "an unknown adapter, to save": lambda lib, at: model(lib).save_pretrained(
        at / "new", selected_adapters=["nope"]
    ),
    "an unknown adapter's state dict": lambda lib, at: lib.get_peft_model_state_dict(
        model(lib), adapter_name="nope"
    ),
    "a state dict for an unknown adapter": lambda lib, at: lib.set_peft_model_state_dict(
        model(lib), lib.get_peft_model_state_dict(model(lib)), adapter_name="nope"
    ),
    "a state dict of other shapes": lambda lib, at: lib.set_peft_model_state_dict(
        model(lib), other_sizes(lib)
    ),
    "a name that is taken": lambda lib, at: model(lib).add_adapter("default", lib.IA3Config()),
    "another library's config": lambda lib, at: model(lib).add_adapter("x", peft.LoraConfig()),
    "a file to save into": lambda lib, at: model(lib).save_pretrained(
        at / "good" / "adapter_config.json"
    ),
    "a folder that is not there": lambda lib, at: lib.PeftModel.from_pretrained(
        base(), str(at / "none")
    ),
    "a name that is nothing's": lambda lib, at: lib.PeftModel.from_pretrained(
        base(), "no such thing"
    ),
    "a folder without vectors": lambda lib, at: lib.PeftModel.from_pretrained(
        base(), at / "no_weights"
    ),
    "a folder without a config": lambda lib, at: lib.PeftModel.from_pretrained(
        base(), at / "no_config"
    ),
    "a folder whose config is not JSON": lambda lib, at: lib.PeftModel.from_pretrained(
        base(), at / "not_json"
    ),
    "a folder with another kind of adapter": lambda lib, at: lib.PeftModel.from_pretrained(
        base(), at / "nonsense"
    ),
    "a folder of another model's adapter": lambda lib, at: lib.PeftModel.from_pretrained(
        base(), at / "wide"
    ),
    "a subfolder that is not there": lambda lib, at: lib.PeftModel.from_pretrained(
        base(), at / "good", subfolder="nope"
    ),
    "a further adapter that is not there": lambda lib, at: model(lib).load_adapter(
        str(at / "none"), "x"
    ),
    "a further adapter of another model": lambda lib, at: model(lib).load_adapter(at / "wide", "x"),
    "a config that is not there": lambda lib, at: lib.IA3Config.from_pretrained(str(at / "none")),
    "a config's file that is not there": lambda lib, at: lib.IA3Config.from_json_file(
        str(at / "none.json")
    ),
    "vectors that are not there": lambda lib, at: lib.load_peft_weights(str(at / "none")),
    "the state of a model without adapters": lambda lib, at: lib.get_layer_status(base()),
    "the state of such a model as a whole": lambda lib, at: lib.get_model_status(base()),
    "a kind that cannot be injected": lambda lib, at: lib.inject_adapter_in_model(
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), base()
    ),
    "adapters of several kinds": lambda lib, at: lib.get_peft_model(
        base(), lib.IA3Config(), mixed=True
    ),
    "a model of several kinds": lambda lib, at: lib.PeftMixedModel(base(), lib.IA3Config()),
    "a base model that is not there": lambda lib, at: lib.AutoPeftModelForCausalLM.from_pretrained(
        str(at / "none")
    ),
    "an adapter of another task": lambda lib, at: lib.AutoPeftModelForSeq2SeqLM.from_pretrained(
        str(at / "good")
    ),
}


def of_python(kind):
    """The nearest class of Python's own that a class of errors is."""
    return next(each for each in kind.__mro__ if vars(builtins).get(each.__name__) is each)


@pytest.mark.parametrize("misuse", MISUSE)
def test_what_pefts_raises_for_a_misuse_catches_what_is_raised_here(misuse, folder):
    raised = []
    for lib in (peft, ia3):
        with pytest.raises(Exception) as caught:
            MISUSE[misuse](lib, Path(folder))
        raised.append(caught.value)
    theirs, ours = raised
    assert isinstance(ours, ia3.IA3Error)
    assert isinstance(ours, of_python(type(theirs)))
    assert of_python(type(theirs)) is not Exception


def test_what_peft_takes_and_is_refused_here_is_a_value_error_too():
    # PEFT passes over these names in silence, or fails later.
    calls = [
        lambda: model(ia3).merge_adapter(["nope"]),
        lambda: model(ia3).set_requires_grad("nope"),
        lambda: model(ia3).add_weighted_adapter(["default"], [1, 2], "new"),
        lambda: two_copies(ia3).set_adapter(["default", "b"]),
        lambda: ia3.cast_mixed_precision_params(model(ia3), torch.int32),
    ]
    for call in calls:
        with pytest.raises(ValueError) as caught:
            call()
        assert isinstance(caught.value, ia3.IA3Error)
