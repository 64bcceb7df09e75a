"""`fit_many`: few-shot classifiers of many tasks on one base model, one task after the other."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapter.files import Adapter, read_adapter, write_saved
from ..adapter.fingerprint import Fingerprint, fingerprint
from ..arguments import check_callable, instance, path_of, whole
from ..base.loading import BaseModel
from ..errors import (
    BrokenFileError,
    IA3Error,
    InvalidTypeError,
    UnknownNameError,
    did_you_mean,
    naming,
)
from ..files.atomic import check_folder
from ..files.hub import CONFIG_NAME
from ..files.records import append_record, read_records
from ..files.saved import TASK_NAME, WEIGHTS_NAME
from ..model.ia3_model import check_name
from ..tfew.prompts.labels import Text
from ..tfew.training.trainer import StopTraining, TrainingStep, described_run, steps_of
from .estimator import FewShotClassifier, PreparedTask

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

# In `out`, beside the tasks' folders: a line for each fitted task.
RECORDS_NAME = "ia3_many.jsonl"
# The files of a saved classifier.
FILES = (WEIGHTS_NAME, CONFIG_NAME, TASK_NAME)

KIND = "a FewShotClassifier"
OnStep = Callable[[str, TrainingStep], bool | None]


@dataclass(frozen=True)
class FittedTasks:
    """What `fit_many` returns.

    Attributes:
        classifiers: task name -> its fitted classifier, in the order in which the tasks were given.
        failures: task name -> why it has none, in that order.
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
    """Fit a classifier to each of many tasks, all on one base model, one after the other.

    Each classifier is the one that its own `fit` gives, to the last bit. A task with bad data, or
    whose training diverges, is reported in `failures`, and the others go on. Memory does not grow
    with the number of tasks, but for the fitted vectors.

    Args:
        tasks: name -> texts and labels, as `FewShotClassifier.fit` takes them. Names are those of
            adapters, without dots, slashes and white space.
        classifier: the settings of all tasks, or name -> the settings of each task; these
            classifiers stay unfitted. All have one base model.
        out: a folder in which each classifier is saved under its task's name as soon as it is
            fitted. The same call after a break trains only the tasks that are not there yet, have
            other data or settings now, or whose files were changed since. Several processes may
            fit into one folder; what two of them fit, both of them train.
        on_step: called with the task's name after every step. Where it returns true, the training
            of that task ends with this step.
        max_tokens: the most tokens computed at once, 1 or more, in place of the classifiers' own.

    Raises:
        InvalidTypeError: an argument is of another type.
        UnknownNameError: the classifiers are not those of the tasks.
        IA3Error: there are no tasks, a name is malformed, the classifiers have several base models,
            or `max_tokens` is below 1. Nothing is then done.
        OSError: a classifier cannot be saved; those before it stay.

    Example:
        >>> from ia3 import FewShotClassifier, fit_many
        >>> tasks = {
        ...     "queue": (["I was charged twice.", "My parcel is lost."], ["billing", "delivery"]),
        ...     "mood": (["So good!", "Never again."], ["happy", "angry"]),
        ... }
        >>> fitted = fit_many(tasks, FewShotClassifier(steps=1))
        >>> list(fitted.classifiers), fitted.failures
        (['queue', 'mood'], {})
    """
    check_callable("on_step", on_step)
    classifiers = _classifiers(tasks, classifier, max_tokens)
    model = fingerprint(_one_base(classifiers).model)
    folder = None if out is None else _Folder(path_of("out", out))
    fitted: dict[str, FewShotClassifier] = {}
    failures: dict[str, IA3Error] = {}
    for name, data in tasks.items():
        try:
            _fit(name, data, classifiers[name], model, folder, on_step)
            fitted[name] = classifiers[name]
        except IA3Error as error:
            failures[name] = error
    return FittedTasks(fitted, failures)


def _fit(
    name: str,
    data: object,
    classifier: FewShotClassifier,
    model: Fingerprint,
    folder: _Folder | None,
    on_step: OnStep | None,
) -> None:
    """Fit one task's classifier, or read it back where it is finished."""
    try:
        with _warnings_name(name):
            if not isinstance(data, Sequence) or isinstance(data, str) or len(data) != 2:
                kind = type(data).__name__
                raise InvalidTypeError(f"the data is a {kind}, expected a pair of texts and labels")
            task = classifier._prepare(classifier._read_task(*data))
        if folder is not None:
            check_folder(folder.path / name)
    except IA3Error:
        raise
    except (OSError, TypeError) as error:
        # A file is missing, or a setting is of another type: `max_tokens="3"`.
        raise IA3Error(f"{type(error).__name__}: {error}") from error
    digest = _digest(classifier, task, model)
    finished = None if folder is None else folder.read(name, digest)
    if finished is not None:
        classifier._keep_fit(task.data, *finished)
        return

    def after_step(step: TrainingStep) -> None:
        if on_step is not None and on_step(name, step):
            raise StopTraining

    classifier._train(task, after_step)
    if folder is not None:
        folder.write(name, digest, classifier)


