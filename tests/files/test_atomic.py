"""Files are written whole or not at all, also on a disk that is full."""

import errno
import os
import shutil
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from support.disks import full_disk, readable_folder, refused_where_read_only
from support.kills import moments

from ia3.files import locks
from ia3.files.atomic import (
    check_file,
    check_folder,
    holds_nothing,
    new_folder_beside,
    write_file,
    write_files,
)

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


# -- several writers, and dead ones ---------------------------------------------------------------


def in_children(count: int, work: Callable[[int], object]) -> None:
    """Do work in forked processes at once; one that raises is a failure."""
    children = []
    for number in range(count):
        child = os.fork()
        if not child:
            try:
                work(number)
            except BaseException:
                os._exit(1)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * count


def of(number: int) -> dict[str, bytes | None]:
    return {"a": b"%d" % number * 5000, "b": b"%d" % number, "c": None}


def test_processes_and_threads_write_one_folder_one_after_the_other(tmp_path: Path) -> None:
    """Also a new one: the folder is made by whoever comes first."""
    for turn in range(10):
        folder = tmp_path / "x" / f"{turn}"
        in_children(4, lambda number, folder=folder: write_files(folder, of(number), "a"))
        written = contents(folder)
        assert written in [{"a": of(n)["a"], "b": of(n)["b"]} for n in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: write_files(tmp_path / "y", of(n % 4), "a"), range(40)))
    assert contents(tmp_path / "y") in [{"a": of(n)["a"], "b": of(n)["b"]} for n in range(4)]


def test_a_writer_that_fails_takes_no_folder_from_another(tmp_path: Path) -> None:
    """It removes the folder that it has made, for which the others wait."""

    def write(number: int) -> None:
        for _ in range(50):
            if number % 2:
                write_files(tmp_path / "x" / "y", {"a": b"a"})
                continue
            with full_disk(), suppress(OSError):
                write_files(tmp_path / "x" / "y", {"b": b"b" * 2000})

    in_children(4, write)
    assert contents(tmp_path / "x" / "y") == {"a": b"a"}


def test_what_a_killed_writer_left_is_removed_by_the_next(folder: Path) -> None:
    new = folder.parent / "x" / "new"
    for target in (folder, new):
        left = set()
        for _ in moments(lambda target=target: write_files(target, AFTER)):
            left |= contents(target).keys() if target.exists() else set()
            assert holds_nothing(new) or contents(new).keys() & AFTER.keys()
        assert len(left) > 5  # it was killed while it had files of its own there
        write_files(target, {"a": b"last"})
        assert contents(target).keys() <= {"a", "b", "other"}


@pytest.mark.slow
def test_the_file_that_counts_is_beside_no_file_of_another_state(folder: Path) -> None:
    """At each moment the others are as before, gone, or as after, on the right side of it."""
    before = {"a": b"old a", "b": b"old b", "gone": b"old gone", "same": b"same", "x": b"old x"}
    after = {"b": b"new b", "a": b"new a", "gone": None, "same": b"same", "new": b"new"}
    after["x"] = b"new x"
    belonging = ("b", "gone", "same", "new")
    seen = set()

    def complete(at: Path) -> bytes | None:
        assert contents(at).items() >= before.items()
        return b"old a, whole"

    def put_back() -> None:
        shutil.rmtree(folder)
        folder.mkdir()
        for name, content in before.items():
            (folder / name).write_bytes(content)

    put_back()
    for _ in moments(lambda: write_files(folder, after, "a", belonging, complete)):
        found = {name: content for name, content in contents(folder).items() if name[0] != "."}
        counting = found.pop("a")
        state = before if counting.startswith(b"old") else after
        # What does not belong to it is there at any time.
        assert found.pop("x") in (b"old x", b"new x")
        assert all(content == state[name] for name, content in found.items())
        assert found["same"] == b"same"
        if len(found) < 3 and state is before:
            assert counting == b"old a, whole"
        seen.add((counting, *sorted(found)))
        put_back()
    assert len(seen) > 5
    write_files(folder, after, "a", belonging, complete)
    assert contents(folder) == {name: c for name, c in after.items() if c is not None}


