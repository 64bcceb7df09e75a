"""`/v1/models`, `/v1/completions` and `/v1/chat/completions`: OpenAI's routes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from typing import Any, Self, cast

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ...errors import IA3Error
from ..engine.bases import ServedBase
from ..engine.interface import Piece
from .gate import seconds_left, too_slow, within
from .keys import Access
from .openai import Answer, Prompts, failed, generations, model_entry, pieces
from .refused import JSON, RefusedError
from .registry import Served
from .schemas import Chat, Completion
from .serving import Serving, access_of, note

# In characters: longer prompts are encoded beside the event loop. A message is some by itself.
SHORT = 4096
MESSAGE = 16

_log = logging.getLogger("ia3.serve")


def openai_router(serving: Serving) -> APIRouter:
    router = APIRouter(tags=["openai"])

    @router.get("/v1/models")
    async def models(request: Request) -> Response:
        """The base models and every adapter."""
        return JSON(await run_in_threadpool(_models, serving, access_of(request)))

    @router.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        """A base model or an adapter."""
        base, served = _model(serving, request, name)
        entry = (served.name, base.name, served.kind) if served else (name, "ia3", base.kind)
        return JSON(model_entry(*entry, serving.began))

    @router.post("/v1/completions")
    async def completions(request: Request, asked: Completion) -> Response:
        """Go on with a text."""
        return await _answered(serving, request, asked)

    @router.post("/v1/chat/completions")
    async def chat(request: Request, asked: Chat) -> Response:
        """Answer in a chat."""
        return await _answered(serving, request, asked)

    return router


def _models(serving: Serving, access: Access) -> dict[str, Any]:
    registry, began = serving.registry, serving.began
    entries = [
        model_entry(base.name, "ia3", base.kind, began)
        for base in registry.bases
        if access.may_use(base.name)
    ]
    entries += [model_entry(s.name, s.base.name, s.kind, began) for s in registry.list(access)]
    return {"object": "list", "data": entries}


def _model(serving: Serving, request: Request, name: str) -> tuple[ServedBase, Served | None]:
    """The base model of this name, or an adapter and its base model."""
    registry, access = serving.registry, access_of(request)
    base = registry.base_named(name, access)
    if base is not None:
        return base, None
    served = registry.find(name, access)
    return served.base, served


async def _answered(serving: Serving, request: Request, asked: Completion | Chat) -> Response:
    base, served = _model(serving, request, asked.model)
    if not base.generates:
        what = f"{asked.model!r} is on a sentence encoder, which cannot go on with a text"
        raise RefusedError(400, f"{what}: ask it with POST /v1/classify", param="model")
    note(request, model=asked.model, stream=bool(asked.stream))
    if serving.log_texts:
        note(request, asked=asked.model_dump(exclude_none=True))
    answering = _Answering(serving, request, asked, base, served)
    if not asked.stream:
        return JSON(await within(request, serving.limits, answering.whole()))
    # Up to the first piece an error has a status of its own.
    first = await within(request, serving.limits, answering.begin())
    return _Stream(answering, first)


class _Answering:
    """A request that is being answered; after its context nothing is computed for it."""

    def __init__(
        self,
        serving: Serving,
        request: Request,
        asked: Completion | Chat,
        base: ServedBase,
        served: Served | None,
    ) -> None:
        self._serving = serving
        self._request = request
        self._asked = asked
        self._base = base
        self._served = served
        self._open = AsyncExitStack()

    async def begin(self) -> tuple[int, Piece]:
        """Have the engine begin; returns the first piece. Where there is none, all is closed."""
        async with AsyncExitStack() as closing:
            serving, served = self._serving, self._served
            prompts = await _prompts(serving.prompts[self._base.name], self._asked)
            wanted = generations(self._asked, prompts, None if served is None else served.name)
            closing.enter_context(serving.room(len(wanted)))
            if served is not None:
                for error in (await serving.use([served])).values():
                    raise error
            self._answer = Answer(self._asked, wanted)
            serving.metrics.prompt(self._answer.prompt_tokens)
            coming = cast(Any, pieces(serving.engine, wanted))
            self._coming = await closing.enter_async_context(aclosing(coming))
            first = await self._next()
            if first is None:
                raise IA3Error("there was no answer")
            self._open = closing.pop_all()
            return first

    async def whole(self) -> dict[str, Any]:
        found: tuple[int, Piece] | None = await self.begin()
        async with self:
            while found is not None:
                self._answer.add(*found)
                found = await self._next()
            return self._answer.whole()

    async def events(self, first: tuple[int, Piece]) -> AsyncIterator[bytes]:
        """What a stream sends; an error is its last event."""
        answer, serving = self._answer, self._serving
        try:
            for said in (*answer.begin(), *answer.piece(*first)):
                yield said
            # Not around a `yield`: that is where the client is waited for.
            while (found := await self._next(seconds_left(self._request))) is not None:
                for said in answer.piece(*found):
                    yield said
            for said in answer.end():
                yield said
        except TimeoutError:
            yield failed(too_slow(serving.limits.seconds))
        except Exception as error:
            if not isinstance(error, IA3Error):
                _log.error("a fault", exc_info=error, extra={"stream": True})
            yield failed(serving.refusal(error))

    async def _next(self, seconds: float | None = None) -> tuple[int, Piece] | None:
        async with asyncio.timeout(seconds):
            found = await anext(self._coming, None)
        if found is not None:
            self._serving.metrics.generated(found[1].tokens)
        return cast("tuple[int, Piece] | None", found)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        note(self._request, tokens=self._answer.generated)
        await self._open.aclose()


async def _prompts(prompts: Prompts, asked: Completion | Chat) -> list[tuple[int, ...]]:
    def encode() -> list[tuple[int, ...]]:
        if isinstance(asked, Completion):
            return prompts.of_completion(asked)
        return [prompts.of_chat(asked)]

    if isinstance(asked, Completion):
        short = isinstance(asked.prompt, str) and len(asked.prompt) < SHORT
    else:
        short = sum(MESSAGE + len(message.text) for message in asked.messages) < SHORT
    return encode() if short else await run_in_threadpool(encode)


class _Stream(StreamingResponse):
    """Events (SSE); the answering ends with the connection."""

    def __init__(self, answering: _Answering, first: tuple[int, Piece]) -> None:
        self._answering = answering
        self._events = answering.events(first)
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(self._events, headers=headers, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Also where the client has gone before the first event was sent.
        async with self._answering, aclosing(cast(Any, self._events)):
            await super().__call__(scope, receive, send)
