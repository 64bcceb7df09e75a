"""Safetensors files: written as the package writes them, read or refused in every way alike."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from ia3.adapter.safetensors import DTYPES, read_floats, read_header, read_tensors, write
from ia3.errors import IA3Error

READERS = [read_header, read_tensors, lambda path: read_floats(path, "")]
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
    path, metadata = tmp_path / "a.safetensors", {"z": "é", "a": "{}"}
    tensors = {name: value.to(dtype) for name, value in VALUES.items()}
    path.write_bytes(write({**tensors, "count": torch.tensor(7)}, metadata))
    shapes, said = read_header(path)
    assert (list(shapes.items()), said) == ([("count", ()), ("a", (2, 1)), ("b", (2, 3))], metadata)
    found, said = read_tensors(path)
    assert (list(found), said) == (list(shapes), metadata)
    assert all(torch.equal(found[n], t) and found[n].dtype == dtype for n, t in tensors.items())
    floats = read_floats(path, "b")
    assert list(floats) == ["b"]
    assert floats["b"].dtype == np.float32
    assert np.array_equal(floats["b"], tensors["b"].float().numpy())
    with pytest.raises(IA3Error, match="tensor 'count' is I64, expected floating-point values"):
        read_floats(path, "")
    # Each has memory of its own.
    found["a"].fill_(9)
    assert torch.equal(found["b"], tensors["b"])


WHOLE = write(VALUES, {})
BROKEN = {
    "empty": b"",
    "cut in its header": WHOLE[: WHOLE.index(b"shape")],
    "cut in its values": WHOLE[:-1],
    "too long": WHOLE + b"\0",
    "no JSON": WHOLE[:8] + b"[" + WHOLE[9:],
    "a text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
}


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_named(tmp_path, kind, read):
    path = tmp_path / "a.safetensors"
    path.write_bytes(BROKEN[kind])
    with pytest.raises(IA3Error, match="not a whole safetensors file") as error:
        read(path)
    assert str(path) in str(error.value)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.safetensors")
