"""Options that several commands have, checks before they run, and their output."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from ..base.embedded import EMBEDDED_ENCODER, EMBEDDED_MODEL
from ..base.processes import processes
from ..base.progress import working
from ..errors import IA3Error, did_you_mean
from ..files.atomic import check_file, check_folder, holds_nothing, write_stdout
from ..files.labelled_data import MAX_WORDS as MAX_WORDS
from ..files.saved import WEIGHTS_NAME
from ..files.tables import delimiter_of
from ..report.console import screen, visible

if TYPE_CHECKING:
    from ..adapter.files import Adapter
    from ..classify.engine import Fit
    from ..classify.estimator import FewShotClassifier

DEFAULT_MODEL = EMBEDDED_MODEL
DEFAULT_ENCODER = EMBEDDED_ENCODER


# Arguments of Python's that options stand for, as messages name them.
_ARGUMENTS = r"init_from|language_model|learning_rate|max_tokens|max_words|upper_blocks"
_NAMED = re.compile(rf"(?<![\w'\"./-])({_ARGUMENTS})(?![\w'\"./])")
_CHOICES = "choices={label: words}"


def as_options(message: str) -> str:
    """A message of Python's functions, with the options' names in place of the arguments'."""
    named = _NAMED.sub(lambda found: f"--{found[0].replace('_', '-')}", message)
    return named.replace(_CHOICES, "--choice LABEL=WORDS")


def known_device(value: str) -> str:
    """Refuse the name of no device, before torch is loaded, which takes seconds."""
    kind, colon, index = value.partition(":")
    is_known = kind in _DEVICES and (index.isdecimal() if colon else True)
    # Another package may bring a device of another name.
    if not is_known and not entry_points(group="torch.backends"):
        hint = did_you_mean(value, _DEVICES)
        raise typer.BadParameter(
            f"{value!r} is no device: 'auto', 'cpu', 'cuda', 'cuda:1', ...{hint}"
        )
    return value


def known_dtype(value: str) -> str:
    """Refuse what is no floating-point type of torch's, before torch is loaded."""
    if not re.fullmatch(r"auto|half|double|float|b?float\d+(_\w+)?", value):
        hint = did_you_mean(value, ("auto", "float32", "bfloat16", "float16"))
        raise typer.BadParameter(
            f"{value!r} is no type of numbers: 'auto', 'float32', 'bfloat16' or 'float16'{hint}"
        )
    return value


# torch's, as of version 2.13.
_DEVICES = (
    *("auto", "cpu", "cuda", "mps", "xpu", "hpu", "mtia", "xla", "maia", "ipu", "vulkan", "meta"),
    *("privateuseone", "npu"),
)


def positive(value: float | None) -> float | None:
    """Refuse a number that is not above 0."""
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter(f"{value} is not a number above 0")
    return value


