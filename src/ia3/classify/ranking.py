"""The base class of classifiers that rank answer choices: it checks texts and labels, and predicts.

`FewShotClassifier` derives from it, and so do the methods that it is compared with.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn

from ..arguments import check_callable, instance
from ..base.loading import BaseModel, load_base_model
from ..errors import IA3Error, InvalidTypeError, MissingExtraError, StateError, did_you_mean, shown
from ..tfew.prompts.encoding import EncodedExample, Encoder, warn_of_cut_texts
from ..tfew.prompts.labels import Label, Text, check_text, readable
from ..tfew.prompts.templates import MOST_TEMPLATES, Template
from .inputs import check_fields, examples_of, labels_of

try:
    import numpy as np
    from sklearn import exceptions
    from sklearn.base import BaseEstimator, ClassifierMixin
except ImportError as error:
    raise MissingExtraError("scikit-learn", "tfew", "classifying texts") from error

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from transformers import PreTrainedTokenizerBase


class NotFittedError(StateError, exceptions.NotFittedError):  # type: ignore[misc]
    """The classifier was not fitted: call `fit` first. It is scikit-learn's error too."""


@dataclass(frozen=True)
class LabelledTexts:
    """The data and the prompts of a task, checked; `classes` are sorted, `choices` their words."""

    examples: list[Mapping[str, Any]]
    labels: list[Label]
    classes: list[Label]
    choices: list[str]
    templates: list[Template]


class RankingClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """scikit-learn's interface over a language model that ranks answer choices.

    A subclass's constructor takes at least the arguments below, its `fit` ends with `_keep_task`,
    and it implements `_probabilities`.
    """

    model: str | Path | nn.Module
    template: str | Sequence[str] | None
    choices: Mapping[Any, str] | None
    device: str
    dtype: str
    tokenizer: PreTrainedTokenizerBase | None

    @property
    def base(self) -> BaseModel:
        """The model and its tokenizer, loaded when first used, shared with others of its name.

        Raises:
            InvalidTypeError: a setting is of another type.
            StateError: there is no such device.
            IA3Error: the model is unknown, cannot be loaded, or cannot rank answers.
        """
        # The cache of loaded models is weak: this reference keeps the model in memory.
        self._base = load_base_model(
            self.model, tokenizer=self.tokenizer, device=self.device, dtype=self.dtype
        )
        return self._base

    def predict_proba(
        self, texts: Sequence[Text], *, progress: Callable[[int], None] | None = None
    ) -> NDArray[np.float64]:
        """The softmax of the choices' length-normalised log-probabilities.

        Args:
            texts: as in `fit`.
            progress: called with the number of prompts done since the last call; there is one for
                each text and template.

        Returns:
            `[examples, classes]`, in the order of `classes_`; averaged over the prompts.

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
        with self.base.lock:  # another thread that fits this classifier has it
            check_fields(examples, self.fields_, [Template(source) for source in self.templates_])
            found: NDArray[np.float64] = self._probabilities(examples, progress).numpy()
        for row in np.flatnonzero(~np.isfinite(found).all(1))[:1]:
            raise IA3Error(
                f"the model's scores of text {row} are not finite: its weights or the trained "
                "vectors are broken, or its dtype is too narrow"
            )
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
        with self.base.lock:  # the labels are those of the same fit
            return self.classes_at(self.predict_proba(texts, progress=progress))

    def classes_at(self, probabilities: NDArray[np.float64]) -> NDArray[Any]:
        """The most probable labels, `[examples]`, by what `predict_proba` returned.

        Raises:
            NotFittedError: `fit` was not called.
            InvalidTypeError: it is not an array.
            IA3Error: its shape is another.
        """
        self._check_fitted()
        expected = f"[examples, {len(self.classes_)}], as predict_proba returns it"
        instance("probabilities", probabilities, np.ndarray, expected)
        if probabilities.ndim != 2 or probabilities.shape[1] != len(self.classes_):
            raise IA3Error(f"probabilities are {list(probabilities.shape)}, expected {expected}")
        most_probable: NDArray[Any] = self.classes_[probabilities.argmax(1)]
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
        known = self.classes_.tolist()
        examples, (given, _) = examples_of(texts), labels_of(labels)
        _check_count(examples, given)
        for row, label in enumerate(given):
            # True is 1, but no label among integers.
            if label not in known or type(label) is not type(known[0]):
                hint = did_you_mean(str(label), map(str, known))
                message = f"label {label!r} (row {row}) is not among the choices {known}{hint}"
                raise IA3Error(message)
        try:
            return float(super().score(examples, given, sample_weight))
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

    def _check_fitted(self) -> None:
        if not hasattr(self, "classes_"):
            kind = type(self).__name__
            raise NotFittedError(f"this {kind} instance is not fitted yet: call fit first")

    def _read_task(self, texts: Sequence[Text], labels: ArrayLike) -> LabelledTexts:
        examples = examples_of(texts)
        choices = {} if self.choices is None else self.choices
        if not isinstance(choices, Mapping):
            kind = type(choices).__name__
            raise InvalidTypeError(f"choices is a {kind}, expected a mapping from labels to words")
        targets, named = labels_of(labels, choices)
        _check_count(examples, targets)
        classes = sorted({*targets, *named})
        if len(classes) < 2:
            found = f"all labels are {classes[0]!r}"
            raise IA3Error(f"{found}: name at least two, in labels or in choices")
        words = dict(zip(named, choices.values(), strict=True))
        answers = _answer_choices(classes, None if self.choices is None else words)
        templates = _templates(self.template, examples[0])
        check_fields(examples, list(examples[0]), templates)
        for template in templates:
            template.render(examples[0], answers)
        return LabelledTexts(examples, targets, classes, answers, templates)

    def _keep_task(self, labels: list[Label], *others: list[str]) -> None:
        """Keep the labels, and the choices, templates and fields."""
        self.classes_ = np.array(labels)
        self.choices_, self.templates_, self.fields_ = others

    def _probabilities(
        self, examples: list[Mapping[str, Any]], progress: Callable[[int], None] | None
    ) -> Tensor:
        """The probability of each class, `[examples, classes]`, float64, on the CPU."""
        raise NotImplementedError


def _check_count(texts: Sequence[Any], labels: Sequence[Label]) -> None:
    if len(texts) != len(labels):
        raise IA3Error(f"there are {len(texts)} texts and {len(labels)} labels: expected one each")


def _answer_choices(classes: Sequence[Label], choices: Mapping[Any, str] | None) -> list[str]:
    if choices is None:
        if any(str(label).lstrip("-").isdecimal() or isinstance(label, bool) for label in classes):
            warnings.warn(
                f"the labels {list(classes)} are ranked as these words; what they mean, said in "
                "choices={label: words}, helps the model",
                stacklevel=4,
            )
        return [readable(label) for label in classes]
    missing = [label for label in classes if label not in choices]
    if missing:
        hint = did_you_mean(str(missing[0]), [str(label) for label in choices])
        raise IA3Error(
            f"choices has no words for the label {missing[0]!r}, which the data has: it has words "
            f"for {list(choices)}, expected words for each of {list(classes)}{hint}"
        )
    for label in classes:
        if not isinstance(choices[label], str) or not choices[label].strip():
            raise IA3Error(f"choices[{label!r}] is {shown(choices[label])}, expected words")
        check_text(choices[label], f"choices[{label!r}]")
    return [choices[label] for label in classes]


def _templates(template: str | Sequence[str] | None, example: Mapping[str, Any]) -> list[Template]:
    """The prompts; where none is given, the fields and a word that asks for the label."""
    if not example:
        raise IA3Error("text 0 has no fields: expected at least one")
    if template is None and len(example) == 1:
        template = f"{{{{ fields[{next(iter(example))!r}] }}}}\nCategory:"
    elif template is None:
        # The name as a Jinja string, so that braces in it are no template.
        lines = [f"{{{{ {field!r} }}}}: {{{{ fields[{field!r}] }}}}" for field in example]
        template = "\n".join([*lines, "Category:"])
    sources = [template] if isinstance(template, str) else list(template)
    if not sources:
        raise IA3Error("template is an empty list: expected at least one template")
    if len(sources) > MOST_TEMPLATES:
        raise IA3Error(f"{len(sources):,} templates, expected at most {MOST_TEMPLATES:,}")
    for source in sources:
        if not isinstance(source, str):
            kind = type(source).__name__
            raise InvalidTypeError(f"a template is {shown(source)} ({kind}), expected a text")
        check_text(source, "a template")
    return [Template(str(source)) for source in sources]


def encode_all(
    encoder: Encoder, examples: Sequence[Mapping[str, Any]], templates: Sequence[Template]
) -> list[tuple[EncodedExample, ...]]:
    """Every example with every template, `[examples][templates]`, with one warning of cut texts."""
    encoded = [tuple(encoder.encode(e, template) for template in templates) for e in examples]
    warn_of_cut_texts(encoder, len(examples) * len(templates), stacklevel=5)
    return encoded
