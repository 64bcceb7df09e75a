"""Safetensors files: written as the package writes them, read or refused in every way alike."""

import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save, save_file
from torch import Tensor

from ia3.adapter import safetensors
from ia3.adapter.files import read_adapter
from ia3.adapter.safetensors import DTYPES, write
from ia3.errors import BrokenFileError, IA3Error
from ia3.files.saved import SIZES, Header, SavedFolder

NAME = "adapter_model.safetensors"


def read_header(folder: Path) -> Header:
    with SavedFolder(folder) as saved:
        return saved.header


def read_tensors(folder: Path) -> dict[str, Tensor]:
    with SavedFolder(folder) as saved:
        return safetensors.read_tensors(saved)


def read_floats(folder: Path, ending: str = "") -> dict[str, NDArray[np.float32]]:
    with SavedFolder(folder) as saved:
        return safetensors.read_floats(saved, ending)


READERS = [read_header, read_tensors, read_floats]
VALUES = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor([[0.5], [-1.0]])}


def test_tensors_of_every_dtype_are_written_as_the_package_does() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"head.{number}": torch.randint(0, 2, (2, 3), generator=generator).to(getattr(torch, dtype))
        for number, dtype in enumerate(DTYPES)
    }
    tensors |= {"é": torch.tensor(2.0), "none": torch.ones(0, 4), "a": torch.ones(3)}
    columns = torch.tensor([[0.0, 2.0], [1.0, 3.0]])
    expected = save({**tensors, "columns": columns}, {"format": "pt"})
    tensors["columns"] = torch.arange(4.0).reshape(2, 2).T
    assert write(tensors, {"format": "pt"}) == expected


