"""PEFT's tuner and tuner layers, with this project's rescaling, merging and checks in them.

PEFT's machinery (saving, switching, deleting adapters, `modules_to_save`) works on wrappers around
the base modules, so that modules are wrapped here, as everywhere in PEFT.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from peft.tuners import ia3 as stock

# Not peft.tuners.ia3.IA3Model: while this tuner is installed, that name stands for it.
from peft.tuners.ia3.model import IA3Model as StockModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as DEFAULT_TARGETS
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core import experts, folding, quantized
from ..core import mlp as hoisting
from ..core.activations import SUPPORTED, Activation, Side, activation_of, device_of
from ..core.hooks import is_fresh
from ..core.rescale import rescale
from ..errors import IA3Error
from ..targets.config import feedforward_among, matches
from ..targets.structure import PaperTarget, feedforward_targets, names_or_suffixes, paper_targets

# Where a base module keeps what is folded into it, while something is.
FOLDED = "_ia3_folded"

BNB_LAYERS = ("Linear8bitLt", "Linear4bit")

# A `peft.IA3Config`. PEFT annotates its sets of names as lists.
Config = Any


class Layer(nn.Module, stock.IA3Layer):
    """A base module whose activation is rescaled by the active adapters' vectors.

    Vectors are in `ia3_l`, by adapter name, in PEFT's shapes (`Activation.shape`).

    Args:
        base_layer: the module, or another tuner's layer around it.
        adapter_name: the first adapter.
        config: that adapter's `peft.IA3Config`.
        is_feedforward: the input is rescaled, not the output.
        name: the module's name in its model, for messages.

    Raises:
        IA3Error: the module has no such activation.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: Config,
        is_feedforward: bool = False,
        name: str = "",
        **kwargs: Any,
    ) -> None:
        # Not PEFT's __init__, which refuses some of the modules that can be rescaled.
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.name = name
        self.ia3_l = nn.ParameterDict({})
        self.merged_adapters: list[str] = []
        self.is_feedforward = is_feedforward
        self._disable_adapters = False
        self._active_adapter = adapter_name
        base = self.get_base_layer()
        self.side, activation = checked_activation(base, is_feedforward, name)
        self.vector_shape = activation.shape
        self.factor_shape = activation.factor_shape
        self.fan_in_fan_out = isinstance(base, Conv1D)
        for side, attribute in (("input", "in_features"), ("output", "out_features")):
            dim = activation_of(base, side)  # type: ignore[arg-type]
            if dim is not None:
                setattr(self, attribute, dim.dim)
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: Config, **kwargs: Any) -> None:
        """Add an adapter's vector: ones, or normal numbers without `init_ia3_weights`."""
        make = torch.ones if config.init_ia3_weights else torch.randn
        self.ia3_l[adapter_name] = nn.Parameter(make(self.vector_shape))
        self._move_adapter_to_device_of_base_layer(adapter_name, device_of(self.get_base_layer()))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def product(self, adapters: list[str]) -> Tensor:
        """The product of these adapters' vectors, shaped to multiply the activation."""
        product: Tensor = self.ia3_l[adapters[0]]
        for name in adapters[1:]:
            product = product * self.ia3_l[name]
        return product.reshape(self.factor_shape)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base module's forward, with the active adapters."""
        applied = [name for name in self.active_adapters if name in self.ia3_l]
        if self.disable_adapters or self.merged or not applied:
            return self.base_layer(*args, **kwargs)
        product = self.product(applied)
        if self.side == "output":
            output = self.base_layer(*args, **kwargs)
            return rescale(output, product, in_place=is_fresh(self.base_layer, own_hooks=0))
        if self.side == "input":
            # Never in place: siblings may read the same input, and a ReLU before it keeps it.
            return self.base_layer(rescale(args[0], product), *args[1:], **kwargs)
        handle = experts.attach(self.base_layer, lambda: product)
        try:
            return self.base_layer(*args, **kwargs)
        finally:
            handle.remove()

    def enable_adapters(self, enabled: bool) -> None:
        """Turn the adapters on or off; turned off, they are unmerged at once."""
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    # -- merging ----------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the base weights: computed in float32 or wider, rounded once.

        Args:
            safe_merge: refuse a result that is not finite.
            adapter_names: the active adapters if not given.

        Raises:
            IA3Error: the weights cannot take the vectors; nothing is changed then.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.ia3_l]
        if names:
            self.set_merged([*self.merged_adapters, *names], safe_merge)

    def unmerge(self) -> None:
        """Put the original weights back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.set_merged([])

    def set_merged(self, adapters: list[str], safe_merge: bool = False) -> None:
        """Have exactly these adapters folded into the original weights.

        Raises:
            IA3Error: as `merge`.
        """
        if isinstance(self.base_layer, BaseTunerLayer):
            raise IA3Error(
                f"cannot merge into {self.name!r}: another kind of adapter is between the vectors "
                "and the weights, which would not be rescaled with them"
            )
        owner, side = self.__dict__.get("hoisted_to"), self.side
        source = "own" if owner is None else "hoisted"
        if owner is None:
            owner = self.base_layer
        else:
            side = "output"
        scale = None
        if adapters:
            scale = self.product(adapters).detach()
            scale = scale if side == "inner" else scale.flatten()
        try:
            fold_into(owner, source, side, scale, safe_merge)
        except IA3Error as error:
            raise IA3Error(f"{self.name}: {error}") from error
        except NotFiniteError as error:
            # PEFT's words, which its users may look for.
            raise IA3Error(
                f"NaNs detected in the merged {error}. The adapter {', '.join(adapters)} seems to "
                f"be broken: {self.name!r} would not be finite; its weights are unchanged"
            ) from error
        self.merged_adapters = list(adapters)


class Linear(Layer, stock.Linear):
    """A linear layer or transformers' `Conv1D`."""


