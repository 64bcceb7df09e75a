"""`ia3 suggest`, `fit --unlabelled` and `combine` of classifiers, as a person types them."""

from __future__ import annotations

import csv
import io
import json

import pytest
from support.command import Place, assert_refused, said
from support.encoders import bert, encoder_folder

from ia3 import FewShotClassifier, suggest

TRAIN = """text,label
the quick brown fox,fox
a fox jumps,fox
what fox,fox
The Fox,fox
the lazy dog,dog
a dog,dog
what lazy dog,dog
over the dog,dog
"""
UNLABELLED = """id,text
1,the fox over a dog
2,the fox over a dog
3,brown
4,lazy
5,what query
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two classifiers of the same labels, one of others, and an adapter alone."""
    place = Place(tmp_path_factory.mktemp("next"))
    encoder_folder(place.folder / "encoder", bert())
    place.write("train.csv", TRAIN)
    place.write("others.csv", TRAIN.replace(",dog", ",cat"))
    place.write("unlabelled.csv", UNLABELLED)
    place.write("words.csv", TRAIN.replace("text,", "words,"))
    place.write("several.csv", TRAIN + "the fox over a dog,fox;dog\nwhat fox over a dog,dog;fox\n")
    fit = ("fit", "--data", "train.csv", "--model", "encoder", "--steps", 2)
    place.done = place.run_all(
        (*fit, "--out", "first", "--json"),
        (*fit, "--out", "second", "--seed", 1, "--json"),
        (*fit, "--out", "other", "--data", "others.csv", "--json"),
        (*fit, "--out", "more", "--unlabelled", "unlabelled.csv"),
        (*fit, "--out", "more-json", "--unlabelled", "unlabelled.csv", "--json"),
        (*fit, "--out", "x", "--unlabelled", "nowhere.csv"),
        ("suggest", "first", "--data", "unlabelled.csv", "--number", 2),
        ("suggest", "first", "--data", "unlabelled.csv", "--out", "next.jsonl"),
        ("suggest", "first", "--data", "train.csv", "--text", "words"),
        ("combine", "first", "second", "--out", "both", "--json"),
        ("combine", "first", "other", "--out", "apart"),
        ("evaluate", "both", "--data", "train.csv", "--json"),
        ("suggest", "both", "--data", "unlabelled.csv", "--out", "next.jsonl"),
        (*fit, "--out", "x", "--unlabelled", "unlabelled.csv", "--checkpoints", "kept"),
        (*fit, "--out", "named", "--data", "words.csv", "--text", "words", "--no-report"),
        ("suggest", "named", "--data", "words.csv", "--text", "words", "--number", 1),
        (*fit, "--out", "several", "--data", "several.csv", "--multilabel", ";", "--no-report"),
        ("suggest", "several", "--data", "unlabelled.csv", "--number", 4),
        ("suggest", "several", "--data", "unlabelled.csv", "--number", 4, "--json"),
    )
    return place


def test_suggest_prints_rows_with_what_the_classifier_would_say(place):
    done = place.done[6]
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert list(rows[0]) == ["id", "text", "prediction", "probability"]
    assert len(rows) == 2
    assert {row["prediction"] for row in rows} <= {"fox", "dog"}
    classifier = FewShotClassifier.load(place.folder / "first", model=place.folder / "encoder")
    texts = [row["text"] for row in csv.DictReader(io.StringIO(UNLABELLED))]
    expected = suggest(classifier, texts, 2)
    assert [int(row["id"]) - 1 for row in rows] == [each.row for each in expected]


def test_suggest_says_where_there_are_fewer_different_texts(place):
    done = place.done[7]
    assert "unlabelled.csv has 4 different texts: these are all" in done.stderr
    lines = (place.folder / "next.jsonl").read_text().splitlines()
    assert len({json.loads(line)["text"] for line in lines}) == len(lines) == 4


def test_suggest_names_the_column_and_the_file_that_it_would_replace(place):
    assert_refused(place.done[8], "train.csv: no column 'words'")
    assert_refused(place.done[12], "next.jsonl exists already")


def test_suggest_reads_a_column_of_any_name(place):
    done = place.done[15]
    assert (done.returncode, done.stdout.splitlines()[0]) == (
        0,
        "words,label,prediction,probability",
    )


def test_suggest_says_several_labels_as_fit_takes_them(place):
    in_csv, in_json = place.done[17:19]
    rows = list(csv.DictReader(io.StringIO(in_csv.stdout)))
    lists = [json.loads(line)["prediction"] for line in in_json.stdout.splitlines()]
    assert [row["prediction"] for row in rows] == [";".join(labels) for labels in lists]
    assert {label for labels in lists for label in labels} <= {"fox", "dog"}


def test_fit_with_unlabelled_texts_says_what_was_decided_and_keeps_it(place):
    done, as_json = place.done[3:5]
    assert done.returncode == 0, done.stderr
    assert "trained on the labelled: held-out folds, 8 texts" in done.stderr
    assert "of 4 unlabelled, " in done.stderr
    *_, plain, with_them = said(as_json)["candidates"]
    assert plain["engine"] == with_them["engine"] == "encoder"
    assert with_them["note"].endswith(": held-out folds, 8 texts")
    kept = json.loads((place.folder / "more-json" / "ia3_task.json").read_text())["selection"]
    assert kept[-1] == with_them
    assert_refused(place.done[5], "nowhere.csv does not exist")
    refused = place.done[13]
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "--checkpoints: they are of one training" in refused.stderr
    assert not (place.folder / "x").exists()


def test_classifiers_become_one_that_predicts(place):
    made = said(place.done[9])
    assert made["classes"] == ["dog", "fox"]
    assert said(place.done[11])["examples"] == 8
    names = {path.name for path in (place.folder / "both").iterdir()}
    assert {"ia3_task.json", "ia3_head.safetensors", "adapter_config.json"} <= names


def test_classifiers_of_other_labels_become_an_adapter_with_a_warning(place):
    done = place.done[10]
    assert done.returncode == 0, done.stderr
    assert "warning: this makes an adapter, and no classifier: first and other have" in done.stderr
    assert "different labels: ['dog', 'fox'] and ['cat', 'fox']" in done.stderr
    names = {path.name for path in (place.folder / "apart").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
