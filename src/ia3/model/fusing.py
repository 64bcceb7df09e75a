"""Gated feed-forward layers that compute their inner activation in one operation.

down(act(gate(x)) ⊙ up(x)) is the same with `gated_product` between the layers, which keeps less for
the backward pass. It rounds differently, so that it is put on only where it is asked for.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import Tensor, nn

from ..core.activations import linear_features
from ..core.names import ATTRIBUTE
from ..core.patch import SLOTS, give_back, own_forward, slot_for
from ..core.rescale import rescale
from ..core.saved_modules import HOOKS, saved_module_of
from ..core.sites import Site, site_of
from ..errors import IA3Error
from ..targets.structure import feedforward_targets
from .gated import FUNCTIONS, GateActivation, gated_product

# What a layer is tried out on: rows of values about as large as these.
SIZES = (1.0, 5.0, 30.0)


@dataclass(frozen=True, slots=True)
class GatedLayer:
    """What a gated feed-forward layer computes: down(dropout(act(gate(x)) ⊙ up(x))).

    Attributes:
        gate, up, down: the names of its linear layers.
        function: what its activation computes.
        activation: the name of the module that does; `None` where it is a function of its forward.
        dropout: the name of its dropout, if it has one.
        casts: the product is cast to the dtype of the down projection's weight.
    """

    gate: str
    up: str
    down: str
    function: GateActivation
    activation: str | None
    dropout: str | None
    casts: bool


def fuse(model: nn.Module) -> list[str]:
    """Fuse the gated feed-forward layers of a model.

    Returns:
        The names of all that are fused now, in the model's order.

    Raises:
        IA3Error: there is none, or none that computes what `GatedLayer` says and nothing else.
    """
    names = []
    for name, module in model.named_modules():
        if ATTRIBUTE in name.split("."):
            continue
        if not is_fused(module):
            layer = gated_layer(module)
            if isinstance(layer, str):
                continue
            module.__dict__[slot_for(module)] = update_wrapper(
                partial(_forward, module, layer), own_forward(module)
            )
        names.append(name)
    if not names:
        raise IA3Error(f"no feed-forward layer can be fused: {_why_none(model)}")
    return names


def unfuse(model: nn.Module) -> None:
    """Give the fused layers of a model their own forward back."""
    for module in model.modules():
        slot = _fused_slot(module)
        if slot is not None:
            give_back(module, slot)
        if isinstance(module, Site):
            module.in_block = False


def is_fused(module: nn.Module) -> bool:
    """Whether a module is a fused layer."""
    return _fused_slot(module) is not None


def site_in(module: nn.Module) -> Site | None:
    """The site on a fused layer's inner activation, if it has one."""
    slot = _fused_slot(module)
    if slot is None:
        return None
    layer: GatedLayer = module.__dict__[slot].args[1]
    return _inner_site(module.get_submodule(layer.down))


def gated_layer(module: nn.Module) -> GatedLayer | str:
    """What a module computes, if that is a gated feed-forward layer; else why it is none.

    Proven, not read off names: the module's own forward is run on a copy of it whose linear layers
    give random values, in and out of training. No weight is read, so that quantized layers and the
    meta device are no obstacle, no hook is run, and nothing is changed.
    """
    children = {name: child for name, child in module.named_children() if name != ATTRIBUTE}
    linear = {name: size for name, child in children.items() if (size := linear_features(child))}
    if len(linear) != 3:
        return f"it has {len(linear)} linear layers, expected a gate, an up and a down projection"
    if saved_module_of(module) is not None:
        return "an adapter has a copy of it (modules_to_save)"
    if module._parameters or module._buffers:
        return "it has parameters or buffers of its own"
    inside = [name for name in children if name not in linear]
    dropouts = [name for name in inside if isinstance(children[name], nn.Dropout)]
    activations = [name for name in inside if name not in dropouts]
    if len(dropouts) > 1 or len(activations) > 1:
        return (
            f"beside linear layers it has {inside}, expected an activation, and a dropout at most"
        )
    functions = list(FUNCTIONS)
    for name in activations:
        functions = [function for function in FUNCTIONS if _computes(children[name], function)]
        if not functions:
            return f"its {name!r} ({type(children[name]).__name__}) is none of {list(FUNCTIONS)}"
    if not _has_own_forward(module):
        return "its forward has been replaced"
    if len(inspect.signature(type(module).forward).parameters) != 2:
        return "its forward takes more than one tensor"
    found = {
        _try_out(module, linear, functions, dtype, training)
        for dtype in (torch.float64, torch.float32)
        for training in (False, True)
    }
    roles = {tried.roles if tried else None for tried in found}
    proven = roles.pop()
    if roles or proven is None:
        return "it computes something else than down(act(gate(x)) ⊙ up(x))"
    return GatedLayer(
        *proven,
        activation=next(iter(activations), None),
        dropout=next(iter(dropouts), None),
        # One of the two dtypes is not the weight's.
        casts=any(tried.casts for tried in found if tried),
    )


