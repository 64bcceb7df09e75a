"""One text with many classifiers, against each alone with its vectors in the weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.customers import TASK, TEXTS, TOKENIZER, saved
from support.scoring import plain_scores
from support.tfew import hook_count, tiny_llama
from torch import Tensor, nn

import ia3
from ia3 import AdapterBank, FewShotClassifier, IA3Config, IA3Model
from ia3.base.loading import BaseModel
from ia3.classify.mixed import classify_each
from ia3.errors import IA3Error
from ia3.tfew.prompts.encoding import EncodedExample

TEMPLATE = "{{ text }} Category :"
LAYERS = 4


def model() -> nn.Module:
    return tiny_llama(num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Twelve classifiers; u2-… rescale the two uppermost blocks alone, and so on."""
    root, base = tmp_path_factory.mktemp("classifiers"), model()
    settings: Any = {"template": TEMPLATE, "tokenizer": TOKENIZER}
    return {
        name: saved(root / name, 10 * upper + seed, base, upper_blocks=upper, **settings)
        for upper in (1, 2, 3, 4)
        for seed in range(3)
        if (name := f"u{upper}-{seed}")
    }


def bank_of(folders: dict[str, Path]) -> AdapterBank:
    bank = AdapterBank(model())
    for name, folder in folders.items():
        bank.add(name, folder)
    return bank


def alone(folder: Path, text: str) -> list[float]:
    """The vectors in the weights, in float64; each choice in a call of its own."""
    merged: Any = copy.deepcopy(model()).double()
    for key, vector in load_file(folder / "adapter_model.safetensors").items():
        linear = merged.get_submodule(key.removeprefix("base_model.model.").removesuffix(".ia3_l"))
        linear.weight.data.mul_(vector.double())
    task = json.loads((folder / TASK).read_text("utf-8"))
    choices = tuple(tuple(TOKENIZER(words)["input_ids"]) for words in task["choices"])
    prompt = tuple(TOKENIZER(TEMPLATE.replace("{{ text }}", text))["input_ids"])
    scores = plain_scores(BaseModel(merged, TOKENIZER, "merged"), EncodedExample(prompt, choices))
    return (scores.double() / task["temperature"]).softmax(0).tolist()


def tokens_of_blocks(bank: AdapterBank, texts: list[str], names: list[str]) -> list[int]:
    """How many tokens each block computes."""
    seen = [0] * LAYERS
    layers: Any = bank.model.get_base_model().model.layers  # type: ignore[union-attr]

    def count(place: int, output: Tensor) -> None:
        seen[place] += output.shape[0] * output.shape[1]

    handles = [
        layer.register_forward_hook(lambda _, __, output, place=place: count(place, output))
        for place, layer in enumerate(layers)
    ]
    ia3.classify(bank, texts, names, tokenizer=TOKENIZER)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("uppers", [(1,), (2,), (3,), (1, 2, 3), (4,), (1, 4)])
def test_the_answers_are_those_of_single_calls_and_what_none_touches_is_computed_once(
    folders: dict[str, Path], uppers: tuple[int, ...]
) -> None:
    names = [name for name in folders if int(name[1]) in uppers]
    bank = bank_of({name: folders[name] for name in names})
    for text in TEXTS[:2]:
        texts = [text] * len(names)
        found = ia3.classify(bank, texts, names, tokenizer=TOKENIZER)
        for name, each in zip(names, found, strict=True):
            expected = alone(folders[name], text)
            assert [*each.probabilities.values()] == pytest.approx(expected, abs=2e-5)
            (single,) = ia3.classify(bank, [text], [name], tokenizer=TOKENIZER)
            assert single.label == each.label
    hooks = hook_count(bank.model)
    seen = tokens_of_blocks(bank, texts, names)
    assert hook_count(bank.model) == hooks
    # The lowest block that any of them touches decides.
    lowest = LAYERS - max(uppers)
    assert all(tokens <= 1.5 * seen[0] for tokens in seen[:lowest])
    assert all(tokens == seen[-1] for tokens in seen[lowest:])
    if lowest:
        assert len(names) * seen[0] <= 2 * seen[-1]


def test_texts_that_differ_are_answered_beside_it(folders: dict[str, Path]) -> None:
    names = [name for name in folders if name.startswith("u2")]
    bank = bank_of({name: folders[name] for name in names})
    texts = [text for text in TEXTS for _ in names]
    found = ia3.classify(bank, texts, names * len(TEXTS), tokenizer=TOKENIZER)
    for text, name, each in zip(texts, names * len(TEXTS), found, strict=True):
        expected = alone(folders[name], text)
        assert [*each.probabilities.values()] == pytest.approx(expected, abs=2e-5)


