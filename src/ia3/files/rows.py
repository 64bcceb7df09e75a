"""Where examples come from: a data file, a folder of the `datasets` library, or the hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import IA3Error, MissingExtraError, MissingFileError
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
) -> list[Row]:
    """Examples from a file, a folder of the `datasets` library, or the hub.

    Args:
        source: a `.csv`, `.tsv`, `.jsonl`, `.ndjson` or `.parquet` file; a folder that
            `save_to_disk` wrote; or a hub name.
        split: of a folder that has several, and of the hub's data sets.
        subset: of the hub's data sets that have several.
        text: columns that every row must have, with a text; one that is empty brings a warning.
        label: a column that every row must have, with a label; labels are of one type.

    Raises:
        FileNotFoundError: there is no such file.
        IA3Error: the file or folder is broken or empty, lacks a column or value, or the data set or
            split is unknown.
        MissingExtraError: the package that reads the source is not installed.
    """
    path = Path(source)
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
            raise IA3Error(f"{source} has no rows")
        rows = [Row(row, f"{source}, row {number}") for number, row in enumerate(values)]
    check_rows(source, rows, text, label)
    return rows


def source_of(folder: Path, named: str) -> str | Path:
    """The source that a file in this folder names: a path relative to it, or a hub name.

    A hub name has no suffix of a data file and at most one slash.
    """
    path = folder / named
    if path.exists():
        return path
    if path.suffix.lower() in (*DELIMITERS, _PARQUET) or not _HUB_NAME.fullmatch(named):
        raise MissingFileError(f"{path} does not exist")
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
    except (pyarrow.ArrowException, OSError) as error:
        raise IA3Error(f"{path} is not a Parquet file: {error}") from error


def _folder_rows(folder: Path, split: str) -> list[dict[str, Any]]:
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError as error:
        raise MissingExtraError("datasets", "datasets", f"reading {folder}") from error
    try:
        loaded = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise IA3Error(f"{folder} is not a folder of the datasets library: {error}") from error
    if isinstance(loaded, DatasetDict):
        if split not in loaded:
            raise IA3Error(f"{folder} has no split {split!r}, only {', '.join(loaded)}")
        loaded = loaded[split]
    return list(loaded)


def _hub_rows(name: str, split: str, subset: str | None) -> list[dict[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        purpose = f"{name!r} is neither a file nor a folder: reading it from the hub"
        raise MissingExtraError("datasets", "datasets", purpose) from error
    try:
        return list(load_dataset(name, subset, split=split))
    except (OSError, ValueError) as error:
        raise IA3Error(
            f"no data {name!r} (subset {subset!r}, split {split!r}): it is neither a file, nor a "
            f"folder, nor can it be had from the hub: {error}"
        ) from error
