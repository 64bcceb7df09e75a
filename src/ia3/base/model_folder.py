"""A base model's folder: what lies in it beside the weights, which other programs want too."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path

from ..files.hub import snapshot
from .embedded import (
    EMBEDDED_ENCODER,
    EMBEDDED_MODEL,
    embedded_encoder_folder,
    embedded_model_folder,
)
from .encoders import read_steps

TOKENIZER_FILES = (
    *("*token*.json", "vocab*", "merges.txt", "*.model", "chat_template*", "*.tiktoken"),
    "bpe.codes",
)
# Of multimodal models and of sentence encoders, how a model generates, and what a licence wants
# to go with the weights. No code and no card: both speak of the model that it was.
_OTHERS = (
    *("*processor_config.json", "generation_config.json"),
    *("modules.json", "sentence_*_config.json", "config_sentence_transformers.json"),
    *("LICENSE*", "NOTICE*", "COPYING*", "USE_POLICY*"),
)


def is_here(name: str) -> bool:
    """Whether a base model's name is an embedded one's or a folder's, and none on the hub."""
    return name in (EMBEDDED_MODEL, EMBEDDED_ENCODER) or (bool(name) and Path(name).is_dir())


def base_folder(name: str, revision: str | None = None) -> Path:
    """The folder of a base model: an embedded one's, a local one, or what the hub's cache has.

    Of a model on the hub the weights in its own folder are not fetched, but those of a sentence
    encoder's steps, which may have the model in a folder of theirs.

    Raises:
        MissingFileError: there is no such folder, and none on the hub.
        BrokenFileError: modules.json is damaged.
        IA3Error: modules.json names a step that brings code of its own.
        MissingExtraError: the embedded model's package is not installed.
    """
    if name == EMBEDDED_MODEL:
        return embedded_model_folder()
    if name == EMBEDDED_ENCODER:
        return embedded_encoder_folder()
    if is_here(name):
        return Path(name)
    patterns = ["config.json", *TOKENIZER_FILES, *_OTHERS]
    folder = snapshot("model", name, patterns, revision=revision)
    steps = [f"{place}/*" for _, place in _steps(folder) if place]
    return snapshot("model", name, steps, revision=revision) if steps else folder


def transformer_in(folder: Path) -> str:
    """Where in a base model's folder transformers' model lies: of most models, in itself: `""`.

    Raises:
        BrokenFileError: modules.json is damaged.
        IA3Error: modules.json names a step that brings code of its own.
    """
    steps = _steps(folder)
    return steps[0][1] if steps else ""


def _steps(folder: Path) -> list[tuple[str, str]]:
    """The kind and folder of each of a sentence encoder's steps; none of another model."""
    modules = folder / "modules.json"
    return read_steps(modules) if modules.is_file() else []


def copy_beside(source: Path, target: Path, *, tokenizer: bool = True) -> None:
    """Copy the files that belong to a model, and none of its weights, as they are.

    A program that reads a tokenizer's own files (llama.cpp's converter wants `tokenizer.model`)
    finds what the base model's authors gave it, and not what transformers makes of it.

    Args:
        source: a base model's folder.
        target: a folder that is there.
        tokenizer: whether tokenizer files are among them.
    """
    patterns = (*(TOKENIZER_FILES if tokenizer else ()), *_OTHERS)
    _copy_files(source, target, patterns)
    for number, (_, place) in enumerate(_steps(source)):
        if not place or not (source / place).is_dir():
            continue
        (target / place).mkdir(parents=True, exist_ok=True)
        # The first step is the model, whose weights become others.
        _copy_files(source / place, target / place, ("*",) if number else patterns)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer's files, of an adapter that came with one, as they are."""
    _copy_files(source, target, TOKENIZER_FILES)


def _copy_files(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for path in sorted(source.iterdir()):
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in patterns):
            # The hub's cache holds links.
            shutil.copyfile(path, target / path.name)
