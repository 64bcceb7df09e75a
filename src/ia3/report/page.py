"""Self-contained pages of HTML, and the parts that they are made of."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .maps import SiteMap


def page(title: str, sections: Sequence[str]) -> str:
    """A page of these sections, without script or network. Same input, same bytes."""
    text = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # A second defence behind escaping: a script in a name could not run, nor fetch anything.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
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


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text under a header."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return scrolled(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def site_figure(shown: SiteMap, name: str) -> str:
    """A map of layers and sites with its heading, its scale and what it says.

    Args:
        shown: the map.
        name: of the figure; those on a page differ.
    """
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
@media (max-width: 600px) {
  main { padding: 20px 12px 40px; }
  section { padding: 16px; }
}
@media print { section { break-inside: avoid; } }
"""
