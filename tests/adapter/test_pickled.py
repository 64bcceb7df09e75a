"""Pickled tensors are read as torch reads them, or refused before they take memory or run code."""

import pickle
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ia3.adapter.files import read_adapter
from ia3.adapter.pickled import check_archive, unpickle_tensors
from ia3.errors import BrokenFileError


def read(path: Path) -> Any:
    check_archive(path, "expected tensors")
    return unpickle_tensors(path.read_bytes(), path, "expected tensors")


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32]
SHARED = torch.arange(1200.0)
MARKED = nn.Parameter(torch.ones(2))
MARKED.mark = "a"  # type: ignore[attr-defined]
# What torch saves and we read alike.
FINE: dict[str, Any] = {
    "every dtype": {str(dtype): torch.arange(5).to(dtype) for dtype in DTYPES},
    "small dtypes": {
        str(d): torch.tensor([0, 1]).to(d)
        for d in (torch.int16, torch.int8, torch.uint8, torch.bool)
    },
    "every form": {"none": torch.ones(0, 3), "one": torch.tensor(2.0), "3d": torch.rand(2, 3, 4)},
    "views": {"rows": SHARED.view(3, 400)[1:], "columns": SHARED.view(3, 400).T, "all": SHARED},
    "a state dict": nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).state_dict(),
    "parameters": OrderedDict(a=nn.Parameter(torch.ones(2))),
    "a parameter with an attribute": OrderedDict(a=MARKED),
    "containers": {"a": [torch.ones(1), (1, 2.5, None, True, "é")], "b": {}, 3: -(2**40)},
}


@pytest.mark.parametrize("kind", FINE)
def test_what_torch_saves(tmp_path: Path, kind: str) -> None:
    torch.save(FINE[kind], tmp_path / "a.bin")
    expected = torch.load(tmp_path / "a.bin", weights_only=True)
    found = read(tmp_path / "a.bin")
    assert_same(found, expected)
    tensors = [value for value in found.values() if isinstance(value, Tensor)]
    for tensor in tensors:
        tensor.zero_()  # each has memory of its own
    assert all(not tensor.any() for tensor in tensors)
    assert_same(read(tmp_path / "a.bin"), expected)


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_same(*pair)
    else:
        assert found == expected


