"""Adapters that come and go: what is kept between two loads never shows."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path

import pytest
import torch
from conftest import MakeInputs, MakeModel
from safetensors.torch import load_file, save
from support.pairs import logits
from support.snapshots import hooks_on
from torch import Tensor, nn
from transformers import PreTrainedModel

from ia3 import IA3Config, IA3Error, IA3Model
from ia3.adapter.store import read_adapter

KEYS = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
QUERIES = IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])


def random_adapter(base: PreTrainedModel, config: IA3Config, seed: int) -> IA3Model:
    model = IA3Model(base, config)
    generator = torch.Generator().manual_seed(seed)
    for vector in model.vectors("default").values():
        vector.data.uniform_(0.5, 2, generator=generator)
    return model.eval()


@pytest.fixture
def folders(tmp_path: Path, make_model: MakeModel) -> list[Path]:
    """Three adapters of the tiny LLaMA: two on the same modules, the third on others."""
    for number, config in enumerate([KEYS, KEYS, QUERIES]):
        random_adapter(make_model("llama"), config, number).save_pretrained(tmp_path / str(number))
    return [tmp_path / str(number) for number in range(3)]


@pytest.fixture
def model(folders: list[Path], tiny_llama: PreTrainedModel) -> IA3Model:
    """The first adapter, and another one of its kind that was loaded after it."""
    model = IA3Model.from_pretrained(tiny_llama, folders[0])
    model.load_adapter(folders[1], "second")
    return model


# -- coming and going ------------------------------------------------------------------------------


def test_every_way_to_an_adapter_computes_the_same(
    model: IA3Model, folders: list[Path], make_model: MakeModel, make_inputs: MakeInputs
) -> None:
    inputs = make_inputs("llama")
    model.load_adapter(folders[2], "third")
    model.load_adapter(folders[1], "again")
    alone = [
        logits(IA3Model.from_pretrained(make_model("llama"), folder), **inputs)
        for folder in folders
    ]
    expected = {"default": alone[0], "second": alone[1], "third": alone[2], "again": alone[1]}
    for name in ("third", "default", "third", "second", "third", "again", "default", "second"):
        model.set_adapter(name)
        assert torch.equal(logits(model, **inputs), expected[name])
    layer = model.model.model.layers[0].self_attn
    assert [hooks_on(m) for m in (layer.q_proj, layer.k_proj)] == [0, 1]
    model.set_adapter("third")
    assert [hooks_on(m) for m in (layer.q_proj, layer.k_proj)] == [1, 0]


def test_a_deleted_adapter_is_gone_from_memory(model: IA3Model, folders: list[Path]) -> None:
    for folder in (folders[1], folders[2]):
        model.load_adapter(folder, "short-lived")
        model.set_adapter("short-lived")
        model.set_adapter("default")
        vectors = [weakref.ref(vector) for vector in model.vectors("short-lived").values()]
        model.delete_adapter("short-lived")
        gc.collect()
        assert [vector() for vector in vectors] == [None] * len(vectors)


def test_a_refused_adapter_leaves_nothing(
    model: IA3Model, folders: list[Path], make_inputs: MakeInputs
) -> None:
    keys, before = list(model.state_dict()), logits(model, **make_inputs("llama"))
    path = folders[1] / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.layers.1.mlp.down_proj.ia3_l"] = torch.ones(1, 3)
    path.write_bytes(save(tensors))
    with pytest.raises(IA3Error, match=r"layers\.1\.mlp\.down_proj.*\[1, 3\].*\[1, 48\]"):
        model.load_adapter(folders[1], "third")
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model, **make_inputs("llama")), before)


# -- a model that changes in between ---------------------------------------------------------------


def test_a_new_module_between_two_loads(
    model: IA3Model, folders: list[Path], make_inputs: MakeInputs
) -> None:
    model.set_adapter("second")
    expected = logits(model, **make_inputs("llama"))
    attention = model.model.model.layers[1].self_attn
    new = nn.Linear(32, 16, bias=False)
    new.weight = attention.k_proj.weight
    attention.k_proj = new
    model.load_adapter(folders[1], "third")
    model.set_adapter("third")
    assert torch.equal(logits(model, **make_inputs("llama")), expected)


# -- vectors of their own --------------------------------------------------------------------------


def test_loaded_vectors_train_each_by_itself(
    model: IA3Model, folders: list[Path], make_model: MakeModel, make_inputs: MakeInputs
) -> None:
    inputs = make_inputs("llama")
    plain = IA3Model.from_pretrained(make_model("llama"), folders[1], is_trainable=True)
    plain(**inputs).loss.backward()
    with torch.no_grad():
        for vector in plain.vectors("default").values():
            vector -= 0.1 * vector.grad

    def step(vector: Tensor) -> None:
        with torch.no_grad():
            vector -= 0.1 * vector.grad

    # Each is changed while the backward pass still needs those before it.
    model.set_adapter("second")
    vectors = model.vectors("second")
    for vector in vectors.values():
        vector.register_post_accumulate_grad_hook(step)
    model(**inputs).loss.backward()
    for name, vector in plain.vectors("default").items():
        torch.testing.assert_close(vectors[name], vector)
    assert len({vector.untyped_storage().data_ptr() for vector in vectors.values()}) == len(vectors)


def test_pickled_vectors_that_share_their_memory(
    folders: list[Path], tiny_llama: PreTrainedModel
) -> None:
    tensors = load_file(folders[0] / "adapter_model.safetensors")
    (folders[0] / "adapter_model.safetensors").unlink()
    one = torch.rand(16, 1)
    shared = {key: one if "k_proj" in key else value for key, value in tensors.items()}
    torch.save(shared, folders[0] / "adapter_model.bin")
    model = IA3Model.from_pretrained(tiny_llama, folders[1])
    model.load_adapter(folders[0], "pickled")
    first, second = (v for name, v in model.vectors("pickled").items() if "k_proj" in name)
    first.data.zero_()
    assert torch.equal(second, one)


def test_a_copy_of_a_model_with_loaded_adapters(
    model: IA3Model, folders: list[Path], make_inputs: MakeInputs
) -> None:
    inputs = make_inputs("llama")
    model.set_adapter("second")
    before = logits(model, **inputs)
    twin = copy.deepcopy(model)
    twin.load_adapter(folders[1], "third")
    twin.delete_adapter("default")
    for vector in twin.vectors("second").values():
        vector.data.fill_(1)
    assert torch.equal(logits(model, **inputs), before)
    assert not torch.equal(logits(twin, **inputs), before)
    twin.set_adapter("third")
    assert torch.equal(logits(twin, **inputs), before)
    assert list(model.peft_config) == ["default", "second"]


def test_loaded_vectors_move_with_the_model(model: IA3Model, folders: list[Path]) -> None:
    expected = load_file(folders[1] / "adapter_model.safetensors")
    for dtype, kept in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        model.to(dtype)
        for name, vector in model.vectors("second").items():
            assert vector.dtype == kept
            assert torch.equal(vector.float(), expected[f"base_model.model.{name}.ia3_l"])


def test_gradients_that_were_asked_for_everywhere(model: IA3Model) -> None:
    model.requires_grad_(True)
    model.set_adapter("second")
    assert all(vector.requires_grad for vector in model.vectors("second").values())
    assert not any(vector.requires_grad for vector in model.vectors("default").values())


def test_loading_for_inference_ends_training_mode_everywhere(
    model: IA3Model, folders: list[Path]
) -> None:
    model.model.model.layers[1].mlp.train()
    model.load_adapter(folders[1], "third", is_trainable=True)
    assert model.model.model.layers[1].mlp.training
    model.load_adapter(folders[1], "fourth")
    assert not any(module.training for module in model.modules())


# -- what is written -------------------------------------------------------------------------------


def test_a_file_does_not_tell_how_its_adapter_was_loaded(
    model: IA3Model, folders: list[Path], tmp_path: Path, make_model: MakeModel
) -> None:
    model.load_adapter(folders[2], "other-sites")
    added = IA3Model(make_model("llama"), QUERIES)
    stored = read_adapter(folders[1])
    added.add_adapter("second", stored.config, stored.vectors)
    first = IA3Model.from_pretrained(make_model("llama"), folders[1], "second")
    in_place = IA3Model.from_pretrained(make_model("llama"), folders[0], "second")
    in_place.load_adapter(folders[1], "second")
    for number, way in enumerate((model, added, first, in_place)):
        way.save_pretrained(tmp_path / f"saved-{number}", adapter_name="second")
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            written = (tmp_path / f"saved-{number}" / name).read_bytes()
            assert written == (folders[1] / name).read_bytes()


def test_the_base_models_own_checkpoint_has_no_vectors(
    model: IA3Model, folders: list[Path], tmp_path: Path
) -> None:
    expected = {key for key in model.model.state_dict() if "ia3_l" not in key}
    model.load_adapter(folders[2], "third")
    model.delete_adapter("second")
    model.model.save_pretrained(tmp_path / "base")
    written = set(load_file(tmp_path / "base" / "model.safetensors"))
    assert written == expected
    model.unload()
    assert not any("ia3_l" in key for key in model.model._keys_to_ignore_on_save or ())
