"""How good an adapter is, as `fit` and `evaluate` tell a person, and the pages that they leave."""

import csv
import json
import random
import re
import shutil

import pytest
from support.command import Place, assert_refused, said
from support.encoders import encoder_folder
from support.page import Page

from ia3 import FewShotClassifier
from ia3.cli.measuring import Labelled, leave_fit_report, status_of

WORDS = {"late": "the quick brown fox jumps", "broken": "lazy dog query passage over"}
REPORT, EVALUATION = "ia3_report.html", "ia3_evaluation.html"


def table(count, seed, labels=("late", "broken")):
    """A CSV file of texts of two classes, which now and then are of the other's words."""
    draw = random.Random(seed)
    rows = []
    for number in range(2 * count):
        kind = number % 2
        words = WORDS[[*WORDS][kind if draw.random() < 0.8 else 1 - kind]].split()
        # No text is there twice.
        rows.append(f"{' '.join(draw.choices(words, k=4))} {count}.{number},{labels[kind]}\n")
    return "text,label\n" + "".join(rows)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data and a small encoder, and what was fitted there."""
    folder = tmp_path_factory.mktemp("measuring")
    place = Place(folder, encoder_folder(folder / "encoder"))
    for name, count in (("pair", 1), ("few", 5), ("many", 16), ("test", 10)):
        place.write(f"{name}.csv", table(count, seed=len(name)))
    fit = ("fit", "--model", place.model, "--steps", 2)
    place.fits = place.run_all(
        (*fit, "--data", "few.csv", "--out", "tested", "--test", "test.csv", "--json"),
        (*fit, "--data", "few.csv", "--out", "crossed", "--cross-validate", "--json"),
        (*fit, "--data", "many.csv", "--out", "fifth", "--json"),
        (*fit, "--data", "few.csv", "--out", "before"),
        (*fit, "--data", "few.csv", "--out", "bare", "--no-report"),
        (*fit, "--data", "few.csv", "--out", "x", "--test", "test.csv", "--cross-validate"),
        (*fit, "--data", "few.csv", "--out", "x", "--test", "other.csv"),
        (*fit, "--data", "pair.csv", "--out", "pair", "--cross-validate"),
    )
    return place


def test_a_test_file_says_how_good_the_adapter_is_beside_the_frozen_encoder(place):
    measured = said(place.fits[0])["measured"]
    with open(place.folder / "test.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    predicted = FewShotClassifier.load(place.folder / "tested").predict([r["text"] for r in rows])
    wrong = {i for i, row in enumerate(rows) if row["label"] != predicted[i]}
    assert measured["trained"]
    assert measured["how"] == "on test.csv"
    assert measured["texts"] == len(rows) == 20
    assert measured["accuracy"] == 1 - len(wrong) / 20
    assert {mistake["row"] for mistake in measured["mistakes"]} == wrong
    for mistake in measured["mistakes"]:
        # A row a line, below the header.
        assert mistake["where"] == f"test.csv, line {mistake['row'] + 2}"
        assert mistake["label"] == rows[mistake["row"]]["label"]
    assert measured["frozen"]["what"] == "frozen encoder with logistic regression"
    assert [score["texts"] for score in measured["by_class"]] == [10, 10]


@pytest.mark.slow
def test_cross_validation_asks_every_text_once(place):
    measured = said(place.fits[1])["measured"]
    assert (measured["trained"], measured["texts"]) == (True, 10)
    assert measured["how"] == "5 trainings, each text held out of one"
    assert sum(map(sum, measured["confusion"])) == 10
    assert 0 <= measured["frozen"]["accuracy"] <= 1


@pytest.mark.slow
def test_a_named_model_with_16_texts_a_class_is_measured_on_a_fifth(place):
    measured = said(place.fits[2])["measured"]
    assert measured["trained"]
    assert 6 <= measured["texts"] <= 7
    assert measured["how"].startswith("one more training, without ")


def test_with_fewer_texts_the_frozen_folds_are_said_to_be_from_before_training(place):
    done = place.fits[3]
    assert done.returncode == 0, done.stderr
    first = r"(?m)^accuracy before training \d+\.\d% ± \d+\.\d \(\d+ of 10\), macro F1 "
    assert re.search(first, done.stderr)
    assert "accuracy of" not in done.stderr
    assert "the trained adapter was not measured: --test FILE" in done.stderr
    page = Page((place.folder / "before" / REPORT).read_text("utf-8"))
    assert "accuracy before training" in page.texts["dt"]
    assert "accuracy" not in page.texts["dt"]
    assert "How good it was before training" in page.texts["h2"]
    assert any("was not measured" in text for text in page.texts["p"])


def test_the_page_says_what_the_terminal_says_and_runs_nothing(place):
    told = said(place.fits[0])
    assert told["report"] == f"tested/{REPORT}"
    source = (place.folder / told["report"]).read_text("utf-8")
    page, measured = Page(source), told["measured"]
    assert page.count("script") == 0
    assert "http" not in re.sub("http-equiv", "", source)
    shown = f"{measured['accuracy']:.1%} ± {100 * measured['error']:.1f}"
    assert page.texts["dd"][0] == shown
    for mistake in measured["mistakes"]:
        assert mistake["where"] in page.texts["small"]
    for heading in ("Training", "What the adapter learned", "Right and wrong answers"):
        assert heading in page.texts["h2"]


def test_without_a_report_there_is_none(place):
    assert place.fits[4].returncode == 0
    assert "report" not in place.fits[4].stderr
    assert not (place.folder / "bare" / REPORT).exists()


@pytest.mark.slow
def test_texts_of_the_test_file_that_were_trained_on_are_not_counted(place):
    lines = (place.folder / "few.csv").read_text().splitlines(keepends=True)
    place.write("overlap.csv", "".join([*lines[:4], "a new query,late\n"]))
    place.write("same.csv", "".join(lines[:4]))
    fit = ("fit", "--model", place.model, "--steps", 0, "--data", "few.csv", "--json")
    some, none = place.run_all(
        (*fit, "--out", "overlap", "--test", "overlap.csv"),
        (*fit, "--out", "same", "--test", "same.csv"),
    )
    measured = json.loads(some.stdout)["measured"]
    assert (measured["how"], measured["texts"]) == ("on overlap.csv, but for 3 trained on", 1)
    assert [mistake["where"] for mistake in measured["mistakes"]] in ([], ["overlap.csv, line 5"])
    assert "the adapter was not measured: each text of same.csv was trained on" in none.stderr
    assert json.loads(none.stdout)["measured"]["trained"] is False


def test_what_cannot_be_measured_is_refused_before_anything_is_loaded(place):
    both, absent = place.fits[5:7]
    assert both.returncode == 2
    assert "measure on --test, or with --cross-validate" in both.stderr
    assert_refused(absent, "other.csv does not exist")
    place.write("other labels.csv", table(1, 0, labels=("late", "brocken")))
    fit = ("fit", "--data", "few.csv", "--out", "x", "--test", "other labels.csv")
    (mistyped,) = place.run_all(fit)
    assert_refused(mistyped, "did you mean 'broken'?")
    assert not place.loaded
    assert not (place.folder / "x").exists()


def test_that_nothing_can_be_held_out_is_said(place):
    assert place.fits[7].returncode == 0
    reason = "no text can be held out, as none has another one of its class"
    assert f"warning: the adapter was not measured: {reason}" in place.fits[7].stderr


@pytest.mark.slow
def test_evaluate_leaves_a_page_that_goes_with_the_next_save(place):
    shutil.copytree(place.folder / "tested", place.folder / "again")
    evaluate = ("evaluate", "again", "--data", "test.csv")
    first, second, bare = place.run_all(
        (*evaluate, "--json"), evaluate, ("evaluate", "bare", "--data", "few.csv", "--no-report")
    )
    told = said(first)
    assert told["report"] == f"again/{EVALUATION}"
    assert told["accuracy"] == said(place.fits[0])["measured"]["accuracy"]
    assert told["frozen"] is None
    assert f"the report is again/{EVALUATION}\n" in second.stderr
    page = Page((place.folder / told["report"]).read_text("utf-8"))
    assert page.texts["dt"][:2] == ["accuracy", "macro F1"]
    assert (bare.returncode, bare.stderr) == (0, "")
    assert not (place.folder / "bare" / EVALUATION).exists()
    before = (place.folder / "again" / REPORT).exists()
    FewShotClassifier.load(place.folder / "bare").save(place.folder / "again")
    assert before
    left = {path.name for path in (place.folder / "again").iterdir()}
    assert left.isdisjoint({REPORT, EVALUATION})


@pytest.mark.slow
def test_a_folder_that_may_not_be_written_is_evaluated_with_a_warning(place):
    folder = place.folder / "read-only"
    shutil.copytree(place.folder / "bare", folder)
    (folder / EVALUATION).mkdir()  # root may write everywhere, but no file over a folder
    done = place.run("evaluate", "read-only", "--data", "test.csv", "--json")
    assert done.returncode == 0, done.stderr
    assert "warning: no report is written: " in done.stderr
    assert json.loads(done.stdout)["report"] is None


@pytest.mark.slow
def test_a_language_model_is_measured_beside_its_untuned_self(place, tiny_model):
    fit = ("fit", "--model", tiny_model, "--steps", 2, "--data", "few.csv")
    done = place.run(*fit, "--out", "ranked", "--test", "test.csv", "--json")
    measured = said(done)["measured"]
    assert measured["frozen"]["what"] == "untuned language model"
    assert measured["texts"] == 20


def test_what_another_process_has_saved_meanwhile_stays(place, tmp_path, capsys):
    out = shutil.copytree(place.folder / "bare", tmp_path / "bare")
    classifier = FewShotClassifier.load(out)
    saved, learned = status_of(out), Labelled("few.csv", [], [], [])
    assert leave_fit_report(out, saved, 0, classifier, learned, None, [], 1.0) == out / REPORT
    other = FewShotClassifier.load(place.folder / "fifth").to_files()
    FewShotClassifier.load(place.folder / "fifth").save(out)
    assert leave_fit_report(out, saved, 0, classifier, learned, None, [], 1.0) is None
    assert "another program has saved there meanwhile" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == other
