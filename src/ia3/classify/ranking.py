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

from ..base.loading import BaseModel, load_base_model
from ..errors import IA3Error, MissingExtraError, did_you_mean
from ..tfew.prompts.encoding import EncodedExample, Encoder, warn_of_cut_texts
from ..tfew.prompts.labels import Label, Text, readable
from ..tfew.prompts.templates import Template

try:
    import numpy as np
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils.validation import check_is_fitted
except ImportError as error:
    raise MissingExtraError("scikit-learn", "tfew", "classifying texts") from error

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from transformers import PreTrainedTokenizerBase

TEXT = "text"


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
        """The model and its tokenizer, loaded when first used, shared with others of its name."""
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
            IA3Error: a text is neither a string nor a mapping, lacks a field, or the model's scores
                of it are not finite.
        """
        self._check_fitted()
        examples = _examples(texts)
        for row, example in enumerate(examples):
            missing = [name for name in self.fields_ if name not in example]
            if missing:
                raise IA3Error(
                    f"text {row} has no field {missing[0]!r}: it has {list(example)}, the "
                    f"classifier was fitted on {self.fields_}"
                )
        probabilities: NDArray[np.float64] = self._probabilities(examples, progress).numpy()
        for row in np.flatnonzero(~np.isfinite(probabilities).all(1))[:1]:
            raise IA3Error(
                f"the model's scores of text {row} are not finite: its weights or the trained "
                "vectors are broken, or its dtype is too narrow"
            )
        return probabilities

    def predict(
        self, texts: Sequence[Text], *, progress: Callable[[int], None] | None = None
    ) -> NDArray[Any]:
        """The most probable label of each text, `[examples]`. Raises as `predict_proba` does."""
        return self.classes_at(self.predict_proba(texts, progress=progress))

    def classes_at(self, probabilities: NDArray[np.float64]) -> NDArray[Any]:
        """The most probable labels, `[examples]`, by what `predict_proba` returned."""
        most_probable: NDArray[Any] = self.classes_[probabilities.argmax(1)]
        return most_probable

    def score(
        self, texts: Sequence[Text], labels: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> float:
        """The share of texts whose predicted label is the given one.

        Raises:
            NotFittedError: `fit` was not called.
            IA3Error: a label is not among `classes_`.
        """
        self._check_fitted()
        known = self.classes_.tolist()
        for row, label in enumerate(_labels(labels, len(texts))):
            if label not in known:
                hint = did_you_mean(str(label), map(str, known))
                message = f"label {label!r} (row {row}) is not among the choices {known}{hint}"
                raise IA3Error(message)
        return float(super().score(texts, labels, sample_weight))

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
        check_is_fitted(self, "classes_")

    def _read_task(self, texts: Sequence[Text], labels: ArrayLike) -> LabelledTexts:
        examples = _examples(texts)
        targets = _labels(labels, len(examples))
        # Numbers before strings.
        classes = sorted({*targets, *(self.choices or {})}, key=lambda c: (isinstance(c, str), c))
        if len(classes) < 2:
            found = f"all labels are {classes[0]!r}"
            raise IA3Error(f"{found}: name at least two, in labels or in choices")
        if isinstance(classes[-1], str) != isinstance(classes[0], str):
            raise IA3Error(f"the labels {classes} mix strings and numbers: expected one kind")
        answers = _answer_choices(classes, self.choices)
        templates = _templates(self.template, examples[0])
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


def _examples(texts: Sequence[Text]) -> list[Mapping[str, Any]]:
    """Every text as a mapping from field names to values."""
    if isinstance(texts, str | Mapping):
        raise IA3Error(f"texts is one {type(texts).__name__}, expected a list of texts")
    if hasattr(texts, "to_dict") and hasattr(texts, "columns"):
        texts = texts.to_dict("records")
    examples: list[Mapping[str, Any]] = []
    for row, text in enumerate(_listed("texts", texts)):
        if isinstance(text, str):
            examples.append({TEXT: str(text)})
        elif isinstance(text, Mapping):
            examples.append(text)
        else:
            raise IA3Error(
                f"text {row} is {text!r} ({type(text).__name__}), expected a string or a mapping "
                "from field names to values"
            )
    if not examples:
        raise IA3Error("there are no texts: expected at least one")
    return examples


def _labels(labels: ArrayLike, count: int) -> list[Label]:
    if isinstance(labels, str | Mapping):
        raise IA3Error(f"labels is one {type(labels).__name__}, expected a list of labels")
    plain = _listed("labels", np.asarray(labels).tolist() if hasattr(labels, "dtype") else labels)
    plain = [label.item() if isinstance(label, np.generic) else label for label in plain]
    if len(plain) != count:
        raise IA3Error(f"there are {count} texts and {len(plain)} labels: expected one each")
    for row, label in enumerate(plain):
        if not isinstance(label, str | int | bool):
            raise IA3Error(
                f"label {row} is {label!r} ({type(label).__name__}), expected a string or integer"
            )
    return plain


def _listed(name: str, given: Any) -> list[Any]:
    try:
        return list(given)
    except TypeError as error:
        what = f"{name} is {given!r} ({type(given).__name__})"
        raise IA3Error(f"{what}, expected a list of {name}") from error


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
            raise IA3Error(f"choices[{label!r}] is {choices[label]!r}, expected words")
    return [choices[label] for label in classes]


def _templates(template: str | Sequence[str] | None, example: Mapping[str, Any]) -> list[Template]:
    """The prompts; where none is given, the fields and a word that asks for the label."""
    if template is None and len(example) == 1:
        template = f"{{{{ fields[{next(iter(example))!r}] }}}}\nCategory:"
    elif template is None:
        # The name as a Jinja string, so that braces in it are no template.
        lines = [f"{{{{ {field!r} }}}}: {{{{ fields[{field!r}] }}}}" for field in example]
        template = "\n".join([*lines, "Category:"])
    sources = [template] if isinstance(template, str) else list(template)
    if not sources:
        raise IA3Error("template is an empty list: expected at least one template")
    return [Template(source) for source in sources]


def encode_all(
    encoder: Encoder, examples: Sequence[Mapping[str, Any]], templates: Sequence[Template]
) -> list[tuple[EncodedExample, ...]]:
    """Every example with every template, `[examples][templates]`, with one warning of cut texts."""
    encoded = [tuple(encoder.encode(e, template) for template in templates) for e in examples]
    warn_of_cut_texts(encoder, len(examples) * len(templates), stacklevel=5)
    return encoded
