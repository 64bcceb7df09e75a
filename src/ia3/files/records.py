"""Results that are kept as they come: a JSON Lines file that survives a kill and a full disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from ..errors import BrokenFileError, IA3Error
from .json import parse_object
from .locks import held

BLOCK = 2**16


def read_records(
    path: str | Path, is_record: Callable[[dict[str, Any]], bool], what: str
) -> list[dict[str, Any]]:
    """The records of a file; none if it is not there. A last line that was cut off is passed over.

    `is_record` says whether an object is a record of this kind, `what` which.

    Raises:
        BrokenFileError: a line is no record; the message says which.
    """
    path = Path(path)
    if not path.exists():
        return []
    *lines, last = path.read_bytes().split(b"\n")
    # An editor may have left out the end of the last line.
    if _is_whole(last):
        lines.append(last)
    records = []
    for number, line in enumerate(lines, 1):
        why = ""
        try:
            record = parse_object(line, "it")
        except BrokenFileError as error:
            record, why = None, f" ({error})"
        if record is None or not is_record(record):
            raise BrokenFileError(
                f"{path}, line {number}: not {what}{why}; remove the line to compute it again, or "
                "give another folder"
            )
        records.append(record)
    return records


def append_record(path: str | Path, record: Mapping[str, Any]) -> None:
    """Add a record to a file that `read_records` reads; it is on the disk when this returns.

    Several processes may add to one file at once: each waits for the one before it.

    Raises:
        IA3Error: the record could not be read again. Nothing is then written.
        OSError: the disk is full or may not be written; the records before it stay whole.
    """
    path = Path(path)
    line = _line(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "ab+", buffering=0) as file, held(file.fileno()):
            size = file.seek(0, os.SEEK_END)
            last = _last_line(file, size)
            if _is_whole(last):
                line, last = b"\n" + line, b""
            end = size - len(last)
            file.truncate(end)
            try:
                while line:
                    line = line[file.write(line) :]
                os.fsync(file.fileno())
            except BaseException:
                # A disk that fills up may have taken a part.
                file.truncate(end)
                raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _line(record: Mapping[str, Any]) -> bytes:
    try:
        line = json.dumps(record, allow_nan=False)
        parse_object(line, "its JSON")
    except (ValueError, TypeError, RecursionError) as error:
        raise IA3Error(f"a record cannot be kept as JSON: {error}") from error
    return f"{line}\n".encode()


def _last_line(file: FileIO, size: int) -> bytes:
    """What is after the last end of a line."""
    start, read = size, b""
    while start and b"\n" not in read:
        start = max(0, start - BLOCK)
        file.seek(start)
        read = _read(file, size - start)
    return read.rpartition(b"\n")[2]


def _read(file: FileIO, count: int) -> bytes:
    read = b""
    while len(read) < count and (more := file.read(count - len(read))):
        read += more
    return read


def _is_whole(line: bytes) -> bool:
    try:
        parse_object(line, "it")
    except BrokenFileError:
        return False
    return True
