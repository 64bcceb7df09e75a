"""What an MLP computes, proven by running it: which layers are its gate, up and down projection.

`read_mlp` runs the MLP's own forward with random values in the place of its linear layers' outputs.
In a gated MLP, l ⊙ (act(gate) ⊙ up) = act(gate) ⊙ (l ⊙ up): a vector on the down projection's input
may as well multiply the up projection's output. There the product saves what the backward pass
needs anyway, and a merge scales rows instead of columns. The layer that does so is a `Carrier`.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .activations import device_of, linear_features
from .names import ATTRIBUTE
from .twin import run_twin

# The functions of the gate that are recognised.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}

# How large the values are that a function of the gate is tried with: one size a token.
SIZES = (1.0, 5.0, 30.0)


@dataclass(frozen=True, slots=True)
class Mlp:
    """What an MLP computes. Layers are named as the MLP's children.

    Attributes:
        down: the down projection.
        up: the layer on whose output a vector is the same as on the down projection's input.
        gate: with it, the MLP computes down(dropout(function(gate(x)) ⊙ up(x))) and nothing else;
            `None` where that is not so, or `function` is none of `FUNCTIONS`.
        function: the key in `FUNCTIONS`.
        activation: the module that computes the function; `None` where the forward does so itself.
        dropout: the dropout, if there is one.
        casts: the product is cast to the dtype of the down projection's weight.
    """

    down: str
    up: str
    gate: str | None = None
    function: str | None = None
    activation: str | None = None
    dropout: str | None = None
    casts: bool = False


@torch.no_grad()
def read_mlp(mlp: nn.Module, down: str, *, with_gate: bool = True) -> Mlp | str:
    """What an MLP computes; a string says why nothing is proven.

    `up` is the layer for which multiplying its output by a vector of both signs multiplies `down`'s
    input by that very vector, and reaches the MLP's result by no other way. No weight is read: the
    weights may be quantized, or on the meta device. Hooks of the MLP's parts run, except those of
    adapters.

    Args:
        mlp: a module whose forward takes one tensor, `[1, tokens, hidden]`.
        down: the name of a linear layer among its children.
        with_gate: look for `gate` too. This takes runs in training mode, which may draw random
            numbers: the global random state is put back. Otherwise it is never touched, so that
            other threads may be calling the model.
    """
    children = dict(mlp.named_children())
    linear = {name: size for name, part in children.items() if (size := linear_features(part))}
    if down not in linear:
        return f"its {down!r} is no linear layer"
    if len(inspect.signature(mlp.forward).parameters) != 1:
        return "its forward takes more than one tensor"
    if mlp._parameters or mlp._buffers:
        # What is true of their values now need not stay so.
        return "it has parameters or buffers of its own"
    for name, (hidden, out) in linear.items():
        if name == down or out != linear[down][0]:
            continue
        try:
            if not _carries(mlp, children[name], children[down], hidden):
                continue
        except Exception as error:  # of a forward that this library knows nothing about
            return f"it cannot be tried out: {error}"
        if with_gate:
            with suppress(Exception), torch.random.fork_rng(devices=[]):
                return _gated(mlp, name, down, hidden)
        return Mlp(down, name)
    return f"no layer's output can take a vector in the place of {down!r}'s input"


def up_projection(model: nn.Module, down_name: str) -> str | None:
    """The name of the layer whose output can be rescaled instead of a down projection's input.

    Raises:
        AttributeError: the model has no module `down_name`.
    """
    model.get_submodule(down_name)
    parent, _, down = down_name.rpartition(".")
    mlp = read_mlp(model.get_submodule(parent), down, with_gate=False)
    return f"{parent}.{mlp.up}".removeprefix(".") if isinstance(mlp, Mlp) else None


@dataclass(frozen=True, eq=False)
class Carrier:
    """The layer whose output is rescaled instead of a down projection's input.

    Attributes:
        name: its name among the MLP's children.
        module: the layer.
        down_name: the down projection's name among them.
        down: the down projection.
        siblings: the MLP's children, as the MLP itself holds them.
    """

    name: str
    module: nn.Module
    down_name: str
    down: nn.Module
    siblings: dict[str, nn.Module | None]

    def in_place(self) -> bool:
        """Whether the MLP still has these very layers."""
        get = self.siblings.get
        return get(self.name) is self.module and get(self.down_name) is self.down

    def __deepcopy__(self, memo: dict[int, Any]) -> Carrier | None:
        # A down projection that is copied alone is in no MLP.
        if id(self.siblings) not in memo:
            return None
        parts = (self.name, self.module, self.down_name, self.down, self.siblings)
        return Carrier(*copy.deepcopy(parts, memo))


class Carriers:
    """The carriers of one model's down projections. MLPs that are made alike are read once."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._found: dict[Hashable, str | None] = {}

    @cached_property
    def _holders(self) -> Counter[int]:
        """How many modules hold each module, by its id."""
        modules = self._model.modules()
        return Counter(id(c) for module in modules for c in module._modules.values() if c)

    def of(self, down_name: str) -> Carrier | None:
        """The carrier for a down projection's input; `None` where there is none."""
        parent_name, _, down = down_name.rpartition(".")
        parent = self._model.get_submodule(parent_name)
        kind = (down, _kind(parent))
        if kind not in self._found or kind[1] is None:
            self._found[kind] = up_projection(parent, down)
        name = self._found[kind]
        if name is None:
            return None
        layers = parent.get_submodule(name), parent.get_submodule(down)
        if any(self._holders[id(layer)] > 1 for layer in layers):
            # What is right in one MLP may not be in the other.
            return None
        return Carrier(name, layers[0], down, layers[1], parent._modules)


