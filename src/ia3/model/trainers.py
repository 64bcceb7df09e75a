"""This library's models in other libraries' trainers: transformers' `Trainer`, TRL's, accelerate.

Of a model with adapters they save the adapters alone, look for columns and labels at the base
model, and compute a reference with the adapters off. They ask `isinstance(model, PeftModel)`, at
any time and by a name that they imported before or after this library. `isinstance` also believes
what a model says its `__class__` is, so that the answer needs no change to any of them, and peft is
not imported for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

from torch import Tensor, nn

from ..adapter.layout import KEY_PREFIX
from ..core.names import ATTRIBUTE

StateDict = dict[str, Tensor]

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

    _teach_keys()
    names = {"__module__": own.__module__, "__doc__": own.__doc__, "__new__": new, "_both": True}
    return type(own.__name__, (own, theirs), names)


def _own(kind: type) -> type:
    """The same class, derived from own ones instead of those under both."""
    if "_both" in vars(kind):
        return kind.__bases__[0]
    bases = tuple(map(_own, kind.__bases__))
    return kind if bases == kind.__bases__ else type(kind.__name__, bases, dict(vars(kind)))


def tell_others(model_class: type) -> None:
    """Tell the libraries that have been imported what `isinstance` does not.

    An `IA3Model` calls this when it is made and, as they may be imported later, when it is asked
    for an attribute of the base model.
    """
    _teach_keys()
    for name, last in ASKING.items():
        module = sys.modules.get(name)
        if module is None or not hasattr(module, last) or hasattr(module, "PeftModel"):
            continue
        # Without peft the Trainer has no class to ask for. What it asks first guards these names
        # and the copying of adapter files.
        names = {"PeftModel": model_class, "PeftMixedModel": model_class}
        vars(module).update(names, is_peft_available=lambda: True)


def _teach_keys() -> None:
    """Have PEFT's functions for state dicts, which accelerate calls, find this library's vectors.

    Before version 0.21 they found them by name; since then they look for PEFT's own layers.
    """
    tuner: Any = getattr(sys.modules.get("peft.tuners.ia3.model"), "IA3Model", None)
    for name, own in KEYS.items():
        if hasattr(tuner, name) and name not in vars(tuner):
            setattr(tuner, name, _own_first(tuner, name, own))


def _own_first(tuner: Any, name: str, own: Callable[..., Any]) -> Any:
    def method(
        cls: Any, /, model: Any, config: Any, adapter_name: str, state_dict: Any, **more: Any
    ) -> Any:
        if isinstance(getattr(model, "_fsdp_wrapped_module", model), AsPeftModel):
            return own(model, adapter_name, state_dict)
        theirs = getattr(super(tuner, cls), name)
        return theirs(model, config, adapter_name, state_dict, **more)

    return classmethod(method)


def _pick(model: Any, adapter_name: str, state_dict: StateDict) -> StateDict:
    """An adapter's entries of a model's state dict, named as PEFT has them before it saves."""
    if len(model.peft_config) > 1:
        # PEFT has taken out what has another adapter's name anywhere in its own.
        state_dict = model.state_dict() | state_dict
    found = {}
    for name, key in _file_keys(state_dict, adapter_name):
        # The adapter's name comes last, or before what is last, and is taken out by PEFT.
        above, _, last = key.rpartition(".")
        is_vector = last == ATTRIBUTE
        found[f"{key}.{adapter_name}" if is_vector else f"{above}.{adapter_name}.{last}"] = name
    return {key: state_dict[name] for key, name in found.items()}


def _put(model: nn.Module, adapter_name: str, state_dict: StateDict) -> StateDict:
    """The entries of an adapter's file, under the keys they have in a model's state dict."""
    names = {key: name for name, key in _file_keys(model.state_dict(), adapter_name)}
    return {names.get(key, key): value for key, value in state_dict.items()}


def _file_keys(names: Iterable[str], adapter_name: str) -> Iterator[tuple[str, str]]:
    for name in names:
        module, found, rest = name.partition(f".{ATTRIBUTE}.{adapter_name}")
        if found and not rest:
            yield name, f"{KEY_PREFIX}{module.removeprefix('model.')}.{ATTRIBUTE}"
        elif found and rest.startswith("."):  # of a copy of a whole module
            yield name, f"{KEY_PREFIX}{module.removeprefix('model.')}{rest}"


# The methods of PEFT's tuner that name what a state dict has of an adapter, and what they do here.
KEYS = {"_get_adapter_state_dict": _pick, "_remap_adapter_state_dict_for_load": _put}
