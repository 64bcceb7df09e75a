"""What torch was told around a fit or a prediction changes nothing, and is as it was afterwards."""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from support.pairs import same_vectors
from support.sentences import LABELS, TEXTS, bert, tokenizer
from support.tfew import tiny_llama

from ia3 import AdapterBank, FewShotClassifier, classify, fit_many
from ia3.base.encoders import is_sentence_encoder, load_encoder
from ia3.base.loading import load_base_model
from ia3.base.torch_state import usual_state
from ia3.errors import StateError

NEW = ["a charge", "the van", "is the bill paid", "x y z"]


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


STATES = {
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "float16 by default": lambda: default_dtype(torch.float16),
    # It stands for a GPU: a tensor that is made there meets none of the CPU's.
    "another device by default": lambda: default_device("meta"),
}


def told():
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_default_device(),
    )


@pytest.fixture(scope="module", params=["encoder", "language model"])
def usual(request):
    """Fitted as always, the most tokens at once so few that parts are computed."""
    model = bert() if request.param == "encoder" else tiny_llama()
    classifier = FewShotClassifier(model, steps=2, tokenizer=tokenizer(), max_tokens=30)
    classifier.fit(TEXTS, LABELS)
    return classifier, classifier.predict_proba(NEW)


@pytest.mark.parametrize("state", STATES.values(), ids=STATES.keys())
def test_a_fit_and_a_prediction_are_those_of_any_other_call(usual, state):
    expected, probabilities = usual
    fitted = expected.__sklearn_clone__()
    with state(), warnings.catch_warnings():
        warnings.simplefilter("error")
        before = told()
        fitted.fit(TEXTS, LABELS)
        found = fitted.predict_proba(NEW)
        assert told() == before
    assert same_vectors(fitted, expected)
    assert fitted.history_ == expected.history_
    np.testing.assert_array_equal(found, probabilities)
    np.testing.assert_array_equal(fitted.predict_proba(NEW), probabilities)
    # It can be trained on outside of the state.
    clone = fitted.set_params(init_from=fitted.adapter_)
    clone.fit(TEXTS, LABELS)


@pytest.mark.parametrize("state", STATES.values(), ids=STATES.keys())
def test_many_tasks_and_a_batch_of_several_adapters(usual, state, tmp_path):
    expected, probabilities = usual
    model = expected.model
    with state():
        fitted = fit_many({"a": (TEXTS, LABELS)}, expected.__sklearn_clone__())
    assert not fitted.failures
    assert same_vectors(fitted.classifiers["a"], expected)
    expected.save(tmp_path / "a")
    bank = AdapterBank(model)
    try:
        bank.add("a", tmp_path / "a")
        with state():
            found = classify(bank, NEW, ["a"] * 4, tokenizer=expected.tokenizer)
    finally:
        bank.model.unload()
    rows = [list(each.probabilities.values()) for each in found]
    np.testing.assert_allclose(rows, probabilities, atol=1e-5)


@pytest.mark.parametrize("state", STATES.values(), ids=STATES.keys())
def test_a_model_that_is_loaded_within_is_trained_on_outside(usual, state, tmp_path):
    expected, _ = usual
    expected.model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    load = load_encoder if is_sentence_encoder(tmp_path) else load_base_model
    with state():
        base = load(tmp_path)
    fitted = expected.__sklearn_clone__().set_params(model=tmp_path, tokenizer=None)
    assert same_vectors(fitted.fit(TEXTS, LABELS), expected)
    assert fitted.base is base


@pytest.mark.parametrize("make", [bert, tiny_llama])
def test_a_model_that_was_made_in_inference_mode_is_refused_for_training_alone(make):
    with torch.inference_mode():
        model = make()
    given = {"model": model, "tokenizer": tokenizer()}
    with pytest.raises(StateError, match="made in inference mode, and nothing can be trained"):
        FewShotClassifier(**given, steps=1).fit(TEXTS, LABELS)
    assert len(FewShotClassifier(**given, steps=0).fit(TEXTS, LABELS).predict(NEW)) == 4


def test_the_state_is_put_back_after_an_error():
    with torch.inference_mode(), STATES["autocast"](), default_device("meta"):
        before = told()
        with pytest.raises(ZeroDivisionError):
            _raise_within()
        assert told() == before


def _raise_within():
    with usual_state():
        assert told()[:3] == (True, False, False)
        assert torch.zeros(1).device.type == "cpu"
        raise ZeroDivisionError
