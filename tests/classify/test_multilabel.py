"""Classifiers of texts that have any number of labels each."""

from __future__ import annotations

import json
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.multiclass import OneVsRestClassifier
from sklearn.preprocessing import MultiLabelBinarizer
from support.sentences import LABELS, TEXTS, bert, tokenizer
from support.tfew import tiny_llama, word_tokenizer
from transformers import BertModel

import ia3
from ia3 import AdapterBank, FewShotClassifier, IA3Model, fit_many
from ia3.errors import IA3Error, InvalidTypeError
from ia3.sentences.head import ITERATIONS, STRENGTH, fit_head

TOPICS = [["bill"], ["bill", "late"], ["bill"], ["late"], ["van"], ["late", "van"], [], ["van"]]
NEW = ["a charge", "the van", "is the bill paid", "x y z"]


def make(**settings: Any) -> FewShotClassifier:
    given = {"model": bert(), "tokenizer": tokenizer(), "steps": 4, "multilabel": True}
    return FewShotClassifier(**{**given, **settings})


# -- the formula -----------------------------------------------------------------------------------


def test_each_label_has_a_sigmoid_of_its_own_on_adapted_embeddings():
    classifier = make().fit(TEXTS, TOPICS)
    assert classifier.classes_.tolist() == ["bill", "late", "van"]
    assert classifier.engine_ == "encoder"
    assert classifier.multilabel_
    fresh, known = bert(), tokenizer()
    IA3Model.from_adapter(fresh, classifier.adapter_)
    head, rows = classifier.head_, []
    for text in NEW:
        with torch.no_grad():
            hidden = fresh(input_ids=torch.tensor([known(text)["input_ids"]])).last_hidden_state[0]
        rows.append(hidden.mean(0).double() @ head.weight.double().T + head.bias.double())
    expected = 1 / (1 + np.exp(-torch.stack(rows).numpy()))
    np.testing.assert_allclose(classifier.predict_proba(NEW), expected, atol=1e-4)
    labels = [
        [c for c, p in zip(classifier.classes_, row, strict=True) if p >= 0.5] for row in expected
    ]
    assert classifier.predict(NEW).tolist() == labels


def test_the_head_is_scikit_learns_logistic_regression_of_each_label():
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(30, 5, generator=generator)
    has = torch.rand(30, 3, generator=generator) > 0.5
    targets = [row.nonzero().flatten().tolist() for row in has]
    head = fit_head(found, targets, 3)
    inner = LogisticRegression(C=STRENGTH, max_iter=ITERATIONS)
    theirs = OneVsRestClassifier(inner).fit(found.double().numpy(), has.numpy().astype(int))
    expected = theirs.predict_proba(found.double().numpy())
    np.testing.assert_allclose(head.scores(found).sigmoid().numpy(), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("class_weight", "samples"), [("balanced", None), ({"b": 3.0}, None), (None, [2, 0.5, 1] * 4)]
)
def test_weights_are_those_of_scikit_learns_regressions(class_weight, samples):
    texts = [f"{word} {other}" for word in ("bill", "van", "late") for other in "axyz"]
    rows = [["b"] if i < 4 else ["b", "v"] if i < 6 else ["v"] if i < 9 else [] for i in range(12)]
    classifier = make(steps=0, class_weight=class_weight).fit(texts, rows, samples)
    with torch.no_grad():
        known, model = tokenizer(), bert()
        embedded = (
            torch.stack(
                [
                    model(input_ids=torch.tensor([known(t)["input_ids"]]))
                    .last_hidden_state[0]
                    .mean(0)
                    for t in texts
                ]
            )
            .double()
            .numpy()
        )
    for place, label in enumerate("bv"):
        weight = {True: 3.0} if class_weight == {"b": 3.0} and label == "b" else class_weight
        weight = None if isinstance(weight, dict) and label == "v" else weight
        theirs = LogisticRegression(C=STRENGTH, max_iter=ITERATIONS, class_weight=weight)
        theirs.fit(embedded, [label in row for row in rows], sample_weight=samples)
        expected = theirs.predict_proba(embedded)[:, 1]
        np.testing.assert_allclose(classifier.predict_proba(texts)[:, place], expected, atol=1e-2)


