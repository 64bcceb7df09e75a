"""The engine of this project: a thread for each base model, which batches what waits for it.

The thread goes round: those that wait join the running batch, each running generation gets a token,
and one batch of texts is classified.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, overload

from ...base.threads import OFTEN, Threads
from ...classify.engine import ENCODER
from ...classify.mixed import Classified
from ...errors import IA3Error, StateError
from ...tfew.prompts.labels import Text
from .bases import ServedBase
from .classification import answers
from .generation import RunningBatch
from .interface import Classification, Generation, Load, Piece, check_lengths
from .rows import Row, check_generation

# Texts that are classified at once, and between two tokens of generations that run.
MOST_TEXTS = 64
TEXTS_BESIDE = 8
# In seconds: `close` waits so long for what is being computed.
LONGEST_STEP = 10.0

_Event = TypeVar("_Event")


class LocalEngine:
    """Serves a base model of this process; see `Engine`."""

    def __init__(self, served: ServedBase) -> None:
        self.served = served
        self._worker = _Worker(served)

    @overload
    def submit(self, request: Generation) -> AsyncIterator[Piece]: ...
    @overload
    def submit(self, request: Classification) -> AsyncIterator[list[Classified | IA3Error]]: ...
    def submit(self, request: Generation | Classification) -> AsyncIterator[Any]:
        if isinstance(request, Generation):
            return self._generate(request)
        return self._classify(request)

    async def _generate(self, asked: Generation) -> AsyncIterator[Piece]:
        check_generation(asked)
        if self._worker.batch is None:
            raise IA3Error(
                f"adapter {asked.adapter!r} is of the sentence encoder {self.served.name!r}, which "
                "generates no text: classify with it"
            )
        stream = _Stream[Piece]()
        self._worker.add(_Generating(stream, asked))
        try:
            while not (piece := await stream.get()).finish:
                yield piece
            yield piece
        finally:
            stream.cancel()
            self._worker.forget_cancelled()

    async def _classify(self, asked: Classification) -> AsyncIterator[list[Classified | IA3Error]]:
        check_lengths(asked)
        stream = _Stream[list[Classified | IA3Error]]()
        texts, names = [*asked.texts], [*asked.adapters]
        self._worker.add(_Classifying(stream, texts, names, asked.untuned))
        try:
            yield await stream.get()
        finally:
            stream.cancel()
            self._worker.forget_cancelled()

    def load(self) -> Load:
        return self._worker.load()

    def close(self) -> None:
        self._worker.close()


class _Stream(Generic[_Event]):
    """What a thread tells one that waits in the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events = asyncio.Queue[_Event | Exception]()
        self.is_cancelled = False

    def tell(self, event: _Event | Exception) -> None:
        # The loop may have been closed.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def get(self) -> _Event:
        event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        return event

    def cancel(self) -> None:
        self.is_cancelled = True


@dataclass(eq=False)
class _Generating:
    stream: _Stream[Piece]
    asked: Generation


@dataclass(eq=False)
class _Classifying:
    """Texts of one call; `answers` are those of the first ones, and `now` more are computed."""

    stream: _Stream[list[Classified | IA3Error]]
    texts: Sequence[Text]
    names: Sequence[str]
    untuned: bool
    answers: list[Classified | IA3Error] = field(default_factory=list)
    now: int = 0

    @property
    def waiting(self) -> int:
        return len(self.texts) - len(self.answers) - self.now


_Request = _Generating | _Classifying


