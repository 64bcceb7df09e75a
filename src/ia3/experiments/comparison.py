"""Zero-shot, in-context learning, T-Few and SetFit on the same samples: how good, at what cost.

The paper compares methods by accuracy and by floating-point operations (section 4.2). Here seconds
are measured beside them, and every method sees the very same samples.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from ..adapter.files import adapter_files
from ..adapter.fingerprint import fingerprint
from ..base.loading import EMBEDDED_MODEL, BaseModel, load_base_model
from ..classify.estimator import FewShotClassifier
from ..classify.inputs import TEXT
from ..classify.ranking import RankingClassifier
from ..errors import IA3Error, check_methods, counted, did_you_mean
from ..tfew.prompts.encoding import EncodedExample, Encoder
from ..tfew.prompts.labels import Label, Text
from ..tfew.prompts.templates import Template
from ..tfew.scoring.choices import longest_sequence, longest_shared
from ..tfew.scoring.evaluation import Spread, spread
from ..tfew.scoring.prefix import caches_prefix
from ..tfew.training.trainer import TFewConfig
from .costs import Cost, answer_tokens, in_context_cost, model_size, tfew_cost, zero_shot_cost
from .in_context import Ensemble, InContextClassifier, by_label, check_ensemble
from .results import Results, digest, is_typed
from .setfit import SetFit, check_setfit, run_setfit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

METHODS = ("zero-shot", "icl", "tfew", "setfit")

# As `ia3.report.console.counting_bar`: from what is done, and how much of it there is, to a context
# with a function that is called with how much more is done.
Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class Sample:
    """Labelled texts to learn from, and others to answer; the seed is of draw and training."""

    seed: int
    texts: Sequence[Text]
    labels: Sequence[Label]
    test_texts: Sequence[Text]
    test_labels: Sequence[Label]


@dataclass(frozen=True)
class Settings:
    """How the methods are run: arguments of `FewShotClassifier` and `InContextClassifier`.

    SetFit, if it is compared, reads the texts without any template.
    """

    model: str | Path | nn.Module = EMBEDDED_MODEL
    template: str | Sequence[str] | None = None
    choices: Mapping[Any, str] | None = None
    steps: int | None = None
    learning_rate: float | None = None
    ensemble: Ensemble = "none"
    calibrate: bool = False
    device: str = "auto"
    dtype: str = "auto"
    tokenizer: PreTrainedTokenizerBase | None = None
    setfit: SetFit | None = None

    def common(self) -> dict[str, Any]:
        """The arguments that all classifiers share."""
        names = ("model", "template", "choices", "device", "dtype", "tokenizer")
        return {name: getattr(self, name) for name in names}

    def training(self) -> dict[str, Any]:
        """T-Few's own arguments, where they are given."""
        given = {"steps": self.steps, "learning_rate": self.learning_rate}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Run:
    """What one method made of one sample.

    Floating-point operations are counted by `costs`; seconds are without loading and importing.
    """

    method: str
    seed: int
    accuracy: float  # from 0 to 1
    train_seconds: float  # before the first answer: training, or reading the demonstrations
    answer_seconds: float  # a test text, all of them answered at once
    flops_before: float
    flops_an_answer: float
    # In-context learning's, if it read the demonstrations for every answer, as the paper counts.
    flops_uncached: float | None
    # Beside the base model: the adapter's files, the demonstrations' tokens, SetFit's encoder.
    stored_bytes: int
    examples: int
    examples_used: int  # in-context learning's must fit the context
    answers: int


@dataclass(frozen=True)
class Summary:
    """A method's runs: medians, and the fewest and the most examples."""

    method: str
    runs: int
    accuracy: Spread
    train_seconds: float
    answer_seconds: float
    flops_before: float
    flops_an_answer: float
    flops_uncached: float | None
    stored_bytes: int
    examples: tuple[int, int]
    examples_used: tuple[int, int]


