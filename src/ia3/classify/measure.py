"""How good a classifier is: answers to texts that it was not trained on, counted.

Whichever way the answers were come by, `record_of` makes one record of them. What was not answered
without having been trained on is in no record.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import IA3Error, counted
from ..model.lora import LoRA
from ..sentences.head import folds
from ..tfew.prompts.labels import Text
from .engine import ENCODER, LANGUAGE_MODEL, Seen, Step
from .estimator import FewShotClassifier
from .inputs import examples_of, key_of
from .task_file import EngineName

# A fifth of a class has to have three texts or more, to say anything of it.
FEWEST_A_CLASS = 16
# What there is without training, by engine.
UNTRAINED: dict[EngineName, str] = {
    ENCODER: "frozen encoder with logistic regression",
    LANGUAGE_MODEL: "untuned language model",
}
# Between the fields of a text that has several.
_BETWEEN = " · "
OnStep = Callable[[Step], None]


@dataclass(frozen=True)
class ClassScore:
    """How well the texts of one class were told from the others; shares are 0 to 1.

    Attributes:
        label: the class.
        texts: how many have this label.
        precision: of those that got this label, the share that have it; `None` where none got it.
        recall: of those that have this label, the share that got it; `None` where none has it.
        f1: the harmonic mean of the two; `None` where there is neither.
    """

    label: Any
    texts: int
    precision: float | None
    recall: float | None
    f1: float | None


@dataclass(frozen=True)
class Mistake:
    """A text that got another label than its own; `row` counts the texts from 0.

    `label` and `predicted` are lists where a text has several labels. `probability` is that of the
    predicted label, the surest one's of several, and 0 of none.
    """

    row: int
    text: str
    label: Any
    predicted: Any
    probability: float


@dataclass(frozen=True)
class Baseline:
    """What the model without an adapter makes of the same texts.

    Attributes:
        what: in words, one of `UNTRAINED`.
        accuracy: the share that it has right, 0 to 1.
        error: its standard error.
    """

    what: str
    accuracy: float
    error: float


@dataclass(frozen=True)
class Measured:
    """Answers to texts that were not trained on, counted.

    Attributes:
        how: in words, e.g. `"5 trainings, each text held out of one"`.
        trained: whether an adapter answered, and not the model without one.
        texts: how many were asked.
        accuracy: the share whose labels are all right, 0 to 1.
        error: its standard error.
        macro_f1: the mean of the classes' F1, of all that have a text.
        by_class: a score for each class.
        confusion: `[classes, classes]`, how often each label, in rows, was taken for each; `None`
            where a text has several labels.
        mistakes: the texts that it got wrong, the surest answer first.
        frozen: the model without an adapter, on the same texts; `None` where it was not asked.
    """

    how: str
    trained: bool
    texts: int
    accuracy: float
    error: float
    macro_f1: float
    by_class: list[ClassScore]
    confusion: list[list[int]] | None
    mistakes: list[Mistake]
    frozen: Baseline | None = None

    @property
    def right(self) -> int:
        """How many texts got their labels."""
        return self.texts - len(self.mistakes)

    def to_json(self) -> dict[str, Any]:
        """As values of JSON."""
        return asdict(self)


def record_of(
    texts: Sequence[Text],
    labels: Sequence[Any],
    predicted: Sequence[Any],
    probabilities: NDArray[np.float64],
    classes: Sequence[Any],
    how: str,
    *,
    trained: bool = True,
    rows: Sequence[int] | None = None,
    frozen: Baseline | None = None,
) -> Measured:
    """The record of answers.

    Args:
        texts: what was asked, `[texts]`.
        labels: the labels that they have, each one of `classes`, or a collection of these.
        predicted: the labels that they got, likewise.
        probabilities: of each class, `[texts, classes]`.
        classes: the labels there are.
        how, trained, frozen: as of `Measured`.
        rows: the texts' places among those that the caller knows; counted from 0 by default.
    """
    has, got = _indicator(labels, classes), _indicator(predicted, classes)
    right = (has == got).all(1)
    both, have, get = (has & got).sum(0), has.sum(0), got.sum(0)
    by_class = [
        ClassScore(
            label=label,
            texts=int(n),
            precision=_share(b, g),
            recall=_share(b, n),
            f1=_share(2 * b, n + g),
        )
        for label, b, n, g in zip(classes, both, have, get, strict=True)
    ]
    accuracy = float(right.mean())
    known = [score.f1 or 0.0 for score in by_class if score.texts]
    single = bool((has.sum(1) == 1).all() and (got.sum(1) == 1).all())
    confusion = has.astype(np.int64).T @ got.astype(np.int64) if single else None
    shown = [_words(example) for example in examples_of(texts)]
    places = range(len(shown)) if rows is None else rows
    surest = np.where(got, probabilities, 0).max(1)
    mistakes = [
        Mistake(places[i], shown[i], _plain(labels[i]), _plain(predicted[i]), float(surest[i]))
        for i in np.flatnonzero(~right).tolist()
    ]
    return Measured(
        how=how,
        trained=trained,
        texts=len(shown),
        accuracy=accuracy,
        error=_error(accuracy, len(shown)),
        macro_f1=sum(known) / len(known) if known else 0.0,
        by_class=by_class,
        confusion=None if confusion is None else confusion.tolist(),
        mistakes=sorted(mistakes, key=lambda each: -each.probability),
        frozen=frozen,
    )


def measured_on(
    classifier: FewShotClassifier,
    texts: Sequence[Text],
    labels: Sequence[Any],
    how: str,
    *,
    rows: Sequence[int] | None = None,
    frozen: FewShotClassifier | None = None,
    progress: Callable[[int], None] | None = None,
) -> Measured:
    """A fitted classifier's answers to texts that it was not trained on.

    Args:
        classifier: the one to measure.
        texts, labels: `[texts]`; each label is one of its classes.
        how: where the texts are from, in words.
        rows: as of `record_of`.
        frozen: the classifier without an adapter to set beside it, as `without_training` gives it.
        progress: as of `predict_proba`; it counts the prompts of both.

    Raises:
        IA3Error: as of `predict_proba`.
    """
    found, classes = classifier.predict_proba(texts, progress=progress), classifier.classes_
    predicted = classifier.classes_at(found).tolist()
    beside = None
    if frozen is not None:
        answers = frozen.predict(texts, progress=progress).tolist()
        beside = _baseline(frozen, _agree(labels, answers))
    return record_of(
        texts, labels, predicted, found, classes.tolist(), how, rows=rows, frozen=beside
    )


def measured_by_training(
    classifier: FewShotClassifier,
    texts: Sequence[Text],
    labels: Sequence[Any],
    *,
    most: int = 5,
    shown: Callable[[int, int], AbstractContextManager[OnStep | None]] | None = None,
) -> Measured | None:
    """Trainings like a fitted classifier's, each measured on texts that were held out of it.

    There are as many as the largest class has texts, 5 at most, and every text of a class that has
    several is held out of one of them; with `most=1` there is one training, on four fifths. A text
    that is there a second time is not asked where the other one was trained on.

    Args:
        classifier: fitted; the same engine is trained again, and this one stays as it is.
        texts, labels: what it was trained on.
        most: how many trainings there are at most.
        shown: gives a context for each training, by its number, counted from 1, and how many there
            are: what it yields is the training's `on_step`.

    Returns:
        `None` where nothing can be held out: each text is the only one of its class, or is there
        again.

    Raises:
        IA3Error: as of `FewShotClassifier.fit`.
    """
    parts = _held_out_parts(texts, labels, int(classifier.seed))[:most]
    if not parts:
        return None
    answers = np.zeros((len(labels), len(classifier.classes_)))
    asked: list[int] = []
    predicted: dict[int, Any] = {}
    agree: list[bool] = []
    for number, (train, held_out) in enumerate(parts, 1):
        learn = [texts[i] for i in train], [labels[i] for i in train]
        ask, right = [texts[i] for i in held_out], [labels[i] for i in held_out]
        with nullcontext() if shown is None else shown(number, len(parts)) as on_step:
            again = classifier._new(classifier.engine_).fit(*learn, on_step=on_step)
        answers[held_out] = again.predict_proba(ask)
        predicted |= zip(held_out, again.classes_at(answers[held_out]).tolist(), strict=True)
        frozen = without_training(classifier).fit(*learn)
        agree += _agree(right, frozen.predict(ask).tolist())
        asked += held_out
    how = f"{len(parts)} trainings, each text held out of one"
    if len(asked) < len(labels):
        how = f"{len(parts)} trainings, each of {counted(len(asked), 'text')} held out of one"
    if len(parts) == 1:
        how = f"one more training, without {counted(len(asked), 'text')} that were then asked"
    return record_of(
        [texts[i] for i in asked],
        [labels[i] for i in asked],
        [predicted[i] for i in asked],
        answers[asked],
        classifier.classes_.tolist(),
        how,
        rows=asked,
        frozen=_baseline(classifier, agree),
    )


def seen_before_training(
    classifier: FewShotClassifier, texts: Sequence[Text], labels: Sequence[Any]
) -> Measured | None:
    """The frozen model's answers from before the training of a classifier that was just fitted.

    Args:
        classifier: fitted; one that was loaded has no answers any more.
        texts, labels: what it was trained on.

    Returns:
        `None` where there are no answers to texts that were held out.
    """
    for seen in classifier.held_out_:
        if seen.candidate.engine != classifier.engine_ or seen.probabilities is None:
            continue
        keys = _keys(texts)
        times = Counter(keys)
        # Folds may have had the same text on both sides; an untuned model has learned from none.
        alone = [classifier.engine_ != ENCODER or times[key] == 1 for key in keys]
        places = [place for place, row in enumerate(seen.rows) if alone[row]]
        if not places:
            return None
        found, rows = seen.probabilities.numpy()[places], [seen.rows[place] for place in places]
        return record_of(
            [texts[i] for i in rows],
            [labels[i] for i in rows],
            classifier.classes_at(found).tolist(),
            found,
            classifier.classes_.tolist(),
            f"{UNTRAINED[classifier.engine_]}, {_held_out(seen)}",
            trained=False,
            rows=rows,
        )
    return None


def new_among(texts: Sequence[Text], learned: Sequence[Text]) -> list[int]:
    """The places of the texts that are not among those that were learned from."""
    known = {*_keys(learned)}
    return [place for place, key in enumerate(_keys(texts)) if key not in known]


def has_a_fifth(labels: Sequence[Any]) -> bool:
    """Whether each class has so many texts that a fifth of them says something."""
    counts: dict[Any, int] = {}
    for each in labels:
        for label in _labels(each):
            counts[label] = counts.get(label, 0) + 1
    return min(counts.values(), default=0) >= FEWEST_A_CLASS


def without_training(classifier: FewShotClassifier) -> FewShotClassifier:
    """An unfitted classifier like a fitted one, which trains no vectors.

    An encoder gets a linear head on its frozen embeddings, a language model is asked as it is.
    """
    untrained = classifier._new(classifier.engine_)
    untrained.set_params(steps=0, init_from=None, learning_rate=None)
    return untrained


@contextmanager
def with_lora(classifier: FewShotClassifier, lora: LoRA) -> Iterator[FewShotClassifier]:
    """A fitted classifier that computes with a LoRA in place of its vectors, within the context.

    Its base model is shared: meanwhile others compute with the LoRA too.
    """
    fit = classifier._fit
    ones = {name: torch.ones_like(vector) for name, vector in fit.adapter.vectors.items()}
    other = classifier._new(classifier.engine_)
    other._keep(replace(fit, adapter=replace(fit.adapter, vectors=ones)))
    with lora.on(other.base.model):
        yield other


def _baseline(classifier: FewShotClassifier, right: Sequence[bool]) -> Baseline:
    accuracy = sum(right) / len(right)
    return Baseline(UNTRAINED[classifier.engine_], accuracy, _error(accuracy, len(right)))


def _held_out(seen: Seen) -> str:
    """How the texts were none that it had learned from."""
    return (
        "held-out folds" if seen.candidate.engine == ENCODER else "on texts it had not learned from"
    )


def _error(accuracy: float, count: int) -> float:
    return math.sqrt(accuracy * (1 - accuracy) / count)


def _held_out_parts(
    texts: Sequence[Text], labels: Sequence[Any], seed: int
) -> list[tuple[list[int], list[int]]]:
    """As `folds`, but for held-out texts that are among those to train on a second time."""
    keys, found = _keys(texts), []
    for train, held_out in folds(_targets(labels), seed):
        known = {keys[i] for i in train}
        asked = [i for i in held_out if keys[i] not in known]
        if asked:
            found.append((train, asked))
    return found


def _keys(texts: Sequence[Text]) -> list[str]:
    return [key_of(example) for example in examples_of(texts)]


def _labels(given: Any) -> list[Any]:
    """The labels of a text that has one, or several."""
    return list(given) if isinstance(given, list | tuple | set | frozenset) else [given]


def _plain(given: Any) -> Any:
    """A label, or the sorted labels of a text that may have several, as values of JSON."""
    return given if _labels(given) == [given] else sorted(_labels(given))


def _agree(labels: Sequence[Any], predicted: Sequence[Any]) -> list[bool]:
    pairs = zip(labels, predicted, strict=True)
    return [{*_labels(one)} == {*_labels(other)} for one, other in pairs]


def _targets(labels: Sequence[Any]) -> list[int]:
    """A number for each label, or for each set of labels; `[texts]`."""
    keys = [frozenset(_labels(each)) for each in labels]
    place = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return [place[key] for key in keys]


def _indicator(labels: Sequence[Any], classes: Sequence[Any]) -> NDArray[np.bool_]:
    """Which labels each text has, `[texts, classes]`."""
    place = {label: index for index, label in enumerate(classes)}
    found = np.zeros((len(labels), len(classes)), dtype=bool)
    for row, given in enumerate(labels):
        for label in _labels(given):
            if label not in place:
                raise IA3Error(f"label {label!r} (row {row}) is not among the classes")
            found[row, place[label]] = True
    return found


def _share(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None


def _words(example: Mapping[str, Any]) -> str:
    return _BETWEEN.join(map(str, example.values()))
