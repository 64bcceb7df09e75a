"""Telling one base model from another: an adapter is of no use on the wrong one."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeGuard

from ..core.names import ATTRIBUTE, model_type_of, module_at, modules_of, own_name
from ..errors import BrokenFileError, shown
from ..files.json import parse_object

# torch is imported where a model is looked at: fingerprints are compared without.
if TYPE_CHECKING:
    from torch import Tensor, nn

# Differences of this size, relative to a parameter's sampled values, come from loading in another
# dtype; another model's parameters differ by more than half of their values' size.
TOLERANCE = 0.05
PARAMETERS = 8
VALUES = 8
# More than there are of either.
MOST_NUMBERS = 64


# Of models that transformers has spread over processes as it read them. Gathering their parameters
# takes all processes, and one alone may save.
_of_spread: weakref.WeakKeyDictionary[nn.Module, Fingerprint] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Fingerprint:
    """A base model's type and, by parameter name, (shape, some values evenly spaced)."""

    model_type: str
    samples: dict[str, tuple[list[int], list[float]]]

    def to_json(self) -> str:
        """The text in an adapter's safetensors header."""
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, text: str, source: str) -> Fingerprint:
        """Read it back.

        Raises:
            BrokenFileError: it is malformed.
        """
        where = f"{source}: the base model's fingerprint"
        read = parse_object(text, where)
        try:
            samples = {
                own_name(name): (_numbers(shape, int), list(map(float, _numbers(values, float))))
                for name, (shape, values) in read["samples"].items()
            }
            if not isinstance(read["model_type"], str):
                raise TypeError(f"model_type is {shown(read['model_type'])}")
            return cls(read["model_type"], samples)
        except KeyError as error:
            raise BrokenFileError(f"{where} is malformed: it has no {error}") from error
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            raise BrokenFileError(f"{where} is malformed: {error}") from error

    def difference(self, model: nn.Module, merged: Collection[str] = ()) -> str | None:
        """In words, how a model differs from the one this was taken of; `None` where it does not.

        Passed over are values that cannot be compared (another shape after new tokens, quantized,
        not loaded yet), and the modules `merged`, which have an adapter merged into them.
        """
        found = model_type_of(model)
        if found != self.model_type:
            return f"its model type is {found!r}, the adapter's base model is {self.model_type!r}"
        for name, (shape, expected) in self.samples.items():
            path, _, last = name.rpartition(".")
            try:
                parameter = module_at(model, path)._parameters.get(last)
            except AttributeError:
                continue
            if not _is_the_base_models(path, merged) or not _can_be_sampled(parameter):
                continue
            same_shape = list(parameter.shape) == shape
            if same_shape and _distance(_sample(parameter), expected) > TOLERANCE:
                return f"the values of its {name!r} are not those of the adapter's base model"
        return None

    def difference_from(self, other: Fingerprint) -> str | None:
        """How another base model differs, in words, by what both have; `None` where it does not."""
        if other.model_type != self.model_type:
            return f"one's model type is {self.model_type!r}, the other's {other.model_type!r}"
        for name, (shape, values) in self.samples.items():
            there = other.samples.get(name)
            if there and there[0] == shape and _distance(there[1], values) > TOLERANCE:
                return f"the values of {name!r} are not the same in both"
        return None


def fingerprint(
    model: nn.Module, merged: Collection[str] = (), values: Mapping[str, Tensor] | None = None
) -> Fingerprint:
    """A base model's fingerprint, without adapters on it and the modules `merged` into.

    Parameters that are spread over processes are gathered or, with `values`, the base model's
    gathered state dict, read there. The first time all processes have to ask at once.
    """
    known = _of_spread.get(model) if values is None and not merged else None
    if known is not None:
        return known
    # Parameters of linear layers may be quantized, or new with every model that is loaded, as heads
    # are: only where there are no others.
    chosen = _telling(model, merged, values, linear=False) or _telling(
        model, merged, values, linear=True
    )
    samples = {name: (list(parameter.shape), _sample(parameter)) for name, parameter in chosen}
    found = Fingerprint(model_type_of(model), samples)
    if values is None and not merged and getattr(model, "_is_fsdp_managed_module", False):
        _of_spread[model] = found
    return found


def _telling(
    model: nn.Module,
    merged: Collection[str],
    values: Mapping[str, Tensor] | None,
    *,
    linear: bool,
) -> list[tuple[str, Tensor]]:
    """A few parameters that tell the base model from others, of linear layers or of the rest."""
    from ..core.activations import linear_features
    from ..core.spread import gathered

    found = [
        (f"{prefix}.{name}" if prefix else name, parameter)
        for prefix, module in modules_of(model).items()
        if module._parameters
        and (linear_features(module) is not None) is linear
        and _is_the_base_models(prefix, merged)
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    step = max(1, math.ceil(len(found) / PARAMETERS))
    # Evenly spaced ones first; the others only stand in for those that tell nothing: norms start
    # as ones.
    spaced = (found[i] for start in range(step) for i in range(start, len(found), step))
    whole = (
        (name, gathered(parameter) if values is None else values.get(name, parameter))
        for name, parameter in spaced
    )
    telling = (
        (name, parameter)
        for name, parameter in whole
        if _can_be_sampled(parameter) and (parameter.dim() > 1 or len(set(_sample(parameter))) > 1)
    )
    return list(islice(telling, PARAMETERS))


def _numbers(given: Any, kind: type[int] | type[float]) -> list[Any]:
    """A list of numbers from JSON, a bool not among them; whole ones are sizes."""
    expected = "sizes" if kind is int else "numbers"
    least = 0 if kind is int else -math.inf
    numbers: list[Any] = given if isinstance(given, list) and len(given) <= MOST_NUMBERS else [None]
    if all(type(number) in (int, kind) and float(number) >= least for number in numbers):
        return numbers
    raise TypeError(f"{shown(given)} is no list of {expected}")


def _is_the_base_models(module: str, merged: Collection[str]) -> bool:
    return module not in merged and ATTRIBUTE not in module.split(".")


def _can_be_sampled(parameter: Tensor | None) -> TypeGuard[Tensor]:
    from torch import Tensor

    return (
        parameter is not None
        and parameter.is_floating_point()
        and parameter.device.type != "meta"
        and parameter.numel() > 0
        and type(parameter.data) is Tensor
    )


def _sample(parameter: Tensor) -> list[float]:
    flat = parameter.detach().reshape(-1)
    # Not from the very start: rows of padding are zeros.
    step = flat.numel() // (VALUES + 1)
    sampled = flat[step : VALUES * step + 1 : step] if step else flat[:1].expand(VALUES)
    values: list[float] = sampled.float().tolist()
    return values


def _distance(values: list[float], expected: list[float]) -> float:
    if len(values) != len(expected):
        return math.inf
    size = math.hypot(*expected)
    apart = math.hypot(*(a - b for a, b in zip(values, expected, strict=True)))
    if not math.isfinite(apart):
        return math.inf
    return apart / size if size else (0.0 if apart == 0 else math.inf)
