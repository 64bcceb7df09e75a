"""Results that are kept as they come: a JSON Lines file that survives a kill and a full disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import IA3Error


def read_records(
    path: str | Path, is_record: Callable[[dict[str, Any]], bool], what: str
) -> list[dict[str, Any]]:
    """The records of a file; none if it is not there. A last line that was cut off is passed over.

    `is_record` says whether an object is a record of this kind, `what` which, for the `IA3Error`
    where a line is none.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    # An editor may have left out the end of the last line.
    if _parsed(lines[-1]) is None:
        lines.pop()
    records = []
    for number, line in enumerate(lines, 1):
        record = _parsed(line)
        if record is None or not is_record(record):
            raise IA3Error(
                f"{path}, line {number}: not {what}; remove the line to compute it again, or give "
                "another folder"
            )
        records.append(record)
    return records


def append_record(path: str | Path, record: Mapping[str, Any]) -> None:
    """Add a record to a file that `read_records` reads; it is on the disk when this returns.

    An `OSError` leaves the records before it whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = path.read_bytes() if path.exists() else b""
    last = content[content.rfind(b"\n") + 1 :]
    line = f"{json.dumps(record)}\n".encode()
    if last and _parsed(last) is not None:
        line, last = b"\n" + line, b""
    end = len(content) - len(last)
    try:
        with open(path, "ab") as file:
            file.truncate(end)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        # A disk that fills up may have taken a part.
        if path.exists():
            os.truncate(path, end)
        raise OSError(error.errno, error.strerror, str(path)) from error


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
