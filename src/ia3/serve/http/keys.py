"""API keys, and the adapters that each may use."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import BrokenFileError, shown
from ...files.yaml import read_yaml

EXPECTED = "a YAML mapping from each key to a list of names, or to '*' for all"
# Guessed in less than a day, over a network.
SHORTEST = 16


@dataclass(frozen=True)
class Access:
    """What a request may use.

    Attributes:
        names: adapters and base models by name; `None` allows all, and changing them.
        who: says in logs which key it was, without the key.
    """

    names: frozenset[str] | None = None
    who: str | None = None

    @property
    def all(self) -> bool:
        """Whether it may use everything, and upload, delete, reload and train."""
        return self.names is None

    def may_use(self, name: str) -> bool:
        return self.names is None or name in self.names

    def of(self, names: Iterable[str]) -> list[str]:
        """Those of the names that it may use."""
        return [name for name in names if self.may_use(name)]


EVERYTHING = Access()


class Keys:
    """The keys of a file, by their hashes: a look-up takes as long for a wrong key as for a right
    one, however many characters of it are right.
    """

    def __init__(self, keys: dict[str, frozenset[str] | None]) -> None:
        self._access: dict[bytes, Access] = {}
        for key, names in keys.items():
            digest = _digest(key)
            self._access[digest] = Access(names, digest.hex()[:8])

    def access(self, key: str) -> Access | None:
        """What a key may use; `None` for one that there is not."""
        return self._access.get(_digest(key))


def read_keys(path: Path) -> Keys:
    """The keys of a YAML file, each with the names that it may use, or `*`.

    Raises:
        MissingFileError: there is no such file.
        BrokenFileError: it is no YAML, or holds something else.
    """
    read: Any = read_yaml(path, EXPECTED, as_text=True)
    if not isinstance(read, dict) or not read:
        raise BrokenFileError(f"{path} holds {shown(read)}, expected {EXPECTED}")
    keys: dict[str, frozenset[str] | None] = {}
    for place, (key, names) in enumerate(read.items(), 1):
        # Messages leave keys out: they are written to logs.
        if len(key) < SHORTEST or not (key.isascii() and key.isprintable()) or " " in key:
            expected = f"at least {SHORTEST} characters of ASCII without spaces"
            raise BrokenFileError(f"{path}: key {place} has {len(key)} characters, not {expected}")
        if names == "*":
            keys[key] = None
        elif isinstance(names, list) and all(isinstance(name, str) for name in names):
            keys[key] = frozenset(names)
        else:
            found = f"what key {place} may use is {shown(names)}"
            raise BrokenFileError(f"{path}: {found}, expected a list of names, or '*'")
    return Keys(keys)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
