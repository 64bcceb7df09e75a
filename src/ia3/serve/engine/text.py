"""Text of tokens that come one at a time: whole characters, up to a text that ends it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a tokenizer gives for bytes that are no character, or not one yet.
UNFINISHED = "\ufffd"
# No character has so many tokens: those that are held back so long are of none.
MOST_HELD = 16
# Tokens before the first one, by which it is known whether a space comes before it.
CONTEXT = 4


class Detokenizer:
    """Makes text of tokens; an end that is no whole character yet is held back.

    The pieces together are what the tokenizer gives for all tokens behind the prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        # The tokens of the last piece, and those since.
        self._window = list(prompt[-CONTEXT:])
        self._before = self._decoded(self._window)
        self._held = 0

    def add(self, token: int) -> str:
        """The text that is whole with this token."""
        self._window.append(token)
        self._held += 1
        text = self._decoded(self._window)
        new = _behind(self._before, text)
        if not new or (text.endswith(UNFINISHED) and self._held < MOST_HELD):
            return ""
        del self._window[: -self._held]
        self._before, self._held = self._decoded(self._window), 0
        return new

    def end(self) -> str:
        """What was held back."""
        return _behind(self._before, self._decoded(self._window))

    def _decoded(self, ids: Sequence[int]) -> str:
        return _decoded(self._tokenizer, ids)


class TokenTexts:
    """The text of each token as it stands behind others, special ones included."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # Behind nothing, some tokenizers leave out a space.
        self._before = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._text_before = _decoded(tokenizer, self._before, special=True)
        self._texts: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if token not in self._texts:
            text = _decoded(self._tokenizer, [*self._before, token], special=True)
            self._texts[token] = _behind(self._text_before, text)
        return self._texts[token]


def _decoded(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, special: bool = False
) -> str:
    text = tokenizer.decode(
        list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)
    return text


def _behind(before: str, text: str) -> str:
    """What comes behind a beginning, of which the end may have become another character."""
    if text.startswith(before):
        return text[len(before) :]
    same = takewhile(lambda pair: pair[0] == pair[1], zip(before, text, strict=False))
    return text[sum(1 for _ in same) :]


class StopTexts:
    """Lets text through up to the first of some texts, whichever ends first in it.

    An end that may yet become one of them is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """The text that may go on, and whether one of the texts has come."""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        keep = max((_begun(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def end(self) -> str:
        """What was held back."""
        held, self._held = self._held, ""
        return held


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of a text are the first ones of another, but not all."""
    most = min(len(text), len(stop) - 1)
    return next((count for count in range(most, 0, -1) if text.endswith(stop[:count])), 0)
