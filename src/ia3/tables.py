"""Labelled data from files: CSV, TSV and JSON Lines as lists of rows."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import IA3Error, did_you_mean
from .files import write_file

Row = dict[str, Any]


def read_table(path: str | Path, columns: Sequence[str] = ()) -> list[Row]:
    """The rows of a UTF-8 file, by its suffix: `.csv`, `.tsv`, `.jsonl` or `.ndjson`.

    Args:
        path: the file.
        columns: every row must have them.

    Returns:
        One mapping a row, from column name to value; strings from CSV and TSV.

    Raises:
        FileNotFoundError: there is no such file.
        IA3Error: the file is empty, not UTF-8, not of its format, or lacks a column.
    """
    path = Path(path)
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"data file {path} {kind}")
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".ndjson": _read_jsonl}
    if path.suffix.lower() not in readers:
        raise IA3Error(
            f"data file {path} ends in {path.suffix!r}, expected one of {', '.join(readers)}"
        )
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise IA3Error(
            f"{path}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8; save the "
            "file as UTF-8 (for example: iconv -f latin1 -t utf-8)"
        ) from error
    rows = readers[path.suffix.lower()](path, text)
    if not rows:
        raise IA3Error(f"data file {path} has no rows")
    for column in columns:
        for number, row in enumerate(rows, 1):
            if column not in row:
                hint = did_you_mean(column, row)
                raise IA3Error(
                    f"{path}, row {number}: no column {column!r} among {list(row)}{hint}"
                )
    return rows


def _read_csv(path: Path, text: str) -> list[Row]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    lines = csv.reader(text.splitlines(keepends=True), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    header: list[str] | None = None
    try:
        for values in lines:
            if not values:
                continue
            if header is None:
                header = values
                continue
            if len(values) != len(header):
                raise IA3Error(
                    f"{path}, line {lines.line_num}: {len(values)} values, expected the header's "
                    f"{len(header)}; texts that hold a {delimiter!r} need double quotes"
                )
            rows.append(dict(zip(header, values, strict=True)))
    except csv.Error as error:
        raise IA3Error(f"{path}, line {lines.line_num}: {error}") from error
    return rows


def _read_jsonl(path: Path, text: str) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise IA3Error(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise IA3Error(f"{path}, line {number}: a {type(row).__name__}, expected an object")
        rows.append(row)
    return rows


def fields_of(rows: Sequence[Row], columns: Sequence[str]) -> list[dict[str, Any]]:
    """The examples' fields: one column is the field `text`, several keep their names."""
    if len(columns) == 1:
        return [{"text": _text(row[columns[0]])} for row in rows]
    return [{column: _text(row[column]) for column in columns} for row in rows]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else str(value)


def write_table(rows: Sequence[Row], path: Path | None, *, as_json: bool) -> None:
    """Write rows as CSV, or as JSON Lines where asked for or where the suffix says so.

    Args:
        rows: all with the columns of the first.
        path: standard output where `None`; a file appears whole or not at all.
        as_json: JSON Lines whatever the suffix.

    Raises:
        OSError: the disk is full or may not be written; what was there before stays.
    """
    text = io.StringIO(newline="")
    if as_json or (path is not None and path.suffix.lower() in (".jsonl", ".ndjson")):
        text.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    if path is None:
        sys.stdout.write(text.getvalue())
    else:
        write_file(path, text.getvalue().encode())
