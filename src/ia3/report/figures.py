"""The report's figures: SVG made to stand inside an HTML page.

Colours are names of the page's CSS variables, so that a figure follows the reader's light or dark
theme, and a cell's strength is its opacity, so that "nothing" is the page itself in both. Text
stays text: it can be selected, and the reader's fonts draw scripts that matplotlib's own lacks.
"""

from __future__ import annotations

import re
import unicodedata
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .plotting import saved, settings

# isort: split
# After the module that says what to install where matplotlib is absent.
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from ..classify.engine import Step
    from .maps import SiteMap

# matplotlib knows no CSS variables: each is drawn in a colour of its own, which is then replaced.
_COLOURS = (
    *("ink", "muted", "grid", "on-strong"),
    *("total", "lm", "length-norm", "unlikelihood"),
    *("right", "wrong", "inhibited", "amplified"),
)
_STAND_INS = {name: f"#0{i:x}0b0c" for i, name in enumerate(_COLOURS)}
_GRID = ("axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
_MUTED = ("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor")
_STYLE = {
    "font.size": 9,
    # A class may be called "$5 or $10".
    "text.parse_math": False,
    "text.color": _STAND_INS["ink"],
    "lines.solid_capstyle": "round",
    **dict.fromkeys(_GRID, _STAND_INS["grid"]),
    **dict.fromkeys(_MUTED, _STAND_INS["muted"]),
}
_LONGEST_LABEL = 26


def training_curve(history: Sequence[Step], terms: Sequence[str], *, name: str) -> str:
    """The loss's terms over two steps or more: each faint, the running mean bold.

    `terms` are of `total`, `lm`, `length-norm` and `unlikelihood`; the last is drawn on top.
    """
    steps = [record.step for record in history]
    with settings(_STYLE):
        figure, axes = _canvas(750, 290, left=46, right=12, top=10, bottom=36)
        for term in terms:
            field, width = ("loss", 2.4) if term == "total" else (term.replace("-", "_"), 1.6)
            values = np.array([getattr(record, field) for record in history], dtype=np.float64)
            colour = _STAND_INS[term]
            axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
            axes.plot(steps, _running_mean(values), color=colour, linewidth=width)
        axes.set_ylim(bottom=0)
        axes.set_xlim(steps[0] - 0.5, steps[-1] + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("training step")
        axes.set_ylabel("loss")
        return _inline_svg(figure, name, "Training loss over the steps", {})


def _running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean over a tenth of the steps around each, over fewer at either end; `[steps]`."""
    half = len(values) // 20
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def confusion_matrix(
    counts: NDArray[np.float64],
    classes: Sequence[str],
    most: float,
    name: str,
    description: str,
    *,
    side: float = 300.0,
) -> str:
    """True labels on the rows, predicted ones on the columns, `most` at full strength.

    The matrix is `side` points wide and high.
    """
    n = len(classes)
    classes = [_drawable(each) for each in classes]
    labels = [_shortened(each) for each in classes]
    widest = max(_text_width(label) for label in labels)
    left, below = widest + 30, 0.7 * widest + 38
    with settings(_STYLE):
        whole = side + left + 8, side + below + 8
        figure, axes = _canvas(*whole, left=left, right=8, top=8, bottom=below)
        tooltips = {}
        for row, column in np.argwhere(counts > 0):
            text = f"{counts[row, column]:g}"
            opacity = float(0.1 + 0.9 * np.sqrt(counts[row, column] / most))
            cell = f"cell-{row}-{column}"
            tooltips[cell] = f"true {classes[row]}, predicted {classes[column]}: {text}"
            _fill(axes, column, row, "right" if row == column else "wrong", opacity, cell)
            colour = "on-strong" if opacity > 0.6 else "ink"
            size = min(9.0, side / n * 0.9 / (0.62 * max(len(text), 2)))
            _write(axes, column, row, text, colour, size, va="center_baseline")
        axes.set_xlim(-0.5, n - 0.5)
        axes.set_ylim(n - 0.5, -0.5)
        axes.set_xlabel("predicted label")
        axes.set_ylabel("true label")
        axes.set_xticks(range(n), labels, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(n), labels)
        axes.tick_params(length=0, labelsize=min(9.0, side / n * 0.62))
        for line in np.arange(0.5, n - 1):
            axes.axvline(line, color=_STAND_INS["grid"], linewidth=0.5, zorder=0)
            axes.axhline(line, color=_STAND_INS["grid"], linewidth=0.5, zorder=0)
        return _inline_svg(figure, name, description, tooltips)


def side_of(classes: int) -> float:
    """How large a matrix of so many classes is to be, in points, for its labels to be read."""
    return float(np.clip(12.0 * classes, 300.0, 600.0))


def layer_site_map(shown: SiteMap, *, name: str) -> str:
    """Layers from left to right, sites from top to bottom, the stronger the farther from 0."""
    layers, sites = shown.layers, shown.sites
    labels = [_shortened(_drawable(site)) for site in sites]
    stacks = [layer.rpartition(".")[0] for layer in layers]
    # The encoder and the decoder are a gap apart.
    before = [*stacks[:1], *stacks[:-1]]
    at = np.arange(len(layers)) + 0.7 * np.cumsum(
        [a != b for a, b in zip(before, stacks, strict=True)]
    )
    columns = float(at[-1]) + 1
    cell_width = float(np.clip(630 / columns, 7, 34))
    left = max(_text_width(label) for label in labels) + 12
    below = 36 + (12 if any(stacks) else 0)
    with settings(_STYLE):
        size = left + columns * cell_width + 8, len(sites) * 22 + below + 4
        figure, axes = _canvas(*size, left=left, right=8, top=4, bottom=below)
        tooltips = {}
        for (row, column), value in np.ndenumerate(shown.values):
            cell = f"cell-{row}-{column}"
            where = f"layer {_drawable(layers[row])}, {_drawable(sites[column])}"
            if np.isnan(value):
                tooltips[cell] = f"{where}: no vector"
                _write(axes, float(at[row]), column, "×", "muted", 7, gid=cell)
                continue
            tooltips[cell] = f"{where}: {shown.of.unit.format(value)}"
            colour = shown.of.positive if value >= 0 else "inhibited"
            opacity = float(min(1.0, abs(value) / shown.most))
            _fill(axes, float(at[row]), column, colour, opacity, cell)
        axes.set_xlim(-0.5, columns - 0.5)
        axes.set_ylim(len(sites) - 0.5, -0.5)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        numbers = [layer.rpartition(".")[2] for layer in layers]
        # The smallest round step that leaves at most 32 ticks.
        step = next((step for step in (1, 2, 5, 10) if len(layers) <= 32 * step), 20)
        ticked = [
            i for i, number in enumerate(numbers) if not number.isdigit() or int(number) % step == 0
        ]
        axes.set_xticks([float(at[i]) for i in ticked], [_drawable(numbers[i]) for i in ticked])
        axes.set_yticks(range(len(sites)), labels)
        axes.set_xlabel("layer", labelpad=15 if any(stacks) else 4)
        for stack in dict.fromkeys(filter(None, stacks)):
            middle = float(np.mean([at[i] for i, of in enumerate(stacks) if of == stack]))
            axes.annotate(
                *(_drawable(stack), (middle, 0), (0, -24)),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="center",
            )
        return _inline_svg(figure, name, f"{shown.of.title} by layer and site", tooltips)


# -- drawing --------------------------------------------------------------------------------------


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
            *((x - 0.47, y - 0.47), 0.94, 0.94),
            facecolor=(_STAND_INS[colour], opacity),
            # The outline shows that a cell is there where its value is 0.
            edgecolor=(_STAND_INS["grid"], 1.0),
            linewidth=0.4,
            clip_on=False,
            gid=cell,
        )
    )


def _write(
    axes: Axes, x: float, y: float, text: str, colour: str, size: float, **more: Any
) -> None:
    given = {"ha": "center", "va": "center", "fontsize": size, "color": _STAND_INS[colour], **more}
    axes.text(x, y, text, **given)


def _inline_svg(figure: Figure, name: str, description: str, tooltips: Mapping[str, str]) -> str:
    """The figure, drawn in stand-in colours, as an `<svg>` element of an HTML page.

    `name` is put before every id, so that those of several figures on a page differ; `tooltips`
    are texts by the gid of an artist.
    """
    root = ET.fromstring(saved(figure, "svg").decode())
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
    """An estimate of a label's width in points, as the reader's font is unknown."""
    return sum(9.5 if unicodedata.east_asian_width(c) in "WF" else 5.4 for c in text)
