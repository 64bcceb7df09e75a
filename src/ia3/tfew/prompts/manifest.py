"""Manifests: YAML files that name tasks, for the commands that take many."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import BrokenFileError, did_you_mean, naming, shown
from ...files.rows import read_rows, source_of
from ...files.tables import Row
from ...files.yaml import read_yaml
from .labels import readable
from .promptsource import PromptTemplate, read_promptsource
from .tasks import HELD_OUT_TASKS, RAFT_TASKS, Task, load_templates
from .templates import SEPARATOR, Template

KEYS = ("data", "split", "subset", "templates", "template", "label", "choices")
EXPECTED = "expected 'tasks:' and under it a mapping from names to tasks"


def read_manifest(path: str | Path) -> list[Task]:
    """The tasks that a manifest names, in its order; docs/tfew.md has an example and all keys.

    Files are relative to the manifest. A name of the hub has no suffix of a data file and at most
    one slash, and is no file here. Of a promptsource file those templates are taken that pose the
    data set's own task and have answer choices. Labels are compared as text, as CSV has nothing
    else; JSON's true is `true`.

    Raises:
        MissingFileError: the manifest, or a file that it names, is not there.
        BrokenFileError: it is no manifest, or a file that it names is broken; the message names the
            task and the key.
        IA3Error: a data set or split is unknown.
    """
    path = Path(path)
    tasks = []
    for name, entry in tasks_in(path, read_manifest_file(path, ["tasks"])).items():
        with naming(f"{path}: task {name!r}"):
            tasks.append(_task(path.parent, name, entry))
    return tasks


def read_manifest_file(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """A manifest's keys and values, every scalar as the text that is written."""
    content = read_yaml(path, "a YAML file of tasks", as_text=True)
    if not isinstance(content, dict):
        raise BrokenFileError(f"{path} is {in_words(content)}, {EXPECTED}")
    with naming(str(path)):
        check_keys(content, keys, EXPECTED)
    return content


