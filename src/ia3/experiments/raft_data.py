"""RAFT's files: a folder a task, of 50 labelled examples and a test set without labels.

Alex et al. 2021, arXiv 2109.14076. The labels of one task's test set are public elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import IA3Error, MissingFileError, did_you_mean
from ..files.rows import read_rows
from ..files.tables import Row
from ..tfew.prompts.promptsource import PromptTemplate
from ..tfew.prompts.tasks import RAFT_TASKS, load_templates

# The labelled examples fall into so many parts: of 50, the authors of T-Few hold out 10.
PARTS = 5
TASK_NAME = "task.json"
LABEL = "Label"
ID = "ID"


@dataclass(frozen=True)
class RaftTask:
    """One task of the benchmark; its rows have an `ID`, the fields and, to train on, a `Label`."""

    name: str
    labels: tuple[str, ...]  # in the order of the template's choices
    fields: tuple[str, ...]  # the columns that the prompt is made of
    train: tuple[Row, ...]
    test: tuple[Row, ...]
    template: PromptTemplate

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that are ranked for each label."""
        return self.template.choices_of({})

    def answer(self, row: Row) -> int:
        """The index of a labelled row's label."""
        return self.labels.index(row[LABEL])

    def example(self, row: Row) -> dict[str, str]:
        """What the prompt is made of."""
        return {name: row[name] for name in self.fields}

    def digest(self) -> str:
        """Of all that predictions depend on."""
        rows = [dict(row) for row in (*self.train, *self.test)]
        content = repr((self.labels, self.choices, self.template.prompt.source, rows))
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def read_raft(folder: str | Path, tasks: Sequence[str] = ()) -> list[RaftTask]:
    """The benchmark's tasks, each in a folder of its name.

    Such a folder has a `task.json` (`data_columns`, and `label_columns` with the names of `Label`),
    a `train.csv` and a `test_unlabeled.csv`.

    By default all tasks that are there are read, sorted.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingFileError(f"folder {folder} with the tasks of RAFT does not exist")
    there = [name for name in sorted(RAFT_TASKS) if (folder / name).is_dir()]
    if not there:
        raise IA3Error(
            f"{folder} has no task of RAFT in it: expected folders named {', '.join(RAFT_TASKS)}"
        )
    for name in tasks:
        if name not in there:
            raise IA3Error(
                f"no task {name!r} in {folder}: it has {', '.join(there)}"
                f"{did_you_mean(name, there)}"
            )
    return [_read_task(folder / name) for name in there if not tasks or name in tasks]


def _read_task(folder: Path) -> RaftTask:
    columns, labels = _read_names(folder / TASK_NAME)
    (template,) = load_templates(folder.name)
    choices = template.choices_of({})
    if len(labels) != len(choices):
        raise IA3Error(
            f"{folder / TASK_NAME} has {len(labels)} labels, expected the benchmark's "
            f"{len(choices)}"
        )
    fields = tuple(name for name in columns if name != ID and template.prompt.reads(name))
    train = read_rows(folder / "train.csv", text=(ID, *fields), label=LABEL)
    test = read_rows(folder / "test_unlabeled.csv", text=(ID, *fields))
    for row in train:
        if row[LABEL] not in labels:
            raise IA3Error(
                f"{row.where}: the label {row[LABEL]!r} is not in task.json"
                f"{did_you_mean(row[LABEL], labels)}"
            )
        # From the columns that task.json names, as the prompts will be.
        rendered = template.render(Row({n: row[n] for n in (*fields, LABEL)}, row.where))
        if rendered is None or rendered.answer != labels.index(row[LABEL]):
            raise IA3Error(
                f"{folder / TASK_NAME} has the label {row[LABEL]!r} as number "
                f"{labels.index(row[LABEL]) + 1}: expected the benchmark's labels in its order"
            )
    return RaftTask(folder.name, tuple(labels), fields, tuple(train), tuple(test), template)


def _read_names(path: Path) -> tuple[list[str], list[str]]:
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist: it names a RAFT task's labels")
    try:
        content = json.loads(path.read_text("utf-8"))
        return content["data_columns"], content["label_columns"][LABEL]
    except (ValueError, KeyError, TypeError) as error:
        raise IA3Error(
            f"{path} does not describe a RAFT task ({type(error).__name__}: {error}): expected "
            f"data_columns, and label_columns with the names of {LABEL!r}"
        ) from error


def public_labels(task: RaftTask, folder: str | Path) -> list[str | None]:
    """The true labels of Banking77's test rows, found by their text among the public ones.

    White space makes no difference in a text, nor case and punctuation in a label's name. The
    folder has `test.csv` or `train.csv` or both, with the columns `text` and `category`. A test row
    whose text is not there, or there with several labels, has `None`.
    """
    paths = [Path(folder) / name for name in ("test.csv", "train.csv")]
    if not any(path.is_file() for path in paths):
        raise MissingFileError(f"neither {paths[0]} nor {paths[1]} exists: they are Banking77's")
    names = {_letters(label): label for label in task.labels}
    found: defaultdict[str, set[str]] = defaultdict(set)
    for path in paths:
        for row in read_rows(path, text=("text",), label="category") if path.is_file() else ():
            label = names.get(_letters(row["category"]))
            if label is None:
                raise IA3Error(
                    f"{row.where}: the category {row['category']!r} is none of {task.name}'s labels"
                    f"{did_you_mean(row['category'], task.labels)}"
                )
            found[" ".join(row["text"].split())].add(label)
    texts = [" ".join(" ".join(task.example(row).values()).split()) for row in task.test]
    truth = [next(iter(found[t])) if len(found.get(t, ())) == 1 else None for t in texts]
    if not any(truth):
        raise IA3Error(f"none of the test texts of {task.name} is in {folder}")
    return truth


def _letters(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())
