"""What was measured, in 80 columns and on a page, with few classes and with many."""

import io
import re

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console
from support.page import Page

from ia3.classify.measure import Baseline, record_of
from ia3.report.measured_report import evaluation_report, fit_report
from ia3.report.scores import print_confusion, print_measured

LONG = "balance_not_updated_after_bank_transfer"


def measured(classes, texts=120, seed=0, text="the courier left it in the rain"):
    draw = np.random.default_rng(seed)
    given = draw.integers(0, len(classes), texts)
    found = draw.dirichlet([0.1] * len(classes), texts)
    # Two of three are right.
    found[np.arange(texts), given] += np.where(np.arange(texts) % 3, 1.0, 0.0)
    found /= found.sum(1, keepdims=True)
    predicted = [classes[i] for i in found.argmax(1)]
    frozen = Baseline("frozen encoder with logistic regression", 0.5, 0.05)
    named = [classes[i] for i in given]
    return record_of([text] * texts, named, predicted, found, classes, "on test.csv", frozen=frozen)


def printed(record, width=80):
    console = Console(file=io.StringIO(), width=width, emoji=False)
    print_measured(console, record, [f"test.csv, line {i + 2}" for i in range(record.texts)])
    return console.file.getvalue()


def page_of(record):
    places = [f"test.csv, line {i + 2}" for i in range(record.texts)]
    return evaluation_report(title="queue", facts=[], measured=record, places=places)


@pytest.mark.parametrize("count", [2, 6, 12, 13, 77])
@pytest.mark.parametrize("label", ["q", LONG])
def test_80_columns_hold_every_number_whatever_the_labels(count, label):
    record = measured([f"{label}_{n}" for n in range(count)], texts=40 * count)
    shown = printed(record)
    tables = [line for line in shown.splitlines() if not line.startswith("  test.csv")]
    assert max(map(cell_len, tables)) <= 80
    assert f"({record.right:,} of {record.texts:,})" in shown
    assert "without training: 50.0% ± 5.0" in shown
    # Precision, recall and F1 of a class stand in one line, after its texts.
    rows = re.findall(r"(?m)^ *\S+ +(\d+) +(\d+)% +(\d+)% +(\d+)% *$", shown)
    assert len(rows) == min(count, 20)
    by_texts = {
        (score.texts, *(f"{s:.0%}" for s in (score.precision, score.recall, score.f1)))
        for score in record.by_class
    }
    assert {(int(n), *(f"{x}%" for x in shares)) for n, *shares in rows} <= by_texts


def test_with_many_classes_the_weakest_are_shown():
    record = measured([f"class {n}" for n in range(77)], texts=3000)
    shown = printed(record)
    assert "the 20 classes of 77 with the lowest F1" in shown
    weakest = min(record.by_class, key=lambda score: score.f1)
    assert str(weakest.label) in shown
    assert "taken for one another most often" in shown


def test_labels_too_long_for_a_column_stand_in_the_rows_with_numbers():
    classes = [f"{LONG}_{n}" for n in range(4)]
    console = Console(file=io.StringIO(), width=80, emoji=False)
    assert print_confusion(console, classes, np.diag([7, 8, 9, 10]).tolist())
    lines = console.file.getvalue().splitlines()
    assert ["1", "2", "3", "4"] in [line.split() for line in lines]
    assert f"3 {LONG}_2" in " ".join(lines)


def test_no_matrix_is_printed_where_there_is_no_room():
    console = Console(file=io.StringIO(), width=80, emoji=False)
    assert not print_confusion(console, [*range(13)], np.eye(13, dtype=int).tolist())
    assert console.file.getvalue() == ""


def test_what_is_in_texts_and_labels_is_text_in_both():
    evil = "<script>alert(1)</script>\x1b[31m"
    record = measured([evil, '" onload="x'], text=f"{evil}\nsecond line")
    page = Page(page_of(record))
    assert page.count("script") == 0
    assert "onload" not in {name for _, attributes in page.elements for name in attributes}
    assert any("<script>alert(1)</script>" in text for text in page.texts["td"])
    shown = printed(record)
    assert "\x1b" not in shown
    assert "[31m" in shown


@pytest.mark.parametrize(("count", "pictures"), [(3, 1), (77, 1), (120, 0)])
def test_a_page_of_few_or_many_classes_is_whole(count, pictures):
    record = measured([f"{LONG}_{n}" for n in range(count)], texts=10 * count)
    source = page_of(record)
    page = Page(source)
    assert page.count("svg") == pictures
    named = set(re.findall(r"var\(--([\w-]+)\)", source))
    assert named <= set(re.findall(r"--([\w-]+):", source))
    assert all(f"{LONG}_{n}" in page.texts["td"] for n in range(count))
    assert page_of(record) == source


def test_what_was_not_measured_is_said_and_no_figure_is_made_up():
    source = fit_report(title="queue", facts=[], measured=None, places=[], history=[], vectors={})
    page = Page(source)
    assert page.texts["dd"] == ["not measured"]
    assert page.texts["code"] == ["--test FILE", "--cross-validate"]
    assert page.count("svg") == page.count("table") == 0


def test_texts_with_several_labels_have_no_matrix():
    sure = np.array([[0.9, 0.8], [0.6, 0.1]])
    record = record_of(
        ["a", "b"], [["x", "y"], ["y"]], [["x", "y"], ["x"]], sure, ["x", "y"], "asked"
    )
    page = Page(page_of(record))
    assert page.count("svg") == 0
    assert "Right and wrong answers" not in page.texts["h2"]
    assert "test.csv, line 3" in page.texts["small"]
    assert "1 wrong:" in printed(record)
