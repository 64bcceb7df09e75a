"""The `ia3` command. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from .errors import IA3Error, MissingExtraError

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError as error:
    raise SystemExit(
        f"error: the ia3 command needs {error.name!r}: pip install 'ia3[cli]'"
    ) from error

if TYPE_CHECKING:
    from .estimator import FewShotClassifier
    from .tfew.training import TrainingStep

DEFAULT_MODEL = "smollm2-135m-instruct"

app = typer.Typer(
    help="Few-shot classification with (IA)³: three learned vectors a block of a frozen model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
screen = Console(stderr=True)

Data = Annotated[Path, typer.Option("--data", help="CSV, TSV or JSONL file, UTF-8.")]
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
        list[str] | None, typer.Option(help="Jinja prompt template; may be given several times.")
    ] = None,
    choice: Annotated[
        list[str] | None, typer.Option(help="LABEL=WORDS to rank for a label; once a label.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.", min=0)] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    seed: int = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    device: Device = "auto",
    dtype: DType = "auto",
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that exists.")] = False,
    as_json: Json = False,
) -> None:
    """Train an adapter on labelled examples."""
    from .tables import fields_of, read_table

    if out.exists() and not force:
        raise IA3Error(f"{out} exists already: choose another --out, or give --force")
    rows = read_table(data, [*text, label])
    from .estimator import FewShotClassifier

    given = {"steps": steps, "learning_rate": learning_rate}
    classifier = FewShotClassifier(
        model=model,
        template=template or None,
        choices=_choices(choice),
        seed=seed,
        device=device,
        dtype=dtype,
        chat=chat,
        **{name: value for name, value in given.items() if value is not None},
    )
    started = time.perf_counter()
    with training_bar(classifier.steps) as on_step:
        classifier.fit(fields_of(rows, text), [row[label] for row in rows], on_step=on_step)
    seconds = time.perf_counter() - started
    classifier.save(out)
    size = sum((out / name).stat().st_size for name in ("adapter_model.safetensors",))
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
        screen.print(
            f"Trained on {len(rows)} examples of {len(classifier.classes_)} classes in "
            f"{seconds:.0f} s; {size / 1024:.0f} KiB in [bold]{out}[/]"
        )


@app.command()
def predict(
    adapter: Annotated[Path, typer.Argument(help="Folder written by 'ia3 fit'.")],
    data: Data,
    text: TextColumns = ["text"],  # noqa: B006
    out: Annotated[
        Path | None, typer.Option(help="CSV or JSONL file to write; standard output if absent.")
    ] = None,
    model: Model = None,
    device: Device = "auto",
    dtype: DType = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
    as_json: Json = False,
) -> None:
    """Label texts: every row of the data with `prediction` and `probability` added."""
    from .tables import fields_of, read_table, write_table

    if out is not None and out.exists() and not force:
        raise IA3Error(f"{out} exists already: choose another --out, or give --force")
    rows = read_table(data, text)
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

    rows = read_table(data, [*text, label])
    classifier = _load(adapter, model, device, dtype)
    classes = classifier.classes_.tolist()
    # CSV has strings only: "1" in a file is the label 1 of a classifier fitted on integers.
    by_name = {str(c): c for c in classes}
    truth = [by_name.get(str(row[label]), row[label]) for row in rows]
    classifier.check_labels(truth)
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
        print_confusion(screen, classes, matrix)
        screen.print(f"accuracy [bold]{accuracy:.1%}[/], macro F1 {macro_f1:.1%}, {len(rows)} rows")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the adapter and the report.")] = Path(
        "ia3-demo"
    ),
    model: Annotated[str, typer.Option(help="Model name, folder or hub id.")] = DEFAULT_MODEL,
    as_json: Json = False,
) -> None:
    """Learn to route support tickets from 32 examples, and check what is promised."""
    from .demo import run_demo

    result = run_demo(out, model, screen)
    if as_json:
        _print_json(**result)


@app.command()
def prepare() -> None:
    """Convert the embedded model into the cache (IA3_HOME), once."""
    from .base_model import embedded_model_folder

    screen.print(f"the embedded model is in {embedded_model_folder()}")


def main() -> None:
    """Run the command; mistakes a user can mend are one line on standard error and exit code 1."""
    warnings.showwarning = _show_warning
    try:
        app()
    except (IA3Error, MissingExtraError, OSError) as error:
        screen.print(f"[bold red]error:[/] {_escaped(str(error))}", soft_wrap=True)
        sys.exit(1)


@contextmanager
def training_bar(steps: int) -> Iterator[Any]:
    """A progress bar of training, with loss and rate; yields the `on_step` that moves it."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  {task.fields[rate]} steps/s"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=screen) as progress:
        task = progress.add_task("training", total=steps, loss="-", rate="-")

        def on_step(step: TrainingStep) -> None:
            speed = progress.tasks[task].speed
            progress.update(
                task,
                completed=step.step,
                loss=f"{step.loss:.3f}",
                rate=f"{speed:.2f}" if speed else "-",
            )

        yield on_step


@contextmanager
def counting_bar(what: str, total: int) -> Iterator[Any]:
    """A progress bar over examples; yields the callback that advances it."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=screen) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.advance(task, done)


def print_confusion(console: Console, classes: list[Any], matrix: list[list[int]]) -> None:
    """The confusion matrix as a table: true labels in rows, predictions in columns."""
    if len(classes) > 12:
        console.print(f"(confusion matrix of {len(classes)} classes: see --json)")
        return
    table = Table(title="rows: true label, columns: prediction")
    table.add_column("")
    for label in classes:
        table.add_column(_escaped(str(label)), justify="right")
    for i, (label, row) in enumerate(zip(classes, matrix, strict=True)):
        cells = [f"[bold]{n}[/]" if i == j else str(n) for j, n in enumerate(row)]
        table.add_row(_escaped(str(label)), *cells)
    console.print(table)


def _load(adapter: Path, model: str | None, device: str, dtype: str) -> FewShotClassifier:
    from .estimator import FewShotClassifier

    return FewShotClassifier.load(adapter, model=model, device=device, dtype=dtype)


def _probabilities(classifier: FewShotClassifier, examples: list[dict[str, Any]]) -> Any:
    with counting_bar("scoring", len(examples) * len(classifier.templates_)) as progress:
        return classifier.predict_proba(examples, progress=progress)


def _choices(pairs: list[str] | None) -> dict[str, str] | None:
    if not pairs:
        return None
    choices: dict[str, str] = {}
    for pair in pairs:
        label, equals, words = pair.partition("=")
        if not equals or not words.strip():
            raise IA3Error(f"--choice {pair!r}: expected LABEL=WORDS, e.g. --choice 'pos=great'")
        choices[label] = words.strip()
    return choices


def _print_json(**values: Any) -> None:
    print(json.dumps(values, ensure_ascii=False))


def _show_warning(message: Warning | str, *args: Any, **kwargs: Any) -> None:
    screen.print(f"[yellow]warning:[/] {_escaped(str(message))}", soft_wrap=True)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
