"""What an MLP computes, proven by running it: which layers are its gate, up and down projection.

`read_mlp` runs the MLP's own forward with random values in the place of its linear layers' outputs.
In a gated MLP, l ⊙ (act(gate) ⊙ up) = act(gate) ⊙ (l ⊙ up): a vector on the down projection's input
may as well multiply the up projection's output. There the product saves what the backward pass
needs anyway, and a merge scales rows instead of columns. The layer that does so is a `Carrier`.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .activations import device_of, linear_features
from .hooks import InputHook, OutputHook
from .names import module_at
from .patch import SLOTS, rebound

# A part of a module -> the forward that runs in the place of the part's.
StandIns = Mapping[nn.Module, Callable[[Tensor], Tensor]]

# The functions of the gate that are recognised.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}


@dataclass(frozen=True, slots=True)
class Mlp:
    """What an MLP computes. Layers are named as the MLP's children.

    A vector on the output of `up` is the same as on the input of `down`. With a `gate`, the MLP
    computes down(dropout(function(gate(x)) ⊙ up(x))) and nothing else.
    """

    down: str
    up: str
    gate: str | None = None
    function: str | None = None  # the key in `FUNCTIONS`
    activation: str | None = None  # the module of the function, where there is one
    dropout: str | None = None
    casts: bool = False  # the product, to the dtype of the down projection's weight


@torch.no_grad()
def read_mlp(mlp: nn.Module, down: str, *, with_gate: bool = True) -> Mlp | str:
    """What an MLP computes; a string says why nothing is proven.

    `up` is the layer for which multiplying its output by a vector of both signs multiplies `down`'s
    input by that very vector, and reaches the MLP's result by no other way. No weight is read: the
    weights may be quantized, or on the meta device. Hooks of the MLP's parts run, except those of
    adapters. `with_gate` looks for `gate` too, in training mode, and puts the global random state
    back; without it that is never touched, so that other threads may be calling the model.
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
    for up, (_, out) in linear.items():
        if up == down or out != linear[down][0]:
            continue
        try:
            if not _carries(mlp, children[up], children[down]):
                continue
        except Exception as error:  # of a forward that this library knows nothing about
            return f"it cannot be tried out: {error}"
        if with_gate:
            with suppress(Exception), torch.random.fork_rng(devices=[]):
                return _gated(mlp, up, down)
        return Mlp(down, up)
    return f"no layer's output can take a vector in the place of {down!r}'s input"


@dataclass(frozen=True, eq=False)
class Carrier:
    """The layer whose output is rescaled instead of a down projection's input."""

    name: str
    module: nn.Module
    down_name: str
    down: nn.Module
    siblings: dict[str, nn.Module | None]  # the MLP's own dict of its children
    # FSDP 2 gives a module another class, and its vectors to it alone.
    kind: type[nn.Module]

    def in_place(self) -> bool:
        """Whether the MLP still has these very layers."""
        get, down = self.siblings.get, self.down
        there = get(self.name) is self.module and get(self.down_name) is down
        return there and type(down) is self.kind

    def __deepcopy__(self, memo: dict[int, Any]) -> Carrier | None:
        # A down projection that is copied alone is in no MLP.
        if id(self.siblings) not in memo:
            return None
        parts = (self.name, self.module, self.down_name, self.down, self.siblings)
        return Carrier(*copy.deepcopy(parts, memo), kind=self.kind)


def carrier_of(model: nn.Module, down_name: str, held: Mapping[int, int]) -> Carrier | None:
    """What carries a vector on a down projection's input; `held`: by id, how many hold a module."""
    parent, _, down = down_name.rpartition(".")
    mlp = module_at(model, parent)
    found = read_mlp(mlp, down, with_gate=False)
    if isinstance(found, str):
        return None
    layers = mlp.get_submodule(found.up), mlp.get_submodule(down)
    if any(held[id(layer)] > 1 for layer in layers):
        # What is right in one MLP may not be in the other.
        return None
    return Carrier(found.up, layers[0], down, layers[1], mlp._modules, type(layers[1]))


