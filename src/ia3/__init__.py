"""(IA)³: adapt a frozen pretrained model with learned vectors on its inner activations."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter.combining import combine as combine
    from .bank.bank import AdapterBank as AdapterBank
    from .base.embedded import (
        embedded_encoder_folder as embedded_encoder_folder,
        embedded_model_folder as embedded_model_folder,
    )
    from .base.loading import load_base_model as load_base_model
    from .classify.estimator import FewShotClassifier as FewShotClassifier
    from .classify.fit_many import FittedTasks as FittedTasks, fit_many as fit_many
    from .classify.mixed import Classified as Classified, classify as classify
    from .classify.suggest import Suggestion as Suggestion, suggest as suggest
    from .classify.text_classifier import NotFittedError as NotFittedError
    from .compat.kbit import prepare_model_for_kbit_training as prepare_model_for_kbit_training
    from .compat.mixed import PeftMixedModel as PeftMixedModel
    from .compat.precision import cast_mixed_precision_params as cast_mixed_precision_params
    from .compat.state_dicts import (
        get_base_model_state_dict as get_base_model_state_dict,
        get_peft_model_state_dict as get_peft_model_state_dict,
        inject_adapter_in_model as inject_adapter_in_model,
        load_peft_weights as load_peft_weights,
        set_base_model_state_dict as set_base_model_state_dict,
        set_peft_model_state_dict as set_peft_model_state_dict,
    )
    from .compat.status import (
        get_layer_status as get_layer_status,
        get_model_status as get_model_status,
    )
    from .errors import (
        BrokenFileError as BrokenFileError,
        IA3Error as IA3Error,
        InvalidTypeError as InvalidTypeError,
        MismatchError as MismatchError,
        MissingExtraError as MissingExtraError,
        MissingFileError as MissingFileError,
        NoMatchingPeftModuleError as NoMatchingPeftModuleError,
        NotAFolderError as NotAFolderError,
        StateError as StateError,
        UnknownNameError as UnknownNameError,
    )
    from .experiments.in_context import InContextClassifier as InContextClassifier
    from .files.labelled_data import Finding as Finding, check_examples as check_examples
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
        MODEL_TYPE_TO_PEFT_MODEL_MAPPING as MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING as PEFT_TYPE_TO_TUNER_MAPPING,
        IA3Model as IA3Model,
        PeftModelForCausalLM as PeftModelForCausalLM,
        PeftModelForFeatureExtraction as PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering as PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification as PeftModelForSequenceClassification,
        PeftModelForTokenClassification as PeftModelForTokenClassification,
        get_peft_model as get_peft_model,
    )
    from .model.lora import nearest_lora as nearest_lora
    from .targets.config import (
        PEFT_TYPE_TO_CONFIG_MAPPING as PEFT_TYPE_TO_CONFIG_MAPPING,
        IA3Config as IA3Config,
        PeftType as PeftType,
        TaskType as TaskType,
        get_peft_config as get_peft_config,
    )
    from .targets.resolve import explain as explain

    PeftConfig = IA3Config
    PeftError = IA3Error
    PeftModel = IA3Model

__version__ = "0.1.0"

# Loaded when first used: torch and transformers take seconds to import.
_TASKS = (
    *("CausalLM", "FeatureExtraction", "QuestionAnswering", "Seq2SeqLM"),
    *("SequenceClassification", "TokenClassification"),
)
_STATE_DICTS = [f"{do}_{of}_model_state_dict" for do in ("get", "set") for of in ("base", "peft")]
_MAPPINGS = ("MODEL_TYPE_TO_PEFT_MODEL_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING")
_NAMES = {
    "adapter.combining": ["combine"],
    "bank.bank": ["AdapterBank"],
    "base.embedded": ["embedded_encoder_folder", "embedded_model_folder"],
    "base.loading": ["load_base_model"],
    "classify.estimator": ["FewShotClassifier"],
    "classify.fit_many": ["FittedTasks", "fit_many"],
    "classify.mixed": ["Classified", "classify"],
    "classify.suggest": ["Suggestion", "suggest"],
    "classify.text_classifier": ["NotFittedError"],
    "compat.kbit": ["prepare_model_for_kbit_training"],
    "compat.mixed": ["PeftMixedModel"],
    "compat.precision": ["cast_mixed_precision_params"],
    "compat.state_dicts": ["inject_adapter_in_model", "load_peft_weights", *_STATE_DICTS],
    "compat.status": ["get_layer_status", "get_model_status"],
    "errors": [
        *("BrokenFileError", "IA3Error", "InvalidTypeError", "MismatchError"),
        *("MissingExtraError", "MissingFileError", "NoMatchingPeftModuleError", "StateError"),
        *("NotAFolderError", "UnknownNameError"),
    ],
    "experiments.in_context": ["InContextClassifier"],
    "files.labelled_data": ["Finding", "check_examples"],
    "model.auto": ["AutoPeftModel", *(f"AutoPeftModelFor{task}" for task in _TASKS)],
    "model.ia3_model": [
        *("IA3Model", "get_peft_model", *_MAPPINGS, *(f"PeftModelFor{task}" for task in _TASKS))
    ],
    "model.lora": ["nearest_lora"],
    "targets.config": [
        *("IA3Config", "PEFT_TYPE_TO_CONFIG_MAPPING", "PeftType", "TaskType", "get_peft_config")
    ],
    "targets.resolve": ["explain"],
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
# PEFT's names for the same things: there is one kind of adapter here.
_PEFT_NAMES = {"PeftConfig": "IA3Config", "PeftError": "IA3Error", "PeftModel": "IA3Model"}
__all__ = sorted({*_HOME, *_PEFT_NAMES})


def __getattr__(name: str) -> Any:
    own = _PEFT_NAMES.get(name, name)
    if own not in _HOME:
        raise AttributeError(f"module 'ia3' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[own]}", __name__), own)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