def test_an_adapter_that_is_active_on_the_model_has_no_part_in_it(
    folders: dict[str, Path],
) -> None:
    active = IA3Model(model(), IA3Config(target_modules=["k_proj", "o_proj"]))
    with torch.no_grad():
        for vector in active.vectors("default").values():
            vector.copy_(1.5 + torch.rand(vector.shape))
    bank = AdapterBank(active)
    names = [name for name in folders if name.startswith("u2")]
    for name in names:
        bank.add(name, folders[name])
    for untuned in (False, True):
        found = classify_each(bank, ["red fox"] * 3, names, tokenizer=TOKENIZER, untuned=untuned)
        plain = classify_each(
            bank_of(folders), ["red fox"] * 3, names, tokenizer=TOKENIZER, untuned=untuned
        )
        for name, each, other in zip(names, found, plain, strict=True):
            assert isinstance(each, ia3.Classified)
            assert isinstance(other, ia3.Classified)
            answer = [*each.probabilities.values()]
            assert answer == pytest.approx([*other.probabilities.values()], abs=1e-5)
            if not untuned:
                assert answer == pytest.approx(alone(folders[name], "red fox"), abs=2e-5)


def test_choices_may_be_scored_elsewhere_by_the_values_of_each_prompt(
    folders: dict[str, Path],
) -> None:
    """Here by a model with those values in its weights, and none in the bank's."""
    names = ["u2-0", "u4-1", "u2-0"]
    texts = ["red fox", "dog", "the dog"]
    with torch.device("meta"):
        bank = AdapterBank(model(), device="cpu")
    for name in ("u2-0", "u4-1"):
        bank.add(name, folders[name])

    def ranking(prompts: Any, places: Any, values: Any) -> Tensor:
        rows = []
        for prompt, place in zip(prompts, places, strict=True):
            merged = model()
            for name, site in bank.model.routes.sites().items():
                if site in values:
                    value = values[site][place]
                    scaled = value[:, None] if site.side == "output" else value
                    merged.get_submodule(name).weight.data.mul_(scaled)
            rows.append(plain_scores(BaseModel(merged, TOKENIZER, ""), prompt))
        return torch.stack(rows)

    for untuned in (False, True):
        options: Any = {"tokenizer": TOKENIZER, "untuned": untuned}
        found = classify_each(bank, texts, names, ranking=ranking, **options)
        plain = classify_each(bank_of(folders), texts, names, **options)
        for each, other in zip(found, plain, strict=True):
            assert isinstance(each, ia3.Classified)
            assert isinstance(other, ia3.Classified)
            answer = [*each.probabilities.values()]
            assert answer == pytest.approx([*other.probabilities.values()], abs=1e-5)


def test_an_adapter_that_cannot_be_routed_fails_alone(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """One on the output layer, which sees the answers' tokens alone."""
    base = model()
    head = IA3Model(copy.deepcopy(base), IA3Config(target_modules=["lm_head"])).adapter("default")
    settings: Any = {"steps": 0, "tokenizer": TOKENIZER, "init_from": head}
    classifier = FewShotClassifier(base, TEMPLATE, **settings).fit(["red", "dog"], ["fox", "dog"])
    classifier.save(tmp_path / "head")
    bank = bank_of({**folders, "head": tmp_path / "head"})
    names = ["u2-0", "head", "u2-1", "u4-2"]
    found = classify_each(bank, ["red fox"] * 4, names, tokenizer=TOKENIZER)
    for name, each in zip(names, found, strict=True):
        if name == "head":
            assert isinstance(each, IA3Error)
            assert "cannot be routed" in str(each)
        else:
            assert isinstance(each, ia3.Classified)
            expected = alone(folders[name], "red fox")
            assert [*each.probabilities.values()] == pytest.approx(expected, abs=2e-5)
    with pytest.raises(IA3Error, match="cannot be routed"):
        ia3.classify(bank, ["red fox"] * 4, names, tokenizer=TOKENIZER)


def test_a_call_that_breaks_off_leaves_nothing_behind(folders: dict[str, Path]) -> None:
    names = [name for name in folders if name.startswith("u2")]
    bank = bank_of({name: folders[name] for name in names})
    ids = torch.tensor([[3, 4, 5]])
    before = bank.model(input_ids=ids).logits

    def classify() -> list[Any]:
        return ia3.classify(bank, ["red fox"] * 3, names, tokenizer=TOKENIZER)

    expected = classify()
    hooks = hook_count(bank.model)
    layers: Any = bank.model.get_base_model().model.layers  # type: ignore[union-attr]

    def fail(*_: Any) -> None:
        raise MemoryError("in between")

    for place in range(LAYERS):
        for module in (layers[place], layers[place].mlp):
            handle = module.register_forward_pre_hook(fail)
            with pytest.raises(MemoryError):
                classify()
            handle.remove()
            assert hook_count(bank.model) == hooks
            # No route is on.
            assert torch.equal(bank.model(input_ids=ids).logits, before)
    assert classify() == expected
