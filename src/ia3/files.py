"""Files written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path


def write_file(path: str | Path, content: bytes) -> None:
    """Write one file, or replace it, so that a failure leaves what was there before.

    Raises:
        OSError: the disk is full or may not be written; nothing has changed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_files(path.parent, {path.name: content})


def write_files(folder: str | Path, files: Mapping[str, bytes]) -> None:
    """Write files into a folder so that a failure leaves what was there before.

    A folder that does not exist is written beside its place and renamed into it. In one that
    exists, all files are first written to a temporary folder inside it, then each is renamed into
    place; other files in it stay.

    Raises:
        OSError: the disk is full or may not be written; nothing has changed.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, expected a folder to write into")
    exists = folder.exists()
    beside = folder if exists else folder.parent
    beside.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=beside))
    try:
        for name, content in files.items():
            with open(staging / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        if exists:
            for name in files:
                os.replace(staging / name, folder / name)
        else:
            # mkdtemp makes folders that only their owner can read.
            umask = os.umask(0)
            os.umask(umask)
            staging.chmod(0o777 & ~umask)
            staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
