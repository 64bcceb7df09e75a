"""This project's (IA)³ inside PEFT.

    import ia3.compat.peft
    ia3.compat.peft.install()

From then on `peft.get_peft_model`, `PeftModel.from_pretrained`, `inject_adapter_in_model` and what
stands on them (transformers' `add_adapter` and `load_adapter`, TRL, diffusers) make their (IA)³
adapters with `ia3.compat.peft_tuner`. Configs and files are PEFT's own.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

from ..errors import MissingExtraError

TESTED_VERSIONS = ("0.20", "0.21")

# The modules that offer PEFT's tuner under its name. The one that defines it is left alone: models
# made before are pickled by that name.
EXPOSING_MODULES = ("peft", "peft.tuners", "peft.tuners.ia3")


def install() -> None:
    """Replace PEFT's (IA)³ in this process; a second call changes nothing.

    Models made before stay as they are.

    Raises:
        MissingExtraError: peft is not installed.
    """
    peft = _peft()
    if not peft.__version__.startswith(tuple(f"{version}." for version in TESTED_VERSIONS)):
        warnings.warn(
            f"ia3.compat.peft was tested with peft {', '.join(TESTED_VERSIONS)}, this is "
            f"{peft.__version__}",
            stacklevel=2,
        )
    stock, ours = _tuners()
    _replace(stock, ours)


def uninstall() -> None:
    """Put PEFT's own (IA)³ back. Models made meanwhile stay as they are and keep working.

    Raises:
        MissingExtraError: peft is not installed.
    """
    _peft()
    stock, ours = _tuners()
    _replace(ours, stock)


def _peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise MissingExtraError("peft", "peft", "ia3.compat.peft") from error


def _tuners() -> tuple[type, type]:
    """PEFT's tuner and the one of this project."""
    from peft.tuners.ia3.model import IA3Model as Stock

    from .peft_tuner import IA3Model as Ours

    return Stock, Ours


def _replace(old: type, new: type) -> None:
    from peft.mapping import PEFT_TYPE_TO_MIXED_MODEL_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    for mapping in (PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_MIXED_MODEL_MAPPING):
        for peft_type, tuner in mapping.items():
            if tuner is old:
                mapping[peft_type] = new
    for name in EXPOSING_MODULES:
        module = importlib.import_module(name)
        if getattr(module, "IA3Model", None) is old:
            module.IA3Model = new  # type: ignore[attr-defined]
