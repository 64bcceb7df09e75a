"""T-Few: few-shot training and ranking of answer choices (paper sections 3.2 to 3.5)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .losses import TFewLoss as TFewLoss
    from .losses import tfew_loss as tfew_loss
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
    "TFewConfig": "training",
    "TFewLoss": "losses",
    "TFewTrainer": "training",
    "TrainingExample": "training",
    "TrainingStep": "training",
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
