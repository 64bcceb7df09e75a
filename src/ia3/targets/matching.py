"""PEFT's rules for which modules an entry of a config names, and the entries that name given ones.

A string is a regular expression that must match the whole name. An entry of a list names the module
of that very name and all modules whose names end in a dot and the entry; one of feed-forward
modules, all whose names end in the entry, dot or not. A config may come from anywhere: expressions
have a second, and lists are looked up.
"""

from __future__ import annotations

import math
import re
import time
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING

import regex

from ..core.names import base_modules
from ..errors import IA3Error, shown

if TYPE_CHECKING:
    from torch import nn

Rule = Callable[[str], bool]

# For all names of a model and all expressions of a config together. Usual ones take microseconds.
SECONDS = 1.0
# A module's name is a tenth of the one; the other holds a thousand names.
LONGEST_NAME = 1000
LONGEST_PATTERN = 100_000
# Compiling writes out each repetition that has to be.
LARGEST_PATTERN = 1_000_000

_ESCAPED = re.compile(r"\\.", re.DOTALL)
_REPETITION = re.compile(r"\{([0-9]{0,6})(?:,[0-9]{0,6})?\}")
# Braces that are no number of times, and `[[:alpha:]]`, mean one thing in `re`, which PEFT reads
# expressions with, and another in `regex`.
_OTHERWISE = re.compile(r"\{(?![0-9]{1,6}(,[0-9]{0,6})?\}|,[0-9]{0,6}\})|\[:")


class Matching:
    """What a config's fields name in one model. All its regular expressions share one second."""

    def __init__(self) -> None:
        self._left = SECONDS
        self._rules: dict[tuple[str, str], Rule] = {}

    def rule(self, field: str, modules: Iterable[str] | str | None) -> Rule:
        """Whether a name is among the modules that `field` names; where it is `None`, none is.

        Raises:
            IA3Error: the expression is malformed; the rule itself raises it where the time is up.
        """
        if not isinstance(modules, str):
            entries = Listed(field, modules or ())
            return lambda name: entries.naming(name) is not None
        if (field, modules) not in self._rules:
            self._rules[field, modules] = self._expression(field, modules)
        return self._rules[field, modules]

    def _expression(self, field: str, text: str) -> Rule:
        expression, known = compiled(field, text), dict[str, bool]()

        def rule(name: str) -> bool:
            if name not in known:
                # Of this thread alone: waiting for others is not the expression's fault.
                start = time.thread_time()
                try:
                    known[name] = expression.fullmatch(name, timeout=self._left) is not None
                except TimeoutError:
                    self._left = 0.0
                else:
                    self._left -= time.thread_time() - start
                if self._left <= 0:
                    raise IA3Error(
                        f"{field}: the expression {shown(text)} takes longer than {SECONDS:g} "
                        "second to match the names of this model's modules: write it without "
                        "repetitions inside repetitions, or list the modules"
                    )
            return known[name]

        return rule


def rule(field: str, modules: Iterable[str] | str | None) -> Rule:
    """As `Matching.rule`, of a field alone."""
    return Matching().rule(field, modules)


def compiled(field: str, text: str) -> regex.Pattern[str]:
    """A field's regular expression.

    Raises:
        IA3Error: it is malformed, or would be too large.
    """
    if len(text) > LONGEST_PATTERN:
        raise IA3Error(
            f"{field}: an expression of {len(text):,} characters, expected {LONGEST_PATTERN:,} at "
            "most: list the modules"
        )
    malformed = f"{field} {shown(text)} is not a regular expression"
    bare = _ESCAPED.sub("", text)
    if found := _OTHERWISE.search(bare):
        raise IA3Error(f"{malformed} for modules' names: {found[0]!r} can be none of their parts")
    size = len(text) * math.prod(max(1, int(n or 0)) for n in _REPETITION.findall(bare))
    if size > LARGEST_PATTERN:
        raise IA3Error(f"{malformed} for modules' names: its repetitions are too many")
    try:
        re.compile(text)  # `regex` knows more, which PEFT does not
        return regex.compile(text)
    except (re.error, regex.error, ValueError, OverflowError) as error:
        raise IA3Error(f"{malformed}: {str(error)[:200]}") from error
    except RecursionError as error:
        raise IA3Error(f"{malformed}: its brackets are nested too deeply") from error