def _kind(parent: nn.Module) -> Hashable | None:
    """Equal for MLPs of one class whose parts and settings are the same; `None`: like no other."""
    parts: list[Hashable] = []
    for name, module in parent.named_modules():
        if name.endswith(ATTRIBUTE):
            continue
        if "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks:
            return None
        settings = [
            # What is no plain value is the same only if it is the same object.
            (key, value if isinstance(value, int | float | str | None) else id(value))
            for key, value in module.__dict__.items()
            if key != "training" and not key.startswith("_")
        ]
        parts.append((name, type(module), *settings))
    return tuple(parts)


# -- what runs prove -------------------------------------------------------------------------------


def _carries(mlp: nn.Module, up: nn.Module, down: nn.Module, hidden: int) -> bool:
    """Whether a vector on `up`'s output is the same as one on `down`'s input."""
    device = device_of(mlp)
    # The constants of quantized weights may be floating-point numbers of one byte.
    dtypes = (p.dtype for p in mlp.parameters() if p.is_floating_point() and p.itemsize > 1)
    dtype = next(dtypes, torch.float32)
    like = torch.empty(0, dtype=dtype, device="cpu" if device.type == "meta" else device)
    plain, scaled = _Run(mlp, hidden, like), _Run(mlp, hidden, like, scaled=up)
    if len(plain.inputs[down]) != 1 or len(scaled.inputs[down]) != 1:
        return False
    if any(result._version for run in (plain, scaled) for result in run.results[up]):
        # The MLP writes over what the vector's gradient would be computed from.
        return False
    (wanted,), (found,) = plain.inputs[down], scaled.inputs[down]
    tolerance = 4 * torch.finfo(dtype).eps
    return _close(found, wanted.double() * scaled.vector, tolerance) and (
        _close(scaled.output.cpu(), plain.output.cpu().double(), tolerance)
    )


def _close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    if actual.shape != expected.shape or actual.numel() == 0:
        return False
    size = expected.norm()
    # False for NaN, and for zeros, which prove nothing.
    return bool(((actual.double() - expected).norm() <= tolerance * size) & (size > 0))


def _gated(mlp: nn.Module, up: str, down: str, hidden: int) -> Mlp:
    """What the MLP computes, with `gate` where that can be proven too."""
    parts = {name: part for name, part in mlp.named_children() if name != ATTRIBUTE}
    linear = {name for name in parts if linear_features(parts[name])}
    dropouts = [name for name in parts if isinstance(parts[name], nn.Dropout)]
    activations = [name for name in parts if name not in {*linear, *dropouts}]
    # An activation with parameters may become another function.
    learned = any([*parts[n].parameters(), *parts[n].buffers()] for n in activations)
    if len(linear) != 3 or len(dropouts) > 1 or len(activations) > 1 or learned:
        return Mlp(down, up)
    (gate,) = linear - {up, down}
    functions, casts = set(FUNCTIONS), False
    for dtype in (torch.float64, torch.float32):
        for training in (False, True):
            like = torch.empty(0, dtype=dtype, device="cpu")
            run = _Run(mlp, hidden, like, training=training, sizes=SIZES)
            functions &= run.functions(parts[gate], parts[up], parts[down])
            # One of the two dtypes is not the weight's.
            casts = casts or any(given.dtype != dtype for given in run.inputs[parts[down]])
    if len(functions) != 1:
        return Mlp(down, up)
    activation, dropout = next(iter(activations), None), next(iter(dropouts), None)
    return Mlp(down, up, gate, functions.pop(), activation, dropout, casts)


