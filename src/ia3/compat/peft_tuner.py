"""PEFT's tuner and layers for (IA)³, with this library's choice of modules, product and merge.

PEFT saves, switches and deletes adapters through wrappers around the base modules, so that modules
are wrapped here too. What concerns the whole model (which modules are chosen, what a merge changes)
is computed while the wrappers are out of it: see `_as_sites`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, reduce
from typing import Any

import torch
from peft.tuners import ia3 as stock

# Not peft.tuners.ia3.IA3Model: while this tuner is installed, that name stands for it.
from peft.tuners.ia3.model import IA3Model as StockModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..core import experts
from ..core.activations import Side, activation_of, device_of
from ..core.hooks import is_fresh
from ..core.merge import Merge
from ..core.names import ATTRIBUTE, Target, module_at, own_name
from ..core.rescale import rescale
from ..core.sites import Site, check_free
from ..core.spread import part_of
from ..errors import IA3Error, StateError
from ..targets.config import IA3Config
from ..targets.matching import rule
from ..targets.resolve import names_chosen, resolve

# What layers call the numbers of their inputs and outputs.
SIZES = (
    ("in_features", "out_features"),
    ("in_channels", "out_channels"),
    ("num_embeddings", "embedding_dim"),
    ("nx", "nf"),
)
# Held while a block of experts has vectors attached, which is for the length of a call.
ATTACHING = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=ATTACHING.acquire,
        after_in_parent=ATTACHING.release,
        after_in_child=ATTACHING.release,
    )


class Layer(nn.Module, stock.IA3Layer):
    """A base module whose output, input or experts' inner activation is multiplied by a vector.

    `ia3_l` holds a vector for each adapter, in PEFT's shapes (`Activation.shape`).
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: Any, is_feedforward: bool
    ) -> None:
        # Not PEFT's __init__, which refuses some of the modules that can be rescaled.
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.ia3_l = nn.ParameterDict({})
        self.merged_adapters: list[str] = []
        self.is_feedforward = is_feedforward
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self._alone: Merge | None = None
        self._unmerge_model: Callable[[], None] | None = None
        base: Any = self.get_base_layer()
        named = next((names for names in SIZES if hasattr(base, names[0])), None)
        if named is not None:
            self.in_features, self.out_features = (getattr(base, name) for name in named)
        inputs: Side = "inner" if activation_of(base, "inner") else "input"
        self.side = inputs if is_feedforward else "output"
        activation = activation_of(base, self.side)
        assert activation is not None  # the config was checked on the whole model
        self.activation = activation
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: Any, **kwargs: Any) -> None:
        """Add an adapter's vector: ones, or normal numbers without `init_ia3_weights`."""
        make = torch.ones if config.init_ia3_weights else torch.randn
        with torch.inference_mode(False):  # what is made in it could never train
            self.ia3_l[adapter_name] = nn.Parameter(make(self.activation.shape))
        self._move_adapter_to_device_of_base_layer(adapter_name, device_of(self.get_base_layer()))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base module's forward, with the active adapters."""
        vectors = [self.ia3_l[name] for name in self.active_adapters if name in self.ia3_l]
        if self.disable_adapters or self.merged or not vectors:
            if self.disable_adapters:
                self.unmerge()
            return self.base_layer(*args, **kwargs)
        product: Tensor = reduce(torch.mul, vectors).reshape(self.activation.factor_shape)
        if self.side == "output":
            output = self.base_layer(*args, **kwargs)
            return rescale(output, product, in_place=is_fresh(self.base_layer, own_hooks=0))
        if self.side == "input":
            # Never in place: siblings may read the same input, and a ReLU before it keeps it.
            return self.base_layer(rescale(args[0], product), *args[1:], **kwargs)
        with ATTACHING:
            handle = experts.attach(self.base_layer, lambda: product)
            try:
                return self.base_layer(*args, **kwargs)
            finally:
                handle.remove()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters (the active ones if not given) into this layer's weights alone.

        Raises:
            IA3Error: the model's adapters are merged, or these weights cannot take the vector: that
                of a quantized layer's input goes into another layer, see `IA3Model.merge_adapter`.
        """
        adapters = check_adapters_to_merge(self, adapter_names)
        if not adapters:
            return
        if self.merged and self._alone is None:
            raise StateError(
                "cannot merge one layer alone while the model's adapters are merged: "
                "unmerge_adapter() of the model first"
            )
        alone = nn.ModuleDict({"layer": self})
        merge = self._alone or Merge(alone)
        _make(merge, {"layer": (*self.merged_adapters, *adapters)}, safe_merge)
        self._alone = merge

    def unmerge(self) -> None:
        """Undo `merge`, bit for bit; where the model has merged, all its layers are unmerged."""
        if self._alone is not None:
            _undo(self._alone)
            self._alone = None
        elif self.merged and self._unmerge_model is not None:
            self._unmerge_model()


def _is_called(layer: nn.Module, args: Any) -> None:
    """A hook that does nothing: PyTorch's fast path reads weights, but not where hooks are."""


