"""`ia3 predict` and `ia3 evaluate` in several processes: one file, whole and in order."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import launched, results_of
from support.sentences import LABELS, TEXTS, bert, tokenizer
from support.tfew import tiny_llama
from torch import distributed

from ia3 import FewShotClassifier
from ia3.cli import main

ASKED = [f"{text} {more}" for text in TEXTS for more in ("x", "y z . ok", "the van")]
TRUTH = [label for label in LABELS for _ in range(3)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with adapters, their models, and texts."""
    folder = tmp_path_factory.mktemp("predicted")
    for name, model in (("encoder", bert()), ("llama", tiny_llama())):
        model.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
        classifier = FewShotClassifier(str(folder / name), steps=5)
        classifier.fit(TEXTS, LABELS).save(folder / f"{name}-adapter")
    several = FewShotClassifier(str(folder / "encoder"), steps=5, multilabel=True)
    several.fit(TEXTS, [[label] for label in LABELS]).save(folder / "several-adapter")
    rows = [f"{text},{label}\n" for text, label in zip(ASKED, TRUTH, strict=True)]
    (folder / "asked.csv").write_text("text,label\n" + "".join(rows))
    (folder / "one.csv").write_text("text,label\n" + rows[0])
    return folder


def command(folder: Path, *arguments: object) -> tuple[int, str, str]:
    """The exit code of `ia3` in this process, and what it printed."""
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    out, errors = (folder / f"{rank}.{name}" for name in ("out", "err"))
    code: Any = 0
    sys.argv = ["ia3", *map(str, arguments)]
    with out.open("w") as one, errors.open("w") as two, redirect_stdout(one), redirect_stderr(two):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    return code, out.read_text(), errors.read_text()


def in_two(folder: Path, *arguments: object, count: int = 2) -> list[tuple[int, str, str]]:
    return results_of(partial(command, folder, *arguments), folder / "group", count)


def numbers_apart(table: str) -> tuple[list[Any], list[float]]:
    """The rows of CSV without their probabilities, and these."""
    rows = list(csv.DictReader(table.splitlines()))
    numbers = [float(row.pop("probability")) for row in rows]
    return rows, numbers


def check_same_rows(found: str, expected: str) -> None:
    """Batches of other lengths are rounded otherwise."""
    rows, numbers = numbers_apart(found)
    wanted_rows, wanted = numbers_apart(expected)
    assert rows == wanted_rows
    assert numbers == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    ("adapter", "count"),
    [
        ("encoder", 2),
        pytest.param("llama", 2, marks=pytest.mark.slow),
        *(
            pytest.param(name, 4, marks=pytest.mark.slow)
            for name in ("encoder", "llama", "several")
        ),
    ],
)
def test_the_first_process_writes_every_row_in_order(
    place: Path, tmp_path: Path, adapter: str, count: int
) -> None:
    asks = ["predict", place / f"{adapter}-adapter", "--data", place / "asked.csv"]
    code, expected, _ = command(tmp_path, *asks)
    assert code == 0
    found = in_two(tmp_path, *asks, count=count)
    assert [code for code, *_ in found] == [0] * count
    assert [said for _, said, _ in found[1:]] == [""] * (count - 1)
    check_same_rows(found[0][1], expected)
    into = in_two(tmp_path, *asks, "--out", tmp_path / "found.csv", count=count)
    assert [said for _, said, _ in into] == [""] * count
    check_same_rows((tmp_path / "found.csv").read_text(), expected)
    assert not list(tmp_path.glob("*.tmp*"))


def test_there_may_be_fewer_texts_than_processes(place: Path, tmp_path: Path) -> None:
    asks = ["predict", place / "encoder-adapter", "--data", place / "one.csv"]
    found = in_two(tmp_path, *asks)
    assert found[0][1] == command(tmp_path, *asks)[1]
    assert [code for code, *_ in found] == [0, 0]


def test_evaluate_counts_all_texts_and_says_it_once(place: Path, tmp_path: Path) -> None:
    asks = ["evaluate", place / "encoder-adapter", "--data", place / "asked.csv", "--json"]
    expected = json.loads(command(tmp_path, *asks, "--no-report")[1])
    found = in_two(tmp_path, *asks)
    assert [code for code, *_ in found] == [0, 0]
    assert found[1][1:] == ("", "")
    told = json.loads(found[0][1])
    assert Path(told.pop("report")).is_file()
    surest = [mistake.pop("probability") for mistake in told["mistakes"]]
    wanted = [mistake.pop("probability") for mistake in expected["mistakes"]]
    assert surest == pytest.approx(wanted, abs=1e-5)
    assert told == {name: value for name, value in expected.items() if name != "report"}


def test_an_error_of_any_process_is_said_once_and_ends_all(place: Path, tmp_path: Path) -> None:
    asks = ["predict", place / "encoder-adapter", "--data", place / "asked.csv"]
    code, _, error = command(tmp_path, *asks, "--text", "txt")
    found = in_two(tmp_path, *asks, "--text", "txt")
    assert code == 1
    assert [code for code, *_ in found] == [1, 1]
    assert sorted(said for *_, said in found) == ["", error]

    # Of a word that only the last text has, the model knows no finite value.
    model = bert()
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[tokenizer().convert_tokens_to_ids("z")] = torch.nan
    model.save_pretrained(tmp_path / "encoder")
    tokenizer().save_pretrained(tmp_path / "encoder")
    (tmp_path / "spoiled.csv").write_text("text\na bill\na parcel\nthe van\nthe van z\n")
    asks = ["predict", place / "encoder-adapter", "--model", tmp_path / "encoder"]
    found = in_two(tmp_path, *asks, "--data", tmp_path / "spoiled.csv")
    assert [(code, said) for code, said, _ in found] == [(1, ""), (1, "")]
    (error,) = (said for *_, said in found if said)
    assert error.startswith(
        f"error: from {tmp_path / 'spoiled.csv'}, line 4 on: the model's scores of text 1"
    )


def other_adapter(place: Path, folder: Path) -> tuple[int, str, str]:
    name = ["encoder", "other"][distributed.get_rank()]
    return command(folder, "predict", place / f"{name}-adapter", "--data", place / "asked.csv")


def test_processes_with_unlike_adapters_are_refused(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "encoder-adapter", place / "other-adapter")
    other = FewShotClassifier(str(place / "encoder"), steps=6)
    other.fit(TEXTS, LABELS).save(place / "other-adapter")
    found = results_of(partial(other_adapter, place, tmp_path), tmp_path / "group")
    assert [code for code, *_ in found] == [1, 1]
    (error,) = (said for *_, said in found if said)
    assert "were given different things: adapter_model.safetensors" in error


@pytest.mark.slow
def test_under_torchrun_one_file_is_written(place: Path, tmp_path: Path) -> None:
    asks = ["predict", place / "encoder-adapter", "--data", place / "asked.csv", "--out"]
    assert command(tmp_path, *asks, tmp_path / "one.csv")[0] == 0
    for launcher in ("torchrun", "accelerate"):
        process = launched(*asks, f"{launcher}.csv", folder=tmp_path, launcher=launcher)
        said, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert said == ""
        found = (tmp_path / f"{launcher}.csv").read_text()
        check_same_rows(found, (tmp_path / "one.csv").read_text())
