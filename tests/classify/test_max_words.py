"""How much of a long text is read: the same in training, in prediction and in a mixed batch."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from support.pairs import same_vectors
from support.tfew import tiny_llama, word_tokenizer

import ia3
from ia3 import FewShotClassifier
from ia3.errors import IA3Error, InvalidTypeError

TEXTS = ["red fox", "a lazy dog", "the fox", "my brown dog"]
LABELS = ["fox", "dog", "fox", "dog"]
LONG = "fox red " * 400
TOKENIZER = word_tokenizer([*" ".join(TEXTS).split(), "Fox", "Dog", "Category", ":"])


@pytest.fixture
def make():
    model = tiny_llama(max_position_embeddings=2048)

    def classifier(**settings):
        settings = {"steps": 2, "template": "{{ text }} Category :", **settings}
        return FewShotClassifier(model, tokenizer=TOKENIZER, **settings)

    return classifier


def test_a_longer_text_is_its_beginning_with_one_warning(make):
    with pytest.warns(UserWarning, match="more than") as caught:
        long = make().fit([*TEXTS, LONG, LONG], [*LABELS, "fox", "fox"])
    (warning,) = caught
    assert str(warning.message).startswith("2 of 6 texts have more than 500 words: ")
    assert warning.filename == __file__
    beginning = " ".join(LONG.split()[:500])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short = make().fit([*TEXTS, beginning, beginning], [*LABELS, "fox", "fox"])
        expected = short.predict_proba([beginning])
    assert same_vectors(long, short)
    with pytest.warns(UserWarning, match="^1 of 2 texts has more than 500 words: ") as caught:
        found = long.predict_proba([LONG, "fox"])
    assert len(caught) == 1
    np.testing.assert_allclose(found[:1], expected, atol=1e-6)


def test_the_bound_is_saved_and_an_older_file_has_none(make, tmp_path):
    fitted = make(max_words=3).fit(TEXTS, LABELS)
    fitted.save(tmp_path)
    loaded = FewShotClassifier.load(tmp_path, model=fitted.model, tokenizer=TOKENIZER)
    assert (loaded.max_words, loaded.settings_["max_words"]) == (3, 3)
    with pytest.warns(UserWarning, match="1 of 2 texts has more than 3 words"):
        both = loaded.predict_proba(["red fox red dog dog", "red fox red"])
    np.testing.assert_allclose(both[0], both[1], atol=1e-6)
    path = tmp_path / "ia3_task.json"
    task = json.loads(path.read_text())
    del task["max_words"]
    path.write_text(json.dumps(task))
    old = FewShotClassifier.load(tmp_path, model=fitted.model, tokenizer=TOKENIZER)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = old.predict_proba(["red fox red dog dog"])
    assert old.max_words is None
    assert abs(whole - both[:1]).max() > 1e-7


def test_none_reads_all(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = make(max_words=None).fit([*TEXTS, LONG], [*LABELS, "fox"])
    assert whole.settings_["max_words"] is None


def test_a_mixed_batch_reads_as_much_as_each_classifier_alone(make, tmp_path):
    texts = ["red fox red dog dog", "red fox red dog dog"]
    alone = []
    bank = None
    for name, words in (("a", 2), ("b", 4)):
        fitted = make(max_words=words, seed=words).fit(TEXTS, LABELS)
        fitted.save(tmp_path / name)
        with pytest.warns(UserWarning, match=f"more than {words} words"):
            alone.append(fitted.predict_proba(texts[:1])[0])
        bank = bank or ia3.AdapterBank(tiny_llama(max_position_embeddings=2048))
        bank.add(name, tmp_path / name)
    with pytest.warns(UserWarning, match="more than") as caught:
        found = ia3.classify(bank, texts, ["a", "b"], tokenizer=TOKENIZER)
    assert len(caught) == 2
    for row, of_one in zip(found, alone, strict=True):
        np.testing.assert_allclose(list(row.probabilities.values()), of_one, atol=1e-5)


@pytest.mark.parametrize(
    ("value", "kind"), [(0, IA3Error), (-1, IA3Error), (1.5, InvalidTypeError), ("9", IA3Error)]
)
def test_a_bound_that_is_none_is_refused(make, value, kind):
    with pytest.raises(kind, match="max_words is"):
        make(max_words=value).fit(TEXTS, LABELS)
