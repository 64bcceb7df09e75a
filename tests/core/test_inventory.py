"""What adapters have put on a model is found anew where the model has changed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from support.pairs import randomize
from support.tfew import tiny_llama
from support.two_adapters import output, wide_and_narrow
from torch import nn

from ia3 import IA3Config, IA3Error, IA3Model
from ia3.core.inventory import sites
from ia3.core.saved_modules import SavedModule
from ia3.core.sites import Site

CONFIG = IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[])


def names(model: IA3Model) -> list[str]:
    return list(model.vectors("default"))


def test_a_replaced_block_takes_its_sites_with_it():
    model = IA3Model(tiny_llama(), CONFIG)
    before = names(model)
    model.set_adapter("default")
    model.model.model.layers[0] = nn.Identity()
    assert names(model) == [name for name in before if "layers.0." not in name]
    assert names(model) == [name for name, _, _ in sites(model.model)]


def test_a_replaced_layer_and_its_return():
    model = IA3Model(tiny_llama(), CONFIG)
    before = names(model)
    attention = model.model.model.layers[1].self_attn
    held = attention.k_proj
    attention.k_proj = nn.Linear(32, 16, bias=False)
    assert names(model) == [n for n in before if n != "model.layers.1.self_attn.k_proj"]
    attention.k_proj = held
    assert sorted(names(model)) == sorted(before)


def test_adapters_with_other_sites_come_and_go():
    model = IA3Model(tiny_llama(), CONFIG)
    other = IA3Config(target_modules=["q_proj", "v_proj"], feedforward_modules=[])
    model.add_adapter("other", other)
    assert list(model.vectors("other")) == [n.replace("k_proj", "q_proj") for n in names(model)]
    model.delete_adapter("other")
    assert [name for name, _, _ in sites(model.model)] == names(model)


def merged(model):
    model.merge_adapter()
    model.unmerge_adapter()


def disabled(model):
    with model.disable_adapter():
        pass


def routed(model):
    with model.route(["narrow", "wide"]):
        pass


def replaced(model):
    """By another adapter of the name, with fewer sites."""
    active = model.active_adapters
    model.set_adapter("wide")
    model.delete_adapter("other")
    model.add_adapter("other", NARROW)
    model.set_adapter(active)


NARROW = IA3Config(target_modules=["v_proj"], feedforward_modules=[])
WIDE = IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"])


@pytest.mark.parametrize(
    "between",
    [IA3Model.fuse_mlp, merged, disabled, routed, replaced, IA3Model.unfuse_mlp],
    ids=lambda change: change.__name__,
)
def test_only_what_is_active_multiplies(between: Callable[[IA3Model], object]):
    """Whichever adapters were active before, and whatever was done since."""
    ids = torch.arange(10).reshape(2, 5)
    model = IA3Model(tiny_llama(), WIDE, "wide")
    for name, config in (("other", WIDE), ("narrow", NARROW)):
        model.add_adapter(name, config)
    for seed, name in enumerate(model.peft_config):
        randomize(model.vectors(name), seed)

    def expected(*names):
        base = tiny_llama()
        for name in names:
            alone = IA3Model(base, model.peft_config[name], vectors=model.vectors(name))
            base = alone.merge_and_unload()
        return base(ids).logits.detach()

    for order in (["wide", "other", "narrow", "wide"], ["narrow", "wide", "other"]):
        for name in order:
            model.set_adapter(name)
            torch.testing.assert_close(model(ids).logits.detach(), expected(name))
            between(model)
            torch.testing.assert_close(model(ids).logits.detach(), expected(name))
        model.set_adapter(["narrow", "wide"])
        torch.testing.assert_close(model(ids).logits.detach(), expected("narrow", "wide"))


def test_dicts_of_parameters_that_were_replaced():
    """DeepSpeed gives each module a dict of its own."""
    model = wide_and_narrow()
    for module in model.modules():
        module._parameters = OrderedDict(module._parameters)  # type: ignore[assignment]
    model.delete_adapter("narrow")
    # Where the other one has its own.
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    model.add_adapter("narrow", config)
    model.set_adapter("narrow")
    plain = output(model)
    assert all(vector.requires_grad for vector in model.vectors("narrow").values())
    assert not any(vector.requires_grad for vector in model.vectors("wide").values())
    for vector in model.vectors("narrow").values():
        vector.data.fill_(2)
    assert not torch.equal(output(model), plain)


def test_shallow_copies_for_several_gpus_are_refused():
    config = IA3Config(
        target_modules=["q_proj"], feedforward_modules=[], modules_to_save=["lm_head"]
    )
    model = IA3Model(tiny_llama(), config)
    held = [module for module in model.modules() if isinstance(module, Site | SavedModule)]
    assert {type(module) for module in held} == {Site, SavedModule}
    for module in held:
        # As torch.nn.parallel.replicate does with every module of the model, for every GPU.
        with pytest.raises(IA3Error, match="torchrun"):
            module._replicate_for_data_parallel()
