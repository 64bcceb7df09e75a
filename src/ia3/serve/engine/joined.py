"""The engines of several base models as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import fields, replace
from typing import Any, overload

from ...classify.mixed import Classified
from ...errors import IA3Error, StateError
from .interface import (
    BaseEngine,
    Classification,
    Generation,
    Load,
    Piece,
    check_lengths,
    no_adapter,
)


class JoinedEngine:
    """Has each request computed by the engine whose base model its adapter is of; see `Engine`."""

    def __init__(self, engines: Sequence[BaseEngine]) -> None:
        self.engines = [*engines]

    @overload
    def submit(self, request: Generation) -> AsyncIterator[Piece]: ...
    @overload
    def submit(self, request: Classification) -> AsyncIterator[list[Classified | IA3Error]]: ...
    def submit(self, request: Generation | Classification) -> AsyncIterator[Any]:
        if isinstance(request, Classification):
            return self._classify(request)
        engine = self._generator(request.adapter)
        # The engine's own stream: what stood between would cost time at each token.
        return _raising(engine) if isinstance(engine, IA3Error) else engine.submit(request)

    def load(self) -> Load:
        loads = [engine.load() for engine in self.engines]
        return Load(*(sum(getattr(load, each.name) for load in loads) for each in fields(Load)))

    def close(self) -> None:
        with ExitStack() as closed:  # all of them, also where one raises
            for engine in self.engines:
                closed.callback(engine.close)

    def _owner(self, name: str) -> BaseEngine | None:
        return next((engine for engine in self.engines if name in engine.served.bank), None)

    def _generator(self, adapter: str | None) -> BaseEngine | IA3Error:
        if adapter is not None:
            return self._owner(adapter) or no_adapter(adapter)
        able = (engine for engine in self.engines if engine.served.generates)
        none = IA3Error("no language model is served: sentence encoders generate no text")
        return next(able, none)

    async def _classify(self, asked: Classification) -> AsyncIterator[list[Classified | IA3Error]]:
        check_lengths(asked)
        found: list[Classified | IA3Error] = [StateError("not computed")] * len(asked.texts)
        of_engines: dict[BaseEngine, list[int]] = {}
        for place, name in enumerate(asked.adapters):
            engine = self._owner(name)
            if engine is None:
                found[place] = no_adapter(name)
            else:
                of_engines.setdefault(engine, []).append(place)
        parts = [_answers(engine, _part(asked, rows)) for engine, rows in of_engines.items()]
        for places, answers in zip(of_engines.values(), await asyncio.gather(*parts), strict=True):
            for place, answer in zip(places, answers, strict=True):
                found[place] = answer
        yield found


def _part(asked: Classification, places: Sequence[int]) -> Classification:
    texts = [asked.texts[place] for place in places]
    return replace(asked, texts=texts, adapters=[asked.adapters[place] for place in places])


async def _answers(engine: BaseEngine, asked: Classification) -> list[Classified | IA3Error]:
    stream: Any = engine.submit(asked)
    async with aclosing(stream):
        answers: list[Classified | IA3Error] = await anext(stream)
        return answers


async def _raising(error: IA3Error) -> AsyncIterator[Any]:
    raise error
    yield
