"""The server's app: all routes behind one gate, and the errors that they raise as answers."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse, Response

from ... import __version__
from ...errors import IA3Error, shown
from ..engine.interface import Engine
from .adapter_routes import adapters_router
from .classify_routes import classify_router
from .gate import GONE, ClientGoneError, Gate, Limits
from .keys import Keys
from .learning import Learning, learning_router
from .metrics import CONTENT_TYPE
from .openai_routes import openai_router
from .page_files import page_router
from .refused import JSON, RefusedError, of_status
from .registry import Registry
from .schemas import Busy, Error
from .serving import Serving, check_all

# So long a start waits for what the adapters' files say; the rest is looked at while it answers.
LOOKING_SECONDS = 2.0

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Error, "description": "What is wrong with the request."},
    "5XX": {"model": Error, "description": "Not now, or a fault of the server."},
}


@dataclass(frozen=True)
class Settings:
    """What an app is started with.

    Attributes:
        limits: what is taken at most.
        keys: the API keys; `None` asks for none.
        cors: the origins whose pages may call.
        train: whether tasks may be learned.
        log_texts: whether logs may hold texts.
        loopback: whether it listens to this machine alone.
    """

    limits: Limits = field(default_factory=Limits)
    keys: Keys | None = None
    cors: Sequence[str] = ()
    train: bool = True
    log_texts: bool = False
    loopback: bool = False


def create_app(engine: Engine, registry: Registry, settings: Settings) -> FastAPI:
    """The app that serves a registry's adapters by an engine. Its end closes both.

    `app.state.stop` begins the end, where connections that are open are to be waited for.
    """
    serving = Serving(engine, registry, settings.limits, settings.log_texts)
    learning = _learning(registry) if settings.train else None

    async def stop() -> None:
        """Begin to end: what is computed is finished, and a training is not."""
        serving.closing = True
        registry.close()
        if learning is not None:
            await learning.close()

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(registry.look, LOOKING_SECONDS)
        yield
        await stop()
        await run_in_threadpool(engine.close)

    app = FastAPI(
        title="ia3",
        version=__version__,
        lifespan=life,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses=_ERRORS,
    )
    app.state.serving, app.state.stop = serving, stop
    _describe_without_422(app)
    for handled in (ClientGoneError, HTTPException, RequestValidationError, IA3Error, OSError):
        app.add_exception_handler(handled, _answer_to(serving))
    routers = [classify_router, openai_router, adapters_router, _state_router]
    for make in routers:
        app.include_router(make(serving))
    if learning is not None:
        may_learn = [Depends(_may_learn)]
        app.include_router(learning_router(learning), dependencies=may_learn)
    app.include_router(page_router())
    app.add_middleware(
        Gate,
        limits=settings.limits,
        metrics=serving.metrics,
        keys=settings.keys,
        is_open=_is_open,
        origins=settings.cors,
        loopback=settings.loopback,
    )
    # Around the gate: a page has to be able to read what was refused, and asks without a key first.
    if settings.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=[*settings.cors],
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["authorization", "content-type"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return app


def _may_learn(request: Request) -> None:
    check_all(request, "learn tasks")


def _describe_without_422(app: FastAPI) -> None:
    """What FastAPI would answer to a wrong body is answered as 400 here."""
    described = app.openapi

    def openapi() -> dict[str, Any]:
        found = described()
        for path in found["paths"].values():
            for route in path.values():
                route["responses"].pop("422", None)
        return found

    app.openapi = openapi  # type: ignore[method-assign]


def _is_open(path: str) -> bool:
    """Whether a path wants no key: whether the server lives, and the page, which asks for one."""
    return path in ("/", "/healthz", "/readyz", "/favicon.ico") or path.startswith("/page/")


def _state_router(serving: Serving) -> APIRouter:
    router = APIRouter(tags=["state"])

    @router.get("/healthz")
    async def healthz() -> Response:
        """The process lives."""
        return JSON({"status": "ok"})

    @router.get("/readyz")
    async def readyz() -> Response:
        """It takes requests."""
        if serving.closing:
            raise RefusedError(503, "the server is shutting down", code="closing")
        return JSON({"status": "ready"})

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counts, in Prometheus' format."""
        # The banks are asked, which may be busy.
        text = await run_in_threadpool(serving.metrics.text)
        return Response(text, media_type=CONTENT_TYPE)

    @router.get("/v1/load", response_model=Busy)
    async def load() -> Response:
        """How busy the server is."""
        busy, metrics = serving.engine.load(), serving.metrics
        return JSON(
            {
                "running": busy.running,
                "waiting": busy.waiting,
                "tokens_per_second": metrics.tokens_rate.a_second(),
                "texts_per_second": metrics.texts_rate.a_second(),
                "resident": len(await run_in_threadpool(serving.registry.resident)),
                "adapters": len(serving.registry),
            }
        )

    return router


def _learning(registry: Registry) -> Learning:
    async def adopt(name: str, files: Mapping[str, bytes]) -> None:
        await run_in_threadpool(registry.put, name, files, replace=False)

    def refuse(name: str) -> None:
        registry.check_new(name, replace=False)

    return Learning(registry.bases, adopt, refuse)


def _answer_to(serving: Serving) -> Any:
    """What handles an exception: an answer in OpenAI's shape, never a trace."""

    async def handle(request: Request, error: Exception) -> Response:
        if isinstance(error, ClientGoneError):
            return Response(status_code=GONE)
        if isinstance(error, RequestValidationError):
            return _invalid(error).response()
        if isinstance(error, HTTPException):
            cause = error.__cause__
            if isinstance(cause, RefusedError):
                return cause.response()
            refused = of_status(error.status_code, str(error.detail))
            refused.headers.update(error.headers or {})
            return refused.response()
        return serving.refusal(error).response()

    return handle


def _invalid(error: RequestValidationError) -> RefusedError:
    """What is wrong with a body, in words; the first of several."""
    found = error.errors()
    field = _place(found[0])[:1]
    # Of the kinds that may stand there, what the value came nearest to says most.
    first = max((each for each in found if _place(each)[:1] == field), key=lambda e: len(_place(e)))
    where = _place(first)
    param, place = where[0] if where else None, ".".join(where)
    expected = [str(each["msg"]) for each in found if _place(each) == where]
    others = len({(*_place(each)[:1],) for each in found}) - 1
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return RefusedError(400, f"the body is not JSON: {reason}".rstrip(": "))
    if first["type"] == "missing":
        said = f"{place or 'the body'} is missing"
    elif first["type"] == "extra_forbidden":
        said = f"{place} means nothing here"
    elif where:
        said = f"{place} is {shown(first.get('input'))}: {_in_words(expected)}"
    elif first["type"] == "value_error":
        said = _in_words(expected)
    else:
        said = "the body is no JSON object, sent as 'Content-Type: application/json'"
    more = f" (and {others} more to correct)" if others else ""
    return RefusedError(400, f"{said}{more}", param=param)


def _place(fault: Any) -> list[str]:
    """Where in a body; without the names of the kinds that were tried there."""
    _, *parts = fault["loc"]
    return [str(part) for part in parts if isinstance(part, int) or _FIELD.fullmatch(part)]


def _in_words(messages: Sequence[str]) -> str:
    said = dict.fromkeys(message.removeprefix("Value error, ") for message in messages)
    begin = "Input should be "
    if all(message.startswith(begin) for message in said):
        return "expected " + ", or ".join(message.removeprefix(begin) for message in said)
    return "; or ".join(said)


# No kind of Python's or pydantic's.
_FIELD = re.compile(r"(?!(?:str|int|float|bool|none|constrained)\b)[a-z_]+")
