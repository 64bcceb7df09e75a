"""Texts with several labels, at the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import BrokenFileError, IA3Error
from .labelled import by_name, known_label

if TYPE_CHECKING:
    from ..files.tables import Row


def check_encoders(**asked: Any) -> None:
    """Refuse what is a language model's, where texts have several labels."""
    for name, value in asked.items():
        if value:
            option = f"--{name.replace('_', '-')}"
            problem = "is a language model's, and --multilabel trains a sentence encoder"
            raise typer.BadParameter(f"{problem}: leave one of them out", param_hint=option)


def check_multilabel(adapter: Path, multilabel: bool, separator: str | None) -> None:
    """Raise `IA3Error` where the option is not what the adapter needs."""
    if multilabel and separator is None:
        raise IA3Error(
            f"{adapter} gives a text any number of labels: say what is between them, e.g. "
            "--multilabel ';'"
        )
    if separator is not None and not multilabel:
        raise IA3Error(f"{adapter} gives a text one label: leave out --multilabel")


def label_lists(rows: Sequence[Row], column: str, separator: str) -> list[list[Any]]:
    """The labels of each row, of which a cell may have any number, with a separator between."""
    if not separator.strip():
        problem = f"{separator!r} separates nothing, expected a sign such as ';'"
        raise typer.BadParameter(problem, param_hint="--multilabel")
    found = []
    for row in rows:
        cell = row[column]
        if isinstance(cell, str):
            own = [part.strip() for part in cell.split(separator) if part.strip()]
        else:
            own = [*cell] if isinstance(cell, list | tuple) else [cell]
        twice = [label for label in own if own.count(label) > 1]
        if twice:
            raise BrokenFileError(f"{row.where}: the label {twice[0]!r} is there twice")
        found.append(own)
    return found


def label_lists_among(
    rows: Sequence[Row], column: str, separator: str, known: Sequence[Any]
) -> list[list[Any]]:
    """As `label_lists`, of labels as the known ones are."""
    each, named = label_lists(rows, column, separator), by_name(known)
    return [
        [known_label(row, label, named, known) for label in own]
        for row, own in zip(rows, each, strict=True)
    ]


def with_labels(
    rows: Sequence[Row], labels: list[list[Any]], probabilities: Any, separator: str | None
) -> list[dict[str, Any]]:
    """The rows with their labels, and these labels' probabilities; `None` keeps lists."""
    found = []
    for row, own, of_row in zip(rows, labels, probabilities, strict=True):
        sure = [round(float(each), 6) for each in of_row if each >= 0.5]
        if separator is None:
            found.append({**row, "prediction": own, "probability": sure})
            continue
        for label in own:
            if separator in str(label):
                raise IA3Error(
                    f"the label {label!r} has {separator!r} in it: give another --multilabel"
                )
        cells = (separator.join(map(str, each)) for each in (own, sure))
        found.append({**row, **dict(zip(("prediction", "probability"), cells, strict=True))})
    return found
