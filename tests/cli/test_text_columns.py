"""A text's column by its own name in a template, or as `text`; and columns that are not there."""

from __future__ import annotations

import csv
import json

import pytest
from support.command import Place, assert_refused, said

from ia3 import FewShotClassifier

# Eight commands are run for them.
pytestmark = pytest.mark.slow

TRAIN = """review,label
so good,positive
never again,negative
lovely,positive
a waste,negative
"""
TEST = "body,label\nso good,positive\na waste of time,negative\n"
BOTH = "title,body,label\na,so good,positive\nb,never again,negative\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model):
    place = Place(tmp_path_factory.mktemp("columns"), tiny_model)
    for name, content in {"train.csv": TRAIN, "test.csv": TEST, "both.csv": BOTH}.items():
        place.write(name, content)
    fit = ("fit", "--model", tiny_model, "--steps", 2, "--json", "--data")
    review = (*fit, "train.csv", "--text", "review", "--template")
    place.done = place.run_all(
        (*review, "{{ review }} is", "--out", "own"),
        (*review, "{{ text }} is", "--out", "text"),
        (*fit, "both.csv", "--text", "title", "--text", "body", "--out", "both"),
        ("predict", "own", "--data", "test.csv", "--text", "body"),
        ("predict", "text", "--data", "test.csv", "--text", "body"),
        ("evaluate", "own", "--data", "test.csv", "--text", "body", "--json"),
        ("predict", "both", "--data", "test.csv", "--text", "body"),
        ("predict", "own", "--data", "both.csv", "--text", "title", "--text", "body"),
    )
    return place


def test_both_names_train_the_same(place):
    own, text = (said(done) for done in place.done[:2])
    assert own["final_loss"] == text["final_loss"]
    fields = [json.loads((place.folder / n / "ia3_task.json").read_text()) for n in ("own", "text")]
    assert [task["fields"] for task in fields] == [["review"], ["text"]]


def test_a_column_of_another_name_is_predicted_and_evaluated(place):
    own, text, evaluated = place.done[3:6]
    assert own.stdout == text.stdout
    rows = list(csv.DictReader(own.stdout.splitlines()))
    right = sum(row["label"] == row["prediction"] for row in rows)
    assert said(evaluated)["accuracy"] == right / 2
    # In Python a string is the only field, whatever its name.
    texts = [row["body"] for row in rows]
    classifier = FewShotClassifier.load(place.folder / "own")
    assert classifier.predict(texts).tolist() == [row["prediction"] for row in rows]
    given = [{"review": text} for text in texts]
    assert (classifier.predict_proba(given) == classifier.predict_proba(texts)).all()


def test_columns_that_are_not_given_are_named(place):
    assert said(place.done[2])["classes"] == ["negative", "positive"]
    message = "both reads the fields title, body, and --text names body: give --text title --text"
    assert_refused(place.done[6], message)
    assert_refused(place.done[7], "own reads the field review, and --text names title, body")
