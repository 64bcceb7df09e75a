"""`ia3 serve`: base models and all their adapters, over HTTP."""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import os
import re
import signal
import socket
from collections.abc import Callable
from enum import StrEnum
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base.progress import working
from ..errors import IA3Error, MissingExtraError, counted, shown
from ..vllm.versions import TRIED
from . import options
from .options import reason, say, silence_loading, warn

if TYPE_CHECKING:
    from ..serve.engine.interface import BaseEngine
    from ..serve.http.registry import Registry, Served

TEXT = "I was charged twice this month."
INSTALL_VLLM = f"pip install vllm=={TRIED[-1]} (for CPUs see 'vLLM' in docs/serving.md)"
# Connections that wait to be taken up.
BACKLOG = 2048


class _Level(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class _Engine(StrEnum):
    LOCAL = "local"
    VLLM = "vllm"


def _assignments(values: list[str] | None) -> list[str] | None:
    for value in values or ():
        if not re.fullmatch(r"\w+=.*", value, re.DOTALL):
            raise typer.BadParameter(f"{value!r} is no option of vLLM: expected NAME=VALUE")
    return values


def _origins(values: list[str] | None) -> list[str] | None:
    """Refuse what no browser sends as an origin, such as one with a slash at its end."""
    for value in values or ():
        if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+", value):
            expected = "expected a scheme and a host, as https://example.com, or *"
            raise typer.BadParameter(f"{value!r} is no origin: {expected}")
    return values


def serve(
    adapters: Annotated[
        Path, typer.Option(help="Folder with a folder for each adapter; made if absent.")
    ],
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Base model: a name, a folder, or an id on the hub. May be given twice, for a "
            "language model and an encoder; those that the adapters name if absent."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=65535)] = 8000,
    capacity: Annotated[
        int, typer.Option(help="Adapters of each base model in its memory at once.", min=1)
    ] = 1024,
    keys: Annotated[
        Path | None,
        typer.Option(
            help="YAML file of API keys: each with a list of the adapters and base models that it "
            "may use, or '*' for all, and to upload, delete and train. Without it none is wanted."
        ),
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Origin whose pages may call, as https://example.com; may be given again.",
            callback=_origins,
        ),
    ] = None,
    train: Annotated[
        bool, typer.Option("--train/--no-train", help="Whether tasks may be learned on the page.")
    ] = True,
    max_waiting: Annotated[int, typer.Option(help="Texts that may wait; 429 beyond.", min=1)] = 512,
    max_body: Annotated[
        int, typer.Option(metavar="BYTES", help="Of a request's body; 413 beyond.", min=1)
    ] = 32 * 2**20,
    timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="Of a request at most, and of the requests that run when the server is to stop.",
            callback=options.positive,
        ),
    ] = 300.0,
    device: options.Device = "auto",
    dtype: options.DType = "auto",
    engine: Annotated[
        _Engine,
        typer.Option(
            help="What computes language models: this program, or vLLM, which has to be installed "
            "and takes the device that it was built for. Encoders are computed here."
        ),
    ] = _Engine.LOCAL,
    vllm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Option of vLLM's engine, as tensor_parallel_size=2; may be given again.",
            callback=_assignments,
        ),
    ] = None,
    log_texts: Annotated[
        bool, typer.Option("--log-texts", help="Write texts into the log, which has none without.")
    ] = False,
    log_level: Annotated[_Level, typer.Option(help="Of the log, on standard error.")] = _Level.INFO,
) -> None:
    """Serve base models with all their adapters over HTTP: classify, complete, chat, and a page.

    Each request is a line of JSON on standard error. SIGTERM and Ctrl-C let what runs finish.
    """
    for package in ("fastapi", "prometheus_client", "python_multipart", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package.replace("_", "-"), "serve", "ia3 serve")
    if engine is _Engine.VLLM and importlib.util.find_spec("vllm") is None:
        raise MissingExtraError("vllm", "", "ia3 serve --engine vllm", install=INSTALL_VLLM)
    if vllm and engine is not _Engine.VLLM:
        raise typer.BadParameter("it is of --engine vllm", param_hint="--vllm")
    import uvicorn

    from ..serve.http.keys import read_keys
    from ..serve.http.logs import log_to_stderr

    known = None if keys is None else read_keys(keys)
    if adapters.exists() and not adapters.is_dir():
        raise IA3Error(f"{adapters} is not a folder: expected one with a folder for each adapter")
    listening = _listen(host, port)
    for cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        # Of compiled products, one for each shape: 1,024 of them in either cache are 0.7 GB, and
        # another one takes a millisecond to make.
        os.environ.setdefault(cache, "128")
    silence_loading()
    _check_kinds([*dict.fromkeys(model or [])])
    with working("loading the server"):
        from ..serve.engine.joined import JoinedEngine
        from ..serve.http.app import Settings, create_app
        from ..serve.http.gate import Limits
        from ..serve.http.registry import Registry, bases_named
    log_to_stderr(log_level.value)
    names = list(dict.fromkeys(model)) if model else _one_of_each_kind(bases_named(adapters))
    if not names:
        raise IA3Error(
            f"no adapter in {adapters} names a base model, and no embedded model is installed: "
            "choose one by --model"
        )
    ended: list[str] = []

    def end(why: str) -> None:
        """End as by a signal, so that whatever started this sees that it failed."""
        ended.append(why)
        signal.raise_signal(signal.SIGTERM)

    if engine is _Engine.VLLM:
        engines = _with_vllm(names, capacity, device, dtype, vllm or [], end)
    else:
        engines = _local(names, capacity, device, dtype)
    bases = [each.served for each in engines]
    registry = Registry(adapters, bases)
    joined = JoinedEngine(engines)
    limits = Limits(max_waiting, max_body, timeout)
    is_loopback = ip_address(listening.getsockname()[0]).is_loopback
    settings = Settings(limits, known, cors or (), train, log_texts, is_loopback)
    app = create_app(joined, registry, settings)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(timeout),
        timeout_keep_alive=30,
        backlog=BACKLOG,
    )
    address = _address(host, listening)

    class Server(uvicorn.Server):
        """Says where it is once it takes requests, and tells the app when it is to end."""

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if self.started:
                _welcome(address, registry, known is not None)

        async def shutdown(self, sockets: Any = None) -> None:
            await app.state.stop()
            await super().shutdown(sockets)

    # What is loaded by now stays. Looking through it for garbage takes half a second, in which no
    # request is answered, and seconds at the end.
    gc.collect()
    gc.freeze()
    # uvicorn raises it once more when all is done, which would end the process by it.
    signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        Server(config).run([listening])
    finally:
        # A second Ctrl-C leaves the app's own end out.
        joined.close()
    if ended:
        raise IA3Error(ended[0])


