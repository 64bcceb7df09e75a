"""The report's figures: SVG made to stand inside an HTML page.

Colours are names of the page's CSS variables, so that a figure follows the reader's light or dark
theme, and a cell's strength is its opacity, so that "nothing" is the page itself in both. Text
stays text: it can be selected, and the reader's fonts draw scripts that matplotlib's own lacks.
"""

from __future__ import annotations

import io
import re
import threading
import unicodedata
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import MissingExtraError

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise MissingExtraError("matplotlib", "report", "drawing the report") from error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from ..tfew.training.trainer import TrainingStep

# With more classes than this a matrix shows neither names nor counts: they would be unreadable.
MOST_NAMED_CLASSES = 20

# matplotlib knows no CSS variables: each is drawn in a colour of its own, which is then replaced.
_COLOURS = (
    *("ink", "muted", "grid", "on-strong"),
    *("total", "lm", "length-norm", "unlikelihood"),
    *("right", "wrong", "inhibited", "amplified"),
)
_STAND_INS = {name: f"#0{i:x}0b0c" for i, name in enumerate(_COLOURS)}
_STYLE: dict[Any, object] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ia3",
    # A class may be called "$5 or $10".
    "text.parse_math": False,
    "font.size": 9,
    "text.color": _STAND_INS["ink"],
    "axes.labelcolor": _STAND_INS["muted"],
    "axes.edgecolor": _STAND_INS["grid"],
    "xtick.color": _STAND_INS["grid"],
    "ytick.color": _STAND_INS["grid"],
    "xtick.labelcolor": _STAND_INS["muted"],
    "ytick.labelcolor": _STAND_INS["muted"],
    "grid.color": _STAND_INS["grid"],
    "grid.linewidth": 0.6,
    "lines.solid_capstyle": "round",
}
# matplotlib's settings belong to the whole process.
_SETTINGS = threading.Lock()
_LONGEST_LABEL = 26


def training_curve(history: Sequence[TrainingStep], *, name: str) -> str:
    """The loss and its three terms over the steps: every step faint, the running mean bold.

    Args:
        history: at least one step.
        name: of the figure, a prefix to the ids in it.
    """
    steps = np.array([record.step for record in history])
    with _settings():
        figure, axes = _canvas(750, 290, left=46, right=12, top=10, bottom=36)
        for term, field, width in (
            ("unlikelihood", "unlikelihood", 1.6),
            ("length-norm", "length_norm", 1.6),
            ("lm", "lm", 1.6),
            ("total", "loss", 2.4),
        ):
            values = np.array([getattr(record, field) for record in history], dtype=np.float64)
            colour = _STAND_INS[term]
            axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
            axes.plot(
                steps,
                running_mean(values),
                color=colour,
                linewidth=width,
                # One point makes no line.
                marker="o" if len(steps) == 1 else "",
            )
        axes.set_ylim(bottom=0)
        # Half a step at either end: a single step, too, stands at a whole number.
        axes.set_xlim(steps[0] - 0.5, steps[-1] + 0.5)
        axes.xaxis.set_major_locator(
            MaxNLocator(integer=True, nbins=10, steps=[1, 2, 5, 10], min_n_ticks=1)
        )
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("training step")
        axes.set_ylabel("loss")
        return _inline_svg(figure, name, "Training loss over the steps", {})


