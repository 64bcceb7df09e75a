"""Files that PyTorch pickled, read without unpickling them: they can neither run code nor swell.

A pickle is a program. Of its instructions only those are followed that tensors in plain containers
need, and what it would call is described, not called. Tensors are then made of the bytes that are
stored for them.
"""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BrokenFileError
from ..files.saved import SavedFolder

# A tensor takes some 150 bytes of the pickle, and is made by two or three calls.
LONGEST_PICKLE = 2_000_000
MOST_OBJECTS = 100_000
# Tied weights are stored once and read twice.
MOST_SHARED = 4

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    record: str
    count: int


@dataclass(frozen=True)
class _Described:
    """A tensor as the pickle describes it."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_pickled(saved: SavedFolder) -> dict[str, Tensor]:
    """An adapter's named tensors as PEFT pickled them; raises as `unpickle_tensors`."""
    path, expected = saved.path, "expected an adapter's named tensors"
    check_archive(path, expected)
    tensors = unpickle_tensors(saved.content(), path, expected)
    if not isinstance(tensors, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in tensors.items()
    ):
        raise BrokenFileError(f"{path} does not hold named tensors")
    return dict(tensors)


def check_archive(path: Path, expected: str) -> None:
    """Raise `BrokenFileError` where a file cannot be torch's, before all of it is read.

    A file of no bytes may say that it has terabytes.
    """
    with open(path, "rb") as file:
        try:
            whole = file.read(2) == b"PK" and zipfile.is_zipfile(file)
        except zipfile.BadZipFile:  # of several parts
            whole = False
    if not whole:
        raise BrokenFileError(
            f"{path} is not a whole file of tensors alone (it has no form of torch 1.6 and later; "
            "an older one is rewritten by torch.save(torch.load(file, weights_only=True), file)): "
            f"{expected}"
        )


def unpickle_tensors(content: bytes, path: Path, expected: str) -> Any:
    """What a file of tensors and plain containers holds; each tensor has memory of its own.

    Raises:
        BrokenFileError: it is not whole, holds something else (it says what was `expected`), or a
            tensor is larger than what is stored for it.
    """
    try:
        with zipfile.ZipFile(BytesIO(content)) as archive:
            records = _records(archive, len(content))
            holds = _followed(records.pop("data.pkl")())
            return _Builder(records, len(content)).built(holds, "")
    except BrokenFileError as error:
        raise BrokenFileError(f"{path}: {error}") from error
    except Exception as error:  # what is broken can raise anything
        raise BrokenFileError(
            f"{path} is not a whole file of tensors alone ({type(error).__name__}: {error}): "
            f"{expected}"
        ) from error


def _records(archive: zipfile.ZipFile, size: int) -> dict[str, Callable[[], bytes]]:
    """The archive's members by their names inside its one folder: what reads them."""
    found: dict[str, Callable[[], bytes]] = {}
    stored = 0
    for member in archive.infolist():
        stored += member.file_size
        if member.compress_type != zipfile.ZIP_STORED or stored > size:
            raise ValueError(f"{member.filename!r} is compressed, which torch does not")
        name = member.filename.partition("/")[2]
        limit = LONGEST_PICKLE if name == "data.pkl" else size
        if member.file_size > limit:
            raise ValueError(f"{member.filename!r} has {member.file_size} bytes, at most {limit}")
        found[name] = lambda member=member: archive.read(member)  # type: ignore[misc]
    if "byteorder" in found and found["byteorder"]() != b"little":
        raise ValueError("its numbers have their bytes in another order than this machine's")
    return found


