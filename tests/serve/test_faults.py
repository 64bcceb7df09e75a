"""The server as a process, under bad input and bad luck: each has an answer, and it stays up."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from support.http_client import CONTEXT, Answer, Client, call, save_tiny_base
from support.served import Server, form

pytest.importorskip("fastapi")

from ia3 import FewShotClassifier

pytestmark = pytest.mark.slow

FILES = ("adapter_config.json", "adapter_model.safetensors", "ia3_task.json")
TEXTS = ["late again", "charged twice", "no parcel", "wrong invoice"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny language model, whose answers are as long as is asked for."""
    return save_tiny_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """The files of a classifier on the model, and of one with other labels: name -> bytes."""
    found = []
    for labels in (["delivery", "money"] * 2, ["x", "y"] * 2):
        folder = tmp_path_factory.mktemp("saved") / "classifier"
        FewShotClassifier(str(model), steps=1).fit(TEXTS, labels).save(folder)
        found.append({name: (folder / name).read_bytes() for name in FILES})
    return found


def write(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The folder that has the server's folder of adapters."""
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(model, saved, root):
    """A server of some whole adapters and of folders that are none."""
    adapters = root / "adapters"
    write(adapters / "tickets", saved[0])
    weights = saved[0]["adapter_model.safetensors"]
    write(adapters / "cut", saved[0] | {"adapter_model.safetensors": weights[: len(weights) // 2]})
    write(adapters / "no-config", saved[0] | {"adapter_config.json": b'{"peft_type": '})
    write(adapters / "other-base", saved[0])
    config = json.loads(saved[0]["adapter_config.json"])
    config["base_model_name_or_path"] = "another-model"
    (adapters / "other-base" / "adapter_config.json").write_text(json.dumps(config))
    (adapters / "empty").mkdir()
    (adapters / "a-file").write_text("no folder")
    options = ["--model", model, "--adapters", adapters, "--max-waiting", 64]
    options += ["--max-body", 1 << 20]
    with Server(*options) as found:
        yield found


@pytest.fixture(autouse=True)
def it_stays_up_and_says_no_trace(request):
    """After each test the shared server answers rightly, and has logged no exception."""
    shared = request.getfixturevalue("server") if "server" in request.fixturenames else None
    before = len(shared.said()) if shared else 0
    yield
    if shared:
        assert label(shared) in ("delivery", "money")
        assert_no_trace(shared.said()[before:])


def assert_no_trace(said: str) -> None:
    found = said.find("Traceback")
    assert found < 0, said[max(0, found - 300) : found + 4000].replace("\\n", "\n")


def classify(server: Server, adapter: str = "tickets", text: Any = "where is it?") -> Answer:
    return call(server.port, "POST", "/v1/classify", {"texts": [text], "adapter": adapter})


def label(server: Server, adapter: str = "tickets") -> str:
    answer = classify(server, adapter)
    assert answer.status == 200, answer.body
    [result] = answer.json()["results"]
    return result["label"]


def assert_refused(answer: Answer, status: int, *words: str) -> None:
    """An error of OpenAI's shape that has these words, and nothing of the code."""
    assert answer.status == status, answer.body[:2000]
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    for word in words:
        assert word in error["message"]
    for trace in ("Traceback", 'File "', ".py"):
        assert trace not in answer.body.decode()


def streamed(tokens: int, model: str = "tickets") -> dict[str, Any]:
    body = {"model": model, "prompt": "it is", "max_tokens": tokens, "temperature": 0}
    return body | {"stream": True}


def wait_until_idle(server: Server, patience: float = 30.0) -> None:
    started = time.monotonic()
    while True:
        load = call(server.port, "GET", "/v1/load").json()
        if not load["running"] and not load["waiting"]:
            return
        assert time.monotonic() - started < patience, f"still busy: {load}"
        time.sleep(0.05)


# -- clients that go, and ends of the process ------------------------------------------------------


def test_a_client_that_goes_amid_a_stream_is_computed_no_further(server):
    async def go() -> None:
        client = Client(server.port)
        status, headers = await client.begin("POST", "/v1/completions", streamed(8000))
        assert status == 200
        async for _ in client.parts(headers):
            break
        client.close()

    asyncio.run(go())
    # 8,000 tokens take longer.
    wait_until_idle(server)


def test_a_client_that_goes_before_its_answer_holds_nothing(server):
    async def go() -> None:
        clients = [Client(server.port) for _ in range(8)]
        for client in clients:
            body = {"texts": TEXTS * 20, "adapter": "tickets"}
            sent = asyncio.ensure_future(client.call("POST", "/v1/classify", body))
            await asyncio.sleep(0.01)
            sent.cancel()
            client.close()

    asyncio.run(go())
    wait_until_idle(server)


def test_a_body_that_ends_early_is_no_request(server):
    async def go() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(
            b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n{"
        )
        await writer.drain()
        writer.close()

    asyncio.run(go())


@pytest.fixture(scope="module")
def after_a_kill(model, saved, tmp_path_factory):
    """A server that was started on the folder of one that was killed amid a stream."""

    async def killed_amid_a_stream(server: Server) -> None:
        client = Client(server.port)
        _, headers = await client.begin("POST", "/v1/completions", streamed(8000))
        async for _ in client.parts(headers):
            break
        server.process.kill()
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError, ValueError)):
            async for _ in client.parts(headers):
                pass
        client.close()

    root = tmp_path_factory.mktemp("killed")
    write(root / "adapters" / "tickets", saved[0])
    options = ["--model", model, "--adapters", root / "adapters"]
    with Server(*options) as server:
        asyncio.run(killed_amid_a_stream(server))
        assert server.process.wait(30) == -signal.SIGKILL
    with Server(*options) as server:
        yield server


def test_killed_amid_a_stream_it_starts_again_on_the_same_folder(after_a_kill):
    assert label(after_a_kill) in ("delivery", "money")


def test_told_to_end_it_finishes_what_runs_and_refuses_what_is_new(after_a_kill):
    async def go(server: Server) -> tuple[list[Any], int]:
        client, other = Client(server.port), Client(server.port)
        # A connection that is open already.
        assert (await other.call("GET", "/healthz")).status == 200
        status, headers = await client.begin("POST", "/v1/completions", streamed(300))
        assert status == 200
        parts = client.parts(headers)
        first = await anext(parts)
        server.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.05)
        try:
            body = {"texts": ["late"], "adapter": "tickets"}
            late = (await other.call("POST", "/v1/classify", body)).status
        except (OSError, asyncio.IncompleteReadError):
            late = 503
        rest = b"".join([first, *[part async for part in parts]])
        client.close()
        other.close()
        lines = rest.decode().splitlines()
        return [line[6:] for line in lines if line.startswith("data: ")], late

    events, late = asyncio.run(go(after_a_kill))
    assert after_a_kill.process.wait(60) == 0, after_a_kill.said()
    assert_no_trace(after_a_kill.said())
    assert events[-1] == "[DONE]"
    finishes = [json.loads(e)["choices"][0]["finish_reason"] for e in events[:-1]]
    assert [f for f in finishes if f] == ["length"]
    # It was told to end a moment before; the connection may be closed too.
    assert late in (200, 503)


# -- the folder ------------------------------------------------------------------------------------


def test_a_folder_that_is_no_adapter_is_skipped_and_named_and_others_are_served(server):
    def skipped() -> dict[str, str]:
        found = call(server.port, "GET", "/v1/adapters").json()
        assert "tickets" in {each["name"] for each in found["adapters"]}
        return {each["name"]: each["error"] for each in found["skipped"]}

    expected = {"cut", "no-config", "other-base", "empty"}
    deadline = time.monotonic() + 30
    while skipped().keys() != expected and time.monotonic() < deadline:
        time.sleep(0.1)  # files are looked at after the start
    assert skipped().keys() == expected
    assert "another-model" in skipped()["other-base"]
    for name, error in skipped().items():
        assert error
        assert name in server.said()
        assert_refused(classify(server, name), 409, name)


def test_an_adapter_that_is_deleted_while_it_answers_answers_to_the_end(server, saved):
    body, headers = form(saved[0])
    assert call(server.port, "PUT", "/v1/adapters/going", body, headers).status < 300

    async def go() -> list[Any]:
        client, other = Client(server.port), Client(server.port)
        status, headers = await client.begin("POST", "/v1/completions", streamed(200, "going"))
        assert status == 200
        parts = client.parts(headers)
        first = await anext(parts)
        assert (await other.call("DELETE", "/v1/adapters/going")).status < 300
        gone = await other.call("POST", "/v1/completions", streamed(2, "going"))
        assert_refused(gone, 404, "going")
        rest = b"".join([first, *[part async for part in parts]])
        client.close()
        other.close()
        return [line[6:] for line in rest.decode().splitlines() if line.startswith("data: ")]

    events = asyncio.run(go())
    assert events[-1] == "[DONE]"
    assert "length" in [json.loads(e)["choices"][0]["finish_reason"] for e in events[:-1]]


def test_an_adapter_that_is_replaced_while_it_answers_gives_no_mixture(server, saved):
    uploads = [form(files) for files in saved]
    labels = [{"delivery", "money"}, {"x", "y"}]
    assert call(server.port, "PUT", "/v1/adapters/turning", *uploads[0]).status < 300
    seen: list[set[str]] = []

    async def ask(done: asyncio.Event) -> None:
        client = Client(server.port)
        while not done.is_set():
            body = {"texts": ["late"], "adapter": "turning"}
            answer = await client.call("POST", "/v1/classify", body)
            assert answer.status == 200, answer.body
            [result] = answer.json()["results"]
            assert "error" not in result, result
            seen.append({each["label"] for each in result["probabilities"]})
        client.close()

    async def go() -> None:
        done = asyncio.Event()
        asking = [asyncio.ensure_future(ask(done)) for _ in range(4)]
        client = Client(server.port)
        for turn in range(1, 9):
            answer = await client.call("PUT", "/v1/adapters/turning", *uploads[turn % 2])
            assert answer.status < 300, answer.body
            # What is asked from now on is answered by the new one.
            body = {"texts": ["late"], "adapter": "turning"}
            after = (await client.call("POST", "/v1/classify", body)).json()["results"][0]
            assert {each["label"] for each in after["probabilities"]} == labels[turn % 2]
        done.set()
        await asyncio.gather(*asking)
        client.close()

    asyncio.run(go())
    assert all(found in labels for found in seen)
    assert call(server.port, "DELETE", "/v1/adapters/turning").status < 300


# -- requests --------------------------------------------------------------------------------------

NAMES = {
    "dots": "..",
    "dots of a path": "..%2F..%2Fetc",
    "slashes": "a%2Fb",
    "a backslash": "a%5Cb",
    "an absolute path": "%2Fetc%2Fpasswd",
    "NUL": "a%00b",
    "300 characters": "a" * 300,
    "no UTF-8": "%FF%FE",
    "a newline": "a%0Ab",
    "an own file": ".lock",
}


@pytest.mark.parametrize("what", NAMES)
@pytest.mark.parametrize("method", ["PUT", "DELETE", "GET"])
def test_a_name_that_no_adapter_can_have_is_refused_and_touches_nothing(
    server, saved, root, what, method
):
    before = sorted(root.rglob("*"))
    body, headers = form(saved[0]) if method == "PUT" else (None, {})
    path = f"/v1/adapters/{NAMES[what]}" + ("/vectors" if method == "GET" else "")
    answer = call(server.port, method, path, body, headers)
    assert 400 <= answer.status < 500
    assert_refused(answer, answer.status)
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize("name", ["..", "../tickets", "a/b", "a\0b", "a" * 300, "\ud800", "", " "])
def test_such_a_name_in_a_body_is_refused_too(server, name):
    for path, body in {
        "/v1/classify": {"texts": ["late"], "adapter": name},
        "/v1/completions": {"model": name, "prompt": "late"},
        "/v1/chat/completions": {"model": name, "messages": [{"role": "user", "content": "a"}]},
    }.items():
        answer = call(server.port, "POST", path, body)
        assert answer.status in (400, 404)
        assert_refused(answer, answer.status)


@pytest.mark.parametrize("file", ["../outside.json", "ia3_report.html", "/etc/x.json", "a\0.json"])
def test_a_file_that_is_none_of_an_adapter_is_not_taken(server, saved, root, file):
    before = sorted(root.rglob("*"))
    body, headers = form(saved[0] | {file: b"{}"})
    answer = call(server.port, "PUT", "/v1/adapters/strange", body, headers)
    assert_refused(answer, 400)
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    "request_line", ["POST /v1/classify", "PUT /v1/adapters/big", "POST /v1/adapters"]
)
def test_a_body_of_100_megabytes_is_refused_and_takes_no_memory(server, request_line, chunked):
    before = server.resident_bytes()
    how = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {100 << 20}"
    kind = "Content-Type: multipart/form-data; boundary=b"
    disposition = b'form-data; name="files"; filename="adapter_model.safetensors"'
    start = b"--b\r\nContent-Disposition: " + disposition + b"\r\n\r\n"
    first, part = start.ljust(1 << 20), b" " * (1 << 20)
    # As many clients do, it sends all before it reads.
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as own:
        own.sendall(
            f"{request_line} HTTP/1.1\r\nHost: localhost\r\n{kind}\r\n{how}\r\n\r\n".encode()
        )
        for each in [first] + [part] * 99:
            own.sendall(b"100000\r\n%b\r\n" % each if chunked else each)
        own.sendall(b"0\r\n\r\n" if chunked else b"")
        said = b""
        while received := own.recv(1 << 16):
            said += received
    head, _, body = said.partition(b"\r\n\r\n")
    assert_refused(Answer(int(head.split()[1]), {}, body), 413, "bytes")
    assert server.resident_bytes() - before < 30 << 20


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"texts": ["a"], "adapter": "tickets"',
        b'{"texts": ["a"], "adapter": 1e999}',
        b"[" * 100_000,
        b'{"texts": [' + b"9" * 10_000 + b'], "adapter": "tickets"}',
    ],
    ids=lambda body: repr(body[:12]),
)
@pytest.mark.parametrize("path", ["/v1/classify", "/v1/completions", "/v1/chat/completions"])
def test_what_is_no_json_or_no_request_is_refused(server, path, body):
    answer = call(server.port, "POST", path, body, {"Content-Type": "application/json"})
    assert_refused(answer, 400)


