"""`ia3 fit`, `predict` and `evaluate`: a classifier from and for files of texts."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from ..base.processes import processes
from ..base.progress import working
from ..errors import counted
from ..files.rows import read_rows
from ..files.tables import delimiter_of, fields_of, write_table
from ..report.console import results, screen, training_bar
from ..report.scores import print_measured
from . import options
from .labelled import (
    check_added,
    check_begins_with,
    check_columns,
    examples_for,
    field_of,
    findings_in,
    labels_among,
    parse_choices,
    read_task,
    warn_of,
    with_predictions,
)
from .measuring import (
    NOT_MEASURED,
    Labelled,
    answers_to,
    as_values,
    leave_evaluation,
    leave_fit_report,
    measure,
    status_of,
)
from .multilabel import (
    check_encoders,
    check_multilabel,
    label_lists,
    label_lists_among,
    with_labels,
)
from .options import (
    candidates_line,
    check_out,
    check_table,
    fitted_with,
    given,
    load_classifier,
    print_json,
    say,
    silence_loading,
)

if TYPE_CHECKING:
    from ..files.tables import Row


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
    multilabel: options.Multilabel = None,
    template: options.Template = None,
    choice: options.Choices = None,
    steps: options.MostSteps = 100,
    learning_rate: options.LearningRate = None,
    seed: options.Seed = 0,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Ask the language model as in a chat, for models made for it."),
    ] = False,
    init_from: Annotated[
        str | None,
        typer.Option(
            help="Adapter to begin with, such as another task's: a folder, or an id on the hub."
        ),
    ] = None,
    upper_blocks: Annotated[
        int | None,
        typer.Option(
            help="Adapt only the last so many layers of a language model: faster to train.", min=1
        ),
    ] = None,
    threads: options.Threads = None,
    checkpoints: options.Checkpoints = None,
    unlabelled: Annotated[
        str | None,
        typer.Option(
            help="More texts, without labels: what the adapter is sure of is learned from, if "
            "held-out examples say that it helps. Takes twelve trainings."
        ),
    ] = None,
    max_words: options.MaxWords = options.MAX_WORDS,
    max_tokens: options.MaxTokens = None,
    shard: options.Shard = False,
    device: options.Device = "auto",
    dtype: options.DType = "auto",
    strict: options.Strict = False,
    test: options.TestData = None,
    cross_validate: options.CrossValidate = False,
    no_report: options.NoReport = False,
    force: options.ReplaceAdapter = False,
    as_json: options.Json = False,
) -> None:
    """Train an adapter on labelled examples, and say how good it is.

    With --model auto, --template, --choice, --chat and --upper-blocks mean the language model.

    It is measured on --test, or with --cross-validate; else a named model with 16 texts of each
    class or more is trained once more without a fifth of them. Of others, what is known from
    before training is said.
    """
    check_columns(text, label)
    if unlabelled is not None and checkpoints is not None:
        problem = "they are of one training, and --unlabelled takes several"
        raise typer.BadParameter(problem, param_hint="--checkpoints")
    if unlabelled is not None and multilabel is not None:
        problem = "--unlabelled learns from texts that have one label each"
        raise typer.BadParameter(problem, param_hint="--multilabel")
    check_out(out, force, checkpoints)
    several = multilabel is not None
    rows = read_rows(data, split=split, subset=subset, text=text, label=label, multilabel=several)
    more = unlabelled and read_rows(unlabelled, split=split, subset=subset, text=text)
    if multilabel is None:
        labels = [row[label] for row in rows]
    else:
        check_encoders(choice=choice, chat=chat, upper_blocks=upper_blocks)
        labels = label_lists(rows, label, multilabel)
    choices = parse_choices(choice, labels)
    if test is not None and cross_validate:
        raise typer.BadParameter("measure on --test, or with --cross-validate", param_hint="--test")
    if unlabelled is not None and cross_validate:
        problem = "--unlabelled says what was right of held-out texts, with and without its own"
        raise typer.BadParameter(problem, param_hint="--cross-validate")
    names = {str(each) for own in labels for each in (own if several else [own])}
    field = field_of(rows, text, template, choices.values() if choices else names)
    check_begins_with(init_from)
    tested, asked, truth = None, [], []
    if test is not None:
        asked = read_rows(
            test, split="test", subset=subset, text=text, label=label, multilabel=several
        )
        if multilabel is None:
            truth = labels_among(asked, label, [*dict.fromkeys([*labels, *(choices or {})])])
        else:
            known = [*dict.fromkeys(each for own in labels for each in own)]
            truth = label_lists_among(asked, label, multilabel, known)
        tested = Labelled.of(test, asked, text, field, truth)
    warn_of(findings_in(rows, text, labels, asked, truth, max_words), strict)
    silence_loading()
    with working("loading the classifier"):
        from ..adapter.files import write_saved
        from ..classify.estimator import FewShotClassifier
        from ..files.saved import HEAD_NAME, WEIGHTS_NAME

        if not no_report:  # what it needs is missed now, not after the training
            from ..report import measured_report  # noqa: F401

    settings = given(steps=steps, learning_rate=learning_rate, seed=seed, max_tokens=max_tokens)
    settings |= given(chat=chat, init_from=init_from, upper_blocks=upper_blocks, choices=choices)
    settings |= given(
        max_words=max_words, encoder=encoder, language_model=language_model, threads=threads
    )
    settings |= given(multilabel=several or None, shard=shard or None)
    classifier = FewShotClassifier(
        model=model, template=template or None, device=device, dtype=dtype, **settings
    )
    started = time.perf_counter()
    with training_bar(classifier.steps) as on_step:
        classifier.fit(
            fields_of(rows, text, field),
            labels,
            on_step=on_step,
            checkpoints=checkpoints,
            unlabelled=fields_of(more, text, field) if more else None,
        )
    seconds = time.perf_counter() - started
    files = classifier.to_files()
    if processes().is_first:
        write_saved(out, files)
    saved = status_of(out)
    size = len(files[WEIGHTS_NAME])
    head = len(files.get(HEAD_NAME, b""))  # a language model has none
    if not as_json:
        if seen := candidates_line(classifier):
            say(seen)
        say(
            f"Trained on {counted(len(rows), 'example')} of "
            f"{counted(len(classifier.classes_), 'class', 'classes')} in "
            f"{seconds:.0f} s; {(size + head) / 1024:.0f} KiB in {out}"
        )
    learned = Labelled.of(data, rows, text, field, labels)
    measured, places = measure(classifier, learned, tested, cross_validate=cross_validate)
    page = None
    if not no_report and processes().is_first:
        page = leave_fit_report(
            out, saved, size + head, classifier, learned, measured, places, seconds
        )
    if as_json:
        print_json(
            adapter=str(out),
            classes=classifier.classes_.tolist(),
            examples=len(rows),
            **fitted_with(classifier),
            steps=len(classifier.history_),
            final_loss=classifier.history_[-1].loss if classifier.history_ else None,
            adapter_bytes=size,
            head_bytes=head,
            seconds=round(seconds, 2),
            measured=None if measured is None else as_values(measured, places),
            report=None if page is None else str(page),
        )
        return
    if measured is not None:
        print_measured(screen, measured, places)
    if measured is None or not measured.trained:
        say(NOT_MEASURED)
    if page is not None:
        say(f"the report is {page}")


def predict(
    adapter: options.FittedAdapter,
    data: options.Source,
    text: options.TextColumns = ["text"],  # noqa: B006
    split: options.Split = "test",
    subset: options.Subset = None,
    out: options.TableOut = None,
    multilabel: Annotated[
        str,
        typer.Option(
            metavar="SEPARATOR",
            help="In CSV, between a text's labels, where the adapter gives several.",
        ),
    ] = ";",
    model: options.Model = None,
    max_tokens: options.MaxTokens = None,
    device: options.Device = "auto",
    dtype: options.DType = "auto",
    force: options.ReplaceFiles = False,
    as_json: options.JsonLines = False,
) -> None:
    """Label texts: every row of the data with `prediction` and `probability` added."""
    together = processes()

    def read() -> list[Row]:
        check_table(out, as_json, force)
        found = read_rows(data, split=split, subset=subset, text=text)
        check_added(found, "predict")
        return found

    rows = together.from_first(read)
    task = read_task(adapter)
    examples = examples_for(adapter, task, rows, text)
    classifier = load_classifier(adapter, model, max_tokens, device, dtype)
    probabilities = answers_to(classifier, examples, rows)
    if not together.is_first:
        return
    labels = classifier.classes_at(probabilities).tolist()
    if classifier.multilabel_:
        in_lists = as_json if out is None else delimiter_of(out) is None
        between = None if in_lists else multilabel
        labelled = with_labels(rows, labels, probabilities, between)
    else:
        labelled = with_predictions(rows, labels, probabilities.max(1))
    write_table(labelled, out, as_json=as_json)


def evaluate(
    adapter: options.FittedAdapter,
    data: options.Source,
    text: options.TextColumns = ["text"],  # noqa: B006
    label: options.LabelColumn = "label",
    split: options.Split = "test",
    subset: options.Subset = None,
    multilabel: options.Multilabel = None,
    model: options.Model = None,
    max_tokens: options.MaxTokens = None,
    device: options.Device = "auto",
    dtype: options.DType = "auto",
    no_report: options.NoReport = False,
    as_json: options.Json = False,
) -> None:
    """Score an adapter on labelled texts: accuracy, each class, and the texts it gets wrong."""
    together = processes()
    task, values = read_task(adapter), status_of(adapter)
    check_multilabel(adapter, task.multilabel, multilabel)
    several = multilabel is not None
    rows = together.from_first(
        lambda: read_rows(
            data, split=split, subset=subset, text=text, label=label, multilabel=several
        )
    )
    examples = examples_for(adapter, task, rows, text)
    if multilabel is None:
        truth = labels_among(rows, label, task.labels)
    else:
        truth = label_lists_among(rows, label, multilabel, task.labels)
    classifier = load_classifier(adapter, model, max_tokens, device, dtype)
    probabilities = answers_to(classifier, examples, rows)
    if not together.is_first:
        return
    from ..classify.measure import record_of

    classes = classifier.classes_.tolist()
    places = [row.where for row in rows]
    predicted = classifier.classes_at(probabilities).tolist()
    measured = record_of(examples, truth, predicted, probabilities, classes, f"on {data}")
    page = None
    if not no_report:
        page = leave_evaluation(adapter, values, classifier, data, measured, places)
    if as_json:
        told = as_values(measured, places)
        print_json(**told, examples=len(rows), classes=classes, report=page and str(page))
        return
    print_measured(results, measured, places)
    if page is not None:
        say(f"the report is {page}")
