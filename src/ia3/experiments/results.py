"""Results of experiments that are kept as they come, and found again by what they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..files.records import append_record, read_records


class Results:
    """Records in a JSON Lines file, each on the disk as soon as it is added; or in memory alone.

    The arguments and errors are those of `read_records`.
    """

    def __init__(
        self, path: str | Path | None, is_record: Callable[[dict[str, Any]], bool], what: str
    ) -> None:
        self.path = None if path is None else Path(path)
        self._records = [] if self.path is None else read_records(self.path, is_record, what)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._records)

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The first record that has these values, if there is one."""
        matches = (r for r in self._records if all(r.get(n) == v for n, v in key.items()))
        return next(matches, None)

    def add(self, record: dict[str, Any]) -> None:
        """Keep a record; raises as `append_record` does."""
        if self.path is not None:
            append_record(self.path, record)
        self._records.append(record)


def is_typed(record: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]]) -> bool:
    """Whether a record has values of these types under these names; a boolean is no number."""
    return all(
        name in record and isinstance(record[name], kind) and not isinstance(record[name], bool)
        for name, kind in kinds.items()
    )


def digest(values: Any) -> str:
    """16 hex digits that differ where the values, as JSON has them, differ."""
    return hashlib.sha256(json.dumps(values, default=str).encode()).hexdigest()[:16]
