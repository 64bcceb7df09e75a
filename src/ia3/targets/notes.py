"""What a person should hear about a choice of modules that fits the model, and may not be meant."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from ..core.activations import Side
from ..core.mlp import Mlp, read_mlp
from ..core.names import module_at, starred
from .matching import ends, rule, without_a_match
from .structure import Parts, parts_of

if TYPE_CHECKING:
    from torch import nn

    from .config import IA3Config


def notes(model: nn.Module, config: IA3Config, sides: Mapping[str, Side]) -> list[str]:
    """Sentences about a config's own names of modules; none about what was left to the defaults.

    `sides` are its targets on this model, by name. Nothing is said that the structure of the model
    does not prove.
    """
    if config.target_modules is None and config.feedforward_modules is None:
        return []
    parts = parts_of(model)
    both = dict(_for_both(parts, config, sides))
    return [
        *([] if config.feedforward_modules is None else _inputs(parts, both, sides)),
        *both.values(),
        *_outside_the_targets(config, sides),
        *_twice(model, parts, sides),
    ]


def _inputs(parts: Parts, told: Iterable[str], sides: Mapping[str, Side]) -> Iterator[str]:
    """Modules whose input is rescaled, and is no inner activation; `told` are entries of theirs."""
    said: dict[str, list[str]] = {}
    told_already = rule("target_modules", told)
    for name in (name for name, side in sides.items() if side == "input"):
        if name in parts.down_of:
            down = parts.down_of[name]
            rest = (
                ", which is rescaled as well" if sides.get(down) == "input" else ": name that one"
            )
            sentence = (
                "an up or gate projection is rescaled on its input, which is what the whole "
                f"feed-forward layer is given; the inner activation is the input of "
                f"{starred(down)!r}{rest}"
            )
        elif name in parts.keys_and_values:
            sentence = (
                "a projection to keys or values is rescaled on its input, and these are not; leave "
                "it out of feedforward_modules"
            )
        elif name in parts.attention and not told_already(name):
            sentence = (
                "a part of an attention is rescaled on its input, which is no inner activation of "
                "a feed-forward layer"
            )
        else:
            continue
        said.setdefault(sentence, []).append(repr(starred(name)))
    for sentence, names in said.items():
        yield f"{', '.join(dict.fromkeys(names))} in feedforward_modules: {sentence}"


def _for_both(
    parts: Parts, config: IA3Config, sides: Mapping[str, Side]
) -> Iterator[tuple[str, str]]:
    """Entries of the lists that name modules of attention and of feed-forward layers alike."""
    feedforward = {*parts.down_of, *parts.down_of.values()} - parts.attention
    # The first module of each kind, by what an entry for it may be.
    firsts: dict[str, dict[str, str]] = {}
    for kind, modules in (("attention", parts.attention), ("other", feedforward)):
        for name in filter(modules.__contains__, sides):
            for end in ends(name):
                firsts.setdefault(end, {}).setdefault(kind, name)
    for entry in sorted({*_listed(config.target_modules), *_listed(config.feedforward_modules)}):
        named = firsts.get(entry, {})
        attention, other = named.get("attention"), named.get("other")
        if attention and other:
            yield (
                entry,
                f"{entry!r} names modules of attention ({starred(attention)!r}) and of "
                f"feed-forward layers ({starred(other)!r}) alike; a longer name, an expression or "
                "exclude_modules tells them apart, and paper_sites=True chooses the paper's",
            )


def _outside_the_targets(config: IA3Config, sides: Mapping[str, Side]) -> Iterator[str]:
    if not isinstance(config.target_modules, str) or config.exclude_modules is not None:
        # Of two lists this is an error of the config's, and what is left out may be meant to be.
        return
    field = "feedforward_modules"
    for entry in without_a_match(field, _listed(config.feedforward_modules), sides):
        yield (
            f"{entry!r} of {field} is among none of the targets, and nothing of it is rescaled: "
            "name it in target_modules too"
        )


def _twice(model: nn.Module, parts: Parts, sides: Mapping[str, Side]) -> Iterator[str]:
    """Two vectors on one activation: an up projection's output and a down projection's input."""
    proven: dict[tuple[type, str], Mlp | str] = {}
    doubled: dict[tuple[str, str], int] = {}
    for up, down in parts.down_of.items():
        (above_up, _, up_last), (above, _, down_last) = up.rpartition("."), down.rpartition(".")
        if (sides.get(up), sides.get(down)) != ("output", "input") or above_up != above:
            continue
        mlp = module_at(model, above)
        kind = (type(mlp), down_last)
        if kind not in proven:
            proven[kind] = read_mlp(mlp, down_last, with_gate=False)
        found = proven[kind]
        if isinstance(found, Mlp) and found.up == up_last:
            pair = starred(up), starred(down)
            doubled[pair] = doubled.get(pair, 0) + 1
    for (up, down), times in doubled.items():
        layers = "1 layer" if times == 1 else f"{times} layers"
        yield (
            f"the output of {up!r} and the input of {down!r} are rescaled, which multiplies one "
            f"activation twice, in {layers}: half of these values add nothing; exclude_modules "
            "leaves one of the two out"
        )


def _listed(entries: str | Iterable[str] | None) -> Iterable[str]:
    return () if entries is None or isinstance(entries, str) else entries
