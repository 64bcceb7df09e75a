"""`ia3 check`, and what `ia3 fit` says of its data before it loads anything."""

from __future__ import annotations

import json

import pytest
from support.command import Place, assert_refused

TRAIN = """text,label
I was charged twice.,billing
i was charged twice. ,delivery
Where is my parcel?,delivery
Where is my parcel?,delivery
 ,delivery
The invoice is wrong.,Billing
"""
TEST = "text,label\nwhere is my  parcel?,delivery\nI want a refund,refund\n"
GOOD = "text,label\nI was charged twice.,billing\nWhere is my parcel?,delivery\n"


@pytest.fixture
def place(tmp_path):
    place = Place(tmp_path)
    for name, content in {"train.csv": TRAIN, "test.csv": TEST, "good.csv": GOOD}.items():
        place.write(name, content)
    return place


def test_check_prints_what_is_wrong_and_with_strict_fails(place):
    shown, told, strict, good, absent, column = place.run_all(
        ("check", "train.csv", "--test", "test.csv"),
        ("check", "train.csv", "--test", "test.csv", "--json"),
        ("check", "train.csv", "--strict"),
        ("check", "good.csv", "--strict"),
        ("check", "none.csv"),
        ("check", "train.csv", "--text", "txt"),
    )
    assert not place.loaded
    assert (shown.returncode, shown.stderr) == (0, "")
    words = " ".join(shown.stdout.split())
    for expected in (
        "empty: 1 text is empty: train.csv, line 6",
        "contradictory: 1 text has two labels: train.csv, line 2 and line 3",
        "repeated: 1 text is there more than once: train.csv, line 4 and line 5",
        "similar labels: labels that differ by case or white space alone",
        "overlap: 1 test text is among the training texts: test.csv, line 2 is train.csv, line 4",
        "unknown label: no training text has the test's label 'refund' (test.csv, line 3)",
        "6 texts and 2 test texts: 6 problems found",
    ):
        assert expected in words
    assert max(map(len, shown.stdout.splitlines())) <= 80
    told = json.loads(told.stdout)
    assert (told["examples"], told["tests"]) == (6, 2)
    assert told["labels"] == {"billing": 1, "delivery": 4, "Billing": 1, "refund": 0}
    assert told["test_labels"] == {"billing": 0, "delivery": 1, "Billing": 0, "refund": 1}
    kinds = ["empty", "contradictory", "repeated", "similar labels", "overlap", "unknown label"]
    assert [finding["kind"] for finding in told["findings"]] == kinds
    assert told["findings"][0]["rows"] == ["train.csv, line 6"]
    assert strict.returncode == 1
    assert "6 texts: 4 problems found" in strict.stdout
    assert (good.returncode, good.stderr) == (0, "")
    assert "2 texts: no problem found" in good.stdout
    assert_refused(absent, "data file none.csv does not exist")
    assert_refused(column, "did you mean 'text'?")


def test_fit_says_the_same_before_it_loads_anything_and_strict_stops_it(place):
    (strict,) = place.run_all(("fit", "--data", "train.csv", "--out", "x", "--strict"))
    assert not place.loaded
    assert (strict.returncode, strict.stdout) == (1, "")
    *warnings, error = strict.stderr.splitlines()
    assert error == (
        "error: the data has 4 problems, and --strict takes none: mend the data, or leave --strict "
        "out"
    )
    assert len(warnings) == 4
    assert warnings[0] == "warning: train.csv, line 6: the text is empty"
    for line, expected in zip(warnings[1:], ("two labels", "more than once", "case"), strict=True):
        assert line.startswith("warning: ")
        assert expected in line
    assert not (place.folder / "x").exists()


@pytest.mark.slow
def test_fit_trains_all_the_same_where_it_is_not_told_to_be_strict(tmp_path, tiny_model):
    place = Place(tmp_path, tiny_model)
    place.write("train.csv", TRAIN)
    settings = "defaults: {steps: 0, max_words: 3}"
    place.write(
        "m.yaml", f"model: {tiny_model}\n{settings}\ntasks: {{queue: {{data: train.csv}}}}\n"
    )
    fit = ("fit", "--model", tiny_model, "--data", "train.csv", "--steps", 0)
    done, short, many = place.run_all(
        (*fit, "--out", "x"),
        (*fit, "--out", "y", "--max-words", 3),
        ("fit-many", "m.yaml", "--out", "m"),
    )
    assert done.returncode == many.returncode == 0, done.stderr + many.stderr
    assert done.stderr.count("warning: ") == 4
    assert many.stderr.count("warning: task 'queue': ") == 4  # one is of what is not read
    assert "warning: 5 of 6 texts have more than 3 words: " in short.stderr
    assert "; a larger --max-words has more read" in short.stderr
    for folder, words in (("x", 500), ("y", 3), ("m/queue", 3)):
        task = json.loads((place.folder / folder / "ia3_task.json").read_text())
        assert task["max_words"] == words


def test_labels_with_a_separator_are_looked_at_one_by_one(place):
    rows = ("I was charged twice.,billing;urgent", "i was charged twice.,urgent; billing")
    place.write("several.csv", "\n".join(["text,label", *rows, "Hello,", "Where is it?,Urgent"]))
    place.write("one.csv", "text,label\na,billing\nb,billing\n")
    several = ("--multilabel", ";")
    told, strict, one, refused = place.run_all(
        ("check", "several.csv", *several, "--json"),
        ("fit", "--data", "several.csv", "--out", "x", *several, "--strict"),
        ("check", "one.csv", "--strict"),
        ("check", "several.csv"),
    )
    assert not place.loaded
    told = json.loads(told.stdout)
    assert told["labels"] == {"billing": 2, "urgent": 2, "Urgent": 1}
    assert [finding["kind"] for finding in told["findings"]] == ["repeated", "similar labels"]
    assert "'urgent' (2), 'Urgent' (1)" in told["findings"][1]["message"]
    assert "the data has 2 problems" in strict.stderr
    assert one.returncode == 1
    assert "one class: all labels are 'billing'" in one.stdout
    assert_refused(refused, "several.csv, line 4: the label 'label' is empty")
