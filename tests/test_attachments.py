"""What adapters have put on a model is found anew where the model has changed."""

from __future__ import annotations

import copy
import pickle

import torch
from tfew_fixtures import tiny_llama
from torch import nn

from ia3 import IA3Config, IA3Model
from ia3.sites import sites

CONFIG = IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[])


def names(model: IA3Model) -> list[str]:
    return list(model.vectors("default"))


def test_a_replaced_block_takes_its_sites_with_it() -> None:
    model = IA3Model(tiny_llama(), CONFIG)
    before = names(model)
    model.set_adapter("default")
    model.model.model.layers[0] = nn.Identity()
    assert names(model) == [name for name in before if "layers.0." not in name]
    assert names(model) == [name for name, _, _ in sites(model.model)]


def test_a_replaced_layer_and_its_return() -> None:
    model = IA3Model(tiny_llama(), CONFIG)
    before = names(model)
    attention = model.model.model.layers[1].self_attn
    held = attention.k_proj
    attention.k_proj = nn.Linear(32, 16, bias=False)
    assert names(model) == [n for n in before if n != "model.layers.1.self_attn.k_proj"]
    attention.k_proj = held
    assert sorted(names(model)) == sorted(before)


def test_adapters_with_other_sites_come_and_go() -> None:
    model = IA3Model(tiny_llama(), CONFIG)
    other = IA3Config(target_modules=["q_proj", "v_proj"], feedforward_modules=[])
    model.add_adapter("other", other)
    assert list(model.vectors("other")) == [n.replace("k_proj", "q_proj") for n in names(model)]
    model.delete_adapter("other")
    assert [name for name, _, _ in sites(model.model)] == names(model)


def test_copies_switch_their_own_adapters() -> None:
    model = IA3Model(tiny_llama(), CONFIG)
    model.add_adapter("second", CONFIG)
    ids = torch.arange(5)[None]
    for vector in model.vectors("second").values():
        vector.data.uniform_(0.2, 2)
    plain = model(ids).logits
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied.set_adapter("second")
        assert not torch.equal(copied(ids).logits, plain)
        assert torch.equal(model(ids).logits, plain)
        for vector in copied.vectors("second").values():
            vector.data.fill_(1)
        assert torch.equal(copied(ids).logits, plain)
        assert any((v != 1).any() for v in model.vectors("second").values())
