"""Adapters in files and on the hub: functions over the adapters of one model."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor

from ..adapter.files import Adapter, adapter_files, read_adapter
from ..adapter.fingerprint import fingerprint
from ..core.names import own_names
from ..errors import IA3Error
from ..files.atomic import check_folder, write_files
from ..files.hub import HubOptions, adapter_folder
from ..targets.config import IA3Config
from .adapters import Adapters

# PEFT's folder for the adapter of this name is the one given, for others one inside it.
DEFAULT_ADAPTER = "default"


def save(
    adapters: Adapters,
    folders: Mapping[str, Path],
    state_dict: Mapping[str, Tensor] | None = None,
    is_main_process: bool = True,
) -> None:
    """Write adapters' two files each, all of them or, where a folder cannot be written, none.

    A process that is not the main one only takes part in gathering what has none in `state_dict`.
    """
    if not is_main_process and state_dict is not None:
        return
    written = to_save(adapters, list(folders), state_dict)
    if not is_main_process:
        return
    files = {name: adapter_files(adapter) for name, adapter in written.items()}
    for folder in folders.values():
        check_folder(folder)
    for name, folder in folders.items():
        write_files(folder, files[name])


def to_save(
    adapters: Adapters, names: Sequence[str], state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Adapter]:
    """Adapters as they are saved: for inference, and with their base model's fingerprint.

    The values of a `state_dict`, an `IA3Model`'s, go before those on the model.
    """
    adapters.check_known(names)
    values = None
    if state_dict is not None:
        values = {key.removeprefix("model."): v for key, v in own_names(state_dict).items()}
    base = fingerprint(adapters.model, adapters.merged_modules(), values)
    found = {name: adapters.stored(name, values) for name in names}
    for adapter in found.values():
        config = adapter.config
        config.inference_mode = True
        if config.task_type is None and config.auto_mapping is None:
            kind = type(adapters.model)
            config.auto_mapping = {
                "base_model_class": kind.__name__,
                "parent_library": kind.__module__,
            }
        adapter.base = base
    return found


def folders_of(
    adapters: Adapters, folder: str | Path, selected: Sequence[str] | None, only: str | None
) -> dict[str, Path]:
    """Adapter name -> its folder, as PEFT lays them out; for `only` one, the folder itself."""
    if only is not None:
        folders = {only: Path(folder)}
    else:
        names = adapters.configs if selected is None else selected
        folders = {n: Path(folder) / ("" if n == DEFAULT_ADAPTER else n) for n in names}
    adapters.check_known(folders)
    if not folders:
        raise IA3Error("there is no adapter to save")
    return folders


def read(
    model_id: str | Path, config: IA3Config | None, is_trainable: bool, **hub: Unpack[HubOptions]
) -> Adapter:
    """An adapter from its folder or from the hub; raises as `read_adapter`."""
    adapter = read_adapter(adapter_folder(model_id, ["adapter_*"], **hub), config)
    adapter.config.inference_mode = not is_trainable
    return adapter


def push(
    adapters: Adapters,
    repo_id: str,
    private: bool | None,
    token: str | bool | None,
    commit: Mapping[str, Any],
) -> str:
    """Upload all adapters, and a model card where the repository has none; returns the address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as root:
        folders = folders_of(adapters, root, None, None)
        save(adapters, folders)
        if not api.file_exists(repo_id, "README.md", revision=commit.get("revision")):
            first = adapters.configs[next(iter(folders))]
            # A folder of this machine means nothing on the hub.
            base = first.base_model_name_or_path
            known = [f"base_model: {base}"] if base and not Path(base).exists() else []
            card = ["---", *known, "library_name: peft", "tags:", "- ia3", "---", ""]
            write_files(root, {"README.md": "\n".join(card).encode()})
        options = {"commit_message": "Upload (IA)³ adapter", **commit}
        return str(api.upload_folder(repo_id=repo_id, folder_path=root, **options))
