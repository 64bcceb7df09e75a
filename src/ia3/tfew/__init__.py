"""T-Few: few-shot training and ranking of answer choices (paper sections 3.2 to 3.5)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..files.rows import read_rows as read_rows
    from .prompts.encoding import Encoder as Encoder, TrainingExample as TrainingExample
    from .prompts.promptsource import (
        PromptTemplate as PromptTemplate,
        read_promptsource as read_promptsource,
    )
    from .prompts.sandbox import (
        TemplateError as TemplateError,
        UnknownLabelError as UnknownLabelError,
    )
    from .prompts.tasks import (
        HELD_OUT_TASKS as HELD_OUT_TASKS,
        RAFT_TASKS as RAFT_TASKS,
        SEEDS as SEEDS,
        Task as Task,
        few_shot as few_shot,
        load_templates as load_templates,
    )
    from .scoring.evaluation import (
        Evaluation as Evaluation,
        Spread as Spread,
        evaluate as evaluate,
        predict_choices as predict_choices,
        spread as spread,
    )
    from .training.losses import TFewLoss as TFewLoss, tfew_loss as tfew_loss
    from .training.recipe import TFewConfig as TFewConfig
    from .training.steps import DivergedError as DivergedError, TrainingStep as TrainingStep
    from .training.trainer import (
        TFewTrainer as TFewTrainer,
        train as train,
        training_arguments as training_arguments,
    )

# Loaded when first used: transformers' Trainer takes seconds to import.
_NAMES = {
    "..files.rows": "read_rows",
    ".prompts.encoding": "Encoder TrainingExample",
    ".prompts.promptsource": "PromptTemplate read_promptsource",
    ".prompts.tasks": "HELD_OUT_TASKS RAFT_TASKS SEEDS Task few_shot load_templates",
    ".prompts.sandbox": "TemplateError UnknownLabelError",
    ".scoring.evaluation": "Evaluation Spread evaluate predict_choices spread",
    ".training.losses": "TFewLoss tfew_loss",
    ".training.steps": "DivergedError TrainingStep",
    ".training.recipe": "TFewConfig",
    ".training.trainer": "TFewTrainer train training_arguments",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
