"""PEFT's low-level functions: adapters without a wrapper around the model, and tensors by key."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import safetensors
from ..adapter.files import check_finite, check_tensors, named_tensors
from ..adapter.layout import BASE_LAYER, KEY_PREFIX, KEY_SUFFIX, mapped, open_folder
from ..adapter.pickled import read_pickled
from ..arguments import flag, instance
from ..base.loading import device_named
from ..core.inventory import contents
from ..core.names import ATTRIBUTE, own_names, unwrapped
from ..core.route import LOCK, changing
from ..core.spread import spread_like
from ..errors import IA3Error, MismatchError, StateError, UnknownNameError
from ..files.hub import adapter_folder, hub_options
from ..model.adapters import check_config, check_string
from ..model.embeddings import embeddings_of, were_resized
from ..model.ia3_model import DEFAULT_ADAPTER, IA3Model
from ..targets.config import IA3Config

# The handle on an injected model's adapters; in its __dict__, so that it is no submodule.
HANDLE = "_ia3_model"


def inject_adapter_in_model(
    peft_config: IA3Config,
    model: nn.Module,
    adapter_name: str = DEFAULT_ADAPTER,
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Put an adapter on a model in place and return that same model.

    Args:
        peft_config: what to rescale.
        model: the model; a second call with another name adds a second adapter.
        adapter_name: the last adapter to be put on the model is active.
        low_cpu_mem_usage: no effect.
        state_dict: `<module>.ia3_l` -> vector: the sites are those it names, as in PEFT; its values
            are not loaded (`set_peft_model_state_dict` does that).

    Raises:
        InvalidTypeError: an argument is of another type.
        NoMatchingPeftModuleError: a name in the config matches no module.
        IA3Error: the name is taken or malformed, the state dict has no vector, or the config does
            not fit. Whatever is raised, the model is unchanged.
    """
    check_config(peft_config)
    instance("model", model, nn.Module, "a torch.nn.Module")
    if state_dict is not None:
        state_dict = named_tensors("state_dict", state_dict)
        peft_config = _config_for(peft_config, state_dict)
    with changing():
        handle = model.__dict__.get(HANDLE)
        on = contents(model)
        if handle is None or not (on.sites or on.copies):  # unloaded by hand since
            # The names of a state dict are those of an adapter that was trained on them.
            make = IA3Model if state_dict is None else IA3Model._of_own_choice
            model.__dict__[HANDLE] = make(model, peft_config, adapter_name)
        else:
            if state_dict is None:
                handle.add_adapter(adapter_name, peft_config)
            else:
                handle._add(adapter_name, peft_config, None, True)
            handle.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)
    return model


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = DEFAULT_ADAPTER,
    unwrap_compiled: bool = False,
    save_embedding_layers: str | bool = "auto",
) -> dict[str, Tensor]:
    """An adapter's tensors under the keys they have in its file.

    Args:
        model: an `IA3Model`, whose keys begin with `base_model.model.`, or a model with injected
            adapters, whose keys do not; compiled or not.
        state_dict: the model's state dict, if it has been gathered already.
        adapter_name: which adapter.
        unwrap_compiled: no effect: a compiled model is always unwrapped.
        save_embedding_layers: whether the base model's embeddings and output layer are among them;
            `"auto"`: where the vocabulary was resized since the model was made or loaded.

    Returns:
        Key -> tensor, in the model's memory: vectors, in their files' shapes, and the
        parameters of copies of modules (`modules_to_save`).

    Raises:
        InvalidTypeError: an argument is of another type.
        UnknownNameError: there is no adapter of that name.
        MismatchError: the `state_dict` lacks a tensor of it.
    """
    base, prefix = _base_and_prefix(model)
    if state_dict is not None:
        state_dict = named_tensors("state_dict", state_dict)
    before = "" if state_dict is None else "model." * bool(prefix)
    with LOCK:
        values = own_names(base.state_dict() if state_dict is None else state_dict)
        keys = _keys(base, adapter_name)
    if save_embedding_layers is True or (save_embedding_layers == "auto" and were_resized(base)):
        keys = _embedding_keys(base, keys.values()) | keys
    lacking = next((name for name in keys if f"{before}{name}" not in values), None)
    if lacking is not None:
        raise MismatchError(
            f"state_dict has no {f'{before}{lacking}'!r}: expected all of the model's, gathered"
        )
    return {f"{prefix}{key}": values[f"{before}{name}"] for name, key in keys.items()}


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = DEFAULT_ADAPTER,
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Load an adapter's tensors, as `get_peft_model_state_dict` gives them, into an adapter.

    Args:
        model: an `IA3Model`, or a model with injected adapters; compiled or not.
        peft_model_state_dict: the tensors; a leading `base_model.model.` may be absent.
        adapter_name: which adapter.
        ignore_mismatched_sizes: leave out tensors of another shape instead of raising.
        low_cpu_mem_usage: no effect.

    Returns:
        `missing_keys` and `unexpected_keys`, as `load_state_dict` does. As in PEFT a missing
        vector's key ends in the adapter's name. The base model's own keys are not missed.

    Raises:
        InvalidTypeError: an argument is of another type, or a tensor that would be loaded is
            sparse, complex, quantized or on the meta device.
        UnknownNameError: there is no adapter of that name.
        StateError: it is merged.
        MismatchError: a shape does not fit.
        IA3Error: a vector is not finite. Whatever is raised, nothing is loaded.
    """
    base, prefix = _base_and_prefix(model)
    named = own_names(named_tensors("peft_model_state_dict", peft_model_state_dict))
    ignore_mismatched_sizes = flag("ignore_mismatched_sizes", ignore_mismatched_sizes)
    given = {key.removeprefix(KEY_PREFIX): value for key, value in named.items()}
    ending = f".{ATTRIBUTE}"
    with LOCK, torch.no_grad():
        own = {key: name for name, key in _keys(base, adapter_name).items()}
        embeddings = {key: name for name, key in _embedding_keys(base, own).items()}
        keys = own | {key: name for key, name in embeddings.items() if key in given}
        if any(adapter_name in site.merged for _, _, site in contents(base).sites):
            raise StateError(f"adapter {adapter_name!r} is merged: unmerge_adapter() first")
        slots = own_names(base.state_dict(keep_vars=True))
        check_tensors({key: given[key] for key in sorted(given.keys() & keys.keys())})
        for key in sorted(given.keys() & keys.keys()):
            found, expected = given[key].shape, slots[keys[key]].shape
            if found != expected and not ignore_mismatched_sizes:
                raise MismatchError(f"{prefix}{key} is {list(found)}, expected {list(expected)}")
            if found != expected:
                del given[key]
        loaded = sorted(key for key in given.keys() & keys.keys() if key.endswith(ending))
        check_finite({key.removesuffix(ending): given[key] for key in loaded})
        for key in given.keys() & keys.keys():
            slots[keys[key]].copy_(spread_like(given[key], slots[keys[key]]))
    missing = [
        f"{prefix}{key}" + f".{adapter_name}" * key.endswith(KEY_SUFFIX)
        for key in keys.keys() - given.keys()
    ]
    unexpected = [f"{prefix}{key}" for key in given.keys() - keys.keys()]
    return nn.modules.module._IncompatibleKeys(sorted(missing), sorted(unexpected))


def load_peft_weights(
    model_id: str | Path,
    device: str | int | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hub: Any,
) -> dict[str, Tensor]:
    """An adapter's tensors as its file has them.

    Args:
        model_id: the adapter's folder, or its id on the hub.
        device: where the tensors go; the GPU, if there is one, where not given.
        key_mapping: regular expressions of names of modules -> their replacements; the first that
            is found in a name is applied.
        hub: `revision`, `subfolder`, `token`, `cache_dir`, ...

    Returns:
        Key -> tensor, of the file's dtype: `set_peft_model_state_dict` takes them.

    Raises:
        InvalidTypeError: an argument is of another type.
        StateError: there is no such device.
        MissingFileError: there is no adapter.
        BrokenFileError: its file is broken.
        IA3Error: a name or an expression is malformed.
    """
    if key_mapping is not None:
        instance("key_mapping", key_mapping, Mapping, "a mapping from expressions to texts")
    folder = adapter_folder(model_id, ["adapter_*"], **hub_options(hub))
    with open_folder(folder) as saved:
        tensors = read_pickled(saved) if saved.pickled else safetensors.read_tensors(saved)
    place = device_named("auto" if device is None else device)
    return {_renamed(key, key_mapping or {}): value.to(place) for key, value in tensors.items()}


def _renamed(key: str, mapping: Mapping[str, str]) -> str:
    prefix = KEY_PREFIX if key.startswith(KEY_PREFIX) else ""
    return prefix + mapped(key.removeprefix(prefix), mapping)


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The base model's own state dict, under its own names, without what adapters hold.

    Args:
        model: an `IA3Model`, or a model with injected adapters; compiled or not.

    Returns:
        Name -> tensor, in the model's memory.

    Raises:
        InvalidTypeError: it is no module.
    """
    base, _ = _base_and_prefix(model)
    values = own_names(base.state_dict())
    return {name: values[name] for name in values if ATTRIBUTE not in name.split(".")}


