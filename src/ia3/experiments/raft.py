"""RAFT (Alex et al. 2021, arXiv 2109.14076): tasks of 50 labelled examples and a hidden test set.

The paper's section 4.3 has T-Few on it. Its labelled examples are all there is to score with, so
parts of them are held out in turn; the test set is predicted for the benchmark to score. On a small
machine this takes hours: predictions are kept in a file as they come, and what is in it is not
computed again.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

from ..adapter.fingerprint import fingerprint
from ..base.loading import BaseModel
from ..errors import IA3Error, MissingExtraError, check_methods
from ..files.atomic import check_folder
from ..files.tables import Row
from ..tfew.prompts.encoding import EncodedExample, Encoder, TrainingExample, context_length
from ..tfew.prompts.tasks import few_shot
from ..tfew.scoring.evaluation import predict_choices
from ..tfew.temporary_adapter import all_linear, paper_sites, temporary_adapter
from ..tfew.training.trainer import TFewConfig, TrainingStep, train
from .in_context import BREAK, WithDemonstrations, fitting, longest_input, token_counts
from .raft_data import ID, LABEL, PARTS, RaftTask
from .results import Results, is_typed

try:
    from sklearn.metrics import accuracy_score, f1_score
except ImportError as error:
    raise MissingExtraError("scikit-learn", "experiments", "scoring RAFT") from error

Method = Literal["majority", "zero-shot", "icl", "tfew"]
METHODS: tuple[Method, ...] = get_args(Method)
Sites = Literal["all-linear", "paper"]

RESULTS_NAME = "results.jsonl"
# A killed run predicts at most this many test examples a second time.
PREDICTED_AT_ONCE = 100
TEST = "test"
RECORD: dict[str, tuple[type, ...]] = {
    "task": (str,),
    "method": (str,),
    "split": (int, str),
    "part": (int,),
    "ids": (list,),
    "predictions": (list,),
    "settings": (dict,),
}


@dataclass(frozen=True)
class RaftScore:
    """A method's score on a task, over the held-out rows of all folds together.

    Macro F1 is, as in the benchmark, the mean of the F1 scores of all labels that occur, in truth
    or prediction.
    """

    task: str
    method: Method
    macro_f1: float
    accuracy: float
    examples: int
    demonstrations: tuple[int, ...] = ()  # in-context learning's in the prompts, [folds]


@dataclass(frozen=True)
class PublicScore:
    """The score on those test rows whose label is public elsewhere."""

    macro_f1: float
    accuracy: float
    matched: int
    rows: int


def public_score(truth: Sequence[str | None], predicted: Sequence[str]) -> PublicScore:
    """The score of a `submission` where `public_labels` knows the truth, which is once at least."""
    known = [(t, p) for t, p in zip(truth, predicted, strict=True) if t is not None]
    macro_f1, accuracy = _scores(*map(list, zip(*known, strict=True)))
    return PublicScore(macro_f1, accuracy, len(known), len(truth))


def _scores(truth: Sequence[str], predicted: Sequence[str]) -> tuple[float, float]:
    macro_f1 = float(f1_score(truth, predicted, average="macro"))
    return macro_f1, float(accuracy_score(truth, predicted))


# -- cross-validation and submission ---------------------------------------------------------------


@dataclass(frozen=True)
class RaftSettings:
    """How a model is tuned and asked.

    Args:
        config: the recipe; its seed is also of the draws of held-out rows and demonstrations.
        sites: `"all-linear"`, those of `FewShotClassifier`, or `"paper"`, those of section 3.3.
        max_prompt_tokens: longer prompts are cut (see `Encoder`); each demonstration too.
    """

    config: TFewConfig = field(default_factory=TFewConfig)
    sites: Sites = "all-linear"
    max_prompt_tokens: int | None = None

    def of(self, method: Method, base: BaseModel, task: RaftTask) -> dict[str, Any]:
        """What a method's predictions depend on, by name, for results that are kept."""
        settings = {"data": task.digest(), "seed": self.config.seed}
        if method == "majority":
            return settings
        settings |= {
            "model": base.name,
            "base model": hashlib.sha256(fingerprint(base.model).to_json().encode()).hexdigest(),
            "dtype": str(next(base.model.parameters()).dtype).removeprefix("torch."),
            "max_prompt_tokens": self.max_prompt_tokens,
        }
        if method == "tfew":
            settings |= {**asdict(self.config), "sites": self.sites}
            # The limit on memory does not change predictions.
            del settings["max_tokens"]
        return settings


