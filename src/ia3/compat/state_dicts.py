"""PEFT's low-level functions: adapters on a model without a wrapper around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.files import check_finite
from ..adapter.layout import KEY_PREFIX
from ..core.inventory import contents
from ..core.names import ATTRIBUTE
from ..errors import IA3Error
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
        IA3Error: the config does not fit the model, which is then unchanged.
    """
    if state_dict is not None:
        peft_config = _config_for(peft_config, state_dict)
    handle = model.__dict__.get(HANDLE)
    if handle is None:
        # The names of a state dict are those of an adapter that was trained on them.
        make = IA3Model if state_dict is None else IA3Model._of_own_choice
        model.__dict__[HANDLE] = make(model, peft_config, adapter_name)
    else:
        if state_dict is None:
            handle.add_adapter(adapter_name, peft_config)
        else:
            handle._add(adapter_name, peft_config, None)
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
        unwrap_compiled, save_embedding_layers: no effect: a compiled model is always unwrapped,
            and embeddings are saved where `modules_to_save` names them.

    Returns:
        Key -> tensor, in the model's memory: vectors, float32, in their files' shapes, and the
        parameters of copies of modules (`modules_to_save`).

    Raises:
        IA3Error: the model has no such adapter.
    """
    base, prefix = _base_and_prefix(model)
    before = ""
    if state_dict is not None:
        compiled = any(name.startswith("_orig_mod.") for name in state_dict)
        before = "_orig_mod." * compiled + "model." * bool(prefix)
    values = base.state_dict() if state_dict is None else state_dict
    keys = _keys(base, adapter_name)
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
        `missing_keys` and `unexpected_keys`, as `load_state_dict` does.

    Raises:
        IA3Error: the model has no such adapter, a shape does not fit, or a vector is not finite;
            nothing is loaded then.
    """
    base, prefix = _base_and_prefix(model)
    keys = {key: name for name, key in _keys(base, adapter_name).items()}
    given = {key.removeprefix(KEY_PREFIX): value for key, value in peft_model_state_dict.items()}
    slots = base.state_dict(keep_vars=True)
    for key in sorted(given.keys() & keys.keys()):
        found, expected = given[key].shape, slots[keys[key]].shape
        if found != expected and not ignore_mismatched_sizes:
            raise IA3Error(f"{prefix}{key} is {list(found)}, expected {list(expected)}")
        if found != expected:
            del given[key]
    ending = f".{ATTRIBUTE}"
    loaded = sorted(key for key in given.keys() & keys.keys() if key.endswith(ending))
    check_finite({key.removesuffix(ending): given[key] for key in loaded})
    with torch.no_grad():
        for key in given.keys() & keys.keys():
            slots[keys[key]].copy_(given[key])
    return nn.modules.module._IncompatibleKeys(
        sorted(f"{prefix}{key}" for key in keys.keys() - given.keys()),
        sorted(f"{prefix}{key}" for key in given.keys() - keys.keys()),
    )


def _base_and_prefix(model: nn.Module) -> tuple[nn.Module, str]:
    """The base model, and what its adapters' keys begin with."""
    if isinstance(model, IA3Model):
        return model.model, KEY_PREFIX
    original = getattr(model, "_orig_mod", model)  # of a compiled model
    return (original.model, KEY_PREFIX) if isinstance(original, IA3Model) else (original, "")


def _keys(base: nn.Module, adapter_name: str) -> dict[str, str]:
    """Name in the base model's state dict -> key in the adapter's file."""
    on = contents(base)
    keys = {
        f"{name}.{ATTRIBUTE}.{adapter_name}": f"{name}.{ATTRIBUTE}"
        for name, _, site in on.sites
        if adapter_name in site
    } | {
        f"{name}.{ATTRIBUTE}.{adapter_name}.{key}": f"{name}.{key}"
        for name, _, copies in on.copies
        if adapter_name in copies
        for key in copies[adapter_name].state_dict()
    }
    if not keys:
        raise IA3Error(f"no adapter {adapter_name!r} on this {type(base).__name__}")
    return keys


def _config_for(config: IA3Config, state_dict: Mapping[str, Tensor]) -> IA3Config:
    """The config with the modules that a state dict has vectors for."""
    suffix = f".{ATTRIBUTE}"
    shapes = {
        key.removeprefix(KEY_PREFIX).removesuffix(suffix): value.shape
        for key, value in state_dict.items()
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