class _Beginnings:
    """Texts, of which one that begins another text is found in the time of a binary search."""

    def __init__(self, texts: Iterable[str]) -> None:
        # Of those that begin another the shorter is enough. Then only the last one before a text
        # can begin it.
        self._sorted: list[str] = []
        for text in sorted(set(texts)):
            if not (self._sorted and text.startswith(self._sorted[-1])):
                self._sorted.append(text)

    def of(self, text: str) -> str | None:
        at = bisect_right(self._sorted, text) - 1
        found = self._sorted[at] if at >= 0 else None
        return found if found is not None and text.startswith(found) else None


class Listed:
    """A list's entries, looked up by the ends of names: reversed, an end is a beginning."""

    def __init__(self, field: str, entries: Iterable[str]) -> None:
        self._dot = _before(field)
        self._reversed = _Beginnings(f"{self._dot}{entry}"[::-1] for entry in entries)

    def naming(self, name: str) -> str | None:
        """The shortest entry that names a module; `None` if none does."""
        found = self._reversed.of(f"{self._dot}{name}"[::-1])
        return None if found is None else found[::-1].removeprefix(self._dot)


def _before(field: str) -> str:
    """What stands before an entry where it is the end of a name."""
    return "" if field == "feedforward_modules" else "."


def without_a_match(field: str, entries: Iterable[str], names: Iterable[str]) -> list[str]:
    """Those of a field's list of entries that name none of these modules, sorted."""
    dot = _before(field)
    reversed_names = sorted(f"{dot}{name}"[::-1] for name in names)

    def names_none(entry: str) -> bool:
        end = f"{dot}{entry}"[::-1]
        at = bisect_left(reversed_names, end)
        return at == len(reversed_names) or not reversed_names[at].startswith(end)

    return sorted(filter(names_none, set(entries)))


def saved_with(modules_to_save: Iterable[str] | None) -> Callable[[str], str | None]:
    """Of a module's name, the entry of `modules_to_save` whose module it is, or is part of."""
    entries = _Beginnings(f"{entry}." for entry in modules_to_save or ())

    def entry(name: str) -> str | None:
        rest = f"{name}."
        while rest:
            if found := entries.of(rest):
                return found[:-1]
            rest = rest.partition(".")[2]
        return None

    return entry if modules_to_save else lambda name: None


def feedforward_among(
    targets: Iterable[str], feedforward: Iterable[str]
) -> tuple[list[str], list[str]]:
    """The same choice with the feed-forward entries a subset of the targets: (targets, those).

    PEFT wants a subset, but writes its own defaults whatever the targets. A longer target
    (`mlp.down_proj` for `down_proj`) stands in for the entry, an entry inside a wider target
    (`mlp.c_proj` in `c_proj`) is named among the targets too, and one outside all is dropped.
    """
    targets, feedforward = set(targets), set(feedforward)
    longer = set(filter(rule("feedforward_modules", feedforward), targets))
    inside = set(filter(rule("target_modules", targets), feedforward - targets))
    return sorted(targets | inside), sorted(longer | inside)


def names_or_suffixes(
    model: nn.Module, names: Sequence[str], apart_from: Collection[str] = ()
) -> list[str]:
    """The shortest list of entries that names exactly these modules of the model, sorted.

    An entry is a module's last part where that suffices, its whole name where nothing shorter does.
    No entry ends, dot or not, a name in `apart_from`: the outputs' names, where the entries are for
    `feedforward_modules`. Raises `IA3Error` if a name is no module's, or ends another's.
    """
    everywhere = Counter(end for name in base_modules(model) for end in ends(name))
    wanted = Counter(end for name in set(names) for end in ends(name))
    candidates = [end for end in wanted if everywhere[end] == wanted[end]]
    usable = {*without_a_match("feedforward_modules", candidates, apart_from)}
    entries = set()
    for name in names:
        # The shortest covers all that longer ones cover: taking it for each name gives the fewest.
        entry = next((end for end in ends(name) if end in usable), None)
        if entry is None:
            raise IA3Error(
                f"module {name!r} of {type(model).__name__} cannot be selected by its name, which "
                "is not there or ends another module's: give target_modules as a regular expression"
            )
        entries.add(entry)
    return sorted(entries)


def ends(name: str) -> list[str]:
    """A name's dotted suffixes, shortest first, the whole name last."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
