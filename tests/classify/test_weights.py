"""`sample_weight` and `class_weight`: what counts more in training, and by how much."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.utils.class_weight import compute_class_weight
from support.sentences import LABELS, TEXTS, bert, tokenizer
from support.tfew import tiny_llama, word_tokenizer

from ia3 import FewShotClassifier
from ia3.classify.weights import text_weights, weights_of_texts
from ia3.errors import IA3Error, InvalidTypeError
from ia3.sentences.head import ITERATIONS, STRENGTH

NEW = ["a charge", "the van", "is the bill paid", "x y z"]
WEIGHTS = [1, 2, 0.5, 4, 1, 0, 3, 1]
WORDS = word_tokenizer([*" ".join(TEXTS).split(), "billing", "delivery", "Category", ":"])


def encoder(**settings: Any) -> FewShotClassifier:
    given = {"model": bert(), "tokenizer": tokenizer(), "steps": 4}
    return FewShotClassifier(**{**given, **settings})


def ranking(**settings: Any) -> FewShotClassifier:
    given = {"model": tiny_llama(), "tokenizer": WORDS, "steps": 4}
    return FewShotClassifier(**{**given, **settings})


def embedded() -> np.ndarray:
    known, model = tokenizer(), bert()
    with torch.no_grad():
        rows = [model(input_ids=torch.tensor([known(text)["input_ids"]])) for text in TEXTS]
    return torch.stack([row.last_hidden_state[0].mean(0) for row in rows]).double().numpy()


KINDS = pytest.mark.parametrize("make", [encoder, ranking])


@pytest.mark.parametrize("class_weight", [None, "balanced", {0: 5.0}])
def test_the_head_is_scikit_learns_with_these_weights(class_weight):
    labels = [0] * 6 + [1] * 2
    classifier = encoder(steps=0, class_weight=class_weight)
    classifier.fit(TEXTS, labels, sample_weight=WEIGHTS)
    theirs = LogisticRegression(C=STRENGTH, max_iter=ITERATIONS, class_weight=class_weight)
    theirs.fit(embedded(), labels, sample_weight=WEIGHTS)
    expected = theirs.predict_proba(embedded())
    np.testing.assert_allclose(classifier.predict_proba(TEXTS), expected, atol=2e-2)


@pytest.mark.parametrize(
    ("class_weight", "samples", "of_texts", "of_names"),
    [
        (None, [1 / 80] * 8, [1 / 80] * 8, [1 / 80, 1 / 80]),
        # A text of weight 0 is none.
        (None, WEIGHTS, WEIGHTS, [1.7, 2]),
        ({"billing": 5.0}, None, [5] * 6 + [1] * 2, [5, 1]),
    ],
)
def test_the_name_of_a_label_weighs_as_much_as_its_texts_in_the_mean(
    class_weight, samples, of_texts, of_names
):
    numbers = [0] * 6 + [1] * 2
    classifier = encoder(steps=0, class_weight=class_weight)
    classifier.fit(TEXTS, [["billing", "delivery"][number] for number in numbers], samples)
    expected = encoder(steps=0)
    expected.fit([*TEXTS, "billing", "delivery"], [*numbers, 0, 1], [*of_texts, *of_names])
    np.testing.assert_allclose(classifier.predict_proba(NEW), expected.predict_proba(NEW))


def test_balanced_is_scikit_learns():
    for targets in ([0, 0, 0, 1], [0, 2, 2, 1, 1, 1]):
        classes = sorted({*targets})
        expected = compute_class_weight("balanced", classes=np.array(classes), y=targets)
        found = weights_of_texts(None, "balanced", classes, targets)
        np.testing.assert_allclose(found.numpy(), [expected[target] for target in targets])
        # A class without texts counts for nothing.
        more = weights_of_texts(None, "balanced", [*classes, len(classes)], targets)
        np.testing.assert_allclose(more.numpy(), found.numpy())


@KINDS
def test_a_text_of_weight_0_is_as_one_that_is_not_there(make):
    kept = [row for row, weight in enumerate(WEIGHTS) if weight]
    weighted = make().fit(TEXTS, LABELS, WEIGHTS)
    left = make().fit(
        [TEXTS[row] for row in kept], [LABELS[row] for row in kept], [WEIGHTS[row] for row in kept]
    )
    np.testing.assert_array_equal(weighted.predict_proba(NEW), left.predict_proba(NEW))


@KINDS
def test_weights_that_are_all_alike_train_as_none(make):
    plain = make().fit(TEXTS, LABELS)
    for settings, given in (({}, [1] * 8), ({"class_weight": "balanced"}, None)):
        same = make(**settings).fit(TEXTS, LABELS, given)
        np.testing.assert_allclose(
            same.predict_proba(NEW), plain.predict_proba(NEW), rtol=1e-3, atol=1e-4
        )


@KINDS
def test_what_weighs_more_is_learned_more(make):
    # One text with two labels: the heavier one wins.
    texts, labels = [*TEXTS, "lost ok", "lost ok"], [*LABELS, "billing", "delivery"]
    for heavy, label in ((8, "billing"), (9, "delivery")):
        weights = [1.0] * 8 + [0.01] * 2
        weights[heavy] = 30.0
        classifier = make(steps=40).fit(texts, labels, weights)
        assert classifier.predict(["lost ok"]).tolist() == [label]


@KINDS
def test_a_class_that_weighs_more_is_said_more_often(make):
    texts, labels = [*TEXTS, *TEXTS[:4]], [*LABELS, *["delivery"] * 4]
    of = {}
    for label in ("billing", "delivery"):
        classifier = make(steps=20, class_weight={label: 50.0}).fit(texts, labels)
        of[label] = classifier.predict_proba(TEXTS[:4])[:, 0].mean()
    assert of["billing"] > of["delivery"]


def test_the_loss_of_a_language_model_is_the_weighted_sum():
    from ia3.tfew.scoring.answer_tokens import TokenScores
    from ia3.tfew.training.losses import Counts, token_loss

    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(3, 2, 4, generator=generator) > 0.3
    mask[:, :, 0] = True
    scores = TokenScores(-torch.rand(3, 2, 4, generator=generator).double() * mask, mask)
    labels, weights = torch.tensor([0, 1, 0]), torch.tensor([0.5, 2.0, 0.25])
    right = int(sum(mask[i, int(label)].sum() for i, label in enumerate(labels)))
    counts = Counts(3, right, int(mask.sum()) - right)
    alone = [
        token_loss(
            TokenScores(scores.log_probs[i : i + 1], mask[i : i + 1]),
            labels[i : i + 1],
            counts=counts,
        )
        for i in range(3)
    ]
    both = token_loss(scores, labels, counts=counts, weights=weights)
    for term in ("total", "lm", "length_norm", "unlikelihood"):
        expected = sum(
            float(w) * float(getattr(one, term)) for w, one in zip(weights, alone, strict=True)
        )
        assert float(getattr(both, term)) == pytest.approx(expected, rel=1e-6)


def test_the_weights_of_texts_have_the_mean_1():
    given = torch.tensor([[1.0, 3.0], [0.0, 4.0], [2.0, 2.0]])
    np.testing.assert_allclose(text_weights(given).numpy(), [1, 1, 1])
    np.testing.assert_allclose(text_weights(torch.tensor([1.0, 3.0])).numpy(), [0.5, 1.5])


@KINDS
@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ([1] * 7, IA3Error, "sample_weight has 7 numbers for 8 texts"),
        (
            [1] * 7 + [-1],
            IA3Error,
            r"sample_weight\[7\] is -1, expected a finite number, at least 0",
        ),
        ([float("nan")] * 8, IA3Error, r"sample_weight\[0\] is nan"),
        ([1] * 7 + [1e300], IA3Error, r"sample_weight\[7\] is 1e\+300, expected at most 1e\+09"),
        (
            [1] * 7 + ["2"],
            InvalidTypeError,
            r"sample_weight\[7\] is '2' \(str\), expected a number",
        ),
        ([0] * 8, IA3Error, "each number of sample_weight is zero"),
        ([1] * 4 + [0] * 4, IA3Error, r"labels are \['billing'\]: expected at least two classes"),
        ({1.0, 2.0}, InvalidTypeError, "sample_weight is"),
        (2.0, InvalidTypeError, "sample_weight is 2.0, expected a number for each text"),
    ],
    ids=str,
)
def test_weights_that_are_none_are_refused_by_place(make, weights, error, message):
    classifier = make()
    with pytest.raises(error, match=message):
        classifier.fit(TEXTS, LABELS, weights)
    assert not hasattr(classifier, "classes_")


@pytest.mark.parametrize(
    ("class_weight", "error", "message"),
    [
        ("balance", InvalidTypeError, "class_weight is 'balance', expected None, 'balanced' or a"),
        ([1, 2], InvalidTypeError, r"class_weight is \[1, 2\], expected None"),
        ({"bill": 2}, IA3Error, r"class_weight has the label 'bill'.*did you mean 'billing'"),
        ({"billing": -1}, IA3Error, r"class_weight\['billing'\] is -1, expected a finite number"),
        ({"billing": "2"}, InvalidTypeError, r"class_weight\['billing'\] is '2' \(str\)"),
        ({"billing": 0}, IA3Error, r"labels are \['delivery'\]: expected at least two classes"),
    ],
    ids=str,
)
def test_class_weights_that_are_none_are_refused(class_weight, error, message):
    with pytest.raises(error, match=message):
        encoder(class_weight=class_weight).fit(TEXTS, LABELS)


def test_class_weights_that_leave_no_text_are_refused():
    settings = {"choices": {"billing": "bill", "delivery": "van"}, "class_weight": {"billing": 0}}
    with pytest.raises(IA3Error, match=r"the labels are \[\]: expected at least two classes"):
        ranking(**settings).fit(TEXTS[:4], ["billing"] * 4)


def test_a_class_that_weights_leave_out_counts_nothing_however_large_they_are():
    samples = torch.tensor([1e12, 1e12, 0.0], dtype=torch.float64)
    found = weights_of_texts(samples, "balanced", ["a", "b", "c"], [0, 1, 2])
    assert found.tolist() == samples.tolist()


def test_an_error_of_a_text_names_the_row_that_was_given():
    broken = [{"text": text} for text in TEXTS]
    broken[3] = {"text": None}
    with pytest.raises(IA3Error, match="text 3: the field 'text' is None"):
        encoder().fit(broken, LABELS, [0, 0, 1, 1, 1, 1, 1, 1])


@KINDS
def test_a_training_goes_on_only_with_its_weights(make, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = make().fit(TEXTS, LABELS, WEIGHTS, checkpoints=tmp_path)
        again = make().fit(TEXTS, LABELS, WEIGHTS, checkpoints=tmp_path)
    np.testing.assert_array_equal(first.predict_proba(NEW), again.predict_proba(NEW))
    with pytest.raises(IA3Error):
        make().fit(TEXTS, LABELS, checkpoints=tmp_path)
