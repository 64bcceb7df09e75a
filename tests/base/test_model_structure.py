"""A base model's structure: adapters fit it or not as they do the model, and it takes no memory."""

from __future__ import annotations

import pytest
import torch
from support.pairs import randomize, vectors
from support.served import save_language_model
from support.tfew import T5, random_model
from transformers import AutoModelForCausalLM, GenerationConfig, T5Config

import ia3
from ia3.adapter.fingerprint import fingerprint
from ia3.base.structure import load_structure, model_folder
from ia3.errors import BrokenFileError, IA3Error, MissingFileError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_language_model(tmp_path_factory.mktemp("structure") / "model")


def test_linear_layers_have_no_values_and_the_others_are_views_of_the_file(folder):
    structure = load_structure("a-name", folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert structure.name == structure.model.config._name_or_path == "a-name"
    for name, parameter in model.named_parameters():
        found = structure.model.get_parameter(name)
        assert found.shape == parameter.shape
        if "proj" in name or "lm_head" in name:
            assert found.device.type == "meta"
        else:
            assert torch.equal(found, parameter)


def test_an_adapter_is_checked_as_on_the_model(folder, tmp_path):
    model = ia3.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), ia3.IA3Config())
    randomize(vectors(model), 0)
    model.save_pretrained(tmp_path / "adapter")
    structure = load_structure(folder, folder)
    bank = ia3.AdapterBank(structure.model, capacity=2, device="cpu")
    bank.add("a", tmp_path / "adapter")
    values = bank.gather(["a"], [0])
    sites = bank.model.routes.sites()
    for name, vector in vectors(model).items():
        assert torch.equal(values[sites[name]][0], vector.detach().reshape(-1))
    assert fingerprint(model.get_base_model()).difference(structure.model) is None
    other = save_language_model(tmp_path / "other", seed=1)
    found = fingerprint(AutoModelForCausalLM.from_pretrained(other)).difference(structure.model)
    assert found is not None
    assert "are not those of the adapter's base model" in found


def test_the_generation_config_is_the_one_of_the_folder(tmp_path):
    folder = save_language_model(tmp_path / "model")
    GenerationConfig(eos_token_id=[5, 6], repetition_penalty=1.5).save_pretrained(folder)
    config = load_structure("m", folder).model.generation_config
    assert config.eos_token_id == [5, 6]
    assert config.repetition_penalty == 1.5


def test_what_is_no_decoder_alone_is_refused(tmp_path):
    random_model(T5Config(**T5)).save_pretrained(tmp_path / "t5")
    with pytest.raises(IA3Error, match="has an encoder and a decoder"):
        load_structure("t5", str(tmp_path / "t5"))
    (tmp_path / "t5/config.json").write_text("{")
    with pytest.raises((BrokenFileError, IA3Error)):
        load_structure("t5", str(tmp_path / "t5"))


def test_the_folder_of_a_model_that_is_nowhere_is_an_error(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MissingFileError, match="no model at 'no/model'"):
        model_folder("no/model")
