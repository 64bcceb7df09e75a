"""Results that are kept as they come: a JSON Lines file that survives a kill and a full disk."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import IA3Error


def read_records(path: str | Path, keys: set[str], what: str) -> list[dict[str, Any]]:
    """The records of a file; none if it is not there.

    A last line that was cut off while it was written is dropped, from the file too.

    Args:
        path: the file.
        keys: that every record has.
        what: it records, for the message.

    Raises:
        IA3Error: a line is no such record.
    """
    path = Path(path)
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        os.truncate(path, len(whole))
    records = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not keys <= record.keys():
            raise IA3Error(
                f"{path}, line {number}: not {what}; remove the line to compute it again, or give "
                "another folder"
            )
        records.append(record)
    return records


def append_record(path: str | Path, record: Mapping[str, Any]) -> None:
    """Add a record; it is on the disk when this returns.

    Raises:
        OSError: the disk is full or may not be written; the records before stay whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = f"{json.dumps(record, ensure_ascii=False)}\n".encode()
    before = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        # A disk that fills up may have taken a part.
        if path.exists():
            os.truncate(path, before)
        raise OSError(error.errno, error.strerror, str(path)) from error
