"""Which layer can take a feed-forward vector in place of the down projection's input.

In a gated MLP, l ⊙ (act(gate) ⊙ up) = act(gate) ⊙ (l ⊙ up): the vector on the down projection's
input may as well stand on the up projection's output, where the product saves what the backward
pass needs anyway, and where a merge scales rows instead of columns.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .activations import device_of, linear_features
from .names import ATTRIBUTE
from .patch import SLOTS, rebound

TOKENS = 3


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
        """Whether the MLP still has these very layers: somebody may have put others there."""
        get = self.siblings.get
        return get(self.name) is self.module and get(self.down_name) is self.down

    def __deepcopy__(self, memo: dict[int, Any]) -> Carrier | None:
        # Of a down projection alone there is no MLP around the copy.
        if id(self.siblings) not in memo:
            return None
        parts = (self.name, self.module, self.down_name, self.down, self.siblings)
        return Carrier(*copy.deepcopy(parts, memo))


class Carriers:
    """The carriers of one model's down projections; MLPs that are made alike are tried out once.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._found: dict[Hashable, str | None] = {}

    @cached_property
    def _holders(self) -> Counter[int]:
        """How many modules hold each module, by its id."""
        modules = self._model.modules()
        return Counter(id(c) for module in modules for c in module._modules.values() if c)

    def parent(self, name: str) -> nn.Module:
        """The module that holds the one of this name."""
        return self._model.get_submodule(name.rpartition(".")[0])

    def of(self, down_name: str) -> Carrier | None:
        """The carrier for a down projection's input; `None` where there is none."""
        down = down_name.rpartition(".")[2]
        parent = self.parent(down_name)
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


def up_projection(model: nn.Module, down_name: str) -> str | None:
    """The layer whose output can be rescaled instead of a down projection's input.

    Proven, not read off names: the MLP's own forward is run with its linear layers replaced by
    random values, once as they are and once for each layer beside the down projection of the right
    width, that layer's values multiplied by a vector of both signs. The one found multiplies the
    down projection's input by that very vector and reaches the MLP's result by no other way. No
    weight is read, so that quantized layers and the meta device are no obstacle. It is run on a
    shallow copy, as other threads may be calling the model, and touches no global random state.

    Args:
        model: the model, or the MLP itself.
        down_name: the name of the down projection in it.

    Returns:
        The layer's name, or `None`: an activation or a normalisation stands between the two, both
        halves are one layer (Phi-3's `gate_up_proj`, where only half of the rows would be meant),
        the MLP takes more than one tensor `[1, tokens, hidden]`, a forward in it has been replaced
        by a function that is bound to nothing, or `down_name` is no linear layer.

    Raises:
        AttributeError: the model has no module of that name.
    """
    down = model.get_submodule(down_name)
    parent_name = down_name.rpartition(".")[0]
    parent = model.get_submodule(parent_name)
    features = linear_features(down)
    if features is None or not _takes_one_tensor(parent):
        return None
    if parent._parameters or parent._buffers:
        # What is true of their values now need not stay so.
        return None
    for name, module in parent.named_children():
        beside = linear_features(module)
        if module is not down and beside is not None and beside[1] == features[0]:
            with torch.no_grad():
                commutes = _commutes(parent, module, down, hidden=beside[0])
            if commutes:
                return f"{parent_name}.{name}" if parent_name else name
    return None


def _takes_one_tensor(parent: nn.Module) -> bool:
    return len(inspect.signature(parent.forward).parameters) == 1


def _commutes(parent: nn.Module, up: nn.Module, down: nn.Module, hidden: int) -> bool:
    """Whether a vector on `up`'s output is the same as one on `down`'s input."""
    dtype, device = _computes_in(parent)
    generator = torch.Generator("cpu").manual_seed(0)
    features = linear_features(down)
    assert features is not None
    # On the CPU whatever device is the default now.
    vector = torch.rand(features[0], generator=generator, device="cpu") + 0.5
    # Both signs, even for a width of one: a ReLU lets positive factors through.
    vector[::2] *= -1
    vector = vector.to(device)
    values = torch.randn(1, TOKENS, hidden, generator=generator, device="cpu").to(device, dtype)
    try:
        plain_input, plain_output = _run(parent, up, down, values, None)
        input_, output = _run(parent, up, down, values, vector)
    except Exception:
        # Somebody else's forward: whatever it cannot do with such values, nothing is proven.
        return False
    tolerance = 4 * torch.finfo(dtype).eps
    return _close(input_, plain_input.double() * vector, tolerance) and _close(
        output, plain_output.double(), tolerance
    )


