"""This library's models in transformers' `Trainer`.

Of a model with adapters the Trainer saves the adapters alone in its checkpoints, and loads them
again; it looks for columns and labels at the base model. It asks `isinstance(model, PeftModel)`,
which no attribute can answer, and without peft there is no `PeftModel` to inherit from. So that
name in its modules is pointed at a class that stands for PEFT's models and for this library's.
"""

from __future__ import annotations

import sys
from abc import ABC

# The modules that ask, and a name that each defines after its imports: without it they are not
# whole yet, and would replace what is set now.
ASKING = {"transformers.trainer": "Trainer", "transformers.trainer_utils": "_is_peft_model"}


class AnyPeftModel(ABC):  # noqa: B024 -- it stands for the classes registered with it
    """What the Trainer treats as PEFT's model: an instance of a registered class."""


def tell_trainer(model_class: type) -> None:
    """Have the Trainer treat a class as PEFT's `PeftModel`, if the Trainer has been imported.

    An `IA3Model` calls this when it is made and, as the Trainer may be imported later, when it is
    asked for an attribute of the base model.
    """
    for name, last in ASKING.items():
        module = sys.modules.get(name)
        if module is None or not hasattr(module, last):
            continue
        names = vars(module)
        theirs = names.get("PeftModel")
        if theirs is AnyPeftModel:
            continue
        AnyPeftModel.register(model_class)
        if theirs is not None:
            AnyPeftModel.register(theirs)
        else:
            names["PeftMixedModel"] = AnyPeftModel
            # It guards the names above, which are there now, and the copying of adapter files.
            names["is_peft_available"] = lambda: True
        names["PeftModel"] = AnyPeftModel
