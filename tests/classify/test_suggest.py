"""Which texts to label next: those that stand for many uncertain ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.sentences import LABELS, TEXTS, bert, tokenizer
from support.tfew import tiny_llama, word_tokenizer

from ia3 import FewShotClassifier, IA3Model, suggest
from ia3.base.encoders import load_encoder
from ia3.errors import IA3Error
from ia3.sentences.embedding import embeddings, tokenized

UNLABELLED = [
    *("the bill is late", "the bill is late", "a van", "the van", "x y z", "z y x", "the invoice"),
    *("a courier", "paid", "the parcel was paid , the bill was lost", "ok", "is the van wrong"),
]


@pytest.fixture(scope="module")
def classifier():
    return FewShotClassifier(bert(), tokenizer=tokenizer(), steps=3).fit(TEXTS, LABELS)


def by_the_formula(probabilities, vectors, number):
    """Each time the text after which the weighted sum of likenesses is largest."""
    ordered = np.sort(probabilities, axis=1)
    weights = 1 - (ordered[:, -1] - ordered[:, -2])
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors @ vectors.T
    chosen = []

    def sum_with(row):
        nearest = np.maximum(0, cosines[:, [*chosen, row]].max(1))
        return float(weights @ nearest)

    while len(chosen) < number:
        left = [row for row in range(len(weights)) if row not in chosen]
        chosen.append(max(left, key=sum_with))
    return chosen


@pytest.mark.filterwarnings("ignore:adapter 'default' rescales")
def test_each_text_brings_the_most_uncertainty_near(classifier):
    different = list(dict.fromkeys(UNLABELLED))
    base = load_encoder(bert(), tokenizer=tokenizer())
    # The classifier's own vectors, on a fresh model.
    model = IA3Model(base.model, classifier.adapter_.config)
    for name, vector in model.vectors("default").items():
        vector.data.copy_(classifier.adapter_.vectors[name])
    vectors = embeddings(base, tokenized(base, different), model=model).double().numpy()
    expected = by_the_formula(classifier.predict_proba(different), vectors, 5)
    found = suggest(classifier, UNLABELLED, 5)
    assert [each.text for each in found] == [different[row] for row in expected]
    assert [UNLABELLED[each.row] for each in found] == [each.text for each in found]
    assert [each.label for each in found] == classifier.predict(
        [each.text for each in found]
    ).tolist()
    most = classifier.predict_proba([each.text for each in found]).max(1)
    assert [each.probability for each in found] == pytest.approx(most.tolist())


def test_a_language_models_texts_are_as_far_apart_as_its_answers():
    words = " ".join([*TEXTS, *UNLABELLED, "Category : billing delivery"]).split()
    model = tiny_llama()
    classifier = FewShotClassifier(model, tokenizer=word_tokenizer(words), steps=2)
    classifier.fit(TEXTS, LABELS)
    different = list(dict.fromkeys(UNLABELLED))
    probabilities = classifier.predict_proba(different)
    expected = by_the_formula(probabilities, np.sqrt(probabilities), 4)
    assert [each.text for each in suggest(classifier, UNLABELLED, 4)] == [
        different[row] for row in expected
    ]


def test_no_text_comes_twice_and_there_are_no_more_than_there_are(classifier):
    found = suggest(classifier, UNLABELLED, 100)
    assert sorted(each.text for each in found) == sorted(set(UNLABELLED))


def test_beyond_those_compared_come_the_most_uncertain(classifier, monkeypatch):
    monkeypatch.setattr("ia3.classify.suggest.MOST_COMPARED", 3)
    different = list(dict.fromkeys(UNLABELLED))
    ordered = np.sort(classifier.predict_proba(different), axis=1)
    by_margin = np.argsort(ordered[:, -1] - ordered[:, -2], kind="stable")
    expected = [different[row] for row in by_margin[:5]]
    found = [each.text for each in suggest(classifier, UNLABELLED, 5)]
    assert (sorted(found[:3]), found[3:]) == (sorted(expected[:3]), expected[3:])


def test_mappings_and_tables_are_given_back_as_they_were(classifier):
    given = [{"text": text, "id": number} for number, text in enumerate(UNLABELLED)]
    found = suggest(classifier, given, 3)
    assert [each.text for each in found] == [given[each.row] for each in found]
    assert [each.row for each in found] == [each.row for each in suggest(classifier, UNLABELLED, 3)]


def test_texts_are_given_as_any_list_of_them(classifier):
    expected = suggest(classifier, UNLABELLED, 3)
    assert suggest(classifier, (text for text in UNLABELLED), 3) == expected
    assert suggest(classifier, np.array(UNLABELLED), 3) == expected
    named = FewShotClassifier(bert(), tokenizer=tokenizer(), steps=3)
    named.fit([{"review": text} for text in TEXTS], LABELS)
    assert suggest(named, UNLABELLED, 3) == expected


def test_the_classifier_and_torch_stay_as_they_are(classifier):
    before = {name: vector.clone() for name, vector in classifier.adapter_.vectors.items()}
    state = torch.get_rng_state()
    suggest(classifier, UNLABELLED, 2)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[n], v) for n, v in classifier.adapter_.vectors.items())


def test_a_number_below_one_and_a_missing_field_are_named(classifier):
    with pytest.raises(IA3Error, match="number is 0, expected at least 1"):
        suggest(classifier, UNLABELLED, 0)
    assert suggest(classifier, []) == []
    with pytest.raises(IA3Error, match="text 1 has no field 'text'"):
        suggest(classifier, [{"text": "a van"}, {"title": "a van"}])


def test_texts_may_come_one_by_one(classifier):
    assert suggest(classifier, iter(UNLABELLED), 2) == suggest(classifier, UNLABELLED, 2)
