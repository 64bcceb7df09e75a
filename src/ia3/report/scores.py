"""How good a classifier is, in a terminal of 80 columns or more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .console import visible

if TYPE_CHECKING:
    from ..classify.measure import Measured

# What a screen holds; the page has more, and --json all.
MOST_CLASSES = 20
MOST_MISTAKES = 5
MOST_PAIRS = 8
# Columns of numbers that fit beside the labels.
MOST_COLUMNS = 12


def print_measured(console: Console, measured: Measured, places: Sequence[str]) -> None:
    """What was measured: accuracy, the classes, what was taken for what, and what it got wrong.

    `places` says where each text is from, by its row.
    """
    _line(console, *accuracy_line(measured))
    if measured.frozen is not None:
        frozen = measured.frozen
        of = f"{frozen.accuracy:.1%} ± {100 * frozen.error:.1f}"
        _line(console, f"without training: {of}", f" ({frozen.what}, the same texts)")
    _print_classes(console, measured)
    if measured.confusion is not None:
        classes = [score.label for score in measured.by_class]
        if not print_confusion(console, classes, measured.confusion):
            _print_pairs(console, measured)
    _print_mistakes(console, measured, places)


def accuracy_line(measured: Measured) -> tuple[str, str]:
    """The accuracy, and what it is of, as two parts of a line."""
    what = "accuracy" if measured.trained else "accuracy before training"
    share = f"{what} {measured.accuracy:.1%} ± {100 * measured.error:.1f}"
    right = f"{measured.right:,} of {measured.texts:,}"
    return share, f" ({right}), macro F1 {measured.macro_f1:.1%}; {measured.how}"


def confused(measured: Measured) -> list[tuple[Any, Any, int]]:
    """(label, what it was taken for, how often), the most frequent first."""
    classes = [score.label for score in measured.by_class]
    pairs = [
        (classes[row], classes[column], count)
        for row, counts in enumerate(measured.confusion or [])
        for column, count in enumerate(counts)
        if count and row != column
    ]
    return sorted(pairs, key=lambda pair: -pair[2])


def labels_shown(given: Any) -> str:
    """A label, or several, as text."""
    return ", ".join(map(str, given)) if isinstance(given, list) else str(given)


def _print_classes(console: Console, measured: Measured) -> None:
    scores = measured.by_class
    title = None
    if len(scores) > MOST_CLASSES:
        known = [score for score in scores if score.texts]
        scores = sorted(known, key=lambda score: score.f1 or 0.0)[:MOST_CLASSES]
        title = f"the {len(scores)} classes of {len(measured.by_class)} with the lowest F1"
    table = _table(title)
    table.add_column("class", overflow="fold", min_width=12)
    for name in ("texts", "precision", "recall", "F1"):
        table.add_column(name, justify="right", no_wrap=True)
    for score in scores:
        numbers = [_percent(value) for value in (score.precision, score.recall, score.f1)]
        table.add_row(Text(visible(str(score.label))), f"{score.texts:,}", *numbers)
    console.print(table)


def print_confusion(console: Console, classes: Sequence[Any], matrix: list[list[int]]) -> bool:
    """The confusion matrix as a table; False where there is no room for it.

    Labels too long for the head of a column stand in the rows alone, with numbers.
    """
    if len(classes) > MOST_COLUMNS:
        return False
    names = [visible(str(label)) for label in classes]
    for heads, labels in (
        (names, names),
        ([f"{n}" for n in range(1, len(names) + 1)], [f"{n} {s}" for n, s in enumerate(names, 1)]),
    ):
        table = _table("rows: true label, columns: prediction")
        table.add_column("", overflow="fold", min_width=12)
        for head in heads:
            table.add_column(Text(head), justify="right", no_wrap=True)
        for i, (label, row) in enumerate(zip(labels, matrix, strict=True)):
            cells = [Text(str(n), "bold" if i == j else "") for j, n in enumerate(row)]
            table.add_row(Text(label), *cells)
        unbounded = console.options.update(width=10_000)
        if console.measure(table, options=unbounded).minimum <= console.width:
            console.print(table)
            return True
    return False


def _print_pairs(console: Console, measured: Measured) -> None:
    pairs = confused(measured)
    if not pairs:
        return
    table = _table("taken for one another most often")
    for name in ("label", "prediction"):
        table.add_column(name, overflow="fold", min_width=12)
    table.add_column("texts", justify="right", no_wrap=True)
    for label, predicted, count in pairs[:MOST_PAIRS]:
        names = [Text(visible(str(name))) for name in (label, predicted)]
        table.add_row(*names, f"{count:,}")
    console.print(table)


def _print_mistakes(console: Console, measured: Measured, places: Sequence[str]) -> None:
    wrong = measured.mistakes
    if not wrong:
        return
    surest = f", the {MOST_MISTAKES} surest answers" if len(wrong) > MOST_MISTAKES else ""
    _line(console, f"{len(wrong):,} wrong{surest}:")
    for mistake in wrong[:MOST_MISTAKES]:
        said = f"{labels_shown(mistake.predicted)} ({mistake.probability:.0%})"
        answer = f"{places[mistake.row]}: {said}, is {labels_shown(mistake.label)}"
        console.print(Text(f"  {visible(answer)}", "bold"), soft_wrap=True)
        text = Text(f"    {visible(mistake.text)}")
        text.truncate(max(20, console.width - 1), overflow="ellipsis")
        console.print(text, soft_wrap=True)


def _table(title: str | None) -> Table:
    """Without lines at the sides: 80 columns are few."""
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


def _line(console: Console, strong: str, more: str = "") -> None:
    console.print(Text.assemble((visible(strong), "bold"), visible(more)))


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
