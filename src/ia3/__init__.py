"""(IA)³: adapt a frozen pretrained model with learned vectors on its inner activations."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bank import AdapterBank as AdapterBank
    from .base_model import load_base_model as load_base_model
    from .config import IA3Config as IA3Config
    from .config import PeftType as PeftType
    from .config import TaskType as TaskType
    from .errors import IA3Error as IA3Error
    from .errors import MissingExtraError as MissingExtraError
    from .estimator import FewShotClassifier as FewShotClassifier
    from .kbit import prepare_model_for_kbit_training as prepare_model_for_kbit_training
    from .low_level import get_peft_model_state_dict as get_peft_model_state_dict
    from .low_level import inject_adapter_in_model as inject_adapter_in_model
    from .low_level import set_peft_model_state_dict as set_peft_model_state_dict
    from .many import FittedTasks as FittedTasks
    from .many import fit_many as fit_many
    from .model import IA3Model as IA3Model
    from .task_models import AutoPeftModel as AutoPeftModel
    from .task_models import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
    from .task_models import AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction
    from .task_models import AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering
    from .task_models import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
    from .task_models import (
        AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification,
    )
    from .task_models import (
        AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification,
    )
    from .task_models import PeftModelForCausalLM as PeftModelForCausalLM
    from .task_models import PeftModelForFeatureExtraction as PeftModelForFeatureExtraction
    from .task_models import PeftModelForQuestionAnswering as PeftModelForQuestionAnswering
    from .task_models import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
    from .task_models import (
        PeftModelForSequenceClassification as PeftModelForSequenceClassification,
    )
    from .task_models import PeftModelForTokenClassification as PeftModelForTokenClassification
    from .task_models import get_peft_model as get_peft_model
    from .tfew.in_context import InContextClassifier as InContextClassifier

    PeftConfig = IA3Config
    PeftModel = IA3Model

__version__ = "0.1.0"

# Loaded when first used: torch and transformers take seconds to import.
_HOME = {
    "AdapterBank": "bank",
    "AutoPeftModel": "task_models",
    "AutoPeftModelForCausalLM": "task_models",
    "AutoPeftModelForFeatureExtraction": "task_models",
    "AutoPeftModelForQuestionAnswering": "task_models",
    "AutoPeftModelForSeq2SeqLM": "task_models",
    "AutoPeftModelForSequenceClassification": "task_models",
    "AutoPeftModelForTokenClassification": "task_models",
    "FewShotClassifier": "estimator",
    "FittedTasks": "many",
    "IA3Config": "config",
    "IA3Error": "errors",
    "IA3Model": "model",
    "InContextClassifier": "tfew.in_context",
    "MissingExtraError": "errors",
    "PeftModelForCausalLM": "task_models",
    "PeftModelForFeatureExtraction": "task_models",
    "PeftModelForQuestionAnswering": "task_models",
    "PeftModelForSeq2SeqLM": "task_models",
    "PeftModelForSequenceClassification": "task_models",
    "PeftModelForTokenClassification": "task_models",
    "PeftType": "config",
    "TaskType": "config",
    "fit_many": "many",
    "get_peft_model": "task_models",
    "get_peft_model_state_dict": "low_level",
    "inject_adapter_in_model": "low_level",
    "load_base_model": "base_model",
    "prepare_model_for_kbit_training": "kbit",
    "set_peft_model_state_dict": "low_level",
}
# PEFT's names for the same things: there is one kind of adapter here.
_PEFT_NAMES = {"PeftConfig": "IA3Config", "PeftModel": "IA3Model"}
__all__ = sorted({*_HOME, *_PEFT_NAMES})


def __getattr__(name: str) -> Any:
    own = _PEFT_NAMES.get(name, name)
    if own not in _HOME:
        raise AttributeError(f"module 'ia3' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[own]}", __name__), own)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