def test_training_brings_texts_together_that_share_labels():
    learned = make(steps=40).fit(TEXTS, TOPICS)
    assert learned.score(TEXTS, TOPICS) == 1
    losses = [step.loss for step in learned.history_]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    (frozen,) = learned.candidates_
    assert 0 <= frozen.accuracy <= 1
    assert frozen.note == "frozen, held-out folds, 8 texts"


def test_a_label_that_all_texts_have_or_none_is_no_error():
    classifier = make(steps=2).fit(TEXTS, [[*own, "all"] for own in TOPICS])
    place = classifier.classes_.tolist().index("all")
    # By the rule of succession, of eight texts.
    np.testing.assert_allclose(classifier.predict_proba(NEW)[:, place], 9 / 10)


# -- labels as they are given ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        [tuple(own) for own in TOPICS],
        [{*own} for own in TOPICS],
        [frozenset(own) for own in TOPICS],
        [np.array(own, dtype=object) for own in TOPICS],
        [own[::-1] for own in TOPICS],
        (own for own in TOPICS),
    ],
)
def test_lists_tuples_sets_and_arrays_of_labels_are_the_same(given):
    expected = make(steps=1).fit(TEXTS, TOPICS)
    classifier = make(steps=1).fit(TEXTS, given)
    np.testing.assert_array_equal(classifier.predict_proba(NEW), expected.predict_proba(NEW))


def test_labels_of_other_kinds():
    numbers = {"bill": 3, "late": -1, "van": 7}
    classifier = make(steps=1).fit(
        TEXTS, [[float(numbers[label]) for label in own] for own in TOPICS]
    )
    assert classifier.classes_.tolist() == [-1, 3, 7]
    assert {type(label) for own in classifier.predict(TEXTS) for label in own} <= {int}
    assert classifier.score(TEXTS, classifier.predict(TEXTS)) == 1


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS, r"the labels of text 0 are 'billing', expected a list, such as \['a', 'b'\] or"),
        ([*TOPICS[:3], None, *TOPICS[4:]], "the labels of text 3 are None"),
        ([*TOPICS[:3], [None], *TOPICS[4:]], "a label of text 3 is None"),
        ([*TOPICS[:3], ["van", 1], *TOPICS[4:]], "a label of text 3 is 1, but a label of text 0"),
        ([*TOPICS[:3], [" "], *TOPICS[4:]], "a label of text 3 is ' ': leave out"),
        ([*TOPICS[:3], ["van", "van"], *TOPICS[4:]], "text 3 has the label 'van' twice"),
        ({("a",)}, "labels is one set, which has no order"),
        (TOPICS[:-1], "there are 8 texts and 7 labels"),
        ([[]] * 8, "no text has a label: name at least two"),
        ([["a"], []] * 4, "all labels are 'a', one class: name at least two"),
        (np.eye(8, 3, dtype=int), r"labels is an array \[8, 3\].*MultiLabelBinarizer"),
    ],
    ids=str,
)
def test_what_are_no_lists_of_labels_is_refused_with_its_row(labels, message):
    classifier = make()
    with pytest.raises(IA3Error, match=message):
        classifier.fit(TEXTS, labels)
    assert not hasattr(classifier, "classes_")


def test_lists_of_labels_without_the_setting_name_it():
    with pytest.raises(InvalidTypeError, match=r"label 0 is \['bill'\].*give multilabel=True"):
        make(multilabel=False).fit(TEXTS, TOPICS)
    with pytest.raises(InvalidTypeError, match="multilabel is 1, expected True or False"):
        make(multilabel=1).fit(TEXTS, TOPICS)


def test_a_language_model_refuses_and_names_the_encoder():
    model = tiny_llama()
    classifier = FewShotClassifier(model, tokenizer=word_tokenizer(["a"]), multilabel=True)
    with pytest.raises(IA3Error, match=r"several labels a text are an encoder's.*all-minilm-l6-v2"):
        classifier.fit(TEXTS, TOPICS)
    with pytest.raises(IA3Error, match="choices are a language model's"):
        make(choices={"bill": "money"}).fit(TEXTS, TOPICS)
    # What chooses between the two has nothing to choose.
    chosen = FewShotClassifier(language_model=model, multilabel=True, steps=0)
    assert chosen.fit(TEXTS, TOPICS).engine_ == "encoder"


# -- what scikit-learn does with it ----------------------------------------------------------------


