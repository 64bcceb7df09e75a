"""Adapters that vLLM cannot serve: an error that says why, and the engine goes on."""

from __future__ import annotations

import logging
import re
import shutil

import pytest

pytest.importorskip("vllm", reason="make test-vllm runs this in an environment with vLLM")

import torch
from peft import IA3Config, get_peft_model
from safetensors.torch import load_file, save_file
from support.vllm_engine import (
    SIZES,
    engine,
    greedy,
    load,
    prompts,
    write_base,
    write_ia3,
    write_lora,
)
from transformers import AutoModelForSequenceClassification, LlamaConfig

import ia3
from ia3 import BrokenFileError, IA3Error, UnknownNameError

pytestmark = pytest.mark.vllm

PROMPT = prompts(1)[0]
LAYER = "base_model.model.model.layers.0"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base("llama", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def good(base, tmp_path_factory):
    return write_ia3(base, tmp_path_factory.mktemp("good"), 0)


@pytest.fixture(scope="module")
def running(base):
    with engine(base, max_loras=2) as running:
        yield running


@pytest.fixture
def changed(good, tmp_path):
    """A function that makes a copy of the good adapter, with other tensors."""

    def make(change):
        folder = shutil.copytree(good, tmp_path / "changed")
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        return folder

    return make


def refused(running, base, good, folder, error, match):
    """Adding the folder raises, nothing of it stays, and a good one is served after it."""
    before = running.llm.llm_engine.list_loras()
    with pytest.raises(error, match=match):
        running.add(folder)
    assert running.llm.llm_engine.list_loras() == before
    assert running.greedy([good, None], [PROMPT] * 2) == [
        greedy(base, good, PROMPT),
        greedy(base, None, PROMPT),
    ]


def test_copies_of_modules(running, base, good, tmp_path):
    folder = write_ia3(base, tmp_path / "copies", 0, modules_to_save=["lm_head"])
    match = r"lm_head.*modules_to_save.*ia3 merge"
    refused(running, base, good, folder, IA3Error, match)


def test_vectors_of_experts(running, base, good, changed):
    folder = changed(lambda t: t.update({f"{LAYER}.mlp.experts.ia3_l": torch.ones(4, 128)}))
    refused(running, base, good, folder, IA3Error, r"experts'.*\[4, 128\].*linear layers")


def test_a_module_that_the_model_has_not(running, base, good, changed):
    folder = changed(lambda t: t.update({f"{LAYER}.self_attn.k_prj.ia3_l": torch.ones(64, 1)}))
    match = r"k_prj' is no linear layer of LlamaForCausalLM.*did you mean.*k_proj"
    refused(running, base, good, folder, UnknownNameError, match)


def test_the_output_layer(running, base, good, changed):
    folder = changed(lambda t: t.update({"base_model.model.lm_head.ia3_l": torch.ones(128, 1)}))
    refused(running, base, good, folder, UnknownNameError, r"'lm_head' is no linear layer")


def test_a_vector_of_another_width(running, base, good, changed):
    folder = changed(lambda t: t.update({f"{LAYER}.self_attn.k_proj.ia3_l": torch.ones(128, 1)}))
    match = r"k_proj' has 128 values, expected 64.*output.*another base model"
    refused(running, base, good, folder, IA3Error, match)


def test_an_inner_vector_of_another_width(running, base, good, changed):
    folder = changed(lambda t: t.update({f"{LAYER}.mlp.down_proj.ia3_l": torch.ones(1, 100)}))
    match = r"down_proj' has 100 values, expected 192.*input"
    refused(running, base, good, folder, IA3Error, match)


def test_an_input_that_other_projections_share(running, base, good, tmp_path):
    folder = write_ia3(
        base, tmp_path / "in", 0, target_modules=["up_proj"], feedforward_modules=["up_proj"]
    )
    match = r"up_proj' is on its input.*together with 'gate_proj'"
    refused(running, base, good, folder, IA3Error, match)


def test_a_file_that_was_cut_short(running, base, good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "short")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(running, base, good, folder, BrokenFileError, "adapter_model.safetensors")


def test_an_infinite_value(running, base, good, changed):
    folder = changed(lambda t: t[f"{LAYER}.mlp.down_proj.ia3_l"].fill_(torch.inf))
    refused(running, base, good, folder, IA3Error, "not finite")


def test_a_config_that_is_no_json(running, base, good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "text")
    (folder / "adapter_config.json").write_text("vectors")
    refused(running, base, good, folder, BrokenFileError, "adapter_config.json")


def test_a_folder_that_is_not_there_is_refused_as_vllm_does(running, base, good, tmp_path):
    from vllm.exceptions import LoRAAdapterNotFoundError

    refused(running, base, good, tmp_path / "none", LoRAAdapterNotFoundError, "none")


def test_a_lora_that_vllm_refuses_is_refused_as_before(running, base, good, tmp_path):
    folder = write_lora(base, tmp_path / "wide", 0, r=16)
    refused(running, base, good, folder, ValueError, "LoRA rank 16 is greater than max_lora_rank 8")


def test_the_output_layer_of_a_classification_model(tmp_path):
    """Its rows are requests, and a vector would multiply those of others."""
    config = LlamaConfig(**SIZES, num_labels=4)
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(tmp_path / "base")
    for targets in (["k_proj"], ["k_proj", "score"]):
        given = IA3Config(target_modules=targets, feedforward_modules=[])
        get_peft_model(model, given).save_pretrained(tmp_path / targets[-1])
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    with engine(tmp_path / "base", runner="pooling", convert="classify") as running:
        with pytest.raises(UnknownNameError, match="'score' is the model's output layer"):
            running.add(tmp_path / "score")
        running.add(tmp_path / "k_proj")


def test_modules_that_the_server_leaves_out(base, good):
    with engine(base, lora_target_modules=["k_proj", "v_proj"]) as running:
        with pytest.raises(UnknownNameError, match=r"down_proj'.*--lora-target-modules"):
            running.add(good)
        assert running.greedy([None], [PROMPT]) == [greedy(base, None, PROMPT)]


def test_an_adapter_of_another_base_model_is_served_with_a_warning(running, base, tmp_path, caplog):
    other = write_base("qwen2", tmp_path / "other")
    model = ia3.get_peft_model(load(other), ia3.IA3Config(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "of-other")
    logging.getLogger("vllm").addHandler(caplog.handler)
    try:
        running.add(tmp_path / "of-other")
    finally:
        logging.getLogger("vllm").removeHandler(caplog.handler)
    match = "wrong base model for adapter '.*of-other': its model type is 'llama', .* 'qwen2'"
    assert re.search(match, caplog.text)
