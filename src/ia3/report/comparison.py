"""A comparison of methods as a table and as a picture: accuracy against operations and seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from .plotting import saved, settings

# isort: split
# After the module that says what to install where matplotlib is absent.
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..experiments.comparison import Summary

TITLES = {"zero-shot": "zero-shot", "icl": "in-context", "tfew": "T-Few", "setfit": "SetFit"}
HEADER = (
    *("method", "accuracy, median", "quartiles", "runs", "seconds to train", "seconds an answer"),
    *("FLOPs to train", "FLOPs an answer", "bytes to store", "examples used"),
)

# Okabe and Ito's colours, which differ for colour-blind readers too, and a shape for each.
_MARKS = {
    "zero-shot": ("#6b6b6b", "s"),
    "icl": ("#0072b2", "o"),
    "tfew": ("#d55e00", "D"),
    "setfit": ("#009e73", "^"),
}
# Methods of the same FLOPs stand side by side, so many points apart.
_APART = 9.0


def cells(summary: Summary) -> list[str]:
    """A summary's row of the table, under `HEADER`."""
    accuracy = summary.accuracy
    quartiles = f"{100 * accuracy.lower:.1f} to {100 * accuracy.upper:.1f}"
    return [
        *(TITLES[summary.method], f"{100 * accuracy.median:.1f}"),
        *(quartiles if summary.runs > 1 else "-", str(summary.runs)),
        *(_seconds(summary.train_seconds), _seconds(summary.answer_seconds)),
        *(_flops(summary.flops_before), _flops(summary.flops_an_answer)),
        *(f"{summary.stored_bytes:,}", _used(summary)),
    ]


def notes(summaries: Sequence[Summary]) -> list[str]:
    """The sentences below the table."""
    lines = []
    for summary in summaries:
        uncached = _uncached(summary)
        if uncached is not None:
            lines.append(
                "In-context learning computes its demonstrations once, before the first answer; "
                f"computed for every answer, as the paper counts, it takes {_flops(uncached)} "
                "FLOPs an answer."
            )
        if summary.method == "icl" and summary.examples_used[0] < summary.examples[0]:
            lines.append(
                f"In-context learning: {_used(summary)} examples fit the model's context; the "
                "others are left out."
            )
    return lines


def markdown(summaries: Sequence[Summary]) -> str:
    """The table in Markdown, with its notes."""
    table = markdown_table(HEADER, list(map(cells, summaries)))
    return "".join([table, *(f"\n{note}\n" for note in notes(summaries))])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown: the first column to the left, numbers to the right."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, rule, *rows))


def picture(summaries: Sequence[Summary], kind: Literal["png", "svg"]) -> bytes:
    """Accuracy against FLOPs an answer (as the paper's figure 3), and seconds beside it.

    A point is a method's median over its runs, its whiskers are the quartiles. A hollow point is
    in-context learning if it computed its demonstrations for every answer.
    """
    with settings({"font.size": 9}):
        figure = Figure(figsize=(8.8, 3.9), layout="constrained")
        grid = figure.add_gridspec(2, 2, width_ratios=(1.9, 1))
        _accuracy(figure.add_subplot(grid[:, 0]), summaries)
        train = [summary.train_seconds for summary in summaries]
        answer = [1000 * summary.answer_seconds for summary in summaries]
        _bars(figure.add_subplot(grid[0, 1]), summaries, train, "seconds to train")
        _bars(figure.add_subplot(grid[1, 1]), summaries, answer, "milliseconds an answer")
        return saved(figure, kind, dpi=160)


# -- drawing ---------------------------------------------------------------------------------------


