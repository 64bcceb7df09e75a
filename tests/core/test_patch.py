"""Patched forwards: they stack, come off in any order, and are copied with their module."""

import copy
import inspect
import itertools
import pickle
from types import MethodType

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn

from ia3.core.patch import Patch, patch, patched, patches, rebound


class Adds:
    """Adds a number to what the forward below gives."""

    handle: Patch

    def __init__(self, module: nn.Module, number: float) -> None:
        self.number = number
        self.handle = patch(module, self)

    def __call__(self, input: Tensor) -> Tensor:
        return self.handle.below(input) + self.number


class Doubles(Adds):
    def __call__(self, input: Tensor) -> Tensor:
        return 2 * self.handle.below(input)


class Weighs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(3.0))

    def forward(self, input: Tensor) -> Tensor:
        return input * self.weight


ONE = torch.ones(())


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("accelerated", ["before", "between", "after", "never"])
def test_patches_come_off_in_any_order(order, accelerated):
    module = Weighs()
    if accelerated == "before":
        add_hook_to_module(module, ModelHook())
    stack = [Adds(module, 1), Adds(module, 10)]
    if accelerated == "between":
        add_hook_to_module(module, ModelHook())
    stack.append(Adds(module, 100))
    if accelerated == "after":
        add_hook_to_module(module, ModelHook())
    expected = 3 + 111
    for turn, place in enumerate(order):
        assert module(ONE) == expected
        if turn == 1 and accelerated != "never":
            remove_hook_from_module(module)
            assert module(ONE) == expected
        stack[place].handle.remove()
        stack[place].handle.remove()
        expected -= int(stack[place].number)
    assert module(ONE) == 3
    assert not list(patches(module))
    if accelerated == "never":
        assert "forward" not in module.__dict__


def test_a_removed_patch_that_is_held_elsewhere_runs_the_forward_below():
    module = Weighs()
    added = Adds(module, 1)
    held = module.forward
    module.forward = lambda input: held(input) * 10
    added.handle.remove()
    assert module(ONE) == 30


@pytest.mark.parametrize(
    ("way", "accelerated"),
    # accelerate's own forward is a local function, which cannot be pickled.
    [("copied", False), ("copied", True), ("pickled", False)],
)
def test_a_copy_of_a_module_has_patches_of_its_own(way, accelerated):
    module = Weighs()
    Adds(module, 1)
    Doubles(module, 0)
    if accelerated:
        add_hook_to_module(module, ModelHook())
    twin = copy.deepcopy(module) if way == "copied" else pickle.loads(pickle.dumps(module))
    with torch.no_grad():
        twin.weight.fill_(5.0)
    assert (module(ONE), twin(ONE)) == (8, 12)
    own = patched(twin, Doubles)
    assert own.module is twin
    own.remove()
    assert (module(ONE), twin(ONE)) == (8, 6)


def test_the_forwards_signature_stays_what_it_was():
    module = Weighs()
    before = inspect.signature(module.forward)
    Adds(module, 1)
    Adds(module, 2)
    assert inspect.signature(module.forward) == before


def test_the_forward_below_can_be_run_on_a_shallow_copy():
    module, twin = Weighs(), Weighs()
    Adds(module, 1)
    with torch.no_grad():
        twin.weight.fill_(7.0)
    forward = rebound(module.forward, module, twin)
    assert forward(ONE) == 7
    module.forward = lambda input: input
    Adds(module, 1)
    assert rebound(module.forward, module, twin) is None


def test_a_patch_that_was_bound_to_its_module_works_and_comes_off():
    """accelerate does so with the forward that it takes its autocast wrapper off."""
    module = nn.Linear(3, 3)
    values = torch.ones(2, 3)
    expected = module(values)
    handle = Adds(module, 1.0).handle
    module.forward = MethodType(module.forward, module)
    assert torch.equal(module(values), expected + 1)
    assert patched(module, Adds) is handle
    handle.remove()
    assert torch.equal(module(values), expected)
