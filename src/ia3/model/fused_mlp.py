"""Gated MLPs that keep less for the backward pass.

Written out, down(act(gate(x)) ⊙ up(x) ⊙ vector) keeps gate, act(gate), up and the products. A fused
MLP computes the product before the down projection in one operation, which keeps gate, up and the
vector alone and computes act(gate) again in the backward pass: a third less than the frozen model
keeps. It rounds differently, so that it is used only where it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.activations import linear_features
from ..core.mlp import FUNCTIONS, Mlp, read_mlp
from ..core.names import ATTRIBUTE, modules_of
from ..core.patch import patch, patched
from ..core.rescale import is_traced, rescale
from ..core.saved_modules import HOOKS, saved_module_of
from ..core.sites import Site, site_of
from ..errors import IA3Error
from ..targets.structure import feedforward_targets

# -- putting it on ---------------------------------------------------------------------------------


def fuse(model: nn.Module) -> list[str]:
    """Fuse the gated MLPs of a model, whose sites are then to be marked; all that are fused now."""
    modules = modules_of(model)
    for name, module in modules.items():
        if ATTRIBUTE not in name.split(".") and not is_fused(module):
            found = gated_mlp(module)
            if isinstance(found, Mlp):
                patch(module, FusedForward(module, found))
    names = [name for name, module in modules.items() if is_fused(module)]
    if not names:
        first = feedforward_targets(model)[0].name.rpartition(".")[0]
        module = modules[first]
        raise IA3Error(
            f"no feed-forward layer can be fused: {first!r} ({type(module).__name__}): "
            f"{gated_mlp(module)}"
        )
    return names


def unfuse(model: nn.Module) -> None:
    """Give the fused MLPs of a model their own forward again."""
    for module in model.modules():
        if fused := patched(module, FusedForward):
            fused.remove()
        if isinstance(module, Site):
            module.in_block = False


def is_fused(module: nn.Module) -> bool:
    return patched(module, FusedForward) is not None


def mark_sites(sites: Iterable[Site], modules: Iterable[nn.Module]) -> None:
    """Tell each site whether one of these fused MLPs multiplies by its vectors."""
    forwards: list[Any] = [p.forward for m in modules if (p := patched(m, FusedForward))]
    inside = {id(forward.site()) for forward in forwards}
    for site in sites:
        site.in_block = id(site) in inside


def gated_mlp(module: nn.Module) -> Mlp | str:
    """What a module computes, if it is an MLP that can be fused; else why it cannot."""
    children = ((name, child) for name, child in module.named_children() if name != ATTRIBUTE)
    linear = {name: size for name, child in children if (size := linear_features(child))}
    if len(linear) != 3:
        return f"it has {len(linear)} linear layers, expected a gate, an up and a down projection"
    if saved_module_of(module) is not None:
        return "an adapter has a copy of it (modules_to_save)"
    why = (
        f"it computes something else than down(act(gate(x)) ⊙ up(x)), act one of {list(FUNCTIONS)}"
    )
    for down, (inner, _) in linear.items():
        if all(out == inner for name, (_, out) in linear.items() if name != down):
            found = read_mlp(module, down)
            if isinstance(found, str):
                why = found
            elif found.gate is not None:
                return found
    return why


# -- the forward -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FusedForward:
    """A fused MLP's forward: what `mlp` says, with the vectors on the down projection's input."""

    module: nn.Module
    mlp: Mlp

    def site(self) -> Site | None:
        site = site_of(self.module.get_submodule(self.mlp.down))
        return site if site is not None and site.side == "input" else None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The forward of the module's class: its argument may be named."""
        (values,) = (*args, *kwargs.values())
        mlp = self.mlp
        parts: Any = self.module._modules
        assert mlp.function is not None
        down, gate, up = parts[mlp.down], parts[mlp.gate](values), parts[mlp.up](values)
        site = self.site()
        factor = None if site is None or not site.in_block else site.factor(up)
        activation = parts.get(mlp.activation)
        # Hooks or another forward on the activation see, or change, what it computes.
        own = {} if activation is None else activation.__dict__
        if activation is not None and ("forward" in own or any(map(own.get, HOOKS))):
            product = activation(gate) * up
        elif factor is not None and factor.dim() == 1:
            product, factor = gated_product(gate, up, factor, mlp.function), None
        else:
            product = gated_product(gate, up, None, mlp.function)
        if factor is not None:
            product = rescale(product, factor, keep_result=True)
        if mlp.dropout is not None:
            product = parts[mlp.dropout](product)
        if mlp.casts and down.weight.is_floating_point():
            product = product.to(down.weight.dtype)
        return down(product)  # type: ignore[no-any-return]


# -- the operation ---------------------------------------------------------------------------------

_ATEN = torch.ops.aten


# (gradient, gate) -> the gradient times the function's derivative.
BACKWARD: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": _ATEN.silu_backward,
    "gelu": _ATEN.gelu_backward,
    "gelu_tanh": lambda grad, gate: _ATEN.gelu_backward(grad, gate, approximate="tanh"),
    "relu": lambda grad, gate: _ATEN.threshold_backward(grad, gate, 0),
}


def gated_product(gate: Tensor, up: Tensor, vector: Tensor | None, function: str) -> Tensor:
    """function(gate) ⊙ up ⊙ vector, which keeps these three alone for the backward pass.

    Half precision is computed in float32 and rounded once, where separate operations round after
    each. Nothing is divided by the vector, so that its zeros are no special case. The vector,
    `[dim]`, may be of a wider dtype than the result, `[..., dim]` in what gate and up promote to.
    """
    # Else the formula keeps no more. A compiler chooses itself what to keep.
    if (
        torch.is_grad_enabled()
        and (gate.requires_grad or up.requires_grad)
        and not gate.is_nested
        and not is_traced()
    ):
        return _GatedProduct.apply(gate, up, vector, function)  # type: ignore[no-any-return, no-untyped-call]
    return _formula(gate, up, vector, function)


def _formula(gate: Tensor, up: Tensor, vector: Tensor | None, function: str) -> Tensor:
    product = FUNCTIONS[function](_wide(gate)) * _wide(up)
    product = product if vector is None else product * vector
    return product.to(torch.promote_types(gate.dtype, up.dtype))


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, vector: Tensor | None, function: str) -> Tensor:
        ctx.save_for_backward(gate, up, vector)
        ctx.function = function
        return _formula(gate, up, vector, function)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, vector = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled():
            # This pass is to be differentiated, and not all of the functions' derivatives can be.
            product = _formula(gate, up, vector, ctx.function)
            wanted = [t for t, need in zip((gate, up, vector), needed, strict=False) if need]
            found = iter(torch.autograd.grad(product, wanted, grads[0], create_graph=True))
            return *(next(found) if need else None for need in needed[:3]), None
        grad, gates, ups = _wide(grads[0]), _wide(gate), _wide(up)
        scaled, values = grad if vector is None else grad * vector, FUNCTIONS[ctx.function](gates)
        of_gate = of_up = of_vector = None
        if needed[0]:
            of_values = scaled * ups
            of_gate = BACKWARD[ctx.function](of_values, gates.to(of_values)).to(gate.dtype)
        if needed[1]:
            of_up = (scaled * values).to(up.dtype)
        if needed[2]:
            of_vector = (grad * values * ups).sum_to_size(vector.shape).to(vector.dtype)
        return of_gate, of_up, of_vector, None
