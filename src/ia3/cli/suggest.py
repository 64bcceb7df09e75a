"""`ia3 suggest`: which texts of a file to label next."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..files.rows import read_rows
from ..files.tables import delimiter_of, write_table
from ..report.console import counting_bar
from . import options
from .labelled import check_added, examples_for, read_task, with_predictions
from .options import check_table, load_classifier, say


def suggest(
    adapter: options.FittedAdapter,
    data: options.Source,
    number: Annotated[int, typer.Option(help="How many texts.", min=1)] = 10,
    text: options.TextColumns = ["text"],  # noqa: B006
    split: options.Split = "train",
    subset: options.Subset = None,
    out: options.TableOut = None,
    model: options.Model = None,
    max_tokens: options.MaxTokens = None,
    device: options.Device = "auto",
    dtype: options.DType = "auto",
    force: options.ReplaceFiles = False,
    as_json: options.JsonLines = False,
) -> None:
    """Choose the texts to label next: those that stand for many the classifier is unsure of.

    Prints their rows, the most instructive one first, with 'prediction' and 'probability'.

    Correct the predictions, call the column 'label', and train on these rows too.
    """
    check_table(out, as_json, force)
    rows = read_rows(data, split=split, subset=subset, text=text)
    check_added(rows, "suggest")
    task = read_task(adapter)
    examples = examples_for(adapter, task, rows, text)
    classifier = load_classifier(adapter, model, max_tokens, device, dtype)
    from ..classify.suggest import suggest as suggested

    with counting_bar("reading", len(rows) * len(classifier.templates_)) as progress:
        found = suggested(classifier, examples, number, progress=progress)
    if len(found) < number:
        say(f"{data} has {len(found):,} different texts: these are all")
    chosen = [rows[each.row] for each in found]
    surest = [each.probability for each in found]
    labels: list[Any] = [each.label for each in found]
    if classifier.multilabel_ and not (as_json if out is None else delimiter_of(out) is None):
        labels = [";".join(map(str, several)) for several in labels]  # as fit and predict have them
    write_table(with_predictions(chosen, labels, surest), out, as_json=as_json)
