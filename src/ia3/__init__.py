"""(IA)³: adapt a frozen pretrained model with learned vectors on its inner activations."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base_model import load_base_model as load_base_model
    from .config import IA3Config as IA3Config
    from .errors import IA3Error as IA3Error
    from .errors import MissingExtraError as MissingExtraError
    from .estimator import FewShotClassifier as FewShotClassifier
    from .model import IA3Model as IA3Model
    from .model import get_peft_model as get_peft_model

__version__ = "0.1.0"

# Loaded when first used: torch and transformers take seconds to import.
_HOME = {
    "FewShotClassifier": "estimator",
    "IA3Config": "config",
    "IA3Error": "errors",
    "IA3Model": "model",
    "MissingExtraError": "errors",
    "get_peft_model": "model",
    "load_base_model": "base_model",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ia3' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
