"""Arithmetic on adapters: one adapter made of several, off their model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import IA3Error, did_you_mean
from ..targets.config import IA3Config
from ..targets.matching import matches_feedforward
from .store import Adapter

if TYPE_CHECKING:
    from ..core.names import Frozen

CombinationType = Literal["linear", "average", "geometric_mean", "task_arithmetic", "ties"]
MajoritySign = Literal["total", "frequency"]
# Yadav et al. keep the largest fifth where there is nothing to choose by.
TIES_DENSITY = 0.2


def combine(
    adapters: Sequence[tuple[str, Adapter]],
    weights: Sequence[float],
    combination_type: CombinationType = "linear",
    density: float | None = None,
    majority_sign_method: MajoritySign = "total",
) -> Adapter:
    """One adapter of several, value by value.

    With l_i the values of the adapters and w_i their weights:

    - `"linear"`: Σ w_i l_i, PEFT's weighted sum. An adapter without a vector at a site adds nothing
      there.
    - `"average"`: Σ w_i l_i / Σ w_i.
    - `"geometric_mean"`: Π |l_i|^(w_i / Σ w), with the sign that has more weight, |w_i|, behind it;
      0 where both have the same.
    - `"task_arithmetic"`: 1 + Σ w_i (l_i − 1), sums and differences of what training changed
      (Ilharco et al. 2023, arXiv 2212.04089, around ones).
    - `"ties"`: Yadav et al. 2023, arXiv 2306.01708, whose task vectors for (IA)³ are l_i − 1 too.
      Each is trimmed to the share `density` of its values that are largest, over the whole adapter
      (PEFT trims a tensor at a time). At each value the sign with the larger total is elected, and
      those w_i (l_i − 1) that have it are averaged. Weights that are all λ are the paper's λ.
      Where neither sign wins, the result is one.

    A site that an adapter lacks counts as ones, but for `"linear"`. Values that stay one in an
    adapter count as ones too, and are left out of its density. All but `"linear"` are computed in
    float64; the result is float32.

    >>> import torch
    >>> from ia3 import IA3Config, combine
    >>> from ia3.adapter.store import Adapter
    >>> config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    >>> tickets = Adapter(config, {"layers.0.k_proj": torch.tensor([[2.0], [0.5]])})
    >>> reviews = Adapter(config, {"layers.0.k_proj": torch.tensor([[1.0], [1.5]])})
    >>> both = combine([("tickets", tickets), ("reviews", reviews)], [1, 1], "average")
    >>> both.vectors["layers.0.k_proj"].tolist()
    [[1.5], [1.0]]

    Args:
        adapters: `(name, adapter)`, at least one; the names are for messages.
        weights: one for each, `[adapters]`, finite.
        combination_type: see above.
        density: above 0, 1 at most, for `"ties"` alone; 0.2 if not given, as in the paper.
        majority_sign_method: for `"ties"`: `"total"` weighs a sign by its values, as in the paper,
            `"frequency"` counts them.

    Returns:
        An adapter with the first one's settings and all their modules; its vectors are float32, of
        the adapters' shapes, `[dim, 1]` or `[1, dim]`. Values stay one where they do in all that
        have the vector.

    Raises:
        IA3Error: they are of different base models, have vectors of different shapes or sides, or
            copies of the same module (`modules_to_save`); their configs do not name their modules;
            the weights are not one finite number for each, or add up to 0 or less where they divide
            by their sum; or an option is unknown or belongs to another type.
    """
    check_combination(combination_type, density, majority_sign_method)
    weights = _checked_weights(weights, len(adapters), combination_type)
    base = _common_base(adapters)
    copies = _copies(adapters)
    shapes, feedforward = _sites(adapters)
    vectors = [_filled(adapter) for _, adapter in adapters]
    changes: list[dict[str, Tensor]] = []
    if combination_type == "ties":
        share = TIES_DENSITY if density is None else density
        changes = [_trimmed(adapter, share) for _, adapter in adapters]
    combined: dict[str, Tensor] = {}
    frozen: dict[str, Frozen] = {}
    for name, shape in shapes.items():
        if combination_type == "linear":
            value = _linear(name, vectors, weights)
        elif combination_type == "average":
            value = _weighted(_stacked(name, vectors, 1.0), weights) / sum(weights)
        elif combination_type == "geometric_mean":
            value = _geometric_mean(_stacked(name, vectors, 1.0), weights, name)
        elif combination_type == "task_arithmetic":
            value = 1 + _weighted(_stacked(name, vectors, 1.0) - 1, weights)
        else:
            value = 1 + _disjoint_mean(_stacked(name, changes, 0.0), weights, majority_sign_method)
        having = [adapter for _, adapter in adapters if name in adapter.vectors]
        stay = torch.stack([_staying_one(adapter, name) for adapter in having]).all(0)
        if stay.any():
            frozen[name] = _ranges(stay)
            value = value.masked_fill(stay.reshape(shape).to(value.device), 1.0)
        combined[name] = value.float()
    config = _config([adapter.config for _, adapter in adapters], list(shapes), feedforward)
    return Adapter(config, combined, copies, frozen, base)


# -- values ---------------------------------------------------------------------------------------


def _linear(name: str, vectors: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> Tensor:
    having = [(each[name], w) for each, w in zip(vectors, weights, strict=True) if name in each]
    total = torch.zeros_like(having[0][0], dtype=torch.float32)
    for vector, weight in having:
        total += weight * vector.to(total.device)
    return total


def _stacked(name: str, vectors: Sequence[Mapping[str, Tensor]], lacking: float) -> Tensor:
    """`[adapters, *shape]`, float64; adapters that lack the vector have this value."""
    first = next(each[name] for each in vectors if name in each).double()
    others = [each.get(name, torch.full_like(first, lacking)).to(first) for each in vectors]
    return torch.stack(others)


def _weighted(stack: Tensor, weights: Sequence[float]) -> Tensor:
    """Σ w_i x_i over the first axis, `[adapters, *shape]` → `shape`."""
    total: Tensor = torch.tensordot(stack.new_tensor(weights), stack, 1)
    return total


def _geometric_mean(stack: Tensor, weights: Sequence[float], name: str) -> Tensor:
    # A weight of 0 leaves an adapter out, also where its value is 0.
    used = [i for i, weight in enumerate(weights) if weight]
    stack, weights = stack[used], [weights[i] for i in used]
    negative = [i for i, weight in enumerate(weights) if weight < 0]
    if (stack[negative] == 0).any():
        raise IA3Error(
            f"geometric_mean: a value of {name!r} is 0 in an adapter whose weight is negative, "
            "and has no inverse: use 'task_arithmetic'"
        )
    sign = _weighted(stack.sign(), [abs(weight) for weight in weights]).sign()
    # A log of 0 is -inf, and its exponential 0 again.
    return sign * torch.exp(_weighted(stack.abs().log(), weights) / sum(weights))


def _trimmed(adapter: Adapter, density: float) -> dict[str, Tensor]:
    """l − 1 in float64, zero but for the share `density` of values that are largest."""
    changes = {name: vector.double() - 1 for name, vector in _filled(adapter).items()}
    trained = []
    for name, change in changes.items():
        trained.append(change.reshape(-1).cpu()[~_staying_one(adapter, name)].abs())
    sizes = torch.cat(trained) if trained else torch.zeros(0)
    keep = int(density * len(sizes))
    # Values of the same size are kept or dropped together, so that their order decides nothing.
    least = float(sizes.topk(keep).values[-1]) if keep else math.inf
    return {name: change * (change.abs() >= least) for name, change in changes.items()}


def _disjoint_mean(changes: Tensor, weights: Sequence[float], method: MajoritySign) -> Tensor:
    """TIES' elected sign and the mean of those that have it, `[adapters, *shape]` → `shape`."""
    sign = changes.sign()
    elected = (changes if method == "total" else sign).sum(0).sign()
    agreeing = (sign == elected) & (sign != 0)
    return _weighted(changes * agreeing, weights) / agreeing.sum(0).clamp(min=1)


