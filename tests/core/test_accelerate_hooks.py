"""Models whose weights accelerate keeps elsewhere between two calls: in memory or on a disk."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from support.architectures import build
from support.pairs import adapted, logits, randomize, relative, vectors
from torch import nn
from transformers import PreTrainedModel

from ia3 import IA3Config, IA3Error, IA3Model

DEVICES = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


def all_in_memory(model: PreTrainedModel, folder: Path) -> None:
    cpu_offload(model, execution_device=torch.device("cpu"))


def partly_on_disk(model: PreTrainedModel, folder: Path) -> None:
    dispatch_model(model, DEVICES, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def layer_by_layer(model: PreTrainedModel, folder: Path) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", offload=True))


def in_place(model: PreTrainedModel, folder: Path) -> None:
    """Nothing is offloaded, but every call goes through a hook of accelerate's."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            hook = AlignDevicesHook(execution_device="cpu", io_same_device=True)
            add_hook_to_module(module, hook)


WAYS: dict[str, Callable[[PreTrainedModel, Path], object]] = {
    "in memory": all_in_memory,
    "partly on disk": partly_on_disk,
    "layer by layer": layer_by_layer,
    "in place": in_place,
}
EVERY_WAY = pytest.mark.parametrize("way", WAYS)
OFFLOADING_WAYS = pytest.mark.parametrize("way", [way for way in WAYS if way != "in place"])


def hooks(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Module name -> identities of accelerate's hook on it and of the forward it put there."""
    return {
        name: (id(module._hf_hook), id(module.__dict__["forward"]))
        for name, module in model.named_modules()
        if hasattr(module, "_hf_hook") and "ia3_l" not in name
    }


@pytest.fixture
def inputs(make_inputs):
    return make_inputs("llama")


@pytest.fixture
def plain(make_model):
    """The same adapter on a model that is not offloaded."""
    return adapted(make_model("llama"))


@pytest.mark.parametrize("dispatched_first", [True, False])
@EVERY_WAY
def test_adapting_offloaded_weights(plain, make_model, inputs, way, dispatched_first, tmp_path):
    base = make_model("llama")
    base_logits, expected = logits(base, **inputs), logits(plain, **inputs)
    if dispatched_first:
        WAYS[way](base, tmp_path)
    model = adapted(base)
    if not dispatched_first:
        WAYS[way](base, tmp_path)
    before = hooks(base)
    assert torch.equal(logits(model, **inputs), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, **inputs), base_logits)
    if dispatched_first:
        assert {v.device.type for v in model.vectors("default").values()} == {"cpu"}
        model(**inputs).loss.backward()
        plain(**inputs).loss.backward()
        for name, vector in vectors(plain).items():
            assert relative(vectors(model)[name].grad, vector.grad) < 1e-6, name

    model.save_pretrained(tmp_path / "adapter")
    again = IA3Model.from_pretrained(make_model("llama"), tmp_path / "adapter")
    assert torch.equal(logits(again, **inputs), expected)
    assert model.unload() is base
    assert hooks(base) == before
    assert torch.equal(logits(base, **inputs), base_logits)
    loaded = IA3Model.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits(loaded, **inputs), expected)


@OFFLOADING_WAYS
def test_peft_cannot_adapt_an_offloaded_model(make_model, inputs, way, tmp_path):
    """It puts the vectors where the weights seem to be: on the meta device."""
    base = make_model("llama")
    WAYS[way](base, tmp_path)
    theirs = peft.get_peft_model(base, peft.IA3Config())
    with pytest.raises(RuntimeError, match="meta"):
        theirs(**inputs)


