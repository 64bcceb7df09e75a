"""Adapters in files and on the hub: functions over the adapters of one model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..adapter.card import card_file
from ..adapter.files import Adapter, adapter_files, named_tensors, unread_adapter, write_saved
from ..adapter.fingerprint import fingerprint
from ..adapter.layout import KEY_PREFIX, KEY_SUFFIX, open_folder
from ..core.names import own_modules, own_names
from ..core.route import LOCK
from ..core.spread import gathered
from ..errors import IA3Error, StateError, naming, shown, warn_caller
from ..files.atomic import check_folder, write_files
from ..files.hub import adapter_folder, hub_options, upload
from ..files.saved import WEIGHTS_NAME
from ..targets.config import IA3Config
from ..targets.resolve import leave_out, names_chosen, resolve
from .adapters import Adapters, check_config
from .embeddings import embeddings_of, were_resized

# PEFT's folder for the adapter of this name is the one given, for others one inside it.
DEFAULT_ADAPTER = "default"
# What PEFT takes with an adapter and this library need not know: how a base model is placed, which
# is left as it is, and which of two files is read.
IGNORED = {
    *("torch_device", "device_map", "max_memory", "offload_folder", "offload_dir", "offload_index"),
    *("torch_dtype", "dtype", "use_safetensors", "trust_remote_code"),
}
# Of transformers' `save_pretrained`: an adapter is one small file.
IGNORED_WHEN_SAVED = {
    *("max_shard_size", "save_function", "save_original_format", "save_peft_format", "token"),
    "variant",
}


def save(
    adapters: Adapters,
    root: Path,
    selected: Sequence[str] | None = None,
    only: str | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    embeddings: bool | str = "auto",
    is_main_process: bool = True,
) -> None:
    """Write adapters' two files each, into folders as by `folders_of`, and a card into `root`.

    All of them are written or, where a folder cannot be, none. A process that is not the main one
    only takes part in gathering what has none in `state_dict`.
    """
    if state_dict is not None:
        state_dict = named_tensors("state_dict", state_dict)
    # Other threads may delete adapters, or load others' values into them.
    with LOCK:
        folders = folders_of(adapters, root, selected, only)
        if not is_main_process and state_dict is not None:
            return
        written = to_save(adapters, list(folders), state_dict, embeddings)
        if not is_main_process:
            return
        files = {root: _card(adapters, root, list(folders))}
        for name, adapter in written.items():
            folder = folders[name]
            with naming(f"adapter {name!r}"):
                files[folder] = files.get(folder, {}) | adapter_files(adapter)
    for folder in files:
        check_folder(folder)
    for folder, inside in files.items():
        write = write_saved if WEIGHTS_NAME in inside else write_files
        write(folder, inside)


def write_card(adapters: Adapters, folder: Path) -> None:
    """Write a folder's model card, or complete the head of the one there."""
    write_files(folder, _card(adapters, folder, list(adapters.configs)))


def _card(
    adapters: Adapters, folder: Path | None, names: Sequence[str], tags: Iterable[str] = ()
) -> dict[str, bytes]:
    model = adapters.model
    tags = {*tags, *(getattr(model, "model_tags", None) or ())}
    if isinstance(model, PreTrainedModel):
        tags.add("transformers")
    config = adapters.configs[names[0]] if names else IA3Config()
    return card_file(folder, config, tags)


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
    values = None
    if state_dict is not None:
        values = {key.removeprefix("model."): v for key, v in own_names(state_dict).items()}
    base = fingerprint(adapters.model, adapters.merged_modules(), values)
    found = {name: adapters.stored(name, values) for name in names}
    for adapter in found.values():
        config = adapter.config
        config.inference_mode = True
        # A module may have been replaced since, a head by one of another size.
        chosen = names_chosen(config, own_modules(adapters.contents().modules))
        if gone := [name for name in chosen if name not in adapter.vectors]:
            leave_out(config, gone)
        if config.task_type is None and config.auto_mapping is None:
            kind = type(adapters.model)
            config.auto_mapping = {
                "base_model_class": kind.__name__,
                "parent_library": kind.__module__,
            }
        adapter.base = base
    if embeddings is True or (embeddings == "auto" and were_resized(adapters.model)):
        for key, value in base_embeddings(adapters, values or {}).items():
            for adapter in found.values():
                adapter.copies.setdefault(key, value)
    return found


