"""The base class of classifiers of texts: it checks texts and labels, and predicts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from ..arguments import check_callable, instance
from ..base.loading import LoadedModel
from ..base.torch_state import usual_state
from ..errors import IA3Error, MissingExtraError, StateError, did_you_mean
from ..sentences.targets import membership
from ..tfew.prompts.labels import Label, Text
from ..tfew.prompts.templates import Template
from .inputs import (
    check_fields,
    examples_of,
    label_lists_of,
    labels_of,
    texts_to_label,
    with_field,
)
from .weights import (
    check_class_weight,
    sample_weights,
    text_weights,
    weights_of_answers,
    weights_of_texts,
)

try:
    import numpy as np
    from sklearn import exceptions
    from sklearn.base import BaseEstimator, ClassifierMixin
except ImportError as error:
    raise MissingExtraError("scikit-learn", "tfew", "classifying texts") from error

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


class NotFittedError(StateError, exceptions.NotFittedError):  # type: ignore[misc]
    """The classifier was not fitted: call `fit` first. It is scikit-learn's error too."""


@dataclass(frozen=True)
class LabelledTexts:
    """The data of a task, checked.

    Attributes:
        examples: `[texts]`.
        labels: of each text: one, or a list of them where it may have several.
        classes: the labels, each once, sorted.
        weights: how much a text counts, float64 `[texts]`; where it may have several labels, in the
            answer of each, `[texts, labels]`. `None` is 1 each.
        rows: the texts' rows as they were given, for messages; `None` is all of them.
    """

    examples: list[Mapping[str, Any]]
    labels: list[Any]
    classes: list[Label]
    weights: Tensor | None = None
    rows: list[int] | None = None

    @property
    def multilabel(self) -> bool:
        """Whether a text may have several labels."""
        return isinstance(self.labels[0], list)

    @property
    def targets(self) -> list[Any]:
        """The index of each text's class, `[texts]`, or a sorted list of them."""
        place = {label: index for index, label in enumerate(self.classes)}
        if self.multilabel:
            return [sorted(place[label] for label in own) for own in self.labels]
        return [place[label] for label in self.labels]

    @property
    def has(self) -> Tensor:
        """Which labels each text has, bool `[texts, labels]`, where it may have several."""
        return membership(self.targets, len(self.classes))

    @property
    def text_weights(self) -> Tensor | None:
        """One weight a text, `[texts]`, whose mean is 1; `None` is 1 each."""
        return None if self.weights is None else text_weights(self.weights)

    def described_weights(self) -> dict[str, Any]:
        """The weights as values of JSON, by their name; nothing where there are none."""
        return {} if self.weights is None else {"weights": self.weights.tolist()}

    def weighted(self, samples: Tensor | None, class_weight: Any) -> LabelledTexts:
        """This with weights, without the texts that they leave out.

        Raises:
            InvalidTypeError: `class_weight` is of another type.
            IA3Error: it does not fit the labels, or what is left has one label alone.
        """
        of_classes = check_class_weight(class_weight, self.classes)
        given = samples, of_classes, self.classes
        if self.multilabel:
            weights = weights_of_answers(*given, self.has)
        else:
            weights = weights_of_texts(*given, self.targets)
        if weights is None:
            return self
        rows = weights.reshape(len(weights), -1).any(1).nonzero().flatten().tolist()
        labels = [self.labels[row] for row in rows]
        left = _different(labels)
        if not rows or len(left) < 2 <= len(_different(self.labels)):
            raise IA3Error(
                f"of the texts whose weight is above 0 the labels are {sorted(left)}: expected at "
                "least two classes"
            )
        if self.multilabel:
            _check_two(len(rows), " whose weight is above 0")
        examples = [self.examples[row] for row in rows]
        return LabelledTexts(examples, labels, self.classes, weights[rows], rows)


def _check_two(texts: int, which: str = "") -> None:
    if texts < 2:
        raise IA3Error(
            f"there is one text{which}: where texts have several labels, expected at least two"
        )


def _different(labels: Sequence[Any]) -> set[Label]:
    return {label for own in labels for label in (own if isinstance(own, list) else [own])}