# -- trying out ------------------------------------------------------------------------------------


class _StandIn(nn.Module):
    """Gives the same values whatever its input, and keeps that; else it looks like the layer."""

    def __init__(self, layer: nn.Module, values: Tensor) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []
        # Not as submodules or parameters.
        self.__dict__.update(layer=layer, values=values)

    def forward(self, activation: Tensor) -> Tensor:
        self.inputs.append(activation)
        values: Tensor = self.__dict__["values"]
        return values

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)


class _Activation(nn.Module):
    """The layer's activation, without its hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["module"] = module

    def forward(self, activation: Tensor) -> Tensor:
        module: nn.Module = self.__dict__["module"]
        result: Tensor = module.forward(activation)
        return result


class _Dropout(nn.Module):
    """A dropout that drops the same values every time."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.__dict__["mask"] = mask

    def forward(self, activation: Tensor) -> Tensor:
        mask: Tensor = self.__dict__["mask"]
        return activation * mask


@dataclass(frozen=True)
class _Tried:
    """What a layer was seen to compute.

    Attributes:
        roles: gate, up, down and function of `GatedLayer`.
        casts: as there.
    """

    roles: tuple[str, str, str, GateActivation]
    casts: bool


def _try_out(
    module: nn.Module,
    linear: dict[str, tuple[int, int]],
    functions: list[GateActivation],
    dtype: torch.dtype,
    training: bool,
) -> _Tried | None:
    """What the layer computes with stand-ins of this dtype; `None` for anything else."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor(SIZES, dtype=torch.float64)[:, None]

    def values(features: int) -> Tensor:
        drawn = torch.randn(1, len(SIZES), features, generator=generator, dtype=torch.float64)
        return (drawn * sizes).to(dtype)

    stand_ins = {
        name: _StandIn(module.get_submodule(name), values(out)) for name, (_, out) in linear.items()
    }
    given = values(next(iter(linear.values()))[0])
    dropped = None
    parts: dict[str, nn.Module] = dict(stand_ins)
    for name, child in module.named_children():
        if isinstance(child, nn.Dropout):
            # The width that gate and up have in common.
            widths = [out for _, out in linear.values()]
            width = max(widths, key=widths.count)
            dropped = torch.rand(width, generator=generator, dtype=torch.float64).to(dtype)
            parts[name] = _Dropout(dropped)
        elif name not in parts:
            parts[name] = _Activation(child)
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__.update(_modules=parts, training=training)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            output = type(module).forward(twin, given)
    except Exception:
        # Somebody else's forward: whatever it cannot do with such values, nothing is proven.
        return None
    downs = [name for name, part in stand_ins.items() if part.values is output]
    if len(downs) != 1 or any(len(part.inputs) != 1 for part in stand_ins.values()):
        return None
    (down,) = downs
    beside = [name for name in linear if name != down]
    if not all(_same(stand_ins[name].inputs[0], given) for name in beside):
        return None
    (product,) = stand_ins[down].inputs
    casts = product.dtype != dtype
    if not product.is_floating_point() or (
        casts and product.dtype != module.get_submodule(down).weight.dtype
    ):
        return None
    found = []
    for gate, up in (beside, beside[::-1]):
        gates, ups = stand_ins[gate].values, stand_ins[up].values
        if gates.shape != product.shape or ups.shape != product.shape:
            return None
        for function in functions:
            expected = FUNCTIONS[function].value(gates) * ups
            if dropped is not None:
                expected = expected * dropped
            # Activations are no larger than their gate.
            scale = (gates * ups).abs().double()
            tolerance = max(8 * torch.finfo(product.dtype).eps, 1e-9)
            if bool(((product.double() - expected.double()).abs() <= tolerance * scale).all()):
                found.append(_Tried((gate, up, down, function), casts))
    return found[0] if len(found) == 1 else None


def _same(actual: Tensor, expected: Tensor) -> bool:
    return actual.dtype == expected.dtype and torch.equal(actual, expected)


def _computes(activation: nn.Module, function: GateActivation) -> bool:
    """Whether a module is this function, found by trying."""
    if [*activation.parameters(), *activation.buffers()]:
        return False  # the function may change
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(len(SIZES), 500, generator=generator, dtype=torch.float64)
    values = values * torch.tensor(SIZES, dtype=torch.float64)[:, None]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            found = activation.forward(values.clone())
    except Exception:
        return False
    if not isinstance(found, Tensor) or found.shape != values.shape:
        return False
    expected = FUNCTIONS[function].value(values)
    return bool(((found - expected).abs() <= 1e-9 * values.abs()).all())


def _why_none(model: nn.Module) -> str:
    """What is in the way of fusing the model's first feed-forward layer."""
    first = feedforward_targets(model)[0].name
    name = first.rpartition(".")[0]
    module = model.get_submodule(name)
    return f"{name!r} ({type(module).__name__}): {gated_layer(module)}"


