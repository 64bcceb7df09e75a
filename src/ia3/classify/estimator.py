"""`FewShotClassifier`: T-Few behind scikit-learn's interface."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..adapter import store
from ..base.loading import EMBEDDED_MODEL
from ..errors import IA3Error
from ..files.atomic import write_files
from ..files.hub import adapter_folder
from ..tfew.prompts.encoding import EncodedExample, Encoder
from ..tfew.prompts.labels import Text
from ..tfew.prompts.templates import Template
from ..tfew.scoring.choices import MAX_TOKENS
from ..tfew.scoring.prefix import ranking_scores
from ..tfew.temporary_adapter import all_linear, temporary_adapter
from .ranking import LabelledTexts, RankingClassifier, encode_all

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from transformers import PreTrainedTokenizerBase

    from ..tfew.prompts.encoding import TrainingExample
    from ..tfew.training.trainer import TFewConfig, TrainingStep

TASK_NAME = "ia3_task.json"
TASK_FORMAT = 1
SETTINGS = ("chat", "steps", "learning_rate", "seed", "upper_blocks")


class FewShotClassifier(RankingClassifier):
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
        init_from: an adapter's folder or hub id, or an `Adapter`, such as another task's or one
            trained on many tasks: `fit` begins with its vectors, at its sites, instead of ones.
        max_tokens: computed at once, in training and in prediction; what has more is computed in
            parts, with the same results but for rounding. Lower it where memory runs out.
        upper_blocks: rescale only these many uppermost blocks of a decoder-only model instead of
            all. The blocks below then need no gradients.

    Attributes:
        classes_: the labels, `[classes]`, sorted.
        choices_: the words ranked for each of them.
        templates_: the templates' sources.
        fields_: the names of the examples' fields.
        settings_: `chat`, `steps`, `learning_rate`, `seed` and `upper_blocks`, as they were in
            `fit`.
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
        init_from: str | Path | store.Adapter | None = None,
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
            texts: strings, or mappings from field names to values, `[examples]`.
            labels: strings, integers or booleans, `[examples]`.
            on_step: called after every optimizer step.
            checkpoints: a folder in which the training is kept as it goes. The same call after a
                break goes on from there, and ends as it would have without it.

        Raises:
            IA3Error: the data, a template or the choices are unusable (the message says which),
                `init_from` does not fit the model, the model has not so many blocks, or the
                checkpoints are those of another run.
            FileNotFoundError: there is no adapter at `init_from`.
            DivergedError: the loss is not finite. What was fitted before stays.
        """
        # Brings transformers' Trainer, which prediction does without.
        from ..tfew.training.trainer import train

        recipe = self._recipe()
        task = self._read_task(texts, labels)
        base = self.base
        encoder = Encoder(base, task.choices, chat=self.chat)
        encoded = encode_all(encoder, task.examples, task.templates)
        config = all_linear(base, self.upper_blocks)
        start = None if self.init_from is None else adapter_to_begin_with(self.init_from)
        with temporary_adapter(base, start or config, source="init_from") as ia3_model:
            history = []
            if self.steps > 0:
                history = train(
                    base,
                    ia3_model,
                    training_set(task, encoded),
                    recipe,
                    on_step,
                    checkpoints=checkpoints,
                )
            adapter = ia3_model.adapter("default")
        self._keep_fit(task, adapter, history)
        return self

    def _recipe(self) -> TFewConfig:
        """The settings, checked. The untuned model takes no step, but its are, all the same."""
        from ..tfew.training.trainer import TFewConfig

        if self.steps < 0:
            raise IA3Error(f"steps is {self.steps}, expected at least 0")
        if self.upper_blocks is not None and self.init_from is not None:
            raise IA3Error(
                f"upper_blocks is {self.upper_blocks}, and init_from brings the sites of its "
                "adapter: give one of them"
            )
        return TFewConfig(
            steps=max(self.steps, 1),
            learning_rate=self.learning_rate,
            seed=self.seed,
            max_tokens=self.max_tokens,
        )

    def _keep_fit(
        self, task: LabelledTexts, adapter: store.Adapter, history: list[TrainingStep]
    ) -> None:
        adapter.vectors = {name: v.cpu().clone() for name, v in adapter.vectors.items()}
        self._keep_task(
            task.classes, task.choices, [t.source for t in task.templates], list(task.examples[0])
        )
        self.settings_ = {name: getattr(self, name) for name in SETTINGS}
        self.adapter_ = adapter
        self.history_ = history

    def _probabilities(
        self, examples: list[Mapping[str, Any]], progress: Callable[[int], None] | None
    ) -> Tensor:
        base = self.base
        encoder = Encoder(base, self.choices_, chat=self.settings_["chat"])
        encoded = encode_all(encoder, examples, [Template(source) for source in self.templates_])
        with temporary_adapter(base, self.adapter_):
            probabilities = [
                ranking_scores(
                    base, list(of_template), max_tokens=self.max_tokens, progress=progress
                )
                .double()
                .softmax(-1)
                for of_template in zip(*encoded, strict=True)
            ]
        return torch.stack(probabilities).mean(0)

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
        max_tokens: int = MAX_TOKENS,
    ) -> FewShotClassifier:
        """Read what `save` wrote.

        Args:
            folder: written by `save`.
            model: in place of the one the adapter was trained on, e.g. where it lies elsewhere now.
            device: as in the constructor.
            dtype: as in the constructor.
            tokenizer: as in the constructor.
            max_tokens: as in the constructor.

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
            # Not in the files of earlier versions.
            upper_blocks = task.get("upper_blocks")
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
                max_tokens=max_tokens,
                upper_blocks=None if upper_blocks is None else int(upper_blocks),
            )
        except IA3Error:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise IA3Error(
                f"{path} is not a saved classifier: {type(error).__name__}: {error}"
            ) from error
        classifier.adapter_ = store.read_adapter(folder)
        classifier._keep_task(labels, choices, templates, fields)
        classifier.settings_ = {name: getattr(classifier, name) for name in SETTINGS}
        classifier.history_ = []
        return classifier


def training_set(
    task: LabelledTexts, encoded: Sequence[tuple[EncodedExample, ...]]
) -> list[TrainingExample]:
    """The examples, encoded with every template, and the indices of their classes."""
    from ..tfew.prompts.encoding import TrainingExample

    return [
        TrainingExample(e, task.classes.index(label))
        for e, label in zip(encoded, task.labels, strict=True)
    ]


def adapter_to_begin_with(init_from: str | Path | store.Adapter) -> store.Adapter:
    """The adapter to begin with, to be trained, as an adapter of the model it is put on."""
    if isinstance(init_from, store.Adapter):
        adapter = init_from
    else:
        adapter = store.read_adapter(adapter_folder(init_from, ["adapter_*"]))
    config = replace(adapter.config, inference_mode=False, base_model_name_or_path=None)
    return replace(adapter, config=config)
