"""This library's (IA)³ inside PEFT.

    import ia3.compat.peft
    ia3.compat.peft.install()

From then on `peft.get_peft_model`, `PeftModel.from_pretrained`, `inject_adapter_in_model` and what
uses them (transformers' `add_adapter` and `load_adapter`, TRL, diffusers) make their (IA)³ adapters
with `ia3.compat.peft_tuner`. Configs and files are PEFT's own.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

from ..errors import MissingExtraError


def install() -> None:
    """Replace PEFT's (IA)³ in this process; a second call changes nothing.

    Models made before stay as they are.

    Raises:
        MissingExtraError: peft is not installed.
    """
    version = _use(ours=True)
    if not version.startswith(("0.20.", "0.21.")):
        message = f"ia3.compat.peft was tested with peft 0.20 and 0.21, this is {version}"
        warnings.warn(message, stacklevel=2)


def uninstall() -> None:
    """Put PEFT's own (IA)³ back. Models made meanwhile stay as they are and keep working.

    Raises:
        MissingExtraError: peft is not installed.
    """
    _use(ours=False)


def _use(*, ours: bool) -> str:
    """Have PEFT make its adapters with this tuner or its own, and return PEFT's version."""
    try:
        peft: Any = importlib.import_module("peft")
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise MissingExtraError("peft", "peft", "ia3.compat.peft") from error
    from peft.tuners.ia3.model import IA3Model as Stock

    from .peft_tuner import IA3Model as Ours

    old, new = (Stock, Ours) if ours else (Ours, Stock)
    for tuners in (peft.PEFT_TYPE_TO_TUNER_MAPPING, peft.PEFT_TYPE_TO_MIXED_MODEL_MAPPING):
        tuners.update({kind: new for kind, tuner in tuners.items() if tuner is old})
    # Not in peft.tuners.ia3.model, the name there is what models made before are pickled by.
    for module in (peft, peft.tuners, peft.tuners.ia3):
        if module.IA3Model is old:
            module.IA3Model = new
    return str(peft.__version__)
