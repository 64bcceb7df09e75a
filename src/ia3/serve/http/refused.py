"""What the server answers where it cannot do what was asked: OpenAI's shape of an error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.responses import Response

from ...errors import IA3Error, StateError, UnknownNameError


class RefusedError(IA3Error):
    """A request that is answered with an error.

    Args:
        status: HTTP's.
        message: what is wrong, what was expected, and what mends it.
        param: which part of the request is meant.
        code: the kind of error, for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """What is sent: `{"error": {"message", "type", "param", "code"}}`."""
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else _INVALID)
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSON:
        return JSON(self.body(), self.status, self.headers)


class JSON(Response):
    """A value as JSON. Half of a surrogate pair in it becomes an escape, which JSON has too."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encoded(content)


def encoded(content: Any) -> bytes:
    """JSON in UTF-8, without spaces."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return text.encode(errors="backslashreplace")


_INVALID = "invalid_request_error"
_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def refusal(error: Exception, *, closing: bool = False) -> RefusedError:
    """The answer to a request that raised this; `closing`, the server is being shut down."""
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, UnknownNameError):
        return RefusedError(404, str(error), code="model_not_found")
    if isinstance(error, StateError):
        return RefusedError(503 if closing else 409, str(error), code="not_now")
    if isinstance(error, IA3Error):
        return RefusedError(400, str(error))
    if isinstance(error, OSError):
        return RefusedError(503, f"a file could not be read or written: {error.strerror or error}")
    return RefusedError(
        500, "this is a fault of the server: its log has more under the request's id"
    )


def of_status(status: int, message: str) -> RefusedError:
    """The answer of a status alone, as for an address that there is not."""
    return RefusedError(status, message or HTTPStatus(status).phrase)
