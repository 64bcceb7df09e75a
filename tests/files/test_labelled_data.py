"""What is wrong with labelled texts, on texts of which that is known."""

from __future__ import annotations

import enum
import random
import subprocess
import sys
import time

import pytest

from ia3 import check_examples
from ia3.errors import IA3Error, InvalidTypeError
from ia3.files.labelled_data import cut

TEXTS = ["charged twice", "wrong invoice", "lost parcel", "late again"]
LABELS = ["billing", "billing", "delivery", "delivery"]


def found(texts, labels, **more):
    """Kind -> the rows of each finding of it."""
    kinds = {}
    for finding in check_examples(texts, labels, **more):
        kinds.setdefault(finding.kind, []).append(finding.rows)
    return kinds


def test_where_nothing_is_wrong_nothing_is_found():
    assert check_examples(TEXTS, LABELS) == []
    assert check_examples(TEXTS, LABELS, test_texts=["a refund"], test_labels=["billing"]) == []


CASES = {
    "empty": (["", " \n", "a", "b"], LABELS, [("text 0", "text 1")]),
    "repeated": (["a b", "A  B\n", "c", "d"], LABELS, [("text 0", "text 1")]),
    "contradictory": (["a", "b", "b", "c"], LABELS, [("text 1", "text 2")]),
    "similar labels": (TEXTS, ["billing", "Billing ", "delivery", "delivery"], [("text 1",)]),
    "one class": (TEXTS, ["billing"] * 4, [tuple(f"text {i}" for i in range(4))]),
    "imbalanced": ([f"t{i}" for i in range(11)], ["a"] * 10 + ["b"], [("text 10",)]),
    "long": (["word " * 501, "word " * 500, "c", "d"], LABELS, [("text 0",)]),
}


@pytest.mark.parametrize("kind", CASES)
def test_each_kind_is_found_and_no_other(kind):
    texts, labels, rows = CASES[kind]
    assert found(texts, labels) == {kind: rows}


def test_a_message_names_the_places_the_text_and_what_to_do():
    where = [f"train.csv, line {line}" for line in (2, 5, 7, 9)]
    (finding,) = check_examples(["a", "b", "b", "b"], LABELS, where=where)
    assert finding.message == (
        "1 text has two labels: train.csv, line 5 and line 7 ('b' is 'billing' and 'delivery'): "
        "keep the right one"
    )
    assert finding.rows == tuple(where[1:])
    (finding,) = check_examples(TEXTS, ["x" * 500, "X" * 500, "b", "b"])
    assert len(finding.message) < 400


def test_a_label_that_is_rare_and_almost_another_may_be_a_slip_of_the_pen():
    def slips(*labels):
        kinds = found([f"t{i}" for i in range(len(labels))], labels)
        return kinds.get("similar labels", [])

    assert slips(*["delivery"] * 3, "delivry", "billing") == [("text 3",)]
    # Names that are alike, and mean something else.
    assert slips(*["delivery"] * 2, "delivry") == []
    assert slips(*["intent_10"] * 3, "intent_11") == []
    assert slips(*["relevant"] * 3, "irrelevant") == []
    assert slips(*["positive"] * 3, "negative") == []


def test_a_test_text_that_was_trained_on_and_a_label_that_was_not():
    test = {"test_texts": ["Lost  parcel", "new", ""], "test_labels": ["delivery", "biling", "x"]}
    where = {"test_where": ["test.csv, line 2", "test.csv, line 3", "test.csv, line 4"]}
    findings = check_examples(TEXTS, LABELS, **test, **where)
    assert [(each.kind, each.rows) for each in findings] == [
        ("empty", ("test.csv, line 4",)),
        ("overlap", ("test.csv, line 2",)),
        ("unknown label", ("test.csv, line 3",)),
        ("unknown label", ("test.csv, line 4",)),
    ]
    assert "test.csv, line 2 is text 2 ('Lost parcel')" in findings[1].message
    assert findings[2].message.endswith("; did you mean 'billing'?")
    # Copies in the test are its own, one text with two labels is not.
    again = {"test_texts": ["n", "n", "m", "m"], "test_labels": ["billing"] * 3 + ["delivery"]}
    assert found(TEXTS, LABELS, **again) == {"contradictory": [("test text 2", "test text 3")]}