# -- the fused forward -----------------------------------------------------------------------------


def _forward(module: nn.Module, layer: GatedLayer, *args: Any, **kwargs: Any) -> Tensor:
    (values,) = (*args, *kwargs.values())
    parts = module._modules
    down: Any = parts[layer.down]
    gate, up = parts[layer.gate](values), parts[layer.up](values)  # type: ignore[misc]
    site = _inner_site(down)
    vector = factor = None
    if site is not None and site.in_block:
        if site.is_routed():
            factor = site.factor(up)
        else:
            vector = site.active_product()
    activation = parts.get(layer.activation or "")
    if activation is not None and _is_watched(activation):
        product = activation(gate) * up
        product = product if vector is None else rescale(product, vector)
    else:
        product = gated_product(gate, up, vector, layer.function)
    if factor is not None:
        product = rescale(product, factor, keep_result=True)
    if layer.dropout is not None:
        product = parts[layer.dropout](product)  # type: ignore[misc]
    if layer.casts and down.weight.is_floating_point():
        product = product.to(down.weight.dtype)
    result: Tensor = down(product)
    return result


def _is_watched(activation: nn.Module) -> bool:
    """Whether somebody wants to see, or change, what the activation computes."""
    attributes = activation.__dict__
    return "forward" in attributes or any(map(attributes.get, HOOKS))


def _inner_site(down: nn.Module) -> Site | None:
    site = site_of(down)
    return site if site is not None and site.side == "input" else None


def _has_own_forward(module: nn.Module) -> bool:
    # accelerate puts its own in the way and keeps the one before.
    hooked = "_old_forward" in module.__dict__ and hasattr(module, "_hf_hook")
    forward = module.__dict__.get("_old_forward" if hooked else "forward")
    return forward is None or getattr(forward, "__func__", None) is type(module).forward


def _fused_slot(module: nn.Module) -> str | None:
    """The attribute that the fused forward is in."""
    for slot in SLOTS:
        forward = module.__dict__.get(slot)
        if isinstance(forward, partial) and forward.func is _forward:
            return slot
    return None
