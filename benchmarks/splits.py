"""Read the benchmark tasks and sample few-shot splits from them."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SST2_LABELS: dict[str, str] = {"0": "negative", "1": "positive"}
"""Label digit of the SST-2 files -> label name."""

TREC_LABELS: dict[str, str] = {
    "0": "description",
    "1": "entity",
    "2": "abbreviation",
    "3": "person",
    "4": "location",
    "5": "number",
}
"""Label digit of the TREC files -> label name of the coarse class."""

TASKS: tuple[str, ...] = ("sst2", "trec")
"""Names of the tasks that `few_shot_split` knows."""

Example = tuple[str, str]
"""A text and the name of its label."""


@dataclass(frozen=True)
class Split:
    """A few-shot training set and the full test set of one task."""

    task: str
    seed: int
    train_texts: list[str]
    train_labels: list[str]
    test_texts: list[str]
    test_labels: list[str]


def _lines(path: Path, encoding: str) -> list[tuple[int, str]]:
    """Return the non-empty lines of a file with their numbers, counted from one."""
    with path.open(encoding=encoding) as file:
        return [(number, line.rstrip("\n")) for number, line in enumerate(file, 1) if line.strip()]


def _example(text: str, label: str, names: dict[str, str], path: Path, number: int) -> Example:
    """Return one checked example; raise `ValueError` where a line is malformed."""
    text = text.strip()
    if not text or label not in names:
        raise ValueError(f"{path}, line {number}: no text or an unknown label {label!r}")
    return text, names[label]


def read_sst2(path: Path) -> list[Example]:
    """Read an SST-2 file: one `text<TAB>label` a line, the label 0 or 1."""
    examples = []
    for number, line in _lines(path, "utf-8"):
        text, _, label = line.rpartition("\t")
        examples.append(_example(text, label.strip(), SST2_LABELS, path, number))
    return examples


def read_trec(path: Path) -> list[Example]:
    """Read a TREC file (latin-1): one `label question` a line, the label one digit, 0 to 5."""
    examples = []
    for number, line in _lines(path, "latin-1"):
        label, _, text = line.partition(" ")
        examples.append(_example(text, label, TREC_LABELS, path, number))
    return examples


def read_task(task: str, data_dir: str | Path) -> tuple[list[Example], list[Example]]:
    """Return the training and the test examples of a task."""
    folder = Path(data_dir) / task
    if task == "sst2":
        return read_sst2(folder / "train.tsv"), read_sst2(folder / "test.tsv")
    if task == "trec":
        return read_trec(folder / "train.txt"), read_trec(folder / "test.txt")
    raise ValueError(f"unknown task {task!r}, expected one of {', '.join(TASKS)}")


def sample_few_shot(examples: Iterable[Example], shots: int, seed: int) -> list[Example]:
    """Sample `shots` distinct texts of each class and shuffle them together.

    A text that occurs more than once counts once, with its first label. The result depends only
    on the examples, their order, `shots` and `seed`.
    """
    if shots < 1:
        raise ValueError(f"shots must be at least 1, got {shots}")
    first_label: dict[str, str] = {}
    for text, label in examples:
        first_label.setdefault(text, label)
    by_class: dict[str, list[str]] = {}
    for text, label in first_label.items():
        by_class.setdefault(label, []).append(text)

    rng = random.Random(seed)
    sample: list[Example] = []
    for label in sorted(by_class):
        texts = by_class[label]
        if len(texts) < shots:
            raise ValueError(f"class {label!r} has {len(texts)} distinct texts, {shots} wanted")
        sample.extend((text, label) for text in rng.sample(texts, shots))
    rng.shuffle(sample)
    return sample


def few_shot_split(task: str, seed: int, data_dir: str | Path, shots: int = 16) -> Split:
    """Sample `shots` training examples a class with `seed`; keep the full test set."""
    train, test = read_task(task, data_dir)
    sample = sample_few_shot(train, shots, seed)
    return Split(
        task=task,
        seed=seed,
        train_texts=[text for text, _ in sample],
        train_labels=[label for _, label in sample],
        test_texts=[text for text, _ in test],
        test_labels=[label for _, label in test],
    )
