"""Queues, times, clients that go, keys and an end: with an engine that does as it is told."""

from __future__ import annotations

import asyncio
import json
import select
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("fastapi")

import uvicorn
from support.served import Client

from ia3.classify.mixed import Classified
from ia3.errors import StateError
from ia3.serve.engine.interface import Classification, Generation, Load, Piece
from ia3.serve.http.app import Settings, create_app
from ia3.serve.http.gate import Limits
from ia3.serve.http.keys import Keys
from ia3.serve.http.registry import Registry

ALL, ONE = "a-key-for-everything", "a-key-for-one-adapter"
PROMPT = {"model": "later", "prompt": "the"}
TEXT = {"texts": ["the"], "adapter": "later"}


class Slow:
    """An engine whose texts wait until they are let through; says which streams were closed."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.begun = 0
        self.ended: list[str] = []
        self.closed = False

    async def submit(self, request: Generation | Classification) -> AsyncIterator[Any]:
        self.begun += 1
        try:
            if isinstance(request, Generation):
                for _ in range(request.max_tokens - 1):
                    yield Piece("x", 1)
                    await self._let_through()
                yield Piece("y", 1, finish="length")
            else:
                await self._let_through()
                self.ended.append("whole")
                found = Classified("a", 1.0, {"a": 1.0, "b": 0.0}, ["a"])
                yield [found for _ in request.texts]
                return
            self.ended.append("whole")
        except (asyncio.CancelledError, GeneratorExit):
            if "whole" not in self.ended:
                self.ended.append("closed")
            raise

    async def _let_through(self) -> None:
        while not self.gate.is_set():
            await asyncio.sleep(0.005)
            if self.closed:
                raise StateError("the server is shutting down")

    def load(self) -> Load:
        return Load(0, 0)

    def close(self) -> None:
        self.closed = True


class Running(Client):
    """An app in a thread of this process."""

    def __init__(self, url: str, engine: Slow, server: uvicorn.Server) -> None:
        super().__init__(url)
        self.engine = engine
        self.server = server

    def in_thread(self, *asked: Any) -> threading.Thread:
        thread = threading.Thread(target=self.ask, args=asked)
        thread.start()
        return thread

    def until(self, is_so: Any) -> None:
        for _ in range(2000):
            if is_so():
                return
            time.sleep(0.005)
        raise AssertionError("it did not come to that")


@contextmanager
def running(bases, made, **settings: Any) -> Iterator[Running]:
    engine = Slow()
    registry = Registry(made.adapters, bases)
    app = create_app(engine, registry, Settings(**settings))
    config = uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=5)
    server, listening = uvicorn.Server(config), socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        client = Running(f"http://127.0.0.1:{listening.getsockname()[1]}", engine, server)
        client.until(lambda: server.started)
        yield client
    finally:
        engine.gate.set()
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
        assert engine.closed


@pytest.fixture
def app(bases, made, request):
    with running(bases, made, **getattr(request, "param", {})) as client:
        yield client


def test_what_machines_ask_every_few_seconds_is_not_logged(app, caplog):
    with caplog.at_level("INFO", "ia3.serve"):
        for path in ("/healthz", "/readyz", "/v1/load", "/metrics", "/page/page.js"):
            assert app.get(path).status == 200
        assert app.get("/v1/models").status == 200
        app.until(lambda: caplog.records)  # which are written behind the answers
    assert [record.route for record in caplog.records] == ["/v1/models"]


@pytest.mark.parametrize("app", [{"limits": Limits(waiting=2)}], indirect=True)
def test_what_would_wait_too_long_is_refused_and_may_be_asked_again(app):
    waiting = [app.in_thread("POST", "/v1/classify", TEXT) for _ in range(2)]
    app.until(lambda: app.engine.begun == 2)
    for path, body in (("/v1/classify", TEXT), ("/v1/completions", PROMPT)):
        said = app.post(path, body)
        assert said.status == 429
        assert said.body["error"]["code"] == "queue_full"
        assert int(said.headers["retry-after"]) >= 1
    assert app.get("/healthz").status == 200
    app.engine.gate.set()
    for each in waiting:
        each.join()
    assert app.post("/v1/classify", TEXT).status == 200
    said = app.post("/v1/classify", {**TEXT, "texts": ["the"] * 3})
    assert said.status == 400
    assert "at most 2" in said.body["error"]["message"]


@pytest.mark.parametrize("app", [{"limits": Limits(seconds=0.3)}], indirect=True)
def test_what_takes_too_long_is_given_up(app):
    said = app.post("/v1/classify", TEXT)
    assert said.status == 503
    assert said.body["error"]["code"] == "timeout"
    said = app.post("/v1/completions", {**PROMPT, "stream": True})
    assert said.status == 200
    assert b"no answer within" in said.body
    assert b"[DONE]" not in said.body
    said = app.post("/v1/completions", PROMPT)
    assert said.status == 503
    assert app.engine.ended == ["closed"] * 3


@pytest.mark.parametrize("app", [{"limits": Limits(seconds=0.5)}], indirect=True)
def test_a_body_that_does_not_come_is_given_up(app):
    with socket.create_connection(app.address) as client:
        client.sendall(
            b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"
        )
        assert client.recv(1000).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("app", [{"limits": Limits(body=1000)}], indirect=True)
def test_bodies_that_come_slowly_take_a_bounded_memory_together(app, monkeypatch):
    monkeypatch.setattr("ia3.serve.http.gate.ALL_BODIES", 4000)
    head = b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
    clients = [socket.create_connection(app.address, timeout=30) for _ in range(5)]
    try:
        for client in clients:
            client.sendall(head + b" " * 900)
        # Four are waited for.
        answered, _, _ = select.select(clients, [], [], 30)
        (answer,) = [client.recv(1000) for client in answered]
        assert answer.startswith(b"HTTP/1.1 429 ")
        assert b"retry-after: 1\r\n" in answer
    finally:
        for client in clients:
            client.close()
    # What they held is free again.
    app.engine.gate.set()
    app.until(lambda: app.post("/v1/classify", TEXT).status == 200)


@pytest.mark.parametrize("app", [{"limits": Limits(body=300)}], indirect=True)
def test_small_bodies_of_many_at_once_are_taken_where_one_may_not_be_large(app):
    threads = [app.in_thread("POST", "/v1/classify", {**TEXT, "texts": ["x" * 200]})]
    threads += [app.in_thread(*("POST", "/v1/classify"), TEXT) for _ in range(19)]
    app.until(lambda: app.engine.begun == 20)
    app.engine.gate.set()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("path", ["/v1/classify", "/v1/completions", "stream"])
def test_nothing_more_is_computed_for_a_client_that_has_gone(app, path):
    body = TEXT if path == "/v1/classify" else {**PROMPT, "stream": path == "stream", "n": 2}
    path = "/v1/completions" if path == "stream" else path
    content = json.dumps(body).encode()
    with socket.create_connection(app.address) as client:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        app.until(lambda: app.engine.begun == body.get("n", 1))
        if body.get("stream"):
            assert b"HTTP/1.1 200" in client.recv(1000)
    app.until(lambda: app.engine.ended == ["closed"] * body.get("n", 1))
    assert app.get("/v1/load").status == 200


def test_what_runs_when_the_server_is_to_stop_is_finished(bases, made):
    with running(bases, made) as app:
        said = []
        threads = [
            threading.Thread(target=lambda p=p, b=b: said.append(app.post(p, b)))
            for p, b in (("/v1/classify", TEXT), ("/v1/completions", {**PROMPT, "stream": True}))
        ]
        for thread in threads:
            thread.start()
        app.until(lambda: app.engine.begun == 2)
        app.server.should_exit = True
        app.until(lambda: not app.server.servers[0].is_serving())
        app.engine.gate.set()
        for thread in threads:
            thread.join(30)
    assert [each.status for each in said] == [200, 200]
    assert any(b"[DONE]" in each.body for each in said if isinstance(each.body, bytes))
    assert app.engine.ended == ["whole", "whole"]


def test_a_fault_of_the_engine_is_an_answer_and_the_next_is_served(app, monkeypatch):
    def broken(request: Any) -> Any:
        raise RuntimeError("a secret of the server")

    with monkeypatch.context() as patch:
        patch.setattr(app.engine, "submit", broken)
        for path, body in (("/v1/classify", TEXT), ("/v1/completions", PROMPT)):
            said = app.post(path, body)
            assert said.status == 500
            assert "secret" not in str(said.body)
            assert said.body["error"]["type"] == "server_error"
            assert said.headers["x-request-id"]
    app.engine.gate.set()
    assert app.post("/v1/classify", TEXT).status == 200


# -- keys


KEYS = Keys({ALL: None, ONE: frozenset({"later"})})


def with_key(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def guarded(bases, made):
    with running(bases, made, keys=KEYS) as client:
        client.engine.gate.set()
        yield client


@pytest.mark.parametrize(
    "headers", [{}, with_key("a-key-for-everythinh"), {"Authorization": f"Basic {ALL}"}]
)
def test_without_a_key_only_its_health_is_told(guarded, headers):
    for path in ("/healthz", "/readyz"):
        assert guarded.ask("GET", path, headers=headers).status == 200
    for method, path in (
        ("GET", "/v1/models"),
        ("GET", "/v1/adapters"),
        ("GET", "/metrics"),
        ("GET", "/v1/load"),
        ("GET", "/openapi.json"),
        ("GET", "/none"),
        ("DELETE", "/v1/adapters/later"),
        ("POST", "/v1/classify"),
    ):
        said = guarded.ask(method, path, headers=headers)
        assert said.status == 401, path
        assert said.headers["www-authenticate"] == "Bearer"


def test_a_key_sees_its_adapters_alone(guarded):
    own = with_key(ONE)
    models = guarded.ask("GET", "/v1/models", headers=own).body["data"]
    assert [each["id"] for each in models] == ["later"]
    listed = guarded.ask("GET", "/v1/adapters", headers=own).body
    assert [each["name"] for each in listed["adapters"]] == ["later"]
    assert listed["skipped"] == []
    assert guarded.ask("POST", "/v1/classify", TEXT, headers=own).status == 200
    every = {"text": "the", "adapters": "*"}
    results = guarded.ask("POST", "/v1/classify", every, headers=own).body["results"]
    assert [each["adapter"] for each in results] == ["later"]
    unknown = {"texts": ["the"], "adapter": "ticketz"}
    hidden = {"texts": ["the"], "adapter": "tickets"}
    for name in ("tickets", "cut"):
        hidden = {"texts": ["the"], "adapter": name}
        said = [guarded.ask("POST", "/v1/classify", b, headers=own) for b in (unknown, hidden)]
        # As if it were not there.
        assert [each.status for each in said] == [404, 404]
        messages = [each.body["error"]["message"] for each in said]
        assert messages[0].replace("ticketz", name) == messages[1]
        said = guarded.ask("POST", "/v1/completions", {**PROMPT, "model": name}, headers=own)
        assert said.status == 404
        assert guarded.ask("DELETE", f"/v1/adapters/{name}", headers=own).status == 404


def test_a_key_for_some_adapters_changes_none(guarded):
    for method, path in (
        ("PUT", "/v1/adapters/later"),
        ("PUT", "/v1/adapters/new"),
        ("POST", "/v1/adapters"),
        ("POST", "/v1/adapters/reload"),
        ("DELETE", "/v1/adapters/later"),
        ("POST", "/v1/learn"),
        ("GET", "/v1/learn/none"),
    ):
        said = guarded.ask(method, path, headers=with_key(ONE))
        assert said.status == 403, path
    assert guarded.ask("GET", "/v1/adapters/later", headers=with_key(ALL)).status == 200
    assert guarded.ask("POST", "/v1/adapters/reload", headers=with_key(ALL)).status == 200
    assert guarded.ask("GET", "/v1/learn/none", headers=with_key(ALL)).status == 404


def test_nothing_is_learned_where_that_is_off(bases, made):
    with running(bases, made, train=False) as app:
        assert app.get("/v1/learn/none").body["error"]["message"] == "Not Found"
        assert app.post("/v1/learn", {}).status == 404
        assert "/v1/learn" not in app.get("/openapi.json").body["paths"]


@pytest.mark.parametrize("app", [{"cors": ["https://a.example"], "keys": KEYS}], indirect=True)
def test_a_named_origins_pages_may_call_and_read_refusals(app):
    origin = {"Origin": "https://a.example"}
    asked = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    preflight = app.ask("OPTIONS", "/v1/classify", headers=origin | asked)
    assert preflight.status == 200
    refused = app.ask("GET", "/v1/models", headers=origin)
    assert refused.status == 401
    for said in (preflight, refused):
        assert said.headers["access-control-allow-origin"] == "https://a.example"
    other = app.ask("GET", "/healthz", headers={"Origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers
