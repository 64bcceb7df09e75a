"""Labelled texts and answer choices, as the command line names them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import typer

from ..errors import IA3Error, did_you_mean

if TYPE_CHECKING:
    from ..files.tables import Row


def check_columns(text: Sequence[str], label: str) -> None:
    """Refuse a column that is the text and the label at once."""
    if label in text:
        problem = f"{label!r} is the text and the label at once"
        raise typer.BadParameter(problem, param_hint="--label")


def by_name(labels: Iterable[Any]) -> dict[str, Any]:
    """Labels by how CSV and the command line, which have only strings, write them."""
    named = {str(label): label for label in labels}
    # Python's True is JSON's true.
    named |= {str(label).lower(): label for label in labels if isinstance(label, bool)}
    return named


def labels_among(rows: Sequence[Row], column: str, known: Sequence[Any]) -> list[Any]:
    """The rows' labels, as the known ones are: CSV and JSON Lines may differ in their types."""
    named = by_name(known)
    for row in rows:
        if str(row[column]) not in named:
            raise IA3Error(
                f"{row.where}: the label {row[column]!r} is not among the choices "
                f"{list(known)}{did_you_mean(str(row[column]), named)}"
            )
    return [named[str(row[column])] for row in rows]


def label_named(name: str, labels: Sequence[Any]) -> Any:
    """The label of this name, of the labels' type; a whole number may be one without examples."""
    named = by_name(labels)
    label = named.get(name, name)
    if label == name and type(labels[0]) is int and name.lstrip("-").isdecimal():
        label = int(name)
    if type(label) is not type(labels[0]):
        raise IA3Error(f"no label {name!r} among {sorted(named)}")
    return label


def parse_choices(pairs: list[str] | None, labels: list[Any]) -> dict[Any, str] | None:
    """The words of `--choice LABEL=WORDS`, by label; the labels are of one type."""
    if not pairs:
        return None
    choices: dict[Any, str] = {}
    for pair in pairs:
        name, equals, words = pair.partition("=")
        if not equals or not words.strip():
            problem = f"{pair!r}, expected LABEL=WORDS, e.g. 'pos=great'"
            raise typer.BadParameter(problem, param_hint="--choice")
        try:
            label = label_named(name, labels)
        except IA3Error as error:
            raise IA3Error(f"--choice {pair!r}: {error}") from error
        if label in choices:
            raise typer.BadParameter(f"{name!r} is given more than once", param_hint="--choice")
        choices[label] = words.strip()
    return choices