def test_values_of_other_types_are_refused_by_name(server):
    generation = {"model": "tickets", "prompt": "a"}
    wrong = {
        "/v1/classify": [
            ({"texts": "late", "adapter": "tickets"}, "texts"),
            ({"texts": [1], "adapter": "tickets"}, "texts"),
            ({"texts": [["late"]], "adapter": "tickets"}, "texts"),
            ({"texts": ["late"], "adapters": ["tickets", "tickets"]}, "adapters"),
            ({"texts": ["late"], "adapter": ["tickets"]}, "adapter"),
            ({"text": "late", "adapters": "all"}, "adapters"),
            ({"text": "late", "adapters": "*", "limit": "many"}, "limit"),
            ({"texts": ["late"]}, "adapter"),
            ({"adapter": "tickets"}, "text"),
        ],
        "/v1/completions": [
            (generation | {"max_tokens": 0}, "max_tokens"),
            (generation | {"max_tokens": "many"}, "max_tokens"),
            (generation | {"max_tokens": 1.5}, "max_tokens"),
            (generation | {"temperature": -1}, "temperature"),
            (generation | {"top_p": 0}, "top_p"),
            (generation | {"top_p": 2}, "top_p"),
            (generation | {"seed": "a"}, "seed"),
            (generation | {"stop": [1]}, "stop"),
            (generation | {"n": 0}, "n"),
            (generation | {"logprobs": -1}, "logprobs"),
            (generation | {"prompt": {}}, "prompt"),
            (generation | {"stream": "yes"}, "stream"),
        ],
    }
    for path, bodies in wrong.items():
        for body, name in bodies:
            answer = call(server.port, "POST", path, body)
            assert answer.status == 400, (path, body, answer.body)
            assert_refused(answer, 400, name)