def _close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    if actual.shape != expected.shape or actual.numel() == 0:
        return False
    size = expected.norm()
    # False for NaN, and for zeros, which prove nothing.
    return bool(((actual.double() - expected).norm() <= tolerance * size) & (size > 0))


def _run(
    parent: nn.Module, up: nn.Module, down: nn.Module, values: Tensor, vector: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(`down`'s input, the MLP's output), with random values for each linear layer's output."""
    generator = torch.Generator("cpu").manual_seed(1)
    inputs: list[Tensor] = []
    ups: list[tuple[Tensor, int]] = []

    def stand_in(module: nn.Module, wide: int, features: int) -> Callable[[Tensor], Tensor]:
        def forward(activation: Tensor) -> Tensor:
            if activation.shape[-1] != wide:
                raise ValueError(f"{activation.shape[-1]} values, expected {wide}")
            if module is down:
                inputs.append(activation.clone())
            result = torch.randn(
                *activation.shape[:-1], features, generator=generator, device="cpu"
            )
            if module is up and vector is not None:
                result = result.to(vector.device) * vector
            result = result.to(values.device, values.dtype)
            if module is up:
                ups.append((result, result._version))
            return result

        return forward

    linear = [(module, linear_features(module)) for module in parent.modules()]
    stand_ins = {m: stand_in(m, *f) for m, f in linear if f is not None}
    twin = _twin(parent, stand_ins, {})
    with _Untouched(stand_ins):
        # Not twin(values): somebody's hook may want the MLP itself.
        output = twin.forward(values)
    if len(inputs) != 1 or not isinstance(output, Tensor):
        raise ValueError("the MLP calls its down projection again or never, or returns no tensor")
    if any(result._version != version for result, version in ups):
        raise ValueError("the MLP writes over what the vector's gradient would be computed from")
    return inputs[0], output


def _computes_in(parent: nn.Module) -> tuple[torch.dtype, torch.device]:
    device = device_of(parent)
    # The constants of quantized weights may be floating numbers of one byte.
    dtypes = (p.dtype for p in parent.parameters() if p.is_floating_point() and p.itemsize > 1)
    return next(dtypes, torch.float32), torch.device("cpu") if device.type == "meta" else device


class _Untouched(TorchFunctionMode):
    """Raises where the weights of layers are used: somebody has these layers from elsewhere.

    Args:
        layers: they have stand-ins.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        named = [pair for layer in layers for pair in layer.named_parameters()]
        # Vectors on a layer multiply what its stand-in gives.
        self._weights = {id(p) for name, p in named if ATTRIBUTE not in name.split(".")}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # Their dtype or shape may be asked for.
        if isinstance(result, Tensor) and any(
            id(value) in self._weights for value in (*args, *kwargs.values())
        ):
            raise ValueError("the MLP computes with a layer that is not in its place")
        return result


def _twin(
    module: nn.Module,
    stand_ins: dict[nn.Module, Callable[[Tensor], Tensor]],
    made: dict[nn.Module, nn.Module],
) -> nn.Module:
    """A shallow copy of a module and all in it, not in training, some of it with other forwards.

    Args:
        stand_ins: these forwards, by module.
        made: module -> its copy, of those that have one already.

    Raises:
        ValueError: a module's forward has been replaced by one that only works for itself.
    """
    within = any(part in stand_ins for part in module.modules())
    if not within and isinstance(module, torch.jit.ScriptModule):
        return module
    if module not in made:
        twin = made[module] = object.__new__(type(module))
        own = twin.__dict__
        own.update(module.__dict__, training=False)
        # What was compiled has the module's own weights in it.
        own.pop("_compiled_call_impl", None)
        own["_modules"] = {
            name: None if child is None else _twin(child, stand_ins, made)
            for name, child in module._modules.items()
        }
        if module in stand_ins:
            own["forward"] = stand_ins[module]
        else:
            for slot in set(SLOTS) & own.keys():
                forward = rebound(own[slot], module, twin)
                if forward is not None:
                    own[slot] = forward
                elif within:
                    raise ValueError("somebody else's forward")
    return made[module]
