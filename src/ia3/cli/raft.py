"""`ia3 raft`: the RAFT benchmark, cross-validated and submitted."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import IA3Error, counted
from ..files.atomic import check_folder, write_file
from ..files.tables import write_table
from ..report.console import counting_bar, results, table_of
from . import options
from .options import given, print_json, say, silence_loading

if TYPE_CHECKING:
    from ..experiments.raft import PublicScore, RaftScore

BANKING = "banking_77"
RESULTS = "results.jsonl"
MEAN = "mean"


class _Sites(StrEnum):
    ALL_LINEAR = "all-linear"
    PAPER = "paper"


def raft(
    data: Annotated[Path, typer.Option(help="Folder with a folder for each task.")],
    out: Annotated[
        Path, typer.Option(help="Folder for the results; the same command goes on where it was.")
    ] = Path("ia3-raft"),
    model: options.BaseModelName = options.DEFAULT_MODEL,
    methods: Annotated[
        str, typer.Option(help="Of majority, zero-shot, icl and tfew, with commas between.")
    ] = "majority,zero-shot,icl,tfew",
    task: Annotated[
        list[str] | None, typer.Option(help="May be given several times; all if absent.")
    ] = None,
    folds: Annotated[
        int, typer.Option(help="Of 10 examples that are held out; 5 are all.", min=1, max=5)
    ] = 5,
    steps: options.Steps = 1000,
    batch_size: options.BatchSize = 8,
    learning_rate: options.LearningRate = 3e-3,
    sites: Annotated[
        _Sites,
        typer.Option(
            help="Where vectors are put: at all linear layers, or where the paper has them."
        ),
    ] = _Sites.ALL_LINEAR,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="Longer prompts are cut; by the model if absent.", min=1)
    ] = None,
    seed: options.Seed = 0,
    submit: Annotated[
        bool, typer.Option(help="Predict the test sets too, with tfew, in the benchmark's form.")
    ] = True,
    banking77: Annotated[
        Path | None, typer.Option(help="Folder with Banking77's CSV files, to score its test set.")
    ] = None,
    device: options.Device = "auto",
    dtype: options.DType = "auto",
    as_json: options.Json = False,
) -> None:
    """Score T-Few and its rivals on RAFT, and write a submission."""
    # Imported here, so that a missing matplotlib is an error now and not after hours.
    from ..report import plotting  # noqa: F401

    if out.is_dir() and any(out.iterdir()) and not (out / RESULTS).is_file():
        raise IA3Error(f"{out} exists already, and is not a RAFT run's: choose another --out")
    check_folder(out)
    silence_loading()
    from ..experiments import raft as experiment
    from ..experiments.raft_data import public_labels, read_raft
    from ..tfew import TFewConfig

    rate = given(learning_rate=learning_rate)
    recipe = TFewConfig(steps=steps, batch_size=batch_size, seed=seed, **rate)
    settings = experiment.RaftSettings(recipe, sites.value, max_prompt_tokens)
    chosen = experiment.parse_methods(methods)
    submit = submit and "tfew" in chosen
    tasks = read_raft(data, task or ())
    truth: Sequence[str | None] = ()
    if banking77 is not None:
        submitted = [one for one in tasks if submit and one.name == BANKING]
        if not submitted:
            problem = f"scores tfew's submission of {BANKING}, which this run does not make"
            raise typer.BadParameter(problem, param_hint="--banking77")
        truth = public_labels(submitted[0], banking77)
    from ..base.loading import load_base_model

    base = load_base_model(model, device=device, dtype=dtype)
    scores: list[RaftScore] = []
    for one in tasks:
        with counting_bar(one.name, experiment.work(one, settings, chosen, folds)) as progress:
            of_task = experiment.cross_validate(
                base, one, settings, methods=chosen, folds=folds, results=out, progress=progress
            )
        scores += of_task
        if not as_json:
            say(f"{one.name}: {', '.join(f'{s.method} {s.macro_f1:.1%}' for s in of_task)}")
    write_file(out / "table.md", _markdown(scores, None).encode())
    write_file(out / "raft.png", _figure(scores))
    public: PublicScore | None = None
    for one in tasks if submit else ():
        with counting_bar(f"{one.name}, submission", steps + len(one.test)) as progress:
            predicted = experiment.submission(base, one, settings, results=out, progress=progress)
        answered = zip(one.test, predicted, strict=True)
        rows = [{"ID": row["ID"], "Label": label} for row, label in answered]
        path = out / "submission" / one.name / "predictions.csv"
        write_table(rows, path, as_json=False)
        if not as_json:
            say(f"{one.name}: {counted(len(rows), 'prediction')} in {path}")
        if one.name == BANKING and truth:
            public = experiment.public_score(truth, predicted)
            write_file(out / "table.md", _markdown(scores, public).encode())
    if as_json:
        print_json(
            scores=[{n: v for n, v in vars(score).items() if v != ()} for score in scores],
            mean={m: _mean(scores, m, "macro_f1") for m in chosen},
            submission=str(out / "submission") if submit else None,
            banking77=None if public is None else vars(public),
        )
        return
    header, *body, means = _rows(scores, "macro_f1")
    table = table_of(header, body, title="RAFT, macro F1", caption=_caption(scores))
    table.add_section()
    table.add_row(*means)
    results.print(table)
    if public is not None:
        results.print(_said(public), markup=False, highlight=False)


def _rows(scores: Sequence[RaftScore], what: str) -> list[list[str]]:
    """A header, one row a task, and their mean, in percent."""
    methods = list(dict.fromkeys(score.method for score in scores))
    by_place = {(score.task, score.method): score for score in scores}
    names = list(dict.fromkeys(score.task for score in scores))
    body = [[name, *(_cell(by_place[name, m], what) for m in methods)] for name in names]
    means = [f"{100 * _mean(scores, m, what):.1f}" for m in methods]
    return [["task", *methods], *body, [MEAN, *means]]


def _cell(score: RaftScore, what: str) -> str:
    shown = f"{100 * getattr(score, what):.1f}"
    if score.method != "icl":
        return shown
    fewest, most = min(score.demonstrations), max(score.demonstrations)
    return f"{shown} ({fewest if fewest == most else f'{fewest}-{most}'})"


def _mean(scores: Sequence[RaftScore], method: str, what: str) -> float:
    of_method = [getattr(score, what) for score in scores if score.method == method]
    return float(sum(of_method) / len(of_method))


def _caption(scores: Sequence[RaftScore]) -> str:
    held = sorted({score.examples for score in scores})
    counts = f"{held[0]} to {held[-1]}" if len(held) > 1 else str(held[0])
    icl = any(score.method == "icl" for score in scores)
    shown = " In brackets: demonstrations in the prompt." if icl else ""
    return f"In percent, over {counts} held-out examples a task.{shown}"


def _said(public: PublicScore) -> str:
    return (
        f"{BANKING}, test set: macro F1 {public.macro_f1:.1%}, accuracy {public.accuracy:.1%}, "
        f"{public.matched} of {counted(public.rows, 'label')} known"
    )


def _markdown(scores: Sequence[RaftScore], public: PublicScore | None) -> str:
    from ..report.comparison import markdown_table

    parts = ["# RAFT", _caption(scores)]
    for title, what in (("Macro F1", "macro_f1"), ("Accuracy", "accuracy")):
        header, *body = _rows(scores, what)
        parts += [f"## {title}", markdown_table(header, body).rstrip()]
    if public is not None:
        parts += ["## Public labels", f"{_said(public)}."]
    return "\n\n".join(parts) + "\n"


def _figure(scores: Sequence[RaftScore]) -> bytes:
    """A bar for each task and method, as a PNG."""
    from matplotlib.figure import Figure

    from ..report.plotting import saved

    names = list(dict.fromkeys(score.task for score in scores))
    methods = list(dict.fromkeys(score.method for score in scores))
    figure = Figure(figsize=(2.5 + 1.1 * len(names), 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(methods)
    for number, method in enumerate(methods):
        heights = [100 * score.macro_f1 for score in scores if score.method == method]
        places = [i + (number - (len(methods) - 1) / 2) * width for i in range(len(names))]
        axes.bar(places, heights, width, label=method)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_ylim(0, 100)
    axes.set_ylabel("macro F1, %")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return saved(figure)
