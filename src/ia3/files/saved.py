"""A saved adapter's folder as of one save: its file of values, and the files beside it.

The safetensors file counts. Its header holds copies of the files that belong to its values, and the
hash of these. It is read here without torch, and its values not before they are asked for.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from ..errors import BrokenFileError, MissingFileError, shown
from .foreign import no_adapter
from .hub import CONFIG_NAME
from .json import parse_object

WEIGHTS_NAME = "adapter_model.safetensors"
# What PEFT wrote before safetensors; read, never written.
PICKLED_NAME = "adapter_model.bin"
TASK_NAME = "ia3_task.json"
# The linear head of a classifier on a sentence encoder, which is itself a safetensors file.
HEAD_NAME = "ia3_head.safetensors"

# Pages for people, of what a training and an evaluation found: no reader needs them.
FIT_REPORT_NAME = "ia3_report.html"
EVALUATION_NAME = "ia3_evaluation.html"
REPORTS = (FIT_REPORT_NAME, EVALUATION_NAME)

# The files that belong to the values, and the header's keys of their copies.
COPIED = {CONFIG_NAME: "ia3_config", TASK_NAME: "ia3_task", HEAD_NAME: "ia3_head"}
HASH_KEY = "ia3_sha256"
# Its copy in the header is a third longer, and leaves a megabyte to the others.
LARGEST_HEAD = 5_000_000

# The format's names of dtypes, in the order in which the package writes them, the widest first; and
# how many bytes a value has.
SIZES = {
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "F32": 4,
    "U32": 4,
    "I32": 4,
    "BF16": 2,
    "F16": 2,
    "U16": 2,
    "I16": 2,
    "F8_E5M2FNUZ": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
# An adapter's header has some 20 KB, with a config of 10,000 names a few megabytes. Read, it takes
# up to thirty times as much. With hundreds of experts in each layer it may have more, as it is then
# a small part of the file; the format allows no more than the third number.
LONGEST_HEADER = 8_000_000
LARGEST_PART = 1 / 3
FORMATS_LONGEST = 100_000_000
# As numpy has it.
MOST_DIMENSIONS = 64
# How often another program may replace the files while they are opened.
_TRIES = 1000


@dataclass(frozen=True)
class Header:
    """What a safetensors file says before its values.

    `shapes` and `dtypes` (the format's names) are by key, in the order of the file; `start` is
    where the values begin.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]
    start: int


@dataclass(frozen=True, eq=False)
class Beside:
    """What was beside an adapter's values in one save, for use after its folder was closed.

    Attributes:
        folder, path, digest: as of `SavedFolder`.
        texts: file name -> content, or `None` where there is none.
        places: file name -> what to call the place that the content is from.
    """

    folder: Path
    path: Path
    digest: str | None
    texts: Mapping[str, bytes | None]
    places: Mapping[str, str]

    def text(self, name: str) -> bytes | None:
        """As of `SavedFolder`."""
        return self.texts[name]

    def place(self, name: str) -> str:
        """As of `SavedFolder`."""
        return self.places[name]


