"""Zero-shot, in-context learning, T-Few and SetFit on the same samples: how good, at what cost.

The paper compares methods by accuracy and by floating-point operations (section 4.2). Here seconds
are measured beside them, and every method sees the very same samples.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from ..adapter.fingerprint import fingerprint
from ..adapter.store import adapter_files
from ..base.loading import EMBEDDED_MODEL, BaseModel, device_named, load_base_model
from ..classify.estimator import FewShotClassifier
from ..classify.ranking import TEXT, RankingClassifier
from ..errors import IA3Error, check_methods, did_you_mean
from ..tfew.prompts.encoding import EncodedExample, Encoder
from ..tfew.prompts.labels import Label, Text
from ..tfew.prompts.templates import Template
from ..tfew.scoring.choices import longest_sequence, longest_shared
from ..tfew.scoring.evaluation import Spread, spread
from ..tfew.scoring.prefix import caches_prefix
from .costs import Cost, answer_tokens, in_context_cost, model_size, tfew_cost, zero_shot_cost
from .in_context import ENSEMBLES, Ensemble, InContextClassifier
from .results import Results, digest
from .setfit import SetFit, check_setfit, run_setfit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

METHODS = ("zero-shot", "icl", "tfew", "setfit")

# As `ia3.report.console.counting_bar`: from what is done and how much of it there is to a context
# with a function that is called with how much more is done.
Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class Sample:
    """What a method is given: labelled texts to learn from, and others to answer.

    Attributes:
        seed: of the draw, and of the training.
        texts: strings, or mappings from field names to values, `[examples]`.
        labels: `[examples]`.
        test_texts: `[answers]`.
        test_labels: `[answers]`.
    """

    seed: int
    texts: Sequence[Text]
    labels: Sequence[Label]
    test_texts: Sequence[Text]
    test_labels: Sequence[Label]


@dataclass(frozen=True)
class Settings:
    """How the methods are run, each with the same prompts.

    Attributes:
        model: as in `FewShotClassifier`; as are `template`, `choices`, `device`, `dtype` and
            `tokenizer`.
        steps: of T-Few; by default `FewShotClassifier`'s.
        learning_rate: likewise.
        ensemble: of in-context learning, as in `InContextClassifier`.
        calibrate: likewise.
        setfit: where SetFit is, if it is compared. It reads the texts without any template.
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

    Attributes:
        method: one of `METHODS`.
        seed: of the sample.
        accuracy: share of the test texts answered rightly, from 0 to 1.
        train_seconds: before the first answer: training, or reading the demonstrations. Loading and
            importing are not counted.
        answer_seconds: a test text, all of them answered at once.
        flops_before: floating-point operations before the first answer, by `costs`.
        flops_an_answer: by `costs`, a test text.
        flops_uncached: in-context learning's an answer if it read the demonstrations each time, as
            the paper counts; of other methods `None`.
        stored_bytes: what is stored for the task beside the base model: the adapter's files, the
            demonstrations' tokens, SetFit's encoder and head.
        examples: labelled texts given.
        examples_used: of them, those that were learned from: in-context learning's must fit the
            context.
        answers: test texts.
    """

    method: str
    seed: int
    accuracy: float
    train_seconds: float
    answer_seconds: float
    flops_before: float
    flops_an_answer: float
    flops_uncached: float | None
    stored_bytes: int
    examples: int
    examples_used: int
    answers: int


@dataclass(frozen=True)
class Summary:
    """A method over all its runs: as `Run`, with medians.

    Attributes:
        runs: how many.
        accuracy: median and quartiles, from 0 to 1.
        examples: labelled texts given, the fewest and the most of a run.
        examples_used: learned from, the fewest and the most of a run.
    """

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


@contextmanager
def _no_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    yield lambda done: None


# -- samples ---------------------------------------------------------------------------------------


def draw_samples(
    texts: Sequence[Text],
    labels: Sequence[Label],
    test_texts: Sequence[Text] | None = None,
    test_labels: Sequence[Label] | None = None,
    *,
    shots: int | None = None,
    seeds: int = 5,
) -> list[Sample]:
    """Draw one sample for each seed.

    Args:
        texts: to learn from, `[examples]`.
        labels: of these.
        test_texts: to answer; by default those of `texts` that a sample leaves over.
        test_labels: of these.
        shots: examples of each label in a sample; by default a sample has all examples, and only
            their order differs from seed to seed.
        seeds: how many, from 0.

    Raises:
        IA3Error: there is nothing to test on, a label has fewer examples than `shots`, or the
            numbers of texts and labels differ.
    """
    if seeds < 1:
        raise IA3Error(f"seeds is {seeds}, expected at least 1")
    if (test_texts is None) != (test_labels is None):
        raise IA3Error("give test_texts and test_labels, or neither")
    for of_texts, of_labels in ((texts, labels), (test_texts or (), test_labels or ())):
        if len(of_texts) != len(of_labels):
            raise IA3Error(
                f"there are {len(of_texts)} texts and {len(of_labels)} labels: expected one each"
            )
    if test_texts is not None and not test_texts:
        raise IA3Error("there are no test texts: expected at least one")
    if shots is None and test_texts is None:
        raise IA3Error(
            "there is nothing to test on: give test data, or shots, so that the examples that are "
            "not drawn are the test set"
        )
    samples = []
    for seed in range(seeds):
        drawn = list(range(len(texts))) if shots is None else _drawn(labels, shots, seed)
        if test_texts is None or test_labels is None:
            rest = sorted({*range(len(texts))} - {*drawn})
            if not rest:
                raise IA3Error(
                    f"shots is {shots}, which takes all {len(texts)} examples and leaves none to "
                    "test on: give fewer, or test data"
                )
            asked = ([texts[i] for i in rest], [labels[i] for i in rest])
        else:
            asked = (list(test_texts), list(test_labels))
        samples.append(Sample(seed, [texts[i] for i in drawn], [labels[i] for i in drawn], *asked))
    return samples


def _drawn(labels: Sequence[Label], shots: int, seed: int) -> list[int]:
    """The indices of `shots` examples of each label, in the order of the data."""
    if shots < 1:
        raise IA3Error(f"shots is {shots}, expected at least 1")
    by_label: dict[Label, list[int]] = {}
    for i, label in enumerate(labels):
        by_label.setdefault(label, []).append(i)
    draw = random.Random(seed)
    drawn: list[int] = []
    for label, indices in by_label.items():
        if len(indices) < shots:
            raise IA3Error(
                f"shots is {shots}, and the label {label!r} has {len(indices)} examples: give "
                "fewer shots, or more examples"
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
    bar: Bar = _no_bar,
) -> list[Run]:
    """Run methods on samples, one after the other.

    The untuned model answers always the same: where all samples have the same test texts, it runs
    on the first one only.

    Args:
        samples: at least one, each with a seed of its own.
        methods: of `METHODS`.
        settings: by default the classifiers' own.
        results: a JSON Lines file to which every run is added when it is done. Runs that are in it
            already, of the same data and settings, are not repeated.
        anew: forget the runs that are in it.
        bar: shows how far a run is, e.g. `ia3.report.console.counting_bar`.

    Returns:
        The runs, by sample and then by method.

    Raises:
        IA3Error: a method is unknown, a test label is not among the choices, the results file is
            broken, SetFit is asked for and cannot be imported, or a classifier refuses the data.
        OSError: the results cannot be written.
    """
    settings = settings or Settings()
    _check(samples, methods, settings)
    names = {field.name for field in fields(Run)}
    stored = Results(
        None if anew else results,
        lambda record: {*names, "conditions"} <= record.keys(),
        "a run of a comparison",
    )
    base = None
    if any(method != "setfit" for method in methods):
        base = load_base_model(
            settings.model,
            tokenizer=settings.tokenizer,
            device=settings.device,
            dtype=settings.dtype,
        )
    planned = []
    for i, sample in enumerate(samples):
        for method in methods:
            if method != "zero-shot" or i == 0 or not _same_test(sample, samples[0]):
                conditions = _conditions(method, sample, settings, base)
                key = {"method": method, "seed": sample.seed, "conditions": conditions}
                planned.append((sample, method, key, stored.find(**key)))
    if settings.setfit is not None and any(
        method == "setfit" and record is None for _, method, _, record in planned
    ):
        check_setfit(settings.setfit)
    if results is not None and anew:
        Path(results).unlink(missing_ok=True)
        stored.path = Path(results)
    runs = []
    for sample, method, key, record in planned:
        if record is None:
            run = _run(method, sample, settings, base, bar)
            stored.add({**asdict(run), "conditions": key["conditions"]})
        else:
            run = Run(**{name: record[name] for name in names})
        runs.append(run)
    return runs


def summaries(runs: Sequence[Run]) -> list[Summary]:
    """One summary a method, in the order of `METHODS`."""
    by_method = {method: [run for run in runs if run.method == method] for method in METHODS}
    return [_summary(of_method) for of_method in by_method.values() if of_method]


def _summary(runs: Sequence[Run]) -> Summary:
    """Of one method's runs, at least one."""

    def median(name: str) -> float:
        return float(statistics.median(getattr(run, name) for run in runs))

    def ends(name: str) -> tuple[int, int]:
        values = [getattr(run, name) for run in runs]
        return min(values), max(values)

    return Summary(
        method=runs[0].method,
        runs=len(runs),
        accuracy=spread([run.accuracy for run in runs]),
        train_seconds=median("train_seconds"),
        answer_seconds=median("answer_seconds"),
        flops_before=median("flops_before"),
        flops_an_answer=median("flops_an_answer"),
        flops_uncached=None if runs[0].flops_uncached is None else median("flops_uncached"),
        stored_bytes=round(median("stored_bytes")),
        examples=ends("examples"),
        examples_used=ends("examples_used"),
    )


