"""`fit_many`: few-shot classifiers of many tasks on the same models, one task after the other."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapter.files import write_saved
from ..arguments import check_callable, instance, path_of, whole
from ..base.loading import LoadedModel
from ..base.processes import Processes, alone, processes
from ..base.torch_state import usual_state
from ..errors import (
    BrokenFileError,
    IA3Error,
    InvalidTypeError,
    UnknownNameError,
    did_you_mean,
    naming,
)
from ..files.atomic import check_folder
from ..files.records import append_record, read_records
from ..files.saved import COPIED, WEIGHTS_NAME
from ..model.ia3_model import check_name
from ..sentences.checkpoint import EncoderStep
from ..tfew.prompts.labels import Text
from ..tfew.training.steps import StopTraining, TrainingStep, steps_of
from .engine import Fit, Step
from .estimator import Bases, FewShotClassifier, read_classifier

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

# In `out`, beside the tasks' folders: a line for each fitted task.
RECORDS_NAME = "ia3_many.jsonl"
# The files that a saved classifier may have.
FILES = (WEIGHTS_NAME, *COPIED)

KIND = "a FewShotClassifier"
OnStep = Callable[[str, Step], bool | None]


@dataclass(frozen=True)
class FittedTasks:
    """What `fit_many` returns.

    Attributes:
        classifiers: task name -> its fitted classifier, in the order in which the tasks were given.
        failures: task name -> why it has none, in that order.
    """

    classifiers: dict[str, FewShotClassifier]
    failures: dict[str, IA3Error]


@usual_state()
def fit_many(
    tasks: Mapping[str, tuple[Sequence[Text], ArrayLike]],
    classifier: FewShotClassifier | Mapping[str, FewShotClassifier] | None = None,
    *,
    out: str | Path | None = None,
    on_step: OnStep | None = None,
    max_tokens: int | None = None,
) -> FittedTasks:
    """Fit a classifier to each of many tasks, one after the other.

    All are on one language model, one sentence encoder, or either where each task chooses. Of
    several processes that `torchrun` or `accelerate launch` started, each fits a part of the tasks,
    and all get all classifiers.

    Each classifier is the one that its own `fit` gives, to the last bit. A task with bad data, or
    whose training diverges, is reported in `failures`, and the others go on. Memory does not grow
    with the number of tasks, but for the fitted vectors.

    Args:
        tasks: name -> texts and labels, as `FewShotClassifier.fit` takes them. Names are those of
            adapters, without dots, slashes and white space.
        classifier: the settings of all tasks, or name -> the settings of each task; these
            classifiers stay unfitted.
        out: a folder in which each classifier is saved under its task's name as soon as it is
            fitted. The same call after a break trains only the tasks that are not there yet, have
            other data or settings now, or whose files were changed since. Several processes may
            fit into one folder; what two of them fit, both of them train. Of several machines, the
            first has all classifiers there.
        on_step: called with the task's name after every step. Where it returns true, the training
            of that task ends with this step. Of several processes each is told of its own tasks.
        max_tokens: the most tokens computed at once, 1 or more, in place of the classifiers' own.

    Raises:
        InvalidTypeError: an argument is of another type.
        UnknownNameError: the classifiers are not those of the tasks.
        IA3Error: there are no tasks, a name is malformed, the classifiers have several language
            models or several encoders, `max_tokens` is below 1, or the processes of a job were
            given different tasks. Nothing is then done.
        StateError: another process of the job has ended.
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
    job = processes()
    if job.count > 1 and any(each.shard for each in classifiers.values()):
        raise IA3Error(
            "shard spreads one model over the processes, and fit_many gives each of them tasks of "
            "its own: leave out shard, or fit one task after the other"
        )
    with alone():  # whatever a launcher asks for, each has a model to itself
        bases = _one_base(classifiers)
    folder = None if out is None else _Folder(path_of("out", out))
    job.check_same({"the tasks": list(tasks)})
    gather = job.patient_gather()
    failures: dict[str, IA3Error] = {}
    own = job.own(list(tasks))
    with alone(), _warnings_of_first(job, gather):
        for name in own:
            try:
                _fit(name, tasks[name], classifiers[name], bases[name], folder, on_step)
            except IA3Error as error:
                failures[name] = error
    if job.count > 1:
        fits = {name: classifiers[name]._fit for name in own if name not in failures}
        for of_rank, failed in gather((fits, failures)):
            failures |= failed
            for name, fit in of_rank.items():
                classifiers[name]._keep(fit)
    fitted = {name: classifiers[name] for name in tasks if name not in failures}
    if folder is not None and job.is_first:
        # Another machine may have saved them on a disk of its own.
        for name in set(fitted).difference(own):
            folder.keep(name, fitted[name].to_files())
    return FittedTasks(fitted, {name: failures[name] for name in tasks if name in failures})