def base_embeddings(adapters: Adapters, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameter name -> value of the embeddings and output layers, not merged; `given` go first."""
    return {
        f"{name}.{slot}": gathered(given.get(f"{name}.{slot}", adapters.merge.original(name, slot)))
        for name, module in embeddings_of(adapters.model).items()
        for slot, parameter in module._parameters.items()
        if parameter is not None and parameter.is_floating_point()
    }


def folders_of(
    adapters: Adapters, folder: str | Path, selected: Sequence[str] | None, only: str | None
) -> dict[str, Path]:
    """Adapter name -> its folder, as PEFT lays them out; for `only` one, the folder itself."""
    if only is not None:
        adapters.check_known([only])
        folders = {only: Path(folder)}
    else:
        names = adapters.configs if selected is None else adapters.named(selected)
        folders = {n: Path(folder) / ("" if n == DEFAULT_ADAPTER else n) for n in names}
    adapters.check_known(folders)
    if not folders:
        raise StateError("there is no adapter to save")
    return folders


def check_form(safe_serialization: bool, initial_model: str | None) -> None:
    """Raise `IA3Error` for what PEFT's `save_pretrained` can write and this library does not."""
    if safe_serialization is not True:
        raise IA3Error(
            f"safe_serialization is {shown(safe_serialization)}, expected True: a pickle could run "
            "code when it is read, so that only safetensors files are written"
        )
    if initial_model is not None:
        raise IA3Error(
            f"path_initial_model_for_weight_conversion is {shown(initial_model)}, expected None: "
            "(IA)³ never changes the base model, so that there is nothing to convert"
        )


@contextmanager
def opened(
    model_id: str | Path,
    config: IA3Config | None,
    is_trainable: bool,
    key_mapping: Mapping[str, str] | None,
    further: Mapping[str, Any],
) -> Iterator[Adapter]:
    """An adapter from its folder or from the hub, as `further` arguments of a call say.

    Its values are not read yet, but by `whole` within the context. Raises as `read_adapter`.
    """
    if config is not None:
        check_config(config)
    hub = hub_options(further, IGNORED)
    with open_folder(adapter_folder(model_id, ["adapter_*"], **hub)) as saved:
        adapter = unread_adapter(saved, config, key_mapping)
        adapter.config.inference_mode = not is_trainable
        yield adapter


def without_other_sizes(
    adapters: Adapters, stored: Adapter, name: str
) -> tuple[Adapter, list[str]]:
    """A stored adapter with what is on the model where its own is of another size.

    It is to be put on the model, or into the adapter `name` if that is there. A warning names what
    was left out.

    Returns:
        The adapter, and the keys of what was left out, in PEFT's words.
    """
    stored = adapters.named_as_here(stored.whole())
    if name in adapters.configs:
        here = adapters.stored(name)
        vectors, copies = here.vectors, here.copies
    else:
        new = torch.ones if stored.config.init_ia3_weights else torch.randn
        _, targets = resolve(adapters.model, stored.config, stored.frozen)
        vectors = {target.name: new(target.activation.shape) for target in targets}
        copies = own_names(adapters.model.state_dict())
    kept = _of_other_size(stored.vectors, vectors)
    kept_copies = _of_other_size(stored.copies, copies)
    stored = replace(stored, vectors=stored.vectors | kept, copies=stored.copies | kept_copies)
    left_out = [f"{KEY_PREFIX}{module}{KEY_SUFFIX}.{name}" for module in kept]
    left_out += [f"{KEY_PREFIX}{key}" for key in kept_copies]
    if left_out:
        warn_caller(f"of another size than on the model, and left as they are there: {left_out}")
    return stored, left_out


def _of_other_size(given: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is here in place of the tensors that are given in another shape."""
    names = [name for name in given if name in here and given[name].shape != here[name].shape]
    return {name: here[name] for name in names}


def push(adapters: Adapters, repo_id: str, tags: Collection[str], **options: Any) -> str:
    """Upload all adapters, and a model card where the repository has none; returns the address.

    The `options` are `upload`'s.
    """
    with LOCK:  # as in `save`
        folders = folders_of(adapters, "", None, None)
        files = _card(adapters, None, list(folders), tags)
        for name, adapter in to_save(adapters, list(folders)).items():
            for file, content in adapter_files(adapter).items():
                files[(folders[name] / file).as_posix()] = content
    return upload(repo_id, files, "Upload (IA)³ adapter", **options)