def _classifiers(
    tasks: Mapping[str, Any],
    given: FewShotClassifier | Mapping[str, FewShotClassifier] | None,
    max_tokens: int | None,
) -> dict[str, FewShotClassifier]:
    """An unfitted classifier for each task."""
    if not instance("tasks", tasks, Mapping, "a mapping from names to texts and labels"):
        raise IA3Error("there are no tasks: expected at least one")
    for name in tasks:
        if not isinstance(name, str) or not _can_be_written(name):
            raise InvalidTypeError(f"a task's name is {name!r}, expected a text")
        with naming("a task is saved under its name"):
            check_name(name)
    if max_tokens is not None:
        whole("max_tokens", max_tokens, 1, expected="at least 1")
    if not isinstance(given, Mapping):
        given = dict.fromkeys(tasks, FewShotClassifier() if given is None else given)
    for name in tasks:
        if name not in given:
            hint = did_you_mean(name, map(str, given))
            raise UnknownNameError(f"there is no classifier for task {name!r}{hint}")
    for name in given:
        if name not in tasks:
            hint = did_you_mean(str(name), tasks)
            raise UnknownNameError(f"there is no task for classifier {name!r}{hint}")
        instance(f"the classifier of task {name!r}", given[name], FewShotClassifier, KIND)
    classifiers = {name: given[name].__sklearn_clone__() for name in tasks}
    if max_tokens is not None:
        for classifier in classifiers.values():
            classifier.max_tokens = max_tokens
    return classifiers


def _can_be_written(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return False
    return True


def _one_base(classifiers: Mapping[str, FewShotClassifier]) -> BaseModel:
    (first, base), *others = ((name, c.base) for name, c in classifiers.items())
    for name, other in others:
        if other.model is not base.model:
            raise IA3Error(
                f"task {name!r} is of the model {other.name!r} and task {first!r} of "
                f"{base.name!r}: expected one model, on one device and in one dtype, for all tasks"
            )
    return base


@contextmanager
def _warnings_name(task: str) -> Iterator[None]:
    """Within the context, warnings say which task they are about."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        warnings.warn(f"task {task!r}: {warning.message}", warning.category, stacklevel=5)


class _Folder:
    """The folder of saved classifiers, with a record of each.

    A record has the digest of what the classifier was fitted with, the hashes of its files, and its
    history. Files that no record matches are another classifier's, or of a call that was killed.
    """

    def __init__(self, path: Path) -> None:
        check_folder(path)
        records = read_records(path / RECORDS_NAME, _is_record, "a task that was fitted")
        self.path = path
        # Of several records of a task the last one counts.
        self._records = {record["task"]: record for record in records}

    def read(self, task: str, digest: str) -> tuple[Adapter, list[TrainingStep]] | None:
        """The task's adapter and history; `None` where it has to be trained."""
        record = self._records.get(task)
        if record is None or record["digest"] != digest:
            return None
        try:
            if self._hashes(task) != record.get("files"):
                return None
            adapter = read_adapter(self.path / task)
        except (FileNotFoundError, NotADirectoryError, IA3Error):
            return None
        return adapter, steps_of(record["history"], "a record")

    def write(self, task: str, digest: str, classifier: FewShotClassifier) -> None:
        files = classifier._files()
        write_saved(self.path / task, files)
        record = {
            "task": task,
            "digest": digest,
            # Of what was written: another process may have saved over it since.
            "files": {name: hashlib.sha256(files[name]).hexdigest() for name in FILES},
            "history": [asdict(step) for step in classifier.history_],
        }
        append_record(self.path / RECORDS_NAME, record)

    def _hashes(self, task: str) -> dict[str, str]:
        files = {name: self.path / task / name for name in FILES}
        return {name: hashlib.sha256(f.read_bytes()).hexdigest() for name, f in files.items()}


def _is_record(record: dict[str, Any]) -> bool:
    try:
        steps_of(record.get("history"), "a record")
    except BrokenFileError:
        return False
    return isinstance(record.get("task"), str) and isinstance(record.get("digest"), str)


def _digest(classifier: FewShotClassifier, task: PreparedTask, model: Fingerprint) -> str:
    """A digest of all that a classifier's vectors depend on, and of all that is saved with them."""
    start = task.start
    # Sorted, as an adapter from a file may have another order than the same one in memory.
    first = [] if start is None else [dict(sorted({**start.copies, **start.vectors}.items()))]
    run = {
        **described_run(model, first, task.examples, task.recipe),
        **classifier._settings(),
        "frozen": {} if start is None else start.frozen,
        "labels": task.data.classes,
        "choices": task.data.choices,
        "templates": [template.source for template in task.data.templates],
        "fields": list(task.data.examples[0]),
    }
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()