def _fit(
    name: str,
    data: object,
    classifier: FewShotClassifier,
    bases: Bases,
    folder: _Folder | None,
    on_step: OnStep | None,
) -> None:
    """Fit one task's classifier, or read it back where it is finished."""
    try:
        with _warnings_name(name):
            if not isinstance(data, Sequence) or isinstance(data, str) or len(data) != 2:
                kind = type(data).__name__
                raise InvalidTypeError(f"the data is a {kind}, expected a pair of texts and labels")
            texts, labels = data
            engine, task = classifier._prepare(texts, labels, bases=bases)
        if folder is not None:
            check_folder(folder.path / name)
    except IA3Error:
        raise
    except (OSError, TypeError) as error:
        # A file is missing, or a setting is of another type: `max_tokens="3"`.
        raise IA3Error(f"{type(error).__name__}: {error}") from error
    run = json.dumps(task.described(), sort_keys=True)
    digest = hashlib.sha256(run.encode()).hexdigest()
    finished = None if folder is None else folder.read(name, digest)
    if finished is not None:
        classifier._keep(finished)
        return

    def after_step(step: Step) -> None:
        if on_step is not None and on_step(name, step):
            raise StopTraining

    classifier._keep(engine.train(task, after_step))
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


def _one_base(classifiers: Mapping[str, FewShotClassifier]) -> dict[str, Bases]:
    """The base models of each task; raise `IA3Error` where tasks have several of one kind."""
    known: dict[type, tuple[str, LoadedModel]] = {}
    bases = {name: classifier._bases() for name, classifier in classifiers.items()}
    for name, of_task in bases.items():
        for base in (of_task.encoder, of_task.language_model):
            if base is None:
                continue
            first, same = known.setdefault(type(base), (name, base))
            if base.model is not same.model:
                raise IA3Error(
                    f"task {name!r} is of the model {base.name!r} and task {first!r} of "
                    f"{same.name!r}: expected one language model and one encoder at most, on one "
                    "device and in one dtype, for all tasks"
                )
    return bases


@contextmanager
def _warnings_of_first(job: Processes, gather: Callable[[Any], list[Any]]) -> Iterator[None]:
    """Within the context, the first process gives the warnings of all, at its end."""
    if job.count == 1:
        yield
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    said = [(str(warning.message), warning.category) for warning in caught]
    for message, category in dict.fromkeys(chain.from_iterable(gather(said))):
        if job.is_first:
            warnings.warn(message, category, stacklevel=4)


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

    def read(self, task: str, digest: str) -> Fit | None:
        """The task's fit with its history; `None` where it has to be trained."""
        record = self._records.get(task)
        if record is None or record["digest"] != digest:
            return None
        try:
            if self._hashes(task) != record.get("files"):
                return None
            fit = read_classifier(self.path / task)
        except (FileNotFoundError, NotADirectoryError, IA3Error):
            return None
        return replace(fit, history=_history(record))

    def write(self, task: str, digest: str, classifier: FewShotClassifier) -> None:
        files = classifier.to_files()
        write_saved(self.path / task, files)
        record = {
            "task": task,
            "digest": digest,
            # Of what was written: another process may have saved over it since.
            "files": _hashes(files),
            "history": [asdict(step) for step in classifier.history_],
        }
        append_record(self.path / RECORDS_NAME, record)

    def keep(self, task: str, files: Mapping[str, bytes]) -> None:
        """Have these files of a task, without a record, unless they are there."""
        if self._hashes(task) != _hashes(files):
            write_saved(self.path / task, files)

    def _hashes(self, task: str) -> dict[str, str]:
        files = [path for name in FILES if (path := self.path / task / name).exists()]
        return _hashes({path.name: path.read_bytes() for path in files})


def _hashes(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def _is_record(record: dict[str, Any]) -> bool:
    try:
        _history(record)
    except BrokenFileError:
        return False
    return isinstance(record.get("task"), str) and isinstance(record.get("digest"), str)


def _history(record: dict[str, Any]) -> list[Any]:
    """The steps of a record, of either engine; raises `BrokenFileError`."""
    history = record.get("history")
    first = history[0] if isinstance(history, list) and history else None
    of_encoder = isinstance(first, dict) and first.keys() == {"step", "steps", "loss"}
    return steps_of(EncoderStep if of_encoder else TrainingStep, history, "a record")
