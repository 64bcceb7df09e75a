"""Where an adapter's files are: a local folder, or a snapshot from the hub."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TypedDict, Unpack

from ..errors import did_you_mean

CONFIG_NAME = "adapter_config.json"


class HubOptions(TypedDict, total=False):
    """What may be said about an adapter on the hub, in huggingface_hub's words."""

    revision: str | None
    subfolder: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    force_download: bool
    local_files_only: bool


def check_options(
    method: str, given: Collection[str], known: Collection[str] = HubOptions.__annotations__
) -> None:
    """Raise Python's own `TypeError`, in the public method's name, for an unknown argument.

    Its `**options` would hand it on to a function that the caller did not call, or to none.
    """
    for name in given:
        if name not in known:
            hint = did_you_mean(name, known)
            raise TypeError(f"{method}() got an unexpected keyword argument {name!r}{hint}")


def adapter_folder(
    model_id: str | Path, patterns: Sequence[str], **hub: Unpack[HubOptions]
) -> Path:
    """The folder that holds an adapter's files; `patterns` says which to fetch from the hub.

    `subfolder` is where in the folder or repository the adapter lies; the other options are
    huggingface_hub's. A `FileNotFoundError` where there is no such folder and none on the hub.
    """
    folder, subfolder = Path(model_id), hub.pop("subfolder", None)
    if not folder.is_dir():
        inside = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in patterns]
        folder = _snapshot(str(model_id), inside, hub)
    if subfolder is None:
        return folder
    found = folder / subfolder
    if not found.resolve().is_relative_to(folder.resolve()):
        raise FileNotFoundError(f"subfolder {subfolder!r} leads out of {folder}")
    if not found.is_dir():
        raise FileNotFoundError(f"no adapter at {model_id}: it has no subfolder {subfolder!r}")
    return found


def _snapshot(model_id: str, patterns: list[str], hub: HubOptions) -> Path:
    from huggingface_hub import is_offline_mode, snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # Some versions ask for the files of a commit although they are offline, and fail.
    local = hub.get("local_files_only", False) or is_offline_mode()
    options = {**hub, "local_files_only": local}
    try:
        return Path(snapshot_download(model_id, allow_patterns=patterns, **options))
    except HFValidationError as error:
        message = f"no adapter at {model_id!r}: no such folder, and not a hub id"
        raise FileNotFoundError(message) from error
    except (LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"no adapter at {model_id!r}: no such folder, and not to be had from the hub: {error}"
        ) from error