class Conv2d(Layer, stock.Conv2d):
    """A convolution over two axes."""


class Conv3d(Layer, stock.Conv3d):
    """A convolution over three axes."""


@cache
def _bnb_layer(name: str) -> type[Layer]:
    return type(name, (Layer, getattr(stock, name)), {"__module__": __name__})


def __getattr__(name: str) -> type[Layer]:
    # As in peft.tuners.ia3: bitsandbytes is imported by those who have such layers. Pickles of
    # these classes are read through this name too.
    if name in BNB_LAYERS:
        return _bnb_layer(name)
    raise AttributeError(f"module {__name__} has no attribute {name}")


def layer_class(base: nn.Module) -> type[Layer]:
    """The class for a base module, a subclass of the one PEFT uses for it, if it has one."""
    name = type(base).__name__
    if name in BNB_LAYERS and type(base).__module__.startswith("bitsandbytes."):
        return _bnb_layer(name)
    kinds = ((nn.Linear | Conv1D, Linear), (nn.Conv2d, Conv2d), (nn.Conv3d, Conv3d))
    return next((layer for kind, layer in kinds if isinstance(base, kind)), Layer)


def checked_activation(base: nn.Module, is_feedforward: bool, name: str) -> tuple[Side, Activation]:
    """Which side of a module is rescaled, and its activation there.

    Raises:
        IA3Error: there is none.
    """
    side: Side = "output"
    if is_feedforward:
        side = "inner" if activation_of(base, "inner") else "input"
    activation = activation_of(base, side)
    if activation is None:
        raise IA3Error(
            f"Target module {name!r} is a {type(base).__name__}, whose {side} cannot be rescaled: "
            f"expected {SUPPORTED}; name it in exclude_modules"
        )
    return side, activation


# -- what is folded into a base module -------------------------------------------------------------


class NotFiniteError(Exception):
    """A merge would give values that are not finite: in the bias, or in the weights."""


@dataclass
class Folded:
    """The vectors folded into a module, by where they come from, and what was there before.

    A module's own vectors are one source; those on the input of a quantized layer after it, which
    went into its rows instead, are another.
    """

    scales: dict[str, tuple[Side, Tensor]] = field(default_factory=dict)
    originals: dict[str, Any] = field(default_factory=dict)


def fold_into(
    module: nn.Module, source: str, side: Side, scale: Tensor | None, safe_merge: bool
) -> None:
    """Replace what one source has folded into a module; `None` takes it out.

    Raises:
        IA3Error: the weights cannot take the vector; the module is as it was then.
        NotFiniteError: with `safe_merge`; likewise.
    """
    folded = module.__dict__.get(FOLDED, Folded())
    scales = {key: value for key, value in folded.scales.items() if key != source}
    if scale is not None:
        scales[source] = (side, scale)
    by_side: dict[Side, Tensor] = {}
    for at, factor in scales.values():
        by_side[at] = by_side[at] * factor if at in by_side else factor
    if "input" in by_side and quantized.is_quantized(module):
        raise IA3Error(
            "a vector on the input of a quantized layer scales its columns, which share constants; "
            "the tuner's merge_adapter looks for a layer before it that can take the vector"
        )
    before = {slot: folding.read(module, slot) for slot in folded.originals}
    _write(module, folded.originals)
    if not by_side:
        module.__dict__.pop(FOLDED, None)
        return
    try:
        changes = folding.fold(module, "base_layer", by_side)
        if safe_merge:
            _check_finite(changes)
    except (IA3Error, NotFiniteError):
        _write(module, before)
        raise
    originals = {change.slot: folding.read(module, change.slot) for change in changes}
    _write(module, {change.slot: change.value for change in changes})
    module.__dict__[FOLDED] = Folded(scales, originals)


