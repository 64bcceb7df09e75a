"""Arithmetic on adapters: one adapter made of several, off their model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from ..arguments import listed
from ..errors import IA3Error, InvalidTypeError, counted, did_you_mean, naming, shown
from ..targets.config import IA3Config
from ..targets.matching import rule, saved_with
from .files import Adapter, check_finite

if TYPE_CHECKING:
    from ..core.names import Frozen

CombinationType = Literal["linear", "average", "geometric_mean", "task_arithmetic", "ties"]
MajoritySign = Literal["total", "frequency"]
# Yadav et al. keep the largest fifth where there is nothing to choose by.
TIES_DENSITY = 0.2
PAIRS = "a list of pairs (name, adapter)"


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
    float64.

    >>> import torch
    >>> from ia3 import IA3Config, combine
    >>> from ia3.adapter.files import Adapter
    >>> config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    >>> tickets = Adapter(config, {"layers.0.k_proj": torch.tensor([[2.0], [0.5]])})
    >>> reviews = Adapter(config, {"layers.0.k_proj": torch.tensor([[1.0], [1.5]])})
    >>> both = combine([("tickets", tickets), ("reviews", reviews)], [1, 1], "average")
    >>> both.vectors["layers.0.k_proj"].tolist()
    [[1.5], [1.0]]

    Args:
        adapters: `(name, adapter)`, at least one; the names are for messages.
        weights: one for each, `[adapters]`, finite.
        density: above 0, 1 at most, for `"ties"` alone; 0.2 if not given, as in the paper.
        majority_sign_method: for `"ties"`: `"total"` weighs a sign by its values, as in the paper,
            `"frequency"` counts them.

    Returns:
        An adapter with the first one's settings and the modules of all; its vectors are float32, in
        the shapes of the given ones. Values stay one where they do in all that have the vector.

    Raises:
        InvalidTypeError: an argument is of another type.
        IA3Error: they are of different base models, have vectors of different shapes or sides, or
            copies of the same module (`modules_to_save`); their configs do not name their modules;
            the weights are not finite, or add up to 0 or less where they divide by their sum; a
            vector, given or combined, is not finite; or an option is unknown or belongs to another
            type.
    """
    check_combination(combination_type, density, majority_sign_method)
    for pair in listed("adapters", adapters, PAIRS):
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[1], Adapter):
            raise InvalidTypeError(f"adapters holds {shown(pair)}, expected {PAIRS}")
    weights = _checked_weights(weights, len(adapters), combination_type)
    for called, adapter in adapters:
        with naming(called):
            check_finite(adapter.vectors)
    base = _common_base(adapters)
    copies = _copies(adapters)
    shapes, feedforward = _sites(adapters)
    parts = [adapter for _, adapter in adapters]
    vectors = [_with_ones(part) for part in parts]
    if combination_type == "ties":
        share = TIES_DENSITY if density is None else density
        vectors = [_trimmed(part, share) for part in parts]
    combined: dict[str, Tensor] = {}
    frozen: dict[str, Frozen] = {}
    for name, shape in shapes.items():
        first = next(each[name] for each in vectors if name in each).double()
        lacking = first.new_zeros(shape) if combination_type == "linear" else first.new_ones(shape)
        stack = torch.stack([each.get(name, lacking).to(first) for each in vectors])
        if combination_type == "linear":
            # In float32 and one after the other, as PEFT does: to the same bits.
            value = sum(map(torch.mul, stack.float(), weights), torch.zeros(()))
        elif combination_type == "average":
            value = _weighted(stack, weights) / sum(weights)
        elif combination_type == "geometric_mean":
            value = _geometric_mean(stack, weights, name)
        elif combination_type == "task_arithmetic":
            value = 1 + _weighted(stack - 1, weights)
        else:
            value = 1 + _disjoint_mean(stack - 1, weights, majority_sign_method)
        stay = torch.stack([_stays_one(p, name) for p in parts if name in p.vectors]).all(0)
        if stay.any():
            frozen[name] = _ranges(stay)
            value = value.masked_fill(stay.reshape(shape).to(value.device), 1.0)
        combined[name] = value.float()
        if not combined[name].isfinite().all():
            raise IA3Error(
                f"{combination_type} of {[called for called, _ in adapters]} with the weights "
                f"{weights}: the vector of {name!r} exceeds what float32 holds; use smaller weights"
            )
    config = _config([part.config for part in parts], list(shapes), feedforward)
    return Adapter(config, combined, copies, frozen, base)


# -- values ---------------------------------------------------------------------------------------


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
    """The vectors in float64; all but the share `density` that is farthest from one are one."""
    vectors = {name: vector.double() for name, vector in _with_ones(adapter).items()}
    distances = [
        (vector.cpu().reshape(-1) - 1).abs()[~_stays_one(adapter, name)]
        for name, vector in vectors.items()
    ]
    trained = torch.cat([torch.zeros(0), *distances])
    keep = int(density * len(trained))
    # Values of the same size are kept or dropped together, so that their order decides nothing.
    least = float(trained.topk(keep).values[-1]) if keep else math.inf
    return {name: v.masked_fill((v - 1).abs() < least, 1.0) for name, v in vectors.items()}


