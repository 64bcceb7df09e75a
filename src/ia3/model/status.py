"""What adapters are doing on a model, layer by layer and as a whole, in PEFT's words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import nn

from ..core.quantized import method_of
from ..core.route import LOCK
from ..errors import StateError
from .adapters import Adapters

T = TypeVar("T")
Irregular = Literal["irregular"]


@dataclass
class TunerLayerStatus:
    """What is on one module.

    Attributes:
        name: of the module, in the model that was asked.
        module_type: the base module's class; `"ModulesToSaveWrapper"`, as in PEFT, where adapters
            have copies of it.
        enabled: adapters multiply.
        active_adapters: the model's active adapters, whether or not they have a vector here.
        merged_adapters: those that are in this module's weights.
        requires_grad: adapter name -> whether what it has here trains; `"irregular"` where a part
            of it does.
        available_adapters: those that have a vector or a copy here.
        devices: adapter name -> the kinds of devices that it is on.
        quantization_backend: `"bnb 4bit"`, `"bnb 8bit"`, `"torchao"` or `None`.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """What is on a model; `"irregular"` where its layers differ.

    Attributes:
        base_model_type: the base model's class.
        adapter_model_type: `"IA3Model"`, or `"None"` for adapters without a wrapper.
        peft_types: adapter name -> `"IA3"`; empty for adapters without a wrapper.
        trainable_params, total_params: the numbers of values.
        num_adapter_layers: how many modules have vectors or copies.
        enabled, active_adapters, merged_adapters, requires_grad, available_adapters, devices,
            quantization_backend: as of `TunerLayerStatus`.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None


def of_layers(adapters: Adapters, before: str = "") -> list[TunerLayerStatus]:
    """The layers' status; names begin with `before`. Raises `IA3Error` where there is none."""
    with LOCK:
        contents = adapters.contents()
        holding: dict[str, dict[str, list[nn.Parameter]]] = {
            name: {adapter: [vector] for adapter, vector in site.vectors.items()}
            for name, _, site in contents.sites
        } | {
            name: {adapter: list(copies[adapter].parameters()) for adapter in copies.adapters}
            for name, _, copies in contents.copies
        }
        # A site may be there for a bank alone.
        if not any(holding.values()):
            raise StateError(f"no adapter on this {type(adapters.model).__name__}: add one first")
        merged = {name: list(site.merged) for name, _, site in contents.sites}
        copied = {name for name, _, _ in contents.copies}
        return [
            TunerLayerStatus(
                name=f"{before}{name}",
                module_type="ModulesToSaveWrapper" if name in copied else type(module).__name__,
                enabled=adapters.enabled,
                active_adapters=list(adapters.active),
                merged_adapters=merged.get(name, []),
                requires_grad={a: _same(p.requires_grad for p in held) for a, held in here.items()},
                available_adapters=sorted(here),
                devices={a: sorted({p.device.type for p in held}) for a, held in here.items()},
                quantization_backend=method_of(module),
            )
            for name, module in contents.modules.items()
            if (here := holding.get(name))
        ]


def of_model(adapters: Adapters, wrapper: nn.Module | None = None) -> TunerModelStatus:
    """The model's status, with the wrapper around it if there is one; raises as `of_layers`."""
    with LOCK:
        layers = of_layers(adapters)
        trainable, total = value_counts(adapters.model)
        grads: defaultdict[str, list[bool | Irregular]] = defaultdict(list)
        devices: defaultdict[str, set[str]] = defaultdict(set)
        for layer in layers:
            for name, trains in layer.requires_grad.items():
                grads[name].append(trains)
                devices[name].update(layer.devices[name])
        kinds = {name: str(config.peft_type) for name, config in adapters.configs.items()}
        return TunerModelStatus(
            base_model_type=type(adapters.model).__name__,
            adapter_model_type="None" if wrapper is None else "IA3Model",
            peft_types={} if wrapper is None else kinds,
            trainable_params=trainable,
            total_params=total,
            num_adapter_layers=len(layers),
            enabled=adapters.enabled,
            active_adapters=list(adapters.active),
            merged_adapters=sorted(adapters.merge.adapters),
            requires_grad={name: _same(values) for name, values in grads.items()},
            available_adapters=sorted(grads),
            devices={name: sorted(where) for name, where in devices.items()},
            quantization_backend=_same(layer.quantization_backend for layer in layers),
        )


def _same(values: Iterable[T]) -> T | Irregular:
    """What all values are, or that they differ."""
    different = set(values)
    return different.pop() if len(different) == 1 else "irregular"


def value_counts(model: nn.Module) -> tuple[int, int]:
    """(values that require gradients, all values) of a model's parameters."""
    sizes = [(value_count(p), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


def value_count(parameter: nn.Parameter) -> int:
    """The number of values a parameter holds, whatever they are packed into."""
    # bitsandbytes packs two 4-bit values into a byte of storage.
    packed = type(parameter).__name__ == "Params4bit"
    return parameter.numel() * (2 * parameter.element_size() if packed else 1)