def draw_samples(
    texts: Sequence[Text],
    labels: Sequence[Label],
    test: tuple[Sequence[Text], Sequence[Label]] | None = None,
    *,
    shots: int | None = None,
    seeds: int = 5,
) -> list[Sample]:
    """Draw one sample for each seed, from 0, of `shots` examples of each label.

    By default a sample has all examples, and only their order differs from seed to seed. `test` has
    the texts to answer and their labels; by default they are those that a sample leaves over.
    """
    if shots is None and test is None:
        raise IA3Error(
            "there is nothing to test on: give test data, or shots, so that the examples that are "
            "not drawn are the test set"
        )

    def rows(indices: Sequence[int]) -> tuple[list[Text], list[Label]]:
        return [texts[i] for i in indices], [labels[i] for i in indices]

    samples = []
    for seed in range(seeds):
        drawn = range(len(texts)) if shots is None else _drawn(labels, shots, seed)
        rest = [i for i in range(len(texts)) if i not in {*drawn}]
        if test is None and not rest:
            raise IA3Error(
                f"shots is {shots}, which takes all {len(texts)} examples and leaves none to test "
                "on: give fewer, or test data"
            )
        samples.append(Sample(seed, *rows(drawn), *(test or rows(rest))))
    return samples


def _drawn(labels: Sequence[Label], shots: int, seed: int) -> Sequence[int]:
    """The indices of `shots` examples of each label, in the order of the data."""
    draw = random.Random(seed)
    drawn: list[int] = []
    for label, indices in by_label(labels).items():
        if len(indices) < shots:
            raise IA3Error(
                f"shots is {shots}, and the label {label!r} has "
                f"{counted(len(indices), 'example')}: give fewer shots, or more examples"
            )
        drawn += draw.sample(indices, shots)
    return sorted(drawn)


# -- runs ------------------------------------------------------------------------------------------


