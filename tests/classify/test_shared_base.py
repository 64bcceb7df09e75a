"""Classifiers that threads and processes share: each prediction is of one fit."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from support.tfew import tiny_llama, word_tokenizer

from ia3 import FewShotClassifier, load_base_model
from ia3.core.names import ATTRIBUTE
from ia3.tfew.temporary_adapter import all_linear, temporary_adapter

TEXTS = ["a bill", "a parcel"]
OLD = ["bill", "parcel"]


@pytest.fixture
def tokenizer():
    return word_tokenizer(["a", "bill", "parcel", "Category", ":", "yes", "no"])


def classifier(model, tokenizer, steps=2):
    given = {"tokenizer": tokenizer, "device": "cpu", "learning_rate": 0.3}
    return FewShotClassifier(model, steps=steps, **given)


def is_right_in_a_fork(action):
    """Whether it returns true in a process that is forked off now."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(60)
            code = 0 if action() else 2
        finally:
            # Nothing of the tests may run on here.
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_process_that_is_forked_off_while_a_thread_predicts_predicts_and_fits(tokenizer):
    """The adapter of that thread, and what catches logits for it, are taken off there."""
    model = tiny_llama()
    fitted = classifier(model, tokenizer).fit(TEXTS, ["bill", "parcel"])
    expected = fitted.predict_proba(TEXTS)
    inside, done = threading.Event(), threading.Event()

    def wait(*_):
        handle.remove()
        inside.set()
        assert done.wait(60)

    handle = model.model.layers[1].register_forward_pre_hook(wait)

    def in_the_child():
        again = classifier(model, tokenizer).fit(TEXTS, ["bill", "parcel"])
        left = [name for name, _ in model.named_modules() if name.endswith(ATTRIBUTE)]
        found = fitted.predict_proba(TEXTS)
        return not left and all(
            np.allclose(each, expected, atol=1e-6) for each in (found, again.predict_proba(TEXTS))
        )

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(fitted.predict_proba, TEXTS)
        assert inside.wait(30)
        try:
            assert is_right_in_a_fork(in_the_child)
        finally:
            done.set()
        assert np.array_equal(other.result(), expected)


def test_a_prediction_that_another_thread_asks_for_during_a_fit_is_of_one_fit(tokenizer):
    """Not of the new labels with the old vectors."""
    shared = classifier(tiny_llama(), tokenizer).fit(TEXTS, OLD)
    old, asked = shared.predict(TEXTS).tolist(), []
    with ThreadPoolExecutor(2) as pool:

        def ask(_):
            asked.append(pool.submit(shared.predict, TEXTS))

        shared.fit(TEXTS, ["yes", "no"], on_step=ask)
    new = shared.predict(TEXTS).tolist()
    assert len(asked) == 2
    assert all(predicted.result().tolist() in (old, new) for predicted in asked)


def test_a_fit_is_prepared_while_another_thread_takes_an_adapter_off(tokenizer, monkeypatch):
    """What is asked of the model's weights before the training waits for its turn."""
    model, on, off = tiny_llama(), threading.Event(), threading.Event()
    base, parameters = load_base_model(model, tokenizer=tokenizer), model.named_parameters

    def put_on_for_a_moment():
        with temporary_adapter(base, all_linear(base)):
            on.set()
            off.wait(0.3)

    def one_by_one(*given, **named):
        for name, each in parameters(*given, **named):
            yield name, each
            if on.is_set() and ATTRIBUTE in name:
                off.set()
                other.result(60)

    with ThreadPoolExecutor(1) as pool, monkeypatch.context() as patched:
        other = pool.submit(put_on_for_a_moment)
        assert on.wait(30)
        patched.setattr(model, "named_parameters", one_by_one)
        classifier(model, tokenizer)._prepare(TEXTS, OLD, None)


def test_a_prediction_during_which_another_model_is_fitted_is_of_the_fit_that_it_began_with(
    tokenizer,
):
    """Another model has another lock, so that the fit does not wait for the prediction."""
    model, other = tiny_llama(), tiny_llama(seed=1)
    shared = classifier(model, tokenizer).fit(TEXTS, OLD)
    old = shared.predict_proba(TEXTS)
    inside, done = threading.Event(), threading.Event()

    def wait(*_):
        handle.remove()
        inside.set()
        assert done.wait(60)

    handle = model.model.layers[1].register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        predicted = pool.submit(shared.predict, TEXTS)
        assert inside.wait(30)
        try:
            shared.set_params(model=other).fit(TEXTS, ["yes", "no"])
        finally:
            done.set()
        assert predicted.result().tolist() == np.array(OLD)[old.argmax(1)].tolist()
    assert set(shared.predict(TEXTS)) <= {"yes", "no"}


def test_an_interrupt_while_an_adapter_is_put_on_for_a_call_takes_it_off_again(monkeypatch):
    base = load_base_model(tiny_llama(), tokenizer=word_tokenizer())
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    from ia3.model.frozen_base import FrozenBase

    def interrupt(self):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(FrozenBase, "freeze", interrupt)
    with pytest.raises(KeyboardInterrupt), temporary_adapter(base, all_linear(base)):
        pass
    monkeypatch.undo()
    after = base.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    with temporary_adapter(base, all_linear(base)):
        pass