def test_predictions_go_through_scikit_learns_binarizer_and_search():
    classifier = make(steps=2).fit(TEXTS, TOPICS)
    predicted = classifier.predict(TEXTS)
    assert (predicted.dtype, predicted.shape) == (object, (8,))
    binarizer = MultiLabelBinarizer(classes=classifier.classes_).fit([])
    assert (binarizer.transform(predicted) == (classifier.predict_proba(TEXTS) >= 0.5)).all()
    assert classifier.classes_at(np.full((2, 3), 0.6)).tolist() == [["bill", "late", "van"]] * 2
    assert classifier.predict([]).tolist() == []
    assert classifier.predict("a bill").tolist() == classifier.predict(["a bill"]).tolist()
    search = GridSearchCV(make(), {"steps": [0, 2]}, cv=KFold(2, shuffle=True, random_state=0))
    assert search.fit(TEXTS, TOPICS).best_params_["steps"] in (0, 2)
    assert clone(classifier).multilabel
    again = pickle.loads(pickle.dumps(classifier.set_params(model="all-minilm-l6-v2")))
    assert again.multilabel_


def test_the_score_is_the_share_of_texts_whose_labels_are_all_right():
    classifier = make(steps=2).fit(TEXTS, TOPICS)
    predicted = classifier.predict(TEXTS).tolist()
    given = [[*reversed(own)] for own in predicted]
    assert classifier.score(TEXTS, given) == 1
    given[0] = [] if given[0] else ["van"]
    assert classifier.score(TEXTS, given) == 7 / 8
    assert classifier.score(TEXTS, given, [9, *[1] * 7]) == 7 / 16
    with pytest.raises(
        IA3Error, match=r"label 'bil' \(row 0\) is not among .* did you mean 'bill'"
    ):
        classifier.score(TEXTS, [["bil"], *given[1:]])


# -- files, and other classifiers beside it --------------------------------------------------------


def test_saved_and_loaded_it_predicts_the_same_and_is_format_3(tmp_path):
    model = bert()
    classifier = make(model=model).fit(TEXTS, TOPICS)
    classifier.save(tmp_path)
    task = json.loads((tmp_path / "ia3_task.json").read_text("utf-8"))
    assert (task["format"], task["multilabel"]) == (3, True)
    head = load_file(tmp_path / "ia3_head.safetensors")
    assert {name: list(value.shape) for name, value in head.items()} == {
        "weight": [3, 16],
        "bias": [3],
    }
    loaded = FewShotClassifier.load(tmp_path, model=model, tokenizer=tokenizer())
    np.testing.assert_array_equal(loaded.predict_proba(NEW), classifier.predict_proba(NEW))
    assert loaded.predict(NEW).tolist() == classifier.predict(NEW).tolist()
    assert loaded.multilabel is loaded.multilabel_ is True
    make(model=model, multilabel=False).fit(TEXTS, LABELS).save(tmp_path)
    task = json.loads((tmp_path / "ia3_task.json").read_text("utf-8"))
    assert task["format"] == 2
    assert "multilabel" not in task


def test_a_batch_has_texts_of_one_label_and_of_several(tmp_path):
    model, words = bert(), tokenizer()
    model.save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    several = FewShotClassifier(base, steps=2, multilabel=True).fit(TEXTS, TOPICS)
    one = FewShotClassifier(base, steps=2).fit(TEXTS, LABELS)
    bank = AdapterBank(BertModel.from_pretrained(base, add_pooling_layer=False).eval())
    for name, classifier in (("several", several), ("one", one)):
        classifier.save(tmp_path / name)
        bank.add(name, tmp_path / name)
    found = ia3.classify(bank, [*NEW, *NEW], ["several", "one"] * 4)
    texts = [*NEW, *NEW]
    for row, (text, each) in enumerate(zip(texts, found, strict=True)):
        alone = one if row % 2 else several
        (probabilities,) = alone.predict_proba([text])
        np.testing.assert_allclose([*each.probabilities.values()], probabilities, atol=1e-4)
        assert each.label == alone.classes_[probabilities.argmax()]
        assert each.labels == ([each.label] if row % 2 else alone.predict([text])[0])


def test_fit_many_takes_it_as_fit_does():
    alone = make().fit(TEXTS, TOPICS)
    fitted = fit_many({"topics": (TEXTS, TOPICS)}, make())
    assert not fitted.failures
    many = fitted.classifiers["topics"]
    np.testing.assert_array_equal(many.predict_proba(NEW), alone.predict_proba(NEW))