def _check(samples: Sequence[Sample], methods: Sequence[str], settings: Settings) -> None:
    """Raise an error now for what would fail only after minutes."""
    check_methods(methods, METHODS)
    if len({*methods}) < len(methods):
        raise IA3Error(f"a method is given more than once: {', '.join(methods)}")
    if "setfit" in methods and settings.setfit is None:
        raise IA3Error(
            "setfit runs in an environment of its own: give settings.setfit (--setfit-python), its "
            "interpreter; benchmarks/setfit-requirements.txt lists what to install there"
        )
    if settings.ensemble not in ENSEMBLES:
        raise IA3Error(
            f"ensemble is {settings.ensemble!r}, expected one of {', '.join(ENSEMBLES)}"
            f"{did_you_mean(settings.ensemble, ENSEMBLES)}"
        )
    if len({sample.seed for sample in samples}) < max(len(samples), 1):
        raise IA3Error("expected at least one sample, and a seed of its own for each")
    for sample in samples:
        known = {*sample.labels, *(settings.choices or ())}
        for row, label in enumerate(sample.test_labels):
            if label not in known:
                names = sorted(map(str, known))
                raise IA3Error(
                    f"test label {label!r} (row {row}) is not among the choices {names}"
                    f"{did_you_mean(str(label), names)}"
                )


