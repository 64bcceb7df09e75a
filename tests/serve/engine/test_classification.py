"""What a server answers for texts of many classifiers: those of each classifier alone."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from support.customers import TASK, TEXTS, TOKENIZER, save_encoder, saved
from support.tfew import tiny_llama
from transformers import AutoModel

from ia3 import AdapterBank, FewShotClassifier
from ia3.base.encoders import load_encoder
from ia3.base.loading import load_base_model
from ia3.classify.mixed import Classified
from ia3.errors import (
    BrokenFileError,
    IA3Error,
    InvalidTypeError,
    MissingFileError,
    StateError,
    UnknownNameError,
)
from ia3.sentences.embedding import tokenized
from ia3.serve.engine.bases import ServedBase
from ia3.serve.engine.classification import answers

TEMPLATE = "{{ text }} Category :"


def served_with(model: Any, folders: dict[str, Path], capacity: int = 100) -> ServedBase:
    """A server's base model, which has no other user, with these classifiers."""
    load: Any = load_base_model if hasattr(model, "lm_head") else load_encoder
    base = load(model, tokenizer=TOKENIZER)
    bank = AdapterBank(model, capacity=capacity)
    for name, folder in folders.items():
        bank.add(name, folder)
    return ServedBase("served", base, bank)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def customers(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("customers")
    return {f"c{seed}": saved(root / f"c{seed}", seed, str(encoder)) for seed in range(4)}


@pytest.fixture(scope="module")
def rankers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("rankers")
    settings: Any = {"template": TEMPLATE, "tokenizer": TOKENIZER}
    return {f"r{s}": saved(root / f"r{s}", s, tiny_llama(), **settings) for s in range(4)}


def probabilities(found: Classified | IA3Error) -> list[float]:
    assert isinstance(found, Classified), found
    return [*found.probabilities.values()]


def check(
    found: Sequence[Classified | IA3Error],
    texts: Sequence[Any],
    names: Sequence[str],
    errors: dict[int, tuple[type[IA3Error], str]],
    alone: dict[str, FewShotClassifier],
) -> None:
    """Each text has the answer of its classifier alone, or the error that is expected there."""
    assert len(found) == len(texts)
    for row, (each, text, name) in enumerate(zip(found, texts, names, strict=True)):
        if row in errors:
            kind, words = errors[row]
            assert isinstance(each, kind), each
            assert words in str(each)
            assert "text 0" not in str(each)
        else:
            expected = alone[name].predict_proba([text])[0]
            assert probabilities(each) == pytest.approx(expected, abs=1e-5)


def test_a_text_that_is_asked_of_many_is_made_tokens_once(
    encoder: Path, customers: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = served_with(AutoModel.from_pretrained(encoder), customers)
    alone = {name: FewShotClassifier.load(folder) for name, folder in customers.items()}
    counted = Mock(wraps=tokenized)
    monkeypatch.setattr("ia3.classify.mixed.tokenized", counted)
    texts, names = [*["red fox"] * len(customers), "dog"], [*customers, "c0"]
    found = answers(served, texts, names)
    assert [len(call.args[1]) for call in counted.call_args_list] == [2]
    check(found, texts, names, {}, alone)


def test_a_bad_text_or_adapter_fails_alone_on_an_encoder(
    encoder: Path, customers: dict[str, Path], tmp_path: Path
) -> None:
    broken = shutil.copytree(customers["c1"], tmp_path / "broken")
    (broken / TASK).write_text("{", "utf-8")
    gone = shutil.copytree(customers["c2"], tmp_path / "gone")
    model = AutoModel.from_pretrained(encoder)
    # There is no room for the last one, and when it is asked for its file is no longer there.
    bank = served_with(model, {**customers, "broken": broken}, capacity=5)
    bank.bank.add("gone", gone)
    shutil.rmtree(gone)
    no: Any = None
    asked: list[tuple[Any, str]] = [
        ("red fox", "c0"),
        ("dog", "nobody's"),
        ("dog", "broken"),
        ({"title": "dog"}, "c1"),
        ("red red", "c1"),
        ({"text": no}, "c2"),
        (3, "c2"),
        ("the fox", "c2"),
        ("half \ud800", "c3"),
        ("dog", "c3"),
        ("red fox", "nobody's"),
        ("", "c3"),
    ]
    errors: dict[int, tuple[type[IA3Error], str]] = {
        1: (UnknownNameError, 'no adapter "nobody\'s"'),
        2: (BrokenFileError, "adapter 'broken': "),
        3: (IA3Error, "the text has no field 'text'"),
        5: (IA3Error, "the text: the field 'text' is None"),
        6: (InvalidTypeError, "the text is 3"),
        8: (IA3Error, "the text"),
        10: (UnknownNameError, 'no adapter "nobody\'s"'),
    }
    alone = {name: FewShotClassifier.load(folder) for name, folder in customers.items()}
    texts, names = [text for text, _ in asked], [name for _, name in asked]
    check(answers(bank, texts, names), texts, names, errors, alone)
    assert answers(bank, [], []) == []
    (nothing,) = answers(bank, ["dog"], ["nobody's"])
    assert isinstance(nothing, UnknownNameError)


def test_an_adapter_whose_files_are_gone_fails_alone(
    encoder: Path, customers: dict[str, Path], tmp_path: Path
) -> None:
    gone = shutil.copytree(customers["c2"], tmp_path / "gone")
    served = served_with(AutoModel.from_pretrained(encoder), customers)
    served.bank.add("gone", gone)
    shutil.rmtree(gone)
    served.bank.refresh()  # it can be used for as long as it is there
    first, second = answers(served, ["dog", "dog"], ["gone", "c0"])
    assert probabilities(first)
    assert probabilities(second)
    served.bank.remove("gone")
    with pytest.raises(MissingFileError):
        served.bank.add("gone", gone)
    first, second = answers(served, ["dog", "dog"], ["gone", "c0"])
    assert isinstance(first, UnknownNameError)
    assert probabilities(second)


def test_a_bad_text_or_adapter_fails_alone_on_a_language_model(
    rankers: dict[str, Path], customers: dict[str, Path], tmp_path: Path
) -> None:
    longest = " ".join(["dog"] * 600)
    served = served_with(tiny_llama(), rankers)
    with torch.no_grad():  # the word that is nowhere else makes every score of its text nan
        served.base.model.get_input_embeddings().weight[2] = torch.nan
    asked: list[tuple[Any, str]] = [
        ("red fox", "r0"),
        ("dog", "r9"),
        ({"body": "dog"}, "r1"),
        (["dog"], "r1"),
        ("dog", "r1"),
        ("an unheard word", "r2"),
        ("dog", "r2"),
        ("a lazy dog", "r3"),
    ]
    errors: dict[int, tuple[type[IA3Error], str]] = {
        1: (UnknownNameError, "no adapter 'r9' here"),
        2: (IA3Error, "the text has no field 'text'"),
        3: (InvalidTypeError, "the text is ['dog']"),
        5: (IA3Error, "the model's scores of the text are not finite"),
    }
    alone = {
        name: FewShotClassifier.load(folder, model=tiny_llama(), tokenizer=TOKENIZER)
        for name, folder in rankers.items()
    }
    texts, names = [text for text, _ in asked], [name for _, name in asked]
    check(answers(served, texts, names), texts, names, errors, alone)
    with pytest.warns(UserWarning, match="more than 500 words"):
        (cut,) = answers(served, [longest], ["r0"])
    assert probabilities(cut)
    # All of them fail.
    assert all(isinstance(each, IA3Error) for each in answers(served, [3, 4], ["r0", "r0"]))


def test_there_may_be_more_adapters_than_there_is_room_for(
    encoder: Path, customers: dict[str, Path]
) -> None:
    few = served_with(AutoModel.from_pretrained(encoder), customers, capacity=1)
    names = [name for name in customers for _ in TEXTS]
    texts = TEXTS * len(customers)
    alone = {name: FewShotClassifier.load(folder) for name, folder in customers.items()}
    check(answers(few, texts, names), texts, names, {}, alone)
    few.bank.pin("c0")
    first, second = answers(few, ["dog", "dog"], ["c1", "c0"])
    assert isinstance(first, StateError)
    assert "no room" in str(first)
    assert probabilities(second)


def test_untuned_is_the_base_model_with_the_classifiers_task(rankers: dict[str, Path]) -> None:
    """As a classifier of no steps that was fitted for the same labels."""
    model = tiny_llama()
    served = served_with(copy.deepcopy(model), rankers)
    for name, folder in rankers.items():
        labels = FewShotClassifier.load(folder, model=model, tokenizer=TOKENIZER).classes_.tolist()
        untuned = FewShotClassifier(model, TEMPLATE, steps=0, tokenizer=TOKENIZER)
        expected = untuned.fit(["red"] * len(labels), labels).predict_proba(TEXTS)
        found = answers(served, TEXTS, [name] * len(TEXTS), True)
        for each, of_text in zip(found, expected, strict=True):
            assert probabilities(each) == pytest.approx(of_text, abs=1e-5)
        tuned = answers(served, TEXTS, [name] * len(TEXTS))
        assert probabilities(tuned[0]) != pytest.approx(probabilities(found[0]), abs=1e-2)


def test_an_encoder_says_nothing_untuned(encoder: Path, customers: dict[str, Path]) -> None:
    served = served_with(AutoModel.from_pretrained(encoder), customers)
    found = answers(served, ["dog", "dog", "dog"], ["c0", "c1", "c9"], True)
    assert [type(each) for each in found] == [IA3Error, IA3Error, UnknownNameError]
    assert "untuned answers are a language model's" in str(found[0])


class Returning(AdapterBank):
    """A bank to which another thread adds an adapter just after it was asked for in vain."""

    returns: tuple[str, Path]

    def versions(self, names: Sequence[str]) -> Any:
        try:
            return super().versions(names)
        except UnknownNameError:
            if self.returns[0] not in self:
                self.add(*self.returns)
            raise


def test_an_adapter_that_comes_and_goes_does_not_disturb_the_others(
    encoder: Path, customers: dict[str, Path]
) -> None:
    model = AutoModel.from_pretrained(encoder)
    base = load_encoder(model, tokenizer=TOKENIZER)
    bank = Returning(model)
    bank.returns = ("c1", customers["c1"])
    bank.add("c0", customers["c0"])
    alone = {name: FewShotClassifier.load(folder) for name, folder in customers.items()}
    asked = ["c0", "c1", "c0"]
    found = answers(ServedBase("served", base, bank), TEXTS[:3], asked)
    check(found, TEXTS[:3], asked, {}, alone)