def test_texts_of_several_fields_and_several_labels_a_text():
    rows = [{"title": "a", "body": "b"}, {"title": "a b", "body": ""}, {"title": "A", "body": "B"}]
    assert found(rows, ["x", "y", "x"]) == {"repeated": [("text 0", "text 2")]}
    many = [["x", "y"], {"y"}, ("y", "x")]
    assert found(rows, many) == {"repeated": [("text 0", "text 2")]}
    assert found(rows, [["x"], ["y"], ["x", "y"]]) == {"contradictory": [("text 0", "text 2")]}


def test_pandas_numpy_and_enumerations_are_taken():
    np, pd = pytest.importorskip("numpy"), pytest.importorskip("pandas")

    class Queue(enum.Enum):
        BILLING = "billing"
        DELIVERY = "Billing"

    frame = pd.DataFrame({"text": ["a", "a"]})
    for labels in (np.array(["x", "y"]), pd.Series(["x", "y"]), [0, 1], [True, False]):
        assert found(frame["text"], labels) == {"contradictory": [("text 0", "text 1")]}
        assert found(frame, labels) == {"contradictory": [("text 0", "text 1")]}
    assert "similar labels" in found(["a", "b"], [Queue.BILLING, Queue.DELIVERY])


BAD = [
    (("a text", ["x"]), {}, InvalidTypeError, "texts is one str, expected a list of texts"),
    ((["a", None], ["x", "y"]), {}, InvalidTypeError, "text 1 is None"),
    ((TEXTS, LABELS[:3]), {}, IA3Error, "there are 4 texts and 3 labels"),
    ((TEXTS, LABELS), {"where": ["a"]}, IA3Error, "there are 4 texts and 1 where"),
    ((TEXTS, LABELS), {"max_words": 0}, IA3Error, "max_words is 0, expected at least 1"),
    ((TEXTS, LABELS), {"test_labels": ["x"]}, IA3Error, "without test_texts"),
    ((TEXTS, LABELS), {"test_texts": ["x"]}, InvalidTypeError, "test_labels is None"),
]


@pytest.mark.parametrize(("given", "more", "kind", "message"), BAD)
def test_what_cannot_be_looked_at_is_refused(given, more, kind, message):
    with pytest.raises(kind, match=message):
        check_examples(*given, **more)


def test_a_cut_text_is_a_beginning_with_so_many_words():
    draw = random.Random(0)
    for _ in range(200):
        words = ["".join(draw.choices("abcé", k=draw.randint(1, 20))) for _ in range(30)]
        between = [draw.choice([" ", "\n", "  ", "\t"]) for _ in words]
        text = "".join(a + b for pair in zip(words, between, strict=True) for a, b in [pair])
        short = cut(text, 12)
        assert text.startswith(short)
        assert short.split() == words[:12]
        assert cut(text, 30) == text
        assert cut(cut(text, 12), 12) == short


@pytest.mark.parametrize("text", ["a" * 100_000, "漢字" * 50_000, "😀" * 100_000, "ไทย" * 30_000])
def test_a_text_without_spaces_has_a_bound_too(text):
    assert len(cut(text, 500)) <= 500 * 20
    assert cut("漢字" * 50_000, 500) == "漢字" * 250


def test_thousands_of_long_texts_are_looked_at_in_seconds():
    texts = [f"{i} " + "some words " * 50 for i in range(5_000)] + ["x" * 2_000_000]
    started = time.process_time()
    kinds = found(texts, [str(i % 300) for i in range(5_000)] + ["0"])
    assert kinds == {"long": [("text 5000",)]}
    assert time.process_time() - started < 60


def test_nothing_heavy_is_imported():
    code = "import ia3, sys; ia3.check_examples(['a', 'a'], ['x', 'y']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "numpy", "sklearn", "transformers"}.isdisjoint(done.stdout.split())