def compare(
    samples: Sequence[Sample],
    methods: Sequence[str] = ("zero-shot", "icl", "tfew"),
    settings: Settings | None = None,
    *,
    results: str | Path | None = None,
    anew: bool = False,
    bar: Bar = lambda what, total: nullcontext(lambda done: None),
) -> list[Run]:
    """Run methods on samples, one after the other; returns the runs by sample, then by method.

    The untuned model answers the same texts always the same, so it runs on them only once.

    Args:
        samples: at least one, each with a seed of its own.
        methods: of `METHODS`.
        settings: by default the classifiers' own.
        results: a JSON Lines file to which every run is added when it is done. Runs that are in it
            already, of the same data and settings, are not repeated.
        anew: remove this file first.
        bar: shows how far a run is.
    """
    settings = settings or Settings()
    _check(samples, methods, settings)
    base = load_base_model(
        settings.model,
        tokenizer=settings.tokenizer,
        device=settings.device,
        dtype=settings.dtype,
    )
    if results is not None and anew:
        Path(results).unlink(missing_ok=True)
    names = {field.name for field in fields(Run)}
    number = (int, float)
    of_type: dict[object, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": number}
    kinds = {f.name: of_type.get(f.type, (*number, NoneType)) for f in fields(Run)}
    kinds["conditions"] = (dict,)
    stored = Results(results, lambda record: is_typed(record, kinds), "a run of a comparison")
    runs, untuned = [], []
    for sample, method in product(samples, methods):
        conditions = _conditions(method, sample, settings, base)
        if method == "zero-shot":
            if conditions in untuned:
                continue
            untuned.append(conditions)
        record = stored.find(method=method, seed=sample.seed, conditions=conditions)
        if record is None:
            run = _run(method, sample, settings, base, bar)
            stored.add({**asdict(run), "conditions": conditions})
        else:
            run = Run(**{name: record[name] for name in names})
        runs.append(run)
    return runs


def _check(samples: Sequence[Sample], methods: Sequence[str], settings: Settings) -> None:
    """Raise an error now for what would fail only after minutes."""
    check_methods(methods, METHODS)
    check_ensemble(settings.ensemble)
    if len({*methods}) < len(methods):
        raise IA3Error(f"a method is given more than once: {', '.join(methods)}")
    for sample in samples:
        known = {*sample.labels, *(settings.choices or ())}
        unknown = [label for label in sample.test_labels if label not in known]
        if unknown:
            names = sorted(map(str, known))
            raise IA3Error(
                f"test label {unknown[0]!r} is not among the choices {names}"
                f"{did_you_mean(str(unknown[0]), names)}"
            )
    if "setfit" in methods:
        if settings.setfit is None:
            raise IA3Error(
                "setfit runs in an environment of its own: give settings.setfit (--setfit-python), "
                "its interpreter; benchmarks/setfit-requirements.txt lists what to install there"
            )
        check_setfit(settings.setfit)


def summaries(runs: Sequence[Run]) -> list[Summary]:
    """One summary a method, in the order of `METHODS`."""
    by_method = {method: [run for run in runs if run.method == method] for method in METHODS}
    return [_summary(of_method) for of_method in by_method.values() if of_method]


def _summary(runs: Sequence[Run]) -> Summary:
    values = {field.name: [getattr(run, field.name) for run in runs] for field in fields(Run)}
    uncached = values["flops_uncached"]
    averaged = ("train_seconds", "answer_seconds", "flops_before", "flops_an_answer")
    medians: dict[str, Any] = {name: statistics.median(values[name]) for name in averaged}
    return Summary(
        method=runs[0].method,
        runs=len(runs),
        accuracy=spread(values["accuracy"]),
        stored_bytes=round(statistics.median(values["stored_bytes"])),
        examples=(min(values["examples"]), max(values["examples"])),
        examples_used=(min(values["examples_used"]), max(values["examples_used"])),
        flops_uncached=None if None in uncached else statistics.median(uncached),
        **medians,
    )


# -- one method on one sample ----------------------------------------------------------------------


class _Fitted(NamedTuple):
    """What was done before the first answer, and what an answer costs."""

    train_seconds: float
    cost: Cost
    examples_used: int
    flops_uncached: float | None = None


def _as_run(
    method: str, sample: Sample, predicted: Sequence[Any], answer_seconds: float, fitted: _Fitted
) -> Run:
    right = sum(str(a) == str(b) for a, b in zip(predicted, sample.test_labels, strict=True))
    return Run(
        method=method,
        seed=sample.seed,
        accuracy=right / len(predicted),
        train_seconds=fitted.train_seconds,
        answer_seconds=answer_seconds,
        **vars(fitted.cost),
        flops_uncached=fitted.flops_uncached,
        examples=0 if method == "zero-shot" else len(sample.texts),
        examples_used=fitted.examples_used,
        answers=len(sample.test_texts),
    )


def _run(method: str, sample: Sample, settings: Settings, base: BaseModel, bar: Bar) -> Run:
    if method == "setfit":
        return _setfit_run(sample, settings, base, bar)
    # The first use probes the model and imports modules, which must not count as training.
    untuned = FewShotClassifier(**settings.common(), steps=0).fit(sample.texts, sample.labels)
    untuned.predict(sample.test_texts[:1])
    asked, prompts = _encoded(base, untuned, sample.test_texts), len(untuned.templates_)
    cost = zero_shot_cost(model_size(base.model), prompts * answer_tokens(asked))
    classifier: FewShotClassifier | InContextClassifier
    if method == "zero-shot":
        classifier, fitted = untuned, _Fitted(0.0, cost, 0)
    elif method == "tfew":
        classifier, fitted = _tfew(sample, settings, base, cost, bar)
    else:
        classifier, fitted = _in_context(sample, settings, base, asked)
        prompts = sum(map(len, classifier.demonstrations_))
    answering = f"{method}, seed {sample.seed}: answering"
    with bar(answering, prompts * len(sample.test_texts)) as advance:
        started = time.perf_counter()
        predicted = classifier.predict(sample.test_texts, progress=advance).tolist()
        seconds = time.perf_counter() - started
    return _as_run(method, sample, predicted, seconds / len(predicted), fitted)


def _tfew(
    sample: Sample, settings: Settings, base: BaseModel, answering: Cost, bar: Bar
) -> tuple[FewShotClassifier, _Fitted]:
    trained = FewShotClassifier(**settings.common(), **settings.training(), seed=sample.seed)
    with bar(f"tfew, seed {sample.seed}: training", trained.steps) as advance:
        started = time.perf_counter()
        trained.fit(sample.texts, sample.labels, on_step=lambda step: advance(1))
        seconds = time.perf_counter() - started
    examples = len(sample.texts)
    # The last batch of an epoch may be smaller.
    batches = math.ceil(examples / TFewConfig().batch_size)
    training = tfew_cost(
        model_size(base.model),
        answer_tokens(_encoded(base, trained, sample.texts)),
        steps=trained.steps,
        batch_size=examples / batches,
        stored_bytes=sum(map(len, adapter_files(trained.adapter_).values())),
    )
    cost = replace(training, flops_an_answer=answering.flops_an_answer)
    return trained, _Fitted(seconds, cost, examples)


def _in_context(
    sample: Sample, settings: Settings, base: BaseModel, asked: Sequence[EncodedExample]
) -> tuple[InContextClassifier, _Fitted]:
    given = {**settings.common(), "ensemble": settings.ensemble, "calibrate": settings.calibrate}
    classifier = InContextClassifier(**given, leave_out=True, seed=sample.seed)
    started = time.perf_counter()
    classifier.fit(sample.texts, sample.labels)
    # The first answer computes the demonstrations.
    classifier.predict(sample.test_texts[:1])
    seconds = time.perf_counter() - started
    counts = classifier.demonstration_tokens_
    longest = max(map(max, counts)) + max(map(longest_sequence, asked))
    cost = in_context_cost(
        model_size(base.model),
        answer_tokens(asked),
        sum(map(sum, counts)),
        members=sum(map(len, counts)),
        cached=caches_prefix(base) and longest <= longest_shared(base),
    )
    uncached = cost.flops_before + cost.flops_an_answer
    if settings.calibrate:
        # Calibration scores a text without content as well.
        cost = replace(cost, flops_before=cost.flops_before + cost.flops_an_answer)
    return classifier, _Fitted(seconds, cost, classifier.examples_used_, uncached)


def _setfit_run(sample: Sample, settings: Settings, base: BaseModel, bar: Bar) -> Run:
    assert settings.setfit is not None
    with bar(f"setfit, seed {sample.seed}", 1) as advance:
        result = run_setfit(
            settings.setfit,
            [_plain(text) for text in sample.texts],
            [str(label) for label in sample.labels],
            [_plain(text) for text in sample.test_texts],
            seed=sample.seed,
            use_gpu=base.device.type != "cpu",
        )
        advance(1)
    fitted = _Fitted(result.train_seconds, result.cost, len(sample.texts))
    return _as_run("setfit", sample, result.predicted, result.answer_seconds, fitted)


def _encoded(
    base: BaseModel, classifier: RankingClassifier, texts: Sequence[Text]
) -> list[EncodedExample]:
    encoder = Encoder(base, classifier.choices_, chat=False)
    templates = [Template(source) for source in classifier.templates_]
    fields = [{TEXT: t} if isinstance(t, str) else t for t in texts]
    return [encoder.encode(f, template) for f in fields for template in templates]


def _plain(text: Text) -> str:
    """A text without a template: one field's value, or all fields with their names."""
    fields = {TEXT: text} if isinstance(text, str) else text
    if len(fields) == 1:
        return str(*fields.values())
    return "\n".join(f"{name}: {value}" for name, value in fields.items())


# -- what a run's results depend on ----------------------------------------------------------------


def _conditions(method: str, sample: Sample, settings: Settings, base: BaseModel) -> dict[str, Any]:
    labels = sorted(map(str, {*sample.labels}))  # all that the untuned model sees of the examples
    conditions: dict[str, Any] = {
        "examples": digest(labels if method == "zero-shot" else [sample.texts, sample.labels]),
        "test": digest([sample.test_texts, sample.test_labels]),
        "device": base.device.type,
    }
    if method == "setfit":
        assert settings.setfit is not None
        return {**conditions, "model": settings.setfit.model, "python": str(settings.setfit.python)}
    template = settings.template or None
    tokenizer = base.tokenizer
    conditions |= {
        "model": digest(fingerprint(base.model).to_json()),
        "dtype": str(next(base.model.parameters()).dtype),
        "tokenizer": digest([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]),
        "template": [template] if isinstance(template, str) else template and list(template),
        "choices": settings.choices and {str(k): words for k, words in settings.choices.items()},
    }
    if method == "icl":
        conditions |= {"ensemble": settings.ensemble, "calibrate": settings.calibrate}
    if method == "tfew":
        classifier = FewShotClassifier(**settings.training())
        conditions |= {"steps": classifier.steps, "learning_rate": classifier.learning_rate}
    return conditions
