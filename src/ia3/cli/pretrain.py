"""`ia3 pretrain`: vectors for new tasks to begin with."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ..files.atomic import check_folder, write_files
from ..report.console import counting_bar, screen, training_bar
from .options import (
    DEFAULT_MODEL,
    Checkpoints,
    Device,
    DType,
    Json,
    MaxTokens,
    ReplaceAdapter,
    check_out,
    positive,
    print_json,
    say,
    silence_loading,
)

if TYPE_CHECKING:
    from ..tfew.prompts.tasks import Task
    from ..tfew.training.trainer import TrainingStep


def pretrain(
    manifest: Annotated[
        Path, typer.Argument(help="YAML file that names the tasks, their data and templates.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the adapter.")],
    model: Annotated[str, typer.Option(help="Model name, folder or hub id.")] = DEFAULT_MODEL,
    steps: Annotated[int, typer.Option(help="Training steps; 100,000 in the paper.", min=1)] = 1000,
    batch_size: Annotated[int, typer.Option(help="Examples a step.", min=1)] = 16,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate; 0.003 if absent.", callback=positive)
    ] = None,
    cap: Annotated[
        int | None,
        typer.Option(help="A task of more examples counts as one of so many; 500,000.", min=1),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.", min=0, max=2**32 - 1)] = 0,
    checkpoints: Checkpoints = None,
    max_tokens: MaxTokens = None,
    device: Device = "auto",
    dtype: DType = "auto",
    force: ReplaceAdapter = False,
    as_json: Json = False,
) -> None:
    """Train vectors on a mixture of tasks, for new tasks to begin with."""
    check_out(out, force)
    check_folder(out)
    if checkpoints is not None:
        check_folder(checkpoints)
    silence_loading()
    from ..adapter.layout import WEIGHTS_NAME
    from ..adapter.store import adapter_files
    from ..base.loading import load_base_model
    from ..tfew import TFewConfig
    from ..tfew.prompts.manifest import read_manifest
    from ..tfew.training.pretraining import CAP, mixing_rates
    from ..tfew.training.pretraining import pretrain as train_mixture

    given = {"learning_rate": learning_rate, "max_tokens": max_tokens}
    config = TFewConfig(
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
    )
    cap = CAP if cap is None else cap
    tasks = read_manifest(manifest)
    rates = mixing_rates({task.name: len(task.train) for task in tasks}, cap)
    if not as_json:
        _print_mixture(tasks, rates)
    base = load_base_model(model, device=device, dtype=dtype)
    last: TrainingStep | None = None
    show: Any = None
    started = time.perf_counter()
    with ExitStack() as bar:

        def on_step(step: TrainingStep) -> None:
            nonlocal last, show
            if last is None:
                # One bar at a time: encoding is done.
                bar.close()
                show = bar.enter_context(training_bar(steps))
            last = step
            show(step)

        progress = bar.enter_context(
            counting_bar("encoding", sum(len(task.train) for task in tasks))
        )
        adapter = train_mixture(
            base,
            tasks,
            config,
            cap=cap,
            on_step=on_step,
            checkpoints=checkpoints,
            progress=progress,
        )
    seconds = time.perf_counter() - started
    files = adapter_files(adapter)
    write_files(out, files)
    size = len(files[WEIGHTS_NAME])
    if as_json:
        print_json(
            adapter=str(out),
            tasks=_mixture(tasks, rates),
            steps=steps,
            # Nothing was left to do in this call where a checkpoint is at the end already.
            final_loss=None if last is None else last.loss,
            adapter_bytes=size,
            seconds=round(seconds, 2),
        )
    else:
        say(f"Trained on {len(tasks)} tasks in {seconds:.0f} s; {size / 1024:.0f} KiB in {out}")


def _mixture(tasks: Sequence[Task], rates: Mapping[str, float]) -> list[dict[str, Any]]:
    return [
        {
            "task": task.name,
            "examples": len(task.train),
            "templates": len(task.templates),
            "rate": rates[task.name],
        }
        for task in tasks
    ]


def _print_mixture(tasks: Sequence[Task], rates: Mapping[str, float]) -> None:
    table = Table("task")
    for column in ("examples", "templates", "rate"):
        table.add_column(column, justify="right")
    for row in _mixture(tasks, rates):
        table.add_row(
            Text(row["task"]), f"{row['examples']:,}", str(row["templates"]), f"{row['rate']:.1%}"
        )
    screen.print(table)
