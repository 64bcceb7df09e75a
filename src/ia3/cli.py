"""The `ia3` command. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from .errors import IA3Error, MissingExtraError, did_you_mean
from .files import check_folder, write_stdout

try:
    import typer
    from rich.console import Console
    from rich.text import Text

    from .console import counting_bar, print_confusion, screen, training_bar
except ImportError as error:
    raise SystemExit(
        f"error: the ia3 command needs {error.name!r}: pip install 'ia3[cli]'"
    ) from error

if TYPE_CHECKING:
    from .estimator import FewShotClassifier

DEFAULT_MODEL = "smollm2-135m-instruct"

app = typer.Typer(
    help="Few-shot classification with (IA)³: learned vectors on a frozen model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _positive(value: float | None) -> float | None:
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter(f"{value} is not a number above 0")
    return value


Data = Annotated[Path, typer.Option("--data", help="CSV, TSV or JSON Lines file, in UTF-8.")]
TextColumns = Annotated[
    list[str], typer.Option("--text", help="Column with the text; give several for several fields.")
]
LabelColumn = Annotated[str, typer.Option("--label", help="Column with the label.")]
Model = Annotated[
    str | None, typer.Option(help="Model name, folder or hub id; the adapter's own by default.")
]
Device = Annotated[str, typer.Option(help="'auto', 'cpu', 'cuda', ...")]
DType = Annotated[str, typer.Option(help="'auto', 'float32', 'bfloat16', ...")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


@app.command()
def fit(
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for the adapter.")],
    text: TextColumns = ["text"],  # noqa: B006
    label: LabelColumn = "label",
    model: Annotated[str, typer.Option(help="Model name, folder or hub id.")] = DEFAULT_MODEL,
    template: Annotated[
        list[str] | None,
        typer.Option(
            help="Jinja prompt template; may be given several times. It names the text columns; "
            "one alone is {{ text }}, whatever its name. In bash, $'...' takes \\n as a new line."
        ),
    ] = None,
    choice: Annotated[
        list[str] | None, typer.Option(help="LABEL=WORDS to rank for a label; once a label.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.", min=0)] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate.", callback=_positive)
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of the order of the examples.", min=0, max=2**32 - 1)
    ] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    device: Device = "auto",
    dtype: DType = "auto",
    force: Annotated[
        bool, typer.Option("--force", help="Replace the adapter in a folder that exists.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train an adapter on labelled examples."""
    from .tables import fields_of, read_table

    if label in text:
        raise typer.BadParameter(
            f"{label!r} is the text and the label at once", param_hint="--label"
        )
    _check_out(out, force)
    check_folder(out)
    rows = read_table(data, text, label)
    labels = [row[label] for row in rows]
    choices = _choices(choice, labels)
    _silence_loading()
    from .estimator import FewShotClassifier
    from .store import WEIGHTS_NAME

    given: dict[str, Any] = {"steps": steps, "learning_rate": learning_rate}
    classifier = FewShotClassifier(
        model=model,
        template=template or None,
        choices=choices,
        seed=seed,
        device=device,
        dtype=dtype,
        chat=chat,
        **{name: value for name, value in given.items() if value is not None},
    )
    started = time.perf_counter()
    with training_bar(classifier.steps) as on_step:
        classifier.fit(fields_of(rows, text), labels, on_step=on_step)
    seconds = time.perf_counter() - started
    classifier.save(out)
    size = (out / WEIGHTS_NAME).stat().st_size
    if as_json:
        _print_json(
            adapter=str(out),
            classes=classifier.classes_.tolist(),
            examples=len(rows),
            steps=classifier.steps,
            final_loss=classifier.history_[-1].loss if classifier.history_ else None,
            adapter_bytes=size,
            seconds=round(seconds, 2),
        )
    else:
        _say(
            f"Trained on {len(rows)} examples of {len(classifier.classes_)} classes in "
            f"{seconds:.0f} s; {size / 1024:.0f} KiB in {out}"
        )


@app.command()
def predict(
    adapter: Annotated[Path, typer.Argument(help="Folder written by 'ia3 fit'.")],
    data: Data,
    text: TextColumns = ["text"],  # noqa: B006
    out: Annotated[
        Path | None,
        typer.Option(
            help="File to write; its suffix says whether CSV, TSV or JSON Lines. Standard output "
            "if absent."
        ),
    ] = None,
    model: Model = None,
    device: Device = "auto",
    dtype: DType = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON Lines instead of CSV on standard output.")
    ] = False,
) -> None:
    """Label texts: every row of the data with `prediction` and `probability` added."""
    from .tables import delimiter_of, fields_of, read_table, write_table

    if out is not None:
        if delimiter_of(out) is not None and as_json:
            raise typer.BadParameter(f"{out} would not be JSON Lines", param_hint="--json")
        _check_out(out, force)
        check_folder(out.parent)
    rows = read_table(data, text)
    for column in ("prediction", "probability"):
        for row in rows:
            if column in row:
                raise IA3Error(
                    f"{row.where}: there is a column {column!r} already, which predict adds: "
                    "rename it"
                )
    classifier = _load(adapter, model, device, dtype)
    probabilities = _probabilities(classifier, fields_of(rows, text))
    labels = classifier.classes_at(probabilities).tolist()
    labelled = [
        {**row, "prediction": prediction, "probability": round(float(p.max()), 6)}
        for row, prediction, p in zip(rows, labels, probabilities, strict=True)
    ]
    write_table(labelled, out, as_json=as_json)