class SavedFolder:
    """An adapter's folder, opened: use it in a `with` statement.

    What is read from it is of one save, also where another process saves meanwhile.

    Attributes:
        path: the file with the values, `WEIGHTS_NAME` or `PICKLED_NAME`.
        pickled: whether it is the latter.
        seen: its status.
        digest: the SHA-256 of the values, in hex, once they were read.

    Raises:
        FileNotFoundError: there is no adapter.
        BrokenFileError: the files are replaced again and again.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = folder = Path(folder)
        for _ in range(_TRIES):
            try:
                self.path = weights_file(folder)
                self._file: BinaryIO = open(self.path, "rb")  # noqa: SIM115
            except FileNotFoundError:
                if weights_are_in(folder):
                    continue  # put there, or taken away, a moment ago
                if not (folder / CONFIG_NAME).is_file():
                    raise no_adapter(folder) from None
                raise
            try:
                self._texts = {name: _content_of(folder / name) for name in COPIED}
                self.seen = os.fstat(self._file.fileno())
                if self._is_current():
                    break
            except BaseException:
                self._file.close()
                raise
            self._file.close()
        else:
            raise BrokenFileError(f"{folder}: another program replaces its files again and again")
        self.pickled = self.path.name == PICKLED_NAME
        self.digest: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def _is_current(self) -> bool:
        try:
            path = weights_file(self.folder)
            return path == self.path and os.path.samestat(self.seen, path.stat())
        except FileNotFoundError:
            return False

    @cached_property
    def header(self) -> Header:
        """The header of a safetensors file; raises `BrokenFileError` where it is not whole."""
        self._file.seek(0)
        return read_header(self._file, self.seen.st_size, self.path)

    def text(self, name: str) -> bytes | None:
        """The content of a file beside the values, or its copy; `None` where there is neither.

        Raises `BrokenFileError` where the copy is none of such a file.
        """
        content = self._texts[name]
        if content is not None or self.pickled:
            return content
        copy = self.header.metadata.get(COPIED[name])
        if copy is None or name != HEAD_NAME:
            return None if copy is None else copy.encode()
        try:
            return base64.b64decode(copy, validate=True)
        except ValueError as error:
            raise BrokenFileError(f"{self.place(name)} is not base64: {error}") from error

    def place(self, name: str) -> str:
        """What to call the place that `text` takes a file's content from."""
        if self._texts[name] is None and not self.pickled:
            return f"{self.path}: the header's {COPIED[name]!r}"
        return str(self.folder / name)

    def beside(self, names: Sequence[str]) -> Beside:
        """These files beside the values; `text` says what is raised."""
        texts = {name: self.text(name) for name in names}
        places = {name: self.place(name) for name in names}
        return Beside(self.folder, self.path, self.digest, texts, places)

    def config_text(self) -> tuple[bytes, str]:
        """The config's text, and what to call the place it is from.

        Raises `FileNotFoundError` where there is none.
        """
        content = self.text(CONFIG_NAME)
        if content is None:
            raise no_adapter(self.folder)
        return content, self.place(CONFIG_NAME)

    def content(self) -> bytes:
        """The whole file of values; `digest` is then that of what follows the header.

        Raises `BrokenFileError` where they are not what was written.
        """
        # Read, not mapped: a file that is cut short while it is mapped ends the process.
        start = 0 if self.pickled else self.header.start
        self._file.seek(0)
        content = self._file.read(self.seen.st_size + 1)
        # Other programs do not replace a file, but write into it.
        now = os.fstat(self._file.fileno())
        if (len(content), now.st_mtime_ns) != (self.seen.st_size, self.seen.st_mtime_ns):
            raise _not_whole(self.path, "it was written to while it was read")
        self.digest = hashlib.sha256(memoryview(content)[start:]).hexdigest()
        if not self.pickled:
            written = self.header.metadata.get(HASH_KEY, self.digest)
            if written != self.digest:
                raise BrokenFileError(
                    f"{self.path}: the values are not those that were saved, whose SHA-256 is "
                    f"{shown(written)}: the file is damaged, or a program has changed them and "
                    f"kept {HASH_KEY!r} in the metadata, from where it would have to be removed"
                )
        return content


def weights_file(folder: Path) -> Path:
    """The file with the values; a `FileNotFoundError` where there is none."""
    for name in (WEIGHTS_NAME, PICKLED_NAME):
        if (folder / name).is_file():
            return folder / name
    raise MissingFileError(f"no adapter in {folder}: {WEIGHTS_NAME} is not there")


def weights_are_in(folder: Path) -> bool:
    """Whether there is a file with values."""
    return any((folder / name).is_file() for name in (WEIGHTS_NAME, PICKLED_NAME))


def holds_config_copy(path: Path) -> bool:
    """Whether a safetensors file's header holds a copy of the config; False for a broken one."""
    try:
        with open(path, "rb") as file:
            header = read_header(file, os.fstat(file.fileno()).st_size, path)
        return COPIED[CONFIG_NAME] in header.metadata
    except (BrokenFileError, OSError):
        return False