def test_a_prompt_longer_than_the_context_says_both_numbers(server):
    for more in ({}, {"stream": True}):
        body = {"model": "tickets", "prompt": [7] * (CONTEXT + 1), "max_tokens": 4} | more
        answer = call(server.port, "POST", "/v1/completions", body)
        # With a comma or without.
        said = answer.body.decode().replace(",", "")
        assert_refused(answer, 400)
        assert str(CONTEXT) in said
        assert str(CONTEXT + 1) in said


def test_addresses_and_methods_that_there_are_not_are_said_in_the_same_shape(server):
    assert_refused(call(server.port, "GET", "/v1/nothing"), 404)
    assert_refused(call(server.port, "DELETE", "/v1/classify"), 405)
    assert_refused(call(server.port, "GET", "/page/../../pyproject.toml"), 404)
    assert_refused(call(server.port, "GET", "/page/%2e%2e/%2e%2e/app.py"), 404)


def test_500_connections_at_once_are_all_answered(server):
    async def one(number: int) -> Answer:
        client = Client(server.port)
        body = {"texts": [f"late {number}"], "adapter": "tickets"}
        answer = await client.call("POST", "/v1/classify", body)
        client.close()
        return answer

    async def all_of_them() -> list[Answer]:
        return await asyncio.wait_for(asyncio.gather(*map(one, range(500))), 120)

    answers = asyncio.run(all_of_them())
    for answer in answers:
        if answer.status != 200:
            # 64 may wait.
            assert_refused(answer, 429)
            assert int(answer.headers["retry-after"]) >= 1
    assert sum(answer.status == 200 for answer in answers) >= 64
    wait_until_idle(server)


def test_no_file_of_a_connection_stays_open(server):
    def count() -> int:
        return len(os.listdir(f"/proc/{server.process.pid}/fd"))

    classify(server)
    before = count()
    for _ in range(30):
        classify(server)
    deadline = time.monotonic() + 10
    while count() > before + 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert count() <= before + 3
