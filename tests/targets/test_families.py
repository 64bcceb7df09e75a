"""Anyone's model: what public code rescales in many families attaches, trains, saves and merges.

What is refused instead is refused by a sentence that helps. PEFT and the plain product of the
weights are the oracles, and lists of the paper's sites written from the modeling files.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from peft.utils import constants as of_peft
from support.families import FAMILIES, Choice, Family, Inputs, build
from support.pairs import randomize, relative, vectors
from support.versions import since
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import ia3
from ia3 import IA3Config, IA3Error
from ia3.targets.resolve import resolve


def named_so(family: Family) -> pytest.MarkDecorator:
    return since("transformers", family.since, "its modules have other names")


NAMES = [pytest.param(name, marks=named_so(family)) for name, family in FAMILIES.items()]
LISTS = [
    pytest.param(name, choice, id=f"{name}: {choice.targets[:40]}", marks=named_so(family))
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
    # As far as the gradient says.
    assert 0.8 < (before - after) / (0.02 * squares.sqrt()) < 1.2


def check(base: nn.Module, inputs: Inputs, config: IA3Config, folder: Any, choice: Choice) -> None:
    plain, again, peer = (copy.deepcopy(base) for _ in range(3))
    called: set[str] = set()
    for name, module in plain.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    model = ia3.get_peft_model(base, config).eval()
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
        if vectors(model).keys() - called:
            return  # these cannot be merged: their weights are read, by whom does not show
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


@pytest.mark.parametrize("name", NAMES)
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


@pytest.mark.parametrize("name", NAMES)
def test_the_defaults_are_pefts_or_the_papers_sites(name: str) -> None:
    family, base = FAMILIES[name], build(name)
    model_type = getattr(getattr(base, "config", None), "model_type", None)
    if model_type in of_peft.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = vectors(peft.get_peft_model(copy.deepcopy(base), peft.IA3Config()))
            found = vectors(ia3.get_peft_model(base, IA3Config()))
        # PEFT's name for the feed-forward layers of Mixtral is that of an older transformers.
        found = {name: vector for name, vector in found.items() if not name.endswith(".experts")}
        assert {n: v.shape for n, v in found.items()} == {n: v.shape for n, v in expected.items()}
    elif family.refused:
        with pytest.raises(IA3Error) as error:
            resolve(base, IA3Config())
        assert family.refused in str(error.value)
    else:
        _, targets = resolve(base, IA3Config())
        assert {target.name: target.side for target in targets} == family.named_sites()


LINEAR = ["esm", "dinov2", "clip", "hubert", "mamba 2", "falcon", "llama 4", "deepseek v3", "bert"]


@pytest.mark.parametrize("name", LINEAR)
def test_every_linear_layer(name: str, tmp_path: Any) -> None:
    base, inputs = build(name), FAMILIES[name].inputs
    config = IA3Config(target_modules="all-linear")
    # PEFT takes Llama 4's router, which gives a pair, and fails at the first call.
    choice = Choice("", peft=name != "llama 4", idle=("contact_head.regression", "router"))
    check(base, inputs, config, tmp_path, choice)


# -- what people do besides ------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # PyTorch's, of speed
@pytest.mark.parametrize("name", ["esm", "bert", "gpt-2", "vit", "mixtral"])
def test_gradients_of_each_example_for_differential_privacy(name: str) -> None:
    model = ia3.get_peft_model(build(name), IA3Config())
    randomize(vectors(model))
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}

    def loss(values: dict[str, Tensor], example: Inputs) -> Tensor:
        batch = {key: value[None] for key, value in example.items()}
        return loss_of(functional_call(model, values, (), batch).logits.flatten())

    values, inputs = {key: p.detach() for key, p in trained.items()}, FAMILIES[name].inputs
    found = vmap(grad(loss), in_dims=(None, 0))(values, inputs)
    for row in (0, 1):
        model.zero_grad()
        loss(trained, {key: value[row] for key, value in inputs.items()}).backward()
        for key, parameter in trained.items():
            assert relative(found[key][row], parameter.grad) < 1e-5


def test_ways_to_name_and_to_order() -> None:
    """Names with dashes; model, config and adapter's name in any order."""
    config, name = IA3Config(target_modules=["key"], feedforward_modules=[]), "dna-ia3"
    made = [
        ia3.get_peft_model(build("esm"), config, adapter_name=name),
        ia3.IA3Model(build("esm"), config, name),
        ia3.IA3Model(peft_config=config, model=build("esm"), adapter_name=name),
        ia3.IA3Model(adapter_name=name, model=build("esm"), peft_config={name: config}),
    ]
    for model in made:
        assert list(model.peft_config) == [name]
        assert len(vectors(model, name)) == 2
    made[0].set_adapter(name)
    made[0].delete_adapter(name)


@pytest.mark.parametrize("saved", [["classifier"], ["esm.classifier"]])
def test_a_head_outside_of_the_backbone_cannot_be_saved_with_it(saved: list[str]) -> None:
    backbone = build("nucleotide transformer").base_model
    config = IA3Config(**FAMILIES["nucleotide transformer"].choices[0].config())
    config.modules_to_save = saved
    message = f"modules_to_save: module {saved[0]!r} matches nothing in EsmModel"
    with pytest.raises(IA3Error, match=f"{message}.*is not in the model"):
        ia3.get_peft_model(backbone, config)


@pytest.mark.parametrize("excluded", [None, ["layer1.other"], r".*\.other"])
def test_a_target_that_was_replaced_is_not_in_what_is_saved(excluded: Any, tmp_path: Any) -> None:
    """A head of another size, after the adapter came on: both libraries load what is saved."""
    head = nn.Linear(8, 5)

    def network(*heads: nn.Linear) -> nn.Module:
        made = build("resnet 18")
        for number, name in enumerate(["other", "fc"]):  # whose name ends like the head's
            torch.manual_seed(number)
            made.layer1.add_module(name, nn.Conv2d(8, 8, 1))
        made.fc = heads[0] if heads else made.fc
        return made

    names, x = ["conv", "fc", "other"], FAMILIES["resnet 18"].inputs["x"]
    config = IA3Config(target_modules=names, feedforward_modules=[], exclude_modules=excluded)
    model = ia3.get_peft_model(network(), config)
    assert "fc" in vectors(model)
    model.model.fc = head
    randomize(vectors(model))
    model.save_pretrained(tmp_path)
    for library in (ia3, peft):
        loaded = library.PeftModel.from_pretrained(network(head), tmp_path)
        assert vectors(loaded).keys() == vectors(model).keys() >= {"layer1.conv", "layer1.fc"}
        assert relative(loaded(x), model(x)) < 1e-6
