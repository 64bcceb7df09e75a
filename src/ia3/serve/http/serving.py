"""What the routes of the server share: the engine, the adapters, limits and counts."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from ...errors import IA3Error
from ..engine.interface import Engine
from .gate import Limits
from .keys import Access
from .metrics import Metrics
from .openai import Prompts
from .refused import RefusedError, refusal
from .registry import Registry, Served

# Of a client that is to ask again, in seconds.
SOONEST, LATEST = 1, 60


@dataclass(eq=False)
class Serving:
    """The state of a server.

    Attributes:
        log_texts: whether logs may hold texts.
        closing: whether it is being shut down.
        began: when, in seconds since 1970.
    """

    engine: Engine
    registry: Registry
    limits: Limits
    log_texts: bool = False
    closing: bool = False
    began: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        # Of all requests: they wait, or are computed.
        self._texts = 0
        self.metrics = Metrics(self.engine, self.registry)
        self.prompts = {base.name: Prompts(base) for base in self.registry.bases if base.generates}

    @contextmanager
    def room(self, texts: int) -> Iterator[None]:
        """Within the context so many texts wait for the model, or are computed.

        Raises:
            RefusedError: more would wait than are taken.
        """
        most = self.limits.waiting
        if texts > most:
            raise RefusedError(400, f"{texts:,} texts in a request: at most {most:,} are taken")
        waiting = max(0, self._texts - self.engine.load().running)
        if waiting + texts > most:
            soon = str(self._retry_after(waiting))
            raise RefusedError(
                429,
                f"{waiting:,} texts wait already, of at most {most:,}: ask again in {soon} s",
                code="queue_full",
                headers={"retry-after": soon},
            )
        self._texts += texts
        try:
            yield
        finally:
            self._texts -= texts

    def _retry_after(self, waiting: int) -> int:
        rate = self.metrics.texts_rate.a_second()
        return max(SOONEST, min(LATEST, round(waiting / rate))) if rate else SOONEST

    def refusal(self, error: Exception) -> RefusedError:
        """The answer to a request that raised this."""
        refused = refusal(error, closing=self.closing)
        refused.args = (self.registry.without_places(str(refused)),)
        return refused

    async def use(self, adapters: Iterable[Served]) -> dict[str, IA3Error]:
        """Have the banks know these adapters; returns, by name, why one cannot be used."""
        unread = {each.name: each for each in adapters if not self.registry.is_ready(each)}
        return await run_in_threadpool(self._use, unread) if unread else {}

    def _use(self, adapters: Mapping[str, Served]) -> dict[str, IA3Error]:
        failed: dict[str, IA3Error] = {}
        for name, served in adapters.items():
            try:
                self.registry.use(served)
            except IA3Error as error:
                failed[name] = error
        return failed


def access_of(request: Request) -> Access:
    """What a request may use."""
    return cast(Access, request.state.access)


def note(request: Request, **values: Any) -> None:
    """Have values in the request's line of the log."""
    request.state.noted.update(values)


def check_all(request: Request, what: str) -> None:
    """Refuse a request whose key may not change what is served.

    Raises:
        RefusedError: it may use some adapters only.
    """
    if not access_of(request).all:
        raise RefusedError(
            403, f"this key may use adapters, and not {what}: that takes a key for all ('*')"
        )


async def only(stream: AsyncIterator[Any]) -> Any:
    """The one value of a stream.

    Raises:
        IA3Error: there is none.
    """
    async with aclosing(cast(Any, stream)) as closed_in_the_end:
        async for value in closed_in_the_end:
            return value
    raise IA3Error("there was no answer")