def _local(names: list[str], capacity: int, device: str, dtype: str) -> list[BaseEngine]:
    """An engine of this process for each base model, a language model's first."""
    from ..serve.engine.bases import serve_base
    from ..serve.engine.worker import LocalEngine

    bases = [serve_base(name, capacity, device, dtype) for name in names]
    return [LocalEngine(base) for base in sorted(bases, key=lambda base: not base.generates)]


def _with_vllm(
    names: list[str],
    capacity: int,
    device: str,
    dtype: str,
    given: list[str],
    at_end: Callable[[str], None],
) -> list[BaseEngine]:
    """vLLM for the language model, and an engine of this process for an encoder."""
    from ..base.encoders import is_sentence_encoder

    encoders = [name for name in names if is_sentence_encoder(name)]
    language = [name for name in names if name not in encoders]
    if not language:
        raise IA3Error(
            f"vLLM is for language models, and {', '.join(map(repr, names))} is an encoder: leave "
            "out --engine vllm, or choose a language model by --model"
        )
    others = _local(encoders, capacity, device, dtype)
    from ..serve.engine.vllm_engine import start_vllm

    pairs = (value.split("=", 1) for value in given)
    values = {name: _value(text) for name, text in pairs}
    with working(f"loading {language[0]} in vLLM"):
        return [start_vllm(language[0], capacity, dtype, values, at_end), *others]


def _value(text: str) -> Any:
    """A value as JSON has it, or the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _one_of_each_kind(names: list[str]) -> list[str]:
    """The first encoder and the first language model."""
    from ..base.encoders import is_sentence_encoder

    chosen: dict[bool, str] = {}
    failed: list[IA3Error] = []
    for name in names:
        try:
            chosen.setdefault(is_sentence_encoder(name), name)
        except IA3Error as error:
            failed.append(error)
    if failed and not chosen:
        raise failed[0]
    for each in failed:
        warn(f"adapters name a base model that is not here: {reason(each)}")
    return [*chosen.values()]


def _check_kinds(names: list[str]) -> None:
    """Refuse two models of one kind, before any is loaded."""
    if len(names) < 2:
        return
    from ..base.encoders import is_sentence_encoder

    kinds = [is_sentence_encoder(name) for name in names]
    if len({*kinds}) < len(kinds):
        raise IA3Error(
            f"the base models are {', '.join(map(repr, names))}: one language model and one "
            "encoder can be served at once"
        )


def _listen(host: str, port: int) -> socket.socket:
    """A socket at the address; what is amiss with it is known before the models are loaded."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
        )[0]
        # Of this protocol by name: on others asyncio does not send small parts at once
        # (TCP_NODELAY), and an answer's second part waits 40 ms for the first one's receipt.
        listening = socket.socket(family, kind, protocol)
        if os.name == "posix":  # elsewhere it would take an address that is in use
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
        listening.listen(BACKLOG)
        return listening
    except (OSError, UnicodeError) as error:  # the latter of a name that cannot be one
        why = getattr(error, "strerror", None) or error
        raise IA3Error(
            f"the address {shown(host)}:{port} cannot be listened at: {why}; choose another "
            "--port or --host"
        ) from error


def _address(host: str, listening: socket.socket) -> str:
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    name = f"[{name}]" if ":" in name else name
    return f"http://{name}:{listening.getsockname()[1]}"


def _welcome(address: str, registry: Registry, with_keys: bool) -> None:
    """Say where the server is, and a line that calls it."""
    key = " -H 'Authorization: Bearer KEY'" if with_keys else ""
    path, body = _example(registry)
    skipped = f", {len(registry.skipped()):,} skipped" if registry.skipped() else ""
    models = ", ".join(base.name for base in registry.bases)
    say(f"serving {counted(len(registry), 'adapter')} of {models}{skipped} at {address}")
    sent = ""
    if body:
        text = json.dumps(body, ensure_ascii=False).replace("'", "'\\''")
        sent = f" -H 'Content-Type: application/json' -d '{text}'"
    say(f"curl {address}{path}{key}{sent}")


def _example(registry: Registry) -> tuple[str, dict[str, Any]]:
    """A path and a body that have an answer."""
    served = registry.list()
    for each in served:
        if each.kind == "classifier" and each.fields is not None:
            text: Any = TEXT
            if len(each.fields) > 1:
                text = dict.fromkeys(each.fields, TEXT)
            return "/v1/classify", {"texts": [text], "adapter": each.name}
    for base in registry.bases:
        if base.generates:
            own: list[Served] = [each for each in served if each.base is base]
            name = own[0].name if own else base.name
            return "/v1/completions", {"model": name, "prompt": "Once upon a time"}
    return "/v1/models", {}
