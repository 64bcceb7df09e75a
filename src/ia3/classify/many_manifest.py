"""The manifest of `ia3 fit-many`: a YAML file that names tasks, each with its own settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.loading import EMBEDDED_MODEL
from ..errors import IA3Error
from ..tfew.prompts.manifest import (
    check_keys,
    naming,
    read_manifest_file,
    shown,
    tasks_in,
    text_of,
    texts_of,
    whole_number,
)

TOP_KEYS = ("model", "defaults", "tasks")
KEYS = (
    "data",
    "split",
    "subset",
    "text",
    "label",
    "template",
    "choices",
    "steps",
    "seed",
    "learning_rate",
    "chat",
    "init_from",
)


@dataclass(frozen=True)
class TaskToFit:
    """What a manifest says of one task.

    Attributes:
        folder: the manifest's.
        data: a file or folder, relative to it, or a name of the hub.
        split, subset: of a folder or a name of the hub.
        text: the columns with the texts.
        label: the column with the label.
        choices: label as text -> words; none where the labels' own are ranked.
        settings: `FewShotClassifier`'s, those that are given.
    """

    folder: Path
    data: str
    split: str
    subset: str | None
    text: list[str]
    label: str
    choices: dict[str, str] | None
    settings: dict[str, Any]


def read_many_manifest(path: str | Path) -> tuple[str, dict[str, TaskToFit]]:
    """The model that a manifest names, and its tasks by name. No data is read.

    ::

        model: smollm2-135m-instruct
        defaults:
          steps: 50
          label: queue
        tasks:
          tickets:
            data: tickets.csv
            template: "{{ text }}\\nCategory:"
            choices: {acct: account, ship: delivery}
          reviews:
            data: reviews.jsonl
            text: [title, review]
            label: stars
            seed: 1

    | key | meaning | by default |
    |---|---|---|
    | `data` | what is trained on, as `ia3 fit --data` | |
    | `split`, `subset` | of a folder or a data set of the hub | `train`, none |
    | `text` | the column with the text, or a list of columns | `text` |
    | `label` | the column with the label | `label` |
    | `template` | a prompt, or a list of prompts | the text, and a word that asks |
    | `choices` | label -> words to rank for it | the labels, made readable |
    | `steps`, `seed`, `learning_rate`, `chat` | as `FewShotClassifier` has them | its own |
    | `init_from` | an adapter to begin with, a folder or hub id | |

    What stands under `defaults` goes for each task that does not say otherwise. Files are relative
    to the manifest.

    Raises:
        FileNotFoundError: there is no such file.
        IA3Error: it is not such a file; the message names the manifest, the task and the key.
    """
    path = Path(path)
    content = read_manifest_file(path, TOP_KEYS)
    with naming(str(path)):
        model = text_of(content, "model") or EMBEDDED_MODEL
        defaults = content.get("defaults", {})
        if not isinstance(defaults, dict):
            raise IA3Error(f"defaults is {shown(defaults)}, expected a mapping")
        with naming("defaults"):
            check_keys(defaults, KEYS)
    # A folder beside the manifest, or any other name.
    if (path.parent / model).is_dir():
        model = str(path.parent / model)
    tasks = {}
    for name, entry in tasks_in(path, content).items():
        with naming(f"{path}: task {name!r}"):
            tasks[name] = _task(path.parent, {**defaults, **entry})
    return model, tasks


def _task(folder: Path, entry: Mapping[str, Any]) -> TaskToFit:
    check_keys(entry, KEYS)
    data, begin = text_of(entry, "data"), text_of(entry, "init_from")
    if data is None:
        raise IA3Error("there is no 'data', expected a file, a folder or a name of the hub")
    if begin is not None and (folder / begin).exists():
        begin = str(folder / begin)
    settings: dict[str, Any] = {
        "template": texts_of(entry, "template"),
        "steps": whole_number(entry, "steps"),
        "seed": whole_number(entry, "seed"),
        "learning_rate": _number(entry, "learning_rate"),
        "chat": _yes_or_no(entry, "chat"),
        "init_from": begin,
    }
    return TaskToFit(
        folder,
        data,
        text_of(entry, "split") or "train",
        text_of(entry, "subset"),
        texts_of(entry, "text") or ["text"],
        text_of(entry, "label") or "label",
        _choices(entry),
        {name: value for name, value in settings.items() if value is not None},
    )


def _choices(entry: Mapping[str, Any]) -> dict[str, str] | None:
    given = entry.get("choices")
    if given is None:
        return None
    if not isinstance(given, dict):
        raise IA3Error(f"choices is {shown(given)}, expected a mapping from labels to words")
    for label, words in given.items():
        if not isinstance(words, str) or not words.strip():
            raise IA3Error(f"choices: the words of {label!r} are {shown(words)}, expected a text")
    return given


def _number(entry: Mapping[str, Any], key: str) -> float | None:
    value = text_of(entry, key)
    if value is None:
        return None
    try:
        return float(value)
    except ValueError as error:
        raise IA3Error(f"{key} is {shown(value)}, expected a number") from error


def _yes_or_no(entry: Mapping[str, Any], key: str) -> bool | None:
    value = text_of(entry, key)
    if value not in (None, "true", "false"):
        raise IA3Error(f"{key} is {shown(value)}, expected true or false")
    return None if value is None else value == "true"
