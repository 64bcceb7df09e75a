"""Tasks in the RAFT benchmark's form."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ADE = ["ADE-related", "not ADE-related"]
COLUMN = {"ade_corpus_v2": "Sentence", "one_stop_english": "Article", "banking_77": "Query"}
WORDS = ["rash", "after", "aspirin", "was", "seen", "no", "drug", "given", "fever", "cat", "mat"]


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def write_task(
    folder: Path,
    name: str,
    labels: Sequence[str],
    train: Sequence[tuple[str, str]],
    test: Sequence[str],
) -> Path:
    """A task in the benchmark's form, from pairs of text and label, and texts."""
    column, path = COLUMN[name], folder / name
    path.mkdir(parents=True)
    described = {"data_columns": [column, "ID"], "label_columns": {"Label": list(labels)}}
    (path / "task.json").write_text(json.dumps(described), "utf-8")
    rows = [(text, label, number) for number, (text, label) in enumerate(train)]
    write_csv(path / "train.csv", (column, "Label", "ID"), rows)
    unlabelled = [(text, len(train) + number) for number, text in enumerate(test)]
    write_csv(path / "test_unlabeled.csv", (column, "ID"), unlabelled)
    return path


def texts(count: int, seed: int, words: int = 6) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=words)) for _ in range(count)]


def some_labels(labels: Sequence[str], count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [draw.choice(labels) for _ in range(count)]