def _disjoint_mean(changes: Tensor, weights: Sequence[float], method: MajoritySign) -> Tensor:
    """TIES' elected sign and the mean of those that have it, `[adapters, *shape]` → `shape`."""
    sign = changes.sign()
    elected = (changes if method == "total" else sign).sum(0).sign()
    agreeing = (sign == elected) & (sign != 0)
    return _weighted(changes * agreeing, weights) / agreeing.sum(0).clamp(min=1)


def _with_ones(adapter: Adapter) -> dict[str, Tensor]:
    """The vectors, with one where they stay one."""
    return {
        name: vector.masked_fill(_stays_one(adapter, name).view_as(vector).to(vector.device), 1.0)
        for name, vector in adapter.vectors.items()
    }


def _stays_one(adapter: Adapter, name: str) -> Tensor:
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
        weights = [float(weight) for weight in given]
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise InvalidTypeError(
            f"the weights are {shown(given)}, expected a list of finite numbers, one for each "
            "adapter"
        ) from error
    if not weights or count != len(weights):
        raise IA3Error(
            f"{counted(len(weights), 'weight')} for {counted(count, 'adapter')}: expected one each"
        )
    if not all(map(math.isfinite, weights)):
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
    if not isinstance(combination_type, str) or combination_type not in types:
        raise IA3Error(
            f"no combination_type {shown(combination_type)}: expected one of {', '.join(types)}"
            f"{did_you_mean(combination_type, types)}"
        )
    if not isinstance(majority_sign_method, str) or majority_sign_method not in methods:
        raise IA3Error(
            f"majority_sign_method is {shown(majority_sign_method)}, expected one of "
            f"{', '.join(methods)}"
        )
    if combination_type != "ties" and (density is not None or majority_sign_method != "total"):
        option = "majority_sign_method" if density is None else "density"
        raise IA3Error(f"{option} belongs to 'ties', and says nothing for {combination_type!r}")
    if density is not None and (not isinstance(density, int | float) or not 0 < density <= 1):
        raise IA3Error(f"density is {shown(density)}, expected a share above 0, and 1 at most")


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
        # Embeddings that were saved beside the vectors may be those of one resized model.
        entries = adapter.config.modules_to_save or ()
        twice = [
            name
            for name in sorted(copied.keys() & adapter.copies.keys())
            if any(f"{entry}." in name for entry in entries)
            or not torch.equal(copied[name], adapter.copies[name])
        ]
        if twice:
            raise IA3Error(
                f"{twice[0]!r} is in the modules_to_save of two of the adapters "
                f"{[name for name, _ in adapters]}: a combination takes it from one at most"
            )
        copied.update(adapter.copies)
    return copied


def _sites(adapters: Sequence[tuple[str, Adapter]]) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """(module name -> its vector's shape, the feed-forward modules among them)."""
    sites: dict[str, tuple[tuple[int, ...], str]] = {}
    first: dict[str, str] = {}
    saved = {entry for _, adapter in adapters for entry in adapter.config.modules_to_save or ()}
    for called, adapter in adapters:
        feedforward = adapter.config.feedforward_modules
        if feedforward is None or adapter.config.target_modules is None:
            raise IA3Error(
                f"{called}: its config does not name its modules (target_modules and "
                "feedforward_modules): load it onto its model and save it, which fills them in"
            )
        is_input = rule("feedforward_modules", feedforward)
        others = saved_with(saved.difference(adapter.config.modules_to_save or ()))
        for name, vector in adapter.vectors.items():
            side = "input" if is_input(name) else "output"
            site = (tuple(vector.shape), side)
            known = sites.setdefault(name, site)
            if site != known:
                one, other = (f"{list(shape)} on the {side}" for shape, side in (known, site))
                raise IA3Error(
                    f"{first[name]} and {called} do not go together: the vector of {name!r} is "
                    f"{one} in one and {other} in the other"
                )
            first.setdefault(name, called)
            if inside := others(name):
                raise IA3Error(
                    f"{called} has a vector at {name!r}, which is part of {inside!r} in the "
                    "modules_to_save of another: they cannot be on one model"
                )
    shapes = {name: shape for name, (shape, _) in sites.items()}
    return shapes, [name for name, (_, side) in sites.items() if side == "input"]


def _config(configs: Sequence[IA3Config], names: list[str], feedforward: list[str]) -> IA3Config:
    """The first one's config with the modules of all."""
    entries = [[c.target_modules for c in configs], [c.feedforward_modules for c in configs]]
    targets, inputs = names, feedforward
    # What one leaves out another may have, and an expression does not go into a list: the modules
    # are then listed by their own names.
    if not any(c.exclude_modules for c in configs) and not any(
        isinstance(each, str) for field in entries for each in field
    ):
        targets, inputs = ([n for each in field for n in each or ()] for field in entries)
    bases = [c.base_model_name_or_path for c in configs if c.base_model_name_or_path is not None]
    return replace(
        configs[0],
        base_model_name_or_path=bases[0] if bases else None,
        target_modules=sorted(set(targets)),
        exclude_modules=None,
        feedforward_modules=sorted(set(inputs)),
        modules_to_save=sorted({m for c in configs for m in c.modules_to_save or ()}) or None,
    )
