"""`ia3 demo` and `ia3 prepare`: a real model learns to route support tickets; all is checked."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import counted
from ..files.atomic import check_folder, write_file
from ..files.examples import example_folder
from ..files.tables import read_table
from ..report.console import counting_bar, screen, training_bar
from ..report.scores import print_confusion
from . import options
from .measuring import seen_before
from .options import candidates_line, fitted_with, print_json, say, silence_loading

if TYPE_CHECKING:
    from torch import nn

    from ..classify.estimator import FewShotClassifier

PROMISES = {
    "reloaded_equal": "the adapter from disk on a fresh model predicts the same",
    "merged_equal": "merged into the weights it predicts the same",
    "unloaded_bitwise": "unloading gives back the base model, bit for bit",
}


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("ia3-demo"),
    model: options.FittedModel = "auto",
    as_json: options.Json = False,
) -> None:
    """Learn to route support tickets from 32 examples, and check what is promised."""
    check_folder(out)
    silence_loading()
    from sklearn.metrics import accuracy_score, confusion_matrix

    from ..classify.estimator import FewShotClassifier
    from ..classify.measure import UNTRAINED
    from ..files.saved import WEIGHTS_NAME
    from ..report.training_report import training_report

    started = time.perf_counter()
    folder = example_folder()
    training, test = (read_table(folder / f"{name}.csv") for name in ("train", "test"))
    train_texts, test_texts = ([row["text"] for row in rows] for rows in (training, test))
    train_labels, test_labels = ([row["label"] for row in rows] for rows in (training, test))
    screen.print(
        f"Support tickets: {len(training)} to learn from, {len(test)} to be tested on, "
        f"{len(set(train_labels))} queues; model {model}",
        markup=False,
    )

    tuned = FewShotClassifier(model)
    with training_bar(tuned.steps) as on_step:
        tuned.fit(train_texts, train_labels, on_step=on_step)
    if seen := candidates_line(tuned):
        say(f"seen beforehand: {seen}")
    untuned = FewShotClassifier(tuned.model_, steps=0).fit(train_texts, train_labels)
    before = _predict(untuned, test_texts, "before training")
    after = _predict(tuned, test_texts, "after training")

    classes = tuned.classes_.tolist()
    answers = {"before": before, "after": after}
    accuracies = {k: float(accuracy_score(test_labels, each)) for k, each in answers.items()}
    matrices = {}
    what = {"before": UNTRAINED[tuned.engine_], "after": counted(len(tuned.history_), "step")}
    for when, accuracy in accuracies.items():
        matrices[when] = confusion_matrix(test_labels, answers[when], labels=classes)
        screen.print(f"\n[bold]{when} training: {accuracy:.1%} right[/] ({what[when]})")
        print_confusion(screen, classes, matrices[when].tolist())

    adapter, report = out / "adapter", out / "report.html"
    tuned.save(adapter)
    adapter_bytes = (adapter / WEIGHTS_NAME).stat().st_size
    model_bytes = sum(p.numel() * p.element_size() for p in tuned.base.model.parameters())
    screen.print(
        f"\nadapter: {adapter_bytes / 1024:.0f} KiB, model: {model_bytes / 2**20:.0f} MiB "
        f"({model_bytes / adapter_bytes:,.0f} times as much)"
    )

    checks = _check(adapter, tuned, test_texts, after.tolist())
    seconds = time.perf_counter() - started
    for name, promise in PROMISES.items():
        screen.print(f"{'[green]yes[/]' if checks[name] else '[red]NO[/]'}  {promise}")

    html = training_report(
        title="Support tickets, routed after 32 examples",
        facts=[
            ("model", tuned.model_),
            *seen_before(tuned),
            ("examples to learn from", str(len(training))),
            ("examples tested", str(len(test))),
            (f"accuracy of the {UNTRAINED[tuned.engine_]}", f"{accuracies['before']:.1%}"),
            ("accuracy after training", f"{accuracies['after']:.1%}"),
            ("adapter", f"{adapter_bytes / 1024:.0f} KiB"),
            ("model size", f"{model_bytes / 2**20:.0f} MiB"),
            ("seconds in all", f"{seconds:.0f}"),
        ],
        history=tuned.history_,
        classes=classes,
        confusion_before=matrices["before"],
        confusion_after=matrices["after"],
        vectors=tuned.adapter_.vectors,
    )
    write_file(report, html.encode())
    said = f"\n{seconds:.0f} s in all. The adapter is in {adapter}, the report in {report}"
    screen.print(said, markup=False)
    if as_json:
        scores = {f"accuracy_{when}": accuracy for when, accuracy in accuracies.items()}
        measured = {"adapter_bytes": adapter_bytes, "seconds": round(seconds, 1)}
        files = {"adapter": str(adapter), "report": str(report)}
        print_json(**fitted_with(tuned), **scores, **measured, **checks, **files)
    if not all(checks.values()):
        raise typer.Exit(1)


def prepare() -> None:
    """Convert the embedded language model into the cache (IA3_HOME), once; look for the encoder."""
    from ..base.embedded import embedded_encoder_folder, embedded_model_folder

    for name, folder in (
        (options.DEFAULT_MODEL, embedded_model_folder),
        (options.DEFAULT_ENCODER, embedded_encoder_folder),
    ):
        say(f"the embedded model {name} is in {folder()}")


def _check(
    adapter: Path, trained: FewShotClassifier, texts: list[str], expected: list[str]
) -> dict[str, bool]:
    """Whether each promise holds, tried on a second copy of the model."""
    from ..classify.estimator import FewShotClassifier
    from ..model.ia3_model import IA3Model

    # A model is loaded anew for a tokenizer of one's own.
    reloaded = FewShotClassifier.load(adapter, tokenizer=trained.base.tokenizer)
    same = _predict(reloaded, texts, "reloaded").tolist() == expected
    fresh, trained_on = reloaded.base.model, trained.base.model
    # The comparison with the file shows that training left the first copy's weights as they were.
    untouched = fresh is not trained_on and _same_bits(fresh, trained_on)
    IA3Model.from_pretrained(fresh, adapter).unload()
    bitwise = untouched and _same_bits(fresh, trained_on)
    IA3Model.from_pretrained(fresh, adapter).merge_and_unload(safe_merge=True)
    return {
        "reloaded_equal": same,
        "merged_equal": _merged(reloaded, adapter, texts).tolist() == expected,
        "unloaded_bitwise": bitwise,
    }


def _merged(loaded: FewShotClassifier, adapter: Path, texts: list[str]) -> Any:
    """What the base model of a classifier predicts, into which its adapter was merged."""
    from ..classify.estimator import FewShotClassifier, read_classifier
    from ..sentences.embedding import embeddings, tokenized

    head = read_classifier(adapter).head
    if head is not None:
        base: Any = loaded.base
        found = embeddings(base, tokenized(base, texts))
        return loaded.classes_[head.scores(found).argmax(1).numpy()]
    classes = loaded.classes_.tolist()
    plain = FewShotClassifier(
        loaded.base.model,
        template=loaded.templates_,
        choices=dict(zip(classes, loaded.choices_, strict=True)),
        steps=0,
        tokenizer=loaded.base.tokenizer,
    )
    return _predict(plain.fit(texts[:1], classes[:1]), texts, "merged")


def _same_bits(one: nn.Module, other: nn.Module) -> bool:
    import torch

    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _predict(classifier: FewShotClassifier, texts: list[str], what: str) -> Any:
    with counting_bar(what, len(texts)) as progress:
        return classifier.predict(texts, progress=progress)
