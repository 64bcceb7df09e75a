"""`ia3 fit-many`: classifiers of many tasks, one after the other."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base.processes import processes
from ..errors import IA3Error
from ..files.atomic import check_folder
from ..report.console import print_rows, training_bar_of_many
from .labelled import check_choices, field_of, findings_in, label_named, warn_of
from .options import (
    Device,
    DType,
    Json,
    MaxTokens,
    Threads,
    fitted_with,
    print_json,
    silence_loading,
)

if TYPE_CHECKING:
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
    threads: Threads = None,
    device: Device = "auto",
    dtype: DType = "auto",
    as_json: Json = False,
) -> None:
    """Train adapters of many tasks, one after the other, each as 'ia3 fit' would."""
    check_folder(out)
    silence_loading()
    from ..classify.estimator import FewShotClassifier
    from ..classify.fit_many import FittedTasks, fit_many as fit
    from ..classify.many_manifest import read_many_manifest

    models, tasks = read_many_manifest(manifest)
    data, classifiers, failures = {}, {}, {}
    for name, task in tasks.items():
        try:
            texts, labels, choices = _read(name, task)
        except IA3Error as error:
            failures[name] = error
            continue
        data[name] = texts, labels
        classifiers[name] = FewShotClassifier(
            **models,
            choices=choices,
            device=device,
            dtype=dtype,
            threads=threads,
            **task.settings,
        )
    started = time.perf_counter()
    fitted = FittedTasks({}, {})
    if data:
        # Of several processes each fits a part.
        steps = {name: classifiers[name].steps for name in processes().own(list(classifiers))}
        with training_bar_of_many(steps) as on_step:
            fitted = fit(data, classifiers, out=out, on_step=on_step, max_tokens=max_tokens)
    failures |= fitted.failures
    results: list[dict[str, Any]] = []
    rows = []
    for name in tasks:
        count = len(data[name][0]) if name in data else None
        results.append({"task": name, "examples": count})
        if name in failures:
            problem = results[-1]["error"] = str(failures[name])
            rows.append([name, problem, "-", "-" if count is None else str(count), "-", "-"])
            continue
        classifier, adapter = fitted.classifiers[name], str(out / name)
        history = classifier.history_
        loss = history[-1].loss if history else None
        results[-1] |= fitted_with(classifier)
        results[-1] |= {"steps": len(history), "final_loss": loss, "adapter": adapter}
        shown = "-" if loss is None else f"{loss:.3f}"
        numbers = [str(count), str(len(history)), shown]
        rows.append([name, adapter, classifier.engine_, *numbers])
    if as_json:
        print_json(tasks=results, seconds=round(time.perf_counter() - started, 2))
    else:
        header = ("task", "adapter, or what is wrong", "engine", "examples", "steps", "last loss")
        print_rows("", header, rows, names=2)
    # A launcher ends all as soon as one is not 0: the first one is, when it has printed.
    if failures and processes().is_first:
        raise typer.Exit(1)


def _read(name: str, task: TaskToFit) -> tuple[list[Any], list[Any], dict[Any, str] | None]:
    """A task's texts, labels, and words by label; says what is wrong with the data."""
    from ..files.rows import read_rows, source_of
    from ..files.tables import fields_of

    source = str(source_of(task.folder, task.data))
    rows = read_rows(source, split=task.split, subset=task.subset, text=task.text, label=task.label)
    labels = [row[task.label] for row in rows]
    choices = task.choices and {label_named(k, labels): w for k, w in task.choices.items()}
    if choices:
        check_choices(choices, labels, "choices")
    words = choices.values() if choices else map(str, {*labels})
    warn_of(findings_in(rows, task.text, labels), of=f"task {name!r}: ")
    field = field_of(rows, task.text, task.settings.get("template"), words)
    return fields_of(rows, task.text, field), labels, choices
