"""`/v1/adapters`: the list, uploads, deletion and reloading."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ...errors import StateError, UnknownNameError
from .refused import JSON, RefusedError
from .registry import PARTS, Served
from .schemas import AdapterListed, Adapters, Reloaded
from .serving import Serving, access_of, check_all
from .vectors import vector_figures

# Of a form's fields besides files.
LONGEST_FIELD = 4096

_FILES = {"type": "array", "items": {"type": "string", "format": "binary"}}
_DESCRIBED = f"The adapter's files, by their names: {', '.join(PARTS)}."


def _form(**more: Any) -> dict[str, Any]:
    """For the API's description: a body of files, and more."""
    schema = {
        "type": "object",
        "required": ["files", *more],
        "properties": {"files": {**_FILES, "description": _DESCRIBED}, **more},
    }
    return {
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}
    }


def adapters_router(serving: Serving) -> APIRouter:
    router, registry = APIRouter(tags=["adapters"]), serving.registry

    @router.get("/v1/adapters", response_model=Adapters)
    async def adapters(request: Request) -> Response:
        """All adapters, and what was skipped, with the reason."""
        access = access_of(request)
        return JSON(await run_in_threadpool(_listed, serving, access))

    @router.post(
        "/v1/adapters",
        status_code=201,
        response_model=AdapterListed,
        openapi_extra=_form(name={"type": "string"}),
    )
    async def add(request: Request) -> Response:
        """Add an adapter from its files; the form's field `name` is its name."""
        check_all(request, "upload them")
        fields, files = await _form_of(request)
        if "name" not in fields:
            raise RefusedError(
                400, "the form has no field 'name', expected the adapter's", param="name"
            )
        return JSON(await _put(serving, fields["name"], files, replace=False), 201)

    @router.post("/v1/adapters/reload", response_model=Reloaded)
    async def reload(request: Request) -> Response:
        """Take up what has changed in the folder."""
        check_all(request, "reload them")
        changes = await run_in_threadpool(registry.reload)
        return JSON(vars(changes))

    @router.put("/v1/adapters/{name:path}", response_model=AdapterListed, openapi_extra=_form())
    async def put(request: Request, name: str) -> Response:
        """Add an adapter from its files, or replace it in one step."""
        check_all(request, "upload them")
        await run_in_threadpool(registry.check_new, name)
        _, files = await _form_of(request)
        return JSON(await _put(serving, name, files, replace=True))

    @router.get("/v1/adapters/{name}/vectors")
    async def vectors(request: Request, name: str) -> Response:
        """An adapter's values in figures, for a heat map."""
        served = registry.find(name, access_of(request))
        return JSON(await run_in_threadpool(vector_figures, served.folder))

    @router.get("/v1/adapters/{name:path}", response_model=AdapterListed)
    async def adapter(request: Request, name: str) -> Response:
        """An adapter."""
        served = registry.find(name, access_of(request))
        resident = await run_in_threadpool(registry.resident)
        return JSON(_as_listed(served, served.name in resident))

    @router.delete("/v1/adapters/{name:path}", status_code=204)
    async def delete(request: Request, name: str) -> Response:
        """Remove an adapter and its files. What runs goes on with its values."""
        access = access_of(request)
        if not access.all:
            registry.find(name, access)
        check_all(request, "delete them")
        await run_in_threadpool(registry.delete, name)
        return Response(status_code=204)

    return router


def _listed(serving: Serving, access: Any) -> dict[str, Any]:
    registry, resident = serving.registry, serving.registry.resident()
    return {
        "adapters": [_as_listed(s, s.name in resident) for s in registry.list(access)],
        "skipped": [{"name": n, "error": why} for n, why in registry.skipped(access).items()],
    }


def _as_listed(served: Served, resident: bool) -> dict[str, Any]:
    return {
        "name": served.name,
        "base": served.base.name,
        "kind": served.kind,
        "engine": served.base.kind,
        "labels": served.labels,
        "fields": served.fields,
        "bytes": served.bytes,
        "resident": resident,
    }


async def _put(
    serving: Serving, name: str, files: dict[str, bytes], *, replace: bool
) -> dict[str, Any]:
    registry = serving.registry
    try:
        served = await run_in_threadpool(registry.put, name, files, replace=replace)
    except StateError as error:
        raise RefusedError(409, str(error), param="name", code="exists") from error
    except UnknownNameError as error:
        # Of something in the files, as another kind of adapter; not of the address.
        raise RefusedError(400, serving.registry.without_places(str(error))) from error
    return _as_listed(served, resident=False)


async def _form_of(request: Request) -> tuple[dict[str, str], dict[str, bytes]]:
    """A form's fields, and its files by the names of an adapter's.

    Raises:
        RefusedError: it is no form, or has a file twice.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise RefusedError(
            400, f"the body is {kind or 'of no type'!r}, expected multipart/form-data"
        )
    fields: dict[str, str] = {}
    files: dict[str, bytes] = {}
    try:
        most = {"max_files": 2 * len(PARTS), "max_fields": len(PARTS)}
        async with request.form(**most, max_part_size=LONGEST_FIELD) as form:
            for field, value in form.multi_items():
                if not isinstance(value, UploadFile):
                    fields[field] = value
                    continue
                name = field if field in PARTS else (value.filename or "").rpartition("/")[2]
                if name in files:
                    raise RefusedError(400, f"the file {name!r} is there twice", param=name)
                files[name] = await value.read()
    except (HTTPException, UnicodeError) as error:
        # A client may name a charset that decodes nothing.
        said = error.detail if isinstance(error, HTTPException) else str(error)
        raise RefusedError(400, f"the form is malformed: {said}") from error
    return fields, files
