"""Where an adapter's files are: a local folder, or a repository on the hub."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack, cast

from ..arguments import flag, instance, path_of
from ..errors import IA3Error, InvalidTypeError, MissingFileError, shown, warn_ignored

CONFIG_NAME = "adapter_config.json"
CARD_NAME = "README.md"


class HubOptions(TypedDict, total=False):
    """What may be said about an adapter on the hub, in huggingface_hub's words."""

    revision: str | None
    subfolder: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    local_dir: str | Path | None
    force_download: bool
    local_files_only: bool
    repo_type: str | None
    endpoint: str | None
    headers: dict[str, str] | None
    user_agent: dict[str, Any] | str | None
    library_name: str | None
    library_version: str | None
    etag_timeout: float
    tqdm_class: type | None


def hub_options(given: Mapping[str, Any], ignored: Collection[str] = ()) -> HubOptions:
    """Those of a call's further arguments that say where an adapter is on the hub.

    A warning names the others that are not `ignored`.
    """
    known = HubOptions.__annotations__.keys()
    found = {key: value for key, value in given.items() if key in known}
    if given.get("use_auth_token") is not None:  # its name before token
        found.setdefault("token", given["use_auth_token"])
    warn_ignored(given, {*known, "use_auth_token", *ignored})
    return cast(HubOptions, found)


def hub_id(name: str | None) -> str | None:
    """A base model's name if it is one on the hub: a folder of this machine means nothing there."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not name or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def upload(
    repo_id: str,
    files: Mapping[str, bytes],
    message: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    **commit: Any,
) -> str:
    """Commit files, by their paths in a repository, and return the address.

    The repository is made, perhaps `private`, if absent, and the branch that `commit` names as
    `revision`. A card that is there stays as it is. `commit` is for `HfApi.create_commit`, the
    `message` for one that has none.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HFValidationError

    instance("repo_id", repo_id, str, "a repository's name")
    _check_texts(repo_id=repo_id, token=token, **commit)
    commit["commit_message"] = commit.get("commit_message") or message
    private = None if private is None else flag("private", private)
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    except HFValidationError as error:
        raise IA3Error(f"repo_id is {shown(repo_id)}, expected one of the hub: {error}") from error
    branch = commit.get("revision")
    if branch is not None and not branch.startswith("refs/pr"):
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    kept = api.file_exists(repo_id, CARD_NAME, revision=branch)
    operations = [
        CommitOperationAdd(path, content)
        for path, content in files.items()
        if not (kept and path == CARD_NAME)
    ]
    return str(api.create_commit(repo_id, operations, **commit))


def _check_texts(**given: object) -> None:
    for name, value in given.items():
        if not isinstance(value, str | bool | None):
            raise InvalidTypeError(f"{name} is {shown(value)}, expected a text")
        if isinstance(value, str) and not _is_text(value):
            raise IA3Error(f"{name} is {shown(value)}, which is no text: it has half a character")
    if isinstance(given["token"], str) and not given["token"].isascii():
        raise IA3Error("token has characters that none of the hub's has")


def _is_text(value: str) -> bool:
    """Whether it can be encoded: half of a surrogate pair cannot."""
    return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)


def adapter_folder(
    model_id: str | Path, patterns: Sequence[str], **hub: Unpack[HubOptions]
) -> Path:
    """The folder that holds an adapter's files; `patterns` says which to fetch from the hub.

    `subfolder` is where in the folder or repository the adapter lies; the other options are
    huggingface_hub's. A `FileNotFoundError` where there is no such folder and none on the hub.
    """
    folder, subfolder = path_of("the adapter's folder", model_id), hub.pop("subfolder", None)
    if subfolder is not None:
        path_of("subfolder", subfolder)
    if not folder.is_dir():
        inside = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in patterns]
        folder = snapshot("adapter", str(model_id), inside, **hub)
    if subfolder is None:
        return folder
    found = folder / subfolder
    if not found.resolve().is_relative_to(folder.resolve()):
        raise MissingFileError(f"subfolder {subfolder!r} leads out of {folder}")
    if not found.is_dir():
        raise MissingFileError(f"no adapter at {model_id}: it has no subfolder {subfolder!r}")
    return found


def snapshot(what: str, model_id: str, patterns: Sequence[str], **hub: Unpack[HubOptions]) -> Path:
    """The folder that files of a repository on the hub, by their patterns, are fetched into.

    Raises:
        MissingFileError: there is no such repository, or it is not to be had; the message says
            `what` was looked for.
    """
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
        return Path(snapshot_download(model_id, allow_patterns=[*patterns], **options))
    except HFValidationError as error:
        message = f"no {what} at {model_id!r}: no such folder, and not a hub id"
        raise MissingFileError(message) from error
    except (LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise MissingFileError(
            f"no {what} at {model_id!r}: no such folder, and not to be had from the hub: {error}"
        ) from error
