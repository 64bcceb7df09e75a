"""Adapters that come and go: what is kept between two loads never shows."""

import pytest
import torch
from safetensors.torch import load_file, save
from support.pairs import adapted, logits
from support.snapshots import hooks_on

from ia3 import IA3Config, IA3Error, IA3Model
from ia3.adapter.files import read_adapter

KEYS = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
QUERIES = {**KEYS, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture
def folders(tmp_path, make_model):
    """Three adapters of the tiny LLaMA: two on the same modules, the third on others."""
    for number, config in enumerate([KEYS, KEYS, QUERIES]):
        model = adapted(make_model("llama"), number, **config)
        model.save_pretrained(tmp_path / str(number))
    return [tmp_path / str(number) for number in range(3)]


@pytest.fixture
def model(folders, tiny_llama):
    """The first adapter, and another one of its kind that was loaded after it."""
    model = IA3Model.from_pretrained(tiny_llama, folders[0])
    model.load_adapter(folders[1], "second")
    return model


def test_every_way_to_an_adapter_computes_the_same(model, folders, make_model, make_inputs):
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


def test_a_refused_adapter_leaves_nothing(model, folders, make_inputs):
    keys, before = list(model.state_dict()), logits(model, **make_inputs("llama"))
    path = folders[1] / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.layers.1.mlp.down_proj.ia3_l"] = torch.ones(1, 3)
    path.write_bytes(save(tensors))
    with pytest.raises(IA3Error, match=r"layers\.1\.mlp\.down_proj.*\[1, 3\].*\[1, 48\]"):
        model.load_adapter(folders[1], "third")
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model, **make_inputs("llama")), before)


def test_pickled_vectors_that_share_their_memory(folders, tiny_llama):
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


def test_gradients_that_were_asked_for_everywhere(model):
    model.requires_grad_(True)
    model.set_adapter("second")
    assert all(vector.requires_grad for vector in model.vectors("second").values())
    assert not any(vector.requires_grad for vector in model.vectors("default").values())


def test_an_adapter_that_trains_after_loading_has_gradients(model, folders, make_inputs):
    model.load_adapter(folders[1], "third", is_trainable=True)
    model.set_adapter("third")
    model(**make_inputs("llama")).loss.backward()
    assert all(vector.grad.abs().sum() > 0 for vector in model.vectors("third").values())


def test_loading_for_inference_ends_training_mode_everywhere(model, folders):
    model.model.model.layers[1].mlp.train()
    model.load_adapter(folders[1], "third", is_trainable=True)
    assert model.model.model.layers[1].mlp.training
    model.load_adapter(folders[1], "fourth")
    assert not any(module.training for module in model.modules())


def test_a_file_does_not_tell_how_its_adapter_was_loaded(model, folders, tmp_path, make_model):
    model.load_adapter(folders[2], "other-sites")
    added = IA3Model(make_model("llama"), IA3Config(**QUERIES))
    stored = read_adapter(folders[1])
    added.add_adapter("second", stored.config, vectors=stored.vectors)
    first = IA3Model.from_pretrained(make_model("llama"), folders[1], "second")
    in_place = IA3Model.from_pretrained(make_model("llama"), folders[0], "second")
    in_place.load_adapter(folders[1], "second")
    for number, way in enumerate((model, added, first, in_place)):
        way.save_pretrained(tmp_path / f"saved-{number}", adapter_name="second")
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            written = (tmp_path / f"saved-{number}" / name).read_bytes()
            assert written == (folders[1] / name).read_bytes()
