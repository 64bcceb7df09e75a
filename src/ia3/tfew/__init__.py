"""T-Few: few-shot training and ranking of answer choices (paper sections 3.2 to 3.5)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .encoding import Encoder as Encoder
    from .evaluation import Evaluation as Evaluation
    from .evaluation import Spread as Spread
    from .evaluation import evaluate as evaluate
    from .evaluation import predict_choices as predict_choices
    from .evaluation import spread as spread
    from .in_context import InContextClassifier as InContextClassifier
    from .losses import TFewLoss as TFewLoss
    from .losses import tfew_loss as tfew_loss
    from .promptsource import PromptTemplate as PromptTemplate
    from .promptsource import read_promptsource as read_promptsource
    from .tasks import HELD_OUT_TASKS as HELD_OUT_TASKS
    from .tasks import RAFT_TASKS as RAFT_TASKS
    from .tasks import SEEDS as SEEDS
    from .tasks import Task as Task
    from .tasks import few_shot as few_shot
    from .tasks import load_templates as load_templates
    from .tasks import read_rows as read_rows
    from .training import DivergedError as DivergedError
    from .training import TFewConfig as TFewConfig
    from .training import TFewTrainer as TFewTrainer
    from .training import TrainingExample as TrainingExample
    from .training import TrainingStep as TrainingStep
    from .training import train as train
    from .training import training_arguments as training_arguments

# Loaded when first used: transformers' Trainer takes seconds to import.
_HOME = {
    "DivergedError": "training",
    "Encoder": "encoding",
    "Evaluation": "evaluation",
    "HELD_OUT_TASKS": "tasks",
    "InContextClassifier": "in_context",
    "PromptTemplate": "promptsource",
    "RAFT_TASKS": "tasks",
    "SEEDS": "tasks",
    "Spread": "evaluation",
    "TFewConfig": "training",
    "TFewLoss": "losses",
    "TFewTrainer": "training",
    "Task": "tasks",
    "TrainingExample": "training",
    "TrainingStep": "training",
    "evaluate": "evaluation",
    "few_shot": "tasks",
    "load_templates": "tasks",
    "predict_choices": "evaluation",
    "read_promptsource": "promptsource",
    "read_rows": "tasks",
    "spread": "evaluation",
    "tfew_loss": "losses",
    "train": "training",
    "training_arguments": "training",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
