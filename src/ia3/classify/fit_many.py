"""`fit_many`: few-shot classifiers of many tasks, trained in the same batches."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sklearn.base import clone

from ..adapter import store
from ..adapter.fingerprint import fingerprint
from ..adapter.layout import WEIGHTS_NAME
from ..base.loading import BaseModel
from ..errors import IA3Error, did_you_mean
from ..files.atomic import check_folder
from ..files.hub import CONFIG_NAME
from ..files.records import append_record, read_records
from ..model.ia3_model import DEFAULT_ADAPTER, IA3Model, check_name
from ..targets.config import IA3Config
from ..tfew.prompts.encoding import Encoder, TrainingExample
from ..tfew.prompts.labels import Text
from ..tfew.temporary_adapter import all_linear, temporary_adapter
from ..tfew.training.trainer import TFewConfig, TrainingStep, described_run
from .estimator import TASK_NAME, FewShotClassifier, adapter_to_begin_with, training_set
from .many_tasks import Ended, TaskToTrain, check_not_within_experts, train_many
from .ranking import LabelledTexts, encode_all

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

# In `out`, beside the tasks' folders: a line for each task that is finished.
RECORDS_NAME = "ia3_many.jsonl"
# A classifier's own files.
FILES = (WEIGHTS_NAME, CONFIG_NAME, TASK_NAME)
# The name of a file has 255 bytes at most, and a new folder is written under a longer name first.
LONGEST_NAME = 240
# So many tasks are trained at a time. Of more, some are finished and kept before others begin.
AT_ONCE = 64

OnStep = Callable[[str, TrainingStep], bool | None]


@dataclass(frozen=True)
class FittedTasks:
    """What `fit_many` made.

    Attributes:
        classifiers: task name -> its fitted classifier, in the order in which they were given.
        failures: task name -> why it has none.
    """

    classifiers: dict[str, FewShotClassifier]
    failures: dict[str, IA3Error]


def fit_many(
    tasks: Mapping[str, tuple[Sequence[Text], ArrayLike]],
    classifier: FewShotClassifier | Mapping[str, FewShotClassifier] | None = None,
    *,
    out: str | Path | None = None,
    on_step: OnStep | None = None,
    max_tokens: int | None = None,
) -> FittedTasks:
    """Fit a classifier to each of many tasks, all in the same batches.

    Each is what its own `fit` gives, but for rounding and for dropout: it sees the same examples in
    the same order, with its own seed, steps and learning rate. A task with bad data, or that
    diverges, fails alone.

    Args:
        tasks: name -> texts and labels, as `FewShotClassifier.fit` takes them. Names are adapters':
            without dots, slashes and white space; in UTF-8 they have at most 240 bytes.
        classifier: the settings of all tasks, or name -> a task's own; they stay unfitted. All
            are of one base model.
        out: a folder in which each task's classifier is saved under its name as soon as it is
            fitted. The same call after a break trains only what is not there yet, had other data
            or settings, or was written over since.
        on_step: called after every step of every task, with the task's name. Where it returns true,
            that task ends with this step.
        max_tokens: computed at once, of all tasks together; by default the least of the
            classifiers'.

    Raises:
        IA3Error: there are no tasks, a name is malformed, the classifiers are not those of the
            tasks or are of several base models, or `max_tokens` is below 1. Nothing is then done.
        OSError: a classifier cannot be saved; those before it stay.
    """
    classifiers = _classifiers(tasks, classifier)
    if max_tokens is not None and max_tokens < 1:
        raise IA3Error(f"max_tokens is {max_tokens}, expected at least 1")
    base = _one_base(classifiers)
    if out is not None:
        check_folder(out)
    finished = {} if out is None else _finished(Path(out))
    prepare = _Preparing(base)
    prepared: dict[str, _Prepared] = {}
    failures: dict[str, IA3Error] = {}
    fitted: dict[str, FewShotClassifier] = {}
    for name, data in tasks.items():
        try:
            texts, labels = _texts_and_labels(data)
            with _naming_in_warnings(name):
                task = prepare(classifiers[name], texts, labels)
            if out is not None:
                check_folder(Path(out) / name)
        except (IA3Error, OSError, TypeError) as error:
            failures[name] = _as_ia3_error(error)
            continue
        record = finished.get(name)
        if out is not None and record is not None and record["digest"] == task.digest:
            adapter = _read_back(Path(out) / name, record.get("files"))
            if adapter is not None:
                history = [TrainingStep(**step) for step in record["history"]]
                classifiers[name]._keep_fit(task.task, adapter, history)
                fitted[name] = classifiers[name]
                continue
        prepared[name] = task

    def on_end(name: str, adapter: store.Adapter, history: list[TrainingStep]) -> None:
        classifiers[name]._keep_fit(prepared[name].task, adapter, history)
        fitted[name] = classifiers[name]
        if out is not None:
            fitted[name].save(Path(out) / name)
            record = {
                "task": name,
                "digest": prepared[name].digest,
                "files": _hashes(Path(out) / name),
                "history": [asdict(step) for step in history],
            }
            append_record(Path(out) / RECORDS_NAME, record)

    limit = min(c.max_tokens for c in classifiers.values()) if max_tokens is None else max_tokens
    for names in _waves({name: classifiers[name].upper_blocks for name in prepared}):
        wave = {name: prepared[name] for name in names}
        failures |= _train(base, wave, limit, on_step, on_end)
    return FittedTasks(
        {name: fitted[name] for name in tasks if name in fitted},
        {name: failures[name] for name in tasks if name in failures},
    )


# -- what is asked for -----------------------------------------------------------------------------


def _classifiers(
    tasks: Mapping[str, Any], given: FewShotClassifier | Mapping[str, FewShotClassifier] | None
) -> dict[str, FewShotClassifier]:
    """A classifier of its own for each task."""
    if not tasks:
        raise IA3Error("there are no tasks: expected at least one")
    for name in tasks:
        if not isinstance(name, str):
            raise IA3Error(f"a task's name is {name!r}, expected a text")
        try:
            check_name(name)
        except IA3Error as error:
            raise IA3Error(f"a task is saved under its name: {error}") from error
        size = len(name.encode("utf-8", "surrogatepass"))
        if size > LONGEST_NAME:
            raise IA3Error(
                f"a task is saved under its name: {name[:20]!r}... has {size} bytes, expected "
                f"{LONGEST_NAME} at most"
            )
    if not isinstance(given, Mapping):
        given = dict.fromkeys(tasks, FewShotClassifier() if given is None else given)
    for name in tasks:
        if name not in given:
            raise IA3Error(
                f"there is no classifier for task {name!r}{did_you_mean(name, map(str, given))}"
            )
    for name in given:
        if name not in tasks:
            raise IA3Error(
                f"there is no task for classifier {name!r}{did_you_mean(str(name), tasks)}"
            )
    return {name: clone(given[name]) for name in tasks}


def _one_base(classifiers: Mapping[str, FewShotClassifier]) -> BaseModel:
    bases = {name: classifier.base for name, classifier in classifiers.items()}
    first, base = next(iter(bases.items()))
    for name, other in bases.items():
        if other.model is not base.model:
            raise IA3Error(
                f"task {name!r} is of the model {other.name!r} and task {first!r} of "
                f"{base.name!r}: expected one model, on one device and in one dtype, for all tasks"
            )
    return base


def _texts_and_labels(data: object) -> tuple[Any, Any]:
    """A task's data, which may come from anywhere."""
    if not isinstance(data, Sequence) or isinstance(data, str) or len(data) != 2:
        length = f" and length {len(data)}" if isinstance(data, Sequence) else ""
        raise IA3Error(
            f"the data is of type {type(data).__name__}{length}, expected a pair of texts and "
            "labels"
        )
    texts, labels = data
    return texts, labels


