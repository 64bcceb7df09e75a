"""Classes as answer choices that a language model ranks, and the base class of what does so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from ..arguments import listed
from ..base.loading import BaseModel, load_base_model
from ..errors import IA3Error, InvalidTypeError, did_you_mean, shown, warn_caller
from ..tfew.prompts.encoding import EncodedExample, Encoder, warn_of_cut_texts
from ..tfew.prompts.labels import Label, Text, are_words, check_text, readable
from ..tfew.prompts.templates import MOST_TEMPLATES, Template
from .inputs import check_fields
from .text_classifier import LabelledTexts, TextClassifier, read_labelled

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from transformers import PreTrainedTokenizerBase


EXPECTED = "a template, or a list of them"


@dataclass(frozen=True)
class Prompts:
    """What a language model is asked: the words of each class, and the templates to ask in."""

    choices: list[str]
    templates: list[Template]


class RankingClassifier(TextClassifier):
    """A classifier that has a language model rank answer choices.

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

    def _read_task(self, texts: Sequence[Text], labels: ArrayLike) -> tuple[LabelledTexts, Prompts]:
        choices = checked_choices(self.choices)
        data, named = read_labelled(texts, labels, choices or ())
        words = None if choices is None else dict(zip(named, choices.values(), strict=True))
        return data, read_prompts(data, self.template, words)

    def _keep_task(self, data: LabelledTexts, prompts: Prompts) -> None:
        """Keep the labels, the choices, the templates and the fields."""
        self.classes_ = np.array(data.classes)
        self.choices_ = prompts.choices
        self.templates_ = [template.source for template in prompts.templates]
        self.fields_ = list(data.examples[0])


def checked_choices(choices: object) -> Mapping[Any, str] | None:
    """The argument `choices`; raises `InvalidTypeError` where it is no mapping."""
    if choices is not None and not isinstance(choices, Mapping):
        kind = type(choices).__name__
        raise InvalidTypeError(f"choices is a {kind}, expected a mapping from labels to words")
    return choices


def read_prompts(
    data: LabelledTexts,
    template: str | Sequence[str] | None,
    words: Mapping[Label, str] | None,
    *,
    advise: bool = True,
) -> Prompts:
    """The choices and the templates, checked on the data; defaults where none are given.

    With `advise` a warning says where words for the labels would help.

    Raises:
        InvalidTypeError: a template or a label's words are of another type.
        IA3Error: a label has no words, a template is broken, or does not fit the data.
    """
    answers = _answer_choices(data.classes, words, advise)
    templates = _templates(template, data.examples[0])
    check_fields(data.examples, list(data.examples[0]), templates, data.rows)
    for each in templates:
        each.render(data.examples[0], answers)
    return Prompts(answers, templates)


def _answer_choices(
    classes: Sequence[Label], choices: Mapping[Any, str] | None, advise: bool
) -> list[str]:
    if choices is None:
        if advise:
            advise_on_words(classes)
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


def advise_on_words(classes: Sequence[Label]) -> None:
    """Warn of labels that say nothing, where they are the words that a language model ranks."""
    if are_words(classes):
        return
    message = (
        f"the labels {list(classes)} are ranked as these words; what they mean, said in "
        "choices={label: words}, helps the model"
    )
    if [*classes] == [*range(len(classes))] and not isinstance(classes[0], bool):
        message += (
            "; where scikit-learn numbers the labels, as in voting, stacking and calibration, the "
            "numbers are the places of the sorted labels: give choices=dict(enumerate(words))"
        )
    # Of several fits within one of scikit-learn's, one warning is shown.
    warn_caller(message, between=("sklearn", "joblib"), once=True)


def _templates(template: str | Sequence[str] | None, example: Mapping[str, Any]) -> list[Template]:
    """The prompts; where none is given, the fields and a word that asks for the label."""
    check_has_fields(example)
    if template is None and len(example) == 1:
        template = f"{{{{ fields[{next(iter(example))!r}] }}}}\nCategory:"
    elif template is None:
        # The name as a Jinja string, so that braces in it are no template.
        lines = [f"{{{{ {field!r} }}}}: {{{{ fields[{field!r}] }}}}" for field in example]
        template = "\n".join([*lines, "Category:"])
    return checked_templates(template)


def check_has_fields(example: Mapping[str, Any]) -> None:
    """Raise `IA3Error` for the first text, where it is a mapping of nothing."""
    if not example:
        raise IA3Error("text 0 has no fields: expected at least one")


def checked_templates(template: str | Sequence[str]) -> list[Template]:
    """The templates, compiled.

    Raises:
        InvalidTypeError: one is no text.
        IA3Error: there are none or too many, or one is broken.
    """
    sources = [template] if isinstance(template, str) else listed("template", template, EXPECTED)
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
    for example in (example for of_templates in encoded for example in of_templates):
        encoder.base.check_tokens((example.prompt, *example.choices))
    warn_of_cut_texts(encoder.truncated, len(examples) * len(templates))
    return encoded
