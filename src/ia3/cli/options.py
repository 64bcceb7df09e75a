"""What commands have in common: their options, and how they speak."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from ..base.embedded import EMBEDDED_MODEL
from ..errors import IA3Error
from ..files.atomic import write_stdout
from ..report.console import screen, visible

DEFAULT_MODEL = EMBEDDED_MODEL


def positive(value: float | None) -> float | None:
    """Refuse a number that is not above 0."""
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter(f"{value} is not a number above 0")
    return value


Source = Annotated[
    str,
    typer.Option(
        "--data",
        help="CSV, TSV or JSON Lines file in UTF-8, Parquet file, folder of the datasets library, "
        "or name on the hub.",
    ),
]
Split = Annotated[
    str, typer.Option(help="Split of the data, of such a folder or name that has several.")
]
Subset = Annotated[
    str | None, typer.Option(help="Subset of the data, of a name on the hub that has several.")
]
TextColumns = Annotated[
    list[str], typer.Option("--text", help="Column with the text; give several for several fields.")
]
LabelColumn = Annotated[str, typer.Option("--label", help="Column with the label.")]
Model = Annotated[
    str | None, typer.Option(help="Model name, folder or hub id; the adapter's own by default.")
]
Device = Annotated[str, typer.Option(help="'auto', 'cpu', 'cuda', ...")]
DType = Annotated[str, typer.Option(help="'auto', 'float32', 'bfloat16', ...")]
MaxTokens = Annotated[
    int | None, typer.Option(help="Computed at once; lower it where memory runs out.", min=1)
]
Checkpoints = Annotated[
    Path | None,
    typer.Option(help="Folder for checkpoints; the same command goes on from the last one."),
]
ReplaceAdapter = Annotated[
    bool, typer.Option("--force", help="Replace the adapter in a folder that exists.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


def check_out(out: Path, force: bool) -> None:
    """Refuse to replace what exists, unless told to."""
    if out.exists() and not force:
        raise IA3Error(f"{out} exists already: choose another --out, or give --force")


def silence_loading() -> None:
    """Keep transformers from drawing a bar for every model it loads from the disk.

    Downloads keep theirs where somebody watches: they take minutes.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    downloads = screen.is_terminal and not are_progress_bars_disabled()
    logging.disable_progress_bar()
    if downloads:
        enable_progress_bars()


def print_json(**values: Any) -> None:
    """One JSON object on standard output."""
    # A name of a file that is not UTF-8 becomes escapes, which are JSON's too.
    text = json.dumps(values, ensure_ascii=False)
    write_stdout(f"{text}\n".encode(errors="backslashreplace"))


def say(message: str, kind: str = "", style: str = "") -> None:
    """One line on standard error."""
    line = visible(" ".join(message.splitlines()))
    screen.print(Text.assemble((kind, style), " " if kind else "", line), soft_wrap=True)
