"""Files written whole or not at all, whenever the process ends.

Files and folders that are not finished have names of their own, by which the next writer knows
them. They are held under a lock (`flock`), which ends with its process: what is there without its
lock is a dead one's, and is removed.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from .locks import locked

# Not a file's own name with more behind it, which may be as long as a name can be.
_STAGED_FILE = re.compile(r"\.ia3-[0-9a-f]{12}")
_STAGED_FOLDER = r"\.ia3-[0-9a-f]{12}"
# How often another process may remove a folder just as it is to be locked.
_TRIES = 100


def check_folder(folder: str | Path) -> None:
    """Fail now as writing into this folder would fail after the work that is to be kept.

    Raises:
        OSError: the folder, or the nearest one above it that exists, may not be written; or it is a
            link that leads nowhere.
    """
    folder = Path(folder)
    nearest = folder
    for nearest in (folder, *folder.parents):
        if nearest.exists():
            break
        if nearest.is_symlink():
            number = errno.ENOENT
            raise OSError(number, "this link leads to nothing that exists", str(nearest))
    if not nearest.is_dir():
        raise _os_error(errno.ENOTDIR, nearest)
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise _os_error(errno.EACCES, nearest)


def check_file(path: str | Path) -> None:
    """Fail now as `write_file` would fail after the work that is to be kept.

    Raises:
        OSError: the folder that the file, or what a link leads to, is to be in may not be written.
    """
    check_folder(_led_to(Path(path)).parent)


def holds_nothing(folder: str | Path) -> bool:
    """Whether a folder is not there, or empty but for what killed savers left."""
    folder = Path(folder)
    if not folder.is_dir():
        return not folder.exists()
    return all(_STAGED_FILE.fullmatch(name) for name in os.listdir(folder))


def write_file(path: str | Path, content: bytes) -> None:
    """Write one file, or replace it, so that a failure leaves what was there before.

    A link stays one: the file that it leads to is replaced.

    Raises:
        OSError: the disk is full or may not be written; nothing has changed.
    """
    path = _led_to(Path(path))
    write_files(path.parent, {path.name: content})


def write_files(
    folder: str | Path,
    files: Mapping[str, bytes | None],
    counts: str | None = None,
    belonging: Collection[str] = (),
    complete: Callable[[Path], bytes | None] | None = None,
    provided: Callable[[], bool] = lambda: True,
) -> bool:
    """Write files into a folder, made if absent, so that a failure leaves what was there before.

    All are written under names of their own and synced to the disk; then each is renamed into
    place, one after the other, or removed where it is `None`. What holds the same bytes already is
    left alone, and so are other files. Writers of one folder take turns.

    Args:
        folder: where the files are.
        files: name -> content; `None` for a file that is to go.
        counts: the file that readers take to hold what a missing one of those `belonging` to it
            would. These are moved away before it is replaced, so that none of them is ever read
            beside one that it does not belong to.
        belonging: their names.
        complete: called with the folder before any of these is moved away; it gives the file that
            counts as it has to be for readers to find the same without them, or `None` where it is
            so already.
        provided: asked when no other writer is at work; where it says no, nothing is written.

    Returns:
        Whether they were written.

    Raises:
        OSError: the disk is full or may not be written; nothing has changed.
    """
    folder = Path(folder)
    with _writing(folder):
        if not provided():
            return False
        changed = {name: new for name, new in files.items() if not _holds(folder / name, new)}
        # Where only others change, they are edited beside a file that stays.
        counts = counts if counts in changed else None
        staged: dict[str, Path] = {}
        removed: dict[str, Path] = {}
        there = [n for n in belonging if n in changed and os.path.lexists(folder / n)]
        try:
            for name, content in changed.items():
                if content is not None:
                    staged[name] = _stage(folder, content, name)
            if counts is not None:
                if there and complete is not None and (whole := complete(folder)) is not None:
                    staged[""] = _stage(folder, whole, counts)
                    os.replace(staged[""], folder / counts)
                for name in there:
                    removed[name] = _new_name(folder)
                    os.rename(folder / name, removed[name])
                os.replace(staged[counts], folder / counts)
            for name in changed:
                if name in staged and name != counts:
                    os.replace(staged[name], folder / name)
                elif name not in staged and name not in removed:
                    with suppress(FileNotFoundError):
                        os.unlink(folder / name)
        except BaseException:
            # An interruption may come between any two lines: the disk tells how far it went.
            if counts in staged and staged[counts].exists():
                for name, path in removed.items():
                    with suppress(OSError):
                        os.rename(path, folder / name)
            raise
        finally:
            for path in (*staged.values(), *removed.values()):
                with suppress(OSError):
                    path.unlink()
        _sync(folder)
    return True


def _holds(path: Path, content: bytes | None) -> bool:
    """Whether a file is what it is to be; an `OSError` where what is there cannot be replaced."""
    if not os.path.lexists(path):
        return content is None
    # Renaming over a folder would fail after other files are in place; over a device, as root, it
    # would not fail.
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{path} is not a file that could be replaced")
    if content is None:
        return False
    with suppress(OSError):
        return path.stat().st_size == len(content) and path.read_bytes() == content
    return False


def _stage(folder: Path, content: bytes, name: str) -> Path:
    path = _new_name(folder)
    try:
        with open(path, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        with suppress(OSError):
            path.unlink()
        if isinstance(error, OSError):
            # The caller does not know the temporary file's name.
            raise OSError(error.errno, error.strerror, str(folder / name)) from error
        raise
    return path


def _new_name(folder: Path) -> Path:
    return folder / f".ia3-{uuid.uuid4().hex[:12]}"


def _sync(folder: Path) -> None:
    """Have the names in a folder on the disk; not all file systems and systems can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """A folder to write into: made if absent, held, and without what dead writers left.

    One that was made is removed again on an error.
    """
    if folder.exists() and not folder.is_dir():
        raise _os_error(errno.ENOTDIR, folder)
    made: list[Path] = []
    with ExitStack() as lock:
        try:
            if _made_and_held(folder, made, lock):
                for name in filter(_STAGED_FILE.fullmatch, os.listdir(folder)):
                    with suppress(OSError):
                        (folder / name).unlink()
            yield
        except BaseException:
            # While it is held: another writer finds it gone, and makes it anew.
            _remove(made)
            raise
    for parent in {path.parent for path in made}:
        _sync(parent)


