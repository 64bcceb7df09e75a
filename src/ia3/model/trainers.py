"""This library's models in other libraries' trainers: transformers' `Trainer`, TRL's, accelerate.

Of a model with adapters they save the adapters alone, look for columns and labels at the base
model, and compute a reference with the adapters off. They ask `isinstance(model, PeftModel)`, at
any time and by a name that they imported before or after this library. `isinstance` also believes
what a model says its `__class__` is, so that the answer needs no change to any of them, and peft is
not imported for it.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

from torch import nn

# The modules that ask, and a name that each defines after its imports: without it they are not
# whole yet, and would replace what is set now.
ASKING = {"transformers.trainer": "Trainer", "transformers.trainer_utils": "_is_peft_model"}


class AsPeftModel(nn.Module):
    """A model that is also an instance of PEFT's `PeftModel`, once peft has been imported.

    Of the class of its task, `PeftModelForCausalLM` and so on, if its class has a `task`. Nothing
    is inherited from there: `type(model)` stays what it is.
    """

    @property
    def __class__(self) -> Any:
        peft: Any = sys.modules.get("peft")
        own: Any = type(self)
        theirs = getattr(peft, "PeftModel", None)
        if theirs is None:  # not imported, or about to be
            return own
        by_task = getattr(peft, "MODEL_TYPE_TO_PEFT_MODEL_MAPPING", {})
        return _both(own, by_task.get(getattr(own, "task", None), theirs))

    @__class__.setter
    def __class__(self, kind: type) -> None:
        # FSDP and others derive a class from the one they read here, and set it.
        vars(object)["__class__"].__set__(self, _own(kind))

    def __reduce_ex__(self, protocol: Any) -> Any:
        # By pickle's own way to make an object, its class must be its `__class__`.
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        return (_new, *reduced[1:])


def _new(kind: Any) -> Any:
    return kind.__new__(kind)


@cache
def _both(own: Any, theirs: type) -> type:
    """A class under both, for `isinstance` to look at; its instances are those of the own one."""

    def new(_: type, *args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs) if args or kwargs else _new(own)

    names = {"__module__": own.__module__, "__doc__": own.__doc__, "__new__": new, "_both": True}
    return type(own.__name__, (own, theirs), names)


def _own(kind: type) -> type:
    """The same class, derived from own ones instead of those under both."""
    if "_both" in vars(kind):
        return kind.__bases__[0]
    bases = tuple(map(_own, kind.__bases__))
    return kind if bases == kind.__bases__ else type(kind.__name__, bases, dict(vars(kind)))


def tell_trainer(model_class: type) -> None:
    """Have the Trainer ask for this class where peft is not installed, if it has been imported.

    An `IA3Model` calls this when it is made and, as the Trainer may be imported later, when it is
    asked for an attribute of the base model.
    """
    for name, last in ASKING.items():
        module = sys.modules.get(name)
        if module is None or not hasattr(module, last) or hasattr(module, "PeftModel"):
            continue
        # What it asks first guards these names and the copying of adapter files.
        names = {"PeftModel": model_class, "PeftMixedModel": model_class}
        vars(module).update(names, is_peft_available=lambda: True)
