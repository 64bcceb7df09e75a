"""Adapters on disk: round trips, files that are broken or foreign, and failed writes."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from conftest import VOCABULARY, MakeModel
from safetensors.torch import load_file
from support.disks import full_disk
from support.pairs import adapted, randomize, vectors
from transformers import AutoModelForCausalLM, PreTrainedModel

from ia3 import IA3Config, IA3Model

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
K_PROJ = "base_model.model.model.layers.0.self_attn.k_proj.ia3_l"


@pytest.fixture
def adapter(tmp_path: Path, make_model: MakeModel) -> Path:
    """The folder of an adapter for the tiny LLaMA."""
    folder = tmp_path / "adapter"
    adapted(make_model("llama")).save_pretrained(folder)
    return folder


# -- the config ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(),
        IA3Config(task_type="CAUSAL_LM", target_modules="all-linear", feedforward_modules=[]),
        IA3Config(
            target_modules=["k", "v", "wo"],
            feedforward_modules=("wo",),
            exclude_modules=r"decoder\..*",
            base_model_name_or_path="some/model",
            revision="abc",
            init_ia3_weights=False,
        ),
    ],
)
def test_config_round_trip(config: IA3Config, tmp_path: Path) -> None:
    path = tmp_path / CONFIG
    path.write_text(config.to_json(), "utf-8")
    assert IA3Config.from_json(path) == config
    assert IA3Config.from_json(path).to_json() == config.to_json()


# -- the vectors -----------------------------------------------------------------------------------


def test_vectors_round_trip_bit_for_bit(tmp_path: Path, make_model: MakeModel) -> None:
    model = adapted(make_model("t5"))
    model.save_pretrained(tmp_path / "deep" / "er")
    loaded = IA3Model.from_pretrained(make_model("t5"), tmp_path / "deep" / "er")
    expected = model.vectors("default")
    found = loaded.vectors("default")
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not any(vector.requires_grad for vector in found.values())
    trained = IA3Model.from_pretrained(make_model("t5"), tmp_path / "deep/er", is_trainable=True)
    assert all(vector.requires_grad for vector in trained.vectors("default").values())


def test_entries_that_match_nothing_do_not_keep_an_adapter_from_loading(adapter, make_model):
    """PEFT writes such configs for models where only some of the names occur."""
    path = adapter / CONFIG
    config = json.loads(path.read_text())
    config["target_modules"] = ["k_proj", "v_proj", "down_proj", "fc2"]
    path.write_text(json.dumps(config))
    loaded = IA3Model.from_pretrained(make_model("llama"), adapter)
    expected = load_file(adapter / WEIGHTS)
    found = loaded.vectors("default")
    assert len(found) == len(expected)
    assert torch.equal(found["model.layers.0.self_attn.k_proj"], expected[K_PROJ])


@pytest.mark.parametrize("name", ["no/such", "no/such/folder/at/all"])
def test_no_such_adapter(tiny_llama: PreTrainedModel, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="no/such"):
        IA3Model.from_pretrained(tiny_llama, name)


# -- writing ---------------------------------------------------------------------------------------


def test_a_file_where_the_folder_should_be(tmp_path: Path, tiny_llama: PreTrainedModel) -> None:
    path = tmp_path / "taken"
    path.write_text("mine")
    with pytest.raises(NotADirectoryError, match="taken"):
        adapted(tiny_llama).save_pretrained(path)
    assert path.read_text() == "mine"


# The weights fail at the first limit; at the second, the config would be the only file left.
@pytest.mark.parametrize("limit", [1000, 100])
def test_a_failed_write_changes_nothing(tmp_path: Path, make_model: MakeModel, limit: int) -> None:
    model = adapted(make_model("llama"))
    model.save_pretrained(tmp_path / "before")
    before = {p.name: p.read_bytes() for p in (tmp_path / "before").iterdir()}
    assert len(before[WEIGHTS]) > 1000 > len(before[CONFIG]) > 100
    randomize(vectors(model), seed=7)
    for name in ("before", "new"):
        with full_disk(limit), pytest.raises(OSError):
            model.save_pretrained(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["before"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "before").iterdir()} == before


@pytest.mark.parametrize("rescaled", ["k_proj", "lm_head"])
def test_pefts_files_with_embeddings_in_them(make_model, make_inputs, tmp_path, rescaled):
    """PEFT puts embeddings beside the vectors where tokens were added or the head is rescaled."""

    def base() -> PreTrainedModel:
        make_model("llama").save_pretrained(tmp_path / "base")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        if rescaled != "lm_head":
            torch.manual_seed(1)
            model.resize_token_embeddings(VOCABULARY + 3)
        return model

    config = peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=[rescaled],
        feedforward_modules=[],
        init_ia3_weights=False,
    )
    theirs = peft.get_peft_model(base(), config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours = IA3Model.from_pretrained(base(), tmp_path / "adapter")
    inputs = make_inputs("llama")
    with torch.no_grad():
        assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)
