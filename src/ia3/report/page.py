"""Self-contained pages of HTML, and the parts that they are made of."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files

from .maps import SiteMap


def page(title: str, sections: Sequence[str]) -> str:
    """A page of these sections, without script or network. Same input, same bytes."""
    style = (files(__package__) / "page.css").read_text("utf-8")
    text = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # A second defence behind escaping: a script in a name could not run, nor fetch anything.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(sections) + "\n</main>\n</body>\n</html>\n"
    )
    # UTF-8 has no lone surrogates, which text cut in the middle of a character may hold.
    return text.encode("utf-8", "replace").decode("utf-8")


def facts_list(facts: Sequence[tuple[str, str]]) -> str:
    """Names and values, as cards; nothing for none."""
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts
    )
    return f'<dl class="facts">{items}</dl>' if items else ""


def section(heading: str, body: str) -> str:
    """A part of the page; the heading is HTML."""
    return f"<section><h2>{heading}</h2>{body}</section>"


def figure(svg: str, caption: str, scale: str = "") -> str:
    """A figure with its caption, and its scale between the two."""
    return f"<figure>{scrolled(svg)}{scale}<figcaption>{caption}</figcaption></figure>"


def scrolled(svg: str) -> str:
    """A part that scrolls where it is wider than the page."""
    return f'<div class="scroll">{svg}</div>'


def scale(colours: tuple[str, ...], what: str, *marks: str) -> str:
    """A bar that runs through colours, CSS variables or none, with marks below it."""
    stops = ", ".join(f"var(--{colour})" if colour else "transparent" for colour in colours)
    spans = "".join(f"<i>{mark}</i>" for mark in marks)
    return (
        f'<span class="scale"><span>{what}</span><span><span class="bar" '
        f'style="background: linear-gradient(to right, {stops})"></span>'
        f'<span class="marks">{spans}</span></span></span>'
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Rows of text under a header; `kind` is a class of the page's style."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    begin = f'<table class="{kind}">' if kind else "<table>"
    return scrolled(f"{begin}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def site_figure(shown: SiteMap, name: str) -> str:
    """A map with its heading, its scale and what it says; names on a page differ."""
    from . import figures

    of, most = shown.of, shown.most
    colours: tuple[str, ...] = ("", of.positive)
    marks = [f"{m:.0%}" if "%" in of.unit else f"{m:.2g}" for m in (0, most / 2, most)]
    if of.signed:
        colours = ("inhibited", *colours)
        factors = [f" (×{2**m:.2f})" if of.measure == "octaves" else "" for m in (-most, most)]
        marks = [f"−{most:.2g}{factors[0]}", "0", f"+{most:.2g}{factors[1]}"]
    bar = f'<p class="scales">{scale(colours, of.measure, *marks)}</p>'
    drawn = figures.layer_site_map(shown, name=name)
    return f"<h3>{escape(of.title)}</h3>" + figure(drawn, escape(of.caption), bar)
