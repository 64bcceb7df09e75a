"""Where an adapter's files are: a local folder, or a snapshot from the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

CONFIG_NAME = "adapter_config.json"


class HubOptions(TypedDict, total=False):
    """What may be said about an adapter on the hub, in huggingface_hub's words."""

    revision: str | None
    subfolder: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    force_download: bool
    local_files_only: bool


def adapter_folder(
    model_id: str | Path,
    patterns: Sequence[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Path:
    """The folder that holds an adapter's files.

    Args:
        model_id: a folder, or an id on the hub.
        patterns: which files to fetch from the hub.
        subfolder: where in the folder or repository the adapter lies.

    Raises:
        FileNotFoundError: neither such a folder, nor to be had from the hub.
    """
    folder = Path(model_id)
    if not folder.is_dir():
        folder = _snapshot(
            str(model_id),
            [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in patterns],
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
    if subfolder is None:
        return folder
    inside = folder / subfolder
    if not inside.resolve().is_relative_to(folder.resolve()):
        raise FileNotFoundError(f"subfolder {subfolder!r} leads out of {folder}")
    if not inside.is_dir():
        raise FileNotFoundError(f"no adapter at {model_id}: it has no subfolder {subfolder!r}")
    return inside


def _snapshot(
    model_id: str,
    patterns: list[str],
    *,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
    force_download: bool,
    local_files_only: bool,
) -> Path:
    from huggingface_hub import is_offline_mode, snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                model_id,
                allow_patterns=patterns,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                force_download=force_download,
                # Some versions ask for the files of a commit even so, and fail.
                local_files_only=local_files_only or is_offline_mode(),
            )
        )
    except HFValidationError as error:
        raise FileNotFoundError(
            f"no adapter at {model_id!r}: no such folder, and not a hub id"
        ) from error
    except (LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"no adapter at {model_id!r}: no such folder, and not to be had from the hub: {error}"
        ) from error
