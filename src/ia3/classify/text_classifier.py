"""The base class of classifiers of texts: it checks texts and labels, and predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from ..arguments import check_callable, instance
from ..base.loading import LoadedModel
from ..base.torch_state import usual_state
from ..errors import IA3Error, MissingExtraError, StateError, did_you_mean, shown
from ..tfew.prompts.labels import Label, Text
from ..tfew.prompts.templates import Template
from .inputs import check_fields, examples_of, labels_of

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
    """The data of a task, checked: `classes` are its labels, each once, sorted."""

    examples: list[Mapping[str, Any]]
    labels: list[Label]
    classes: list[Label]

    @property
    def targets(self) -> list[int]:
        """The index of each text's class, `[examples]`."""
        place = {label: index for index, label in enumerate(self.classes)}
        return [place[label] for label in self.labels]


def read_labelled(
    texts: Any, labels: Any, named: Iterable[Any] = ()
) -> tuple[LabelledTexts, list[Label]]:
    """Texts and labels as plain values, and the labels that are `named` besides, in their order.

    Raises:
        InvalidTypeError: a text or a label is of another type.
        IA3Error: there are not as many labels as texts, or fewer than two classes.
    """
    examples = examples_of(texts)
    targets, others = labels_of(labels, named)
    check_count(examples, targets)
    classes = sorted({*targets, *others})
    if len(classes) < 2:
        found = f"all labels are {classes[0]!r}"
        raise IA3Error(f"{found}: name at least two, in labels or in choices")
    return LabelledTexts(examples, targets, classes), others


class TextClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """scikit-learn's interface over a model that reads texts.

    A subclass's `fit` sets the attributes below, at once where threads may share a classifier; it
    implements `base` and `_probabilities`.

    Attributes:
        classes_: the labels, `[classes]`, sorted.
        templates_: the sources of the templates that a text is read in.
        fields_: the names of the examples' fields.
    """

    classes_: NDArray[Any]
    templates_: list[str]
    fields_: list[str]

    @property
    def base(self) -> LoadedModel:
        """The model and its tokenizer, loaded when first used, shared with others of its name."""
        raise NotImplementedError

    @usual_state()
    def predict_proba(
        self, texts: Sequence[Text], *, progress: Callable[[int], None] | None = None
    ) -> NDArray[np.float64]:
        """The probability of each class.

        A language model's is the softmax of the choices' length-normalised log-probabilities, over
        the temperature, averaged over the templates; an encoder's is that of its head's scores.

        Args:
            texts: as in `fit`.
            progress: called with the number of prompts done since the last call; there is one for
                each text and template.

        Returns:
            `[examples, classes]`, in the order of `classes_`.

        Raises:
            NotFittedError: `fit` was not called.
            InvalidTypeError: a text is neither a string nor a mapping, or an argument is of another
                type.
            IA3Error: there is no text, one lacks a field or has one that is no text, finite number
                or date, or the model's scores of it are not finite.
        """
        self._check_fitted()
        check_callable("progress", progress)
        examples = examples_of(texts)
        fitted = self._as_fitted()
        with fitted.base.lock:
            templates = [Template(source) for source in fitted.templates_]
            check_fields(examples, fitted.fields_, templates)
            found: NDArray[np.float64] = fitted._probabilities(examples, progress).numpy()
        for row in np.flatnonzero(~np.isfinite(found).all(1))[:1]:
            raise not_finite(row)
        return found

    def predict(
        self, texts: Sequence[Text], *, progress: Callable[[int], None] | None = None
    ) -> NDArray[Any]:
        """The most probable label of each text, `[examples]`.

        Raises:
            NotFittedError: `fit` was not called.
            InvalidTypeError: as of `predict_proba`.
            IA3Error: as of `predict_proba`.
        """
        self._check_fitted()
        fitted = self._as_fitted()  # the labels are those of the same fit
        return fitted.classes_at(fitted.predict_proba(texts, progress=progress))

    def classes_at(self, probabilities: NDArray[np.float64]) -> NDArray[Any]:
        """The most probable labels, `[examples]`, by what `predict_proba` returned.

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
        most_probable: NDArray[Any] = classes[probabilities.argmax(1)]
        return most_probable

    def score(
        self, texts: Sequence[Text], labels: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> float:
        """The share of texts whose predicted label is the given one.

        Raises:
            NotFittedError: `fit` was not called.
            InvalidTypeError: a text or a label is of another type.
            IA3Error: a label is not among `classes_`, there are not as many as texts, or
                `sample_weight` does not fit; or as of `predict_proba`.
        """
        self._check_fitted()
        examples, (given, _) = examples_of(texts), labels_of(labels)
        check_count(examples, given)
        fitted = self._as_fitted()
        known = fitted.classes_.tolist()
        for row, label in enumerate(given):
            # True is 1, but no label among integers.
            if label not in known or type(label) is not type(known[0]):
                hint = did_you_mean(str(label), map(str, known))
                message = f"label {label!r} (row {row}) is not among the choices {known}{hint}"
                raise IA3Error(message)
        try:
            return float(ClassifierMixin.score(fitted, examples, given, sample_weight))
        except IA3Error:
            raise
        except (TypeError, ValueError) as error:
            raise IA3Error(f"sample_weight is {shown(sample_weight)}: {error}") from error

    def __sklearn_clone__(self) -> Self:
        # scikit-learn would copy a loaded model, weights and all.
        return type(self)(**self.get_params(deep=False))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.two_d_array = False
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


def not_finite(row: int) -> IA3Error:
    """What is wrong where a model's scores of a text are not finite."""
    return IA3Error(
        f"the model's scores of text {row} are not finite: its weights or the trained vectors are "
        "broken, or its dtype is too narrow"
    )


def check_count(texts: Sequence[Any], labels: Sequence[Label]) -> None:
    """Raise `IA3Error` where there are not as many labels as texts."""
    if len(texts) != len(labels):
        raise IA3Error(f"there are {len(texts)} texts and {len(labels)} labels: expected one each")