def _layers(model: nn.Module) -> list[tuple[str, Layer]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, Layer)]


@contextmanager
def _as_sites(
    model: nn.Module, chosen: Mapping[str, Collection[str]] | None = None
) -> Iterator[None]:
    """The base modules in their own places, with the wrappers' vectors on them as sites.

    So the rest of the library knows a model with adapters. The sites have no hooks. Of each layer
    only the `chosen` adapters are there, where given.
    """
    layers = _layers(model)
    for name, layer in layers:
        site = Site(Target(name, layer.side, layer.activation))
        for adapter, vector in layer.ia3_l.items():
            if chosen is None or adapter in chosen[name]:
                site.add(adapter, vector)
        site.merged = tuple(layer.merged_adapters)
        layer.base_layer.add_module(ATTRIBUTE, site)
        model.set_submodule(name, layer.base_layer)
    try:
        yield
    finally:
        for name, layer in layers:
            site = layer.base_layer._modules.pop(ATTRIBUTE)  # type: ignore[assignment]
            layer.merged_adapters = list(site.merged)
            model.set_submodule(name, layer)


def _make(merge: Merge, chosen: Mapping[str, Collection[str]], safe: bool) -> None:
    """Have just the chosen adapters of each layer merged: all or none; errors in PEFT's words."""
    for name, layer in _layers(merge.model):
        if isinstance(layer.base_layer, BaseTunerLayer):
            between = "another kind of adapter is between the vectors and the weights"
            raise IA3Error(f"cannot merge into {name!r}: {between}")
    adapters = tuple(dict.fromkeys(name for names in chosen.values() for name in names))
    try:
        with _as_sites(merge.model, chosen):
            merge.make(adapters, safe)
    except IA3Error as error:
        # PEFT has no such argument.
        message = str(error).removesuffix("; merge with dequantise=True")
        if "not finite" in message:
            what = "bias" if ".bias" in message else "weights"
            broken = f"The adapter {', '.join(adapters)} seems to be broken"
            message = f"NaNs detected in the merged {what}. {broken}: {message}"
        raise IA3Error(message) from error


def _undo(merge: Merge) -> None:
    with _as_sites(merge.model):
        merge.undo()


