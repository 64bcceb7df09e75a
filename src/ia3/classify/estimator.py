"""`FewShotClassifier`: T-Few behind scikit-learn's interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..adapter.files import (
    Adapter,
    adapter_files,
    check_finite,
    read_adapter,
    unread_adapter,
    write_saved,
)
from ..adapter.layout import open_folder
from ..arguments import LARGEST, check_callable, folder_of, path_of, whole
from ..base.loading import EMBEDDED_MODEL
from ..core.route import changing
from ..errors import BrokenFileError, IA3Error, InvalidTypeError, MissingFileError, naming, shown
from ..files.hub import adapter_folder
from ..files.saved import TASK_NAME
from ..tfew.prompts.encoding import Encoder, TrainingExample
from ..tfew.prompts.labels import Text, check_text
from ..tfew.prompts.templates import Template
from ..tfew.scoring.choices import MAX_TOKENS
from ..tfew.scoring.prefix import ranking_scores
from ..tfew.temporary_adapter import all_linear, temporary_adapter
from .ranking import LabelledTexts, RankingClassifier, encode_all
from .task_file import TASK_FORMAT, TaskFile

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from transformers import PreTrainedTokenizerBase

    from ..tfew.training.trainer import TFewConfig, TrainingStep

LISTS = ("labels", "choices", "templates", "fields")
# What a fit depends on besides its data: what is expected, its types, and Python's own one.
SETTINGS: dict[str, tuple[str, Any, Callable[[Any], Any]]] = {
    "chat": ("True or False", bool | np.bool_, bool),
    "steps": ("a whole number", Integral, int),
    "learning_rate": ("a number", Real, float),
    "seed": ("a whole number", Integral, int),
    "upper_blocks": ("a whole number or None", Integral, int),
}


@dataclass(frozen=True)
class PreparedTask:
    """What a training needs, checked: `start` is the adapter to begin with, `None` for ones."""

    data: LabelledTexts
    recipe: TFewConfig
    examples: list[TrainingExample]
    start: Adapter | None


class FewShotClassifier(RankingClassifier):
    """Text classification from a few labelled examples, by ranking answer choices.

    A frozen language model reads each text in a prompt. The prediction is the label whose words the
    model finds most likely. `fit` trains (IA)³ vectors on the model by the T-Few recipe (paper
    section 3). The model carries the adapter only during a call, so that classifiers of one model
    share it.

    Args:
        model: `"smollm2-135m-instruct"`, a folder, a hub id, or a loaded transformers model.
        template: a Jinja template over the fields' names, e.g. `"{{ text }}\\nCategory:"`, or a
            list of them: training draws one for each example at each step, prediction averages over
            all. A text that is a string has the one field `text`. By default the fields, followed
            by `Category:`.
        choices: label -> the words that are ranked for it. By default the label's own name made
            readable. It may name labels that do not occur in training.
        steps: optimizer steps, 0 or more; 0 is the untuned model.
        seed: of the order of the examples and of the templates drawn, 0 to 2**32 - 1.
        device: `"auto"` or torch's name of one; a loaded model stays where it is.
        dtype: `"auto"` or torch's name of a floating-point dtype; a loaded model keeps its own. The
            vectors are float32 in any case.
        learning_rate: Adafactor's, at its peak, above 0. The paper's is 3e-3; a small model learns
            more at this one (docs/benchmarks.md).
        chat: put the prompt into the tokenizer's chat template.
        tokenizer: for a loaded model whose config does not say where it came from.
        init_from: an adapter's folder or hub id, or an `Adapter`, such as another task's or one
            trained on many tasks: `fit` begins with its vectors, at its sites, instead of ones.
        max_tokens: the most tokens computed at once, in training and in prediction, 1 or more. What
            has more is computed in parts, with the same results but for rounding. Lower it where
            memory runs out.
        upper_blocks: rescale only this number of uppermost blocks of a decoder-only model instead
            of all. The blocks below them need no gradients.

    Attributes:
        classes_: the labels, `[classes]`, sorted.
        choices_: the words ranked for each class, `[classes]`.
        templates_: the templates' sources.
        fields_: the names of the examples' fields.
        settings_: `chat`, `steps`, `learning_rate`, `seed` and `upper_blocks`, as they were in
            `fit`.
        adapter_: the `Adapter`: its config, and its vectors, float32 on the CPU.
        history_: one `TrainingStep` a step.

    Raises:
        IA3Error: an argument is unusable. Arguments are checked in `fit`, as scikit-learn has it.

    Example:
        >>> from ia3 import FewShotClassifier
        >>> classifier = FewShotClassifier(steps=2)
        >>> texts = ["I was charged twice.", "The courier left my parcel in the rain."]
        >>> classifier.fit(texts, ["billing", "delivery"]).classes_.tolist()
        ['billing', 'delivery']
        >>> classifier.predict_proba(["The bill is wrong.", "Where is the van?"]).shape
        (2, 2)
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
        init_from: str | Path | Adapter | None = None,
        max_tokens: int = MAX_TOKENS,
        upper_blocks: int | None = None,
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
        self.init_from = init_from
        self.max_tokens = max_tokens
        self.upper_blocks = upper_blocks

    def fit(
        self,
        texts: Sequence[Text],
        labels: ArrayLike,
        *,
        on_step: Callable[[TrainingStep], None] | None = None,
        checkpoints: str | Path | None = None,
    ) -> FewShotClassifier:
        """Train on labelled texts.

        Args:
            texts: strings, or mappings from field names to values, `[examples]`. What a template
                reads is text, a finite number, a date, or lists and mappings of these.
            labels: strings, integers of 64 bits or booleans, all of one kind, `[examples]`.
            on_step: called after every optimizer step.
            checkpoints: a folder in which the training is kept as it goes. The same call after a
                break goes on from there, and ends as it would have without it.

        Raises:
            InvalidTypeError: an argument, a setting, a text or a label is of another type.
            StateError: there is no such device.
            MissingFileError: there is no adapter at `init_from`.
            DivergedError: the loss, a gradient or an update is not finite. What was fitted before
                stays.
            IA3Error: the data, a template or the choices are unusable (the message says which, and
                the row),
                `init_from` does not fit the model, the model has not so many blocks, or the
                checkpoints are those of another run.
            OSError: a checkpoint cannot be written.
        """
        check_callable("on_step", on_step)
        if checkpoints is not None:
            path_of("checkpoints", checkpoints)
        self._train(self._prepare(self._read_task(texts, labels)), on_step, checkpoints)
        return self

    def _settings(self) -> dict[str, Any]:
        """The settings of a fit, as Python's own numbers; a grid's may be numpy's."""
        settings: dict[str, Any] = {}
        for name, (expected, kinds, plain) in SETTINGS.items():
            value = getattr(self, name)
            if name == "upper_blocks" and value is None:
                settings[name] = None
                continue
            if not isinstance(value, kinds) or (plain is not bool and isinstance(value, bool)):
                what = f"{name} is {shown(value)} ({type(value).__name__})"
                raise InvalidTypeError(f"{what}, expected {expected}")
            settings[name] = plain(value)
        return settings

    def _prepare(self, data: LabelledTexts) -> PreparedTask:
        """Check the settings and encode the examples, before the model changes."""
        # Imported here, as prediction needs no Trainer, whose import takes seconds.
        from ..tfew.training.trainer import TFewConfig

        settings = self._settings()
        whole("steps", settings["steps"], 0, expected="at least 0")
        if settings["upper_blocks"] is not None:
            whole("upper_blocks", settings["upper_blocks"], -LARGEST)
        if self.upper_blocks is not None and self.init_from is not None:
            raise IA3Error(
                f"upper_blocks is {self.upper_blocks}, and init_from brings the sites of its "
                "adapter: give one of them"
            )
        # The untuned model takes no step; its other settings are checked all the same.
        own = {name: settings[name] for name in ("learning_rate", "seed")}
        recipe = TFewConfig(steps=max(settings["steps"], 1), max_tokens=self.max_tokens, **own)
        encoder = Encoder(self.base, data.choices, chat=settings["chat"])
        encoded = encode_all(encoder, data.examples, data.templates)
        answers = map(data.classes.index, data.labels)
        examples = [TrainingExample(*pair) for pair in zip(encoded, answers, strict=True)]
        start = self.init_from
        if start is not None:
            if not isinstance(start, Adapter):
                start = read_adapter(adapter_folder(start, ["adapter_*"]))
            with naming("init_from"):
                check_finite(start.vectors)
            # It is to be trained, and belongs to the model that it is put on.
            config = replace(start.config, inference_mode=False, base_model_name_or_path=None)
            start = replace(start, config=config)
        return PreparedTask(data, recipe, examples, start)

    def _train(
        self,
        task: PreparedTask,
        on_step: Callable[[TrainingStep], None] | None = None,
        checkpoints: str | Path | None = None,
    ) -> None:
        from ..tfew.training.trainer import train

        base, history, data = self.base, [], (task.examples, task.recipe)
        begin = task.start or all_linear(base, self.upper_blocks)
        with temporary_adapter(base, begin, source="init_from") as model:
            if self.steps > 0:
                history = train(base, model, *data, on_step, checkpoints=checkpoints)
            adapter = model.adapter("default")
            with changing():
                self._keep_fit(task.data, adapter, history)

    def _keep_fit(self, data: LabelledTexts, adapter: Adapter, history: list[TrainingStep]) -> None:
        adapter.vectors = {name: v.cpu().clone() for name, v in adapter.vectors.items()}
        sources = [template.source for template in data.templates]
        self._keep_task(data.classes, data.choices, sources, list(data.examples[0]))
        self.settings_ = self._settings()
        self.adapter_ = adapter
        self.history_ = history

    def _probabilities(
        self, examples: list[Mapping[str, Any]], progress: Callable[[int], None] | None
    ) -> Tensor:
        base = self.base
        encoder = Encoder(base, self.choices_, chat=self.settings_["chat"])
        encoded = encode_all(encoder, examples, [Template(source) for source in self.templates_])
        with temporary_adapter(base, self.adapter_):
            scores = [
                ranking_scores(base, list(prompts), max_tokens=self.max_tokens, progress=progress)
                for prompts in zip(*encoded, strict=True)
            ]
        return torch.stack(scores).double().softmax(-1).mean(0)

    def save(self, folder: str | Path) -> None:
        """Write the adapter in PEFT's two files, and the task beside them, atomically.

        Killed at any moment, it leaves the classifier that was there or this one.

        Raises:
            NotFittedError: `fit` was not called.
            InvalidTypeError: an argument is of another type.
            NotAFolderError: there is a file of that name.
            IA3Error: the folder's name is malformed, the model's name cannot be written (a folder
                whose name is not UTF-8), or a vector is not finite.
            OSError: the disk is full or may not be written; what was there before stays.
        """
        write_saved(folder_of("folder", folder), self._files())

    def _files(self) -> dict[str, bytes]:
        """What `save` writes, by file name."""
        self._check_fitted()
        check_text(self.base.name, "the model's name")
        with self.base.lock:  # another thread that fits this classifier has it
            adapter = self.adapter_
            task = TaskFile(
                format=TASK_FORMAT,
                model=self.base.name,
                templates=self.templates_,
                fields=self.fields_,
                labels=self.classes_.tolist(),
                choices=self.choices_,
                **self.settings_,
            )

        def with_task(digest: str) -> dict[str, str]:
            # The hash tells where another program has replaced the vectors since.
            return {TASK_NAME: task.model_copy(update={"vectors": digest}).to_json()}

        return adapter_files(adapter, with_task)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        model: str | Path | nn.Module | None = None,
        device: str = "auto",
        dtype: str = "auto",
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_tokens: int = MAX_TOKENS,
    ) -> FewShotClassifier:
        """Read what `save` wrote.

        Args:
            folder: written by `save`.
            model: in place of the one the adapter was trained on, e.g. where it lies elsewhere now.
            device, dtype, tokenizer, max_tokens: as in the constructor.

        Raises:
            InvalidTypeError: an argument is of another type.
            MissingFileError: the folder or one of its three files is not there.
            BrokenFileError: a file is damaged, a value in one is of another type or range, or
                another program has replaced the vectors.
            IA3Error: the task file names no model, and none is given.
        """
        path = path_of("folder", folder) / TASK_NAME
        with naming(f"no classifier in {folder}"):
            saved_folder = open_folder(folder)
        with saved_folder as saved:
            text = saved.text(TASK_NAME)
            if text is None:
                raise MissingFileError(f"no classifier in {folder}: {TASK_NAME} is not there")
            task = TaskFile.from_json(text, str(path))
            adapter = unread_adapter(saved).whole()
            if task.vectors not in (None, saved.digest):
                raise BrokenFileError(
                    f"{path} is of other vectors than {saved.path.name} beside it has, which "
                    "another program has replaced: fit and save the classifier again; or, if it "
                    f"is meant to have these vectors, remove 'vectors' from {TASK_NAME}"
                )
        if model is None:
            if not task.model:
                raise IA3Error(f"{path} names no model: give the one it was fitted on as model=")
            model = task.model
        choices = dict(zip(task.labels, task.choices, strict=True))
        settings = {name: getattr(task, name) for name in SETTINGS}
        given = {**settings, "device": device, "dtype": dtype, "tokenizer": tokenizer}
        classifier = cls(model, task.templates, choices, max_tokens=max_tokens, **given)
        classifier.adapter_ = adapter
        classifier._keep_task(*(getattr(task, name) for name in LISTS))
        classifier.settings_ = settings
        classifier.history_ = []
        return classifier
