"""Folders of other libraries, in the layouts that these write: the error says whose each is."""

import json

import pytest
from support.snapshots import assert_unchanged, snapshot
from support.tfew import tiny_llama

from ia3 import AutoPeftModel, IA3Config, IA3Error, IA3Model
from ia3.adapter.layout import read_outline

HIDDEN = {"hidden_size": 768, "model_type": "bert"}
# (IA)³ too, but as a LoRA of rank 1 that scales.
ADAPTER_HUB = {
    "config": {"architecture": "lora", "attn_matrices": ["k", "v"], "composition_mode": "scale"},
    "config_id": "a3b7ac6bd4e6d1c5",
    "model_class": "BertAdapterModel",
    "model_name": "bert-base-uncased",
    "name": "tickets",
    "version": "adapters.1.3.0",
    **HIDDEN,
}
MLX = {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": {"rank": 8, "scale": 20.0}}
CONFIGS = {
    "AdapterHub": (ADAPTER_HUB, "AdapterHub's library `adapters`"),
    "mlx-lm": (MLX, "mlx-lm's"),
    "an earlier mlx-lm": ({"lora_parameters": {"rank": 8}, "lora_layers": 16}, "mlx-lm's"),
    "LoRA by hand": ({"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}, "a LoRA adapter's"),
    "PEFT's LoRA": ({"peft_type": "LORA", "r": 8}, "'LORA', expected 'IA3': .*which peft loads"),
    "a model": ({"architectures": ["BertModel"], **HIDDEN}, "a whole model's, which transformers"),
    "nobody's": ({"target_modules": ["k_proj"]}, "it is no config of PEFT's"),
    "empty": ({}, "it is no config of PEFT's"),
}
FOLDERS = {
    "SetFit": (
        ["config.json", "config_setfit.json", "modules.json", "model_head.pkl"],
        "it holds a SetFit model",
    ),
    "sentence-transformers": (["config.json", "modules.json"], "a sentence-transformers model"),
    "a model": (["config.json", "model.safetensors"], "it holds a whole model without an adapter"),
    "a head of AdapterHub": (["head_config.json"], "a prediction head of AdapterHub"),
    "diffusers' LoRA": (["pytorch_lora_weights.safetensors"], "LoRA weights of diffusers"),
    "a run's checkpoints": (
        ["checkpoint-10/adapter_config.json", "checkpoint-20/adapter_config.json", "train.log"],
        r"adapters in its folders \['checkpoint-10', 'checkpoint-20'\]",
    ),
    "empty": ([], "adapter_config.json is not there$"),
}


def read_by_all(folder, error, message):
    base = tiny_llama()
    before = snapshot(base)
    for read in (
        IA3Config.from_pretrained,
        AutoPeftModel.from_pretrained,
        read_outline,
        lambda given: IA3Model.from_pretrained(base, given),
    ):
        with pytest.raises(error, match=message):
            read(folder)
    assert_unchanged(base, before)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_without_pefts_type_says_whose_it_is(tmp_path, kind):
    values, message = CONFIGS[kind]
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    read_by_all(tmp_path, IA3Error, rf"adapter_config\.json.*peft_type.*{message}")


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_without_an_adapter_says_what_it_holds(tmp_path, kind):
    names, message = FOLDERS[kind]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    read_by_all(tmp_path, FileNotFoundError, f"no adapter in {tmp_path}.*{message}")
