"""One HTML file that shows what a training did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from ..errors import IA3Error
from .heatmap import AMPLIFIED_ABOVE, INHIBITED_BELOW, LayerSiteGrid, layer_site_grid

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from torch import Tensor

    from ..tfew.training import TrainingStep

# Below these, full colour would make a drama of nothing: 0.02 octaves are 1.4%.
_LEAST_OCTAVES = 0.02
_LEAST_SHARE = 0.05
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
    sections = [
        _facts(facts),
        _training(history),
        _confusions(classes, before, after),
        _vectors(layer_site_grid(vectors)),
    ]
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # Should a name ever slip through unescaped, it still could not run or fetch anything.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(sections) + "\n</main>\n</body>\n</html>\n"
    )
    # A lone surrogate, as in text cut in the middle of a character, could not be written to a file.
    return page.encode("utf-8", "replace").decode("utf-8")


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


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts
    )
    return f'<dl class="facts">{items}</dl>' if items else ""


def _training(history: Sequence[TrainingStep]) -> str:
    if not history:
        return _section("Training", "<p>There were no training steps: the model is as it was.</p>")
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
    return _section(
        "Training",
        f'<ul class="key">{key}</ul>'
        + _figure(
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
    panels = "".join(
        f"<div><h3>{when} <small>{_right(matrix)}</small></h3>"
        + _scrolled(
            figures.confusion_matrix(
                matrix,
                classes,
                most=most,
                name=f"confusion-{when.split()[0].lower()}",
                description=f"Confusion matrix {when.lower()}: {_right(matrix)}",
            )
        )
        + "</div>"
        for when, matrix in (("Before training", before), ("After training", after))
    )
    # Opacity grows with the root of the count: halfway lies a quarter of the largest.
    marks = ("0", f"{most / 4:.0f}" if most >= 4 else "", f"{most:g}")
    scale = (
        '<p class="scales">'
        + _scale(("", "right"), "right", *marks)
        + _scale(("", "wrong"), "mistaken", *marks)
        + "</p>"
    )
    caption = (
        "A row is a true label and a column the model's answer: what is right lies on the "
        "diagonal, so training should gather the colour there, and a strong cell beside it names "
        "two labels that the model still confuses (both matrices share one scale)."
    )
    body = f'<figure><div class="pair">{panels}</div>{scale}<figcaption>{caption}</figcaption>'
    body += "</figure>"
    if len(classes) > figures.MOST_NAMED_CLASSES:
        body += _mistakes(classes, before, after) + _numbers(classes)
    return _section("Right and wrong answers", body)


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
    rows = "".join(
        f"<tr><td>{escape(classes[i])}</td><td>{escape(classes[j])}</td>"
        f"<td>{before[i, j]:g}</td><td>{after[i, j]:g}</td></tr>"
        for i, j in (divmod(int(at), len(classes)) for at in order)
        if wrong[i, j] > 0
    )
    if not rows:
        return ""
    return (
        "<h3>Most frequent mistakes after training</h3>"
        '<div class="scroll"><table><thead><tr><th>true label</th><th>taken for</th>'
        f"<th>before</th><th>after</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _numbers(classes: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(name)}</li>" for name in classes)
    return f"<details><summary>The labels by number</summary><ol>{items}</ol></details>"


def _vectors(grid: LayerSiteGrid) -> str:
    heading = "What the adapter learned"
    if not grid.layers:
        return _section(heading, "<p>There are no vectors.</p>")
    from . import figures

    octaves = max(_LEAST_OCTAVES, float(np.nanmax(np.abs(grid.mean))))
    share = max(_LEAST_SHARE, float(np.nanmax([grid.inhibited, grid.amplified])))
    shares = ("0%", f"{share / 2:.0%}", f"{share:.0%}")
    maps = [
        (
            "Mean amplification",
            grid.mean,
            "amplified",
            octaves,
            "{:+.3f} octaves",
            _scale(
                ("inhibited", "", "amplified"),
                "octaves",
                f"−{octaves:.2g} (×{2**-octaves:.2f})",
                "0",
                f"+{octaves:.2g} (×{2**octaves:.2f})",
            ),
            "Each cell is one learned vector, found by its layer (input on the left, output on the "
            "right) and the module whose activation it multiplies: blue ones turn the activation "
            "down on average, orange ones turn it up (an octave is a factor of 2), and pale ones "
            "leave its strength alone.",
        ),
        (
            "Share of channels inhibited",
            grid.inhibited,
            "inhibited",
            share,
            "{:.0%} inhibited",
            _scale(("", "inhibited"), "of channels", *shares),
            f"How much of each vector turns its channels down (below {INHIBITED_BELOW}): where "
            "this map and the next are both strong, the vector turns some channels down and others "
            "up, even if its mean is pale.",
        ),
        (
            "Share of channels amplified",
            grid.amplified,
            "amplified",
            share,
            "{:.0%} amplified",
            _scale(("", "amplified"), "of channels", *shares),
            f"How much of each vector turns its channels up (above {AMPLIFIED_ABOVE}): cells that "
            "are pale in both maps of shares are vectors that training has hardly moved from 1.",
        ),
    ]
    body = "".join(
        f"<h3>{what}</h3>"
        + _figure(
            figures.layer_site_map(
                values,
                grid.layers,
                grid.sites,
                positive=positive,
                negative="inhibited",
                most=most,
                unit=unit,
                name=f"map-{number}",
                description=f"{what} by layer and site",
            ),
            caption,
            f'<p class="scales">{scale}</p>',
        )
        for number, (what, values, positive, most, unit, scale, caption) in enumerate(maps)
    )
    return _section(heading, body)


# -- pieces ---------------------------------------------------------------------------------------


def _section(heading: str, body: str) -> str:
    return f"<section><h2>{heading}</h2>{body}</section>"


def _figure(svg: str, caption: str, scale: str = "") -> str:
    return f"<figure>{_scrolled(svg)}{scale}<figcaption>{caption}</figcaption></figure>"


def _scrolled(svg: str) -> str:
    return f'<div class="scroll">{svg}</div>'


def _scale(colours: tuple[str, ...], what: str, *marks: str) -> str:
    """A bar that runs through colours, CSS variables or none, with marks below it."""
    stops = ", ".join(f"var(--{colour})" if colour else "transparent" for colour in colours)
    spans = "".join(f"<i>{mark}</i>" for mark in marks)
    return (
        f'<span class="scale"><span>{what}</span><span><span class="bar" '
        f'style="background: linear-gradient(to right, {stops})"></span>'
        f'<span class="marks">{spans}</span></span></span>'
    )


_CSS = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b1f27; --muted: #5a6372; --grid: #d9dee6;
  --total: #1b1f27; --lm: #2f6fd0; --length-norm: #c8661b; --unlikelihood: #2f9068;
  --right: #1d7a5f; --wrong: #c23b4e; --inhibited: #2563c9; --amplified: #d9620f;
  --on-strong: #ffffff;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12151b; --card: #1a1e26; --ink: #e8ebf0; --muted: #a3adbb; --grid: #39414e;
    --total: #f1f3f6; --lm: #74a7f5; --length-norm: #f0a060; --unlikelihood: #6bcfa3;
    --right: #45c79c; --wrong: #f0707f; --inhibited: #6ea3f7; --amplified: #f79646;
    --on-strong: #12151b;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
main { max-width: 1060px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 20px; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 12px; }
h3 { font-size: 1rem; margin: 24px 0 8px; }
h2 + h3, .pair h3 { margin-top: 0; }
section > p { margin: 0; }
h3 small { font-size: .875rem; font-weight: 400; color: var(--muted); white-space: nowrap; }
section {
  background: var(--card); border: 1px solid var(--grid); border-radius: 12px;
  padding: 22px 24px; margin-top: 20px;
}
.facts {
  display: flex; flex-wrap: wrap; gap: 1px; margin: 0; background: var(--grid);
  border: 1px solid var(--grid); border-radius: 12px; overflow: hidden;
}
.facts div { background: var(--card); padding: 12px 18px; flex: 1 0 auto; max-width: 100%; }
.facts dt { font-size: .8125rem; color: var(--muted); }
.facts dd { margin: 2px 0 0; font-size: 1.125rem; font-weight: 600; overflow-wrap: anywhere; }
figure { margin: 0; }
figcaption { margin-top: 10px; color: var(--muted); font-size: .9375rem; max-width: 78ch; }
.scroll { overflow-x: auto; }
svg { display: block; max-width: 100%; height: auto; }
svg text { font-family: inherit !important; font-variant-numeric: tabular-nums; }
.pair {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 20px;
}
.pair > div { min-width: 0; }
.key {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr));
  gap: 2px 20px; list-style: none; margin: 0 0 12px; padding: 0; font-size: .875rem;
  color: var(--muted);
}
.key li { display: flex; gap: 8px; }
.key b { color: var(--ink); }
.line { flex: none; width: 20px; height: 3px; border-radius: 2px; margin-top: .6em; }
.scales { display: flex; flex-wrap: wrap; gap: 8px 36px; margin: 12px 0 0; }
.scale { display: flex; gap: 10px; font-size: .8125rem; line-height: 1.2; color: var(--muted); }
.bar {
  display: block; width: 300px; max-width: 60vw; height: 12px; border: 1px solid var(--grid);
  border-radius: 3px;
}
.marks { display: flex; justify-content: space-between; margin-top: 3px; }
.marks i { font-style: normal; flex: 1 1 0; text-align: center; white-space: nowrap; }
.marks i:nth-child(2) { flex: 0 1 auto; }
.marks i:first-child { text-align: left; }
.marks i:last-child { text-align: right; }
table { border-collapse: collapse; font-size: .9375rem; }
th, td { text-align: left; padding: 5px 20px 5px 0; border-bottom: 1px solid var(--grid); }
th { color: var(--muted); font-weight: 500; white-space: nowrap; }
th:nth-child(n+3), td:nth-child(n+3) { text-align: right; font-variant-numeric: tabular-nums; }
details { margin-top: 16px; font-size: .9375rem; }
summary { cursor: pointer; color: var(--muted); }
ol { columns: 15em; margin: 8px 0 0; padding-left: 2.5em; overflow-wrap: anywhere; }
@media (max-width: 600px) {
  main { padding: 20px 12px 40px; }
  section { padding: 16px; }
}
@media print { section { break-inside: avoid; } }
"""
