"""`ia3 serve --engine vllm`: it answers as transformers and as the classifiers themselves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="make test-vllm runs this in an environment with vLLM")

import torch
from support.encoders import change, encoder_folder
from support.pairs import randomize, vectors
from support.served import Server, files_of, form, save_classifier, save_language_model
from support.tfew import T5, child_environment, plain_token_scores, random_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, T5Config

import ia3
from ia3.base.embedded import EMBEDDED_MODEL, embedded_model_folder
from ia3.base.loading import load_base_model
from ia3.classify.estimator import read_classifier
from ia3.errors import IA3Error
from ia3.serve.engine.vllm_engine import start_vllm
from ia3.tfew.prompts.encoding import Encoder
from ia3.tfew.prompts.templates import Template

pytestmark = pytest.mark.vllm

# vLLM's attention on CPUs has no heads of less than 32.
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
TEXTS = ["charged twice", "the parcel was late", "the invoice"]
PROMPTS = ["the parcel was late", "billing", "charged twice I was", "user the invoice late"]
# Words of several tokens, the first of which is the same.
PHRASES = {"billing": "billing twice", "delivery": "billing late"}
ADAPTERS = [f"a{seed}" for seed in range(4)]


@dataclass(frozen=True)
class Made:
    """A language model and an encoder, classifiers of both, and adapters of random vectors."""

    model: str
    encoder: str
    adapters: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    model = save_language_model(folder / "model", **SIZES, initializer_range=0.4)
    make_endless(model)
    encoder = str(encoder_folder(folder / "encoder"))
    adapters = folder / "adapters"
    save_classifier(model, adapters / "tickets", learning_rate=0.3)
    save_classifier(model, adapters / "phrases", learning_rate=0.3, choices=PHRASES)
    save_classifier(encoder, adapters / "sorted")
    for seed, name in enumerate(ADAPTERS):
        save_adapter(model, adapters / name, seed)
    # Its vector is on an embedding, where vLLM has none.
    save_adapter(model, adapters / "odd", 0, target_modules=["embed_tokens"])
    return Made(model, encoder, adapters)


def make_endless(folder: str) -> None:
    """Have the token that ends a text be unlikely: its score is 0, and of many others larger."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[1] = 0
    model.save_pretrained(folder)


def save_adapter(model: str, folder: Path, seed: int, **config: Any) -> None:
    base = AutoModelForCausalLM.from_pretrained(model)
    adapted = ia3.get_peft_model(base, ia3.IA3Config(**config))
    randomize(vectors(adapted), seed)
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink()  # which no upload has


