"""`ia3 check`: what is wrong with labelled texts, before anything is trained on them."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.text import Text

from ..errors import counted
from ..files.rows import read_rows
from ..report.console import print_rows, results, visible
from . import options
from .labelled import check_columns, findings_in
from .multilabel import label_lists
from .options import print_json


def check(
    data: Annotated[str, typer.Argument(metavar="FILE", help=f"Labelled texts: {options.SOURCES}")],
    test: Annotated[
        str | None, typer.Option(help="Labelled texts to be tested on, to compare with.")
    ] = None,
    text: options.TextColumns = ["text"],  # noqa: B006
    label: options.LabelColumn = "label",
    multilabel: options.Multilabel = None,
    split: options.Split = "train",
    test_split: options.Split = "test",
    subset: options.Subset = None,
    max_words: options.MaxWords = options.MAX_WORDS,
    strict: options.Strict = False,
    as_json: options.Json = False,
) -> None:
    """Look for mistakes in labelled texts: copies, contradictions, classes of unequal size, ...

    With --strict the exit code is 1 where something is found.
    """
    check_columns(text, label)
    columns: Any = {"subset": subset, "text": text, "label": label}
    columns["multilabel"] = multilabel is not None
    with warnings.catch_warnings(action="ignore"):  # of empty texts, which are found below
        rows = read_rows(data, split=split, **columns)
        tests = [] if test is None else read_rows(test, split=test_split, **columns)
    if multilabel is None:
        known, asked = ([[row[label]] for row in some] for some in (rows, tests))
    else:
        known, asked = (label_lists(some, label, multilabel) for some in (rows, tests))
    findings = findings_in(rows, text, known, tests, asked, max_words)
    counts, of_tests = (
        Counter(str(each) for own in some for each in own) for some in (known, asked)
    )
    labels = [*counts, *(name for name in of_tests if name not in counts)]
    if as_json:
        print_json(
            examples=len(rows),
            tests=len(tests),
            labels={name: counts[name] for name in labels},
            test_labels={name: of_tests[name] for name in labels} if tests else {},
            findings=[asdict(finding) for finding in findings],
        )
    else:
        header = ("label", "texts", "test texts")[: 3 if tests else 2]
        lines = [(name, f"{counts[name]:,}", f"{of_tests[name]:,}") for name in labels]
        print_rows("", header, [line[: len(header)] for line in lines])
        for finding in findings:
            results.print(Text.assemble((finding.kind, "yellow"), ": ", visible(finding.message)))
        count = counted(len(findings), "problem") if findings else "no problem"
        what = [counted(len(rows), "text"), *([counted(len(tests), "test text")] if tests else [])]
        results.print(f"{' and '.join(what)}: {count} found", highlight=False)
    if strict and findings:
        raise typer.Exit(1)
