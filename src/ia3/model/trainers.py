"""This library's models in transformers' `Trainer`.

The Trainer knows a model with adapters by PEFT's class. Of such a model it saves the adapters alone
in its checkpoints and loads them again, and it looks for columns and labels at the base model. Here
the names by which its modules look that class up are pointed at a class that stands for PEFT's
models and this library's. None of its functions is replaced, and peft need not be installed.
"""

from __future__ import annotations

import sys
from abc import ABC
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TypeVar

Model = TypeVar("Model", bound=type)

TRAINER = "transformers.trainer"
# The modules that ask whether a model is PEFT's. The Trainer's brings the other one with it.
ASKING = (TRAINER, "transformers.trainer_utils")


class AdaptedModel(ABC):  # noqa: B024 -- it stands for the classes registered with it
    """What the Trainer treats as PEFT's model: an instance of a registered class."""


def known_to_trainer(model_class: Model) -> Model:
    """Have the Trainer treat a class as PEFT's `PeftModel`; a decorator.

    `transformers.trainer` is not imported for it: if it is not there yet, it is extended once
    somebody imports it.
    """
    AdaptedModel.register(model_class)
    if TRAINER in sys.modules:
        _extend()
    elif not any(isinstance(finder, _OnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnImport())
    return model_class


def _extend() -> None:
    for name in ASKING:
        module = sys.modules[name]
        names = vars(module)
        theirs = names.get("PeftModel")
        if theirs is AdaptedModel:
            continue
        if theirs is not None:
            AdaptedModel.register(theirs)
        else:
            names["PeftMixedModel"] = AdaptedModel
            # It guards the names above, which are there now, and the copying of adapter files.
            names["is_peft_available"] = lambda: True
        names["PeftModel"] = AdaptedModel


class _OnImport(MetaPathFinder):
    """Leaves the import of the Trainer's module to the other finders, and extends it thereafter."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TRAINER:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((found for found in specs if found is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_extend(module: ModuleType) -> None:
            execute(module)
            _extend()

        spec.loader.exec_module = execute_and_extend  # type: ignore[method-assign]
        return spec