def test_a_dtype_that_the_format_lacks_is_named() -> None:
    with pytest.raises(IA3Error, match=r"'a' is complex128, which cannot be saved: expected"):
        write({"a": torch.ones(1, dtype=torch.complex128)}, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_read_is_what_was_written(tmp_path: Path, dtype: torch.dtype) -> None:
    metadata = {"z": "é", "a": "{}"}
    tensors = {name: value.to(dtype) for name, value in VALUES.items()}
    (tmp_path / NAME).write_bytes(write({**tensors, "count": torch.tensor(7)}, metadata))
    header = read_header(tmp_path)
    assert list(header.shapes.items()) == [("count", ()), ("a", (2, 1)), ("b", (2, 3))]
    assert header.dtypes == {"count": "I64", **dict.fromkeys("ab", DTYPES[str(dtype)[6:]])}
    assert header.metadata == metadata
    found = read_tensors(tmp_path)
    assert list(found) == list(header.shapes)
    assert all(torch.equal(found[n], t) and found[n].dtype == dtype for n, t in tensors.items())
    floats = read_floats(tmp_path, "b")
    assert list(floats) == ["b"]
    assert floats["b"].dtype == np.float32
    assert np.array_equal(floats["b"], tensors["b"].float().numpy())
    # Each has memory of its own.
    found["a"].fill_(9)
    assert torch.equal(found["b"], tensors["b"])


def test_the_dtypes_are_those_whose_sizes_are_known() -> None:
    assert {name: getattr(torch, d).itemsize for d, name in DTYPES.items()} == SIZES


WHOLE = write(VALUES, {})
BROKEN = {
    "empty": b"",
    "cut in its header": WHOLE[: WHOLE.index(b"shape")],
    "cut in its values": WHOLE[:-1],
    "too long": WHOLE + b"\0",
    "no JSON": WHOLE[:8] + b"[" + WHOLE[9:],
    "a text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
}


def one(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


NESTED: Any = []
for _ in range(200):
    NESTED = [NESTED]
NO_TENSOR = "tensor 'a' has no dtype, shape or place"
# What is in the header of a file with eight bytes of values -> the message.
HEADERS: dict[str, tuple[Any, str]] = {
    "a list": ([], "holds list"),
    "metadata that is no text": ({"__metadata__": {"a": 1}, **one()}, "not a mapping of texts"),
    "metadata that is no mapping": ({"__metadata__": ["a"], **one()}, "not a mapping of texts"),
    "an entry that is none": ({"a": None}, NO_TENSOR),
    "no place": ({"a": {"dtype": "F32", "shape": [2]}}, NO_TENSOR),
    "half a place": (one(data_offsets=[0]), NO_TENSOR),
    "a negative size": (one(shape=[-2]), NO_TENSOR),
    "a size that is true": (one(shape=[True, 2]), NO_TENSOR),
    "a size that is a fraction": (one(shape=[2.0]), NO_TENSOR),
    "an unknown dtype": (one(dtype="F12"), "tensor 'a' is F12, expected one of U64, "),
    "fewer bytes than values": (one(shape=[3]), r"tensor 'a' is \[3\] F32 in 8 bytes"),
    "more than there is": (one(shape=[2**40], data_offsets=[0, 2**42]), "shape that no tensor has"),
    "no values of endless size": (one(shape=[0, 2**62]), "shape that no tensor has"),
    "a hundred dimensions": (one(shape=[2] + [1] * 100), "shape that no tensor has"),
    "a gap": ({**one(shape=[1], data_offsets=[4, 8])}, "do not fill it from end to end"),
    "overlapping": (one() | {"b": one()["a"]}, "do not fill it from end to end"),
    "nested without end": ({"a": NESTED}, "nested deeper"),
}


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_named(tmp_path, kind, read):
    path = tmp_path / NAME
    path.write_bytes(BROKEN[kind])
    with pytest.raises(BrokenFileError, match="not a whole safetensors file") as error:
        read(tmp_path)
    assert str(path) in str(error.value)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read(tmp_path)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("kind", HEADERS)
def test_headers_that_describe_no_file_are_refused(tmp_path, kind, read):
    """As the package refuses them, or because no tensor is like that."""
    header, message = HEADERS[kind]
    text = json.dumps(header).encode()
    (tmp_path / NAME).write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(BrokenFileError, match=message):
        read(tmp_path)


def test_a_header_that_promises_much_is_refused_before_anything_is_read(tmp_path):
    """Also where the file is as large as it says: most of it is a hole that takes no room."""
    shapes = {"a": [2**28], "b": [2**28]}
    text = json.dumps(
        {
            key: {"dtype": "F32", "shape": shape, "data_offsets": [i << 30, (i + 1) << 30]}
            for i, (key, shape) in enumerate(shapes.items())
        }
    ).encode()
    with open(tmp_path / NAME, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + (2 << 30))
    assert read_header(tmp_path).shapes == {"a": (2**28,), "b": (2**28,)}
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    tracemalloc.start()
    with pytest.raises(IA3Error, match="tensor 'a' is not an"):
        read_adapter(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 1e7
    tracemalloc.stop()
    with open(tmp_path / NAME, "wb") as file:
        file.write((9_000_000).to_bytes(8, "little"))
        file.truncate(10_000_000)
    with pytest.raises(BrokenFileError, match="header has 9000000 bytes, expected at most"):
        read_header(tmp_path)


def test_a_long_header_is_of_many_values(tmp_path: Path) -> None:
    """Hundreds of experts in each layer have names of ten megabytes, and half a gigabyte of values.

    What could not be read again is not written.
    """
    metadata = {"x": "y" * 9_000_000}
    (tmp_path / NAME).write_bytes(write({"a": torch.zeros(5_000_000)}, metadata))
    assert read_header(tmp_path).metadata == metadata
    with pytest.raises(IA3Error, match=r"take 9,000,\d+ bytes, which could not be read again"):
        write({"a": torch.zeros(4_000_000)}, metadata)


def test_changed_values_are_found(tmp_path):
    content = write(VALUES, {"format": "pt"}, lambda digest: {"of": digest})
    path = tmp_path / NAME
    path.write_bytes(content)
    values = content[read_header(tmp_path).start :]
    said = read_header(tmp_path).metadata
    assert said["ia3_sha256"] == said["of"] == hashlib.sha256(values).hexdigest()
    for place in (len(content) - 1, len(content) - len(values)):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        read_header(tmp_path)
        for read in (read_tensors, read_floats):
            with pytest.raises(BrokenFileError, match=f"{NAME}: the values are not those"):
                read(tmp_path)
    # Another program's has no hash.
    save_file(VALUES, path)
    assert torch.equal(read_tensors(tmp_path)["b"], VALUES["b"])
