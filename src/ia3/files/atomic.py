"""Files written whole or not at all, whenever the process ends."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path


def check_folder(folder: str | Path) -> None:
    """Fail now as writing into this folder would fail after the work that is to be kept.

    Raises:
        OSError: the folder, or the nearest one above it that exists, may not be written.
    """
    folder = Path(folder)
    nearest = next((p for p in (folder, *folder.parents) if p.exists()), folder)
    if not nearest.is_dir():
        raise _os_error(errno.ENOTDIR, nearest)
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise _os_error(errno.EACCES, nearest)


def write_file(path: str | Path, content: bytes) -> None:
    """Write one file, or replace it, so that a failure leaves what was there before.

    A link stays one: the file that it leads to is replaced.

    Raises:
        OSError: the disk is full or may not be written; nothing has changed.
    """
    path = Path(path)
    path = path.resolve() if path.is_symlink() else path
    write_files(path.parent, {path.name: content})


def write_files(folder: str | Path, files: Mapping[str, bytes]) -> None:
    """Write files into a folder so that a failure leaves what was there before.

    A folder that does not exist is written beside its place and renamed into it. In one that
    exists, all files are first written under names of their own, then each is renamed into place,
    one after the other; other files in it stay.

    Raises:
        OSError: the disk is full or may not be written; nothing has changed.
    """
    folder = Path(folder)
    if folder.is_dir():
        _write_into_old(folder, files)
    elif folder.exists():
        raise _os_error(errno.ENOTDIR, folder)
    else:
        _write_new(folder, files)


def _write_into_old(folder: Path, files: Mapping[str, bytes]) -> None:
    mark = uuid.uuid4().hex[:12]
    staged: dict[str, Path] = {}
    for name in files:
        # Renaming over a folder would fail after other files are in place; over a device, as root,
        # it would not fail.
        if (folder / name).exists() and not (folder / name).is_file():
            raise FileExistsError(f"{folder / name} is not a file that could be replaced")
        # Not under its own name with more behind it, which may be as long as a name can be.
        staged[name] = folder / f".{mark}.{len(staged)}"
    try:
        for name, content in files.items():
            _write(staged[name], content, folder / name)
        for name in files:
            os.replace(staged[name], folder / name)
            del staged[name]
    finally:
        for path in staged.values():
            with suppress(OSError):
                path.unlink()


def _write_new(folder: Path, files: Mapping[str, bytes]) -> None:
    # Innermost first, as they have to be removed.
    created = [parent for parent in folder.parents if not parent.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = new_folder_beside(folder)
        try:
            for name, content in files.items():
                _write(staging / name, content, folder / name)
            try:
                staging.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
                # Another process has made it meanwhile: all processes of one run may write it.
                _write_into_old(folder, files)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except BaseException:
        for parent in created:
            with suppress(OSError):
                parent.rmdir()
        raise


def _write(path: Path, content: bytes, target: Path) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        # The caller does not know the temporary file's name.
        raise OSError(error.errno, error.strerror, str(target)) from error


def new_folder_beside(path: Path) -> Path:
    """A new folder with a name of its own, to be renamed to `path`, with the usual permissions."""
    # Not mkdtemp: only its maker could read the result.
    folder = path.parent / f".{path.name}.{uuid.uuid4().hex[:12]}"
    folder.mkdir()
    return folder


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


def _os_error(number: int, path: Path) -> OSError:
    return OSError(number, os.strerror(number), str(path))