@pytest.fixture(scope="module")
def server(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Both models; two adapters in a batch, three in memory."""
    adapters = tmp_path_factory.mktemp("copied") / "adapters"
    shutil.copytree(made.adapters, adapters)
    models = ("--model", made.model, "--model", made.encoder)
    few = ("--capacity", 3, "--vllm", "max_loras=2", "--timeout", 20)
    with serving("--adapters", adapters, *models, *few) as running:
        yield running


@contextmanager
def serving(*options: Any) -> Iterator[Server]:
    """A server with vLLM; none of its processes is left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        server = Server(*options, "--engine", "vllm", "--vllm", "enforce_eager=true")
    processes = descendants(server.process.pid)
    try:
        with server:
            yield server
    finally:
        for process in filter(is_there, processes):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def generated(made: Made, prompt: str, count: int, adapter: str | None) -> list[str]:
    """The likeliest tokens after a text, which are words."""
    return text_of(made, prompt, count, adapter).split()


def text_of(made: Made, prompt: str, count: int, adapter: str | None) -> str:
    """What comes after a text by transformers' own `generate`."""
    ids, model = prompt_and_model(made, prompt, adapter)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    found = model.generate(input_ids=ids, max_new_tokens=count, **options)[0]
    decode = partial(AutoTokenizer.from_pretrained(made.model).decode, skip_special_tokens=True)
    text: str = decode(found)
    return text.removeprefix(decode(ids[0]))


def prompt_and_model(made: Made, prompt: str, adapter: str | None) -> tuple[Tensor, Any]:
    model: Any = AutoModelForCausalLM.from_pretrained(made.model).eval()
    if adapter is not None:
        model = ia3.IA3Model.from_pretrained(model, made.adapters / adapter)
    tokenizer = AutoTokenizer.from_pretrained(made.model)
    return tokenizer(prompt, return_tensors="pt").input_ids, model


def complete(server: Server, model: str, prompt: str = PROMPTS[0], **options: Any) -> Any:
    asked = {"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0, **options}
    said = server.post("/v1/completions", asked)
    assert said.status == 200, said.body
    return said.body["choices"][0]


def at_once(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(calls)) as threads:
        return [each.result() for each in [threads.submit(call) for call in calls]]


def put(server: Server, name: str, folder: Path) -> None:
    body, headers = form(files_of(folder))
    said = server.ask("PUT", f"/v1/adapters/{name}", body, headers=headers)
    assert said.status == 200, said.body


def wait_until(is_so: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if is_so():
            return
        time.sleep(0.01)
    raise AssertionError(f"it did not come about within {seconds} s")


def test_rows_of_any_adapters_go_on_as_transformers(server, made):
    """More adapters than are in a batch, or in memory, at once."""
    asked = [(name, prompt) for name in (None, *ADAPTERS, "tickets") for prompt in PROMPTS]
    calls = [partial(complete, server, name or made.model, prompt) for name, prompt in asked]
    for (name, prompt), choice in zip(asked, at_once(calls), strict=True):
        assert choice["text"].split() == generated(made, prompt, 12, name), (name, prompt)
        assert choice["finish_reason"] == "length"


def test_a_stream_s_pieces_are_the_text_up_to_a_stop_text(server, made):
    expected = generated(made, PROMPTS[0], 12, "a1")
    asked = {"model": "a1", "prompt": PROMPTS[0], "max_tokens": 12, "temperature": 0}
    said = server.post("/v1/completions", {**asked, "stream": True}).body.decode()
    events = [json.loads(line[6:]) for line in said.split("\n\n")[:-2]]
    assert len(events) > 3
    text = "".join(event["choices"][0]["text"] for event in events)
    assert text.split() == expected
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    stopped = complete(server, "a1", stop=[f" {expected[3]}"])
    assert stopped["text"].split() == expected[: expected.index(expected[3])]
    assert stopped["finish_reason"] == "stop"


def test_log_probabilities_are_transformers_also_beside_texts_that_are_classified(server, made):
    ids, model = prompt_and_model(made, PROMPTS[0], "a0")
    classify = partial(server.post, "/v1/classify", {"texts": TEXTS * 8, "adapter": "tickets"})
    logprobs = partial(complete, server, "a0", logprobs=3, max_tokens=40)
    found = at_once([logprobs, logprobs, *[classify] * 6])
    tokenizer = AutoTokenizer.from_pretrained(made.model)
    for choice in found[:2]:
        told = choice["logprobs"]
        tokens = tokenizer.convert_tokens_to_ids([token.strip() for token in told["tokens"]])
        assert len(tokens) == 40
        with torch.no_grad():
            whole = torch.cat([ids, torch.tensor([tokens])], 1)
            scores = model(input_ids=whole).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
        for token, logprob, top, expected in zip(
            tokens, told["token_logprobs"], told["top_logprobs"], scores, strict=True
        ):
            assert logprob == pytest.approx(float(expected[token]), abs=1e-4)
            assert [*top.values()] == pytest.approx(expected.topk(3).values.tolist(), abs=1e-4)
    for said in found[2:]:
        assert said.status == 200
        for result, same in zip(said.body["results"], found[2].body["results"], strict=True):
            assert result["probability"] == pytest.approx(same["probability"], abs=1e-4)


def test_a_seed_gives_the_same_text_alone_and_in_company(server):
    drawn = partial(complete, server, "a2", temperature=1.0, seed=5, top_p=0.9)
    alone = drawn()["text"]
    others = [partial(complete, server, name, temperature=1.0) for name in ADAPTERS]
    assert at_once([drawn, *others])[0]["text"] == alone
    assert len({complete(server, "a2", temperature=1.0)["text"] for _ in range(4)}) > 1


@pytest.mark.parametrize("name", ["tickets", "phrases"])
def test_texts_are_classified_as_by_the_classifier_itself(server, made, name):
    expected = ia3.FewShotClassifier.load(made.adapters / name).predict_proba(TEXTS)
    asked = {"texts": TEXTS, "adapter": name}
    for said in at_once([partial(server.post, "/v1/classify", asked)] * 3):
        assert said.status == 200, said.body
        for result, row in zip(said.body["results"], expected, strict=True):
            assert probabilities(result) == pytest.approx(row, abs=1e-4)


def probabilities(result: Any) -> list[float]:
    return [each["probability"] for each in result["probabilities"]]


def test_untuned_answers_are_the_base_models_at_temperature_one(server, made):
    fit = read_classifier(made.adapters / "phrases")
    base = load_base_model(made.model)
    encoder = Encoder(base, fit.choices, chat=fit.settings["chat"])
    asked = {"texts": TEXTS, "adapter": "phrases", "untuned": True}
    results = server.post("/v1/classify", asked).body["results"]
    for text, result in zip(TEXTS, results, strict=True):
        of_templates = []
        for source in fit.templates:
            example = encoder.encode({"text": text}, Template(source))
            scores = [each.mean() for each in plain_token_scores(base, example)]
            of_templates.append(torch.stack(scores).softmax(-1))
        expected = torch.stack(of_templates).mean(0).tolist()
        assert probabilities(result["untuned"]) == pytest.approx(expected, abs=1e-4)
        assert probabilities(result) != pytest.approx(expected, abs=1e-2)


def test_an_encoder_s_texts_are_classified_here(server, made):
    expected = ia3.FewShotClassifier.load(made.adapters / "sorted").predict_proba(TEXTS)
    asked = {"text": TEXTS[0], "adapters": ["sorted", "tickets"]}
    results = server.post("/v1/classify", asked).body["results"]
    assert probabilities(results[0]) == pytest.approx(expected[0], abs=1e-4)
    assert results[1]["adapter"] == "tickets"
    assert server.post("/v1/completions", {"model": "sorted", "prompt": "the"}).status == 400


def test_what_runs_goes_on_with_the_values_of_an_adapter_that_is_replaced(server, made):
    put(server, "changing", made.adapters / "a0")
    before, after = (generated(made, PROMPTS[0], *of) for of in ((400, "a0"), (12, "a1")))
    assert before[:5] != after[:5]
    with ThreadPoolExecutor(8) as threads:
        running = [threads.submit(complete, server, "changing", max_tokens=400) for _ in range(8)]
        wait_until(lambda: server.get("/v1/load").body["running"] > 0)
        put(server, "changing", made.adapters / "a1")
        assert not all(each.done() for each in running)
        assert complete(server, "changing")["text"].split() == after
        # Others take all places in memory.
        at_once([partial(complete, server, name) for name in ADAPTERS])
        for each in running:
            assert each.result()["text"].split() == before
    assert server.ask("DELETE", "/v1/adapters/changing").status == 204
    assert server.post("/v1/completions", {"model": "changing", "prompt": "the"}).status == 404


def test_an_adapter_that_vllm_cannot_serve_is_said_to_be_so(server):
    said = server.post("/v1/completions", {"model": "odd", "prompt": "the"})
    assert said.status == 409
    message = said.body["error"]["message"]
    assert "vLLM cannot serve this adapter: 'model.embed_tokens' is no linear layer" in message
    assert complete(server, "a0")["text"]


def test_a_stream_that_its_client_leaves_is_computed_no_further(server):
    asked = {"model": "a0", "prompt": "the", "max_tokens": 500, "temperature": 0, "stream": True}
    body = json.dumps(asked).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(server.address) as client:
        client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        assert client.recv(1000)
    record = server.logged("request", stream=True, model="a0")
    assert record["tokens"] < 500
    wait_until(lambda: server.get("/v1/load").body["running"] == 0)


def test_lines_of_the_log_have_what_is_the_servers_alone(server):
    server.get("/v1/models")
    known = {"time", "level", "event", "id", "method", "route", "status", "seconds"}
    assert {*server.logged("request", route="/v1/models")} == known
    counts = server.get("/metrics").body.decode()
    (batches,) = (line for line in counts.splitlines() if line.startswith("ia3_batches_total"))
    assert float(batches.split()[1]) > 0


def test_what_runs_is_finished_at_ctrl_c_and_no_process_is_left(server, made):
    """The last one: the server ends. A terminal's Ctrl-C gets to all processes."""
    processes = [server.process.pid, *descendants(server.process.pid)]
    assert len(processes) > 2
    found: list[Any] = []
    asking = threading.Thread(target=lambda: found.append(complete(server, "a3", max_tokens=400)))
    asking.start()
    wait_until(lambda: server.get("/v1/load").body["running"] > 0)
    for process in processes[1:]:
        os.kill(process, signal.SIGINT)
    assert server.stop(signal.SIGINT) == 130
    asking.join()
    assert found[0]["text"].split() == generated(made, PROMPTS[0], 400, "a3")
    assert not any(line.startswith("Traceback") for line in server.lines)
    wait_until(lambda: not any(map(is_there, processes)))


def test_the_embedded_model_in_vllm_and_the_end_of_its_processes(tmp_path):
    adapters, model = tmp_path / "adapters", EMBEDDED_MODEL
    save_classifier(model, adapters / "tickets")
    folder = str(embedded_model_folder())
    save_adapter(folder, adapters / "random", 0)
    change(adapters / "random/adapter_config.json", base_model_name_or_path=model)
    made = Made(folder, "", adapters)
    with serving("--adapters", adapters, "--timeout", 60) as server:
        rows = [("random", PROMPTS[0]), (None, PROMPTS[0]), ("random", PROMPTS[1])]
        calls = [partial(complete, server, name or model, prompt) for name, prompt in rows]
        for (name, prompt), choice in zip(rows, at_once(calls), strict=True):
            assert choice["text"] == text_of(made, prompt, 12, name)
        expected = ia3.FewShotClassifier.load(adapters / "tickets").predict_proba(TEXTS)
        said = server.post("/v1/classify", {"texts": TEXTS, "adapter": "tickets"})
        for result, row in zip(said.body["results"], expected, strict=True):
            assert probabilities(result) == pytest.approx(row, abs=1e-3)
        (core,) = filter(is_core, descendants(server.process.pid))
        asked = {"model": model, "prompt": "Once upon a time", "max_tokens": 500}
        with ThreadPoolExecutor(1) as threads:
            running = threads.submit(server.post, "/v1/completions", asked)
            wait_until(lambda: server.get("/v1/load").body["running"] > 0)
            os.kill(core, signal.SIGKILL)
            assert running.result().status in (409, 503)
        assert server.process.wait(60) == 1
        assert "vLLM has ended" in server.said()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_lora": 2}, "vLLM has no option 'max_lora'; did you mean 'max_loras'"),
        ({"enable_lora": False}, "'enable_lora' of vLLM is this server's own"),
        ({"max_num_seqs": -1}, "vLLM cannot serve .* max_num_seqs is -1: Input should be greater"),
    ],
)
def test_options_that_vllm_cannot_start_with_are_refused(made, options, words):
    with pytest.raises(IA3Error, match=words):
        start_vllm(made.model, 1, options=options)


def test_models_that_vllm_would_compute_otherwise_are_refused(made, tmp_path):
    random_model(T5Config(**T5)).save_pretrained(tmp_path / "t5")
    with pytest.raises(IA3Error, match="has an encoder and a decoder"):
        start_vllm(str(tmp_path / "t5"), 1)
    folder = shutil.copytree(made.model, tmp_path / "model")
    GenerationConfig(no_repeat_ngram_size=2, eos_token_id=1).save_pretrained(folder)
    with pytest.raises(IA3Error, match="has no_repeat_ngram_size, which vLLM does not follow"):
        start_vllm(str(folder), 1)


def test_ctrl_c_while_vllm_starts_ends_all_of_its_processes(made, tmp_path):
    options = ("--port", 0, "--adapters", tmp_path, "--model", made.model, "--engine", "vllm")
    process = subprocess.Popen(
        [sys.executable, "-m", "ia3", "serve", *map(str, options)],
        env={**child_environment(), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until(lambda: any(map(is_core, descendants(process.pid))), seconds=120)
        started = descendants(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130
        wait_until(lambda: not any(map(is_there, started)))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def is_core(process: int) -> bool:
    """Whether a process is vLLM's engine; those that it starts compute."""
    with suppress(OSError):
        return "EngineCore" in Path(f"/proc/{process}/cmdline").read_text()
    return False


def descendants(process: int) -> list[int]:
    """The processes that one has started, and these."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])

    def below(one: int) -> list[int]:
        found = [child for child, parent in parents.items() if parent == one]
        return [*found, *(each for child in found for each in below(child))]

    return below(process)


def is_there(process: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