@app.command()
def evaluate(
    adapter: Annotated[Path, typer.Argument(help="Folder written by 'ia3 fit'.")],
    data: Data,
    text: TextColumns = ["text"],  # noqa: B006
    label: LabelColumn = "label",
    model: Model = None,
    device: Device = "auto",
    dtype: DType = "auto",
    as_json: Json = False,
) -> None:
    """Score an adapter on labelled texts: accuracy, macro F1 and the confusion matrix."""
    from .tables import fields_of, read_table

    rows = read_table(data, text, label)
    classifier = _load(adapter, model, device, dtype)
    classes = classifier.classes_.tolist()
    by_name = _by_name(classes)
    for row in rows:
        if str(row[label]) not in by_name:
            hint = did_you_mean(str(row[label]), by_name)
            raise IA3Error(
                f"{row.where}: the label {row[label]!r} is not among the choices {classes}{hint}"
            )
    truth = [by_name[str(row[label])] for row in rows]
    predicted = classifier.classes_at(_probabilities(classifier, fields_of(rows, text))).tolist()
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

    accuracy = float(accuracy_score(truth, predicted))
    macro_f1 = float(f1_score(truth, predicted, average="macro", labels=sorted(set(truth))))
    matrix = confusion_matrix(truth, predicted, labels=classes).tolist()
    if as_json:
        _print_json(
            accuracy=accuracy,
            macro_f1=macro_f1,
            examples=len(rows),
            classes=classes,
            confusion=matrix,
        )
    else:
        results = Console(emoji=False)
        print_confusion(results, classes, matrix)
        results.print(
            f"accuracy [bold]{accuracy:.1%}[/], macro F1 {macro_f1:.1%}, {len(rows)} rows"
        )


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the adapter and the report.")] = Path(
        "ia3-demo"
    ),
    model: Annotated[str, typer.Option(help="Model name, folder or hub id.")] = DEFAULT_MODEL,
    as_json: Json = False,
) -> None:
    """Learn to route support tickets from 32 examples, and check what is promised."""
    check_folder(out)
    _silence_loading()
    from .demo import PROMISES, run_demo

    result = run_demo(out, model, screen)
    if as_json:
        _print_json(**result)
    if not all(result[promise] for promise in PROMISES):
        raise typer.Exit(1)


@app.command()
def prepare() -> None:
    """Convert the embedded model into the cache (IA3_HOME), once."""
    from .base_model import embedded_model_folder

    _say(f"the embedded model is in {embedded_model_folder()}")


def main() -> None:
    """Run the command.

    Mistakes a user can mend are one line on standard error and exit code 1, 2 where the command
    line itself is wrong; Ctrl-C is exit code 130.
    """
    warnings.showwarning = _show_warning
    try:
        app()
    except (IA3Error, MissingExtraError, OSError) as error:
        _say(_message(error), "error:", "bold red")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _check_out(out: Path, force: bool) -> None:
    if out.exists() and not force:
        raise IA3Error(f"{out} exists already: choose another --out, or give --force")


def _load(adapter: Path, model: str | None, device: str, dtype: str) -> FewShotClassifier:
    _silence_loading()
    from .estimator import FewShotClassifier

    return FewShotClassifier.load(adapter, model=model, device=device, dtype=dtype)


def _probabilities(classifier: FewShotClassifier, examples: list[dict[str, Any]]) -> Any:
    with counting_bar("scoring", len(examples) * len(classifier.templates_)) as progress:
        return classifier.predict_proba(examples, progress=progress)


def _silence_loading() -> None:
    """Keep transformers from drawing a bar for every model it loads from the disk.

    Downloads keep theirs where somebody watches: they take minutes.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    downloads = screen.is_terminal and not are_progress_bars_disabled()
    logging.disable_progress_bar()
    if downloads:
        enable_progress_bars()


def _by_name(labels: Iterable[Any]) -> dict[str, Any]:
    """Labels by how CSV and the command line, which have only strings, write them."""
    by_name = {str(label): label for label in labels}
    # Python's True is JSON's true.
    by_name |= {str(label).lower(): label for label in labels if isinstance(label, bool)}
    return by_name


def _choices(pairs: list[str] | None, labels: list[Any]) -> dict[Any, str] | None:
    """The words of `--choice LABEL=WORDS`, by label; the labels are of one type."""
    if not pairs:
        return None
    by_name = _by_name(labels)
    choices: dict[Any, str] = {}
    for pair in pairs:
        name, equals, words = pair.partition("=")
        if not equals or not words.strip():
            raise typer.BadParameter(
                f"{pair!r}, expected LABEL=WORDS, e.g. 'pos=great'", param_hint="--choice"
            )
        label = by_name.get(name, name)
        # A label may be without any example, and is then of the type of the others.
        if label == name and type(labels[0]) is int and name.lstrip("-").isdecimal():
            label = int(name)
        if type(label) is not type(labels[0]):
            raise IA3Error(f"--choice {pair!r}: no label {name!r} among {sorted(by_name)}")
        if label in choices:
            raise typer.BadParameter(f"{name!r} is given more than once", param_hint="--choice")
        choices[label] = words.strip()
    return choices


def _print_json(**values: Any) -> None:
    write_stdout(f"{json.dumps(values, ensure_ascii=False)}\n".encode())


def _show_warning(message: Warning | str, *args: Any, **kwargs: Any) -> None:
    _say(str(message), "warning:", "yellow")


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _say(message: str, kind: str = "", style: str = "") -> None:
    """One line on standard error."""
    line = " ".join(message.splitlines())
    screen.print(Text.assemble((kind, style), " " if kind else "", line), soft_wrap=True)
