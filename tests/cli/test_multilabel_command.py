"""`ia3 fit`, `predict` and `evaluate` of texts with several labels, as they are typed."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from support.command import Place
from support.sentences import TEXTS, bert, tokenizer

TOPICS = [["bill"], ["bill", "late"], ["bill"], ["late"], ["van"], ["late", "van"], [], ["van"]]
WRITTEN = ["bill", "bill; late", " bill ", "late", "van;", "late;van", "", "van"]
FIT = ("fit", "--model", "encoder", "--steps", "4")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder: Path = tmp_path_factory.mktemp("multilabel")
    bert().save_pretrained(folder / "encoder")
    tokenizer().save_pretrained(folder / "encoder")
    made = Place(folder)
    rows = [f'"{text}","{cell}"\n' for text, cell in zip(TEXTS, WRITTEN, strict=True)]
    made.write("train.csv", "text,label\n" + "".join(rows))
    rows = [
        json.dumps({"text": text, "label": labels})
        for text, labels in zip(TEXTS, TOPICS, strict=True)
    ]
    made.write("train.jsonl", "\n".join(rows) + "\n")
    made.write("twice.csv", "text,label\na bill,bill\nthe van,van;van\n")
    made.write("wrong.csv", "text,label\na bill,bill\nthe van,vam\n")
    return made


@pytest.mark.slow
def test_labels_with_a_separator_are_trained_on_and_predicted(place: Place) -> None:
    several = ("--multilabel", ";")
    commands = [
        (*FIT, "--data", "train.csv", "--out", "csv", *several, "--json"),
        (*FIT, "--data", "train.jsonl", "--out", "jsonl", *several, "--json"),
        ("predict", "csv", "--data", "train.csv"),
        ("predict", "csv", "--data", "train.csv", "--json"),
        ("predict", "csv", "--data", "train.csv", "--multilabel", "i"),
        ("evaluate", "csv", "--data", "train.csv", *several),
        ("evaluate", "csv", "--data", "train.csv", *several, "--json"),
        ("evaluate", "csv", "--data", "train.csv"),
        ("evaluate", "csv", "--data", "wrong.csv", *several),
        (*FIT, "--data", "twice.csv", "--out", "twice", *several),
        (*FIT, "--data", "train.csv", "--out", "none", "--multilabel", " "),
        (*FIT, "--data", "train.csv", "--out", "none", *several, "--choice", "bill=money"),
    ]
    done = place.run_all(*commands)
    fitted, of_lists, as_csv, as_json, between, table, scores, *wrong = done
    assert (fitted.returncode, of_lists.returncode) == (0, 0), fitted.stderr + of_lists.stderr
    assert json.loads(fitted.stdout)["classes"] == ["bill", "late", "van"]
    for name in ("csv", "jsonl"):
        task = json.loads((place.folder / name / "ia3_task.json").read_text("utf-8"))
        assert (task["format"], task["multilabel"]) == (3, True)
    one, other = (place.folder / name / "adapter_model.safetensors" for name in ("csv", "jsonl"))
    assert one.read_bytes() == other.read_bytes()

    found = [json.loads(line) for line in as_json.stdout.splitlines()]
    rows = [*csv.DictReader(io.StringIO(as_csv.stdout))]
    assert [row["text"] for row in rows] == TEXTS
    for row, line in zip(rows, found, strict=True):
        assert row["prediction"] == ";".join(line["prediction"])
        assert row["probability"] == ";".join(map(str, line["probability"]))
        assert all(each >= 0.5 for each in line["probability"])
        assert {*line["prediction"]} <= {"bill", "late", "van"}
    assert between.returncode == 1
    assert "has 'i' in it: give another --multilabel" in " ".join(between.stderr.split())

    assert all(word in table.stdout for word in ("bill", "late", "van", "precision", "macro F1"))
    read = json.loads(scores.stdout)
    exact = sum({*a} == {*b["prediction"]} for a, b in zip(TOPICS, found, strict=True)) / 8
    assert read["accuracy"] == exact
    assert [each["texts"] for each in read["by_class"]] == [3, 3, 3]

    for command, message in zip(
        wrong,
        [
            "gives a text any number of labels: say what is between them",
            "wrong.csv, line 3: the label 'vam' is not among the choices",
            "twice.csv, line 3: the label 'van' is there twice",
            "' ' separates nothing",
            "--multilabel trains a sentence encoder",
        ],
        strict=True,
    ):
        assert command.returncode != 0
        assert message in " ".join(command.stderr.replace("│", " ").split())


def test_mistakes_are_looked_for_among_labels_and_not_among_cells(place: Place) -> None:
    rows = "".join(f"text {number} about it,bill;late\n" for number in range(10))
    place.write("many.csv", f"text,label\n{rows}a van,van\nis late,late;bill\nIS late,Bill\n")
    place.write("asked.csv", "text,label\na bill,late\nthe truck,van;truck\n")
    check = ("check", "many.csv", "--test", "asked.csv", "--multilabel", ";", "--json")
    checked, unlabelled, strict = place.run_all(
        check,
        (*FIT, "--data", "many.csv", "--out", "n", "--multilabel", ";", "--unlabelled", "many.csv"),
        (*FIT, "--data", "many.csv", "--out", "n", "--multilabel", ";", "--strict"),
    )
    assert not place.loaded
    told = json.loads(checked.stdout)
    assert told["labels"] == {"bill": 11, "late": 11, "van": 1, "Bill": 1, "truck": 0}
    assert told["test_labels"] == {"bill": 0, "late": 1, "van": 1, "Bill": 0, "truck": 1}
    said = {each["kind"]: each["message"] for each in told["findings"]}
    assert [*said] == ["contradictory", "similar labels", "imbalanced", "unknown label"]
    assert "'bill, late' and 'Bill'" in said["contradictory"]
    assert "the test's label 'truck'" in said["unknown label"]
    assert "one label each" in " ".join(unlabelled.stderr.split())
    assert "the data has 3 problems" in strict.stderr