def _accuracy(axes: Axes, summaries: Sequence[Summary]) -> None:
    shifts = _shifts(summaries)
    for summary, shift in zip(summaries, shifts, strict=True):
        name = TITLES[summary.method]
        _point(axes, summary, summary.flops_an_answer, name, shift=shift, hollow=False)
    flops = [summary.flops_an_answer for summary in summaries]
    for summary in summaries:
        uncached = _uncached(summary)
        if uncached is not None:
            flops.append(uncached)
            ends, level = [summary.flops_an_answer, uncached], [summary.accuracy.median] * 2
            colour = _MARKS[summary.method][0]
            axes.plot(ends, level, color=colour, linewidth=0.9, linestyle=":")
            name = f"{TITLES[summary.method]}, nothing cached"
            _point(axes, summary, uncached, name, shift=0.0, hollow=True)
    # The limits are set by hand, because points moved aside do not widen the axis.
    axes.set_xscale("log")
    axes.set_xlim(min(flops) / 2, max(flops) * 2)
    low = min(summary.accuracy.lower for summary in summaries)
    high = max(summary.accuracy.upper for summary in summaries)
    margin = max(0.02, 0.08 * (high - low))
    axes.set_ylim(max(-0.01, low - margin), min(1.01, high + margin))
    # Where the axis spans less than a power of ten, the steps between are named too.
    short = math.log10(max(flops) / min(flops)) < 1
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if short else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _power(x)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.3g}%"))
    axes.set_xlabel(f"FLOPs an answer{' (the same where side by side)' if any(shifts) else ''}")
    axes.set_ylabel("accuracy, median and quartiles")
    axes.grid()
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 4}
    axes.legend(**place, frameon=False, handletextpad=0.2, columnspacing=1.2)


def _point(
    axes: Axes, summary: Summary, flops: float, name: str, *, shift: float, hollow: bool
) -> None:
    """A method's median and its whiskers, so many points beside its place."""
    figure = axes.get_figure()
    assert figure is not None
    accuracy = summary.accuracy
    colour, shape = _MARKS[summary.method]
    style: dict[str, Any] = {"marker": shape, "markersize": 7, "capsize": 3, "linestyle": "none"}
    axes.errorbar(
        flops,
        accuracy.median,
        yerr=[[accuracy.median - accuracy.lower], [accuracy.upper - accuracy.median]],
        color=colour,
        markerfacecolor="white" if hollow else colour,
        label=name,
        transform=axes.transData + ScaledTranslation(shift / 72, 0, figure.dpi_scale_trans),
        zorder=3,
        **style,
    )


def _shifts(summaries: Sequence[Summary]) -> list[float]:
    """In points: methods of nearly the same FLOPs would cover each other's whiskers."""
    shifts = []
    flops = {summary.method: math.log(summary.flops_an_answer) for summary in summaries}
    for method, own in flops.items():
        level = [other for other, value in flops.items() if abs(value - own) < 0.1]
        shifts.append(_APART * (level.index(method) - (len(level) - 1) / 2))
    return shifts


def _bars(axes: Axes, summaries: Sequence[Summary], values: Sequence[float], title: str) -> None:
    names = [TITLES[summary.method] for summary in summaries]
    colours = [_MARKS[summary.method][0] for summary in summaries]
    bars = axes.barh(names, values, color=colours, height=0.62)
    axes.bar_label(bars, [_seconds(value) for value in values], padding=3, color="#333333")
    axes.invert_yaxis()
    axes.set_title(title, fontsize=9, loc="left", color="#333333")
    axes.set_xlim(0, 1.25 * max(*values, 1e-9))
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


# -- text ------------------------------------------------------------------------------------------


def _uncached(summary: Summary) -> float | None:
    """The FLOPs an answer of demonstrations that are not cached, where that makes a difference."""
    uncached = summary.flops_uncached
    return None if uncached is None or uncached <= summary.flops_an_answer else uncached


def _seconds(value: float) -> str:
    """Seconds with at least two significant digits."""
    if value == 0:
        return "0"
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _flops(value: float) -> str:
    """`2.8e10`, as computers write it."""
    return "0" if value == 0 else f"{value:.1e}".replace("e+0", "e").replace("e+", "e")


def _power(value: float) -> str:
    exponent = math.floor(math.log10(value) + 1e-9)
    digit = round(value / 10**exponent)
    return rf"$10^{{{exponent}}}$" if digit == 1 else rf"${digit}\cdot10^{{{exponent}}}$"


def _used(summary: Summary) -> str:
    used, given = (_range(values) for values in (summary.examples_used, summary.examples))
    return used if summary.examples_used == summary.examples else f"{used} of {given}"


def _range(values: tuple[int, int]) -> str:
    fewest, most = values
    return str(most) if fewest == most else f"{fewest} to {most}"