class IA3Model(StockModel):
    """PEFT's `IA3Model` with these layers; it checks all modules before it wraps the first."""

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:  # type: ignore[override]
        config = IA3Config.from_dict(peft_config.to_dict())
        with _as_sites(self.model):
            # With `frozen`, an entry may match nothing, as in PEFT.
            config, targets = resolve(self.model, config, frozen={})
            for target in targets:
                module = module_at(self.model, target.name)
                check_free(self.model, module, target)
                if part_of(self.model, module, target) is not None:
                    raise StateError(
                        f"{target.name!r} is spread over processes by tensor parallelism, whose "
                        "parts of an activation PEFT's layers do not know: ia3.get_peft_model does"
                    )
                if target.frozen:
                    raise IA3Error(
                        f"{target.name!r} holds queries beside keys and values, and PEFT cannot "
                        "leave a part of a module alone: name what to rescale in target_modules"
                    )
        for name in ("target_modules", "exclude_modules", "feedforward_modules", "fan_in_fan_out"):
            setattr(peft_config, name, getattr(config, name))
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        # PEFT's way with expressions may take forever where this library's took a moment.
        if isinstance(peft_config.target_modules, str) or isinstance(
            peft_config.exclude_modules, str
        ):
            return bool(names_chosen(peft_config, [own_name(key)]))
        return StockModel._check_target_module_exists(peft_config, own_name(key))

    @staticmethod
    def _check_target_module_feedforward(ia3_config: Any, key: str) -> bool:
        if isinstance(ia3_config.feedforward_modules, str):
            return rule("feedforward_modules", ia3_config.feedforward_modules)(own_name(key))
        return bool(StockModel._check_target_module_feedforward(ia3_config, own_name(key)))

    @staticmethod
    def _create_new_module(
        ia3_config: Any, adapter_name: str, target: Any, **options: Any
    ) -> Layer:
        return Layer(target, adapter_name, ia3_config, options["is_feedforward"])

    def _replace_module(self, parent: Any, child_name: str, new_module: Any, child: Any) -> None:
        # PEFT's moves vectors to the meta device where accelerate offloads weights.
        setattr(parent, child_name, new_module)
        if isinstance(parent, nn.TransformerEncoderLayer):
            new_module.register_forward_pre_hook(_is_called)

    @classmethod
    def _get_adapter_state_dict(  # type: ignore[override]
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: Any, **more: Any
    ) -> Any:
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, **more)
        # PEFT has taken out what has another adapter's name anywhere in its own, as in
        # "layers.0.mlp.down_proj" beside an adapter "mlp"; or nothing, if nothing was left.
        all_names = {  # FSDP's part of them is not in a state dict
            f"{name.replace('_fsdp_wrapped_module.', '')}.{ATTRIBUTE}.{adapter}": adapter
            for name, layer in _layers(model)
            for adapter in layer.ia3_l
        }
        names = [name for name, adapter in all_names.items() if adapter == adapter_name]
        values = state_dict if set(names) <= state_dict.keys() else model.state_dict()
        others = {key: value for key, value in found.items() if key not in all_names}
        return others | {name: values[name] for name in names}

    merged_adapters: tuple[str, ...] = ()
    merged = property(lambda self: bool(self.merged_adapters))

    @cached_property
    def _merge(self) -> Merge:
        return Merge(self.model)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Merge adapters (the active ones if not given) into the weights: all or none.

        Raises:
            IA3Error: the weights cannot take the vectors or, with `safe_merge`, would not be
                finite; the model is unchanged then.
        """
        layers = _layers(self.model)
        # By layer: transformers' `set_adapter`, and others', go to the layers alone.
        chosen = {
            name: (*layer.merged_adapters, *check_adapters_to_merge(layer, adapter_names))
            for name, layer in layers
        }
        alone = [layer for _, layer in layers if layer._alone is not None]
        again = [(layer, [*layer.merged_adapters]) for layer in alone]
        try:
            for layer in alone:
                layer.unmerge()
            _make(self._merge, chosen, safe_merge)
        except BaseException:
            for layer, adapters in again:
                layer.merge(adapter_names=adapters)
            raise
        for _, layer in layers:
            layer._unmerge_model = self.unmerge_adapter
        self.merged_adapters = tuple(dict.fromkeys(a for names in chosen.values() for a in names))

    def unmerge_adapter(self) -> None:
        """Put the original weights back, bit for bit."""
        _undo(self._merge)
        for _, layer in _layers(self.model):
            layer.unmerge()
        self.merged_adapters = ()

    def disable_adapter_layers(self) -> None:
        """Compute as the base model does; what is merged is unmerged."""
        self.unmerge_adapter()
        super().disable_adapter_layers()

    def _unload_and_optionally_merge(self, merge: bool = True, **options: Any) -> Any:  # type: ignore[override]
        if merge:
            self.merge_adapter(options.get("adapter_names"), options.get("safe_merge", False))
        for name, layer in _layers(self.model):
            self.model.set_submodule(name, layer.get_base_layer())
        # Not super(): PEFT's (IA)³ refuses to merge into quantized weights.
        return BaseTuner._unload_and_optionally_merge(self, merge, **options)