def _made_and_held(folder: Path, made: list[Path], lock: ExitStack) -> bool | None:
    for _ in range(_TRIES):
        absent = [path for path in (folder, *folder.parents) if not path.exists()]
        # Another writer that fails removes what it has made.
        with suppress(FileNotFoundError):
            folder.mkdir(parents=True, exist_ok=True)
            made[:] = dict.fromkeys([*absent, *made])
            return lock.enter_context(locked(folder))
    raise _os_error(errno.ENOENT, folder)


def _remove(made: list[Path]) -> None:
    for path in made:  # innermost first
        with suppress(OSError):
            path.rmdir()


@contextmanager
def new_folder_beside(path: Path, *, alone: bool = False) -> Iterator[Path]:
    """A new folder with a name of its own beside `path`, which it, or one in it, is renamed to.

    What is left of it at the end is removed, and so is now what dead processes left of theirs. It
    has the usual permissions. It is held: `write_files` into a folder in it, not into itself.

    Raises:
        BlockingIOError: a living process has one, and this is to be `alone`.
        OSError: the folder above is not there, or may not be written.
    """
    # Not mkdtemp: only its maker could read the result.
    folder = path.parent / f".{path.name}.ia3-{uuid.uuid4().hex[:12]}"
    of_path = re.compile(re.escape(f".{path.name}") + _STAGED_FOLDER)
    with ExitStack() as lock:
        # Under its lock a new folder is made and held at once, so that none is taken for a dead
        # one's.
        with locked(path.parent):
            for name in filter(of_path.fullmatch, os.listdir(path.parent)):
                if not _removed_if_dead(path.parent / name) and alone:
                    raise _os_error(errno.EWOULDBLOCK, path.parent / name)
            folder.mkdir()
            lock.enter_context(locked(folder))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_dead(parent: Path) -> None:
    """Remove what dead processes have left of their `new_folder_beside` in a folder."""
    staged = re.compile(r"\..+" + _STAGED_FOLDER)
    with locked(parent):
        for name in filter(staged.fullmatch, os.listdir(parent)):
            _removed_if_dead(parent / name)


def remove_folder(folder: Path) -> None:
    """Remove a folder, or a link to one, in one step for those who look for it by its name.

    What a kill leaves of it is for `remove_dead`.

    Raises:
        OSError: it is not there, or may not be removed.
    """
    if folder.is_symlink():
        folder.unlink()
        return
    gone = folder.parent / f".{folder.name}.ia3-{uuid.uuid4().hex[:12]}"
    os.rename(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _removed_if_dead(folder: Path) -> bool:
    """Whether a folder is no living process's, as far as can be told; a dead one's is removed."""
    with suppress(OSError), locked(folder, wait=False) as is_held:
        if is_held:
            shutil.rmtree(folder, ignore_errors=True)
        return is_held is not False
    return True


def write_stdout(content: bytes) -> None:
    """Write to standard output, to the last byte.

    Raises:
        BrokenPipeError: the reader has closed the pipe.
        OSError: it leads into a file that cannot take all.
    """
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    except OSError as error:
        # What is left in the buffer would be written once more, and fail, when Python exits.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        raise OSError(error.errno, error.strerror, "standard output") from error


def _led_to(path: Path) -> Path:
    """The path of the file itself, where this is a link to it."""
    if not path.is_symlink():
        return path
    try:
        return path.resolve()
    except RuntimeError as error:  # links in a circle
        raise _os_error(errno.ELOOP, path) from error


def _os_error(number: int, path: Path) -> OSError:
    return OSError(number, os.strerror(number), str(path))
