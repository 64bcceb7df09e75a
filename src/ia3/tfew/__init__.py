"""T-Few: few-shot training and ranking of answer choices (paper sections 3.2 to 3.5)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..files.rows import read_rows as read_rows
    from .prompts.encoding import Encoder as Encoder
    from .prompts.encoding import TrainingExample as TrainingExample
    from .prompts.promptsource import PromptTemplate as PromptTemplate
    from .prompts.promptsource import read_promptsource as read_promptsource
    from .prompts.tasks import HELD_OUT_TASKS as HELD_OUT_TASKS
    from .prompts.tasks import RAFT_TASKS as RAFT_TASKS
    from .prompts.tasks import SEEDS as SEEDS
    from .prompts.tasks import Task as Task
    from .prompts.tasks import few_shot as few_shot
    from .prompts.tasks import load_templates as load_templates
    from .scoring.evaluation import Evaluation as Evaluation
    from .scoring.evaluation import Spread as Spread
    from .scoring.evaluation import evaluate as evaluate
    from .scoring.evaluation import predict_choices as predict_choices
    from .scoring.evaluation import spread as spread
    from .training.losses import TFewLoss as TFewLoss
    from .training.losses import tfew_loss as tfew_loss
    from .training.trainer import DivergedError as DivergedError
    from .training.trainer import TFewConfig as TFewConfig
    from .training.trainer import TFewTrainer as TFewTrainer
    from .training.trainer import TrainingStep as TrainingStep
    from .training.trainer import train as train
    from .training.trainer import training_arguments as training_arguments

# Loaded when first used: transformers' Trainer takes seconds to import.
_HOME = {
    "DivergedError": "training.trainer",
    "Encoder": "prompts.encoding",
    "Evaluation": "scoring.evaluation",
    "HELD_OUT_TASKS": "prompts.tasks",
    "PromptTemplate": "prompts.promptsource",
    "RAFT_TASKS": "prompts.tasks",
    "SEEDS": "prompts.tasks",
    "Spread": "scoring.evaluation",
    "TFewConfig": "training.trainer",
    "TFewLoss": "training.losses",
    "TFewTrainer": "training.trainer",
    "Task": "prompts.tasks",
    "TrainingExample": "prompts.encoding",
    "TrainingStep": "training.trainer",
    "evaluate": "scoring.evaluation",
    "few_shot": "prompts.tasks",
    "load_templates": "prompts.tasks",
    "predict_choices": "scoring.evaluation",
    "read_promptsource": "prompts.promptsource",
    "read_rows": ".files.rows",
    "spread": "scoring.evaluation",
    "tfew_loss": "training.losses",
    "train": "training.trainer",
    "training_arguments": "training.trainer",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
