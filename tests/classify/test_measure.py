"""How good a classifier is, against scikit-learn's figures and answers counted by hand."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
)
from support.encoders import encoder_folder

from ia3 import FewShotClassifier, IA3Error
from ia3.classify.measure import (
    UNTRAINED,
    has_a_fifth,
    measured_by_training,
    measured_on,
    new_among,
    record_of,
    seen_before_training,
    without_training,
)

CLASSES = ["bill", "gate", "van"]
WORDS = {"bill": "the quick brown fox", "gate": "lazy dog query", "van": "passage over jumps"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return encoder_folder(tmp_path_factory.mktemp("encoder"))


def task(count, seed=0):
    """Texts of three classes, of words that are mostly the class's own."""
    draw = random.Random(seed)
    everything = " ".join(WORDS.values()).split()
    labels = [label for label in CLASSES for _ in range(count)]
    texts = [
        " ".join(draw.choices(WORDS[label].split(), k=3) + draw.choices(everything, k=2))
        for label in labels
    ]
    return texts, labels


def test_the_figures_are_scikit_learns():
    draw = np.random.default_rng(0)
    given = draw.choice(CLASSES, 60).tolist()
    probabilities = draw.dirichlet([1, 1, 1], 60)
    predicted = [CLASSES[i] for i in probabilities.argmax(1)]
    texts = [f"text {i}" for i in range(60)]
    found = record_of(texts, given, predicted, probabilities, CLASSES, "drawn")
    assert found.accuracy == accuracy_score(given, predicted)
    assert found.error == pytest.approx(np.sqrt(found.accuracy * (1 - found.accuracy) / 60))
    assert found.macro_f1 == pytest.approx(f1_score(given, predicted, average="macro"))
    assert found.confusion == confusion_matrix(given, predicted, labels=CLASSES).tolist()
    expected = precision_recall_fscore_support(given, predicted, labels=CLASSES)
    for name, values in zip(("precision", "recall", "f1", "texts"), expected, strict=True):
        assert [getattr(score, name) for score in found.by_class] == pytest.approx(values.tolist())
    wrong = [i for i in range(60) if given[i] != predicted[i]]
    assert {mistake.row for mistake in found.mistakes} == {*wrong}
    assert found.right == 60 - len(wrong)
    sure = [mistake.probability for mistake in found.mistakes]
    assert sure == sorted(sure, reverse=True)
    for mistake in found.mistakes:
        assert mistake.text == texts[mistake.row]
        assert (mistake.label, mistake.predicted) == (given[mistake.row], predicted[mistake.row])
        assert mistake.probability == probabilities[mistake.row].max()
    assert json.loads(json.dumps(found.to_json()))["confusion"] == found.confusion


def test_a_class_without_texts_or_answers_has_no_share():
    sure = np.array([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0]])
    found = record_of(["a", "b"], ["bill", "gate"], ["bill", "bill"], sure, CLASSES, "given")
    bill, gate, van = found.by_class
    assert (bill.precision, bill.recall) == (0.5, 1.0)
    assert (gate.precision, gate.recall, gate.f1) == (None, 0.0, 0.0)
    assert (van.texts, van.precision, van.recall, van.f1) == (0, None, None, None)
    # Of the classes that have a text.
    assert found.macro_f1 == pytest.approx((2 / 3 + 0) / 2)


def test_texts_with_several_labels_or_none_are_right_as_a_whole():
    sure = np.array([[0.9, 0.8, 0.1], [0.2, 0.3, 0.6], [0.1, 0.2, 0.3]])
    given, got = [["gate", "bill"], ["van", "bill"], []], [("bill", "gate"), {"van"}, []]
    found = record_of([{"text": "a"}, "b", "c"], given, got, sure, CLASSES, "given")
    assert (found.accuracy, found.confusion) == (2 / 3, None)
    (mistake,) = found.mistakes
    assert (mistake.label, mistake.predicted) == (["bill", "van"], ["van"])
    assert mistake.probability == 0.6
    assert [score.recall for score in found.by_class] == [0.5, 1.0, 1.0]


def test_a_label_that_is_no_class_is_refused():
    with pytest.raises(IA3Error, match="label 'lorry' \\(row 0\\) is not among the classes"):
        record_of(["a"], ["lorry"], ["van"], np.ones((1, 3)) / 3, CLASSES, "given")


def test_fields_of_a_text_are_shown_together():
    given = [{"title": "Late", "body": "by a week"}]
    found = record_of(given, ["van"], ["bill"], np.eye(3)[:1], CLASSES, "given")
    assert found.mistakes[0].text == "Late · by a week"


def test_other_texts_are_counted_as_predict_answers_them_beside_the_frozen_model(folder):
    texts, labels = task(4)
    others, truth = task(6, seed=1)
    classifier = FewShotClassifier(str(folder), steps=4).fit(texts, labels)
    frozen = without_training(classifier).fit(texts, labels)
    done = []
    found = measured_on(classifier, others, truth, "elsewhere", frozen=frozen, progress=done.append)
    assert sum(done) == 2 * len(others)
    assert found.accuracy == classifier.score(others, truth)
    # The same without this package's way to say so.
    expected = FewShotClassifier(str(folder), steps=0).fit(texts, labels).score(others, truth)
    assert found.frozen.accuracy == expected
    assert found.frozen.what == UNTRAINED["encoder"]
    assert found.trained
    assert found.how == "elsewhere"


