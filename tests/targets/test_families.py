"""Anyone's model: what public code rescales in many families attaches, trains, saves and merges.

What is refused instead is refused by a sentence that helps. PEFT and the plain product of the
weights are the oracles, and lists of the paper's sites written from the modeling files.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from support.families import FAMILIES, Choice, Family, Inputs, build
from support.pairs import randomize, relative, vectors
from torch import Tensor, nn

import ia3
from ia3 import IA3Config, IA3Error
from ia3.targets.architectures import ARCHITECTURES
from ia3.targets.resolve import resolve

LISTS = [
    pytest.param(name, choice, id=f"{name}: {choice.targets[:40]}")
    for name, family in FAMILIES.items()
    for choice in family.choices
]


def outputs(result: Any) -> Iterator[Tensor]:
    """All numbers that a model answers with, caches apart."""
    if isinstance(result, Tensor):
        if result.is_floating_point() and result.numel():
            yield result
    elif isinstance(result, dict | list | tuple):
        for part in result.values() if isinstance(result, dict) else result:
            yield from outputs(part)


def answer(model: nn.Module, inputs: Inputs) -> Tensor:
    return torch.cat([part.flatten() for part in outputs(model(**inputs))])


def loss_of(answer: Tensor) -> Tensor:
    return (answer * torch.linspace(0, 40, len(answer)).cos()).mean()


def check_training(model: ia3.IA3Model, inputs: Inputs, idle: tuple[str, ...]) -> None:
    """A step of gradient descent goes down, by every vector whose module a call reaches."""
    trained = vectors(model)
    before = loss_of(answer(model, inputs))
    before.backward()
    still = {name for name, v in trained.items() if v.grad is None or not v.grad.any()}
    assert still == {name for name in trained if any(end in name for end in idle)}
    squares = sum(v.grad.square().sum() for v in trained.values() if v.grad is not None)
    with torch.no_grad():
        for vector in trained.values():
            if vector.grad is not None:
                vector -= 0.02 / squares.sqrt() * vector.grad
        after = loss_of(answer(model, inputs))
    # As far as the gradient says, within a few tenths.
    assert 0.3 < (before - after) / (0.02 * squares.sqrt()) < 1.7


def check(base: nn.Module, inputs: Inputs, config: IA3Config, folder: Any, choice: Choice) -> None:
    plain, again, peer = (copy.deepcopy(base) for _ in range(3))
    model = ia3.get_peft_model(base, config)
    model.eval()
    for vector in vectors(model).values():
        vector.requires_grad_(True)  # also in inference mode
    with torch.no_grad():
        assert relative(answer(model, inputs), answer(plain, inputs)) < 1e-5
    randomize(vectors(model))
    check_training(model, inputs, choice.idle)
    with torch.no_grad():
        found = answer(model, inputs)
        assert relative(found, answer(plain, inputs)) > 1e-4
        model.save_pretrained(folder)
        loaded = ia3.PeftModel.from_pretrained(again, folder).eval()
        assert relative(answer(loaded, inputs), found) < 1e-6
        if choice.peft:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                theirs = peft.PeftModel.from_pretrained(peer, folder).eval()
            assert relative(answer(theirs, inputs), found) < 1e-5
        if choice.idle:
            return  # where a module is never called, its weights cannot take a vector
        merged = model.merge_and_unload()
        assert relative(answer(merged, inputs), found) < 1e-5


@pytest.mark.parametrize(("name", "choice"), LISTS)
def test_users_own_lists(name: str, choice: Choice, tmp_path: Any) -> None:
    base, inputs = build(name), FAMILIES[name].inputs
    if choice.refused:
        with pytest.raises(IA3Error) as error:
            ia3.get_peft_model(base, IA3Config(**choice.config()))
        assert choice.refused in str(error.value)
        return
    check(base, inputs, IA3Config(**choice.config()), tmp_path, choice)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_papers_sites(name: str, tmp_path: Any) -> None:
    family, base = FAMILIES[name], build(name)
    if family.refused:
        with pytest.raises(IA3Error) as error:
            resolve(base, IA3Config(paper_sites=True))
        assert family.refused in str(error.value)
        assert "target_modules" in str(error.value)
        return
    _, targets = resolve(base, IA3Config(paper_sites=True))
    assert {target.name: target.side for target in targets} == family.named_sites()
    inner = any(target.side == "inner" for target in targets)
    frozen = any(target.frozen for target in targets)
    choice = Choice("", idle=family.idle, peft=family.peft and not (inner or frozen))
    check(base, family.inputs, IA3Config(paper_sites=True), tmp_path, choice)
