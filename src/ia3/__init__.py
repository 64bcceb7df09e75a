"""(IA)³: adapt a frozen pretrained model with learned vectors on its inner activations."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter.combining import combine as combine
    from .bank.bank import AdapterBank as AdapterBank
    from .base.embedded import embedded_model_folder as embedded_model_folder
    from .base.loading import load_base_model as load_base_model
    from .classify.estimator import FewShotClassifier as FewShotClassifier
    from .classify.fit_many import FittedTasks as FittedTasks, fit_many as fit_many
    from .compat.kbit import prepare_model_for_kbit_training as prepare_model_for_kbit_training
    from .compat.state_dicts import (
        get_peft_model_state_dict as get_peft_model_state_dict,
        inject_adapter_in_model as inject_adapter_in_model,
        set_peft_model_state_dict as set_peft_model_state_dict,
    )
    from .errors import IA3Error as IA3Error, MissingExtraError as MissingExtraError
    from .experiments.in_context import InContextClassifier as InContextClassifier
    from .model.auto import (
        AutoPeftModel as AutoPeftModel,
        AutoPeftModelForCausalLM as AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification,
    )
    from .model.ia3_model import (
        IA3Model as IA3Model,
        PeftModelForCausalLM as PeftModelForCausalLM,
        PeftModelForFeatureExtraction as PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering as PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification as PeftModelForSequenceClassification,
        PeftModelForTokenClassification as PeftModelForTokenClassification,
        get_peft_model as get_peft_model,
    )
    from .targets.config import IA3Config as IA3Config, PeftType as PeftType, TaskType as TaskType
    from .targets.resolve import explain as explain

    PeftConfig = IA3Config
    PeftModel = IA3Model

__version__ = "0.1.0"

# Loaded when first used: torch and transformers take seconds to import.
_TASKS = (
    *("CausalLM", "FeatureExtraction", "QuestionAnswering", "Seq2SeqLM"),
    *("SequenceClassification", "TokenClassification"),
)
_STATE_DICTS = ("get_peft_model_state_dict", "set_peft_model_state_dict")
_NAMES = {
    "adapter.combining": ["combine"],
    "bank.bank": ["AdapterBank"],
    "base.embedded": ["embedded_model_folder"],
    "base.loading": ["load_base_model"],
    "classify.estimator": ["FewShotClassifier"],
    "classify.fit_many": ["FittedTasks", "fit_many"],
    "compat.kbit": ["prepare_model_for_kbit_training"],
    "compat.state_dicts": ["inject_adapter_in_model", *_STATE_DICTS],
    "errors": ["IA3Error", "MissingExtraError"],
    "experiments.in_context": ["InContextClassifier"],
    "model.auto": ["AutoPeftModel", *(f"AutoPeftModelFor{task}" for task in _TASKS)],
    "model.ia3_model": ["IA3Model", "get_peft_model", *(f"PeftModelFor{task}" for task in _TASKS)],
    "targets.config": ["IA3Config", "PeftType", "TaskType"],
    "targets.resolve": ["explain"],
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
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
