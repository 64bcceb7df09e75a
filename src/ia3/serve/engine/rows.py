"""A generation that runs: its tokens, and the pieces of text that they come to."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from ...arguments import number, whole
from ...core.sites import Site
from ...errors import IA3Error, InvalidTypeError, shown
from .interface import Finish, Generation, Piece, TokenLogprob
from .sampling import Picked, Sampler
from .text import Detokenizer, StopTexts, TokenTexts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Row:
    """A generation that runs: what was asked, its tokens, and the text that they have come to."""

    def __init__(
        self,
        asked: Generation,
        tell: Callable[[Row, Piece], None],
        is_cancelled: Callable[[], bool],
    ) -> None:
        self.asked = asked
        self.tell = tell
        self.is_cancelled = is_cancelled
        self.ids = list(asked.prompt)
        self.sampler = Sampler(asked)
        # How many tokens are in the cache.
        self.cached = 0
        self.most = asked.max_tokens
        self.values: dict[Site, Tensor] = {}
        self.finished = False
        self.text: RowText | None = None

    @property
    def new(self) -> list[int]:
        """The tokens that are to be computed next."""
        return self.ids[self.cached :]

    def take(self, picked: Picked, ends: frozenset[int]) -> None:
        """Go on with a token, and tell what the text has come to."""
        assert self.text is not None
        self.ids.append(picked.token)
        is_end = picked.token in ends
        is_last = len(self.ids) >= len(self.asked.prompt) + self.most
        piece = self.text.add(picked, is_end, is_last)
        if piece is not None:
            self.finished = piece.finish is not None
            self.tell(self, piece)


class RowText:
    """What is told of a row's tokens: its pieces."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, texts: TokenTexts, asked: Generation
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, asked.prompt)
        self._stops = StopTexts(asked.stop)
        self._texts = texts
        # Of each token that is not told of yet, how many characters came before it.
        self._pending: list[tuple[int, Picked, bool]] = []
        self._seen = self._told = 0

    def add(self, picked: Picked, is_end: bool, is_last: bool) -> Piece | None:
        """The piece that ends with this token, if there is one."""
        self._pending.append((self._seen, picked, is_end))
        new = self._detokenizer.end() if is_end else self._detokenizer.add(picked.token)
        if is_last and not is_end:
            new += self._detokenizer.end()
        self._seen += len(new)
        text, stopped = self._stops.add(new)
        finish: Finish | None = "stop" if stopped or is_end else "length" if is_last else None
        if finish and not stopped:
            text += self._stops.end()
        self._told += len(text)
        if not text and finish is None:
            return None
        begun = [each for each in self._pending if each[0] < self._told]
        tokens = self._pending if finish else begun
        shown = begun if stopped else tokens
        logprobs = [self._logprob(each) for _, each, is_end in shown if not is_end]
        self._pending = self._pending[len(tokens) :]
        told = tuple(each for each in logprobs if each is not None)
        return Piece(text, len(tokens), told, finish)

    def _logprob(self, picked: Picked) -> TokenLogprob | None:
        if picked.logprob is None:
            return None
        top = tuple((self._texts[token], logprob) for token, logprob in picked.top)
        return TokenLogprob(self._texts[picked.token], picked.logprob, top)


def check_generation(asked: Generation) -> None:
    """Raise `IA3Error` where a value of a generation is out of its range."""
    if not asked.prompt:
        raise IA3Error("prompt is empty: expected at least one token")
    # Thousands of tokens, in the event loop: those that are right take no call each.
    for token in asked.prompt:
        if type(token) is not int or token < 0:
            whole("prompt", token, 0, expected="tokens' numbers, at least 0")
    whole("max_tokens", asked.max_tokens, 1)
    temperature = number("temperature", asked.temperature, expected := "a number of at least 0")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise IA3Error(f"temperature is {asked.temperature}, expected {expected}")
    if not 0 < number("top_p", asked.top_p, expected := "above 0 and up to 1") <= 1:
        raise IA3Error(f"top_p is {asked.top_p}, expected {expected}")
    if asked.logprobs is not None:
        whole("logprobs", asked.logprobs, 0)
    for stop in asked.stop:
        if not isinstance(stop, str):
            raise InvalidTypeError(f"stop has {shown(stop)}, expected texts")
        if not stop:
            raise IA3Error("stop has an empty text: expected at least one character")
