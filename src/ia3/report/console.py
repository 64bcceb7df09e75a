"""Output for a terminal: progress bars, tables and the confusion matrix."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ..classify.engine import Step

# Progress and remarks go to standard error, results to standard output.
screen = Console(stderr=True, emoji=False)
results = Console(emoji=False)

# Without a terminal, a line says how far the work is, at most one in so many seconds.
SECONDS_A_LINE = 30.0


def visible(text: str) -> str:
    """The text in one line, with control characters escaped as in Python's `repr`."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


@contextmanager
def training_bar(steps: int) -> Iterator[Any]:
    """A progress bar of training, with loss and rate; yields the `on_step` that moves it.

    There are `steps` at most: a training that ends before has a full bar too.
    """
    words = "loss {task.fields[loss]}  {task.fields[rate]} steps/s{task.fields[end]}"
    with _bar("training", steps, words, loss="-", rate="-", end="") as (task, update):

        def on_step(step: Step) -> None:
            rate = f"{task.speed:.2f}" if task.speed else "-"
            # Where learning stops early, there are fewer steps than at first.
            update(completed=step.step, total=step.steps, loss=f"{step.loss:.3f}", rate=rate)

        yield on_step
        if 0 < task.completed < steps:
            update(total=task.completed, end=f", ended before {steps}")


@contextmanager
def training_bar_of_many(steps: Mapping[str, int]) -> Iterator[Any]:
    """A progress bar of training many tasks, one after the other, in the order of `steps`.

    `steps` has the most steps of each; `on_step` gets a task's name and its step.
    """
    words = "steps, {task.fields[done]} of {task.fields[tasks]} tasks done"
    place = {name: number for number, name in enumerate(steps)}
    # The most steps of the tasks from each place on.
    rest = [0]
    for most in reversed([*steps.values()]):
        rest.insert(0, rest[0] + most)
    taken: dict[str, int] = {}
    with _bar("training", rest[0], words, done=0, tasks=len(steps)) as (task, update):

        def on_step(name: str, step: Step) -> None:
            last = taken.get(name, 0)
            taken[name] = step.step
            completed = int(task.completed) + step.step - last
            # A task before this one has ended, whether it took all its steps or not.
            total = completed - step.step + step.steps + rest[place[name] + 1]
            done = place[name] + (step.step == step.steps)
            update(completed=completed, total=total, done=done)

        yield on_step
        update(total=task.completed, done=len(steps))


@contextmanager
def counting_bar(what: str, total: int) -> Iterator[Any]:
    """A progress bar over examples; yields the callback that advances it."""
    with _bar(what, total) as (_, update):
        yield lambda done: update(advance=done)


@contextmanager
def _bar(
    what: str, total: int, words: str = "", **fields: Any
) -> Iterator[tuple[Task, Callable[..., None]]]:
    """Show a bar; yields its task, and what updates the task and shows it."""
    columns = [TextColumn(what), BarColumn(), MofNCompleteColumn()]
    columns += [TextColumn(words)] if words else []
    progress = Progress(*columns, TimeElapsedColumn(), console=screen)
    number = progress.add_task(what, total=total, **fields)
    said = time.monotonic()

    def update(**changed: Any) -> None:
        nonlocal said
        progress.update(number, **changed)
        # A log would show a bar only at the end, so it gets lines.
        if not screen.is_interactive and time.monotonic() - said >= SECONDS_A_LINE:
            said = time.monotonic()
            _print_line(progress)

    with progress if screen.is_interactive else nullcontext():
        try:
            yield progress.tasks[0], update
        except BaseException:
            # The error follows in one line; the bar is removed.
            progress.live.transient = True
            raise


def _print_line(progress: Progress) -> None:
    columns = [c for c in progress.columns if isinstance(c, ProgressColumn)]
    words = [str(c.render(progress.tasks[0])) for c in columns if not isinstance(c, BarColumn)]
    screen.print(" ".join(words), markup=False, highlight=False, soft_wrap=True)


def table_of(header: Sequence[str], rows: Iterable[Sequence[str | Text]], **more: Any) -> Table:
    """A table of text made visible: the first column to the left, numbers to the right."""
    table = Table(**more)
    for column, name in enumerate(header):
        table.add_column(Text(visible(name)), justify="right" if column else "left")
    for row in rows:
        table.add_row(*(Text(visible(c)) if isinstance(c, str) else c for c in row))
    return table


def print_rows(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], names: int = 1
) -> None:
    """Print a table, if there are rows; a line a value where it is too wide for the terminal.

    The first columns, so many as `names` says, are names, which may be broken into lines.
    """
    if not rows:
        return
    rows = [[visible(value) for value in row] for row in rows]
    table = Table(title=title or None)
    for name in header[:names]:
        table.add_column(name, overflow="fold", min_width=12)
    for name in header[names:]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    if results.measure(table, options=results.options.update(width=10_000)).minimum > results.width:
        # A table this narrow would break or cut off numbers, which could then not be read.
        table = Table(title=title or None, show_header=False, show_lines=True)
        table.add_column(overflow="fold")
        for row in rows:
            lines = (f"{name}: {value}" for name, value in zip(header, row, strict=True))
            table.add_row(Text("\n".join(lines)))
    results.print(table)


def print_confusion(console: Console, classes: list[Any], matrix: list[list[int]]) -> None:
    """The confusion matrix as a table: true labels in rows, predictions in columns."""
    if len(classes) > 12:
        console.print(f"(confusion matrix of {len(classes)} classes: see --json)")
        return
    names = [str(label) for label in classes]
    rows: list[list[str | Text]] = [
        [name, *(Text(str(n), "bold" if i == j else "") for j, n in enumerate(row))]
        for i, (name, row) in enumerate(zip(names, matrix, strict=True))
    ]
    console.print(table_of(["", *names], rows, title="rows: true label, columns: prediction"))