SPARSE = torch.eye(3).to_sparse()
# What torch saves and no adapter holds -> the message.
REFUSED: dict[str, tuple[Any, str]] = {
    "an expanded tensor": ({"a.b": torch.ones(1).expand(2**36)}, "'a.b'.* 1 values are stored"),
    "rows of one": ({"a": torch.ones(3).expand(2**30, 3)}, "'a'.* 3 values are stored"),
    "one value at many places": ({f"a{i}": SHARED for i in range(200)}, "share their values"),
    "a sparse tensor": ({"a": SPARSE}, "'a' is made by 'torch._utils _rebuild_sparse_tensor'"),
    "on the meta device": (
        {"a": torch.ones(2, device="meta")},
        "'a' is made by '.*_rebuild_meta_tensor",
    ),
    "float8": (
        {"a": torch.ones(2).to(torch.float8_e4m3fn)},
        "'a' is made by '.*_rebuild_tensor_v3",
    ),
    "complex": (
        {"a": torch.ones(2, dtype=torch.complex64)},
        "'a' is made by 'torch ComplexFloatStorage",
    ),
    "values to be negated": (
        {"a": torch.ones(2, dtype=torch.complex64).conj().imag},
        "'a' is made by 'torch._utils _rebuild_tensor_v2'",
    ),
    "a function": ({"a": print}, "'a' is made by '.* print'"),
    "an object": ({"a": Path("a")}, "'a' is made by 'pathlib PosixPath'"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(tmp_path: Path, kind: str) -> None:
    content, message = REFUSED[kind]
    torch.save(content, tmp_path / "a.bin")
    tracemalloc.start()
    with pytest.raises(BrokenFileError, match=f"a.bin.*({message})"):
        read(tmp_path / "a.bin")
    assert tracemalloc.get_traced_memory()[1] < 2e7
    tracemalloc.stop()


def test_older_pickles_are_refused_with_the_way_to_convert_them(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(BrokenFileError, match=r"torch\.save\(torch\.load"):
        read(path)
    torch.save(torch.load(path, weights_only=True), path)
    assert read(path)["a"].tolist() == [1, 1]


def rewritten(path: Path, change: Any, compression: int = zipfile.ZIP_STORED) -> None:
    """Write a saved file's members anew, changed."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, change(name, content))


def as_it_is(name: str, content: bytes) -> bytes:
    return content


@pytest.mark.parametrize("beginning", [b"", b"\x80\x02", b"PK\x03\x04"])
def test_a_file_of_zeros_without_end_is_not_read(tmp_path: Path, beginning: bytes) -> None:
    path = tmp_path / "adapter_model.bin"
    path.write_bytes(beginning)
    with open(path, "ab") as file:
        file.truncate(1 << 30)  # sparse: it takes no room on the disk
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    tracemalloc.start()
    try:
        with pytest.raises(BrokenFileError, match="not a whole file of tensors"):
            read_adapter(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_an_archive_of_several_parts_is_refused(tmp_path: Path) -> None:
    """As its end says."""
    path = tmp_path / "adapter_model.bin"
    locator = b"PK\x06\x07" + (0).to_bytes(12, "little") + (5).to_bytes(4, "little")
    path.write_bytes(b"PK" + locator + b"PK\x05\x06" + bytes(18))
    with pytest.raises(BrokenFileError, match="not a whole file of tensors"):
        read(path)


def test_members_that_are_not_as_torch_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"

    def save(value: Any = None) -> None:
        torch.save({"a": torch.ones(1000)} if value is None else value, path)

    save()
    rewritten(path, as_it_is)
    assert read(path)["a"].sum() == 1000
    rewritten(path, as_it_is, zipfile.ZIP_DEFLATED)
    with pytest.raises(BrokenFileError, match="is compressed"):
        read(path)
    save()
    rewritten(path, lambda name, content: content[:-4] if name.endswith("data/0") else content)
    with pytest.raises(BrokenFileError, match=r"'a' is of 1000 values of .*, for which 3996 b"):
        read(path)
    save()
    rewritten(path, lambda name, content: b"big" if name.endswith("byteorder") else content)
    with pytest.raises(BrokenFileError, match="another order"):
        read(path)
    lists: Any = []
    for _ in range(40):
        lists = [lists, lists]  # 2**40 of them, in a few bytes
    itself: dict[str, Any] = {}
    itself["a"] = itself
    for value, message in ((lists, "more than"), (itself, "RecursionError"), ({(1,): 2}, "keys")):
        save({"a": value} if value is lists else value)
        with pytest.raises(BrokenFileError, match=message):
            read(path)


def test_a_pickle_cut_or_changed_anywhere_is_refused_or_read(tmp_path: Path) -> None:
    """Nothing but a `BrokenFileError` comes of it."""
    path = tmp_path / "a.bin"
    torch.save({"a": torch.ones(3), "b": [1, "two"]}, path)
    with zipfile.ZipFile(path) as archive:
        whole = archive.read("a/data.pkl")
    refused = 0
    for place in range(len(whole)):
        for changed in (
            whole[:place],
            whole[:place] + bytes([whole[place] ^ 5]) + whole[place + 1 :],
        ):

            def change(name: str, content: bytes, changed: bytes = changed) -> bytes:
                return changed if name.endswith("data.pkl") else content

            torch.save({"a": torch.ones(3), "b": [1, "two"]}, path)
            rewritten(path, change)
            try:
                read(path)
            except BrokenFileError:
                refused += 1
    assert refused > len(whole)
    for size in (0, 1, 2, 100, path.stat().st_size - 1):
        content = path.read_bytes()[:size]
        with pytest.raises(BrokenFileError, match="not a whole file of tensors"):
            unpickle_tensors(content, path, "expected tensors")
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(BrokenFileError, match="not a whole file of tensors"):
        read(path)