# -- merging ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dispatched_first", [True, False])
@EVERY_WAY
def test_merging_offloaded_weights(make_model, inputs, way, dispatched_first, tmp_path):
    base = make_model("llama")
    base_logits = logits(base, **inputs)
    if dispatched_first:
        WAYS[way](base, tmp_path)
    model = adapted(base)
    model.add_adapter("second", IA3Config(target_modules=["q_proj", "v_proj"]))
    randomize(vectors(model, "second"), seed=3)
    if not dispatched_first:
        WAYS[way](base, tmp_path)
    on_disk = {path: path.read_bytes() for path in tmp_path.iterdir()}
    before = hooks(base)
    maps = {id(m._hf_hook.weights_map) for m in base.modules() if hasattr(m, "_hf_hook")}

    expected = logits(model, **inputs)
    model.merge_adapter(safe_merge=True)
    assert relative(logits(model, **inputs), expected) < 1e-6
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    model.unmerge_adapter()
    assert torch.equal(logits(model, **inputs), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, **inputs), base_logits)

    model.set_adapter(["default", "second"])
    expected = logits(model, **inputs)
    model.merge_adapter(["second"])
    assert relative(logits(model, **inputs), expected) < 1e-6
    model.merge_adapter(["default"])
    assert relative(logits(model, **inputs), expected) < 1e-6
    model.unmerge_adapter()
    assert torch.equal(logits(model, **inputs), expected)
    # Nothing is left over the weights, and the files were never written.
    assert {id(m._hf_hook.weights_map) for m in base.modules() if hasattr(m, "_hf_hook")} == maps
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == on_disk

    merged = model.merge_and_unload()
    assert merged is base
    assert hooks(base) == before
    assert relative(logits(base, **inputs), expected) < 1e-6


@OFFLOADING_WAYS
def test_merged_before_and_unmerged_after_dispatching(make_model, inputs, way, tmp_path):
    base = make_model("llama")
    model = adapted(base)
    expected = logits(model, **inputs)
    model.merge_adapter()
    merged = logits(model, **inputs)
    WAYS[way](base, tmp_path)
    assert torch.equal(logits(model, **inputs), merged)
    model.unmerge_adapter()
    assert torch.equal(logits(model, **inputs), expected)


def test_merged_while_offloaded_and_unmerged_after_coming_back(make_model, inputs, tmp_path):
    base = make_model("llama")
    before = copy.deepcopy(base.state_dict())
    layer_by_layer(base, tmp_path)
    model = adapted(base)
    expected = logits(model, **inputs)
    model.merge_adapter()
    merged = logits(model, **inputs)
    remove_hook_from_submodules(base)
    assert {parameter.device.type for parameter in base.parameters()} == {"cpu"}
    assert torch.equal(logits(model, **inputs), merged)
    model.unmerge_adapter()
    assert torch.equal(logits(model, **inputs), expected)
    assert all(torch.equal(base.state_dict()[name], tensor) for name, tensor in before.items())


def test_safe_merge_of_offloaded_weights_is_all_or_nothing(make_model, inputs, tmp_path):
    base = make_model("llama")
    partly_on_disk(base, tmp_path)
    base_logits = logits(base, **inputs)
    model = adapted(base)
    model.vectors("default")["model.layers.1.mlp.down_proj"].data[0, 3] = torch.nan
    with pytest.raises(IA3Error, match=r"layers\.1\.mlp\.down_proj\.weight.*not finite"):
        model.merge_adapter(safe_merge=True)
    with model.disable_adapter():
        assert torch.equal(logits(model, **inputs), base_logits)
    assert torch.equal(logits(model.unload(), **inputs), base_logits)


def test_offloaded_experts_and_embeddings(tmp_path, inputs):
    targets = ["embed_tokens", "k_proj", "experts"]
    modules = {"target_modules": targets, "feedforward_modules": ["experts"]}
    expected = logits(adapted(build("mixtral"), **modules), **inputs)
    base = build("mixtral")
    all_in_memory(base, tmp_path)
    base_logits = logits(base, **inputs)
    model = adapted(base, **modules)
    assert torch.equal(logits(model, **inputs), expected)
    model.merge_adapter()
    assert relative(logits(model, **inputs), expected) < 1e-6
    model.unmerge_adapter()
    assert torch.equal(logits(model, **inputs), expected)
    assert torch.equal(logits(model.unload(), **inputs), base_logits)
