"""The page: files that a browser gets as they are."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from importlib.resources import files

from fastapi import APIRouter, Request, Response

from ...errors import MissingFileError, UnknownNameError
from ...files.examples import EXAMPLE, example_folder

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "csv": "text/csv; charset=utf-8",
}
# Nothing from elsewhere, no script but the page's own files, and no frame around it.
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # A browser asks each time whether its copy is still the one.
    "Cache-Control": "no-cache",
}


def page_router() -> APIRouter:
    """`GET /` and `GET /page/{name}`: the files of this folder's `page`, read once."""
    router = APIRouter(include_in_schema=False)
    folder = files("ia3.serve") / "page"
    contents = {each.name: each.read_bytes() for each in folder.iterdir() if each.is_file()}
    with suppress(MissingFileError):  # the page can do without
        contents[f"{EXAMPLE}.csv"] = (example_folder() / "train.csv").read_bytes()

    tags = {name: f'"{hashlib.sha256(c).hexdigest()[:16]}"' for name, c in contents.items()}

    def answer(name: str, request: Request) -> Response:
        kind = _TYPES.get(name.rpartition(".")[2])
        if name not in contents or kind is None:
            raise UnknownNameError(f"no file {name!r} of the page")
        content, tag = contents[name], tags[name]
        headers = {**_HEADERS, "ETag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=kind, headers=headers)

    @router.get("/")
    def index(request: Request) -> Response:
        return answer("index.html", request)

    @router.get("/page/{name}")
    def file(name: str, request: Request) -> Response:
        return answer(name, request)

    return router
