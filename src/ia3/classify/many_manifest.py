"""The manifest of `ia3 fit-many`: a YAML file that names tasks, each with its own settings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BrokenFileError, naming
from ..tfew.prompts.manifest import (
    check_keys,
    choices_of,
    in_words,
    positive_number,
    read_manifest_file,
    tasks_in,
    text_of,
    texts_of,
    whole_number,
)
from .estimator import AUTO

# The paper's take a thousand.
MOST_STEPS = 10_000_000
MODELS = ("model", "encoder", "language_model")
MOST_WORDS = 1_000_000_000
TOP_KEYS = (*MODELS, "defaults", "tasks")
KEYS = (
    *("data", "split", "subset", "text", "label", "template", "choices"),
    *("steps", "seed", "learning_rate", "chat", "init_from", "max_words"),
)


@dataclass(frozen=True)
class TaskToFit:
    """One task of a manifest, whose folder is `folder`; `data` is relative to it.

    `settings` are the arguments of `FewShotClassifier` that are given.
    """

    folder: Path
    data: str
    split: str
    subset: str | None
    text: list[str]
    label: str
    choices: dict[str, str] | None
    settings: dict[str, Any]


def read_many_manifest(path: str | Path) -> tuple[dict[str, Any], dict[str, TaskToFit]]:
    """The models that a manifest names, and its tasks by name. No data is read yet.

    The models are arguments of `FewShotClassifier`: `model`, which is `"auto"` by default, and
    `encoder` and `language_model` where the manifest has them.

    docs/few-shot.md has an example and all keys. A key under `defaults` holds for each task that
    does not have it. Paths are relative to the manifest.

    Raises:
        MissingFileError: there is no such file.
        BrokenFileError: it is no manifest; the message names the task and the key.
    """
    path = Path(path)
    content = read_manifest_file(path, TOP_KEYS)
    with naming(str(path)):
        named = {key: text_of(content, key) for key in MODELS}
        defaults = content.get("defaults", {})
        if not isinstance(defaults, dict):
            raise BrokenFileError(f"defaults is {in_words(defaults)}, expected a mapping")
        with naming("defaults"):
            check_keys(defaults, KEYS)
    models = {"model": AUTO}
    for key, name in named.items():
        if name:
            # A folder beside the manifest comes before a name on the hub. Of a name that is too
            # long, `is_dir` raises.
            is_beside = name != AUTO and os.path.isdir(path.parent / name)
            models[key] = str(path.parent / name) if is_beside else name
    tasks = {}
    for name, entry in tasks_in(path, content).items():
        with naming(f"{path}: task {name!r}"):
            tasks[name] = _task(path.parent, {**defaults, **entry})
    return models, tasks


def _task(folder: Path, entry: Mapping[str, Any]) -> TaskToFit:
    check_keys(entry, KEYS)
    data, init_from = text_of(entry, "data"), text_of(entry, "init_from")
    if data is None:
        raise BrokenFileError("there is no 'data', expected a file, a folder or a name of the hub")
    if init_from is not None and os.path.exists(folder / init_from):
        init_from = str(folder / init_from)
    chat = text_of(entry, "chat")
    if chat not in (None, "true", "false"):
        raise BrokenFileError(f"chat is {in_words(chat)}, expected true or false")
    settings = {
        "template": texts_of(entry, "template"),
        "steps": whole_number(entry, "steps", MOST_STEPS),
        "seed": whole_number(entry, "seed", 2**32 - 1),
        "learning_rate": positive_number(entry, "learning_rate"),
        "max_words": whole_number(entry, "max_words", MOST_WORDS),
        "chat": None if chat is None else chat == "true",
        "init_from": init_from,
    }
    return TaskToFit(
        folder,
        data,
        text_of(entry, "split") or "train",
        text_of(entry, "subset"),
        texts_of(entry, "text") or ["text"],
        text_of(entry, "label") or "label",
        choices_of(entry),
        {name: value for name, value in settings.items() if value is not None},
    )
