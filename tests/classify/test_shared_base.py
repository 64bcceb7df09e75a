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


def test_a_prediction_while_another_thread_fits_is_of_one_fit(tokenizer, monkeypatch):
    """Not of the new labels with the old vectors."""
    model = tiny_llama()
    shared = classifier(model, tokenizer, steps=0).fit(TEXTS, ["bill", "parcel"])
    keep, found = FewShotClassifier._keep_task, []
    reader = threading.Thread(target=lambda: found.append(shared.predict(TEXTS)))

    def late(self, *given):
        keep(self, *given)
        reader.start()
        reader.join(0.5)

    monkeypatch.setattr(FewShotClassifier, "_keep_task", late)
    adapter = shared.adapter_
    seen = []
    with monkeypatch.context() as patch:
        own = FewShotClassifier._probabilities
        patch.setattr(
            FewShotClassifier,
            "_probabilities",
            lambda self, *given: (seen.append(self.adapter_), own(self, *given))[1],
        )
        shared.fit(TEXTS, ["yes", "no"])
        reader.join()
    assert set(found[0]) <= {"yes", "no"}
    assert seen == [shared.adapter_]
    assert shared.adapter_ is not adapter


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