def _filled(adapter: Adapter) -> dict[str, Tensor]:
    """The vectors with their frozen values one."""
    vectors = dict(adapter.vectors)
    for name in adapter.frozen:
        stay = _staying_one(adapter, name).reshape(vectors[name].shape)
        vectors[name] = vectors[name].masked_fill(stay.to(vectors[name].device), 1.0)
    return vectors


def _staying_one(adapter: Adapter, name: str) -> Tensor:
    """`[values]`, bool, on the CPU: the values of a vector that stay one."""
    stay = torch.zeros(adapter.vectors[name].numel(), dtype=torch.bool)
    for start, end in adapter.frozen.get(name, ()):
        stay[start:end] = True
    return stay


def _ranges(stay: Tensor) -> Frozen:
    """The half-open ranges in which a mask is true, ascending."""
    steps = torch.nn.functional.pad(stay.int(), (1, 1)).diff()
    starts, ends = ((steps == sign).nonzero().flatten().tolist() for sign in (1, -1))
    return tuple(zip(starts, ends, strict=True))


# -- what goes together ---------------------------------------------------------------------------


def _checked_weights(given: Any, count: int, combination_type: str) -> list[float]:
    try:
        if any(isinstance(weight, str | bytes) for weight in given):
            raise TypeError("a text is no number")
        weights = [float(weight) for weight in given]
    except (TypeError, ValueError, OverflowError) as error:
        raise IA3Error(
            f"the weights are {given!r}, expected a list of finite numbers, one for each adapter"
        ) from error
    if not weights or count != len(weights):
        raise IA3Error(f"{len(weights)} weights for {count} adapters: expected one each")
    if not all(math.isfinite(weight) for weight in weights):
        raise IA3Error(f"the weights are {weights}, expected finite numbers")
    if combination_type in ("average", "geometric_mean") and not sum(weights) > 0:
        raise IA3Error(
            f"the weights {weights} add up to {sum(weights):g}: {combination_type!r} divides "
            "by their sum, which has to be above 0"
        )
    return weights


