"""Adapters in files and on the hub: functions over the adapters of one model."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor

from ..adapter.files import Adapter, adapter_files, read_adapter
from ..adapter.fingerprint import fingerprint
from ..errors import IA3Error, naming
from ..files.atomic import check_folder, write_files
from ..files.hub import HubOptions, adapter_folder
from ..targets.config import IA3Config
from .adapters import Adapters
from .embeddings import embeddings_of, were_resized

# PEFT's folder for the adapter of this name is the one given, for others one inside it.
DEFAULT_ADAPTER = "default"


def save(
    adapters: Adapters,
    folders: Mapping[str, Path],
    state_dict: Mapping[str, Tensor] | None = None,
    embeddings: bool | str = "auto",
) -> None:
    """Write adapters' two files each, all of them or, where a folder cannot be written, none."""
    written = to_save(adapters, list(folders), state_dict, embeddings)
    files = {}
    for name, adapter in written.items():
        with naming(f"adapter {name!r}"):
            files[name] = adapter_files(adapter)
    for folder in folders.values():
        check_folder(folder)
    for name, folder in folders.items():
        write_files(folder, files[name])


def to_save(
    adapters: Adapters,
    names: Sequence[str],
    state_dict: Mapping[str, Tensor] | None = None,
    embeddings: bool | str = "auto",
) -> dict[str, Adapter]:
    """Adapters as they are saved: for inference, and with their base model's fingerprint.

    The values of a `state_dict`, an `IA3Model`'s, go before those on the model. The base model's
    `embeddings` are among an adapter's values, `"auto"` only if they were resized.
    """
    adapters.check_known(names)
    base = fingerprint(adapters.model, adapters.merged_modules())
    found = {name: adapters.stored(name, state_dict) for name in names}
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
    if embeddings is True or (embeddings == "auto" and were_resized(adapters.model)):
        for key, value in base_embeddings(adapters, state_dict or {}).items():
            for adapter in found.values():
                adapter.copies.setdefault(key, value)
    return found


def base_embeddings(adapters: Adapters, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameter name -> value of the embeddings and output layers, not merged; `given` go first."""
    return {
        f"{name}.{slot}": given.get(f"model.{name}.{slot}", adapters.merge.original(name, slot))
        for name, module in embeddings_of(adapters.model).items()
        for slot, parameter in module._parameters.items()
        if parameter is not None and parameter.is_floating_point()
    }


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
    model_id: str | Path,
    config: IA3Config | None,
    is_trainable: bool,
    key_mapping: Mapping[str, str] | None = None,
    **hub: Unpack[HubOptions],
) -> Adapter:
    """An adapter from its folder or from the hub; raises as `read_adapter`."""
    adapter = read_adapter(adapter_folder(model_id, ["adapter_*"], **hub), config, key_mapping)
    adapter.config.inference_mode = not is_trainable
    return adapter


def commit_options() -> set[str]:
    """What may be said about an upload, in huggingface_hub's words."""
    from huggingface_hub import HfApi

    return {*inspect.signature(HfApi.upload_folder).parameters} - {"self", "repo_id", "folder_path"}


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
