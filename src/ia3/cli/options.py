"""Options that several commands have, checks before they run, and their output."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from ..base.embedded import EMBEDDED_ENCODER, EMBEDDED_MODEL
from ..errors import IA3Error
from ..files.atomic import check_file, check_folder, holds_nothing, write_stdout
from ..files.saved import WEIGHTS_NAME
from ..report.console import screen, visible

if TYPE_CHECKING:
    from ..adapter.files import Adapter
    from ..classify.estimator import FewShotClassifier

DEFAULT_MODEL = EMBEDDED_MODEL
DEFAULT_ENCODER = EMBEDDED_ENCODER


def positive(value: float | None) -> float | None:
    """Refuse a number that is not above 0."""
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter(f"{value} is not a number above 0")
    return value


_SOURCES = (
    "CSV, TSV, JSON Lines or Parquet file, folder of the datasets library, or name on the hub."
)
Source = Annotated[str, typer.Option("--data", help=_SOURCES)]
Split = Annotated[str, typer.Option(help="Split, of a folder or name that has several.")]
Subset = Annotated[str | None, typer.Option(help="Subset, of a name that has several.")]
TextColumns = Annotated[
    list[str], typer.Option("--text", help="Column with the text; give several for several fields.")
]
LabelColumn = Annotated[str, typer.Option("--label", help="Column with the label.")]
Choices = Annotated[
    list[str] | None,
    typer.Option(help="LABEL=WORDS for a language model to rank; once a label."),
]
Template = Annotated[
    list[str] | None,
    typer.Option(
        help="Jinja prompt template; may be given several times. It names the text columns; one "
        "alone is {{ text }}, whatever its name. In bash, $'...' takes \\n as a new line."
    ),
]
BaseModelName = Annotated[str, typer.Option(help="Language model's name, folder or hub id.")]
FittedModel = Annotated[
    str,
    typer.Option(
        help="Sentence encoder or language model to train: a name, folder or hub id; 'auto' takes "
        "the one of the two that promises more on the examples."
    ),
]
Encoder = Annotated[str, typer.Option(help="The sentence encoder of 'auto'.")]
LanguageModel = Annotated[str, typer.Option(help="The language model of 'auto'.")]
Model = Annotated[
    str | None, typer.Option(help="Model name, folder or hub id; the adapter's own by default.")
]
AdapterOut = Annotated[Path, typer.Option(help="Folder for the adapter.")]
Steps = Annotated[int, typer.Option(help="Training steps.", min=1)]
MostSteps = Annotated[
    int, typer.Option(help="The most training steps; 0 is the untuned model.", min=0)
]
LearningRate = Annotated[float | None, typer.Option(help="Peak learning rate.", callback=positive)]
Seed = Annotated[int, typer.Option(help="Of all draws.", min=0, max=2**32 - 1)]
BatchSize = Annotated[int, typer.Option(help="Examples a step.", min=1)]
Threads = Annotated[
    int | None,
    typer.Option(help="Of a training step on a CPU; one or all, whichever is faster.", min=1),
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
ReplaceFiles = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]
ReplaceAdapter = Annotated[
    bool, typer.Option("--force", help="Replace the adapter in a folder that exists.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


def check_out(out: Path, force: bool, checkpoints: Path | None = None) -> None:
    """Refuse an adapter's folder that exists, unless told to replace it, or cannot be written."""
    # What a killed command has left is nothing to lose.
    if not holds_nothing(out) and not force:
        raise IA3Error(f"{out} exists already: choose another --out, or give --force")
    for folder in (out, checkpoints):
        if folder is not None:
            check_folder(folder)


def check_files(paths: Sequence[Path | None], force: bool) -> list[Path]:
    """The files among these that are asked for; what would be replaced or fail is refused."""
    given = [path for path in paths if path is not None]
    for path in given:
        if path.exists() and not force:
            raise IA3Error(f"{path} exists already: choose another --out, or give --force")
        check_file(path)
    return given


def given(**values: Any) -> dict[str, Any]:
    """The values that are not None; the called function's defaults stand for the others."""
    return {name: value for name, value in values.items() if value is not None}


def silence_loading() -> None:
    """Keep transformers from drawing a bar for every model it loads from the disk.

    Downloads, which take minutes, keep theirs in a terminal.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    downloads = screen.is_terminal and not are_progress_bars_disabled()
    logging.disable_progress_bar()
    if downloads:
        enable_progress_bars()


def write_adapter(out: Path, adapter: Adapter) -> int:
    """Write an adapter's files; returns the bytes of its vectors' file."""
    from ..adapter.files import adapter_files, write_saved

    files = adapter_files(adapter)
    write_saved(out, files)
    return len(files[WEIGHTS_NAME])


def print_json(**values: Any) -> None:
    """One JSON object on standard output."""
    # Bytes of a file's name that are not UTF-8 become escapes, which JSON has too.
    text = json.dumps(values, ensure_ascii=False)
    write_stdout(f"{text}\n".encode(errors="backslashreplace"))


def report(as_json: bool, message: str, **values: Any) -> None:
    """What a command did: one JSON object on standard output, or one line on standard error."""
    if as_json:
        print_json(**values)
    else:
        say(message)


def say(message: str, kind: str = "", style: str = "") -> None:
    """One line on standard error."""
    line = visible(" ".join(message.splitlines()))
    screen.print(Text.assemble((kind, style), " " if kind else "", line), soft_wrap=True)


def warn(message: str) -> None:
    """One line on standard error, marked as a warning."""
    say(message, "warning:", "yellow")


def fitted_with(classifier: FewShotClassifier) -> dict[str, Any]:
    """For JSON: what a classifier was trained on, and what was seen of the candidates."""
    candidates = [candidate.model_dump() for candidate in classifier.candidates_]
    return {
        "engine": classifier.engine_,
        "model": classifier.model_,
        "candidates": candidates,
    }


def candidates_line(classifier: FewShotClassifier) -> str:
    """What was seen before training, and what was then trained; empty where nothing was seen."""
    seen = ", ".join(map(str, classifier.candidates_))
    return seen and f"{seen}: {classifier.engine_} {classifier.model_}"


def reason(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())
