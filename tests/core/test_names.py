"""Names of modules without what wrappers around them put in."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from ia3.core.names import module_at, modules_of, own_name, own_names, put_module, unwrapped


def compiled(module):
    return torch.compile(module, backend="eager")


@pytest.fixture
def blocks():
    return [nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2)]


@pytest.fixture
def model(blocks):
    """A compiled model, its second block in two wrappers and a linear layer of that in one."""
    blocks[1][0] = checkpoint_wrapper(blocks[1][0])
    inside = checkpoint_wrapper(blocks[1])
    return compiled(nn.ModuleDict({"layers": nn.ModuleList([blocks[0], compiled(inside)])}))


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("", ""),
        ("_orig_mod", ""),
        ("layers.0._checkpoint_wrapped_module.attn.weight", "layers.0.attn.weight"),
        ("_fsdp_wrapped_module.model._fsdp_wrapped_module.head", "model.head"),
        ("_orig_mod.layers.3._orig_mod._checkpoint_wrapped_module.mlp", "layers.3.mlp"),
        # Names that only look like it.
        ("my_orig_mod.x", "my_orig_mod.x"),
        ("module._orig_modern", "module._orig_modern"),
    ],
)
def test_own_name(name, own):
    assert own_name(name) == own


def test_what_is_wrapped_stands_for_its_wrappers(model, blocks):
    found = modules_of(model)
    names = ["", "layers", "layers.0", "layers.0.0", "layers.0.1"]
    assert list(found) == [*names, "layers.1", "layers.1.0", "layers.1.1"]
    assert found["layers.1"] is blocks[1]
    assert type(found["layers.1.0"]) is nn.Linear
    for name, module in found.items():
        assert module_at(model, name) is module
        assert unwrapped(module) is module
    assert own_names(model.state_dict()).keys() == own_names(dict(model.named_parameters())).keys()
    for absent in ("layers.2", "layers.1.0.weight", "layers.1._orig_mod.x"):
        with pytest.raises(AttributeError):
            module_at(model, absent)


@pytest.mark.parametrize("name", ["layers.0.1", "layers.1", "layers.1.0", "layers.1.1"])
def test_a_module_is_replaced_within_its_wrappers(model, name):
    before = modules_of(model)
    raw = {key for key, module in model.named_modules() if module is before[name]}
    new = nn.Linear(2, 2)
    put_module(model, name, new)
    after = modules_of(model)
    assert after[name] is new
    inside = {key for key in before if key.startswith(f"{name}.")}
    assert {key for key in before if after.get(key) is not before[key]} == {name, *inside}
    assert {key for key, module in model.named_modules() if module is new} == raw
