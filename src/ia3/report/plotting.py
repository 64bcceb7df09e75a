"""Drawing with matplotlib under this package's settings instead of the user's."""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..errors import MissingExtraError

try:
    import matplotlib
    from matplotlib.figure import Figure
except ImportError as error:
    raise MissingExtraError("matplotlib", "report", "drawing pictures") from error

# matplotlib's settings belong to the whole process.
_LOCK = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release
    )
_STYLE: dict[Any, object] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ia3",
    "axes.edgecolor": "#999999",
    "axes.labelcolor": "#333333",
    "xtick.color": "#666666",
    "ytick.color": "#666666",
    "grid.color": "#e2e2e2",
    "grid.linewidth": 0.6,
}


@contextmanager
def settings(style: Mapping[Any, object]) -> Iterator[None]:
    """Draw under matplotlib's defaults, this package's style and the settings given."""
    with _LOCK, matplotlib.rc_context(), warnings.catch_warnings():
        # In an SVG the reader's browser draws the text, with its own fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**_STYLE, **style})
        yield


def saved(figure: Figure, kind: str = "png", dpi: int = 150) -> bytes:
    """The figure as a file of this kind, without a date: the same figure is the same bytes."""
    written = io.BytesIO()
    nothing = ("Software",) if kind == "png" else ("Creator", "Date", "Format", "Type")
    figure.savefig(written, format=kind, dpi=dpi, metadata=dict.fromkeys(nothing))
    return written.getvalue()