def _write(module: nn.Module, values: dict[str, Any]) -> None:
    for slot, value in values.items():
        folding.write(module, slot, value)


def _check_finite(changes: list[folding.Change]) -> None:
    for change in changes:
        if not folding.is_finite(change.value):
            raise NotFiniteError("bias" if change.slot == "bias" else "weights")


# -- the tuner -------------------------------------------------------------------------------------


class IA3Model(StockModel):
    """PEFT's `IA3Model`, whose layers are `Layer`s.

    Raises:
        IA3Error: a module cannot be rescaled; no module is wrapped then.
    """

    def _prepare_adapter_config(  # type: ignore[override]
        self, peft_config: Config, model_config: dict[str, Any]
    ) -> Config:
        by_default = peft_config.target_modules is None
        if by_default and model_config.get("model_type") not in DEFAULT_TARGETS:
            self._choose_by_structure(peft_config)
        feedforward_by_default = peft_config.feedforward_modules is None
        peft_config = super()._prepare_adapter_config(peft_config, model_config)  # type: ignore[no-untyped-call]
        if by_default:
            self._replace_stale(peft_config, model_config["model_type"])
        if feedforward_by_default and isinstance(peft_config.target_modules, set):
            # PEFT writes its default whatever the targets, and then refuses to read it.
            targets, feedforward = feedforward_among(
                peft_config.target_modules, peft_config.feedforward_modules
            )
            peft_config.target_modules = set(targets)
            peft_config.feedforward_modules = set(feedforward)
        return peft_config

    def _choose_by_structure(self, peft_config: Config) -> None:
        """The paper's sites for an architecture that PEFT does not know."""
        try:
            found = paper_targets(self.model)
        except IA3Error as error:
            raise IA3Error(f"Please specify `target_modules` in `peft_config`: {error}") from error
        fused = next((site.name for site in found if site.frozen), None)
        if fused is not None:
            raise IA3Error(
                f"Please specify `target_modules` in `peft_config`: {fused!r} holds queries beside "
                "keys and values, and PEFT cannot leave a part of a module alone"
            )
        peft_config.target_modules = set(self._entries(found))
        peft_config.feedforward_modules = set(
            self._entries([site for site in found if site.side != "output"])
        )

    def _replace_stale(self, peft_config: Config, model_type: str) -> None:
        """What stands in for a feed-forward default that matches nothing in this transformers."""
        names = [name for name, _ in self.model.named_modules()]
        stale = {
            entry
            for entry in peft_config.target_modules
            if entry in peft_config.feedforward_modules
            and not any(matches(name, [entry]) for name in names)
        }
        if not stale:
            return
        found = feedforward_targets(self.model)
        entries = self._entries(found)
        warnings.warn(
            f"PEFT's default {sorted(stale)} for {model_type!r} matches nothing in "
            f"{type(self.model).__name__}; {entries} ({found[0].why}) is rescaled instead",
            stacklevel=2,
        )
        peft_config.target_modules = (peft_config.target_modules - stale) | set(entries)
        peft_config.feedforward_modules = (peft_config.feedforward_modules - stale) | set(entries)

    def _entries(self, sites: list[PaperTarget]) -> list[str]:
        """The sites as a config names them, wrapped by another adapter or not."""
        return names_or_suffixes(
            self.model, [site.name.removesuffix(".base_layer") for site in sites]
        )

    def _prepare_model(self, peft_config: Config, model: nn.Module) -> None:
        # All modules are checked before the first is wrapped.
        wrapped: tuple[str, ...] = ()
        for name, module in model.named_modules():
            if not name or name.startswith(wrapped):
                continue
            if isinstance(module, BaseTunerLayer):
                wrapped = (*wrapped, f"{name}.")
            if self._check_target_module_exists(peft_config, name):
                self._check_target(peft_config, name, module)

    def _check_target(self, peft_config: Config, name: str, module: nn.Module) -> None:
        is_feedforward = self._check_target_module_feedforward(peft_config, name)
        if not isinstance(module, stock.IA3Layer):
            base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            checked_activation(base, is_feedforward, name)
        elif module.is_feedforward != is_feedforward:
            sides = ("input", "output") if is_feedforward else ("output", "input")
            raise IA3Error(
                f"module {name!r}: this adapter rescales its {sides[0]}, another one on this model "
                f"its {sides[1]}; adapters of one model must agree on feedforward_modules"
            )

    def _create_and_replace(  # type: ignore[override]
        self,
        ia3_config: Config,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        # Again, as modules may have come from a state dict instead of the config.
        self._check_target(ia3_config, current_key, target)
        if isinstance(target, stock.IA3Layer):
            target.update_layer(adapter_name, config=ia3_config)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        ia3_config.fan_in_fan_out = isinstance(base, Conv1D)
        is_feedforward = self._check_target_module_feedforward(ia3_config, current_key)
        layer = layer_class(base)(target, adapter_name, ia3_config, is_feedforward, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # PEFT's moves the vectors to where the weight is: the meta device under accelerate's
        # offloading. It also copies the weight onto an unloaded module, which has it already, or,
        # if it holds experts, has none.
        setattr(parent, child_name, new_module)

    # -- merging ----------------------------------------------------------------------------------

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Fold adapters into the base weights, all of them or, where one cannot be, none.

        Args:
            adapter_names: the active adapters if not given.
            safe_merge: refuse a result that is not finite.

        Raises:
            IA3Error: the weights cannot take the vectors; the model is unchanged then.
        """
        layers = [
            (name, layer)
            for name, layer in self._layers()
            if set(layer.active_adapters if adapter_names is None else adapter_names)
            & set(layer.ia3_l)
        ]
        self._hoist(layers)
        self._check_not_shared(layers)
        self._check_merge_allowed()  # type: ignore[no-untyped-call]
        before = [(layer, list(layer.merged_adapters)) for _, layer in layers]
        try:
            # Not PEFT's loop: it and `folding` each have their way with offloaded weights.
            for _, layer in layers:
                layer.merge(safe_merge, adapter_names)
        except Exception:
            for layer, merged in before:
                if layer.merged_adapters != merged:
                    layer.set_merged(merged)
            raise

    def unmerge_adapter(self) -> None:
        """Put the original weights back, bit for bit."""
        merged = [layer for _, layer in self._layers() if layer.merged]
        if not merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        for layer in merged:
            layer.unmerge()

    def _unload_and_optionally_merge(  # type: ignore[override]
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self.merge_adapter(adapter_names, safe_merge)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="All adapters are already merged")
            # Not super(): PEFT's (IA)³ refuses to merge into quantized weights.
            BaseTuner._unload_and_optionally_merge(
                self, merge, progressbar, safe_merge, adapter_names
            )
        model: nn.Module = self.model
        for module in model.modules():
            module.__dict__.pop(FOLDED, None)
        return model

    def _layers(self) -> Iterator[tuple[str, Layer]]:
        for name, module in self.model.named_modules():
            if isinstance(module, Layer):
                yield name, module

    def _hoist(self, layers: list[tuple[str, Layer]]) -> None:
        """Find the layer whose rows can take what the columns of a quantized one cannot."""
        for name, layer in layers:
            if layer.side != "input" or layer.merged:
                continue
            if not quantized.is_quantized(layer.get_base_layer()):
                continue
            before = hoisting.up_projection(self.model, name)
            if before is None:
                raise IA3Error(
                    f"cannot merge into {name!r}: a vector on the input of a quantized layer "
                    "scales its columns, which share constants, and no layer before it can take "
                    "the vector instead; merge into the model loaded without quantization"
                )
            owner = self.model.get_submodule(before)
            # In __dict__, so that it is no submodule.
            layer.__dict__["hoisted_to"] = (
                owner.get_base_layer() if isinstance(owner, BaseTunerLayer) else owner
            )

    def _check_not_shared(self, layers: list[tuple[str, Layer]]) -> None:
        """Raise `IA3Error` where a merge would change another module with it."""
        holders: dict[int, list[str]] = {}
        for name, module in self.model.named_modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    holders.setdefault(id(parameter), []).append(name)
        for name, layer in layers:
            for parameter in layer.get_base_layer()._parameters.values():
                names = holders.get(id(parameter), [])
                others = [other for other in names if not other.startswith(f"{name}.")]
                if others:
                    raise IA3Error(
                        f"cannot merge into {name!r}: {others[0]!r} shares its weights and would "
                        "change too"
                    )