class _Run:
    """One run of an MLP's forward, with random values in the place of its linear layers' outputs.

    Args:
        mlp: its forward takes one tensor.
        hidden: that tensor's width.
        like: has the dtype and the device of the values.
        scaled: a layer whose output is multiplied by `vector`.
        training: the mode. In training, a dropout multiplies by `mask`.
        sizes: what each token's values are multiplied by.

    Attributes:
        given: the MLP's input, `[1, tokens, hidden]`.
        inputs, results: linear layer -> its inputs (copies on the CPU) and its outputs, by call.
        vector, mask: `[inner]`; the vector is float64, on the CPU, of both signs.
        output: the MLP's result.
    """

    def __init__(
        self,
        mlp: nn.Module,
        hidden: int,
        like: Tensor,
        *,
        scaled: nn.Module | None = None,
        training: bool = False,
        sizes: tuple[float, ...] = (1.0, 1.0, 1.0),
    ) -> None:
        self._like, self._scaled = like, scaled
        self._sizes = torch.tensor(sizes, dtype=torch.float64, device="cpu")[:, None]
        self._generator = torch.Generator("cpu").manual_seed(1)
        own = {n: part for n, part in mlp.named_modules() if ATTRIBUTE not in n.split(".")}
        layers = [part for part in own.values() if linear_features(part)]
        self.inputs: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}
        self.results: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}
        inner = 1 if scaled is None else (linear_features(scaled) or (0, 1))[1]
        self.vector = torch.linspace(0.5, 1.5, inner, dtype=torch.float64, device="cpu")
        # Both signs, even for a width of one: a ReLU lets positive factors through.
        self.vector[::2] *= -1
        self.mask = torch.ones((), device="cpu")
        self.given = self._values(1, len(sizes), hidden).to(like)
        stand_ins = {layer: partial(self._linear, layer) for layer in layers}
        dropouts = [part for part in own.values() if training and isinstance(part, nn.Dropout)]
        self.output: Tensor = run_twin(
            mlp, {**stand_ins, **dict.fromkeys(dropouts, self._dropout)}, training, self.given
        )

    def _values(self, *shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=self._generator, dtype=torch.float64, device="cpu")
        return drawn * self._sizes

    def _linear(self, layer: nn.Module, activation: Tensor) -> Tensor:
        """In the place of a linear layer's forward."""
        wide, out = linear_features(layer) or (0, 0)
        if activation.shape[-1] != wide:
            raise ValueError(f"a linear layer got {activation.shape[-1]} values, expected {wide}")
        self.inputs[layer].append(activation.to("cpu", copy=True))
        result = self._values(*activation.shape[:-1], out)
        if layer is self._scaled:
            result = result * self.vector
        self.results[layer].append(result.to(self._like))
        return self.results[layer][-1]

    def _dropout(self, activation: Tensor) -> Tensor:
        """In the place of a dropout's forward: it drops the same share of a value every time."""
        mask = torch.linspace(0.2, 2, activation.shape[-1], device="cpu")
        self.mask = mask.to(self._like)
        return activation * self.mask

    def functions(self, gate: nn.Module, up: nn.Module, down: nn.Module) -> set[str]:
        """Those of `FUNCTIONS` with which the MLP computed down(mask ⊙ function(gate) ⊙ up)."""
        if any(len(inputs) != 1 for inputs in self.inputs.values()):
            return set()
        if any(not _same(self.inputs[layer][0], self.given) for layer in (gate, up)):
            return set()
        gates, ups, output = (self.results[layer][0] for layer in (gate, up, down))
        (product,) = self.inputs[down]
        dtypes = (self._like.dtype, getattr(getattr(down, "weight", None), "dtype", None))
        if self.output is not output or product.dtype not in dtypes:
            return set()
        if not gates.shape == ups.shape == product.shape:
            return set()
        # The functions' values are no larger than the gate's.
        limit = max(8 * torch.finfo(product.dtype).eps, 1e-9) * (gates * ups).abs().double()
        off = {
            n: (product.double() - f(gates) * ups * self.mask).abs() for n, f in FUNCTIONS.items()
        }
        return {name for name in off if bool((off[name] <= limit).all())}


def _same(actual: Tensor, expected: Tensor) -> bool:
    return actual.dtype == expected.dtype and torch.equal(actual, expected)
