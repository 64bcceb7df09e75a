"""scikit-learn's estimators around a classifier, which hand it numbers in place of labels."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import StackingClassifier, VotingClassifier
from sklearn.model_selection import StratifiedKFold
from sklearn.multiclass import OneVsRestClassifier
from sklearn.preprocessing import LabelEncoder
from support.sentences import LABELS, TEXTS, bert, tokenizer
from support.tfew import tiny_llama, word_tokenizer

from ia3 import FewShotClassifier

WORDS = [*" ".join(TEXTS).split(), "money", "parcels", "0", "1", "3", "7"]
WORDS += ["True", "False", "Category", ":"]
KNOWN, MODEL = word_tokenizer(WORDS), tiny_llama()
# By the labels' own names.
CHOICES = {"delivery": "parcels", "billing": "money"}


def ranking(**settings: Any) -> FewShotClassifier:
    return FewShotClassifier(MODEL, tokenizer=KNOWN, steps=2, **settings)


def numbered(choices: dict[str, str]) -> tuple[LabelEncoder, dict[int, str]]:
    """The recipe: number the labels first, and the choices by it."""
    encoder = LabelEncoder().fit([*choices])
    return encoder, {i: choices[label] for i, label in enumerate(encoder.classes_)}


def around(kind: str, classifier: FewShotClassifier) -> Any:
    folds = StratifiedKFold(2)
    return {
        "voting": VotingClassifier([("a", classifier), ("b", classifier)], voting="soft"),
        "stacking": StackingClassifier([("a", classifier)], cv=folds),
        "calibration": CalibratedClassifierCV(classifier, ensemble=False, cv=folds),
    }[kind]


@pytest.mark.parametrize("kind", ["voting", "stacking", "calibration"])
def test_choices_by_the_labels_own_names_hold_where_the_labels_are_numbered(kind):
    encoder, choices = numbered(CHOICES)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing is asked for the words 0 and 1
        meta = around(kind, ranking(choices=choices)).fit(TEXTS, encoder.transform(LABELS))
    predicted = encoder.inverse_transform(meta.predict(TEXTS))
    assert {*predicted} <= {*LABELS}
    alone = ranking(choices=CHOICES).fit(TEXTS, LABELS)
    if kind == "voting":
        np.testing.assert_allclose(meta.predict_proba(TEXTS), alone.predict_proba(TEXTS))
        assert predicted.tolist() == alone.predict(TEXTS).tolist()
        inner = meta.estimators_[0]
    elif kind == "stacking":
        inner = meta.estimators_[0]
    else:
        inner = meta.calibrated_classifiers_[0].estimator
    assert inner.choices_ == ["money", "parcels"] == alone.choices_


def test_voting_that_numbers_the_labels_itself_is_told_once():
    meta = around("voting", ranking())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        meta.fit(TEXTS, LABELS)
    told = [
        str(each.message) for each in caught if "are ranked as these words" in str(each.message)
    ]
    assert len(told) == 1
    assert "scikit-learn numbers the labels" in told[0]
    assert "choices=dict(enumerate(words))" in told[0]
    (place,) = {each.filename for each in caught if "are ranked" in str(each.message)}
    assert place == __file__


@pytest.mark.parametrize("labels", [[3, 7] * 4, [True, False] * 4])
def test_labels_that_nobody_numbered_are_not_taken_for_such(labels):
    with pytest.warns(UserWarning, match="are ranked as these words") as caught:
        ranking().fit(TEXTS, labels)
    assert not any("numbers the labels" in str(each.message) for each in caught)


def test_one_classifier_a_label_asks_an_encoder_for_no_words():
    encoder = FewShotClassifier(bert(), tokenizer=tokenizer(), steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        meta = OneVsRestClassifier(encoder).fit(TEXTS, LABELS)
    assert meta.predict(TEXTS).shape == (8,)
    assert {*meta.predict(TEXTS)} <= {*LABELS}


def test_a_language_model_has_its_words_in_a_classifier_for_each_label():
    # One-versus-rest with words: what the number 1 means differs from label to label.
    rest = {}
    for label, words in CHOICES.items():
        of_label = ranking(choices={True: words, False: "0"})
        rest[label] = of_label.fit(TEXTS, [each == label for each in LABELS])
    scores = np.stack([rest[label].predict_proba(TEXTS)[:, 1] for label in CHOICES], axis=1)
    assert scores.shape == (8, 2)
    assert rest["billing"].choices_ == ["0", "money"]


def test_a_choice_of_the_language_model_is_told_of_its_labels_too():
    # What chooses says it after it has chosen: an encoder reads nothing into labels.
    from ia3.classify.choosing import AutoEngine

    chooser = FewShotClassifier(encoder=bert(), language_model=MODEL, steps=1)
    chooser._load = lambda model, engine=None: load(model, engine)  # type: ignore[method-assign]

    def load(model: Any, engine: Any) -> Any:
        from ia3.base.encoders import load_encoder
        from ia3.base.loading import load_base_model

        if engine == "encoder":
            return load_encoder(model, tokenizer=tokenizer())
        return load_base_model(model, tokenizer=KNOWN)

    engine, task = chooser._prepare(TEXTS, [0, 1] * 4)
    assert isinstance(engine, AutoEngine)
    seen = [
        replace(each, candidate=each.candidate.model_copy(update={"accuracy": accuracy}))
        for each, accuracy in zip(engine.seen(task), (0.0, 1.0), strict=True)
    ]
    engine.seen = lambda task: seen  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="are ranked as these words"):
        assert engine.train(task).engine == "language-model"
