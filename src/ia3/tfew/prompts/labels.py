"""Texts and labels as a user gives them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Text = str | Mapping[str, Any]
Label = str | int | bool


def readable(label: Label) -> str:
    """A label's name as words: `card_arrival` and `cardArrival` are "card arrival"."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", str(label))
    if words != str(label):
        words = words.lower()
    return " ".join(words.replace("_", " ").split()) or str(label)
