"""One HTML file that says how good a classifier is, and what its training did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from . import figures
from .page import facts_list, page, scale, scrolled, section, table
from .scores import confused, labels_shown
from .training_report import learned, training_curve

if TYPE_CHECKING:
    from torch import Tensor

    from ..classify.engine import Step
    from ..classify.measure import ClassScore, Measured, Mistake

# Beyond these a page would be long, or a picture a blur.
MOST_MISTAKES = 100
MOST_PAIRS = 12
MOST_IN_MATRIX = 100
# Of a text's characters.
LONGEST_TEXT = 600


def fit_report(
    *,
    title: str,
    facts: Sequence[tuple[str, str]],
    measured: Measured | None,
    places: Sequence[str],
    history: Sequence[Step],
    vectors: Mapping[str, Tensor],
) -> str:
    """An HTML page without script or network; same input, same bytes.

    `facts` are names and values on top, below what was measured, if anything was; `places` says
    where each text is from, by its row.
    """
    sections = _sections(measured, places, " Each answer is to a text that was not trained on.")
    # A curve has two points or more.
    if len(history) > 1:
        sections.append(section("Training", training_curve(history)))
    if vectors:
        sections.append(section("What the adapter learned", learned(vectors)))
    return page(title, [facts_list([*_facts(measured), *facts]), *sections])


def evaluation_report(
    *, title: str, facts: Sequence[tuple[str, str]], measured: Measured, places: Sequence[str]
) -> str:
    """As `fit_report`, of answers to labelled texts alone."""
    sections = _sections(measured, places, "")
    return page(title, [facts_list([*_facts(measured), *facts]), *sections])


def _facts(measured: Measured | None) -> list[tuple[str, str]]:
    if measured is None:
        return [("accuracy", "not measured")]
    name = "accuracy" if measured.trained else "accuracy before training"
    facts = [(name, _share_with_error(measured.accuracy, measured.error))]
    if measured.frozen is not None:
        of = _share_with_error(measured.frozen.accuracy, measured.frozen.error)
        facts.append((f"accuracy of the {measured.frozen.what}", of))
    name = "macro F1" if measured.trained else "macro F1 before training"
    return [*facts, (name, f"{measured.macro_f1:.1%}")]


def _sections(measured: Measured | None, places: Sequence[str], held_out: str) -> list[str]:
    """The parts of a page; `held_out` is said of the answers."""
    if measured is None:
        return [section("How good it is", _paragraphs([_NOT_MEASURED]))]
    said = [*_said(measured, held_out), *([] if measured.trained else [_NOT_MEASURED])]
    heading = "How good it is" if measured.trained else "How good it was before training"
    sections = [section(heading, _paragraphs(said) + _scores(measured.by_class))]
    if measured.confusion is not None:
        sections.append(section("Right and wrong answers", _confusion(measured)))
    if measured.mistakes:
        wrong = f"Texts it got wrong <small>{len(measured.mistakes):,}</small>"
        sections.append(section(wrong, _mistakes(measured.mistakes, places)))
    return sections


_NOT_MEASURED = (
    "The trained adapter itself was not measured: there is no test file, and too few texts to hold "
    "some out of the training. <code>--test FILE</code> measures it on other labelled texts, "
    "<code>--cross-validate</code> by five more trainings, each text held out of one."
)


def _said(measured: Measured, held_out: str) -> list[str]:
    right = f"{measured.right:,} of {measured.texts:,} texts"
    who = "The adapter" if measured.trained else "Before any training the model"
    said = (
        f"<b>{who} labels {right} as they are labelled, {measured.accuracy:.1%}</b> "
        f"({escape(measured.how)}).{held_out} With as many other texts the share would be within "
        f"±{100 * measured.error:.1f} points of this in two cases of three."
    )
    if measured.frozen is None:
        return [said]
    by = 100 * (measured.accuracy - measured.frozen.accuracy)
    more = f"{abs(by):.1f} points {'more' if by > 0 else 'less'}" if by else "no more and no less"
    if abs(by) < 100 * measured.error:
        more += ", which may be chance"
    return [
        said,
        f"Without training, the {escape(measured.frozen.what)} has "
        f"{measured.frozen.accuracy:.1%} of the same texts right: the adapter brings {more}.",
    ]


def _paragraphs(texts: Sequence[str]) -> str:
    return "".join(f'<p class="said">{text}</p>' for text in texts)


def _scores(scores: Sequence[ClassScore]) -> str:
    rows = ""
    for score in sorted(scores, key=lambda each: 2.0 if each.f1 is None else each.f1):
        cells = "".join(
            f"<td>{_meter(value, colour)}</td>"
            for value, colour in (
                (score.precision, "lm"),
                (score.recall, "lm"),
                (score.f1, "right"),
            )
        )
        name = f'<td class="name">{escape(str(score.label))}</td>'
        rows += f"<tr>{name}<td>{score.texts:,}</td>{cells}</tr>"
    head = "".join(f"<th>{name}</th>" for name in ("class", "texts", "precision", "recall", "F1"))
    caption = (
        "The classes, the weakest first. Precision is the share of the answers with this label "
        "that are right, recall the share of the texts with this label that got it, and F1 the "
        "harmonic mean of both."
    )
    drawn = scrolled(
        f'<table class="scores"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    )
    return f"<figure>{drawn}<figcaption>{caption}</figcaption></figure>"


def _meter(value: float | None, colour: str) -> str:
    if value is None:
        return '<span class="none">–</span>'
    bar = f'<i style="width: {value:.0%}; background: var(--{colour})"></i>'
    return f'<span class="meter">{bar}</span><span class="share">{value:.0%}</span>'


def _confusion(measured: Measured) -> str:
    counts = np.asarray(measured.confusion, dtype=np.float64)
    classes = [str(score.label) for score in measured.by_class]
    pairs = confused(measured)
    parts = []
    if len(classes) <= MOST_IN_MATRIX:
        most = max(1.0, counts.max())
        said = f"{measured.right:,} of {measured.texts:,} right"
        drawn = figures.confusion_matrix(
            *(counts, classes, most, "confusion", f"Confusion matrix: {said}"),
            side=figures.side_of(len(classes)),
        )
        marks = ("0", f"{most / 4:.0f}" if most >= 4 else "", f"{most:g}")
        scales = scale(("", "right"), "right", *marks) + scale(("", "wrong"), "mistaken", *marks)
        parts.append(f'<div>{scrolled(drawn)}<p class="scales">{scales}</p></div>')
    if pairs:
        rows = [[str(a), str(b), f"{n:,}"] for a, b, n in pairs[:MOST_PAIRS]]
        more = f" <small>{MOST_PAIRS} of {len(pairs):,} pairs</small>"
        heading = "Taken for one another" + (more if len(pairs) > MOST_PAIRS else "")
        listed = table(("label", "answer", "texts"), rows, "pairs")
        parts.append(f"<div><h3>{heading}</h3>{listed}</div>")
    caption = (
        "A row is a true label and a column the model's answer: what is right lies on the "
        "diagonal, and a strong cell beside it names two labels that the model confuses."
    )
    side_by_side = len(classes) <= _FEW
    body = f'<div class="pair">{"".join(parts)}</div>' if side_by_side else "".join(parts)
    return f"<figure>{body}<figcaption>{caption}</figcaption></figure>"


# So many classes leave room for a list beside their matrix.
_FEW = 12


def _mistakes(mistakes: Sequence[Mistake], places: Sequence[str]) -> str:
    rows = ""
    for mistake in mistakes[:MOST_MISTAKES]:
        text = mistake.text
        if len(text) > LONGEST_TEXT:
            text = f"{text[: LONGEST_TEXT - 1]}…"
        rows += (
            f'<tr><td class="text">{escape(text)}<small>{escape(places[mistake.row])}</small></td>'
            f"<td>{escape(labels_shown(mistake.label))}</td>"
            f"<td>{escape(labels_shown(mistake.predicted))}</td>"
            f"<td>{mistake.probability:.0%}</td></tr>"
        )
    head = "".join(f"<th>{name}</th>" for name in ("text", "label", "answer", "sure"))
    caption = (
        "The surest answers first: a text that is wrong here with much certainty may have the "
        "wrong label in the data, and is worth a look."
    )
    if len(mistakes) > MOST_MISTAKES:
        caption = f"{MOST_MISTAKES} of {len(mistakes):,}. {caption}"
    drawn = scrolled(
        f'<table class="wrong"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    )
    return f"<figure>{drawn}<figcaption>{caption}</figcaption></figure>"


def _share_with_error(share: float, error: float) -> str:
    return f"{share:.1%} ± {100 * error:.1f}"
