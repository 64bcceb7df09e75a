"""One classifier of several: vectors combined, heads averaged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.sentences import LABELS, TEXTS, bert, tokenizer
from support.tfew import tiny_llama, word_tokenizer

from ia3 import FewShotClassifier, combine
from ia3.classify.combined import combined_fit, no_classifier
from ia3.classify.estimator import classifier_files, read_classifier


@pytest.fixture(scope="module")
def fits():
    model = bert()
    return [
        FewShotClassifier(model, tokenizer=tokenizer(), steps=3, seed=seed).fit(TEXTS, LABELS)._fit
        for seed in (0, 1)
    ]


def test_the_head_is_the_mean_that_the_vectors_weights_give(fits, tmp_path):
    weights = [3.0, 1.0]
    adapter = combine([("a", fits[0].adapter), ("b", fits[1].adapter)], weights, "average")
    fit = combined_fit(fits, weights, adapter)
    heads = [each.head for each in fits]
    expected = (3 * heads[0].weight.double() + heads[1].weight.double()) / 4
    assert torch.allclose(fit.head.weight.double(), expected, rtol=1e-6, atol=1e-7)
    expected = (3 * heads[0].bias.double() + heads[1].bias.double()) / 4
    assert torch.allclose(fit.head.bias.double(), expected, rtol=1e-6, atol=1e-7)
    (tmp_path / "both").mkdir()
    for name, content in classifier_files(replace(fit, model="x")).items():
        (tmp_path / "both" / name).write_bytes(content)
    read = read_classifier(tmp_path / "both")
    assert (read.classes, read.candidates, read.threads) == (fit.classes, [], None)
    assert all(torch.equal(v, adapter.vectors[n]) for n, v in read.adapter.vectors.items())


def test_a_classifier_with_itself_is_itself(fits):
    adapter = combine([("a", fits[0].adapter), ("b", fits[0].adapter)], [1, 1], "average")
    fit = combined_fit([fits[0], fits[0]], [1.0, 1.0], adapter)
    assert torch.equal(fit.head.weight, fits[0].head.weight)
    assert all(torch.equal(v, fits[0].adapter.vectors[n]) for n, v in adapter.vectors.items())


def test_what_differs_is_named(fits):
    first, second = fits
    for change, words in (
        ({"classes": ["billing", "other"]}, "different labels: ['billing', 'delivery'] and"),
        ({"templates": ["{{ text }}!"]}, "different templates"),
        ({"fields": ["title"]}, "different columns of text: ['text'] and ['title']"),
        ({"engine": "language-model"}, "different kinds of model"),
        ({"embedding": second.embedding.model_copy(update={"pooling": "cls"})}, "embed texts"),
        ({"settings": {**second.settings, "chat": True}}, "chat template"),
    ):
        problem = no_classifier([("a", first), ("b", replace(second, **change))], [1, 1])
        assert words in (problem or ""), change
    assert no_classifier([("a", first), ("b", second)], [1, 1]) is None
    unknown = replace(second, embedding=None)  # of an earlier version's file
    assert no_classifier([("a", first), ("b", unknown)], [1, 1]) is None
    assert "add up to 0" in (no_classifier([("a", first), ("b", second)], [1, -1]) or "")


def test_a_language_models_have_no_head():
    words = " ".join([*TEXTS, "Category : billing delivery"]).split()
    made = FewShotClassifier(tiny_llama(), tokenizer=word_tokenizer(words), steps=1)
    fit = made.fit(TEXTS, LABELS)._fit
    assert no_classifier([("a", fit), ("b", fit)], [1, -1]) is None
    assert combined_fit([fit, fit], [1, -1], fit.adapter).head is None