SOURCES = (
    "CSV, TSV, JSON Lines or Parquet file, folder of the datasets library, or name of a data set "
    "on the Hugging Face hub."
)
Source = Annotated[str, typer.Option("--data", help=SOURCES)]
Split = Annotated[str, typer.Option(help="Part of a folder or data set that has several.")]
Subset = Annotated[str | None, typer.Option(help="Subset of a data set that has several.")]
TextColumns = Annotated[
    list[str],
    typer.Option("--text", help="Column with the text; give it again for each further column."),
]
LabelColumn = Annotated[str, typer.Option("--label", help="Column with the label.")]
Multilabel = Annotated[
    str | None,
    typer.Option(
        metavar="SEPARATOR",
        help="A text has any number of labels, with this between them, e.g. ';'. Lists of JSON "
        "Lines and Parquet stay as they are.",
    ),
]
Choices = Annotated[
    list[str] | None,
    typer.Option(
        help="LABEL=WORDS: the words a language model is to answer for a label; once for each."
    ),
]
Template = Annotated[
    list[str] | None,
    typer.Option(
        help="What a language model is asked of a text, as '{{ text }} Category:': columns stand "
        "in {{ }} (it is a Jinja template), and a single one may be called {{ text }} too. May be "
        "given several times. In bash, $'...' takes \\n as a new line."
    ),
]
BaseModelName = Annotated[
    str, typer.Option(help="Language model: a name, a folder, or an id on the hub.")
]
FittedModel = Annotated[
    str,
    typer.Option(
        help="What is trained: a sentence encoder, which makes a text a vector, or a language "
        "model, which answers with a label's words. A name, a folder, or an id on the hub; 'auto' "
        "takes the one of the two that promises more on the examples."
    ),
]
Encoder = Annotated[str, typer.Option(help="The sentence encoder of 'auto'.")]
LanguageModel = Annotated[str, typer.Option(help="The language model of 'auto'.")]
Model = Annotated[
    str | None, typer.Option(help="The model it was trained on, where that lies elsewhere now.")
]
AdapterOut = Annotated[
    Path, typer.Option(help="Folder for the adapter: what is learned, some hundred kilobytes.")
]
Steps = Annotated[int, typer.Option(help="Training steps.", min=1)]
MostSteps = Annotated[int, typer.Option(help="The most training steps; 0 trains nothing.", min=0)]
LearningRate = Annotated[
    float | None,
    typer.Option(help="Of training, at its highest; by the model if absent.", callback=positive),
]
Seed = Annotated[int, typer.Option(help="Of all random numbers.", min=0, max=2**32 - 1)]
BatchSize = Annotated[int, typer.Option(help="Examples in each training step.", min=1)]
Threads = Annotated[
    int | None,
    typer.Option(
        help="Of a training step on a CPU; one or all if absent, whichever is faster.", min=1
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="What computes: 'cpu', 'cuda' (a GPU), ...; 'auto' takes a GPU if there is one.",
        callback=known_device,
    ),
]
DType = Annotated[
    str,
    typer.Option(
        help="Type of the model's numbers: 'float32', 'bfloat16', ...; 'auto' is float32 on a CPU "
        "and the model's own on a GPU.",
        callback=known_dtype,
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        help="Tokens (words, or parts of them) computed at once; fewer take less memory.", min=1
    ),
]
Shard = Annotated[
    bool,
    typer.Option(
        "--shard",
        help="Spread the language model over the processes that torchrun started, for one that is "
        "too large for each. With accelerate's FSDP 2 this is so without saying.",
    ),
]
MaxWords = Annotated[
    int, typer.Option(help="Of a longer text only so many first words are read.", min=1)
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Stop where something is wrong with the data.")
]
Checkpoints = Annotated[
    Path | None,
    typer.Option(
        help="Folder in which training is kept as it goes: after a break the same command goes on."
    ),
]
NoReport = Annotated[
    bool, typer.Option("--no-report", help="Write no page (HTML) beside the adapter.")
]
TestData = Annotated[
    str | None,
    typer.Option("--test", help="Labelled texts to measure the adapter on, as --data."),
]
CrossValidate = Annotated[
    bool,
    typer.Option(
        "--cross-validate",
        help="Measure by 5 more trainings, each text held out of one.",
    ),
]
ReplaceFiles = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]
ReplaceAdapter = Annotated[
    bool, typer.Option("--force", help="Replace the adapter in a folder that exists.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
FittedAdapter = Annotated[Path, typer.Argument(help="Folder written by 'ia3 fit'.")]
TableOut = Annotated[
    Path | None,
    typer.Option(help="CSV, TSV or JSON Lines file; CSV on standard output if absent."),
]
JsonLines = Annotated[
    bool, typer.Option("--json", help="JSON Lines instead of CSV on standard output.")
]


def check_out(out: Path, force: bool, checkpoints: Path | None = None) -> None:
    """Refuse an adapter's folder that exists, unless told to replace it, or cannot be written."""
    # What a killed command has left is nothing to lose.
    if not holds_nothing(out) and not force:
        raise IA3Error(f"{out} exists already: choose another --out, or give --force")
    for folder in (out, checkpoints):
        if folder is not None:
            check_folder(folder)


def check_files(
    paths: Sequence[Path | None], force: bool, options: Sequence[str] = ("--out",)
) -> list[Path]:
    """The files among these that are asked for; what would be replaced or fail is refused.

    The `options` are those that the files are given by.
    """
    given = [(path, o) for path, o in zip(paths, options, strict=True) if path is not None]
    for path, option in given:
        if path.exists() and not force:
            raise IA3Error(f"{path} exists already: choose another {option}, or give --force")
        check_file(path)
    return [path for path, _ in given]


def check_table(out: Path | None, as_json: bool, force: bool) -> None:
    """Refuse a table's file that is of another kind than asked for, or that `check_files` does."""
    if out is not None and delimiter_of(out) is not None and as_json:
        raise typer.BadParameter(f"{out} would not be JSON Lines", param_hint="--json")
    check_files([out], force)


def given(**values: Any) -> dict[str, Any]:
    """The values that are not None; the called function's defaults stand for the others."""
    return {name: value for name, value in values.items() if value is not None}


def silence_loading() -> None:
    """Keep transformers from drawing a bar for every model it loads from the disk.

    Downloads, which take minutes, keep theirs in a terminal.
    """
    with working("loading PyTorch and transformers"):
        import torch  # noqa: F401
        from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
        from transformers.utils import logging

    is_seen = screen.is_terminal and not screen.quiet
    downloads = is_seen and not are_progress_bars_disabled()
    logging.disable_progress_bar()
    if screen.quiet:
        logging.set_verbosity_error()
    if downloads:
        enable_progress_bars()


def load_classifier(
    adapter: Path, model: str | None, max_tokens: int | None, device: str, dtype: str
) -> FewShotClassifier:
    """What `ia3 fit` wrote, on the model that it was trained on or on another copy of it."""
    silence_loading()
    with working("loading the classifier"):
        from ..classify.estimator import FewShotClassifier

    more = given(max_tokens=max_tokens)
    return FewShotClassifier.load(adapter, model=model, device=device, dtype=dtype, **more)


def write_adapter(out: Path, saved: Adapter | Fit) -> int:
    """Write the files of an adapter or a classifier; returns the bytes of its vectors' file.

    Of several processes the first one writes.
    """
    from ..adapter.files import Adapter, adapter_files, write_saved

    if isinstance(saved, Adapter):
        files = adapter_files(saved)
    else:
        from ..classify.estimator import classifier_files

        files = classifier_files(saved)
    if processes().is_first:
        write_saved(out, files)
    return len(files[WEIGHTS_NAME])


def print_json(**values: Any) -> None:
    """One JSON object on standard output, of the first process's."""
    if not processes().is_first:
        return
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