# -- what runs prove -------------------------------------------------------------------------------


def _carries(mlp: nn.Module, up: nn.Module, down: nn.Module) -> bool:
    """Whether a vector on `up`'s output is the same as one on `down`'s input."""
    device = device_of(mlp)
    # The constants of quantized weights may be floating-point numbers of one byte.
    dtypes = (p.dtype for p in mlp.parameters() if p.is_floating_point() and p.itemsize > 1)
    dtype = next(dtypes, torch.float32)
    like = torch.empty(0, dtype=dtype, device="cpu" if device.type == "meta" else device)
    plain, scaled = _Run(mlp, up, like), _Run(mlp, up, like, scaled=True)
    if not {up, down} <= plain.inputs.keys():
        return False
    if plain.results[up]._version or scaled.results[up]._version:
        # The MLP writes over what the vector's gradient would be computed from.
        return False
    tolerance = 4 * torch.finfo(dtype).eps
    return _close(scaled.inputs[down], plain.inputs[down].double() * scaled.vector, tolerance) and (
        _close(scaled.output.cpu(), plain.output.cpu().double(), tolerance)
    )


def _close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    if actual.shape != expected.shape or actual.numel() == 0:
        return False
    sizes = expected.norm(dim=-1)
    # False for NaN, and for zeros, which prove nothing.
    distances = (actual.double() - expected).norm(dim=-1)
    return bool(((distances <= tolerance * sizes) & (sizes > 0)).all())


def _gated(mlp: nn.Module, up: str, down: str) -> Mlp:
    """What the MLP computes, with `gate` where that can be proven too."""
    parts = dict(mlp.named_children())
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
            run = _Run(mlp, parts[up], like, training=training)
            functions &= _functions(run, parts[gate], parts[up], parts[down])
            # One of the two dtypes is not the weight's.
            casts = casts or run.inputs[parts[down]].dtype != dtype
    for name in activations:
        # A product cast to half precision does not tell functions apart that are as near as gelus.
        gates = run.results[parts[gate]]
        found, limit = parts[name].forward(gates.clone()), 1e-5 * gates.abs()
        functions = {f for f in functions if ((found - FUNCTIONS[f](gates)).abs() <= limit).all()}
    if len(functions) != 1:
        return Mlp(down, up)
    activation, dropout = next(iter(activations), None), next(iter(dropouts), None)
    return Mlp(down, up, gate, functions.pop(), activation, dropout, casts)


def _functions(run: _Run, gate: nn.Module, up: nn.Module, down: nn.Module) -> set[str]:
    """Those of `FUNCTIONS` with which a run computed down(mask ⊙ function(gate) ⊙ up)."""
    gates, ups, product = run.results[gate], run.results[up], run.inputs[down]
    dtypes = (run.given.dtype, getattr(getattr(down, "weight", None), "dtype", None))
    if (
        len(run.inputs) != 3
        or not torch.equal(run.inputs[gate], run.given)
        or not torch.equal(run.inputs[up], run.given)
        or run.output is not run.results[down]
        or product.dtype not in dtypes
        or not gates.shape == ups.shape == product.shape
    ):
        return set()
    # The functions' values are no larger than the gate's.
    limit = max(8 * torch.finfo(product.dtype).eps, 1e-9) * (gates * ups).abs().double()
    return {
        name
        for name, function in FUNCTIONS.items()
        if bool(((product.double() - function(gates) * ups * run.mask).abs() <= limit).all())
    }


