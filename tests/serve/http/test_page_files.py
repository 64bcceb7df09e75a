"""The page's files: what they may load, and whether their colours can be read."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

pytest.importorskip("fastapi")

from support.contrast import AA, contrast
from support.page import Page

FOLDER = files("ia3.serve") / "page"
STYLE = (FOLDER / "page.css").read_text("utf-8")
# What is written, and on what.
PAIRS = [
    *[(ink, ground) for ink in ("ink", "muted") for ground in ("page", "card", "cell", "tint")],
    *[("accent", ground) for ground in ("page", "card", "tint")],
    *[(ink, "card") for ink in ("right", "wrong")],
    *[("ink", ground) for ground in ("warn-tint", "wrong-tint")],
    ("wrong", "wrong-tint"),
    ("on-accent", "accent"),
]


def colours(scheme: str) -> dict[str, tuple[int, int, int]]:
    """The variables of a scheme: dark ones stand in the place of light ones."""
    light, dark = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)[:2]
    found = {}
    for part in (light, dark) if scheme == "dark" else (light,):
        for name, value in re.findall(r"--([\w-]+): #([0-9a-f]{6});", part):
            found[name] = tuple(bytes.fromhex(value))
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_of_wcag_aa(scheme: str) -> None:
    of = colours(scheme)
    ratios = {pair: round(contrast(of[pair[0]], of[pair[1]]), 2) for pair in PAIRS}
    assert {pair: ratio for pair, ratio in ratios.items() if ratio < AA} == {}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_is_no_text_can_be_told_from_its_ground(scheme: str) -> None:
    of = colours(scheme)
    for shape, ground in [
        ("edge", "card"),
        ("accent", "cell"),
        ("accent", "card"),
        ("base", "card"),
    ]:
        assert contrast(of[shape], of[ground]) >= 3, (shape, ground)


def test_contrast_is_that_of_wcags_examples() -> None:
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert contrast((119, 119, 119), (255, 255, 255)) == pytest.approx(4.48, abs=0.005)


def test_no_file_names_another_place() -> None:
    for each in FOLDER.iterdir():
        text = each.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|@import|eval\(|innerHTML|insertAdjacentHTML", text), (
            each.name
        )


def test_the_page_has_no_script_or_style_of_its_own() -> None:
    page = Page((FOLDER / "index.html").read_text("utf-8"))
    scripts = [attributes for tag, attributes in page.elements if tag == "script"]
    assert [each["src"] for each in scripts] == ["/page/page.js"]
    assert page.count("style") == 0
    assert not [a for _, a in page.elements if "style" in a or any(k.startswith("on") for k in a)]
    names = {each.name for each in FOLDER.iterdir()}
    for each in FOLDER.iterdir():
        imported = re.findall(r'from "\./([\w.]+)"', each.read_text("utf-8"))
        assert set(imported) <= names
