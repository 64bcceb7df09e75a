"""What the server asks of an engine: to generate, or to classify, with any adapter."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, overload

from ...classify.mixed import Classified
from ...errors import IA3Error, UnknownNameError, shown
from ...tfew.prompts.labels import Text
from .bases import ServedBase

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Generation:
    """A text to go on with.

    Attributes:
        prompt: token ids, `[length]`, at least one.
        adapter: a name, or `None` for the base model.
        max_tokens: how many tokens at most, 1 or more.
        temperature: what scores are divided by before a token is drawn; 0 takes the likeliest.
        top_p: only the likeliest tokens are drawn that have so much probability together, above 0
            and up to 1.
        seed: of the draws; `None` draws anew each time. The same seed gives the same tokens,
            whoever else is in the batch.
        stop: the text ends before the first of these.
        logprobs: how many likeliest tokens are told of each place, or `None`.
    """

    prompt: tuple[int, ...]
    adapter: str | None
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """A token that was generated, its log-probability, and the likeliest ones at its place.

    Log-probabilities are those of the model, before temperature and `top_p`.
    """

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What a generation has come to since the last piece.

    Attributes:
        text: whole characters only; an end that may yet become a stop text is held back.
        tokens: how many tokens were generated for it, the one that ends a text included.
        logprobs: of these tokens, where they were asked for, less the one that ends the text and
            those behind a stop text.
        finish: why the text ends with this piece, or `None` where it goes on.
    """

    text: str
    tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None


@dataclass(frozen=True)
class Classification:
    """Texts to classify, each with the adapter that is to do it, `[texts]`.

    With `untuned`, each is asked of the base model without the adapter's vectors: in the adapter's
    templates, for its choices. A sentence encoder has no such answer.
    """

    texts: Sequence[Text]
    adapters: Sequence[str]
    untuned: bool = False


@dataclass(frozen=True)
class Load:
    """How busy an engine is: texts that are being computed, and those that wait.

    `batches` are those that it has computed since it began, and `batched` the texts in them; a
    generation is in one for each of its tokens.
    """

    running: int
    waiting: int
    batches: int = 0
    batched: int = 0


def no_adapter(name: str) -> UnknownNameError:
    """What is raised for an adapter that there is not; a client may not know of the others."""
    return UnknownNameError(f"no adapter {shown(name)} here")


def check_lengths(asked: Classification) -> None:
    """Raise `IA3Error` where there is not one adapter a text."""
    if len(asked.texts) != len(asked.adapters):
        raise IA3Error(
            f"there are {len(asked.adapters)} adapters and {len(asked.texts)} texts: expected "
            "one each"
        )


class Engine(Protocol):
    """Computes what it is given, many requests at once.

    A stream that is closed before its end (`aclose()`) is computed no further. Errors are raised by
    the stream: `UnknownNameError` for a generation's adapter, `StateError` where an adapter cannot
    be loaded or the engine shuts down, `IA3Error` for what cannot be computed so.
    """

    @overload
    def submit(self, request: Generation) -> AsyncIterator[Piece]: ...
    @overload
    def submit(self, request: Classification) -> AsyncIterator[list[Classified | IA3Error]]: ...
    def submit(self, request: Generation | Classification) -> AsyncIterator[object]:
        """A generation's pieces; of a classification one list, `[texts]`.

        A text that cannot be classified has the error in its place; the others have their answers.
        """
        ...

    def load(self) -> Load: ...

    def close(self) -> None:
        """Finish nothing more: streams that are open raise `StateError`."""
        ...


class BaseEngine(Engine, Protocol):
    """An engine of one base model, whose bank has the adapters that it is asked for."""

    served: ServedBase
