"""`ia3 pretrain` and `ia3 convert`: vectors for new tasks to begin with, trained or taken over."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import counted
from ..report.console import counting_bar, screen, table_of, training_bar
from . import options
from .options import check_out, given, report, silence_loading, write_adapter

if TYPE_CHECKING:
    from ..tfew.training.trainer import TrainingStep


def pretrain(
    manifest: Annotated[
        Path, typer.Argument(help="YAML file that names the tasks, their data and templates.")
    ],
    out: options.AdapterOut,
    model: options.BaseModelName = options.DEFAULT_MODEL,
    steps: options.Steps = 1000,
    batch_size: options.BatchSize = 16,
    learning_rate: options.LearningRate = 0.003,
    cap: Annotated[
        int, typer.Option(help="A task of more examples counts as one of so many.", min=1)
    ] = 500_000,
    seed: options.Seed = 0,
    checkpoints: options.Checkpoints = None,
    max_tokens: options.MaxTokens = None,
    shard: options.Shard = False,
    device: options.Device = "auto",
    dtype: options.DType = "auto",
    force: options.ReplaceAdapter = False,
    as_json: options.Json = False,
) -> None:
    """Train vectors on a mixture of tasks, for new tasks to begin with."""
    check_out(out, force, checkpoints)
    silence_loading()
    from ..base.loading import load_base_model
    from ..base.sharding import is_asked
    from ..tfew import TFewConfig
    from ..tfew.prompts.manifest import read_manifest
    from ..tfew.training.pretraining import mixing_rates, pretrain as train_mixture

    settings = given(learning_rate=learning_rate, max_tokens=max_tokens)
    config = TFewConfig(steps=steps, batch_size=batch_size, seed=seed, **settings)
    tasks = read_manifest(manifest)
    rates = mixing_rates({task.name: len(task.train) for task in tasks}, cap)
    names = ("task", "examples", "templates", "rate")
    counts = [(t.name, len(t.train), len(t.templates), rates[t.name]) for t in tasks]
    mixture = [dict(zip(names, of_task, strict=True)) for of_task in counts]
    if not as_json:
        rows = [[name, f"{n:,}", str(templates), f"{r:.1%}"] for name, n, templates, r in counts]
        screen.print(table_of(names, rows))
    base = load_base_model(model, device=device, dtype=dtype, shard=is_asked(shard or None))
    started = time.perf_counter()
    show: Any = None
    final_loss = None
    with ExitStack() as bar:

        def on_step(step: TrainingStep) -> None:
            nonlocal show, final_loss
            if show is None:
                # The terminal shows one bar at a time, and encoding is done.
                bar.close()
                show = bar.enter_context(training_bar(steps))
            final_loss = step.loss
            show(step)

        progress = bar.enter_context(counting_bar("encoding", sum(n for _, n, _, _ in counts)))
        more: dict[str, Any] = {"cap": cap, "checkpoints": checkpoints}
        adapter = train_mixture(base, tasks, config, on_step=on_step, progress=progress, **more)
    seconds = time.perf_counter() - started
    size = write_adapter(out, adapter)
    report(
        as_json,
        f"Trained on {counted(len(tasks), 'task')} in {seconds:.0f} s; "
        f"{size / 1024:.0f} KiB in {out}",
        adapter=str(out),
        tasks=mixture,
        steps=steps,
        # A checkpoint of the last step leaves no step to take, and no loss to tell.
        final_loss=final_loss,
        adapter_bytes=size,
        seconds=round(seconds, 2),
    )


def convert(
    file: Annotated[Path, typer.Argument(help="A .pt file of the T-Few authors' code.")],
    model: Annotated[
        str,
        typer.Option(help="T5 it is for, as bigscience/T0_3B; only its config.json is read."),
    ],
    out: options.AdapterOut,
    force: options.ReplaceAdapter = False,
    as_json: options.Json = False,
) -> None:
    """Convert an adapter of the T-Few authors' code into PEFT's two files."""
    check_out(out, force)
    silence_loading()
    from ..adapter.convert import convert_tfew_authors, structure_of
    from ..adapter.files import Adapter

    config, vectors = convert_tfew_authors(file, structure_of(model))
    config = replace(config, base_model_name_or_path=model, inference_mode=True)
    size = write_adapter(out, Adapter(config, vectors))
    values = sum(vector.numel() for vector in vectors.values())
    count = f"{counted(len(vectors), 'vector')} of {counted(values, 'value')}"
    said = f"{count}; {size / 1024:.0f} KiB in {out}"
    report(as_json, said, adapter=str(out), vectors=len(vectors), values=values, adapter_bytes=size)