@contextmanager
def _naming_in_warnings(name: str) -> Iterator[None]:
    """Warnings say which task they are about."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        warnings.warn(f"task {name!r}: {warning.message}", warning.category, stacklevel=4)


def _as_ia3_error(error: Exception) -> IA3Error:
    if isinstance(error, IA3Error):
        return error
    # A TypeError is of a setting: `steps="3"`.
    mendable = IA3Error(f"{type(error).__name__}: {error}")
    mendable.__cause__ = error
    return mendable


# -- a task ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Prepared:
    """A task that is ready to be trained.

    Attributes:
        task: its data, checked.
        recipe: its settings.
        steps: as asked for; 0 is the untuned model.
        examples: encoded.
        config: of its adapter.
        start: the adapter that it begins with; `None` for ones.
        digest: of all that its vectors depend on, and all that is saved with them.
    """

    task: LabelledTexts
    recipe: TFewConfig
    steps: int
    examples: list[TrainingExample]
    config: IA3Config
    start: store.Adapter | None
    digest: str


class _Preparing:
    """Checks and encodes tasks.

    Args:
        base: the model of all.
    """

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._fingerprint = fingerprint(base.model)
        self._configs: dict[int | None, IA3Config] = {}
        # Tasks often begin with the same one.
        self._starts: dict[object, store.Adapter] = {}

    def __call__(
        self, classifier: FewShotClassifier, texts: Sequence[Text], labels: ArrayLike
    ) -> _Prepared:
        """Raise as `FewShotClassifier.fit` does."""
        recipe = classifier._recipe()
        task = classifier._read_task(texts, labels)
        encoder = Encoder(classifier.base, task.choices, chat=classifier.chat)
        encoded = encode_all(encoder, task.examples, task.templates)
        examples = training_set(task, encoded)
        if classifier.init_from is None:
            start, config = None, self._config(classifier.upper_blocks)
        else:
            start = self._start(classifier.init_from)
            config = start.config
        # In one order, wherever they are from.
        first = [] if start is None else [dict(sorted(start.vectors.items()))]
        run = {
            **described_run(self._fingerprint, first, examples, recipe),
            "steps": classifier.steps,
            "frozen": {} if start is None else start.frozen,
            "labels": task.classes,
            "choices": task.choices,
            "templates": [template.source for template in task.templates],
            "fields": list(task.examples[0]),
            "chat": classifier.chat,
            "upper_blocks": classifier.upper_blocks,
        }
        digest = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()
        return _Prepared(task, recipe, classifier.steps, examples, config, start, digest)

    def _config(self, upper_blocks: int | None) -> IA3Config:
        if upper_blocks not in self._configs:
            config = all_linear(self._base, upper_blocks)
            with temporary_adapter(self._base, config):
                check_not_within_experts(self._base.model)
            self._configs[upper_blocks] = config
        return self._configs[upper_blocks]

    def _start(self, init_from: str | Path | store.Adapter) -> store.Adapter:
        key = id(init_from) if isinstance(init_from, store.Adapter) else str(init_from)
        if key not in self._starts:
            start = adapter_to_begin_with(init_from)
            if start.copies or start.config.modules_to_save:
                raise IA3Error(
                    f"init_from has whole modules (modules_to_save="
                    f"{start.config.modules_to_save}), which cannot be mixed with other tasks: fit "
                    "it alone"
                )
            # Whether it fits the model.
            with temporary_adapter(self._base, start, source="init_from"):
                check_not_within_experts(self._base.model)
            self._starts[key] = start
        return self._starts[key]


def _waves(upper_blocks: Mapping[str, int | None]) -> Iterator[list[str]]:
    """The tasks that are trained at a time: of the same blocks, so that nothing below is computed.

    Args:
        upper_blocks: of each task.
    """
    alike: dict[int | None, list[str]] = {}
    for name, blocks in upper_blocks.items():
        alike.setdefault(blocks, []).append(name)
    for names in alike.values():
        for start in range(0, len(names), AT_ONCE):
            yield names[start : start + AT_ONCE]


def _train(
    base: BaseModel,
    prepared: Mapping[str, _Prepared],
    max_tokens: int,
    on_step: OnStep | None,
    on_end: Callable[[str, store.Adapter, list[TrainingStep]], None],
) -> dict[str, IA3Error]:
    """Train tasks together; why some failed."""
    failures: dict[str, IA3Error] = {}
    first = next(iter(prepared.values()))
    adapter = first.start or first.config
    with temporary_adapter(base, adapter, source="init_from") as ia3_model:
        adapters = _put_on(ia3_model, prepared, failures)
        saved = {adapter: ia3_model.adapter(adapter) for adapter in set(adapters.values())}
        training = {
            name: TaskToTrain(prepared[name].examples, prepared[name].recipe, adapter)
            for name, adapter in adapters.items()
            if prepared[name].steps > 0
        }
        for name in adapters.keys() - training.keys():
            on_end(name, replace(saved[adapters[name]]), [])

        def ended(name: str, end: Ended) -> None:
            if end.error is None:
                adapter = replace(saved[adapters[name]], vectors=end.vectors)
                on_end(name, adapter, end.history)
            else:
                failures[name] = end.error

        train_many(base, ia3_model, training, max_tokens=max_tokens, on_step=on_step, on_end=ended)
    return failures


def _put_on(
    ia3_model: IA3Model, prepared: Mapping[str, _Prepared], failures: dict[str, IA3Error]
) -> dict[str, str]:
    """Task name -> the model's adapter that it begins with. The first task's is on the model."""
    named: dict[int, str] = {}
    adapters: dict[str, str] = {}
    for task, how in prepared.items():
        # Tasks that begin alike share the objects.
        key = id(how.config if how.start is None else how.start)
        if not named:
            named[key] = DEFAULT_ADAPTER
        elif key not in named:
            name = f"begin{len(named)}"
            try:
                ia3_model._add(name, how.config, how.start)
            except IA3Error as error:
                failures[task] = IA3Error(
                    f"its sites cannot be mixed with the other tasks': {error}; fit it alone"
                )
                continue
            named[key] = name
        adapters[task] = named[key]
    return adapters


# -- what was finished before ----------------------------------------------------------------------


def _finished(out: Path) -> dict[str, dict[str, Any]]:
    """The last record of each task in a folder."""
    records = read_records(out / RECORDS_NAME, _is_record, "a task that was fitted")
    return {record["task"]: record for record in records}


def _is_record(record: dict[str, Any]) -> bool:
    try:
        [TrainingStep(**step) for step in record["history"]]
    except (KeyError, TypeError):
        return False
    return isinstance(record.get("task"), str) and isinstance(record.get("digest"), str)


def _hashes(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 of what is in it, of a saved classifier."""
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}


def _read_back(folder: Path, hashes: object) -> store.Adapter | None:
    """The adapter that was saved; `None` where it has to be trained again.

    It may be gone or broken. Or another one may have been saved in its place, also by a training
    that was killed before it could record that.
    """
    try:
        return store.read_adapter(folder) if _hashes(folder) == hashes else None
    except (FileNotFoundError, NotADirectoryError, IA3Error):
        return None