def check_combination(
    combination_type: str, density: float | None, majority_sign_method: str
) -> None:
    """Raise `IA3Error` where a combination's options make no sense."""
    types, methods = get_args(CombinationType), get_args(MajoritySign)
    if combination_type not in types:
        raise IA3Error(
            f"no combination_type {combination_type!r}: expected one of {', '.join(types)}"
            f"{did_you_mean(str(combination_type), types)}"
        )
    if majority_sign_method not in methods:
        raise IA3Error(
            f"majority_sign_method is {majority_sign_method!r}, expected one of "
            f"{', '.join(methods)}"
        )
    if combination_type != "ties" and (density is not None or majority_sign_method != "total"):
        option = "majority_sign_method" if density is None else "density"
        raise IA3Error(f"{option} belongs to 'ties', and says nothing for {combination_type!r}")
    if density is not None and (not isinstance(density, int | float) or not 0 < density <= 1):
        raise IA3Error(f"density is {density!r}, expected a share above 0, and 1 at most")


def _common_base(adapters: Sequence[tuple[str, Adapter]]) -> Any:
    known = [(name, adapter.base) for name, adapter in adapters if adapter.base is not None]
    for name, base in known[1:]:
        difference = known[0][1].difference_from(base)
        if difference:
            raise IA3Error(
                f"{known[0][0]} and {name} are adapters of different base models: {difference}"
            )
    return known[0][1] if known else None


def _copies(adapters: Sequence[tuple[str, Adapter]]) -> dict[str, Tensor]:
    copied: dict[str, Tensor] = {}
    for _, adapter in adapters:
        twice = sorted(copied.keys() & adapter.copies.keys())
        if twice:
            raise IA3Error(
                f"{twice[0]!r} is in the modules_to_save of two of the adapters "
                f"{[name for name, _ in adapters]}: a combination takes it from one at most"
            )
        copied.update(adapter.copies)
    return copied


def _sites(
    adapters: Sequence[tuple[str, Adapter]],
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """(module name -> its vector's shape, the feed-forward modules among them)."""
    shapes: dict[str, tuple[int, ...]] = {}
    sides: dict[str, bool] = {}
    first: dict[str, str] = {}
    for called, adapter in adapters:
        feedforward = adapter.config.feedforward_modules
        if feedforward is None or adapter.config.target_modules is None:
            raise IA3Error(
                f"{called}: its config does not name its modules (target_modules and "
                "feedforward_modules): load it onto its model and save it, which fills them in"
            )
        for name, vector in adapter.vectors.items():
            shape, side = tuple(vector.shape), matches_feedforward(name, feedforward)
            if shapes.setdefault(name, shape) != shape or sides.setdefault(name, side) != side:
                raise IA3Error(
                    f"{first[name]} and {called} do not go together: the vector of {name!r} is "
                    f"{_described(shapes[name], sides[name])} in one and {_described(shape, side)} "
                    "in the other"
                )
            first.setdefault(name, called)
            inside = [
                entry
                for _, other in adapters
                if other is not adapter
                for entry in other.config.modules_to_save or ()
                if f".{entry}." in f".{name}."
            ]
            if inside and inside[0] not in (adapter.config.modules_to_save or ()):
                raise IA3Error(
                    f"{called} has a vector at {name!r}, which is part of {inside[0]!r} in the "
                    "modules_to_save of another: they cannot be on one model"
                )
    return shapes, [name for name, side in sides.items() if side]


def _described(shape: tuple[int, ...], side: bool) -> str:
    return f"{list(shape)} on the {'input' if side else 'output'}"


def _config(configs: Sequence[IA3Config], names: list[str], feedforward: list[str]) -> IA3Config:
    """The first one's config with the modules of all."""
    fields = ("target_modules", "feedforward_modules")
    entries: dict[str, Any] = {field: [getattr(c, field) for c in configs] for field in fields}
    expressions = [[isinstance(each, str) for each in entries[field]] for field in fields]
    if any(c.exclude_modules for c in configs) or any(len(set(kinds)) > 1 for kinds in expressions):
        # What one leaves out another may have, and a list does not go into an expression: the
        # modules by their own names.
        targets: Any = sorted(names)
        inputs: Any = sorted(feedforward)
    else:
        targets, inputs = (
            "|".join(f"({each})" for each in entries[field])
            if kinds[0]
            else sorted({name for each in entries[field] for name in each})
            for field, kinds in zip(fields, expressions, strict=True)
        )
    bases = [c.base_model_name_or_path for c in configs if c.base_model_name_or_path is not None]
    return replace(
        configs[0],
        base_model_name_or_path=bases[0] if bases else None,
        target_modules=targets,
        exclude_modules=None,
        feedforward_modules=inputs,
        modules_to_save=sorted({m for c in configs for m in c.modules_to_save or ()}) or None,
    )