def held_out(examples: int, folds: int, seed: int) -> list[list[int]]:
    """Which rows are held out, `[folds]`: of each fold a fifth, in no two folds the same.

    Drawn whatever the labels, as the authors of T-Few do.
    """
    order = few_shot(range(examples), examples, seed)
    bounds = [examples * i // PARTS for i in range(PARTS + 1)]
    return [order[bounds[i] : bounds[i + 1]] for i in range(folds)]


def cross_validate(
    base: BaseModel,
    task: RaftTask,
    settings: RaftSettings | None = None,
    *,
    methods: Sequence[Method] = METHODS,
    folds: int = PARTS,
    results: str | Path | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[RaftScore]:
    """The scores of methods on a task's labelled rows, of which a fifth is held out in each fold.

    `"majority"` predicts the most frequent label of the others, and the first in the benchmark's
    order where several are; `"zero-shot"` ranks the choices with the model as it is; `"icl"`
    puts as many of the others before the prompt as its context holds, in an order drawn by the
    seed; `"tfew"` trains new vectors on them (paper section 3.5). The base model stays as it is.

    Args:
        methods: of `METHODS`, in whose order the scores are.
        folds: 1 to 5; with 5 every row is held out once.
        results: a folder for a file of predictions. What is in it is not computed again, and a
            training that was killed goes on.
        progress: called with the rows predicted and steps taken since the last call, of `work`.
    """
    run = _Run(base, task, settings or RaftSettings(), _results(results), progress)
    wanted = [method for method in METHODS if method in methods]
    for method in wanted:
        _check_settings(run, method)
    folds_held = held_out(len(task.train), folds, run.settings.config.seed)
    truth = [task.train[i][LABEL] for held in folds_held for i in held]
    scores = []
    for method in wanted:
        records = [_fold(run, method, number, held) for number, held in enumerate(folds_held)]
        scored = _scores(truth, [label for record in records for label in record["predictions"]])
        shown = tuple(len(r["demonstrations"]) for r in records if "demonstrations" in r)
        scores.append(RaftScore(task.name, method, *scored, len(truth), shown))
    return scores


def parse_methods(names: str) -> list[Method]:
    """The methods in a text such as "majority,tfew", in order; raises as `check_methods` does."""
    given = [name.strip() for name in names.split(",") if name.strip()]
    check_methods(given, METHODS)
    return [method for method in METHODS if method in given]


def submission(
    base: BaseModel,
    task: RaftTask,
    settings: RaftSettings | None = None,
    *,
    results: str | Path | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Train on all labelled rows and predict the test rows; arguments as in `cross_validate`."""
    run = _Run(base, task, settings or RaftSettings(), _results(results), progress)
    _check_settings(run, "tfew")
    size = PREDICTED_AT_ONCE
    parts = [task.test[start : start + size] for start in range(0, len(task.test), size)]
    keys = [_key(run, "tfew", TEST, n, part) for n, part in enumerate(parts)]
    records = [run.results.find(**key) for key in keys]
    missing = [n for n, record in enumerate(records) if record is None]
    to_predict = sum(len(parts[n]) for n in missing)
    run.progress(len(task.test) - to_predict)
    if missing:
        encoder, prompt = run.encoder(), task.template.prompt
        with _tuned(run, TEST, range(len(task.train))):
            for n in missing:
                examples = [encoder.encode(task.example(row), prompt) for row in parts[n]]
                records[n] = _add(run, keys[n], _predict(run, examples))
        run.warn_of_cut_texts(encoder, to_predict)
    else:
        run.progress(run.settings.config.steps)
    _forget_checkpoints(run, TEST)
    return [label for record in records if record for label in record["predictions"]]


def work(task: RaftTask, settings: RaftSettings, methods: Sequence[Method], folds: int) -> int:
    """How many rows and steps `cross_validate` counts."""
    rows = sum(map(len, held_out(len(task.train), folds, settings.config.seed)))
    return rows * len({*methods}) + ("tfew" in methods) * folds * settings.config.steps


# -- one task with one model -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """What the steps below are given; rows are encoded once, when they are first needed."""

    base: BaseModel
    task: RaftTask
    settings: RaftSettings
    results: Results
    progress: Callable[[int], None]

    @cached_property
    def encoded(self) -> list[tuple[EncodedExample, bool]]:
        """The labelled rows, and whether their texts were cut at the end."""
        encoder = self.encoder()
        rows = []
        for row in self.task.train:
            before = encoder.truncated
            example = encoder.encode(self.task.example(row), self.task.template.prompt)
            rows.append((example, encoder.truncated > before))
        self.warn_of_cut_texts(encoder, len(rows))
        return rows

    def encoder(self, max_prompt_tokens: int | None = None) -> Encoder:
        limit = max_prompt_tokens or self.settings.max_prompt_tokens
        return Encoder(self.base, self.task.choices, chat=False, max_prompt_tokens=limit)

    def warn_of_cut_texts(self, encoder: Encoder, prompts: int) -> None:
        if encoder.truncated:
            limit = self.settings.max_prompt_tokens
            than = "the model's context" if limit is None else f"{limit} tokens"
            warnings.warn(
                f"{self.task.name}: {encoder.truncated} of {prompts} prompts are longer than "
                f"{than}: their texts were cut at the end",
                stacklevel=3,
            )


def _fold(run: _Run, method: Method, number: int, held: Sequence[int]) -> dict[str, Any]:
    """The record of one fold, found or computed."""
    task = run.task
    key = _key(run, method, number, 0, [task.train[i] for i in held])
    record = run.results.find(**key)
    if record is None:
        others = [i for i in range(len(task.train)) if i not in held]
        predicted, shown = _predicted(run, method, number, held, others)
        more = {"demonstrations": [task.train[i][ID] for i in shown]} if method == "icl" else {}
        record = _add(run, key, predicted, **more)
    else:
        run.progress(len(held) + (method == "tfew") * run.settings.config.steps)
    if method == "tfew":
        _forget_checkpoints(run, number)
    return record


def _predicted(
    run: _Run, method: Method, fold: int, held: Sequence[int], others: Sequence[int]
) -> tuple[list[int], list[int]]:
    """The held-out rows' predictions, and the rows that stood before the prompts."""
    if method == "majority":
        counts = Counter(run.task.train[i][LABEL] for i in others)
        run.progress(len(held))
        return [run.task.labels.index(max(run.task.labels, key=counts.__getitem__))] * len(held), []
    if method == "icl":
        with run.base.lock:
            return _in_context(run, fold, held, others)
    with _tuned(run, fold, others) if method == "tfew" else run.base.lock:
        return _predict(run, [run.encoded[i][0] for i in held]), []


def _predict(run: _Run, examples: Sequence[EncodedExample]) -> list[int]:
    max_tokens = run.settings.config.max_tokens
    return predict_choices(run.base, examples, max_tokens=max_tokens, progress=run.progress)


@contextmanager
def _tuned(run: _Run, split: int | str, rows: Sequence[int]) -> Iterator[None]:
    """The base model with vectors trained on these rows."""
    taken = 0

    def on_step(step: TrainingStep) -> None:
        nonlocal taken
        run.progress(step.step - taken)
        taken = step.step

    config = run.settings.config
    task, encoded = run.task, run.encoded
    examples = [TrainingExample((encoded[i][0],), task.answer(task.train[i])) for i in rows]
    sites = paper_sites if run.settings.sites == "paper" else all_linear
    checkpoints = _checkpoints(run, split)
    with temporary_adapter(run.base, sites(run.base)) as model:
        train(run.base, model, examples, config, on_step, checkpoints=checkpoints)
        run.progress(config.steps - taken)
        yield


def _in_context(
    run: _Run, fold: int, held: Sequence[int], others: Sequence[int]
) -> tuple[list[int], list[int]]:
    """The predictions, and the rows that stood before the prompts."""
    base, task = run.base, run.task
    asked = [run.encoded[i][0] for i in held]
    room = context_length(base) - longest_input(base, asked)
    draw = random.Random(f"{run.settings.config.seed}/{task.name}/{fold}")
    written = [_demonstration(run, i) for i in range(len(task.train))]
    shown = fitting(base, [written], [room], draw.sample(others, len(others)))
    text = "".join(written[i] for i in shown)
    limit = run.settings.max_prompt_tokens
    encoder = run.encoder(limit and limit + token_counts(base, [text])[0])
    template = WithDemonstrations(task.template.prompt.source, text)
    examples = [encoder.encode(task.example(task.train[i]), template) for i in held]
    return _predict(run, examples), shown


def _demonstration(run: _Run, i: int) -> str:
    """A labelled row's prompt, cut where its prompt alone was cut, and its answer."""
    task, (encoded, was_cut) = run.task, run.encoded[i]
    row = task.train[i]
    if was_cut:
        prompt = run.base.tokenizer.decode(
            encoded.prompt, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    else:
        prompt = task.template.prompt.render(task.example(row), task.choices)
    return f"{prompt} {task.choices[task.answer(row)]}{BREAK}"


def _results(folder: str | Path | None) -> Results:
    if folder is not None:
        check_folder(folder)
        folder = Path(folder) / RESULTS_NAME
    return Results(folder, _is_result, "a result of RAFT")


def _is_result(record: Mapping[str, Any]) -> bool:
    if not is_typed(record, RECORD) or len(record["ids"]) != len(record["predictions"]):
        return False
    return all(isinstance(label, str) for label in record["predictions"])


def _check_settings(run: _Run, method: Method) -> None:
    """Refuse to mix a method's results with those of other settings."""
    task, settings = run.task.name, run.settings.of(method, run.base, run.task)
    of_method = [record for record in run.results if record["method"] == method]
    for record, (name, value) in product(of_method, settings.items()):
        there = record["settings"].get(name)
        if there == value or (name == "data" and record["task"] != task):
            continue
        how = f"of {method} have {name}={there!r}, this run {value!r}"
        if name == "data":
            how = f"of {task} were computed on other data"
        raise IA3Error(
            f"{run.results.path}: its results {how}; give another folder, or remove this one to "
            "begin anew"
        )


def _key(
    run: _Run, method: Method, split: int | str, part: int, rows: Sequence[Row]
) -> dict[str, Any]:
    """What the predictions of these rows are found by."""
    ids = [row[ID] for row in rows]
    return {"task": run.task.name, "method": method, "split": split, "part": part, "ids": ids}


def _add(run: _Run, key: dict[str, Any], predicted: Sequence[int], **more: Any) -> dict[str, Any]:
    """Keep predictions; returns their record."""
    record = {
        **key,
        "predictions": [run.task.labels[i] for i in predicted],
        "settings": run.settings.of(key["method"], run.base, run.task),
        **more,
    }
    run.results.add(record)
    return record


def _checkpoints(run: _Run, split: int | str) -> Path | None:
    path = run.results.path
    return None if path is None else path.parent / "checkpoints" / f"{run.task.name}-{split}"


def _forget_checkpoints(run: _Run, split: int | str) -> None:
    folder = _checkpoints(run, split)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # not there, or another training's are in it
            folder.parent.rmdir()
