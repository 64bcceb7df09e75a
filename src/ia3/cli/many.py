"""`ia3 fit-many`: classifiers of many tasks, trained in the same batches."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import IA3Error
from ..files.atomic import check_folder
from ..report.console import training_bar_of_many, visible
from .labelled import label_named, read_source
from .options import Device, DType, Json, MaxTokens, print_json, silence_loading

if TYPE_CHECKING:
    from ..classify.fit_many import FittedTasks
    from ..classify.many_manifest import TaskToFit


def fit_many(
    manifest: Annotated[
        Path, typer.Argument(help="YAML file that names the model, the tasks and their data.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for the adapters, each under its task's name. The same command trains "
            "what is not there yet."
        ),
    ],
    max_tokens: MaxTokens = None,
    device: Device = "auto",
    dtype: DType = "auto",
    as_json: Json = False,
) -> None:
    """Train adapters of many tasks at once, each as 'ia3 fit' would."""
    check_folder(out)
    silence_loading()
    from ..classify.fit_many import fit_many as fit
    from ..classify.many_manifest import read_many_manifest

    model, tasks = read_many_manifest(manifest)
    data, settings, failures = _read(tasks)
    classifiers = _classifiers(settings, model=model, device=device, dtype=dtype)
    started = time.perf_counter()
    fitted: FittedTasks | None = None
    if data:
        steps = {name: classifier.steps for name, classifier in classifiers.items()}
        with training_bar_of_many(steps) as on_step:
            fitted = fit(data, classifiers, out=out, on_step=on_step, max_tokens=max_tokens)
        failures |= fitted.failures
    results = [_result(name, out, data, fitted, failures) for name in tasks]
    if as_json:
        print_json(tasks=results, seconds=round(time.perf_counter() - started, 2))
    else:
        Console(emoji=False).print(_table(results))
    if failures:
        raise typer.Exit(1)


def _read(
    tasks: Mapping[str, TaskToFit],
) -> tuple[dict[str, tuple[Any, Any]], dict[str, dict[str, Any]], dict[str, Exception]]:
    """Texts and labels, and the classifiers' settings, by task; and why some have none."""
    from ..files.rows import source_of
    from ..files.tables import fields_of

    data, settings = {}, {}
    failures: dict[str, Exception] = {}
    for name, task in tasks.items():
        try:
            source = str(source_of(task.folder, task.data))
            rows = read_source(source, task.split, task.subset, task.text, task.label)
            labels = [row[task.label] for row in rows]
            choices = None
            if task.choices is not None:
                choices = {label_named(k, labels): words for k, words in task.choices.items()}
        except (IA3Error, FileNotFoundError) as error:
            failures[name] = error
            continue
        data[name] = fields_of(rows, task.text), labels
        settings[name] = {"choices": choices, **task.settings}
    return data, settings, failures


def _classifiers(settings: Mapping[str, Mapping[str, Any]], **common: Any) -> dict[str, Any]:
    from ..classify.estimator import FewShotClassifier

    return {name: FewShotClassifier(**common, **own) for name, own in settings.items()}


def _result(
    name: str,
    out: Path,
    data: Mapping[str, tuple[Sequence[Any], Any]],
    fitted: FittedTasks | None,
    failures: Mapping[str, Exception],
) -> dict[str, Any]:
    examples = len(data[name][0]) if name in data else None
    if name in failures:
        return {"task": name, "examples": examples, "error": str(failures[name])}
    assert fitted is not None
    history = fitted.classifiers[name].history_
    return {
        "task": name,
        "examples": examples,
        "steps": len(history),
        "final_loss": history[-1].loss if history else None,
        "adapter": str(out / name),
    }


def _table(results: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("task")
    for column in ("examples", "steps", "last loss"):
        table.add_column(column, justify="right")
    table.add_column("adapter, or what is wrong", overflow="fold")
    for result in results:
        loss = result.get("final_loss")
        end = visible(result.get("adapter") or result["error"])
        table.add_row(
            Text(visible(result["task"])),
            *("" if result.get(key) is None else str(result[key]) for key in ("examples", "steps")),
            "" if loss is None else f"{loss:.3f}",
            Text(end, "red" if "error" in result else ""),
        )
    return table