def test_by_five_trainings_each_text_is_answered_by_one_that_has_not_seen_it(folder):
    texts, labels = task(6)
    classifier = FewShotClassifier(str(folder), steps=3).fit(texts, labels)
    before = classifier.predict_proba(texts)
    learned = []

    class Watched(FewShotClassifier):
        def fit(self, X, y, **more):
            learned.append((self.steps, [*X]))
            return super().fit(X, y, **more)

    watched = Watched(str(folder), steps=3).fit(texts, labels)
    learned.clear()
    found = measured_by_training(watched, texts, labels)
    assert found.texts == len(texts)
    assert found.trained
    trained = [of for steps, of in learned if steps]
    assert [steps for steps, _ in learned] == [3, 0] * 5
    held_out = [[text for text in texts if text not in of] for of in trained]
    # Texts may be the same by chance; none is held out twice.
    assert sum(map(len, held_out)) <= len(texts)
    assert sum(len(texts) - len(of) for of in trained) == len(texts)
    assert np.array_equal(before, classifier.predict_proba(texts))
    assert {mistake.row for mistake in found.mistakes} <= {*range(len(texts))}
    for mistake in found.mistakes:
        assert mistake.label == labels[mistake.row]
        assert mistake.text == texts[mistake.row]


def test_one_training_without_a_fifth_is_measured_on_that_fifth(folder):
    texts, labels = task(16)
    assert has_a_fifth(labels)
    assert not has_a_fifth(labels[1:])
    classifier = FewShotClassifier(str(folder), steps=2).fit(texts, labels)
    found = measured_by_training(classifier, texts, labels, most=1)
    # A fifth of 48, of each class alike.
    assert 9 <= found.texts <= 10
    assert all(3 <= score.texts <= 4 for score in found.by_class)
    assert f"without {found.texts} texts" in found.how


def test_a_text_that_was_trained_on_under_another_row_is_not_asked(folder):
    texts, labels = task(5)
    texts = [f"{text} {index}" for index, text in enumerate(texts)]
    texts[1] = texts[0]
    classifier = FewShotClassifier(str(folder), steps=1).fit(texts, labels)
    asked = measured_by_training(classifier, texts, labels)
    # By what scikit-learn's folds hold out, with one of the two on either side.
    assert asked.texts == 13
    assert f"each of {asked.texts} texts" in asked.how
    assert seen_before_training(classifier, texts, labels).texts == 13
    assert new_among([texts[0], "another", {"text": texts[2]}], texts) == [1]
    same, label = ["the fox"] * 6, ["van", "bill"] * 3
    again = FewShotClassifier(str(folder), steps=0).fit(same, label)
    assert measured_by_training(again, same, label) is None
    assert seen_before_training(again, same, label) is None


def test_nothing_is_held_out_of_classes_of_one_text(folder):
    texts, labels = task(1)
    classifier = FewShotClassifier(str(folder), steps=1).fit(texts, labels)
    assert measured_by_training(classifier, texts, labels) is None
    assert seen_before_training(classifier, texts, labels) is None


def test_the_folds_from_before_training_are_those_of_the_candidate(folder, tmp_path):
    texts, labels = task(5)
    classifier = FewShotClassifier(str(folder), steps=2).fit(texts, labels)
    found = seen_before_training(classifier, texts, labels)
    (frozen,) = classifier.candidates_
    assert not found.trained
    # The folds are drawn several times: a mean of answers, and a mean of what is right.
    assert found.accuracy == pytest.approx(frozen.accuracy, abs=2 * frozen.error)
    assert found.how == f"{UNTRAINED['encoder']}, held-out folds"
    assert found.texts == len(texts)
    assert all(labels[mistake.row] == mistake.label for mistake in found.mistakes)
    # What was answered is not saved.
    classifier.save(tmp_path / "saved")
    loaded = FewShotClassifier.load(tmp_path / "saved")
    assert seen_before_training(loaded, texts, labels) is None
    assert loaded.candidates_ == classifier.candidates_


def test_the_engine_that_was_chosen_is_trained_again(folder, tiny_model):
    texts, labels = task(5)
    classifier = FewShotClassifier(
        encoder=str(folder), language_model=str(tiny_model), steps=1, template="{{ text }} is"
    ).fit(texts, labels)
    again = without_training(classifier)
    assert (classifier.engine_, again.model) == ("language-model", str(tiny_model))
    assert (again.steps, again.template) == (0, "{{ text }} is")


def test_a_record_cannot_be_changed():
    found = record_of(["a"], ["van"], ["van"], np.eye(3)[2:], CLASSES, "given")
    with pytest.raises(AttributeError):
        found.accuracy = 1.0
    assert replace(found, how="otherwise").how == "otherwise"
