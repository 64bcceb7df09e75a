"""Texts of many classifiers in one batch, against each alone with its vectors in the weights."""

from __future__ import annotations

import copy
import gc
import json
import shutil
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.customers import LABELS, TASK, TEXTS, TOKENIZER, save_encoder, saved
from support.kills import result_of
from support.tfew import plain_token_scores, tiny_llama, tiny_t5
from torch import Tensor, nn
from transformers import AutoModel, BloomConfig, BloomForCausalLM

import ia3
import ia3.classify.estimator
from ia3 import AdapterBank, FewShotClassifier, IA3Config, IA3Model
from ia3.base.encoders import load_encoder
from ia3.base.loading import BaseModel, load_base_model
from ia3.errors import (
    BrokenFileError,
    IA3Error,
    InvalidTypeError,
    MissingFileError,
    StateError,
    UnknownNameError,
)
from ia3.tfew.prompts.encoding import EncodedExample

TEMPLATES = ["{{ text }} Category :", "Is it ? {{ text }} Kind :"]


def bloom() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BloomForCausalLM(
            BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)
        ).eval()


LANGUAGE_MODELS = {"llama": tiny_llama, "bloom": bloom, "t5": tiny_t5}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def customers(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("customers")
    return {f"c{seed}": saved(root / f"c{seed}", seed, str(encoder)) for seed in range(6)}


def bank_of(encoder: Path, customers: dict[str, Path], **settings: Any) -> AdapterBank:
    bank = AdapterBank(AutoModel.from_pretrained(encoder), **settings)
    for name, folder in customers.items():
        bank.add(name, folder)
    return bank


def texts_of(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Each text of each classifier, in no order."""
    pairs = [(text, name) for name in names for text in TEXTS]
    pairs = [pairs[i * 7 % len(pairs)] for i in range(len(pairs))]
    assert len({*pairs}) == len(names) * len(TEXTS)
    return [text for text, _ in pairs], [name for _, name in pairs]


# -- the formula -----------------------------------------------------------------------------------


def merged(model: nn.Module, folder: Path) -> Any:
    """A copy in float64 whose linear layers have the vectors in their weights."""
    model = copy.deepcopy(model).double()
    vectors = load_file(folder / "adapter_model.safetensors")
    assert vectors
    for key, vector in vectors.items():
        name = key.removeprefix("base_model.model.").removesuffix(".ia3_l")
        linear = model.get_submodule(name)
        with torch.no_grad():
            linear.weight.mul_(vector.double())  # [dim, 1] scales rows, [1, dim] columns
            if linear.bias is not None and vector.shape[1] == 1:
                linear.bias.mul_(vector.double()[:, 0])
    return model


def by_formula(model: nn.Module, folder: Path, text: str) -> list[float]:
    """Mean of the tokens' states, the head, the softmax; in float64."""
    ids = torch.tensor([TOKENIZER(text)["input_ids"]])
    with torch.no_grad():
        states = merged(model, folder)(input_ids=ids).last_hidden_state[0]
    head = {name: v.double() for name, v in load_file(folder / "ia3_head.safetensors").items()}
    task = json.loads((folder / TASK).read_text("utf-8"))
    scores = head["weight"] @ states.mean(0) + head["bias"]
    return (scores / task["temperature"]).softmax(0).tolist()


def by_ranking(model: nn.Module, folder: Path, text: str) -> list[float]:
    """The choices' mean log-probabilities, each in a call of its own, the mean over templates."""
    task = json.loads((folder / TASK).read_text("utf-8"))
    base = BaseModel(merged(model, folder), TOKENIZER, "merged")
    choices = tuple(tuple(TOKENIZER(words)["input_ids"]) for words in task["choices"])
    found: list[Tensor] = []
    for template in task["templates"]:
        prompt = tuple(TOKENIZER(template.replace("{{ text }}", text))["input_ids"])
        with torch.no_grad():
            scores = plain_token_scores(base, EncodedExample(prompt, choices))
        means = torch.stack([each.double().mean() for each in scores])
        found.append((means / task["temperature"]).softmax(0))
    return torch.stack(found).mean(0).tolist()


# -- what it answers -------------------------------------------------------------------------------


def test_a_text_gets_what_its_classifier_says_of_it_on_an_encoder(
    encoder: Path, customers: dict[str, Path]
) -> None:
    bank = bank_of(encoder, customers)
    texts, names = texts_of([*customers])
    found = ia3.classify(bank, texts, names)
    model = AutoModel.from_pretrained(encoder)
    for text, name, each in zip(texts, names, found, strict=True):
        expected = by_formula(model, customers[name], text)
        assert [*each.probabilities.values()] == pytest.approx(expected, abs=2e-5)
    for name, folder in customers.items():
        alone = FewShotClassifier.load(folder)
        rows = [row for row, other in enumerate(names) if other == name]
        probabilities = alone.predict_proba([texts[row] for row in rows])
        for row, expected in zip(rows, probabilities, strict=True):
            assert [*found[row].probabilities] == alone.classes_.tolist()
            assert [*found[row].probabilities.values()] == pytest.approx(expected, abs=1e-5)
            assert found[row].label == alone.classes_[expected.argmax()]
            assert found[row].probability == max(found[row].probabilities.values())


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_a_text_gets_what_its_classifier_says_of_it_on_a_language_model(
    kind: str, tmp_path: Path
) -> None:
    model = LANGUAGE_MODELS[kind]()
    bank = AdapterBank(copy.deepcopy(model))
    folders = {}
    for seed in range(4):
        template = TEMPLATES[: 1 + seed % 2]
        folders[f"c{seed}"] = saved(
            tmp_path / f"c{seed}", seed, model, template=template, tokenizer=TOKENIZER
        )
        bank.add(f"c{seed}", folders[f"c{seed}"])
    texts, names = texts_of([*folders])
    found = ia3.classify(bank, texts, names, tokenizer=TOKENIZER)
    for text, name, each in zip(texts, names, found, strict=True):
        expected = by_ranking(model, folders[name], text)
        assert [*each.probabilities.values()] == pytest.approx(expected, abs=2e-5)
    for name, folder in folders.items():
        alone = FewShotClassifier.load(folder, model=model, tokenizer=TOKENIZER)
        rows = [row for row, other in enumerate(names) if other == name]
        probabilities = alone.predict_proba([texts[row] for row in rows])
        for row, expected in zip(rows, probabilities, strict=True):
            assert [*found[row].probabilities.values()] == pytest.approx(expected, abs=1e-5)


def test_fields_are_read_by_the_template_of_each_classifier(encoder: Path, tmp_path: Path) -> None:
    rows = [{"title": "red", "body": "fox"}, {"title": "a", "body": "dog"}]
    classifier = FewShotClassifier(str(encoder), steps=0).fit(rows, ["fox", "dog"])
    classifier.save(tmp_path / "fields")
    bank = bank_of(encoder, {"fields": tmp_path / "fields"})
    bank.add("text", saved(tmp_path / "text", 0, str(encoder)))
    found = ia3.classify(bank, [rows[1], "red fox", rows[0]], ["fields", "text", "fields"])
    expected = classifier.predict_proba([rows[1], rows[0]])
    assert [*found[0].probabilities.values()] == pytest.approx(expected[0], abs=1e-5)
    assert [*found[2].probabilities.values()] == pytest.approx(expected[1], abs=1e-5)
    with pytest.raises(IA3Error, match=r"text 2 has no field 'body'"):
        ia3.classify(bank, ["dog", rows[0], {"title": "red"}], ["text", "fields", "fields"])


def test_an_encoders_task_without_a_template_has_its_fields_joined(
    encoder: Path, customers: dict[str, Path], tmp_path: Path
) -> None:
    bare = shutil.copytree(customers["c0"], tmp_path / "bare")
    task = json.loads((bare / TASK).read_text("utf-8"))
    (bare / TASK).write_text(json.dumps(task | {"templates": []}), "utf-8")
    bank = bank_of(encoder, {**customers, "bare": bare})
    found = ia3.classify(bank, ["the fox", "the fox"], ["bare", "c0"])
    assert found[0] == found[1]


def test_the_package_of_the_name_is_the_function_too(
    encoder: Path, customers: dict[str, Path]
) -> None:
    bank = bank_of(encoder, customers)
    assert ia3.classify.estimator.FewShotClassifier is FewShotClassifier  # type: ignore[attr-defined]
    assert ia3.classify(bank, ["dog"], ["c0"])[0].label in LABELS


# -- versions --------------------------------------------------------------------------------------


def values(found: ia3.Classified) -> tuple[Any, ...]:
    return (*found.probabilities.items(),)


def test_labels_and_vectors_are_of_one_version_while_files_are_replaced(
    encoder: Path, tmp_path: Path
) -> None:
    versions = [saved(tmp_path / f"v{seed}", seed, str(encoder)) for seed in (1, 2)]
    served = shutil.copytree(versions[0], tmp_path / "served")
    bank = bank_of(encoder, {"a": served})
    expected = []
    for folder in versions:
        of_one = bank_of(encoder, {"a": folder})
        expected.append(values(ia3.classify(of_one, ["red fox"], ["a"])[0]))
    assert expected[0] != expected[1]
    assert values(ia3.classify(bank, ["red fox"], ["a"])[0]) == expected[0]
    # Not taken up before the bank is told so, whatever the files say.
    loaded = [FewShotClassifier.load(folder) for folder in versions]
    contents = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in versions]
    assert [len(files) for files in contents] == [4, 4]
    loaded[1].save(served)
    assert values(ia3.classify(bank, ["red fox"], ["a"])[0]) == expected[0]
    assert bank.refresh().changed == ["a"]
    assert values(ia3.classify(bank, ["red fox"], ["a"])[0]) == expected[1]
    shutil.rmtree(served)  # what is resident needs no file
    assert values(ia3.classify(bank, ["red fox"], ["a"])[0]) == expected[1]
    done = threading.Event()
    seen, failed = set(), []

    def replace() -> None:
        try:
            for turn in range(12):
                loaded[turn % 2].save(served)
                bank.refresh()
        except Exception as error:
            failed.append(error)
        done.set()

    writer = threading.Thread(target=replace)
    writer.start()
    while not done.is_set():
        seen.add(values(ia3.classify(bank, ["red fox"], ["a"])[0]))
    writer.join()
    assert not failed
    assert seen <= {*expected}


def test_a_classifier_that_made_room_comes_back_with_its_labels(
    encoder: Path, customers: dict[str, Path]
) -> None:
    whole, small = bank_of(encoder, customers), bank_of(encoder, customers, capacity=2)
    names = [*customers]
    expected = ia3.classify(whole, TEXTS, names)
    for turn in range(2):
        for text, name, each in zip(TEXTS, names, expected, strict=True):
            (found,) = ia3.classify(small, [text], [name])
            assert [*found.probabilities] == [*each.probabilities], turn
            assert [*found.probabilities.values()] == pytest.approx(
                [*each.probabilities.values()], abs=1e-5
            )


def test_a_call_may_have_more_classifiers_than_there_is_room_for(
    encoder: Path, customers: dict[str, Path]
) -> None:
    whole, small = bank_of(encoder, customers), bank_of(encoder, customers, capacity=2)
    texts, names = texts_of([*customers])
    expected = ia3.classify(whole, texts, names)
    small.pin("c3")
    found = ia3.classify(small, texts, names)
    assert [values(each) for each in found] == [values(each) for each in expected]
    small.pin("c4")
    with pytest.raises(StateError, match="no room for adapter 'c1'"):
        ia3.classify(small, ["dog", "dog"], ["c3", "c1"])


def test_a_bank_that_is_gone_is_not_kept(encoder: Path, customers: dict[str, Path]) -> None:
    bank = bank_of(encoder, customers)
    ia3.classify(bank, ["dog"], ["c0"])
    gone = weakref.ref(bank)
    del bank
    gc.collect()
    assert gone() is None


# -- threads and processes -------------------------------------------------------------------------


def test_threads_get_what_one_gets(encoder: Path, customers: dict[str, Path]) -> None:
    bank = bank_of(encoder, customers)
    texts, names = texts_of([*customers])
    expected = [values(each) for each in ia3.classify(bank, texts, names)]
    wrong: list[Any] = []

    def ask() -> None:
        try:
            for _ in range(5):
                found = [values(each) for each in ia3.classify(bank, texts, names)]
                if found != expected:
                    wrong.append(found)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_encoder_is_asked_while_its_lock_is_held(
    encoder: Path, customers: dict[str, Path]
) -> None:
    bank = bank_of(encoder, customers)
    expected = values(ia3.classify(bank, ["dog"], ["c0"])[0])
    found: list[Any] = []
    asking = threading.Thread(
        target=lambda: found.append(values(ia3.classify(bank, ["dog"], ["c0"])[0])), daemon=True
    )
    with load_encoder(bank.model.get_base_model()).lock:
        asking.start()
        asking.join(60)
    assert found == [expected]


@pytest.mark.parametrize("kind", ["encoder", "llama"])
def test_a_forked_process_goes_on(
    kind: str, encoder: Path, customers: dict[str, Path], tmp_path: Path
) -> None:
    if kind == "encoder":
        bank, lock = bank_of(encoder, customers), threading.RLock()
    else:
        model = tiny_llama()
        folder = saved(tmp_path, 0, model, template=TEMPLATES[0], tokenizer=TOKENIZER)
        bank = AdapterBank(copy.deepcopy(model))
        bank.add("c0", folder)
        lock = load_base_model(bank.model.get_base_model(), tokenizer=TOKENIZER).lock

    def ask() -> Any:
        return values(ia3.classify(bank, ["red dog"], ["c0"], tokenizer=TOKENIZER)[0])

    expected, held, leave = ask(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            leave.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(60)
    assert result_of(ask) == expected
    leave.set()
    holder.join()


# -- errors ----------------------------------------------------------------------------------------


def test_an_error_comes_before_the_model_runs(
    encoder: Path, customers: dict[str, Path], tmp_path: Path
) -> None:
    bank = bank_of(encoder, customers)
    broken = shutil.copytree(customers["c1"], tmp_path / "broken")
    (broken / TASK).write_text("{", "utf-8")
    other = shutil.copytree(customers["c1"], tmp_path / "other")
    shutil.copy(customers["c2"] / "ia3_head.safetensors", other)
    plain = IA3Model(AutoModel.from_pretrained(encoder), IA3Config(target_modules="all-linear"))
    plain.save_pretrained(tmp_path / "plain")
    ranking = json.loads((customers["c0"] / TASK).read_text("utf-8"))
    del ranking["head"], ranking["embedding"]
    ranking["engine"] = "language-model"
    ranked = shutil.copytree(customers["c0"], tmp_path / "ranked")
    (ranked / TASK).write_text(json.dumps(ranking), "utf-8")
    for name in ("broken", "other", "plain", "ranked"):
        bank.add(name, tmp_path / name)
    bank.add("in-memory", plain.adapter("default"))
    ia3.classify(bank, ["dog"], ["c0"])  # whatever the base model is tried with
    calls = []
    bank.model.get_base_model().register_forward_pre_hook(lambda *_: calls.append(1))
    no: Any = None
    for error, texts, names, message in [
        (UnknownNameError, ["dog", "fox"], ["c0", "c_1"], "no adapter 'c_1' in this bank"),
        (UnknownNameError, ["dog"], ["__base__"], "no adapter '__base__'"),
        (MissingFileError, ["dog", "dog"], ["c0", "plain"], "adapter 'plain' is no classifier"),
        (MissingFileError, ["dog"], ["in-memory"], "adapter 'in-memory' is no classifier"),
        (BrokenFileError, ["dog"], ["broken"], "adapter 'broken': .*ia3_task.json"),
        (BrokenFileError, ["dog"], ["other"], "adapter 'other': .*ia3_head.safetensors"),
        (IA3Error, ["dog"], ["ranked"], "is a classifier on a language model, and the bank's"),
        (IA3Error, ["dog", "fox"], ["c0"], "there are 1 names and 2 texts"),
        (InvalidTypeError, ["dog"], {"c0"}, "names is {'c0'}, which has no order"),
        (IA3Error, [], ["c0"], "there are 1 names and 0 texts"),
        (IA3Error, ["dog", {"title": "a"}], ["c0", "c1"], "text 1 has no field 'text'"),
        (IA3Error, ["dog", {"text": no}], ["c0", "c1"], "text 1: the field 'text' is None"),
        (InvalidTypeError, ["dog", 3], ["c0", "c1"], "text 1 is 3"),
        (InvalidTypeError, ["dog"], [["c0"]], "c0"),
        (InvalidTypeError, ["dog"], "c0", "names is 'c0'"),
        (InvalidTypeError, "dog", ["c0"], "texts is one str"),
    ]:
        with pytest.raises(error, match=message):
            ia3.classify(bank, texts, names)
    with pytest.raises(InvalidTypeError, match="bank is"):
        ia3.classify(bank.model, ["dog"], ["c0"])  # type: ignore[arg-type]
    with pytest.raises(InvalidTypeError, match="tokenizer is"):
        ia3.classify(bank, ["dog"], ["c0"], tokenizer="words")  # type: ignore[arg-type]
    assert ia3.classify(bank, [], []) == []
    assert not calls
    bank.model.get_base_model().train()
    with pytest.raises(StateError, match="training mode"):
        ia3.classify(bank, ["dog"], ["c0"])
    bank.model.get_base_model().eval()
    ia3.classify(bank, ["dog"], ["c0"])
    assert calls
    bank.close()
    with pytest.raises(StateError, match="closed"):
        ia3.classify(bank, ["dog"], ["c0"])


@pytest.mark.filterwarnings("ignore:this may be the wrong base model")
def test_a_classifier_of_another_model_is_refused(
    encoder: Path, customers: dict[str, Path]
) -> None:
    model = AutoModel.from_pretrained(encoder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    bank = AdapterBank(model)
    bank.add("c0", customers["c0"])
    with pytest.raises(IA3Error, match="adapter 'c0': it was fitted on another model"):
        ia3.classify(bank, ["dog"], ["c0"])


def test_scores_that_are_not_finite_are_refused(encoder: Path, customers: dict[str, Path]) -> None:
    bank = bank_of(encoder, customers)
    with torch.no_grad():
        bank.model.get_base_model().embeddings.word_embeddings.weight[
            TOKENIZER("bird")["input_ids"]
        ] = np.nan
    with pytest.raises(IA3Error, match="scores of text 1 are not finite"):
        ia3.classify(bank, ["dog", "bird"], ["c0", "c1"])