def test_an_error_puts_back_what_was_moved_away(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Path, target: Path) -> None:
        if Path(target).name == "a":
            raise OSError(errno.EIO, "broken")
        rename(source, target)

    rename = os.replace
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="broken"):
        write_files(folder, {**AFTER, "other": None}, "a", ("b", "other"))
    assert contents(folder) == BEFORE


def test_what_does_not_change_is_not_written(folder: Path) -> None:
    seen = {path.name: path.stat() for path in folder.iterdir()}
    write_files(folder, {"a": b"old a", "b": b"new"})
    assert (folder / "a").stat().st_ino == seen["a"].st_ino
    assert (folder / "b").stat().st_ino != seen["b"].st_ino
    folder.chmod(0o555)
    write_files(folder, {"a": b"old a", "b": b"new"})
    folder.chmod(0o755)


def test_a_folder_that_may_not_be_written() -> None:
    with readable_folder() as folder:
        for name, content in BEFORE.items():
            (folder / name).write_bytes(content)
        raised = refused_where_read_only(folder, lambda: write_files(folder, AFTER))
        assert isinstance(raised, PermissionError)
        assert raised.filename == str(folder / "a")
        assert contents(folder) == BEFORE


@pytest.mark.parametrize("lacking", ["the module", "the file system"])
def test_where_there_are_no_locks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    """Nothing is taken for a dead writer's."""

    def refuse(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    if lacking == "the module":
        monkeypatch.setattr(locks, "fcntl", None)
    else:
        monkeypatch.setattr(locks.fcntl, "flock", refuse)
    (folder / ".ia3-0123456789ab").write_bytes(b"another's")
    write_files(folder, AFTER)
    assert contents(folder) == {**BEFORE, **AFTER, ".ia3-0123456789ab": b"another's"}
    with new_folder_beside(folder) as beside:
        assert beside.is_dir()
    assert not beside.exists()


def test_folders_beside_are_removed_when_their_process_is_dead(tmp_path: Path) -> None:
    def stop_within() -> None:
        with new_folder_beside(tmp_path / "model") as beside:
            (beside / "a").write_bytes(b"a")
            os._exit(0)

    with new_folder_beside(tmp_path / "model") as living:
        for _ in moments(stop_within):
            pass
        assert any(path != living for path in tmp_path.iterdir())
        (tmp_path / ".other.ia3-0123456789ab").mkdir()
        with new_folder_beside(tmp_path / "model") as second:
            names = {living.name, second.name, ".other.ia3-0123456789ab"}
            assert {path.name for path in tmp_path.iterdir()} == names
        living.rename(tmp_path / "model")
    assert {p.name for p in tmp_path.iterdir()} == {"model", ".other.ia3-0123456789ab"}


def test_folders_beside_are_not_taken_from_living_processes(tmp_path: Path) -> None:
    def make(number: int) -> None:
        for _ in range(100):
            with new_folder_beside(tmp_path / "model") as beside:
                (beside / "a").write_bytes(b"a")
                (beside / "a").unlink()

    in_children(4, make)
    assert not list(tmp_path.iterdir())


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "nowhere").symlink_to(tmp_path / "none")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for name in ("nowhere", "nowhere/x", "circle"):
        with pytest.raises(OSError, match="leads to nothing"):
            check_folder(tmp_path / name)
    check_file(tmp_path / "nowhere")  # the file is made where the link leads
    write_file(tmp_path / "nowhere", b"a")
    assert (tmp_path / "none").read_bytes() == b"a"
    (tmp_path / "further").symlink_to(tmp_path / "nowhere" / "none")
    for name in ("circle", "further"):
        with pytest.raises(OSError):
            check_file(tmp_path / name)
