"""A classifier on an encoder answers where texts are embedded as they were in its fit, else not."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.encoders import HIDDEN, change, encoder_folder, write
from transformers import AutoModel

import ia3
from ia3 import AdapterBank, FewShotClassifier
from ia3.errors import IA3Error

TEXTS = ["the quick fox", "a lazy dog", "The Fox jumps", "over a dog"]
LABELS = ["fox", "dog", "fox", "dog"]
NEW = ["what the quick Fox jumps over", "dog"]
TASK = "ia3_task.json"
DENSE = {"in_features": HIDDEN, "out_features": 8, "activation_function": "torch.nn.Tanh"}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder_folder(
        tmp_path_factory.mktemp("models") / "encoder",
        dense=[DENSE],
        normalize=True,
        settings={"max_seq_length": 20, "do_lower_case": False},
        prompts={"prompts": {"classification": "query : "}},
    )


@pytest.fixture(scope="module")
def classifier(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifiers") / "a"
    FewShotClassifier(str(encoder), steps=2).fit(TEXTS, LABELS).save(folder)
    return folder


def pool_otherwise(folder: Path) -> None:
    write(
        folder / "1_Pooling/config.json",
        {"word_embedding_dimension": HIDDEN, "pooling_mode": "cls"},
    )


def leave_the_length(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text("utf-8"))
    write(folder / "modules.json", modules[:-1])


def read_less(folder: Path) -> None:
    change(folder / "sentence_bert_config.json", max_seq_length=9)


def lower_the_case(folder: Path) -> None:
    change(folder / "sentence_bert_config.json", do_lower_case=True)


def prompt_otherwise(folder: Path) -> None:
    change(folder / "config_sentence_transformers.json", prompts={"classification": "passage : "})


def pool_without_the_prompt(folder: Path) -> None:
    change(folder / "1_Pooling/config.json", include_prompt=False)


def end_linearly(folder: Path) -> None:
    change(folder / "2_Dense/config.json", activation_function="torch.nn.Identity")


def end_otherwise(folder: Path) -> None:
    path = folder / "2_Dense/model.safetensors"
    save_file({name: 2 * value for name, value in load_file(path).items()}, path)


CHANGES = [
    (pool_otherwise, "pooling is 'cls', and was 'mean':"),
    (leave_the_length, "normalize is False, and was True:"),
    (read_less, "max_length is 9, and was 20:"),
    (lower_the_case, ": its tokenizer splits texts otherwise:"),
    (prompt_otherwise, "prompt is 'passage : ', and was 'query : ':"),
    (pool_without_the_prompt, "prompt_tokens is 3, and was 0:"),
    (end_linearly, ": its Dense layers are others:"),
    (end_otherwise, ": its Dense layers are others:"),
]


@pytest.mark.parametrize(("to_change", "message"), CHANGES)
def test_what_an_encoder_does_otherwise_is_named_instead_of_an_answer(
    encoder: Path,
    classifier: Path,
    to_change: Callable[[Path], None],
    message: str,
    tmp_path: Path,
) -> None:
    other = shutil.copytree(encoder, tmp_path / "other")
    to_change(other)
    loaded = FewShotClassifier.load(classifier, model=other)
    with pytest.raises(IA3Error, match=message) as raised:
        loaded.predict(NEW)
    assert "give the encoder as it was, or fit the classifier again" in str(raised.value)
    bank = AdapterBank(AutoModel.from_pretrained(other))
    bank.add("a", classifier)
    with pytest.raises(IA3Error, match=f"^adapter 'a': .*{message}"):
        ia3.classify(bank, NEW, ["a", "a"])
    # Those of an earlier version do not say it.
    older = shutil.copytree(classifier, tmp_path / "older")
    change(older / TASK, embedding=None)
    found = FewShotClassifier.load(older, model=other).predict_proba(NEW)
    bank.add("older", older)
    for row, each in zip(found, ia3.classify(bank, NEW, ["older"] * 2), strict=True):
        assert [*each.probabilities.values()] == pytest.approx(row, abs=1e-5)


def test_all_that_differs_is_named(encoder: Path, classifier: Path, tmp_path: Path) -> None:
    other = shutil.copytree(encoder, tmp_path / "other")
    pool_otherwise(other)
    read_less(other)
    message = "pooling is 'cls', and was 'mean'; max_length is 9, and was 20: give"
    with pytest.raises(IA3Error, match=message):
        FewShotClassifier.load(classifier, model=other).predict(NEW)


def test_the_same_encoder_elsewhere_or_loaded_by_the_caller_answers(
    encoder: Path, classifier: Path, tmp_path: Path
) -> None:
    expected = FewShotClassifier.load(classifier).predict_proba(NEW)
    copy = shutil.copytree(encoder, tmp_path / "copy")
    for model in (copy, AutoModel.from_pretrained(copy)):
        found = FewShotClassifier.load(classifier, model=model).predict_proba(NEW)
        np.testing.assert_allclose(found, expected, atol=1e-6)
    half = FewShotClassifier.load(classifier, dtype="bfloat16").predict_proba(NEW)
    np.testing.assert_allclose(half, expected, atol=0.2)


def test_a_file_without_it_predicts_the_same_and_is_written_as_it_was(
    classifier: Path, tmp_path: Path
) -> None:
    whole = FewShotClassifier.load(classifier)
    assert whole.embedding_ is not None
    older = shutil.copytree(classifier, tmp_path / "older")
    change(older / TASK, embedding=None)
    loaded = FewShotClassifier.load(older)
    assert loaded.embedding_ is None
    np.testing.assert_array_equal(loaded.predict_proba(NEW), whole.predict_proba(NEW))
    loaded.save(tmp_path / "again")
    task = json.loads((classifier / TASK).read_text("utf-8"))
    del task["embedding"]
    assert json.loads((tmp_path / "again" / TASK).read_text("utf-8")) == task


def test_what_an_earlier_version_pickled_predicts(classifier: Path) -> None:
    whole = FewShotClassifier.load(classifier)
    for added in ("embedding_", "held_out_", "multilabel_", "max_words", "multilabel"):
        del whole.__dict__[added]
    del whole.class_weight
    loaded = pickle.loads(pickle.dumps(whole))
    assert loaded.get_params()["max_words"] is None
    assert loaded.held_out_ == []
    np.testing.assert_array_equal(
        loaded.predict_proba(NEW), FewShotClassifier.load(classifier).predict_proba(NEW)
    )


def test_a_fitted_classifier_that_is_given_another_encoder_is_refused(
    encoder: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(encoder, tmp_path / "other")
    pool_otherwise(other)
    fitted = FewShotClassifier(str(encoder), steps=0).fit(TEXTS, LABELS)
    with pytest.raises(IA3Error, match="pooling is 'cls'"):
        fitted.set_params(model=str(other)).predict(NEW)
    assert fitted.fit(TEXTS, LABELS).predict(NEW).shape == (2,)
    assert torch.is_tensor(fitted.head_.weight)
