"""What a person watches: progress bars with loss and rate, the confusion matrix."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ..tfew.training.trainer import TrainingStep

# Progress and remarks; results go to standard output.
screen = Console(stderr=True, emoji=False)

# Where there is no terminal, how far things are is said in a line of its own after so many seconds.
SECONDS_A_LINE = 30.0


def visible(text: str) -> str:
    """The text in one line; what a terminal would obey is escaped, as in Python's `repr`."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


@contextmanager
def training_bar(steps: int) -> Iterator[Any]:
    """A progress bar of training, with loss and rate; yields the `on_step` that moves it."""
    progress = Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  {task.fields[rate]} steps/s"),
        TimeElapsedColumn(),
        console=screen,
    )
    task = progress.add_task("training", total=steps, loss="-", rate="-")

    def on_step(step: TrainingStep) -> None:
        speed = progress.tasks[task].speed
        progress.update(
            task,
            completed=step.step,
            loss=f"{step.loss:.3f}",
            rate=f"{speed:.2f}" if speed else "-",
        )
        moved()

    with _shown(progress) as moved:
        yield on_step


@contextmanager
def training_bar_of_many(steps: Mapping[str, int]) -> Iterator[Any]:
    """A progress bar of training many tasks, with how many are done.

    Args:
        steps: task name -> its steps.

    Yields the `on_step` that moves it, called with a task's name and its step.
    """
    progress = Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps, {task.fields[done]} of {task.fields[tasks]} tasks done"),
        TimeElapsedColumn(),
        console=screen,
    )
    bar = progress.add_task("training", total=sum(steps.values()), done=0, tasks=len(steps))

    def on_step(name: str, step: TrainingStep) -> None:
        done = progress.tasks[bar].fields["done"] + (step.step == step.steps)
        progress.update(bar, advance=1, done=done)
        moved()

    with _shown(progress) as moved:
        yield on_step


@contextmanager
def counting_bar(what: str, total: int) -> Iterator[Any]:
    """A progress bar over examples; yields the callback that advances it."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=screen)
    task = progress.add_task(what, total=total)

    def advance(done: int) -> None:
        progress.advance(task, done)
        moved()

    with _shown(progress) as moved:
        yield advance


@contextmanager
def _shown(progress: Progress) -> Iterator[Callable[[], None]]:
    """Show a bar of one task; yields what is to be called when it has moved."""
    if not screen.is_interactive:
        # In a log, a bar would be there when all is done, and no earlier.
        yield _in_lines(progress)
        return
    with progress:
        try:
            yield lambda: None
        except BaseException:
            # What went wrong is said in one line: half a bar above it says nothing more.
            progress.live.transient = True
            raise


def _in_lines(progress: Progress) -> Callable[[], None]:
    said = time.monotonic()

    def moved() -> None:
        nonlocal said
        if time.monotonic() - said < SECONDS_A_LINE:
            return
        said = time.monotonic()
        (task,) = progress.tasks
        columns = [c for c in progress.columns if isinstance(c, ProgressColumn)]
        words = [str(c.render(task)) for c in columns if not isinstance(c, BarColumn)]
        screen.print(" ".join(words), markup=False, highlight=False, soft_wrap=True)

    return moved


def print_confusion(console: Console, classes: list[Any], matrix: list[list[int]]) -> None:
    """The confusion matrix as a table: true labels in rows, predictions in columns."""
    if len(classes) > 12:
        console.print(f"(confusion matrix of {len(classes)} classes: see --json)")
        return
    table = Table(title="rows: true label, columns: prediction")
    table.add_column("")
    for label in classes:
        table.add_column(Text(str(label)), justify="right")
    for i, (label, row) in enumerate(zip(classes, matrix, strict=True)):
        cells = [f"[bold]{n}[/]" if i == j else str(n) for j, n in enumerate(row)]
        table.add_row(Text(str(label)), *cells)
    console.print(table)
