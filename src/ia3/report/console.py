"""Output for a terminal: progress bars and tables."""

from __future__ import annotations

import threading
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
    TimeRemainingColumn,
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


def quiet() -> None:
    """Print nothing from now on."""
    screen.quiet = results.quiet = True


def visible(text: str) -> str:
    """The text in one line, with control characters escaped as in Python's `repr`."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


@contextmanager
def training_bar(steps: int, what: str = "training") -> Iterator[Any]:
    """A progress bar of training, with the loss; yields the `on_step` that moves it.

    There are `steps` at most: a training that ends before has a full bar too. It is not shown
    before the first step: what comes before that says itself what it is.
    """
    with _bar(what, steps, waits=True) as (task, update):

        def on_step(step: Step) -> None:
            # Where learning stops early, there are fewer steps than at first.
            update(completed=step.step, total=step.steps, words=f"loss {step.loss:.3f}")

        yield on_step
        if 0 < task.completed < steps:
            words = f"{task.fields['words']} (ended before {steps})"
            update(total=task.completed, words=words)


@contextmanager
def training_bar_of_many(steps: Mapping[str, int]) -> Iterator[Any]:
    """A progress bar of training many tasks, one after the other, in the order of `steps`.

    `steps` has the most steps of each; `on_step` gets a task's name and its step.
    """
    words = f"steps, {{}} of {len(steps)} tasks done"
    place = {name: number for number, name in enumerate(steps)}
    # The most steps of the tasks from each place on.
    rest = [0]
    for most in reversed([*steps.values()]):
        rest.insert(0, rest[0] + most)
    taken: dict[str, int] = {}
    with _bar("training", rest[0], waits=True) as (task, update):

        def on_step(name: str, step: Step) -> None:
            last = taken.get(name, 0)
            taken[name] = step.step
            completed = int(task.completed) + step.step - last
            # A task before this one has ended, whether it took all its steps or not.
            total = completed - step.step + step.steps + rest[place[name] + 1]
            done = place[name] + (step.step == step.steps)
            update(completed=completed, total=total, words=words.format(done))

        yield on_step
        update(total=task.completed, words=words.format(len(steps)))


@contextmanager
def counting_bar(what: str, total: int) -> Iterator[Any]:
    """A progress bar over examples; yields the callback that advances it."""
    with _bar(what, total) as (_, update):
        yield lambda done: update(advance=done)


@contextmanager
def passing_bar(what: str, total: int | None) -> Iterator[Any]:
    """As `counting_bar`, gone at the end; the bar of what has no parts only moves."""
    with _bar(what, total, passes=True) as (_, update):
        yield lambda done: update(advance=done)


class _Count(MofNCompleteColumn):
    """`7/20`, where there is something to count."""

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else super().render(task)


class _Left(TimeRemainingColumn):
    """How much time is left, by the speed of the last seconds, where that is known."""

    def render(self, task: Task) -> Text:
        if task.finished or task.time_remaining is None:
            return Text()
        return Text(f"{super().render(task)} left", style="progress.remaining")


# What is shown now: a terminal has room for one display, which holds all bars.
_display: Progress | None = None


@contextmanager
def _displayed() -> Iterator[Progress]:
    """The display, begun by the outermost of those who ask for it."""
    global _display
    if _display is not None:
        yield _display
        return
    columns = [TextColumn("{task.description}", markup=False), BarColumn(24), _Count()]
    columns += [TextColumn("{task.fields[words]}", markup=False), TimeElapsedColumn(), _Left()]
    _display = progress = Progress(*columns, console=screen)
    try:
        with progress if screen.is_interactive else nullcontext():
            try:
                yield progress
                progress.live.transient = not any(task.visible for task in progress.tasks)
            except BaseException:
                # The error follows in one line; the bars are removed.
                progress.live.transient = True
                raise
    finally:
        _display = None


@contextmanager
def _bar(
    what: str, total: int | None, *, passes: bool = False, waits: bool = False
) -> Iterator[tuple[Task, Callable[..., None]]]:
    """Show a bar; yields its task, and what updates the task and shows it.

    One that `passes` is gone at the end, one that `waits` comes with the first update.
    """
    said = time.monotonic()
    with _displayed() as progress:
        number = progress.add_task(
            visible(what), total=total, words="", start=not waits, visible=not waits
        )
        task = next(task for task in progress.tasks if task.id == number)

        def update(**changed: Any) -> None:
            nonlocal said
            progress.start_task(number)
            progress.update(number, visible=True, **changed)
            # A log would show a bar only at the end, so it gets lines.
            if not screen.is_interactive and time.monotonic() - said >= SECONDS_A_LINE:
                said = time.monotonic()
                _print_line(progress, task)

        # What counts nothing has no updates, and is to be in a log too where it takes long.
        late = threading.Timer(SECONDS_A_LINE, _print_line, (progress, task))
        late.daemon = True
        if total is None and not screen.is_interactive:
            late.start()
        try:
            yield task, update
        finally:
            late.cancel()
            if passes:
                progress.remove_task(number)


def _print_line(progress: Progress, task: Task) -> None:
    columns = [c for c in progress.columns if isinstance(c, ProgressColumn)]
    words = [str(c.render(task)) for c in columns if not isinstance(c, BarColumn)]
    shown = " ".join(word for word in words if word)
    screen.print(shown, markup=False, highlight=False, soft_wrap=True)


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
