"""`ia3 fit`, `predict` and `evaluate`: a classifier from and for files of texts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import IA3Error
from ..files.rows import read_rows
from ..files.tables import delimiter_of, fields_of, write_table
from ..report.console import counting_bar, print_confusion, results, training_bar
from . import options
from .labelled import check_columns, labels_among, parse_choices
from .options import (
    candidates_line,
    check_files,
    check_out,
    fitted_with,
    given,
    print_json,
    report,
    say,
    silence_loading,
)

if TYPE_CHECKING:
    from ..classify.estimator import FewShotClassifier

Adapter = Annotated[Path, typer.Argument(help="Folder written by 'ia3 fit'.")]


def fit(
    data: options.Source,
    out: options.AdapterOut,
    text: options.TextColumns = ["text"],  # noqa: B006
    label: options.LabelColumn = "label",
    split: options.Split = "train",
    subset: options.Subset = None,
    model: options.FittedModel = "auto",
    encoder: options.Encoder = options.DEFAULT_ENCODER,
    language_model: options.LanguageModel = options.DEFAULT_MODEL,
    template: options.Template = None,
    choice: options.Choices = None,
    steps: options.MostSteps = 100,
    learning_rate: options.LearningRate = None,
    seed: options.Seed = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Use the language model's chat template.")
    ] = False,
    init_from: Annotated[
        str | None, typer.Option(help="Adapter to begin with, a folder or hub id, instead of ones.")
    ] = None,
    upper_blocks: Annotated[
        int | None,
        typer.Option(
            help="Rescale so many uppermost blocks of a language model: faster to train.", min=1
        ),
    ] = None,
    threads: options.Threads = None,
    checkpoints: options.Checkpoints = None,
    max_tokens: options.MaxTokens = None,
    device: options.Device = "auto",
    dtype: options.DType = "auto",
    force: options.ReplaceAdapter = False,
    as_json: options.Json = False,
) -> None:
    """Train an adapter on labelled examples.

    With --model auto, --template, --choice, --chat and --upper-blocks mean the language model.
    """
    check_columns(text, label)
    check_out(out, force, checkpoints)
    rows = read_rows(data, split=split, subset=subset, text=text, label=label)
    labels = [row[label] for row in rows]
    choices = parse_choices(choice, labels)
    silence_loading()
    from ..classify.estimator import FewShotClassifier
    from ..files.saved import HEAD_NAME, WEIGHTS_NAME

    settings = given(steps=steps, learning_rate=learning_rate, seed=seed, max_tokens=max_tokens)
    settings |= given(chat=chat, init_from=init_from, upper_blocks=upper_blocks, choices=choices)
    settings |= given(encoder=encoder, language_model=language_model, threads=threads)
    classifier = FewShotClassifier(
        model=model, template=template or None, device=device, dtype=dtype, **settings
    )
    started = time.perf_counter()
    with training_bar(classifier.steps) as on_step:
        classifier.fit(fields_of(rows, text), labels, on_step=on_step, checkpoints=checkpoints)
    seconds = time.perf_counter() - started
    classifier.save(out)
    size, path = (out / WEIGHTS_NAME).stat().st_size, out / HEAD_NAME
    head = path.stat().st_size if path.exists() else 0  # a language model has none
    if not as_json and (seen := candidates_line(classifier)):
        say(seen)
    report(
        as_json,
        f"Trained on {len(rows)} examples of {len(classifier.classes_)} classes in "
        f"{seconds:.0f} s; {(size + head) / 1024:.0f} KiB in {out}",
        adapter=str(out),
        classes=classifier.classes_.tolist(),
        examples=len(rows),
        **fitted_with(classifier),
        steps=len(classifier.history_),
        final_loss=classifier.history_[-1].loss if classifier.history_ else None,
        adapter_bytes=size,
        head_bytes=head,
        seconds=round(seconds, 2),
    )


def predict(
    adapter: Adapter,
    data: options.Source,
    text: options.TextColumns = ["text"],  # noqa: B006
    split: options.Split = "test",
    subset: options.Subset = None,
    out: Annotated[
        Path | None,
        typer.Option(help="CSV, TSV or JSON Lines file; CSV on standard output if absent."),
    ] = None,
    model: options.Model = None,
    max_tokens: options.MaxTokens = None,
    device: options.Device = "auto",
    dtype: options.DType = "auto",
    force: options.ReplaceFiles = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON Lines instead of CSV on standard output.")
    ] = False,
) -> None:
    """Label texts: every row of the data with `prediction` and `probability` added."""
    if out is not None and delimiter_of(out) is not None and as_json:
        raise typer.BadParameter(f"{out} would not be JSON Lines", param_hint="--json")
    check_files([out], force)
    rows = read_rows(data, split=split, subset=subset, text=text)
    for column in ("prediction", "probability"):
        for row in rows:
            if column in row:
                taken = f"there is a column {column!r} already, which predict adds: rename it"
                raise IA3Error(f"{row.where}: {taken}")
    classifier = _load(adapter, model, max_tokens, device, dtype)
    probabilities = _probabilities(classifier, fields_of(rows, text))
    labels = classifier.classes_at(probabilities).tolist()
    labelled = [
        {**row, "prediction": prediction, "probability": round(float(p.max()), 6)}
        for row, prediction, p in zip(rows, labels, probabilities, strict=True)
    ]
    write_table(labelled, out, as_json=as_json)


def evaluate(
    adapter: Adapter,
    data: options.Source,
    text: options.TextColumns = ["text"],  # noqa: B006
    label: options.LabelColumn = "label",
    split: options.Split = "test",
    subset: options.Subset = None,
    model: options.Model = None,
    max_tokens: options.MaxTokens = None,
    device: options.Device = "auto",
    dtype: options.DType = "auto",
    as_json: options.Json = False,
) -> None:
    """Score an adapter on labelled texts: accuracy, macro F1 and the confusion matrix."""
    rows = read_rows(data, split=split, subset=subset, text=text, label=label)
    classifier = _load(adapter, model, max_tokens, device, dtype)
    classes = classifier.classes_.tolist()
    truth = labels_among(rows, label, classes)
    predicted = classifier.classes_at(_probabilities(classifier, fields_of(rows, text))).tolist()
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

    accuracy = float(accuracy_score(truth, predicted))
    macro_f1 = float(f1_score(truth, predicted, average="macro", labels=sorted(set(truth))))
    matrix = confusion_matrix(truth, predicted, labels=classes).tolist()
    if as_json:
        scores = {"accuracy": accuracy, "macro_f1": macro_f1, "examples": len(rows)}
        print_json(**scores, classes=classes, confusion=matrix)
        return
    print_confusion(results, classes, matrix)
    results.print(f"accuracy [bold]{accuracy:.1%}[/], macro F1 {macro_f1:.1%}, {len(rows)} rows")


def _load(
    adapter: Path, model: str | None, max_tokens: int | None, device: str, dtype: str
) -> FewShotClassifier:
    silence_loading()
    from ..classify.estimator import FewShotClassifier

    more = given(max_tokens=max_tokens)
    return FewShotClassifier.load(adapter, model=model, device=device, dtype=dtype, **more)


def _probabilities(classifier: FewShotClassifier, examples: list[dict[str, Any]]) -> Any:
    with counting_bar("scoring", len(examples) * len(classifier.templates_)) as progress:
        return classifier.predict_proba(examples, progress=progress)
