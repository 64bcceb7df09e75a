"""The vectors at one activation: attach, detach, merge, unmerge.

A `Site` is a small module registered on the base module as `ia3_l`; it never replaces or wraps it.
Its vectors are its parameters, one per adapter, so that they move, save and train with the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from .errors import IA3Error
from .rescale import rescale
from .targets import ATTRIBUTE, Side, Target, vector_shape


class Site(nn.Module):
    """Every adapter's vector at one activation of one base module.

    Vectors have PEFT's shapes: `[dim, 1]` on a module's output, `[1, dim]` on its input; float32
    whatever the base's dtype.
    """

    def __init__(self, side: Side, dim: int) -> None:
        super().__init__()
        self.side = side
        self.dim = dim
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self._unmerged: dict[str, Tensor] = {}
        self._handle: RemovableHandle | None = None

    @property
    def vectors(self) -> dict[str, nn.Parameter]:
        """Adapter name -> vector."""
        return {name: p for name, p in self._parameters.items() if p is not None}

    @property
    def vector_shape(self) -> tuple[int, int]:
        """The shape of one vector in memory and on disk."""
        return vector_shape(self.side, self.dim)

    def add(self, adapter: str, vector: Tensor) -> None:
        """Store a vector of `vector_shape` under an adapter's name, not to be trained yet."""
        # Not register_parameter: it refuses names that are also methods of this class ("product").
        self._parameters[adapter] = nn.Parameter(vector, requires_grad=False)

    def remove(self, adapter: str) -> None:
        """Forget an adapter's vector."""
        del self._parameters[adapter]

    def activate(self, module: nn.Module, adapters: tuple[str, ...]) -> None:
        """Rescale by the product of these adapters' vectors from now on.

        Adapters without a vector here are left out; with none left, no hook stays installed.
        """
        self.active = tuple(name for name in adapters if self._parameters.get(name) is not None)
        wanted = bool(self.active) and not self.merged
        if wanted and self._handle is None:
            if self.side == "input":
                self._handle = module.register_forward_pre_hook(self._rescale_input)
            else:
                self._handle = module.register_forward_hook(self._rescale_output)
        elif not wanted and self._handle is not None:
            self._handle.remove()
            self._handle = None

    def product(self, adapters: tuple[str, ...]) -> Tensor:
        """`[dim]`: the product of the adapters' vectors."""
        vectors = [self.vectors[name].flatten() for name in adapters if name in self.vectors]
        product = vectors[0]
        for vector in vectors[1:]:
            product = product * vector
        return product

    def _rescale_output(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return rescale(output, self.product(self.active), in_place=_is_fresh(module))

    def _rescale_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # Never in place: siblings may read the same input, and a ReLU before it keeps it.
        return (rescale(args[0], self.product(self.active)), *args[1:])

    def merged_weights(self, module: nn.Module, adapters: tuple[str, ...]) -> dict[str, Tensor]:
        """The module's weight and bias with the vectors folded in, computed in float32.

        Returns:
            `{"weight": ..., "bias": ...}` in the base's dtypes, rounded once; the module is not
            changed. The bias is absent where folding leaves it as it is.

        Raises:
            IA3Error: the weight is packed, so that its values cannot be scaled.
        """
        scale = self.product(adapters).detach()
        weight = module.get_parameter("weight")
        if not weight.is_floating_point():
            raise IA3Error(
                f"cannot merge into a {type(module).__name__} with {weight.dtype} weights: "
                "expected floating-point weights"
            )
        out_axis_first = not isinstance(module, Conv1D)
        along_rows = (self.side == "output") == out_axis_first
        merged = {"weight": _scaled(weight, scale[:, None] if along_rows else scale)}
        if self.side == "output" and getattr(module, "bias", None) is not None:
            merged["bias"] = _scaled(module.get_parameter("bias"), scale)
        return merged

    def merge(
        self, module: nn.Module, adapters: tuple[str, ...], merged: dict[str, Tensor]
    ) -> None:
        """Put `merged_weights` in place; the original tensors are kept for `unmerge`."""
        for name, tensor in merged.items():
            parameter = module.get_parameter(name)
            self._unmerged[name] = parameter.data
            parameter.data = tensor
        self.merged = adapters
        self.activate(module, self.active)

    def unmerge(self, module: nn.Module) -> None:
        """Put the original tensors back: the very bits that were there before."""
        for name, tensor in self._unmerged.items():
            parameter = module.get_parameter(name)
            # The model may have been moved or cast since.
            parameter.data = tensor.to(parameter.device, parameter.dtype)
        self.forget_unmerged()
        self.activate(module, self.active)

    def forget_unmerged(self) -> None:
        """Let the original tensors go: what is merged stays merged."""
        self._unmerged = {}
        self.merged = ()


def site_of(module: nn.Module) -> Site | None:
    """The site registered on a module, if it has one."""
    site = module._modules.get(ATTRIBUTE)
    return site if isinstance(site, Site) else None


def check_side(module: nn.Module, target: Target) -> None:
    """Raise `IA3Error` where another adapter rescales the module's other side."""
    site = site_of(module)
    if site is not None and site.side != target.side:
        raise IA3Error(
            f"module {target.name!r}: this adapter rescales its {target.side}, another one on this "
            f"model its {site.side}; adapters of one model must agree on feedforward_modules"
        )


def place(module: nn.Module, target: Target) -> Site:
    """The module's site, registered on it now if it has none."""
    site = site_of(module)
    if site is None:
        site = Site(target.side, target.dim)
        module.add_module(ATTRIBUTE, site)
    return site


def displace(module: nn.Module) -> None:
    """Take the site off a module, which is then what it was before `place`."""
    site = site_of(module)
    if site is not None:
        site.activate(module, ())
        del module._modules[ATTRIBUTE]


def _scaled(parameter: Tensor, scale: Tensor) -> Tensor:
    wide = torch.promote_types(parameter.dtype, torch.float32)
    return (parameter.detach().to(wide) * scale.to(wide)).to(parameter.dtype)


def _is_fresh(module: nn.Module) -> bool:
    """Whether nobody else can hold the output: a plain linear layer with no other hook on it."""
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__
        and len(module._forward_hooks) == 1
        and not torch_module._global_forward_hooks
    )
