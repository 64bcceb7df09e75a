"""`ia3 fit`, `predict` and `evaluate`: a classifier from and for files of texts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..errors import IA3Error
from ..files.atomic import check_folder
from ..report.console import counting_bar, print_confusion, training_bar
from .labelled import labels_among, parse_choices, read_source
from .options import (
    DEFAULT_MODEL,
    Checkpoints,
    Device,
    DType,
    Json,
    LabelColumn,
    MaxTokens,
    Model,
    ReplaceAdapter,
    Source,
    Split,
    Subset,
    TextColumns,
    check_out,
    positive,
    print_json,
    say,
    silence_loading,
)

if TYPE_CHECKING:
    from ..classify.estimator import FewShotClassifier


def fit(
    data: Source,
    out: Annotated[Path, typer.Option(help="Folder for the adapter.")],
    text: TextColumns = ["text"],  # noqa: B006
    label: LabelColumn = "label",
    split: Split = "train",
    subset: Subset = None,
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
    steps: Annotated[int | None, typer.Option(help="Training steps; 100 if absent.", min=0)] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate; 0.01 if absent.", callback=positive)
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of the order of the examples.", min=0, max=2**32 - 1)
    ] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    init_from: Annotated[
        str | None,
        typer.Option(help="Adapter to begin with, a folder or hub id, instead of ones."),
    ] = None,
    upper_blocks: Annotated[
        int | None,
        typer.Option(help="Rescale only so many uppermost blocks: faster to train.", min=1),
    ] = None,
    checkpoints: Checkpoints = None,
    max_tokens: MaxTokens = None,
    device: Device = "auto",
    dtype: DType = "auto",
    force: ReplaceAdapter = False,
    as_json: Json = False,
) -> None:
    """Train an adapter on labelled examples."""
    from ..files.tables import fields_of

    if label in text:
        raise typer.BadParameter(
            f"{label!r} is the text and the label at once", param_hint="--label"
        )
    check_out(out, force)
    check_folder(out)
    if checkpoints is not None:
        check_folder(checkpoints)
    rows = read_source(data, split, subset, text, label)
    labels = [row[label] for row in rows]
    choices = parse_choices(choice, labels)
    silence_loading()
    from ..adapter.layout import WEIGHTS_NAME
    from ..classify.estimator import FewShotClassifier

    given: dict[str, Any] = {
        "steps": steps,
        "learning_rate": learning_rate,
        "max_tokens": max_tokens,
    }
    classifier = FewShotClassifier(
        model=model,
        template=template or None,
        choices=choices,
        seed=seed,
        device=device,
        dtype=dtype,
        chat=chat,
        init_from=init_from,
        upper_blocks=upper_blocks,
        **{name: value for name, value in given.items() if value is not None},
    )
    started = time.perf_counter()
    with training_bar(classifier.steps) as on_step:
        classifier.fit(fields_of(rows, text), labels, on_step=on_step, checkpoints=checkpoints)
    seconds = time.perf_counter() - started
    classifier.save(out)
    size = (out / WEIGHTS_NAME).stat().st_size
    if as_json:
        print_json(
            adapter=str(out),
            classes=classifier.classes_.tolist(),
            examples=len(rows),
            steps=classifier.steps,
            final_loss=classifier.history_[-1].loss if classifier.history_ else None,
            adapter_bytes=size,
            seconds=round(seconds, 2),
        )
    else:
        say(
            f"Trained on {len(rows)} examples of {len(classifier.classes_)} classes in "
            f"{seconds:.0f} s; {size / 1024:.0f} KiB in {out}"
        )


def predict(
    adapter: Annotated[Path, typer.Argument(help="Folder written by 'ia3 fit'.")],
    data: Source,
    text: TextColumns = ["text"],  # noqa: B006
    split: Split = "test",
    subset: Subset = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File to write; its suffix says whether CSV, TSV or JSON Lines. Standard output "
            "if absent."
        ),
    ] = None,
    model: Model = None,
    max_tokens: MaxTokens = None,
    device: Device = "auto",
    dtype: DType = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON Lines instead of CSV on standard output.")
    ] = False,
) -> None:
    """Label texts: every row of the data with `prediction` and `probability` added."""
    from ..files.tables import delimiter_of, fields_of, write_table

    if out is not None:
        if delimiter_of(out) is not None and as_json:
            raise typer.BadParameter(f"{out} would not be JSON Lines", param_hint="--json")
        check_out(out, force)
        check_folder(out.parent)
    rows = read_source(data, split, subset, text)
    for column in ("prediction", "probability"):
        for row in rows:
            if column in row:
                raise IA3Error(
                    f"{row.where}: there is a column {column!r} already, which predict adds: "
                    "rename it"
                )
    classifier = _load(adapter, model, max_tokens, device, dtype)
    probabilities = _probabilities(classifier, fields_of(rows, text))
    labels = classifier.classes_at(probabilities).tolist()
    labelled = [
        {**row, "prediction": prediction, "probability": round(float(p.max()), 6)}
        for row, prediction, p in zip(rows, labels, probabilities, strict=True)
    ]
    write_table(labelled, out, as_json=as_json)


def evaluate(
    adapter: Annotated[Path, typer.Argument(help="Folder written by 'ia3 fit'.")],
    data: Source,
    text: TextColumns = ["text"],  # noqa: B006
    label: LabelColumn = "label",
    split: Split = "test",
    subset: Subset = None,
    model: Model = None,
    max_tokens: MaxTokens = None,
    device: Device = "auto",
    dtype: DType = "auto",
    as_json: Json = False,
) -> None:
    """Score an adapter on labelled texts: accuracy, macro F1 and the confusion matrix."""
    from ..files.tables import fields_of

    rows = read_source(data, split, subset, text, label)
    classifier = _load(adapter, model, max_tokens, device, dtype)
    classes = classifier.classes_.tolist()
    truth = labels_among(rows, label, classes)
    predicted = classifier.classes_at(_probabilities(classifier, fields_of(rows, text))).tolist()
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

    accuracy = float(accuracy_score(truth, predicted))
    macro_f1 = float(f1_score(truth, predicted, average="macro", labels=sorted(set(truth))))
    matrix = confusion_matrix(truth, predicted, labels=classes).tolist()
    if as_json:
        print_json(
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


def _load(
    adapter: Path, model: str | None, max_tokens: int | None, device: str, dtype: str
) -> FewShotClassifier:
    silence_loading()
    from ..classify.estimator import FewShotClassifier

    given = {} if max_tokens is None else {"max_tokens": max_tokens}
    return FewShotClassifier.load(adapter, model=model, device=device, dtype=dtype, **given)


def _probabilities(classifier: FewShotClassifier, examples: list[dict[str, Any]]) -> Any:
    with counting_bar("scoring", len(examples) * len(classifier.templates_)) as progress:
        return classifier.predict_proba(examples, progress=progress)