class _Worker:
    def __init__(self, served: ServedBase) -> None:
        self.served = served
        self.batch = None if served.kind == ENCODER else RunningBatch(served)
        self._changed = threading.Condition()
        self._generations: deque[_Generating] = deque()
        self._classifications: deque[_Classifying] = deque()
        # Those that run, and the texts that are classified now.
        self._streams: dict[Row, _Stream[Piece]] = {}
        self._texts = 0
        self._threads = [Threads(anew=OFTEN) for _ in range(MOST_TEXTS.bit_length() + 1)]
        self._batches = self._batched = 0
        self._closed = False
        name = f"engine of {served.name}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    # -- from the event loop -----------------------------------------------------------------------

    def add(self, request: _Generating | _Classifying) -> None:
        with self._changed:
            if self._closed:
                raise StateError("the server is shutting down")
            if isinstance(request, _Generating):
                self._generations.append(request)
            else:
                self._classifications.append(request)
            self._changed.notify()

    def forget_cancelled(self) -> None:
        """Have what nobody waits for any more wait no more."""
        with self._changed:
            self._generations = deque(r for r in self._generations if not r.stream.is_cancelled)
            self._classifications = deque(
                r for r in self._classifications if not r.stream.is_cancelled
            )

    def load(self) -> Load:
        with self._changed:
            texts = sum(request.waiting for request in self._classifications)
            waiting = len(self._generations) + texts
            running = len(self._streams) + self._texts
            return Load(running, waiting, self._batches, self._batched)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        # A thread that computes while the interpreter ends may abort the process.
        self._thread.join(LONGEST_STEP)

    # -- the thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._has_work():
            try:
                self._join()
                self._step()
                self._classify()
            except Exception as error:
                # None that is known. Whoever waits is told, and the next ones are served.
                self._end(error)
        self._end(StateError("the server has shut down"))

    def _has_work(self) -> bool:
        """Wait for work; false where there is to be none any more."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or self._streams or self._generations or self._classifications
            )
            return not self._closed

    def _end(self, error: Exception) -> None:
        """Have nothing run or wait any more."""
        with self._changed:
            streams: list[_Stream[Any]] = [*self._streams.values()]
            streams += [request.stream for request in self._generations]
            streams += [request.stream for request in self._classifications]
            self._streams.clear()
            self._generations.clear()
            self._classifications.clear()
            self._texts = 0
        for stream in streams:
            stream.tell(error)
        if self.batch is not None:
            self.batch.forget()

    def _join(self) -> None:
        """Have generations that wait run, as many as there is room for."""
        while self.batch is not None:
            with self._changed:
                if not self._generations or not self.batch.has_room(self._generations[0].asked):
                    return
                request = self._generations.popleft()
                row = Row(request.asked, self._tell, self._over(request.stream))
                self._streams[row] = request.stream
            try:
                self.batch.join(row)
            except Exception as error:
                self._leave(row).tell(error)

    def _over(self, stream: _Stream[Piece]) -> Callable[[], bool]:
        return lambda: stream.is_cancelled or self._closed

    def _tell(self, row: Row, piece: Piece) -> None:
        stream = self._streams[row] if piece.finish is None else self._leave(row)
        stream.tell(piece)

    def _leave(self, row: Row) -> _Stream[Piece]:
        """Have a row run no longer, before it is told so."""
        with self._changed:
            return self._streams.pop(row)

    def _step(self) -> None:
        """Get a token for each running generation."""
        if self.batch is None or not self.batch.rows:
            return
        self._batches += 1
        self._batched += len(self.batch.rows)
        for row, error in self.batch.step():
            self._leave(row).tell(error)
        running = set(self.batch.rows)
        for row in [row for row in self._streams if row not in running]:
            self._leave(row)

    def _classify(self) -> None:
        """Classify some of the texts that wait."""
        parts = self._next_texts()
        if not parts:
            return
        self._batches += 1
        self._batched += self._texts
        try:
            self._answer(parts)
        except Exception:
            # One request's error is no other's.
            for request in parts:
                try:
                    self._answer([request])
                except Exception as error:
                    request.stream.tell(error)
                    request.stream.cancel()
        with self._changed:
            self._texts = 0
        self.forget_cancelled()

    def _next_texts(self) -> list[_Classifying]:
        """The requests whose texts are classified next, each with how many in `now`."""
        parts: list[_Classifying] = []
        with self._changed:
            most = TEXTS_BESIDE if self._streams else MOST_TEXTS
            for request in self._classifications:
                room = most - self._texts
                if room == 0 or request.untuned != self._classifications[0].untuned:
                    break
                request.now = min(room, request.waiting)
                self._texts += request.now
                parts.append(request)
        return parts

    def _answer(self, parts: Sequence[_Classifying]) -> None:
        texts: list[Text] = []
        names: list[str] = []
        for request in parts:
            part = slice(len(request.answers), len(request.answers) + request.now)
            texts += request.texts[part]
            names += request.names[part]
        threads = self._threads[len(texts).bit_length()]
        found = iter(
            threads.step(lambda: answers(self.served, texts, names, parts[0].untuned), len(texts))
        )
        for request in parts:
            with self._changed:
                request.answers += [next(found) for _ in range(request.now)]
                self._texts -= request.now
                request.now = 0
                is_last = not request.waiting
                if request in self._classifications:
                    self._classifications.remove(request)
                    if not is_last:  # the next ones need not wait for all of it
                        self._classifications.append(request)
            if is_last:
                request.stream.tell(request.answers)
