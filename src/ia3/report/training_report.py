"""One HTML file that shows what a training did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from ..errors import IA3Error
from .heatmap import LayerSiteGrid, layer_site_grid
from .maps import statistic_maps
from .page import facts_list, figure, page, scale, scrolled, section, site_figure, table

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from torch import Tensor

    from ..tfew.training.trainer import TrainingStep

_MISTAKES_LISTED = 10


def training_report(
    *,
    title: str,
    facts: Sequence[tuple[str, str]],
    history: Sequence[TrainingStep],
    classes: Sequence[str],
    confusion_before: ArrayLike,
    confusion_after: ArrayLike,
    vectors: Mapping[str, Tensor],
) -> str:
    """A page that needs nothing but itself: no script, no network. Same input, same bytes.

    Args:
        title: of the page.
        facts: names and values shown on top, e.g. `("accuracy after", "87.5%")`.
        history: one record a step; may be empty.
        classes: the labels' names, `[classes]`.
        confusion_before: how often each label (row) was taken for each (column) by the untuned
            model, `[classes, classes]`.
        confusion_after: the same after training.
        vectors: module name -> vector.

    Returns:
        HTML.

    Raises:
        IA3Error: there are no classes, or a matrix does not fit them.
        MissingExtraError: matplotlib is not installed.
    """
    if len(classes) == 0:
        raise IA3Error("there are no classes: expected at least one")
    before = _confusion("confusion_before", confusion_before, len(classes))
    after = _confusion("confusion_after", confusion_after, len(classes))
    return page(
        title,
        [
            facts_list(facts),
            _training(history),
            _confusions(classes, before, after),
            _vectors(layer_site_grid(vectors)),
        ],
    )


def _confusion(name: str, counts: ArrayLike, classes: int) -> NDArray[np.float64]:
    matrix = np.asarray(counts, dtype=np.float64)
    if matrix.shape != (classes, classes):
        raise IA3Error(
            f"{name} has the shape {list(matrix.shape)}, expected {[classes, classes]}: "
            "a row and a column for each class"
        )
    if not (np.isfinite(matrix) & (matrix >= 0)).all():
        raise IA3Error(f"{name} has an entry that is negative or not finite, expected counts")
    return matrix


# -- sections -------------------------------------------------------------------------------------


def _training(history: Sequence[TrainingStep]) -> str:
    if not history:
        return section("Training", "<p>There were no training steps: the model is as it was.</p>")
    from . import figures

    terms = (
        ("total", "total", "the sum of the three, which training makes small"),
        ("lm", "lm", "how unexpected the words of the right answer are"),
        ("length-norm", "length norm", "how far the right answer is from winning"),
        ("unlikelihood", "unlikelihood", "how likely the wrong answers' words still are"),
    )
    key = "".join(
        f'<li><span class="line" style="background: var(--{colour})"></span>'
        f"<span><b>{term}</b> {meaning}</span></li>"
        for colour, term, meaning in terms
    )
    return section(
        "Training",
        f'<ul class="key">{key}</ul>'
        + figure(
            figures.training_curve(history, name="curve"),
            "Faint lines are single steps, bold ones their running mean: lines that fall and then "
            "level off have learned what they can, lines that still fall at the end would gain "
            "from more steps, and lines that climb or jump ask for a lower learning rate.",
        ),
    )


def _confusions(
    classes: Sequence[str], before: NDArray[np.float64], after: NDArray[np.float64]
) -> str:
    from . import figures

    most = max(1.0, before.max(), after.max())
    panels = ""
    for when, matrix in (("before", before), ("after", after)):
        said = f"Confusion matrix {when} training: {_right(matrix)}"
        drawn = figures.confusion_matrix(
            matrix, classes, most=most, name=f"confusion-{when}", description=said
        )
        heading = f"{when.capitalize()} training <small>{_right(matrix)}</small>"
        panels += f"<div><h3>{heading}</h3>{scrolled(drawn)}</div>"
    # Opacity grows with the root of the count, so a quarter of the largest count is halfway.
    marks = ("0", f"{most / 4:.0f}" if most >= 4 else "", f"{most:g}")
    right, wrong = scale(("", "right"), "right", *marks), scale(("", "wrong"), "mistaken", *marks)
    caption = (
        "A row is a true label and a column the model's answer: what is right lies on the "
        "diagonal, so training should gather the colour there, and a strong cell beside it names "
        "two labels that the model still confuses (both matrices share one scale)."
    )
    body = (
        f'<figure><div class="pair">{panels}</div><p class="scales">{right}{wrong}</p>'
        f"<figcaption>{caption}</figcaption></figure>"
    )
    if len(classes) > figures.MOST_NAMED_CLASSES:
        body += _mistakes(classes, before, after) + _numbers(classes)
    return section("Right and wrong answers", body)


def _right(matrix: NDArray[np.float64]) -> str:
    if matrix.sum() == 0:
        return "no examples"
    right = np.trace(matrix)
    return f"{right / matrix.sum():.1%} right, {right:g} of {matrix.sum():g}"


def _mistakes(
    classes: Sequence[str], before: NDArray[np.float64], after: NDArray[np.float64]
) -> str:
    """The pairs confused most often after training: the matrix is too fine to read them off."""
    wrong = after * (1 - np.eye(len(classes)))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MISTAKES_LISTED]
    rows = [
        (classes[i], classes[j], f"{before[i, j]:g}", f"{after[i, j]:g}")
        for i, j in (divmod(int(at), len(classes)) for at in order)
        if wrong[i, j] > 0
    ]
    if not rows:
        return ""
    shown = table(("true label", "taken for", "before", "after"), rows)
    return f"<h3>Most frequent mistakes after training</h3>{shown}"


def _numbers(classes: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(name)}</li>" for name in classes)
    return f"<details><summary>The labels by number</summary><ol>{items}</ol></details>"


def _vectors(grid: LayerSiteGrid) -> str:
    heading = "What the adapter learned"
    if not grid.layers:
        return section(heading, "<p>There are no vectors.</p>")
    maps = [each for each in statistic_maps([grid])[0] if each.of.name != "spread"]
    figures = (site_figure(each, f"map-{number}") for number, each in enumerate(maps))
    return section(heading, "".join(figures))