class _Run:
    """One run of an MLP's forward, with random values in the place of its linear layers' outputs.

    The values are of the dtype and on the device of `like`. With `scaled`, the output of `up` is
    multiplied by `vector`; a dropout multiplies by `mask`. `inputs` and `results` are by linear
    layer, the inputs copies on the CPU.
    """

    def __init__(
        self,
        mlp: nn.Module,
        up: nn.Module,
        like: Tensor,
        *,
        scaled: bool = False,
        training: bool = False,
    ) -> None:
        self._sizes = {part: size for part in mlp.modules() if (size := linear_features(part))}
        hidden, inner = self._sizes[up]
        self._scaled, self._like = up if scaled else None, like
        self._generator = torch.Generator("cpu").manual_seed(1)
        self.inputs: dict[nn.Module, Tensor] = {}
        self.results: dict[nn.Module, Tensor] = {}
        self.vector = torch.linspace(0.5, 1.5, inner, dtype=torch.float64, device="cpu")
        # Both signs, even for a width of one: a ReLU lets positive factors through.
        self.vector[::2] *= -1
        self.mask = torch.ones((), device="cpu")
        self.given = self._values(1, 3, hidden).to(like)
        stand_ins: dict[nn.Module, Callable[[Tensor], Tensor]] = {
            layer: partial(self._linear, layer) for layer in self._sizes
        }
        dropouts = [part for part in mlp.modules() if isinstance(part, nn.Dropout)]
        stand_ins |= dict.fromkeys(dropouts, self._dropout)
        # Other threads may be calling the MLP itself meanwhile.
        twin = _twin(mlp, stand_ins, training, {})
        with _Untouched(stand_ins):
            self.output: Tensor = twin.forward(self.given)

    def _values(self, *shape: int) -> Tensor:
        # A size a token: some functions differ near zero, others far from it.
        sizes = torch.tensor([[1.0], [5.0], [30.0]], device="cpu")
        return torch.randn(*shape, generator=self._generator, device="cpu") * sizes

    def _linear(self, layer: nn.Module, activation: Tensor) -> Tensor:
        wide, out = self._sizes[layer]
        if activation.shape[-1] != wide:
            raise ValueError(f"a linear layer got {activation.shape[-1]} values, expected {wide}")
        if layer in self.inputs:
            raise ValueError("a linear layer is called twice")
        self.inputs[layer] = activation.to("cpu", copy=True)
        result = self._values(*activation.shape[:-1], out)
        if layer is self._scaled:
            result = result * self.vector
        self.results[layer] = result.to(self._like)
        return self.results[layer]

    def _dropout(self, activation: Tensor) -> Tensor:
        # It drops the same share of a value every time.
        self.mask = torch.linspace(0.2, 2, activation.shape[-1], device="cpu").to(self._like)
        return activation * self.mask


class _Untouched(TorchFunctionMode):
    """Raises where an operation uses a parameter of these modules."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self._parameters = {id(p) for module in modules for p in module.parameters()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [*args, *(kwargs or {}).values()]
        result = func(*args, **(kwargs or {}))
        # Asking for a weight's dtype or shape is no use of its values.
        if isinstance(result, Tensor) and any(id(value) in self._parameters for value in given):
            raise ValueError("it computes with the weight of a layer without calling the layer")
        return result


def _twin(
    module: nn.Module, stand_ins: StandIns, training: bool, made: dict[nn.Module, nn.Module]
) -> nn.Module:
    """A module's shallow copy, without adapters' patches and hooks; `made` are copies by module."""
    within = any(part in stand_ins for part in module.modules())
    if not within and isinstance(module, torch.jit.ScriptModule):
        return module
    if module in made:
        return made[module]
    twin = made[module] = object.__new__(type(module))
    own = twin.__dict__
    own.update(module.__dict__, training=training)
    # What was compiled has the module's own weights in it.
    own.pop("_compiled_call_impl", None)
    for slot in ("_forward_hooks", "_forward_pre_hooks"):
        hooks = [(k, h) for k, h in own[slot].items() if not isinstance(h, InputHook | OutputHook)]
        own[slot] = OrderedDict(hooks)
    own["_modules"] = {
        name: None if child is None else _twin(child, stand_ins, training, made)
        for name, child in module._modules.items()
    }
    if module in stand_ins:
        own["forward"] = stand_ins[module]
        return twin
    for slot in set(SLOTS) & own.keys():
        forward = rebound(own[slot], module, twin)
        if forward is None and within:
            raise ValueError("its forward was replaced by a function that works for itself alone")
        own[slot] = forward or own[slot]
    return twin
