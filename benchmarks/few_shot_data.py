"""The tasks of the few-shot benchmark: texts and label names, as a new user has them."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

TICKETS = Path(__file__).parent.parent / "examples" / "support-tickets"
# Every method predicts the same test rows, so that differences can be paired.
TEST_ROWS = 500
FOLDS = 5
# For how accuracy grows with examples, besides the numbers that the tables are of.
CURVE_SHOTS = (64, 250, 1000)
# Names the label digits of SST-2's and TREC's files.
DIGITS = {
    "sst2": ("negative", "positive"),
    "trec": ("description", "entity", "abbreviation", "person", "location", "number"),
}

# A text and the name of its label.
Example = tuple[str, str]
Split = tuple[list[Example], list[Example]]


@dataclass(frozen=True)
class Task:
    """How a task's sample is drawn: so many examples a class, or a fold of cross-validation."""

    read: Callable[[Path], Split]
    # Examples a class. 0: all rows but those of a fold, which the seed numbers.
    shots: tuple[int, ...]
    test_rows: int = TEST_ROWS


def few_shot_split(task: str, shots: int, seed: int, data: Path) -> Split:
    """The training sample of a seed, and the test rows, which are the same for every seed.

    Where `shots` is 0 the seed is the number of a fold of cross-validation: both parts depend on
    it, and every row is tested once.
    """
    train, test = TASKS[task].read(data)
    if shots == 0:
        return fold(train, seed)
    test_rows = min(TASKS[task].test_rows, len(test))
    return sample_few_shot(train, shots, seed), random.Random(0).sample(test, test_rows)


def timed_split(task: str, shots: int, seed: int, data: Path) -> Split:
    """The training sample of a seed, and 1,000 other texts of the same file to predict."""
    train, _ = TASKS[task].read(data)
    sample = sample_few_shot(train, shots, seed)
    taken = {text for text, _ in sample}
    others = [example for example in train if example[0] not in taken]
    return sample, random.Random(0).sample(others, 1000)


def sample_few_shot(examples: Sequence[Example], shots: int, seed: int) -> list[Example]:
    """`shots` distinct texts of each class, or all where there are fewer, shuffled together.

    A text that occurs more than once counts once, with its first label. The result depends only on
    the examples, their order, `shots` and `seed`.
    """
    first_label: dict[str, str] = {}
    for text, label in examples:
        first_label.setdefault(text, label)
    by_class: dict[str, list[str]] = {}
    for text, label in first_label.items():
        by_class.setdefault(label, []).append(text)
    draw = random.Random(seed)
    sample = [
        (text, label)
        for label, found in sorted(by_class.items())
        for text in draw.sample(found, min(shots, len(found)))
    ]
    draw.shuffle(sample)
    return sample


def fold(examples: Sequence[Example], number: int, parts: int = FOLDS) -> Split:
    """One of so many parts to test on, and the others to train on, each class spread over all.

    Numbers from `parts` on are of other draws.
    """
    places: list[int] = []
    draw = random.Random(number // parts)
    for label in sorted({label for _, label in examples}):
        of_class = [place for place, example in enumerate(examples) if example[1] == label]
        places += draw.sample(of_class, len(of_class))
    tested = set(places[number % parts :: parts])
    train = [example for place, example in enumerate(examples) if place not in tested]
    return train, [examples[place] for place in sorted(tested)]


def read_raft(task: str) -> Callable[[Path], Split]:
    """Reads a RAFT task: its 50 labelled rows, and no others."""

    def read(data: Path) -> Split:
        settings = (data / "raft" / "prompt_settings.jsonl").read_text("utf-8")
        fields = json.loads(settings.splitlines()[0])[task]
        return _read_csv(data / "raft" / task / "train.csv", *fields, "Label"), []

    return read


# -- files -----------------------------------------------------------------------------------------


def _read_sst2(data: Path) -> Split:
    """`text<TAB>digit` a line."""

    def example(line: str) -> Example:
        text, _, digit = line.rpartition("\t")
        return text.strip(), DIGITS["sst2"][int(digit)]

    train, test = ((data / "sst2" / f"{part}.tsv").read_text("utf-8") for part in _PARTS)
    return [example(x) for x in _lines(train)], [example(x) for x in _lines(test)]


def _read_trec(data: Path) -> Split:
    """`digit text` a line, in latin-1."""

    def example(line: str) -> Example:
        digit, _, text = line.partition(" ")
        return text.strip(), DIGITS["trec"][int(digit)]

    train, test = ((data / "trec" / f"{part}.txt").read_text("latin-1") for part in _PARTS)
    return [example(x) for x in _lines(train)], [example(x) for x in _lines(test)]


def _read_banking77(data: Path) -> Split:
    train, test = (_read_csv(data / "banking77" / f"{p}.csv", "text", "category") for p in _PARTS)
    return train, test


def _read_banking16(data: Path) -> Split:
    """16 of the 77 intents."""
    train, test = _read_banking77(data)
    intents = random.Random(0).sample(sorted({label for _, label in train}), 16)
    return [x for x in train if x[1] in intents], [x for x in test if x[1] in intents]


def _read_tickets(data: Path) -> Split:
    """They are in this repository."""
    train, test = (_read_csv(TICKETS / f"{part}.csv", "text", "label") for part in _PARTS)
    return train, test


def _lines(content: str) -> list[str]:
    return [line for line in content.split("\n") if line.strip()]


def _read_csv(path: Path, *columns: str) -> list[Example]:
    """The last column is the label; the others are joined."""
    *fields, label = columns
    with path.open(encoding="utf-8", newline="") as file:
        return [
            (" ".join(row[name] for name in fields).strip(), row[label])
            for row in csv.DictReader(file)
        ]


_PARTS = ("train", "test")
TASKS = {
    "sst2": Task(_read_sst2, (8, 16)),
    "trec": Task(_read_trec, (8, 16)),
    "banking16": Task(_read_banking16, (8, 16)),
    # A language model ranks 77 choices a row.
    "banking77": Task(_read_banking77, (8, 16), test_rows=300),
    # 8 a class is all there is.
    "tickets": Task(_read_tickets, (8,)),
    "ade_corpus_v2": Task(read_raft("ade_corpus_v2"), (0,)),
    "twitter_complaints": Task(read_raft("twitter_complaints"), (0,)),
}
