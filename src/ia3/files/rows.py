"""Where examples come from: a data file, a folder of the `datasets` library, or the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..arguments import instance, listed, path_of
from ..errors import BrokenFileError, IA3Error, MissingExtraError, MissingFileError, shown
from .tables import DELIMITERS, Row, check_rows, read_table

_PARQUET = ".parquet"
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def read_rows(
    source: str | Path,
    *,
    split: str = "train",
    subset: str | None = None,
    text: Sequence[str] = (),
    label: str | None = None,
    multilabel: bool = False,
) -> list[Row]:
    """Examples from a file, a folder of the `datasets` library, or the hub.

    Args:
        source: a `.csv`, `.tsv`, `.jsonl`, `.ndjson` or `.parquet` file; a folder that
            `save_to_disk` wrote; or a hub name.
        split: of a folder that has several, and of the hub's data sets.
        subset: of the hub's data sets that have several.
        text: columns that every row must have, with a text; one that is empty brings a warning.
        label: a column that every row must have, with a label; labels are of one type.
        multilabel: the column has any number of labels: a text, or a list of them.

    Raises:
        InvalidTypeError: an argument is of another type.
        MissingFileError: there is no such file.
        BrokenFileError: the file or folder is broken or empty, or lacks a value.
        IA3Error: there is no such column, data set or split.
        MissingExtraError: the package that reads the source is not installed.
    """
    path = path_of("source", source)
    instance("split", split, str, "a text")
    instance("label", label, (str, type(None)), "a column's name")
    instance("subset", subset, (str, type(None)), "a text")
    for column in listed("text", text, "a list of columns"):
        instance("a column of text", column, str, "a column's name")
    if path.suffix.lower() != _PARQUET and (path.is_file() or path.suffix.lower() in DELIMITERS):
        rows = read_table(path)
    else:
        if path.is_dir():
            values = _folder_rows(path, split)
        elif path.suffix.lower() == _PARQUET:
            values = _parquet_rows(path)
        else:
            values = _hub_rows(str(source), split, subset)
        if not values:
            raise BrokenFileError(f"{source} has no rows")
        rows = [Row(row, f"{source}, row {number}") for number, row in enumerate(values)]
    check_rows(source, rows, text, label, multilabel=multilabel)
    return rows


def source_of(folder: Path, named: str) -> str | Path:
    """The source that a file in this folder names: a path relative to it, or a hub name.

    A hub name has no suffix of a data file and at most one slash.

    Raises:
        MissingFileError: it is neither.
    """
    path = folder / named
    if os.path.exists(path):  # of a name that is too long, `path.exists` raises
        return path
    if path.suffix.lower() in (*DELIMITERS, _PARQUET) or not _HUB_NAME.fullmatch(named):
        raise MissingFileError(f"{folder / shown(named)[1:-1]} does not exist")
    return named


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "datasets", f"reading {path}") from error
    if not path.is_file():
        raise MissingFileError(f"data file {path} does not exist")
    try:
        return list(parquet.read_table(path).to_pylist())
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise BrokenFileError(f"{path} is not a Parquet file: {error}") from error


def _folder_rows(folder: Path, split: str) -> list[dict[str, Any]]:
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError as error:
        raise MissingExtraError("datasets", "datasets", f"reading {folder}") from error
    try:
        loaded = load_from_disk(str(folder))
        if isinstance(loaded, DatasetDict) and split in loaded:
            loaded = loaded[split]
        if not isinstance(loaded, DatasetDict):
            return list(loaded)
    except Exception as error:  # a broken one can raise anything
        broken = f"{folder} is not a folder of the datasets library: {error}"
        raise BrokenFileError(broken) from error
    raise IA3Error(f"{folder} has no split {split!r}, only {', '.join(loaded)}")


def _hub_rows(name: str, split: str, subset: str | None) -> list[dict[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        purpose = f"{name!r} is neither a file nor a folder: reading it from the hub"
        raise MissingExtraError("datasets", "datasets", purpose) from error
    try:
        return list(load_dataset(name, subset, split=split))
    except Exception as error:  # what is broken, absent or offline can raise anything
        raise IA3Error(
            f"no data {name!r} (subset {subset!r}, split {split!r}): it is neither a file, nor a "
            f"folder, nor can it be had from the hub: {error}"
        ) from error