def _same_test(one: Sample, other: Sample) -> bool:
    """Whether the untuned model has the same texts to answer, with the same labels to choose."""
    return (
        one.test_texts == other.test_texts
        and one.test_labels == other.test_labels
        and {*one.labels} == {*other.labels}
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


def _run(method: str, sample: Sample, settings: Settings, base: BaseModel | None, bar: Bar) -> Run:
    if base is None or method == "setfit":
        return _setfit_run(sample, settings, base, bar)
    # The first use probes the model and imports modules, which must not count as training.
    untuned = FewShotClassifier(**settings.common(), steps=0).fit(sample.texts, sample.labels)
    untuned.predict(sample.test_texts[:1])
    asked, prompts = _encoded(base, untuned, sample.test_texts), len(untuned.templates_)
    name = f"{method}, seed {sample.seed}"
    classifier: FewShotClassifier | InContextClassifier
    if method == "zero-shot":
        cost = zero_shot_cost(model_size(base.model), prompts * answer_tokens(asked))
        classifier, fitted = untuned, _Fitted(0.0, cost, 0)
    elif method == "tfew":
        classifier, fitted = _tfew(sample, settings, base, asked, bar)
    else:
        classifier, fitted = _in_context(sample, settings, base, asked)
        prompts = sum(map(len, classifier.demonstrations_))
    with bar(f"{name}: answering", prompts * len(sample.test_texts)) as advance:
        started = time.perf_counter()
        predicted = classifier.predict(sample.test_texts, progress=advance).tolist()
        seconds = time.perf_counter() - started
    return _as_run(method, sample, predicted, seconds / len(predicted), fitted)


def _tfew(
    sample: Sample,
    settings: Settings,
    base: BaseModel,
    asked: Sequence[EncodedExample],
    bar: Bar,
) -> tuple[FewShotClassifier, _Fitted]:
    """Train a classifier."""
    from ..tfew.training.trainer import TFewConfig

    trained = FewShotClassifier(**settings.common(), **settings.training(), seed=sample.seed)
    with bar(f"tfew, seed {sample.seed}: training", trained.steps) as advance:
        started = time.perf_counter()
        trained.fit(sample.texts, sample.labels, on_step=lambda step: advance(1))
        seconds = time.perf_counter() - started
    size, examples, prompts = model_size(base.model), len(sample.texts), len(trained.templates_)
    # The last batch of an epoch may be smaller.
    batches = math.ceil(examples / TFewConfig().batch_size)
    training = tfew_cost(
        size,
        answer_tokens(_encoded(base, trained, sample.texts)),
        steps=trained.steps,
        batch_size=examples / batches,
        stored_bytes=sum(map(len, adapter_files(trained.adapter_).values())),
    )
    answering = zero_shot_cost(size, prompts * answer_tokens(asked))
    cost = replace(training, flops_an_answer=answering.flops_an_answer)
    return trained, _Fitted(seconds, cost, examples)


def _in_context(
    sample: Sample, settings: Settings, base: BaseModel, asked: Sequence[EncodedExample]
) -> tuple[InContextClassifier, _Fitted]:
    """Have demonstrations in the prompt, computed once if the model can cache them."""
    classifier = InContextClassifier(
        **settings.common(),
        ensemble=settings.ensemble,
        calibrate=settings.calibrate,
        leave_out=True,
        seed=sample.seed,
    )
    started = time.perf_counter()
    classifier.fit(sample.texts, sample.labels)
    # The first answer computes the demonstrations.
    classifier.predict(sample.test_texts[:1])
    seconds = time.perf_counter() - started
    counts = classifier.demonstration_tokens_
    longest = max(map(max, counts)) + max(map(longest_sequence, asked))
    cached = caches_prefix(base) and longest <= longest_shared(base)
    each_time, cost = (
        in_context_cost(
            *(model_size(base.model), answer_tokens(asked), sum(map(sum, counts))),
            members=sum(map(len, counts)),
            cached=is_cached,
        )
        for is_cached in (False, cached)
    )
    if settings.calibrate:
        # Calibration scores a text without content as well.
        cost = replace(cost, flops_before=cost.flops_before + cost.flops_an_answer)
    used = classifier.examples_used_
    return classifier, _Fitted(seconds, cost, used, each_time.flops_an_answer)


def _setfit_run(sample: Sample, settings: Settings, base: BaseModel | None, bar: Bar) -> Run:
    assert settings.setfit is not None
    with bar(f"setfit, seed {sample.seed}", 1) as advance:
        result = run_setfit(
            settings.setfit,
            [_plain(text) for text in sample.texts],
            [str(label) for label in sample.labels],
            [_plain(text) for text in sample.test_texts],
            seed=sample.seed,
            use_gpu=_device_type(settings, base) != "cpu",
        )
        advance(1)
    fitted = _Fitted(result.train_seconds, result.cost, len(sample.texts))
    return _as_run("setfit", sample, result.predicted, result.answer_seconds, fitted)


def _encoded(
    base: BaseModel, classifier: RankingClassifier, texts: Sequence[Text]
) -> list[EncodedExample]:
    """Every text in every template."""
    encoder = Encoder(base, classifier.choices_, chat=False)
    templates = [Template(source) for source in classifier.templates_]
    fields = [{TEXT: t} if isinstance(t, str) else t for t in texts]
    return [encoder.encode(f, template) for f in fields for template in templates]


def _plain(text: Text) -> str:
    """A text without a template: one field's value, or all fields with their names."""
    if isinstance(text, str):
        return text
    if len(text) == 1:
        return str(*text.values())
    return "\n".join(f"{name}: {value}" for name, value in text.items())


# -- what a run's results depend on ----------------------------------------------------------------


def _conditions(
    method: str, sample: Sample, settings: Settings, base: BaseModel | None
) -> dict[str, Any]:
    """All that a run's results depend on, as JSON has it; the untuned model sees no example."""
    labels = sorted(map(str, {*sample.labels}))
    conditions: dict[str, Any] = {
        "examples": digest(labels if method == "zero-shot" else [sample.texts, sample.labels]),
        "test": digest([sample.test_texts, sample.test_labels]),
        "device": _device_type(settings, base),
    }
    if method == "setfit" or base is None:
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


def _device_type(settings: Settings, base: BaseModel | None) -> str:
    return (device_named(settings.device) if base is None else base.device).type