def tasks_in(path: Path, content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Task name -> its keys and values, at least one."""
    tasks = content.get("tasks")
    if not isinstance(tasks, dict) or not tasks:
        raise BrokenFileError(f"{path}: tasks is {in_words(tasks)}, {EXPECTED}")
    for name, entry in tasks.items():
        if not isinstance(name, str) or not name.strip():
            raise BrokenFileError(f"{path}: a task's name is {in_words(name)}, expected a text")
        if not isinstance(entry, dict):
            expected = "expected a mapping with the key 'data'"
            raise BrokenFileError(f"{path}: task {name!r} is {in_words(entry)}, {expected}")
    return tasks


# -- a task ----------------------------------------------------------------------------------------


def _task(folder: Path, name: str, entry: dict[str, Any]) -> Task:
    check_keys(entry, KEYS)
    for key in ("label", "choices"):
        if key in entry and "template" not in entry:
            raise BrokenFileError(f"there is {key!r} without 'template', which it belongs to")
    if "template" in entry and "templates" in entry:
        raise BrokenFileError("there are 'template' and 'templates', expected one of them")
    data = text_of(entry, "data")
    if data is None:
        raise BrokenFileError("there is no 'data', expected a file, a folder or a name of the hub")
    split, subset = text_of(entry, "split") or "train", text_of(entry, "subset")
    written = None if "template" in entry else _written_templates(folder, name, entry)
    with naming("data"):
        rows = read_rows(source_of(folder, data), split=split, subset=subset)
    return Task(name, written or _inline_templates(entry, rows), rows)


def _written_templates(folder: Path, name: str, entry: dict[str, Any]) -> list[PromptTemplate]:
    """The templates of a promptsource file, or this project's own."""
    own = (*HELD_OUT_TASKS, *RAFT_TASKS)
    named = text_of(entry, "templates")
    if named is None and name not in own:
        raise BrokenFileError(
            "there are no templates of this name: expected 'templates' or 'template'"
            f"{did_you_mean(name, own)}"
        )
    named = named or name
    with naming("templates"):
        file = folder / named
        if named in own or not (os.path.exists(file) or "/" in named or file.suffix):
            found = load_templates(named)
        else:
            found = read_promptsource(file)
        templates = [t for t in found if t.original_task and t.choices is not None]
        if not templates:
            raise BrokenFileError(
                f"none of the {len(found)} in {named} has original_task: true and answer_choices"
            )
    return templates


def _inline_templates(entry: dict[str, Any], rows: Sequence[Row]) -> list[PromptTemplate]:
    sources = texts_of(entry, "template") or []
    for source in sources:
        if SEPARATOR in source:
            expected = "the prompt alone; the answer is made from 'label' and 'choices'"
            raise BrokenFileError(
                f"template {shown(source)} holds {SEPARATOR!r}: expected {expected}"
            )
    column = text_of(entry, "label") or "label"
    words = choices_of(entry)
    if words is None:
        words = {label: readable(label) for label in sorted({_label(row, column) for row in rows})}
    _check_words(words, column, rows)
    # Python writes a text as Jinja reads it, so that braces in a label are no template.
    choices = f" {SEPARATOR} ".join(f"{{{{ {text!r} }}}}" for text in words.values())
    order = {label: index for index, label in enumerate(words)}
    as_rendered = {str(row[column]): order[_label(row, column)] for row in rows} | order
    target = f"{{{{ answer_choices[{as_rendered!r}[fields[{column!r}] | string]] }}}}"
    return [
        PromptTemplate(
            source, Template(f"{source} {SEPARATOR} {target}", source), Template(choices, source)
        )
        for source in sources
    ]


def _check_words(words: Mapping[str, str], column: str, rows: Sequence[Row]) -> None:
    """Raise where the words cannot be told apart, or a row has another label."""
    for text in words.values():
        if SEPARATOR in text:
            raise BrokenFileError(
                f"choices: the words {shown(text)} hold {SEPARATOR!r}, which separates them"
            )
    if len(words) < 2:
        raise BrokenFileError(f"the labels are {shown(list(words))}, expected at least two")
    labels: dict[str, str] = {}
    for label, text in words.items():
        if (other := labels.setdefault(text, label)) != label:
            same = f"the labels {other!r} and {label!r} have the same words {text!r}"
            raise BrokenFileError(f"{same}: give other words in 'choices'")
    for row in rows:
        label = _label(row, column)
        if label not in words:
            problem = f"is not among the choices {shown(list(words))}{did_you_mean(label, words)}"
            raise BrokenFileError(f"{row.where}: the label {shown(label)} {problem}")


def _label(row: Row, column: str) -> str:
    """A row's label as text."""
    if column not in row:
        among = f"{shown(list(row))}{did_you_mean(column, row)}"
        raise BrokenFileError(f"{row.where}: no column {column!r} among {among}")
    value = row[column]
    if not isinstance(value, str | int) or not str(value).strip():
        expected = "expected a text or a whole number"
        raise BrokenFileError(f"{row.where}: the label {column!r} is {shown(value)}, {expected}")
    return str(value).lower() if isinstance(value, bool) else str(value)


# -- values ----------------------------------------------------------------------------------------


def check_keys(entry: Mapping[str, Any], keys: Sequence[str], expected: str = "") -> None:
    """Raise `IA3Error` for a key that is not among these; `expected` is part of the message."""
    expected = expected or f"expected some of {', '.join(keys)}"
    for key in entry:
        if key not in keys:
            raise BrokenFileError(
                f"unknown key {in_words(key)}, {expected}{did_you_mean(str(key), keys)}"
            )


def choices_of(entry: Mapping[str, Any]) -> dict[str, str] | None:
    """The words to rank, by label, under `choices`; `None` if it is not there."""
    given = entry.get("choices")
    if given is None:
        return None
    if not isinstance(given, dict):
        raise BrokenFileError(
            f"choices is {in_words(given)}, expected a mapping from labels to words"
        )
    for label, words in given.items():
        if not isinstance(words, str) or not words.strip():
            raise BrokenFileError(
                f"choices: the words of {shown(label)} are {in_words(words)}, expected a text"
            )
    return {label: words.strip() for label, words in given.items()}


def text_of(entry: Mapping[str, Any], key: str) -> str | None:
    """A text; `None` if it is not there."""
    value = entry.get(key)
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise BrokenFileError(f"{key} is {in_words(value)}, expected a text")
    return value


def texts_of(entry: Mapping[str, Any], key: str) -> list[str] | None:
    """A text or a list of texts, as a list; `None` if it is not there."""
    if key not in entry:
        return None
    given = entry[key]
    texts = given if isinstance(given, list) else [given]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise BrokenFileError(f"{key} is {in_words(given)}, expected a text or a list of texts")
    return texts


def whole_number(entry: Mapping[str, Any], key: str, most: int) -> int | None:
    """A whole number from 0 to `most`; `None` if it is not there."""
    value = entry.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or not re.fullmatch("[0-9]{1,10}", value):
        raise BrokenFileError(f"{key} is {in_words(value)}, expected a whole number")
    if int(value) > most:
        raise BrokenFileError(f"{key} is {value}, expected {most} at most")
    return int(value)


def positive_number(entry: Mapping[str, Any], key: str) -> float | None:
    """A number above 0; `None` if it is not there."""
    value = entry.get(key)
    if value is None:
        return None
    try:
        number = float(value) if isinstance(value, str) and value.isascii() else math.nan
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise BrokenFileError(f"{key} is {in_words(value)}, expected a number above 0")
    return number


def in_words(value: Any) -> str:
    """A value for a message, in few words: references in YAML can make it as long as they like."""
    if value is None or value == "":
        return "empty"
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else f"{value[:57]}...")
    return "a mapping" if isinstance(value, dict) else "a list"
