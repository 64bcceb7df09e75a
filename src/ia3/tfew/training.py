"""The T-Few recipe (paper section 3.5), on transformers' `Trainer`."""

from __future__ import annotations

import importlib.util
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..base_model import BaseModel
from ..errors import IA3Error, MissingExtraError
from ..model import IA3Model
from .encoding import EncodedExample
from .losses import token_loss
from .scoring import token_scores

if importlib.util.find_spec("accelerate") is None:
    raise MissingExtraError("accelerate", "tfew", "training")


@dataclass(frozen=True)
class TFewConfig:
    """The paper's hyper-parameters, the same for every task (section 3.5).

    Args:
        steps: optimizer steps.
        batch_size: examples a step, each with all its choices.
        learning_rate: of Adafactor without parameter scaling, at its peak.
        warmup_ratio: share of the steps in which the rate rises from 0; then it falls linearly.
        max_grad_norm: gradients are clipped to this norm.
        seed: of the order of the examples and of the templates drawn.
    """

    steps: int = 1000
    batch_size: int = 8
    learning_rate: float = 3e-3
    warmup_ratio: float = 0.06
    max_grad_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise IA3Error(f"{name} is {getattr(self, name)}, expected at least 1")
        if not 0 < self.learning_rate < math.inf:
            raise IA3Error(f"learning_rate is {self.learning_rate}, expected a number above 0")
        if not 0 <= self.seed < 2**32:
            raise IA3Error(f"seed is {self.seed}, expected 0 to 2**32 - 1")


@dataclass(frozen=True)
class TrainingStep:
    """What one optimizer step saw."""

    step: int
    steps: int
    loss: float
    lm: float
    length_norm: float
    unlikelihood: float


class DivergedError(IA3Error):
    """The loss or a vector is no longer finite; `step` says since when."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(
            f"training diverged at step {step}: {what}; lower the learning rate, or look for "
            "texts that are empty or out of place"
        )
        self.step = step


@dataclass(frozen=True)
class TrainingExample:
    """One example, encoded with every template, and the index of its right choice."""

    encoded: tuple[EncodedExample, ...]
    label: int


def train(
    base: BaseModel,
    ia3_model: IA3Model,
    examples: Sequence[TrainingExample],
    config: TFewConfig,
    on_step: Callable[[TrainingStep], None] | None = None,
) -> list[TrainingStep]:
    """Train the active adapters' vectors; the global random state is left as it was.

    Args:
        base: the model under `ia3_model`, with its tokenizer.
        ia3_model: carries the vectors to train.
        examples: the training set; one template is drawn for each at every step.
        config: the recipe.
        on_step: called after every optimizer step.

    Returns:
        One record a step.

    Raises:
        DivergedError: the loss is not finite. The vectors are then those before that step.
    """
    if base.device.type == "cuda" and base.device.index not in (None, 0):
        raise IA3Error(
            f"training on {base.device} is not supported: choose the GPU with CUDA_VISIBLE_DEVICES"
        )
    history: list[TrainingStep] = []
    with tempfile.TemporaryDirectory() as folder, _random_state_kept():
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=config.steps,
            per_device_train_batch_size=config.batch_size,
            optim="adafactor",
            learning_rate=config.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=round(config.warmup_ratio * config.steps),
            max_grad_norm=config.max_grad_norm,
            seed=config.seed,
            use_cpu=base.device.type == "cpu",
            # The Trainer writes it into the model's config, where it would stay.
            use_cache=getattr(base.model.config, "use_cache", False),
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        # On a machine of several GPUs the Trainer would multiply the batch and split the model.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        trainer = TFewTrainer(base, ia3_model, arguments, list(examples), history)
        if on_step is not None:
            trainer.add_callback(_OnStep(history, on_step))
        trainer.train()
    for name in ia3_model.active_adapters:
        for module, vector in ia3_model.vectors(name).items():
            if not torch.isfinite(vector).all():
                raise DivergedError(config.steps, f"the vector of {module!r} is not finite")
    return history


class TFewTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer with the loss of T-Few."""

    def __init__(
        self,
        base: BaseModel,
        ia3_model: IA3Model,
        arguments: TrainingArguments,
        examples: list[TrainingExample],
        history: list[TrainingStep],
    ) -> None:
        super().__init__(
            model=ia3_model, args=arguments, train_dataset=examples, data_collator=_draw_templates
        )
        # It prints what on_step says already.
        self.callback_handler.callbacks = [
            c for c in self.callback_handler.callbacks if type(c).__name__ != "PrinterCallback"
        ]
        self._base = base
        self._history = history

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """The sum of the three terms over one batch."""
        examples: list[EncodedExample] = inputs["examples"]
        answers: Tensor = inputs["answers"]
        loss = token_loss(token_scores(self._base, examples), answers.to(self._base.device))
        step = self.state.global_step + 1
        record = TrainingStep(
            step,
            self.args.max_steps,
            *(x.item() for x in (loss.total, loss.lm, loss.length_norm, loss.unlikelihood)),
        )
        if not torch.isfinite(loss.total):
            raise DivergedError(step, f"the loss is {record.loss}")
        self._history.append(record)
        return loss.total


class _OnStep(TrainerCallback):  # type: ignore[misc]
    def __init__(
        self, history: list[TrainingStep], on_step: Callable[[TrainingStep], None]
    ) -> None:
        self._history = history
        self._on_step = on_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._on_step(self._history[-1])


def _draw_templates(batch: list[TrainingExample]) -> dict[str, Any]:
    # From torch's generator: the Trainer seeds it, and keeps its state in checkpoints.
    drawn = [int(torch.randint(len(example.encoded), ())) for example in batch]
    return {
        "examples": [e.encoded[i] for e, i in zip(batch, drawn, strict=True)],
        "answers": torch.tensor([e.label for e in batch]),
    }


@contextmanager
def _random_state_kept() -> Iterator[None]:
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