def set_base_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True
) -> Any:
    """Load the base model's own state dict; the base model's `load_state_dict` does so too.

    Args:
        model: an `IA3Model`, or a model with injected adapters; compiled or not.
        state_dict: as `get_base_model_state_dict` gives it.
        strict: missing and unexpected keys are an error, as of `load_state_dict`.

    Returns:
        `missing_keys` and `unexpected_keys`, as `load_state_dict` does.

    Raises:
        InvalidTypeError: an argument is of another type.
        StateError: adapters are merged into what is to be loaded.
        MismatchError: keys or shapes are not the model's.
    """
    base, _ = _base_and_prefix(model)
    values, strict = named_tensors("state_dict", state_dict), flag("strict", strict)
    try:
        return base.load_state_dict(values, strict=strict)
    except IA3Error:
        raise
    except RuntimeError as error:
        raise MismatchError(f"the state_dict does not fit: {error}") from error


def _base_and_prefix(model: nn.Module) -> tuple[nn.Module, str]:
    """The base model, and what its adapters' keys begin with."""
    if isinstance(model, IA3Model):
        return model.model, KEY_PREFIX
    inside = unwrapped(instance("model", model, nn.Module, "a torch.nn.Module"))
    return (inside.model, KEY_PREFIX) if isinstance(inside, IA3Model) else (inside, "")


