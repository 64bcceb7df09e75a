"""Classifying texts. `ia3.classify` is this package, and a function as well: see `mixed`."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    # An imported package is an attribute of the one above, whatever else has its name there.
    def __call__(self, *args: Any, **options: Any) -> Any:
        from .mixed import classify

        return classify(*args, **options)


sys.modules[__name__].__class__ = _Callable
