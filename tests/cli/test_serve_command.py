"""`ia3 serve` as a process: how it starts, what it prints, and how it ends."""

from __future__ import annotations

import asyncio
import json
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("fastapi")

from support.encoders import change
from support.served import TEXTS, Server, save_classifier, save_language_model
from support.tfew import child_environment

from ia3.cli.serve import _check_kinds, _listen
from ia3.errors import IA3Error


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    model = save_language_model(folder / "model")
    save_classifier(model, folder / "adapters/it's")
    lost = shutil.copytree(folder / "adapters/it's", folder / "adapters/lost")
    change(lost / "adapter_config.json", base_model_name_or_path="no/model")
    return folder / "adapters"


def refused(*options: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "ia3", "serve", *map(str, options)],
        env={**child_environment(), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode in (1, 2), done
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


def test_the_printed_line_works_and_what_runs_is_finished_at_the_end(adapters):
    with Server("--adapters", adapters, "--log-texts", "--timeout", 30) as server:
        (line,) = [line for line in server.lines if line.startswith("curl ")]
        _, address, *options = shlex.split(line)
        assert address == f"{server.url}/v1/classify"
        assert options[:2] == ["-H", "Content-Type: application/json"]
        body = json.loads(options[options.index("-d") + 1])
        said = server.post("/v1/classify", body)
        assert said.status == 200
        assert said.body["results"][0]["adapter"] == "it's"
        record = server.logged("request", id=said.headers["x-request-id"])
        assert record["asked"] == body["texts"]
        # The model is the one that the adapter names; what is not to be had is said.
        assert len(server.get("/v1/models").body["data"]) == 2
        warned = [line for line in server.lines if line.startswith("warning: ")]
        assert len(warned) == 1
        assert "no model 'no/model'" in warned[0]
        found = []
        asked = {"model": "it's", "prompt": TEXTS[0], "max_tokens": 100, "temperature": 0}
        asking = threading.Thread(
            target=lambda: found.append(server.post("/v1/completions", asked))
        )
        asking.start()
        time.sleep(0.2)
        assert server.stop(signal.SIGTERM) == 0
        asking.join()
        assert found[0].status == 200
        assert "Traceback" not in "\n".join(server.lines)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_what_runs(adapters):
    with Server("--adapters", adapters, "--timeout", 60) as server:
        asked = {"model": "it's", "prompt": TEXTS[0], "max_tokens": 100_000, "n": 16}
        body = json.dumps({**asked, "stream": True}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        )
        with socket.create_connection(server.address) as client:
            client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            assert client.recv(1000)
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.5)
            assert server.process.poll() is None
            assert server.stop(signal.SIGINT) in (130, -signal.SIGINT)


def test_mistakes_are_one_line_before_a_model_is_loaded(adapters, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "keys").write_text("short: '*'\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for options, words in (
            (["--adapters", adapters, "--port", port], f"'127.0.0.1':{port} cannot be listened at"),
            (["--adapters", tmp_path / "file"], "is not a folder"),
            (["--adapters", adapters, "--keys", tmp_path / "keys"], "key 1 has 5 characters"),
            (["--adapters", adapters, "--keys", tmp_path / "none"], "does not exist"),
            (["--adapters", adapters, "--cors", "https://a.b/"], "'https://a.b/' is no origin"),
        ):
            said = refused("--port", 0, *options)
            assert words in said
            assert said.count("\n") == 1, said


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_an_answers_parts_are_sent_at_once(host):
    """Else the second one waits for the receipt of the first: 40 milliseconds."""
    options = []

    class Protocol(asyncio.Protocol):
        def connection_made(self, transport):
            connection = transport.get_extra_info("socket")
            options.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            transport.close()

    async def connect():
        listening = _listen(host, 0)
        async with await asyncio.get_running_loop().create_server(Protocol, sock=listening):
            reader, writer = await asyncio.open_connection(sock=_connected(listening))
            await reader.read()
            writer.close()

    asyncio.run(connect())
    assert options
    assert options[0] != 0


@pytest.mark.parametrize("host", ["x" * 400, "a\udcffb", "-1", "no.such.name.invalid"])
def test_what_is_no_address_is_refused(host):
    with pytest.raises(IA3Error, match="cannot be listened at"):
        _listen(host, 0)


def _connected(listening):
    address = listening.getsockname()
    return socket.create_connection(
        ("127.0.0.1" if address[0] == "0.0.0.0" else address[0], address[1])
    )


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "python_multipart"])
def test_a_package_that_is_missing_is_named(package, tmp_path):
    program = f"import sys; sys.modules[{package!r}] = None; from ia3.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "serve", "--adapters", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "pip install 'ia3[serve]'" in done.stderr
    assert package.replace("_", "-") in done.stderr
    assert "Traceback" not in done.stderr


def test_without_vllm_it_is_said_what_to_install(tmp_path):
    program = "import sys; sys.modules['vllm'] = None; from ia3.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "serve", "--adapters", str(tmp_path), "--engine", "vllm"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "needs the package 'vllm', which is not installed: pip install vllm" in done.stderr
    assert done.stderr.count("\n") == 1


def test_options_of_vllm_are_refused_where_they_mean_nothing(adapters):
    said = refused("--adapters", adapters, "--vllm", "max_loras=2")
    assert "it is of --engine vllm" in said
    said = refused("--adapters", adapters, "--engine", "vllm", "--vllm", "max_loras")
    assert "'max_loras' is no option of vLLM: expected NAME=VALUE" in said


def test_two_models_of_one_kind_are_refused(adapters):
    model = adapters.parent / "model"
    with pytest.raises(IA3Error, match="one language model and one encoder can be served"):
        _check_kinds([str(model), f"{model}/../model"])
    _check_kinds([str(model), "all-minilm-l6-v2"])
