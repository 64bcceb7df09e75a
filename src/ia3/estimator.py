"""`FewShotClassifier`: T-Few behind scikit-learn's interface."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import store
from .base_model import EMBEDDED_MODEL, BaseModel, load_base_model
from .config import IA3Config
from .errors import IA3Error, MissingExtraError, did_you_mean
from .files import write_files
from .model import IA3Model
from .tfew.encoding import EncodedExample, Encoder
from .tfew.scoring import choice_scores
from .tfew.templates import Template

try:
    import numpy as np
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.exceptions import NotFittedError
except ImportError as error:
    raise MissingExtraError("scikit-learn", "tfew", "FewShotClassifier") from error

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from transformers import PreTrainedTokenizerBase

    from .tfew.training import TrainingStep

TASK_NAME = "ia3_task.json"
TASK_FORMAT = 1
TEXT = "text"
SETTINGS = ("chat", "steps", "learning_rate", "seed")
# Every linear layer's output, and the feed-forward input of the architectures that name theirs. A
# small model learns more from more sites, and in fewer steps (docs/benchmarks.md).
SITES = "all-linear"

Text = str | Mapping[str, Any]
Label = str | int | bool


class FewShotClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Text classification from a few labelled examples, by ranking answer choices.

    A frozen language model reads each text in a prompt, and the label whose words it finds most
    likely is the prediction. `fit` trains (IA)³ vectors on it by the T-Few recipe (paper section
    3). Between calls the model carries no adapter: classifiers of one model share it.

    Args:
        model: `"smollm2-135m-instruct"`, a folder, a hub id, or a loaded transformers model.
        template: a Jinja template over the fields' names, e.g. `"{{ text }}\\nCategory:"`; several
            are drawn from in training and averaged in prediction. Strings have the one field
            `text`.
        choices: label -> the words that are ranked for it. By default the label's own name made
            readable. May name labels that never occur in training.
        steps: optimizer steps; 0 is the untuned model.
        seed: of the order of the examples and of the templates drawn.
        device: `"auto"` or torch's name of one; a loaded model stays where it is.
        dtype: `"auto"` or torch's name of one; a loaded model keeps its own.
        learning_rate: Adafactor's, at its peak. The paper's is 3e-3; a small model learns more at
            this one (docs/benchmarks.md).
        chat: put the prompt into the tokenizer's chat template.
        tokenizer: for a loaded model whose config does not say where it came from.

    Attributes:
        classes_: the labels, `[classes]`, sorted.
        choices_: the words ranked for each of them.
        templates_: the templates' sources.
        fields_: the names of the examples' fields.
        settings_: `chat`, `steps`, `learning_rate` and `seed`, as they were in `fit`.
        adapter_: the `Adapter`: its config, and its vectors, float32 on the CPU.
        history_: one `TrainingStep` a step.
    """

    def __init__(
        self,
        model: str | Path | nn.Module = EMBEDDED_MODEL,
        template: str | Sequence[str] | None = None,
        choices: Mapping[Any, str] | None = None,
        *,
        steps: int = 100,
        seed: int = 0,
        device: str = "auto",
        dtype: str = "auto",
        learning_rate: float = 1e-2,
        chat: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.model = model
        self.template = template
        self.choices = choices
        self.steps = steps
        self.seed = seed
        self.device = device
        self.dtype = dtype
        self.learning_rate = learning_rate
        self.chat = chat
        self.tokenizer = tokenizer

    @property
    def base(self) -> BaseModel:
        """The model and its tokenizer, loaded when first used, shared with others of its name."""
        # Held, so that the model stays in memory as long as a classifier uses it.
        self._base = load_base_model(
            self.model, tokenizer=self.tokenizer, device=self.device, dtype=self.dtype
        )
        return self._base

    def fit(
        self,
        texts: Sequence[Text],
        labels: ArrayLike,
        *,
        on_step: Callable[[TrainingStep], None] | None = None,
    ) -> FewShotClassifier:
        """Train on labelled texts.

        Args:
            texts: strings, or mappings from field names to values, `[examples]`.
            labels: strings, integers or booleans, `[examples]`.
            on_step: called after every optimizer step.

        Raises:
            IA3Error: the data, a template or the choices are unusable (the message says which).
            DivergedError: the loss is not finite. What was fitted before stays.
        """
        # Brings transformers' Trainer, which prediction does without.
        from .tfew.training import TFewConfig, TrainingExample, train

        if self.steps < 0:
            raise IA3Error(f"steps is {self.steps}, expected at least 0")
        # The untuned model takes no step, but its settings are checked all the same.
        recipe = TFewConfig(
            steps=max(self.steps, 1), learning_rate=self.learning_rate, seed=self.seed
        )
        examples = _examples(texts)
        targets = _labels(labels, len(examples))
        classes = sorted({*targets, *(self.choices or {})}, key=_order)
        if len(classes) < 2:
            raise IA3Error(
                f"all labels are {classes[0]!r}: name at least two, in labels or in choices"
            )
        answers = _answer_choices(classes, self.choices)
        if len({isinstance(label, str) for label in classes}) > 1:
            raise IA3Error(f"the labels {classes} mix strings and numbers: expected one kind")
        templates = _templates(self.template, examples[0])
        for template in templates:
            template.render(examples[0], answers)
        base = self.base
        encoder = Encoder(base, answers, chat=self.chat)
        encoded = _encode(encoder, examples, templates)
        config = IA3Config(
            task_type="SEQ_2_SEQ_LM" if base.is_encoder_decoder else "CAUSAL_LM",
            target_modules=SITES,
        )
        with _adapted(base, config, None) as ia3_model:
            history = []
            if self.steps > 0:
                history = train(
                    base,
                    ia3_model,
                    [
                        TrainingExample(e, classes.index(label))
                        for e, label in zip(encoded, targets, strict=True)
                    ],
                    recipe,
                    on_step,
                )
            adapter = ia3_model.adapter("default")
        adapter.vectors = {name: v.cpu().clone() for name, v in adapter.vectors.items()}
        self.classes_ = np.array(classes)
        self.choices_ = answers
        self.templates_ = [template.source for template in templates]
        self.fields_ = list(examples[0])
        self.settings_ = {name: getattr(self, name) for name in SETTINGS}
        self.adapter_ = adapter
        self.history_ = history
        return self

    def predict_proba(
        self, texts: Sequence[Text], *, progress: Callable[[int], None] | None = None
    ) -> NDArray[np.float64]:
        """The softmax of the choices' length-normalised log-probabilities.

        Args:
            texts: as in `fit`.
            progress: called with the number of examples done since the last call, once a template.

        Returns:
            `[examples, classes]`, in the order of `classes_`; averaged over the templates.

        Raises:
            IA3Error: the model's scores are not finite.
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
        base = self.base
        encoder = Encoder(base, self.choices_, chat=self.settings_["chat"])
        encoded = _encode(encoder, examples, [Template(source) for source in self.templates_])
        with _adapted(base, self.adapter_.config, self.adapter_):
            probabilities = [
                choice_scores(base, list(of_template), progress=progress).double().softmax(-1)
                for of_template in zip(*encoded, strict=True)
            ]
        averaged: NDArray[np.float64] = torch.stack(probabilities).mean(0).numpy()
        for row in np.flatnonzero(~np.isfinite(averaged).all(1))[:1]:
            raise IA3Error(
                f"the model's scores of text {row} are not finite: its weights or the trained "
                "vectors are broken, or its dtype is too narrow"
            )
        return averaged

    def predict(
        self, texts: Sequence[Text], *, progress: Callable[[int], None] | None = None
    ) -> NDArray[Any]:
        """The most probable label of each text, `[examples]`."""
        return self.classes_at(self.predict_proba(texts, progress=progress))

    def classes_at(self, probabilities: NDArray[np.float64]) -> NDArray[Any]:
        """The labels of the highest probabilities, `[examples]`, from `predict_proba`'s result."""
        most_probable: NDArray[Any] = self.classes_[probabilities.argmax(1)]
        return most_probable

    def score(
        self, texts: Sequence[Text], labels: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> float:
        """Accuracy.

        Raises:
            IA3Error: a label is not among `classes_`.
        """
        self._check_fitted()
        self.check_labels(_labels(labels, len(texts)))
        return float(super().score(texts, labels, sample_weight))

    def check_labels(self, labels: Sequence[Label]) -> None:
        """Raise `IA3Error` for the first label that is not among `classes_`."""
        known = set(self.classes_.tolist())
        for row, label in enumerate(labels):
            if label not in known:
                hint = did_you_mean(str(label), [str(c) for c in known])
                raise IA3Error(
                    f"label {label!r} (row {row}) is not among the choices "
                    f"{self.classes_.tolist()}{hint}"
                )

    # -- files ------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write the adapter in PEFT's two files, and the task beside them, atomically.

        Raises:
            NotFittedError: `fit` was not called.
            OSError: the disk is full or may not be written; what was there before stays.
        """
        self._check_fitted()
        name = self.base.name
        task = {
            "format": TASK_FORMAT,
            "model": name,
            "templates": self.templates_,
            "fields": self.fields_,
            "labels": self.classes_.tolist(),
            "choices": self.choices_,
            **self.settings_,
        }
        files = store.adapter_files(self.adapter_)
        files[TASK_NAME] = (json.dumps(task, indent=2, ensure_ascii=False) + "\n").encode()
        write_files(folder, files)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        model: str | Path | nn.Module | None = None,
        device: str = "auto",
        dtype: str = "auto",
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> FewShotClassifier:
        """Read what `save` wrote.

        Args:
            folder: written by `save`.
            model: in place of the one the adapter was trained on, e.g. where it lies elsewhere now.
            device: as in the constructor.
            dtype: as in the constructor.
            tokenizer: as in the constructor.

        Raises:
            FileNotFoundError: the folder or one of its three files is not there.
            IA3Error: a file is broken.
        """
        path = Path(folder) / TASK_NAME
        if not path.is_file():
            raise FileNotFoundError(f"no classifier in {folder}: {TASK_NAME} is not there")
        try:
            task = json.loads(path.read_text("utf-8"))
            if task["format"] != TASK_FORMAT:
                raise IA3Error(
                    f"{path} has format {task['format']!r}, expected {TASK_FORMAT}: it was "
                    "written by another version of ia3"
                )
            labels, choices = list(task["labels"]), list(task["choices"])
            templates, fields = list(task["templates"]), list(task["fields"])
            if not all(isinstance(x, str) for x in (*choices, *templates, *fields)) or isinstance(
                task["templates"], str
            ):
                raise TypeError("choices, templates and fields are lists of strings")
            if not task["model"] and model is None:
                raise IA3Error(f"{path} names no model: give the one it was fitted on as model=")
            classifier = cls(
                model=task["model"] if model is None else model,
                template=templates,
                choices=dict(zip(labels, choices, strict=True)),
                steps=int(task["steps"]),
                seed=int(task["seed"]),
                device=device,
                dtype=dtype,
                learning_rate=float(task["learning_rate"]),
                chat=bool(task["chat"]),
                tokenizer=tokenizer,
            )
        except IA3Error:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise IA3Error(
                f"{path} is not a saved classifier: {type(error).__name__}: {error}"
            ) from error
        classifier.adapter_ = store.read_adapter(folder)
        classifier.classes_ = np.array(labels)
        classifier.choices_ = choices
        classifier.templates_ = templates
        classifier.fields_ = fields
        classifier.settings_ = {name: getattr(classifier, name) for name in SETTINGS}
        classifier.history_ = []
        return classifier

    # -- scikit-learn -----------------------------------------------------------------------------

    def __sklearn_clone__(self) -> FewShotClassifier:
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

    # -- private ----------------------------------------------------------------------------------

    def _check_fitted(self) -> None:
        if not hasattr(self, "adapter_"):
            raise NotFittedError("this FewShotClassifier is not fitted yet: call fit first")


@contextmanager
def _adapted(
    base: BaseModel, config: IA3Config, adapter: store.Adapter | None
) -> Iterator[IA3Model]:
    """The base model with one adapter on it, for as long as the context lasts."""
    with base.lock:
        modes = [(module, module.training) for module in base.model.modules()]
        if adapter is None:
            ia3_model = IA3Model(base.model, config)
        else:
            ia3_model = IA3Model.from_adapter(base.model, adapter)
        try:
            yield ia3_model
        finally:
            ia3_model.unload()
            for module, training in modes:
                module.training = training


def _examples(texts: Sequence[Text]) -> list[Mapping[str, Any]]:
    """Every text as a mapping from field names to values."""
    if isinstance(texts, str | Mapping):
        raise IA3Error(f"texts is one {type(texts).__name__}, expected a list of texts")
    if hasattr(texts, "to_dict") and hasattr(texts, "columns"):
        texts = texts.to_dict("records")
    examples: list[Mapping[str, Any]] = []
    for row, text in enumerate(texts):
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
    plain: list[Any] = np.asarray(labels).tolist() if hasattr(labels, "dtype") else list(labels)  # type: ignore[arg-type]
    plain = [label.item() if isinstance(label, np.generic) else label for label in plain]
    if len(plain) != count:
        raise IA3Error(f"there are {count} texts and {len(plain)} labels: expected one each")
    for row, label in enumerate(plain):
        if not isinstance(label, str | int | bool):
            raise IA3Error(
                f"label {row} is {label!r} ({type(label).__name__}), expected a string or integer"
            )
    return plain


def _order(label: Label) -> tuple[str, Any]:
    return ("", label) if isinstance(label, int) else ("str", label)


def _answer_choices(classes: Sequence[Label], choices: Mapping[Any, str] | None) -> list[str]:
    if choices is None:
        if any(str(label).lstrip("-").isdecimal() or isinstance(label, bool) for label in classes):
            warnings.warn(
                f"the labels {list(classes)} are ranked as these words; what they mean, said in "
                "choices={label: words}, helps the model",
                stacklevel=3,
            )
        return [readable(label) for label in classes]
    missing = [label for label in classes if label not in choices]
    if missing:
        hint = did_you_mean(str(missing[0]), [str(label) for label in choices])
        raise IA3Error(f"choices has no words for the label {missing[0]!r}{hint}")
    for label in classes:
        if not isinstance(choices[label], str) or not choices[label].strip():
            raise IA3Error(f"choices[{label!r}] is {choices[label]!r}, expected words")
    return [choices[label] for label in classes]


def readable(label: Label) -> str:
    """A label's name as words: `card_arrival` and `cardArrival` are "card arrival"."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", str(label))
    if words != str(label):
        words = words.lower()
    return " ".join(words.replace("_", " ").split()) or str(label)


def _templates(template: str | Sequence[str] | None, example: Mapping[str, Any]) -> list[Template]:
    if template is None:
        return [Template(default_template(list(example)))]
    sources = [template] if isinstance(template, str) else list(template)
    if not sources:
        raise IA3Error("template is an empty list: expected at least one template")
    return [Template(source) for source in sources]


def default_template(fields: Sequence[str]) -> str:
    """The prompt used where none is given: the fields, and a word that asks for the label."""
    if len(fields) == 1:
        return f"{{{{ fields[{fields[0]!r}] }}}}\nCategory:"
    # The name as a Jinja string, so that braces in it are no template.
    lines = [f"{{{{ {field!r} }}}}: {{{{ fields[{field!r}] }}}}" for field in fields]
    return "\n".join([*lines, "Category:"])


def _encode(
    encoder: Encoder, examples: Sequence[Mapping[str, Any]], templates: Sequence[Template]
) -> list[tuple[EncodedExample, ...]]:
    """Every example with every template, `[examples][templates]`, with one warning for all cut."""
    encoded = [tuple(encoder.encode(e, template) for template in templates) for e in examples]
    if encoder.truncated:
        warnings.warn(
            f"{encoder.truncated} of {len(examples) * len(templates)} prompts are longer than the "
            "model's context: their texts were cut at the end",
            stacklevel=3,
        )
    return encoded
