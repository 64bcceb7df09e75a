"""One HTML file that shows what a training did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .heatmap import layer_site_grid
from .maps import site_maps
from .page import facts_list, figure, page, scale, scrolled, section, site_figure

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from torch import Tensor

    from ..classify.engine import Step

# The terms of a loss -> what they mean. A language model's steps have all of them.
_RANKING = {
    "total": "the sum of the three, which training makes small",
    "lm": "how unexpected the words of the right answer are",
    "length-norm": "how far the right answer is from winning",
    "unlikelihood": "how likely the wrong answers' words still are",
}
_CONTRASTIVE = {"total": "how much nearer texts of other classes are than those of the same class"}


def training_report(
    *,
    title: str,
    facts: Sequence[tuple[str, str]],
    history: Sequence[Step],
    classes: Sequence[str],
    confusion_before: ArrayLike,
    confusion_after: ArrayLike,
    vectors: Mapping[str, Tensor],
) -> str:
    """An HTML page without script or network; same input, same bytes.

    `facts` are names and values on top, `history` has at least two steps, and a confusion matrix
    `[classes, classes]` counts how often each label (row) was taken for each (column).
    """
    before, after = (np.asarray(m, dtype=np.float64) for m in (confusion_before, confusion_after))
    sections = (
        section("Training", training_curve(history)),
        section("Right and wrong answers", _confusions(classes, before, after)),
        section("What the adapter learned", learned(vectors)),
    )
    return page(title, [facts_list(facts), *sections])


def learned(vectors: Mapping[str, Tensor]) -> str:
    """Maps of the vectors by layer and module."""
    maps = [each for each in site_maps([layer_site_grid(vectors)])[0] if each.of.name != "spread"]
    return "".join(site_figure(each, f"map-{number}") for number, each in enumerate(maps))


def training_curve(history: Sequence[Step]) -> str:
    """The loss over two steps or more, with what its terms mean."""
    from . import figures

    terms = _RANKING if hasattr(history[0], "lm") else _CONTRASTIVE
    key = "".join(
        f'<li><span class="line" style="background: var(--{colour})"></span>'
        f"<span><b>{colour.replace('-', ' ')}</b> {meaning}</span></li>"
        for colour, meaning in terms.items()
    )
    # The total comes first in the key, and is drawn last.
    return f'<ul class="key">{key}</ul>' + figure(
        figures.training_curve(history, [*reversed(terms)], name="curve"),
        "Faint lines are single steps, bold ones their running mean: lines that fall and then "
        "level off have learned what they can, lines that still fall at the end would gain from "
        "more steps, and lines that climb or jump ask for a lower learning rate.",
    )


def _confusions(
    classes: Sequence[str], before: NDArray[np.float64], after: NDArray[np.float64]
) -> str:
    from . import figures

    most = max(1.0, before.max(), after.max())
    panels = ""
    for when, matrix in (("before", before), ("after", after)):
        right, of_all = np.trace(matrix), matrix.sum()
        said = f"{right / of_all:.1%} right, {right:g} of {of_all:g}"
        drawn = figures.confusion_matrix(
            *(matrix, classes, most, f"confusion-{when}"),
            f"Confusion matrix {when} training: {said}",
        )
        heading = f"{when.capitalize()} training <small>{said}</small>"
        panels += f"<div><h3>{heading}</h3>{scrolled(drawn)}</div>"
    # Opacity grows with the root of the count, so a quarter of the largest count is halfway.
    marks = ("0", f"{most / 4:.0f}" if most >= 4 else "", f"{most:g}")
    scales = scale(("", "right"), "right", *marks) + scale(("", "wrong"), "mistaken", *marks)
    caption = (
        "A row is a true label and a column the model's answer: what is right lies on the "
        "diagonal, so training should gather the colour there, and a strong cell beside it names "
        "two labels that the model still confuses (both matrices share one scale)."
    )
    return (
        f'<figure><div class="pair">{panels}</div><p class="scales">{scales}</p>'
        f"<figcaption>{caption}</figcaption></figure>"
    )