def completed(folder: Path) -> bytes | None:
    """A folder's safetensors file with copies of the files beside it; `None` where it has them.

    Also where there is no such file, or a broken one: then nothing is lost. And where it could not
    be read any more with them: then less is.
    """
    path = folder / WEIGHTS_NAME
    try:
        with open(path, "rb") as file:
            header = read_header(file, os.fstat(file.fileno()).st_size, path)
            metadata = header.metadata | copies(folder)
            if metadata == header.metadata:
                return None
            file.seek(0)
            content = file.read()
    except (BrokenFileError, OSError):
        return None
    entries = json.loads(content[8 : header.start])
    whole = encoded_header({**entries, "__metadata__": metadata}) + content[header.start :]
    longest = longest_header(len(whole))
    return whole if len(whole) - len(content) + header.start <= longest else None


def copies(folder: Path) -> dict[str, str]:
    """The files in a folder that belong to its values, by the header's keys of their copies."""
    found = {}
    for name, key in COPIED.items():
        content = _content_of(folder / name)
        if content is None or (name == HEAD_NAME and len(content) > LARGEST_HEAD):
            continue
        try:
            found[key] = as_copy(name, content)
        except UnicodeDecodeError:
            continue  # it can be read neither way
    return found


def as_copy(name: str, content: bytes) -> str:
    """A file's content as the header holds it."""
    return base64.b64encode(content).decode() if name == HEAD_NAME else content.decode("utf-8")


def encoded_header(header: dict[str, Any]) -> bytes:
    """A safetensors file's beginning: 8 bytes with the header's length, and the header."""
    metadata = dict(sorted(header["__metadata__"].items()))
    header = {"__metadata__": metadata, **{k: v for k, v in header.items() if k != "__metadata__"}}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    # The tensors begin at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def longest_header(size: int) -> int:
    """How many bytes a header may have in a file of this size."""
    return max(LONGEST_HEADER, min(int(size * LARGEST_PART), FORMATS_LONGEST))


def read_header(file: BinaryIO, size: int, path: Path | str) -> Header:
    """The header at the beginning of a file of this size, which it has to describe to the byte.

    Raises `BrokenFileError` where it does not.
    """
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise _not_whole(path, f"of {size} bytes the first 8 are a header's length, {length}")
    if length > longest_header(size):
        longest = longest_header(size)
        raise _not_whole(path, f"its header has {length} bytes, expected at most {longest}")
    try:
        read = parse_object(file.read(length), "its header")
    except BrokenFileError as error:
        raise _not_whole(path, error) from error
    metadata = read.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _not_whole(path, "its metadata is not a mapping of texts")
    places = []
    for key, entry in read.items():
        try:
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            numbers = [begin, end, *shape]
            if {*map(type, numbers)} != {int} or min(numbers) < 0 or type(dtype) is not str:
                raise TypeError
        except (KeyError, TypeError, ValueError) as error:
            raise _not_whole(path, f"tensor {key!r} has no dtype, shape or place") from error
        if dtype not in SIZES:
            raise BrokenFileError(
                f"{path}: tensor {key!r} is {dtype}, expected one of {', '.join(SIZES)}"
            )
        # Numbers without end would be multiplied without end.
        if len(shape) > MOST_DIMENSIONS or max(shape, default=0) > size:
            raise _not_whole(path, f"tensor {key!r} has a shape that no tensor has")
        if end - begin != prod(shape) * SIZES[dtype]:
            raise _not_whole(
                path, f"tensor {key!r} is {list(shape)} {dtype} in {end - begin} bytes"
            )
        places.append((begin, end, key, dtype, shape))
    places.sort()
    begins, ends = [begin for begin, *_ in places], [end for _, end, *_ in places]
    if [*begins, size - 8 - length] != [0, *ends]:
        raise _not_whole(path, "its tensors do not fill it from end to end")
    shapes = {key: shape for _, _, key, _, shape in places}
    dtypes = {key: dtype for _, _, key, dtype, _ in places}
    return Header(shapes, dtypes, metadata, 8 + length)


def _content_of(path: Path) -> bytes | None:
    # A pipe would be waited for.
    if not path.is_file():
        return None
    with suppress(FileNotFoundError), open(path, "rb") as file:
        # One byte more tells that it is too long.
        return file.read(LARGEST_HEAD + 1 if path.name == HEAD_NAME else -1)
    return None


def _not_whole(path: Path | str, reason: object) -> BrokenFileError:
    return BrokenFileError(f"{path} is not a whole safetensors file: {reason}")