def running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean over a tenth of the steps around each, over fewer at either end; `[steps]`."""
    half = len(values) // 20
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def confusion_matrix(
    counts: NDArray[np.float64],
    classes: Sequence[str],
    *,
    most: float,
    name: str,
    description: str,
) -> str:
    """True labels on the rows, predicted ones on the columns, the stronger the more.

    Args:
        counts: `[classes, classes]`.
        classes: the names; numbers from 1 stand for them beyond `MOST_NAMED_CLASSES`.
        most: the count of full strength, so that several matrices can share a scale.
        name: of the figure, a prefix to the ids in it.
        description: for readers who do not see it.
    """
    n = len(classes)
    named = n <= MOST_NAMED_CLASSES
    labels = [_shortened(_drawable(c)) for c in classes]
    widest = max(_text_width(label) for label in labels) if named else 12.0
    side = 300.0
    with _settings():
        figure, axes = _canvas(
            side + widest + 38,
            side + (0.7 * widest + 46 if named else 52),
            left=widest + 30,
            right=8,
            top=8,
            bottom=0.7 * widest + 38 if named else 44,
        )
        tooltips = {}
        for row, column in np.argwhere(counts > 0):
            count = counts[row, column]
            opacity = float(0.1 + 0.9 * np.sqrt(count / most))
            cell = f"cell-{row}-{column}"
            tooltips[cell] = (
                f"true {_drawable(classes[row])}, predicted {_drawable(classes[column])}: {count:g}"
            )
            _fill(axes, column, row, "right" if row == column else "wrong", opacity, cell)
            if named:
                text = f"{count:g}"
                axes.text(
                    column,
                    row,
                    text,
                    ha="center",
                    va="center_baseline",
                    fontsize=min(9.0, side / n * 0.9 / (0.62 * max(len(text), 2))),
                    color=_STAND_INS["on-strong" if opacity > 0.6 else "ink"],
                )
        axes.set_xlim(-0.5, n - 0.5)
        axes.set_ylim(n - 0.5, -0.5)
        axes.set_xlabel("predicted label")
        axes.set_ylabel("true label")
        if named:
            size = min(9.0, side / n * 0.62)
            axes.set_xticks(range(n), labels, rotation=45, ha="right", rotation_mode="anchor")
            axes.set_yticks(range(n), labels)
            axes.tick_params(length=0, labelsize=size)
            lines = np.arange(0.5, n - 1)
        else:
            step = _tick_step(n, most_ticks=10)
            ticks = np.arange(step, n + 1, step)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_ticks(ticks - 1, [str(tick) for tick in ticks])
                axis.set_ticks(np.arange(n), minor=True)
            axes.tick_params(length=4)
            axes.tick_params(which="minor", length=1.5, width=0.4)
            lines = ticks[ticks < n] - 0.5
        for line in lines:
            axes.axvline(line, color=_STAND_INS["grid"], linewidth=0.5, zorder=0)
            axes.axhline(line, color=_STAND_INS["grid"], linewidth=0.5, zorder=0)
        return _inline_svg(figure, name, description, tooltips)


def layer_site_map(
    values: NDArray[np.float64],
    layers: Sequence[str],
    sites: Sequence[str],
    *,
    positive: str,
    negative: str,
    most: float,
    unit: str,
    name: str,
    description: str,
) -> str:
    """Layers from left to right, sites from top to bottom, the stronger the farther from 0.

    Args:
        values: `[layers, sites]`; NaN where there is nothing.
        layers: as in `LayerSiteGrid`.
        sites: as in `LayerSiteGrid`.
        positive: the CSS variable of the values above 0.
        negative: and of those below.
        most: the value of full strength, on either side.
        unit: a format of the value in a tooltip, e.g. `"{:.0%}"`.
        name: of the figure, a prefix to the ids in it.
        description: for readers who do not see it.
    """
    labels = [_shortened(_drawable(site)) for site in sites]
    stacks = [layer.rpartition(".")[0] for layer in layers]
    # A gap between encoder and decoder.
    at = np.arange(len(layers)) + 0.7 * np.cumsum([a != b for a, b in _pairs(stacks)])
    columns = float(at[-1]) + 1
    cell_width = float(np.clip(630 / columns, 7, 34))
    left = max(_text_width(label) for label in labels) + 12
    below = 36 + (12 if any(stacks) else 0)
    with _settings():
        figure, axes = _canvas(
            left + columns * cell_width + 8,
            len(sites) * 22 + below + 4,
            left=left,
            right=8,
            top=4,
            bottom=below,
        )
        tooltips = {}
        for (row, column), value in np.ndenumerate(values):
            cell = f"cell-{row}-{column}"
            where = f"layer {_drawable(layers[row])}, {_drawable(sites[column])}"
            if np.isnan(value):
                tooltips[cell] = f"{where}: no vector"
                axes.text(
                    float(at[row]),
                    column,
                    "×",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color=_STAND_INS["muted"],
                    gid=cell,
                )
                continue
            tooltips[cell] = f"{where}: {unit.format(value)}"
            colour = positive if value >= 0 else negative
            opacity = float(min(1.0, abs(value) / most))
            _fill(axes, float(at[row]), column, colour, opacity, cell)
        axes.set_xlim(-0.5, columns - 0.5)
        axes.set_ylim(len(sites) - 0.5, -0.5)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        numbers = [layer.rpartition(".")[2] for layer in layers]
        step = _tick_step(len(layers), most_ticks=32)
        ticked = [
            i for i, number in enumerate(numbers) if not number.isdigit() or int(number) % step == 0
        ]
        axes.set_xticks([float(at[i]) for i in ticked], [_drawable(numbers[i]) for i in ticked])
        axes.set_yticks(range(len(sites)), labels)
        axes.set_xlabel("layer", labelpad=15 if any(stacks) else 4)
        for stack in dict.fromkeys(filter(None, stacks)):
            middle = float(np.mean([at[i] for i, of in enumerate(stacks) if of == stack]))
            axes.annotate(
                _drawable(stack),
                (middle, 0),
                (0, -24),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="center",
            )
        return _inline_svg(figure, name, description, tooltips)


# -- drawing --------------------------------------------------------------------------------------


@contextmanager
def _settings() -> Iterator[None]:
    """matplotlib's defaults and ours, whatever the user's own settings are."""
    with _SETTINGS, matplotlib.rc_context(), warnings.catch_warnings():
        # The reader's browser draws the text; that matplotlib could not does not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def _canvas(
    width: float, height: float, *, left: float, right: float, top: float, bottom: float
) -> tuple[Figure, Axes]:
    """One pair of axes with margins around it, all in points."""
    figure = Figure(figsize=(width / 72, height / 72))
    figure.patch.set_visible(False)
    axes = figure.add_axes(
        (left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height)
    )
    axes.patch.set_visible(False)
    return figure, axes


def _fill(axes: Axes, x: float, y: float, colour: str, opacity: float, cell: str) -> None:
    axes.add_patch(
        Rectangle(
            (x - 0.47, y - 0.47),
            0.94,
            0.94,
            facecolor=(_STAND_INS[colour], opacity),
            # The outline shows that a cell is there where its value is 0.
            edgecolor=(_STAND_INS["grid"], 1.0),
            linewidth=0.4,
            clip_on=False,
            gid=cell,
        )
    )


def _inline_svg(figure: Figure, name: str, description: str, tooltips: Mapping[str, str]) -> str:
    """The figure as an `<svg>` element of an HTML page.

    Args:
        figure: drawn in stand-in colours.
        name: put before every id, so that those of several figures on a page differ.
        description: read out in place of the figure.
        tooltips: gid of an artist -> the text shown over it.
    """
    written = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(written, format="svg", metadata=nothing)
    root = ET.fromstring(written.getvalue())
    _, _, width, height = (float(x) for x in root.attrib["viewBox"].split())
    parents = list(root.iter())
    # HTML needs no namespaces.
    for element in parents:
        element.tag = element.tag.rpartition("}")[2]
        # Figures are laid out by matplotlib: white space between elements says nothing.
        if element.tag != "text":
            element.text = None
        element.tail = None
        element.attrib = {
            key.rpartition("}")[2]: _page_value(key.rpartition("}")[2], value, name)
            for key, value in element.attrib.items()
        }
    used = {r for e in parents for v in e.attrib.values() for r in re.findall(r"#([\w-]+)", v)}
    for element in parents:
        identifier = element.attrib.get("id", "")
        tooltip = tooltips.get(identifier.removeprefix(f"{name}-"))
        if tooltip is not None:
            title = ET.Element("title")
            title.text = tooltip
            element.insert(0, title)
        if identifier not in used:
            element.attrib.pop("id", None)
    # 4/3: a point in pixels. On a narrow page it shrinks as long as it can be read, then scrolls.
    root.attrib = {
        "viewBox": f"0 0 {width:g} {height:g}",
        "style": f"width: {width * 4 / 3:.0f}px; min-width: {width * 3 / 4:.0f}px",
        "role": "img",
        "aria-label": description,
    }
    return ET.tostring(root, encoding="unicode")


def _page_value(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return value.replace("#", f"#{name}-", 1)
    value = value.replace("url(#", f"url(#{name}-")
    if key == "style":
        for colour, stand_in in _STAND_INS.items():
            value = value.replace(stand_in, f"var(--{colour})")
    return value


# -- text -----------------------------------------------------------------------------------------


def _drawable(text: str) -> str:
    """One line without the characters that XML has no way to write."""
    line = " ".join(text.split())
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs", "Cn") else c for c in line)


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_LABEL else text[: _LONGEST_LABEL - 1] + "…"


def _text_width(text: str) -> float:
    """About the points a label takes; the reader's font is unknown."""
    return sum(9.5 if unicodedata.east_asian_width(c) in "WF" else 5.4 for c in text)


def _tick_step(count: int, *, most_ticks: int) -> int:
    """The smallest round step that leaves no more ticks than that."""
    steps = (1, 2, 5, 10, 20, 50, 100, 200, 500)
    return next((step for step in steps if count / step <= most_ticks), 1000)


def _pairs(items: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Every item with the one before it, the first with itself."""
    return zip([*items[:1], *items[:-1]], items, strict=True)
