"""Labelled data from files: CSV, TSV and JSON Lines as lists of rows."""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import BrokenFileError, IA3Error, MissingFileError, counted, did_you_mean, shown
from .atomic import write_file, write_stdout
from .json import parse_json

# What separates the values in files of a suffix; JSON Lines need nothing.
DELIMITERS = {".csv": ",", ".tsv": "\t", ".jsonl": None, ".ndjson": None}


# The longest field that the csv module takes is one number for the whole process.
_CSV = threading.Lock()


class Row(dict[str, Any]):
    """Column name -> value. `where` names the file and the line for messages."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        super().__init__(values)
        self.where = where


def delimiter_of(path: Path) -> str | None:
    """What separates values in this file, by its suffix; `None` for JSON Lines."""
    suffix = path.suffix.lower()
    if suffix not in DELIMITERS:
        ends = f"ends in {path.suffix!r}" if suffix else "has no suffix"
        raise IA3Error(f"{path} {ends}, expected one of {', '.join(DELIMITERS)}")
    return DELIMITERS[suffix]


def read_table(path: str | Path) -> list[Row]:
    """The rows of a UTF-8 file, by its suffix; values are strings from CSV and TSV.

    Raises:
        MissingFileError: there is no such file.
        BrokenFileError: it is empty, or not of the form that its suffix says.
        IA3Error: it has another suffix.
    """
    path = Path(path)
    if not path.is_file():
        kind = "is not a file" if path.exists() else "does not exist"
        raise MissingFileError(f"data file {path} {kind}")
    delimiter = delimiter_of(path)
    text = _decoded(path)
    if delimiter is None:
        rows = list(_jsonl_rows(path, text))
    else:
        with _CSV:
            rows = list(_csv_rows(path, text, delimiter))
    if not rows:
        raise BrokenFileError(f"data file {path} {'has no rows' if text.strip() else 'is empty'}")
    return rows


def read_csv_text(text: str, source: str) -> list[Row]:
    """The rows of a text in CSV, as one is pasted; `source` stands for the file in messages.

    Values are separated by what the first line has most of: commas, semicolons or tabs.

    Raises:
        BrokenFileError: it is empty, or not of this form.
    """
    text = text.removeprefix("\ufeff")
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise BrokenFileError(f"{source}, line {line}: a NUL byte; the text is damaged")
    header = text.lstrip("\r\n").partition("\n")[0]
    with _CSV:
        rows = list(_csv_rows(source, text, max(",;\t", key=header.count)))
    if not rows:
        raise BrokenFileError(f"{source} {'has no rows' if text.strip() else 'is empty'}")
    return rows


def check_rows(
    source: str | Path,
    rows: Sequence[Row],
    text: Sequence[str],
    label: str | None,
    *,
    multilabel: bool = False,
) -> None:
    """Refuse rows that lack a text or a label, as `read_rows` says; `source` is for messages."""
    for column in (*text, *(() if label is None else (label,))):
        _check_column(source, rows, column)
    for row in rows:
        for column in text:
            if not isinstance(_finite(row[column]), str | int | float):
                shown = _shown(row[column])
                raise BrokenFileError(
                    f"{row.where}: the text {column!r} is {shown}, expected a string"
                )
        if label is not None and multilabel:
            _check_label_list(row, label)
        elif label is not None:
            _check_label(row, label, type(rows[0][label]))
    empty = [row for row in rows if text and not any(str(row[c]).strip() for c in text)]
    if empty:
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        warnings.warn(f"{empty[0].where}: the text is empty{more}", stacklevel=2)


def fields_of(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], only: str = "text"
) -> list[dict[str, Any]]:
    """The examples' fields: one column is the field `only`, several keep their names."""
    if len(columns) == 1:
        return [{only: str(row[columns[0]])} for row in rows]
    return [{column: str(row[column]) for column in columns} for row in rows]


def write_table(rows: Sequence[Mapping[str, Any]], path: Path | None, *, as_json: bool) -> None:
    """Write rows, at least one, with all columns that occur.

    The suffix of `path` decides the format, and the file appears whole or not at all. Without a
    path they go to standard output, as JSON Lines or as CSV.
    """
    on_stdout = None if as_json else ","
    delimiter = on_stdout if path is None else delimiter_of(path)
    if delimiter is None:
        text = "".join(f"{_json(_finite(dict(row)))}\n" for row in rows)
    else:
        text = _csv(rows, delimiter)
    if path is None:
        write_stdout(text.encode())
    else:
        write_file(path, text.encode())


