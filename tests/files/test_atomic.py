"""Files are written whole or not at all, also on a disk that is full."""

import errno
import os
import stat
from pathlib import Path

import pytest
from support.disks import full_disk

from ia3.files.atomic import check_folder, write_file, write_files

BEFORE = {"a": b"old a", "b": b"old b", "other": b"stays"}
AFTER = {"a": b"new a", "b": b"new b" * 1000}


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() if p.is_file() else b"" for p in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in BEFORE.items():
        (folder / name).write_bytes(content)
    return folder


def test_a_new_folder_with_what_is_above_it_as_the_umask_says(tmp_path):
    new = tmp_path / "x" / "y"
    umask = os.umask(0o027)
    try:
        write_files(new, AFTER)
    finally:
        os.umask(umask)
    assert contents(new) == AFTER
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["y"]
    assert stat.S_IMODE(new.stat().st_mode) == 0o750
    assert stat.S_IMODE((new / "a").stat().st_mode) == 0o640


def test_other_files_of_a_folder_stay(folder):
    write_files(folder, AFTER)
    assert contents(folder) == {**BEFORE, **AFTER}


def test_full_disk_leaves_no_new_folder_and_an_old_one_as_it_was(folder):
    target = folder.parent / "x" / "y" / "z"
    with full_disk(), pytest.raises(OSError) as raised:
        write_files(target, AFTER)
    assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(target / "b"))
    with full_disk(), pytest.raises(OSError):
        write_files(folder, AFTER)
    assert contents(folder) == BEFORE
    assert list(folder.parent.iterdir()) == [folder]


def test_interruption_leaves_nothing(folder, monkeypatch):
    def interrupt(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    monkeypatch.setattr(Path, "rename", interrupt)
    for target in (folder, folder.parent / "x" / "y"):
        with pytest.raises(KeyboardInterrupt):
            write_files(target, AFTER)
    assert contents(folder) == BEFORE
    assert list(folder.parent.iterdir()) == [folder]


def test_what_is_no_file_is_not_replaced(folder):
    """It is found before any file is replaced."""
    (folder / "c").mkdir()
    os.mkfifo(folder / "pipe")
    for name in ("c", "pipe"):
        with pytest.raises(FileExistsError, match=f"{name} is not a file"):
            write_files(folder, {**AFTER, name: b""})
    assert stat.S_ISFIFO((folder / "pipe").stat().st_mode)
    assert contents(folder) == {**BEFORE, "c": b"", "pipe": b""}


def test_a_file_in_the_place_of_the_folder(folder):
    for target in (folder / "a", folder / "a" / "b"):
        with pytest.raises(OSError):
            write_files(target, AFTER)
    assert contents(folder) == BEFORE


def test_the_longest_name_of_a_file(folder: Path) -> None:
    name = "n" * 255
    for content in (b"new", b"newer"):
        write_file(folder / name, content)
        assert contents(folder) == {**BEFORE, name: content}


def test_one_file_or_where_a_link_to_it_leads(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder / "a")
    write_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    write_file(folder / "deeper" / "c", b"new")
    assert (folder / "a").read_bytes() == (folder / "deeper" / "c").read_bytes() == b"new"
    with full_disk(), pytest.raises(OSError) as raised:
        write_file(folder / "other", b"x" * 2000)
    assert raised.value.filename == str(folder / "other")
    assert (folder / "other").read_bytes() == b"stays"


def test_what_cannot_be_written_later(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for fine in (folder, folder / "x" / "y", Path("x"), Path("x/y"), Path()):
        check_folder(fine)
    for name in ("a", "a/x"):
        with pytest.raises(NotADirectoryError):
            check_folder(name)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError):
        check_folder("x")


def test_processes_may_write_one_new_folder_at_once(tmp_path, monkeypatch):
    rename = Path.rename

    def after_another(staging, folder):
        folder.mkdir()
        for name, content in BEFORE.items():
            (folder / name).write_bytes(content)
        return rename(staging, folder)

    monkeypatch.setattr(Path, "rename", after_another)
    folder = tmp_path / "x" / "folder"
    write_files(folder, AFTER)
    assert contents(folder) == {**BEFORE, **AFTER}
    assert list(folder.parent.iterdir()) == [folder]