def _followed(pickle: bytes) -> Any:
    """What a pickle describes, by the instructions that torch writes for tensors."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}
    objects = 0

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for code, argument, _ in pickletools.genops(pickle):
        name = code.name
        if name in ("PROTO", "FRAME"):
            continue
        if name == "STOP":
            return stack.pop()
        if name == "MARK":
            marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[argument if isinstance(argument, int) else len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _VALUES:
            stack.append(argument)
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in ("SETITEM", "SETITEMS"):
            items = since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            # Tuples of tuples take endless time to hash.
            if not all(type(key) in (str, int) for key in items[::2]):
                raise ValueError("it has keys that are no names")
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name in ("APPEND", "APPENDS"):
            items = since_mark() if name == "APPENDS" else [stack.pop()]
            stack[-1].extend(items)
        elif name == "GLOBAL":
            stack.append(_Global(argument))
        elif name == "BINPERSID":
            stack.append(_storage(*stack.pop()))
        elif name == "REDUCE":
            objects += 1
            arguments = stack.pop()
            stack.append(_reduced(stack.pop(), arguments))
        elif name == "BUILD":
            stack.pop()  # the attributes of a state dict
        else:
            raise ValueError(f"its pickle has the instruction {name}")
        if objects > MOST_OBJECTS:
            raise ValueError(f"its pickle makes more than {MOST_OBJECTS} objects")
    raise ValueError("its pickle has no end")


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
# The second of a parameter with attributes of its own, as other libraries give it.
_PARAMETERS = ("torch._utils _rebuild_parameter", "torch._utils _rebuild_parameter_with_state")
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}


class _Global(str):
    """The name of what a pickle would look up."""


@dataclass(frozen=True)
class _Other:
    """What a pickle has made by a function or of values that no plain tensor needs."""

    maker: str


def _storage(kind: object, storage: object, record: object, place: object, count: object) -> Any:
    if kind != "storage" or not isinstance(storage, _Global):
        raise ValueError("it has values of unknown kind")
    dtype = _DTYPES.get(storage.removeprefix("torch "))
    if dtype is None:
        return _Other(storage)
    if type(count) is not int or count < 0 or not isinstance(record, str):
        raise ValueError("it does not say where values are")
    return _Storage(dtype, record, count)


def _reduced(function: object, arguments: Any) -> Any:
    """What a call gives that a pickle asks for."""
    if isinstance(function, _Global) and isinstance(arguments, tuple):
        if function == "collections OrderedDict" and not arguments:
            return {}
        if function in _PARAMETERS and isinstance(arguments[0], _Described):
            return arguments[0]
        # What follows the hooks says that the values are to be negated, or conjugated.
        if function == "torch._utils _rebuild_tensor_v2" and not any(arguments[6:]):
            storage, offset, shape, strides, *_ = arguments
            numbers = [offset, *shape, *strides]
            if isinstance(storage, _Storage) and all(type(n) is int and n >= 0 for n in numbers):
                return _Described(storage, offset, tuple(shape), tuple(strides))
            if isinstance(storage, _Other):
                return storage
        # Who knows its name tells it.
        return _Other(function)
    raise ValueError("its pickle calls what has no name")


def _inside(name: str, key: str | int) -> str:
    return f"{name}.{key}" if name else str(key)


class _Builder:
    """Makes tensors, within a container, of what is stored for them."""

    def __init__(self, records: Mapping[str, Callable[[], bytes]], size: int) -> None:
        self._records = records
        self._flat: dict[_Storage, Tensor] = {}
        self._left = MOST_SHARED * size
        self._objects = 0

    def built(self, value: Any, name: str) -> Any:
        # Containers may hold one another again and again.
        self._objects += 1
        if self._objects > MOST_OBJECTS:
            raise ValueError(f"it holds more than {MOST_OBJECTS} things")
        if isinstance(value, _Described):
            return self._tensor(value, name)
        if type(value) is dict:
            return {key: self.built(item, _inside(name, key)) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self.built(item, name) for item in value)
        if isinstance(value, _Other | _Global | _Storage):
            maker = value.maker if isinstance(value, _Other) else value
            raise ValueError(f"{name!r} is made by {maker!r}, expected a plain tensor")
        return value

    def _tensor(self, described: _Described, name: str) -> Tensor:
        storage, shape = described.storage, described.shape
        if len(shape) != len(described.strides) or len(shape) > 64:
            raise ValueError(f"tensor {name!r} has a shape that no tensor has")
        flat = self._stored(storage, name)
        count = 0 if 0 in shape else prod(shape)
        last = sum((n - 1) * step for n, step in zip(shape, described.strides, strict=True))
        if count > storage.count or (count and described.offset + last >= storage.count):
            raise BrokenFileError(
                f"tensor {name!r} is {list(shape)}, for which {storage.count} values are stored: "
                "save it whole, as tensor.clone()"
            )
        self._left -= count * storage.dtype.itemsize
        if self._left < 0:
            raise BrokenFileError(f"tensor {name!r} and others share their values too often")
        if not count:
            return torch.empty(shape, dtype=storage.dtype)
        return flat.as_strided(shape, described.strides, described.offset).clone()

    def _stored(self, storage: _Storage, name: str) -> Tensor:
        if storage not in self._flat:
            content = self._records[f"data/{storage.record}"]()
            if len(content) != storage.count * storage.dtype.itemsize:
                raise BrokenFileError(
                    f"tensor {name!r} is of {storage.count} values of {storage.dtype}, for which "
                    f"{len(content)} bytes are stored"
                )
            self._flat[storage] = (
                torch.frombuffer(bytearray(content), dtype=storage.dtype)
                if content
                else torch.empty(0, dtype=storage.dtype)
            )
        return self._flat[storage]
