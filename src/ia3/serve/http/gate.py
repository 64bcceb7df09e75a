"""What a request has to pass before anything of it is read, and the end of one that takes too long.

Plain ASGI around the app: what is refused here costs no more than its head.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, TypeVar, cast

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .keys import EVERYTHING, Access, Keys
from .metrics import Metrics
from .refused import RefusedError, refusal

_Found = TypeVar("_Found")
_log = logging.getLogger("ia3.serve")


# Of a body that is not a form: parsing JSON holds up all other requests.
MOST_JSON = 8 * 2**20
# Bodies of all requests at once, in bytes, unless one may have more.
ALL_BODIES = 128 * 2**20
# So long a refused body is read on, and dropped: a client that still sends it would lose the answer
# with the connection.
DRAINING_SECONDS = 1.0
# The status, in logs and counts, of a request whose client did not wait for the answer.
GONE = 499


@dataclass(frozen=True)
class Limits:
    """What is taken at most.

    Attributes:
        waiting: texts, and texts to go on with, that wait for the model.
        body: bytes of a request's body.
        seconds: of a request, from its head to the end of its answer.
    """

    waiting: int = 512
    body: int = 32 * 2**20
    seconds: float = 300.0


class Gate:
    """Each request's id, key, limits, log line and counts, and the answer to a fault.

    Paths for which `is_open` is true want no key. With `loopback` the server is to be called by a
    name of this machine alone; pages of other `origins` than its own and these may change nothing.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        metrics: Metrics,
        keys: Keys | None,
        is_open: Callable[[str], bool],
        origins: Sequence[str] = (),
        loopback: bool = False,
    ) -> None:
        self.app = app
        self.limits = limits
        self.metrics = metrics
        self.keys = keys
        self.is_open = is_open
        self.origins = {*origins}
        self.loopback = loopback
        # Of bodies that are in memory.
        self._bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 0
        state = scope.setdefault("state", {})
        until = began + self.limits.seconds
        state.update(access=EVERYTHING, request_id=uuid.uuid4().hex, noted={}, until=until)
        body = _Body(self, Headers(scope=scope), receive, until)

        async def answered(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = state["request_id"]
                if not body.is_whole:
                    # Another request could not begin after what is left of it.
                    headers["connection"] = "close"
            elif not message.get("more_body", False) and not body.is_whole:
                await send({**message, "more_body": True})
                await body.drain()
                message = {"type": "http.response.body", "body": b"", "more_body": False}
            # A client that does not read would keep its answer here without end.
            async with asyncio.timeout(self.limits.seconds):
                await send(message)

        try:
            refused = self._refused(scope, state, body)
            if refused is None:
                # A load balancer may ask for the head alone; the server leaves the body out.
                is_head = scope["method"] == "HEAD"
                inner = {**scope, "method": "GET"} if is_head else scope
                await self.app(inner, body, answered)
            else:
                await refused.response()(scope, body, answered)
        except ClientDisconnect:
            pass  # amid its own body
        except Exception as error:
            if isinstance(error, TimeoutError) and status:
                _log.warning("a client does not read", extra={"id": state["request_id"]})
            else:
                _log.error("a fault", exc_info=error, extra={"id": state["request_id"]})
            if status:
                raise  # which closes the connection: the answer is not whole
            await refusal(error).response()(scope, body, answered)
        finally:
            body.forget()
            self._told(scope, state, status or GONE, time.monotonic() - began)

    def _refused(self, scope: Scope, state: dict[str, Any], body: _Body) -> RefusedError | None:
        try:
            self._check_caller(scope["method"], body.headers)
            state["access"] = self._access(scope, body.headers)
            body.check_length()
        except RefusedError as refused:
            return refused
        return None

    def _check_caller(self, method: str, headers: Headers) -> None:
        """Refuse what a browser sends for a page that somebody else made.

        A browser asks no one before it sends a form; and a page's own name may lead to this machine
        (DNS rebinding).
        """
        host = headers.get("host", "")
        if self.loopback and not _is_loopback(host):
            raise RefusedError(
                421,
                f"the server is called {host[:100]!r} here, and takes requests of this machine "
                "alone: call it localhost or 127.0.0.1, or start it with --host",
                code="wrong_host",
            )
        origin = headers.get("origin")
        if origin is None or method in ("GET", "HEAD", "OPTIONS"):
            return
        is_named = not self.origins.isdisjoint({origin, "*"})
        if not is_named and origin.partition("://")[2] != host:
            raise RefusedError(
                403,
                f"a page of {origin[:100]!r} may not call: start the server with --cors and this "
                "origin if it is to",
                code="wrong_origin",
            )

    def _access(self, scope: Scope, headers: Headers) -> Access:
        if self.keys is None or self.is_open(scope["path"]):
            return EVERYTHING
        kind, _, key = headers.get("authorization", "").partition(" ")
        found = self.keys.access(key.strip()) if kind.lower() == "bearer" else None
        if found is None:
            what = "this key is not known" if key else "there is no API key"
            raise RefusedError(
                401,
                f"{what}: send the header 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return found

    def hold(self, count: int) -> None:
        """Count bytes of a body that are in memory.

        Raises:
            RefusedError: so many more are too many.
        """
        if count > 0 and self._bytes + count > max(ALL_BODIES, self.limits.body):
            raise RefusedError(
                429,
                "the server has as many large requests as it takes: ask again in 1 s",
                code="too_many_bytes",
                headers={"retry-after": "1"},
            )
        self._bytes += count

    def _told(self, scope: Scope, state: dict[str, Any], status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", None) or "none"
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self.metrics.answered(route, method, status, seconds)
        access, level = state["access"], logging.INFO
        if status >= 500:
            level = logging.WARNING
        elif route in _QUIET:
            level = logging.DEBUG
        if _log.isEnabledFor(level):
            told = {"id": state["request_id"], "method": method, "route": route}
            told |= {"status": status, "seconds": round(seconds, 4)}
            told |= {"key": access.who} if access.who else {}
            _log.log(level, "request", extra=told | state["noted"])


def _is_loopback(host: str) -> bool:
    """Whether a `Host` header names this machine."""
    host = host.lower()
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ip_address(name.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


_METHODS = {"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"}
# Asked every few seconds by machines.
_QUIET = {"/healthz", "/readyz", "/metrics", "/v1/load", "/page/{name}"}


class _Body:
    """A request's body as it comes, up to so many bytes and until some time."""

    def __init__(self, gate: Gate, headers: Headers, receive: Receive, until: float) -> None:
        self.headers = headers
        self._gate = gate
        self._receive = receive
        self._until = until
        self._held = 0
        kind = headers.get("content-type", "").lower()
        is_form = kind.startswith("multipart/form-data")
        self._most = gate.limits.body if is_form else min(gate.limits.body, MOST_JSON)
        sent = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        self.is_whole = not sent

    def check_length(self) -> None:
        """Refuse a body whose head says that it is too large.

        Raises:
            RefusedError: so it is.
        """
        length = self.headers.get("content-length", "")
        # Not as a number first: it may have thousands of digits.
        digits = length.lstrip("0")
        if length.isdecimal() and (len(digits) > 18 or int(digits or "0") > self._most):
            raise self._too_large(length[:30])

    async def __call__(self) -> Message:
        if self.is_whole:
            return await self._receive()
        try:
            async with asyncio.timeout(max(0.0, self._until - time.monotonic())):
                message = await self._receive()
        except TimeoutError as error:
            raise RefusedError(408, "the body did not come in time", code="timeout") from error
        if message["type"] != "http.request":
            return message
        count = len(message.get("body", b""))
        if self._held + count > self._most:
            raise self._too_large(f"more than {self._most:,}")
        self._gate.hold(count)
        self._held += count
        self.is_whole = not message.get("more_body", False)
        return message

    async def drain(self) -> None:
        """Read on what is refused, for a moment."""
        if "expect" in self.headers:
            return  # the client has not sent it yet
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAINING_SECONDS):
                while (await self._receive()).get("more_body", False):
                    pass

    def forget(self) -> None:
        """It is in memory no more."""
        self._gate.hold(-self._held)
        self._held = 0

    def _too_large(self, found: str) -> RefusedError:
        more = ", or start the server with a larger --max-body"
        return RefusedError(
            413,
            f"the body has {found} bytes, and {self._most:,} are taken: send less in a request"
            + (more if self._most == self._gate.limits.body else ""),
            code="body_too_large",
        )


def too_slow(seconds: float) -> RefusedError:
    return RefusedError(
        503,
        f"there was no answer within {seconds:g} seconds: ask for less in a request, or start "
        "the server with a larger --timeout",
        code="timeout",
    )


def seconds_left(request: Request) -> float:
    """Until the request has taken as long as it may."""
    return max(0.0, cast(float, request.state.until) - time.monotonic())


async def within(request: Request, limits: Limits, work: Awaitable[_Found]) -> _Found:
    """What the work gives; it is cancelled where that takes too long, or the client has gone.

    Raises:
        RefusedError: it took too long.
        ClientGoneError: the client closed the connection.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        done, _ = await asyncio.wait(
            {task, gone},
            timeout=seconds_left(request),
            return_when=asyncio.FIRST_COMPLETED,
        )
        if task in done:
            return task.result()
        if gone in done:
            raise ClientGoneError
        raise too_slow(limits.seconds)
    finally:
        for each in (task, gone):
            if not each.done():
                each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class ClientGoneError(Exception):
    """Nobody reads the answer any more."""


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