def _keys(base: nn.Module, adapter_name: str) -> dict[str, str]:
    """Name in the base model's state dict -> key in the adapter's file."""
    check_string(adapter_name)
    on = contents(base)
    keys = {
        f"{name}.{ATTRIBUTE}.{adapter_name}": f"{name}.{ATTRIBUTE}"
        for name, _, site in on.sites
        if adapter_name in site
    } | {
        f"{name}.{ATTRIBUTE}.{adapter_name}.{key}": f"{name}.{key}"
        for name, _, copies in on.copies
        if adapter_name in copies
        for key in own_names(copies[adapter_name].state_dict())
    }
    if not keys:
        raise UnknownNameError(f"no adapter {adapter_name!r} on this {type(base).__name__}")
    return keys


def _embedding_keys(base: nn.Module, keys: Collection[str]) -> dict[str, str]:
    """As `_keys`, of the embeddings and output layers of which an adapter's `keys` have no copy."""
    found = {}
    for name, module in embeddings_of(base).items():
        # What PEFT calls the weight of an output layer that it rescales too.
        place = f"{name}.{BASE_LAYER}" if f"{name}.{ATTRIBUTE}" in keys else name
        for slot, parameter in module._parameters.items():
            if parameter is not None and f"{name}.{slot}" not in keys:
                found[f"{name}.{slot}"] = f"{place}.{slot}"
    return found


def _config_for(config: IA3Config, state_dict: Mapping[str, Tensor]) -> IA3Config:
    """The config with the modules that a state dict has vectors for."""
    suffix = f".{ATTRIBUTE}"
    check_tensors({key: value for key, value in state_dict.items() if key.endswith(suffix)})
    shapes = {
        key.removeprefix(KEY_PREFIX).removesuffix(suffix): value.shape
        for key, value in own_names(state_dict).items()
        if key.endswith(suffix)
    }
    if not shapes:
        raise IA3Error(f"state_dict holds no vector: expected keys like '<module>{suffix}'")
    values = config.to_dict()
    values["target_modules"] = sorted(shapes)
    if values["feedforward_modules"] is None:
        values["feedforward_modules"] = sorted(
            name for name, shape in shapes.items() if len(shape) == 2 and shape[0] == 1
        )
    return IA3Config.from_dict(values)
