"""How well colours can be told apart, by WCAG 2.2."""

from __future__ import annotations

from typing import Any

# Of text.
AA = 4.5

_LOOK = """() => {
    const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    const painted = (colours) => {
        canvas.globalAlpha = 1;
        for (const [colour, opacity] of colours) {
            canvas.globalAlpha = opacity;
            canvas.fillStyle = colour;
            canvas.fillRect(0, 0, 1, 1);
        }
        return [...canvas.getImageData(0, 0, 1, 1).data.slice(0, 3)];
    };
    const found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const text = walker.currentNode.textContent.trim();
        const element = walker.currentNode.parentElement;
        if (!text || !element.checkVisibility() || element.closest(".unseen, .skip, :disabled")) {
            continue;
        }
        const above = [];
        for (let each = element; each; each = each.parentElement) above.unshift(each);
        const grounds = above.map((each) => [
            getComputedStyle(each).backgroundColor, Number(getComputedStyle(each).opacity),
        ]);
        const ground = painted([["white", 1], ...grounds]);
        const style = getComputedStyle(element);
        const ink = painted([[`rgb(${ground})`, 1],
            [element.namespaceURI.endsWith("svg") ? style.fill : style.color,
             above.reduce((sum, each) => sum * Number(getComputedStyle(each).opacity), 1)]]);
        found.push([ink, ground, text.slice(0, 40), element.className.toString()]);
    }
    return found;
}"""


def contrast(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """The ratio of two colours' luminances, 1 to 21; a colour is red, green and blue up to 255."""
    dark, light = sorted((_luminance(one), _luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def of_page(page: Any) -> list[tuple[float, str, str]]:
    """The contrast of each text that a page shows, with the text and its element's class."""
    return [
        (round(contrast(ink, ground), 2), text, name)
        for ink, ground, text, name in page.evaluate(_LOOK)
    ]


def _luminance(colour: tuple[int, ...]) -> float:
    shares = [value / 255 for value in colour[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in shares]
    return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