def read_labelled(
    texts: Any, labels: Any, named: Iterable[Any] = (), *, multilabel: bool = False
) -> tuple[LabelledTexts, list[Label]]:
    """Texts and labels as plain values, and the labels that are `named` besides, in their order.

    With `multilabel` each text has a list of labels.

    Raises:
        InvalidTypeError: a text or a label is of another type.
        IA3Error: there are no texts, not as many labels as texts, or fewer than two classes.
    """
    examples = examples_of(texts)
    if not examples:
        raise IA3Error("there are no texts: expected at least one")
    others: list[Label] = []
    if multilabel:
        targets: list[Any] = label_lists_of(labels)
        classes = sorted({label for own in targets for label in own})
    else:
        targets, others = labels_of(labels, named)
        classes = sorted({*targets, *others})
    check_count(examples, targets)
    if len(classes) < 2:
        found = f"all labels are {classes[0]!r}, one class" if classes else "no text has a label"
        where = "labels" if multilabel else "labels or in choices"
        raise IA3Error(f"{found}: name at least two, in {where}")
    if multilabel:
        _check_two(len(examples))
    return LabelledTexts(examples, targets, classes), others


class TextClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """scikit-learn's interface over a model that reads texts.

    A subclass's `fit` sets the attributes below, at once where threads may share a classifier; it
    implements `base` and `_probabilities`.

    Attributes:
        classes_: the labels, `[classes]`, sorted.
        templates_: the sources of the templates that a text is read in.
        fields_: the names of the examples' fields.
        multilabel_: whether a text may have several labels.
    """

    classes_: NDArray[Any]
    templates_: list[str]
    fields_: list[str]
    multilabel_: bool = False

    @property
    def base(self) -> LoadedModel:
        """The model and its tokenizer, loaded when first used, shared with others of its name."""
        raise NotImplementedError

    @usual_state()
    def predict_proba(
        self, X: Sequence[Text] | str, *, progress: Callable[[int], None] | None = None
    ) -> NDArray[np.float64]:
        """The probability of each class.

        A language model's is the softmax of the choices' length-normalised log-probabilities, over
        the temperature, averaged over the templates; an encoder's is that of its head's scores.
        Where a text may have several labels, it is each label's own, the sigmoid of its score.

        Args:
            X: as in `fit`; a string is one text. Of no texts there are no probabilities.
            progress: called with the number of prompts done since the last call; there is one for
                each text and template.

        Returns:
            `[examples, classes]`, in the order of `classes_`.

        Raises:
            NotFittedError: `fit` was not called.
            InvalidTypeError: a text is neither a string nor a mapping, or an argument is of another
                type.
            IA3Error: a text lacks a field or has one that is no text, finite number or date, or the
                model's scores of it are not finite.
        """
        self._check_fitted()
        check_callable("progress", progress)
        examples = texts_to_label(X)
        if not examples:
            return np.zeros((0, len(self.classes_)))
        fitted = self._as_fitted()
        examples = with_field(examples, fitted.fields_)
        with fitted.base.lock:
            templates = [Template(source) for source in fitted.templates_]
            check_fields(examples, fitted.fields_, templates)
            found: NDArray[np.float64] = fitted._probabilities(examples, progress).numpy()
        for row in np.flatnonzero(~np.isfinite(found).all(1))[:1]:
            raise not_finite(f"text {row}")
        return found

    def predict(
        self, X: Sequence[Text] | str, *, progress: Callable[[int], None] | None = None
    ) -> NDArray[Any]:
        """The most probable label of each text, `[examples]`.

        Where a text may have several labels, it is a list of those whose probability is at least
        one half.

        Raises:
            NotFittedError: `fit` was not called.
            InvalidTypeError: as of `predict_proba`.
            IA3Error: as of `predict_proba`.
        """
        self._check_fitted()
        fitted = self._as_fitted()  # the labels are those of the same fit
        return fitted.classes_at(fitted.predict_proba(X, progress=progress))

    def classes_at(self, probabilities: NDArray[np.float64]) -> NDArray[Any]:
        """The labels that `predict` gives, `[examples]`, by what `predict_proba` returned.

        Raises:
            NotFittedError: `fit` was not called.
            InvalidTypeError: it is not an array.
            IA3Error: its shape is another.
        """
        self._check_fitted()
        classes = self.classes_
        expected = f"[examples, {len(classes)}], as predict_proba returns it"
        instance("probabilities", probabilities, np.ndarray, expected)
        if probabilities.ndim != 2 or probabilities.shape[1] != len(classes):
            raise IA3Error(f"probabilities are {list(probabilities.shape)}, expected {expected}")
        if not self.multilabel_:
            most_probable: NDArray[Any] = classes[probabilities.argmax(1)]
            return most_probable
        # An array of lists, which numpy would take for a table where they are equally long.
        several = np.empty(len(probabilities), dtype=object)
        for row, of_row in enumerate(probabilities):
            several[row] = classes[of_row >= 0.5].tolist()
        return several

    def score(
        self,
        X: Sequence[Text],
        y: ArrayLike | Sequence[Collection[Label]],
        sample_weight: ArrayLike | None = None,
    ) -> float:
        """The share of texts whose predicted label, or list of labels, is the given one.

        Raises:
            NotFittedError: `fit` was not called.
            InvalidTypeError: a text, a label or a weight is of another type.
            IA3Error: there are no texts, a label is not among `classes_`, there are not as many as
                texts, or `sample_weight` does not fit; or as of `predict_proba`.
        """
        self._check_fitted()
        fitted = self._as_fitted()
        examples = examples_of(X)
        if not examples:
            raise IA3Error("there are no texts: expected at least one")
        given: list[Any] = label_lists_of(y) if fitted.multilabel_ else labels_of(y)[0]
        check_count(examples, given)
        weights = sample_weights(sample_weight, len(examples))
        known = fitted.classes_.tolist()
        for row, own in enumerate(given):
            for label in own if fitted.multilabel_ else [own]:
                # True is 1, but no label among integers.
                if label not in known or type(label) is not type(known[0]):
                    hint = did_you_mean(str(label), map(str, known))
                    message = f"label {label!r} (row {row}) is not among the choices {known}{hint}"
                    raise IA3Error(message)
        predicted = fitted.predict(examples).tolist()
        if fitted.multilabel_:
            given = [sorted(own) for own in given]
        right = [a == b for a, b in zip(predicted, given, strict=True)]
        return float(np.average(right, weights=None if weights is None else weights.numpy()))

    def __sklearn_clone__(self) -> Self:
        # scikit-learn would copy a loaded model, weights and all.
        return type(self)(**self.get_params(deep=False))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.two_d_array = False
        tags.classifier_tags.multi_label = bool(getattr(self, "multilabel", False))
        return tags

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = dict(super().__getstate__())
        state.pop("_base", None)
        return state

    def _as_fitted(self) -> Self:
        """This classifier as it is now: another thread may fit it while a call lasts."""
        fitted = object.__new__(type(self))
        fitted.__dict__.update(self.__dict__)
        self._base = fitted.base  # the cache of loaded models is weak: both keep the model
        return fitted

    def _check_fitted(self) -> None:
        if not hasattr(self, "classes_"):
            kind = type(self).__name__
            raise NotFittedError(f"this {kind} instance is not fitted yet: call fit first")

    def _probabilities(
        self, examples: list[Mapping[str, Any]], progress: Callable[[int], None] | None
    ) -> Tensor:
        """The probability of each class, `[examples, classes]`, float64, on the CPU."""
        raise NotImplementedError


def not_finite(called: str) -> IA3Error:
    """What is wrong where a model's scores of a text that is `called` so are not finite."""
    return IA3Error(
        f"the model's scores of {called} are not finite: its weights or the trained vectors are "
        "broken, or its dtype is too narrow"
    )


def check_count(texts: Sequence[Any], labels: Sequence[Label]) -> None:
    """Raise `IA3Error` where there are not as many labels as texts."""
    if len(texts) != len(labels):
        raise IA3Error(f"there are {len(texts)} texts and {len(labels)} labels: expected one each")