# -- reading ---------------------------------------------------------------------------------------


def _decoded(path: Path) -> str:
    content = path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise BrokenFileError(f"{path} is UTF-16: save it as UTF-8 (iconv -f utf-16 -t utf-8)")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The positions are those in the object: a byte order mark is not in it.
        line = error.object[: error.start].count(b"\n") + 1
        raise BrokenFileError(
            f"{path}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8; save the "
            "file as UTF-8 (for example: iconv -f latin1 -t utf-8)"
        ) from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise BrokenFileError(
            f"{path}, line {line}: a NUL byte; the file is damaged, or is not UTF-8"
        )
    return text


def _csv_rows(path: Path | str, text: str, delimiter: str) -> Iterator[Row]:
    # The limit, 128 KiB a value, is not the file's fault.
    limit = csv.field_size_limit(max(len(text), 1))
    # Only \n, \r and \r\n end lines; str.splitlines would end them at U+2028 and others too.
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    start = 1
    try:
        for values in lines:
            where = f"{path}, line {start}"
            start = lines.line_num + 1
            if not values:
                continue
            if header is None:
                header = values
                column, times = Counter(header).most_common(1)[0]
                if times > 1:
                    twice = f"the column {shown(column)} is there more than once"
                    raise BrokenFileError(f"{where}: {twice}")
            elif len(values) == len(header):
                yield Row(dict(zip(header, values, strict=True)), where)
            else:
                count = counted(len(values), "value")
                quotes = f"; a text that holds {delimiter!r} needs double quotes around it"
                raise BrokenFileError(
                    f"{where}: {count}, expected {len(header)} as in the header"
                    f"{quotes if len(values) > len(header) else ''}"
                )
    except csv.Error as error:
        unclosed = str(error) == "unexpected end of data"
        problem = "a double quote opens a value and none closes it" if unclosed else error
        raise BrokenFileError(f"{path}, line {start}: {problem}") from error
    finally:
        csv.field_size_limit(limit)


def _jsonl_rows(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = parse_json(line, where)
        if not isinstance(row, dict):
            raise BrokenFileError(f"{where}: {_shown(row)}, expected one object a line")
        yield Row(row, where)


def _check_column(source: str | Path, rows: Sequence[Row], column: str) -> None:
    lacking = [row for row in rows if column not in row]
    if not lacking:
        return
    # In JSON Lines, each row has columns of its own.
    where = source if len(lacking) == len(rows) else lacking[0].where
    columns = list(lacking[0])
    hint = did_you_mean(column, columns)
    delimiter = DELIMITERS.get(Path(source).suffix.lower())
    for other in (",", ";", "\t"):
        if delimiter not in (None, other) and len(columns) == 1 and other in columns[0]:
            hint = f"; the file looks separated by {other!r}, expected {delimiter!r}"
    raise IA3Error(f"{where}: no column {column!r} among {shown(columns)}{hint}")


def _check_label(row: Row, column: str, kind: type) -> None:
    value = row[column]
    named = f"{row.where}: the label {column!r} is"
    if not isinstance(value, str | int):
        raise BrokenFileError(f"{named} {_shown(value)}, expected a string or an integer")
    if not str(value).strip():
        raise BrokenFileError(f"{named} empty")
    if type(value) is not kind:
        raise BrokenFileError(
            f"{row.where}: the label {_shown(value)} is of another type than the first row's: "
            "write all as strings, or all as integers"
        )


def _check_label_list(row: Row, column: str) -> None:
    value = row[column]
    for each in value if isinstance(value, list) else [value]:
        if not isinstance(each, str | int):
            raise BrokenFileError(
                f"{row.where}: the label {column!r} is {_shown(value)}, expected a text or a list "
                "of labels"
            )


def _shown(value: Any) -> str:
    """A value as its file has it, cut short."""
    text = _json(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# -- writing ---------------------------------------------------------------------------------------


def _csv(rows: Sequence[Mapping[str, Any]], delimiter: str) -> str:
    text = io.StringIO(newline="")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    writer.writerow(columns)
    # What JSON has and CSV has not is written as JSON.
    writer.writerows(
        [
            _json(_finite(value)) if isinstance(value, bool | int | list | dict) else value
            for value in map(row.get, columns)
        ]
        for row in rows
    )
    return text.getvalue()


def _json(value: Any) -> str:
    """As JSON; what Parquet has and JSON has not, such as dates, as a string."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _finite(value: Any) -> Any:
    """The value, with null for what JSON has no number for."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
