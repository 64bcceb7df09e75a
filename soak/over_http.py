"""A server under right and wrong requests of several clients, who also leave; killed and started.

What is asked rightly is compared with what the classifiers and the model say offline, whatever
else goes on. Of anything else nothing may come but an answer below 500 that says what is wrong. In
the second half of the time the process is killed again and again while adapters are uploaded: what
is then in the folder is the old one or the new one. Memory may not grow once a minute is over. At
last a server of ten thousand adapters is started beside one of none.

    python soak/over_http.py --seconds 600 --seed 1
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
# ruff: noqa: E402

import torch
from mutations import document, text
from support.http_client import Answer, Client, call, save_tiny_base
from support.served import Server, form

from ia3 import FewShotClassifier, IA3Model
from ia3.base.loading import load_base_model

CLIENTS = 8
# Of the folder, of which two are uploaded in turn.
FILES = ("adapter_config.json", "adapter_model.safetensors", "ia3_task.json")
TEXTS = ["late again", "charged twice", "no parcel came", "wrong invoice", "é ü 漢字", "x" * 300]
PROMPTS = ["it is late", "charged twice and", "Once upon a time there", "a"]
TOKENS = 12
# A kill, and the start after it, take some seconds.
BETWEEN_KILLS = 6.0
# Until then caches fill: of compiled products, one for each length of a batch.
WARM_UP = 60.0
# What a server may take more at the end than when it was warm.
GROWTH = 64 * 2**20
MANY = 10_000
# What the start of a server of so many may take longer.
MANY_SECONDS = 10.0
# Beside what a request has.
WORDS = [
    *("text", "texts", "adapter", "adapters", "limit", "untuned", "model", "prompt", "messages"),
    *("role", "content", "user", "stream", "temperature", "top_p", "stop", "seed", "max_tokens"),
    *("logprobs", "top_logprobs", "n", "stream_options", "include_usage", "*", "one", "two"),
    *("name", "csv", "text_column", "label_column", "base", "__base__", "../one", "peft_type"),
]
BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/classify": [
        {"texts": TEXTS[:3], "adapter": "one"},
        {"texts": TEXTS[:2], "adapters": ["one", "two"], "untuned": True},
        {"text": {"text": TEXTS[0]}, "adapters": "*", "limit": 2},
    ],
    "/v1/completions": [
        {"model": "one", "prompt": PROMPTS[0], "max_tokens": 5, "logprobs": 2, "seed": 1},
        {"model": "two", "prompt": [[3, 4], [5]], "max_tokens": 3, "n": 2, "stream": True},
        {"model": "one", "prompt": PROMPTS[1], "stop": ["a", " "], "top_p": 0.5, "max_tokens": 9},
    ],
    "/v1/chat/completions": [
        {
            "model": "two",
            "messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}],
            "max_completion_tokens": 4,
            "stream": True,
            "stream_options": {"include_usage": True},
            "logprobs": True,
            "top_logprobs": 2,
        },
    ],
    "/v1/learn": [
        {"name": "new", "csv": "text,label\na,b\n", "text_column": "text", "label_column": "label"}
    ],
}
PATHS = [
    *("/v1/adapters/..", "/v1/adapters/a%2Fb", "/v1/adapters/%00", "/v1/adapters/" + "a" * 300),
    *("/v1/adapters/nothing", "/v1/adapters/%FF", "/v1/learn/x", "/v1/learn/x/events", "/v1"),
    *("/page/..%2fapp.py", "/page/nothing", "//", "/v1/adapters/one/vectors", "/%", "/?a=%zz"),
    *("/healthz", "/readyz", "/metrics", "/v1/load", "/v1/models", "/v1/adapters", "/"),
]

on_json, on_bytes = document(WORDS), text(WORDS)


class WrongError(Exception):
    """Something that may not happen."""


class Offline:
    """What the server has to say, computed before it starts."""

    def __init__(self, root: Path) -> None:
        self.model = save_tiny_base(root / "model")
        self.files: dict[str, dict[str, bytes]] = {}
        self.probabilities: dict[tuple[str, str], dict[str, float]] = {}
        self.texts: dict[tuple[str, str], str] = {}
        for number, name in enumerate(("one", "two", "three")):
            labels = [f"{name} a", f"{name} b"]
            classifier = FewShotClassifier(str(self.model), steps=3, seed=number)
            classifier.fit(TEXTS[:4], labels * 2).save(root / "saved" / name)
            # As it is read again: what is served has other values than what was trained by nothing.
            read = FewShotClassifier.load(root / "saved" / name)
            for asked, row in zip(TEXTS, read.predict_proba(TEXTS).tolist(), strict=True):
                self.probabilities[name, asked] = dict(zip(labels, row, strict=True))
            folder = root / "saved" / name
            self.files[name] = {file: (folder / file).read_bytes() for file in FILES}
            base = load_base_model(str(self.model))
            model = IA3Model.from_pretrained(base.model, folder)
            for prompt in PROMPTS:
                ids = base.tokenizer(prompt, return_tensors="pt").input_ids
                with torch.no_grad():
                    new = model.generate(input_ids=ids, do_sample=False, max_new_tokens=TOKENS)
                self.texts[name, prompt] = base.tokenizer.decode(
                    new[0, ids.shape[1] :], skip_special_tokens=True
                )
            model.unload()

    def fill(self, folder: Path) -> None:
        """The folder of a server, of two adapters."""
        for name in ("one", "two"):
            (folder / name).mkdir(parents=True)
            for file, content in self.files[name].items():
                (folder / name / file).write_bytes(content)


class Load:
    """Clients that go on until they are told to end."""

    def __init__(self, offline: Offline, draw: random.Random) -> None:
        self.offline = offline
        self.draw = draw
        self.counts: Counter[str] = Counter()
        # In words, as figures of several runs are added up.
        self.measured: dict[str, str] = {}
        self.failures: list[str] = []
        self.server: Server
        self.killing = False
        self._actions: list[tuple[float, Callable[[Client], Awaitable[None]]]] = [
            (6, self.classify),
            (3, self.generate),
            (1, self.leave),
            (8, self.wrong_body),
            (2, self.wrong_upload),
            (1, self.no_http),
            (3, self.wrong_path),
            (0.5, self.come_and_go),
            (0.2, self.reload),
        ]

    async def run(self, until: float) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(self._client(until))

    async def _client(self, until: float) -> None:
        client = Client(self.server.port)
        weights, actions = zip(*self._actions, strict=True)
        while time.monotonic() < until:
            [action] = self.draw.choices(actions, weights)
            try:
                await asyncio.wait_for(action(client), 60)
            except WrongError as wrong:
                self._failed(action, str(wrong))
            except TimeoutError:
                self._failed(action, "no answer within 60 seconds")
                client.close()
            except (OSError, EOFError, ValueError) as error:
                client.close()
                if self.killing:
                    return
                self._failed(action, f"{type(error).__name__}: {error}")
            self.counts[action.__name__] += 1
        client.close()

    def _failed(self, action: Any, what: str) -> None:
        # Of one kind the first few are enough to read.
        self.counts["failed"] += 1
        if len(self.failures) < 20:
            self.failures.append(f"{action.__name__}: {what}"[:1500])

    async def classify(self, client: Client) -> None:
        """Texts by one of two adapters each, rightly."""
        count = self.draw.choice([1, 1, 3, 8])
        texts = self.draw.choices(TEXTS, k=count)
        names = self.draw.choices(["one", "two"], k=count)
        body = {"texts": texts, "adapters": names}
        answer = await client.call("POST", "/v1/classify", body)
        if answer.status == 429:
            self.counts["put off"] += 1
            return
        results = _right(answer, body)["results"]
        for asked, name, result in zip(texts, names, results, strict=True):
            found = {e["label"]: e["probability"] for e in result["probabilities"]}
            expected = self.offline.probabilities[name, asked]
            if found.keys() != expected.keys() or any(
                abs(found[label] - expected[label]) > 1e-4 for label in expected
            ):
                raise WrongError(f"{asked!r} by {name}: {found}, expected {expected}")
            self.counts["answers compared"] += 1

    async def generate(self, client: Client) -> None:
        """A completion, rightly; half of them streamed."""
        name, prompt = self.draw.choice(["one", "two"]), self.draw.choice(PROMPTS)
        body = {"model": name, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        if self.draw.random() < 0.5:
            pieces = [e["choices"][0]["text"] async for e in _events(client, body)]
            found = "".join(pieces)
        else:
            answer = await client.call("POST", "/v1/completions", body)
            if answer.status == 429:
                return
            found = _right(answer, body)["choices"][0]["text"]
        if found != self.offline.texts[name, prompt]:
            raise WrongError(f"{body}: {found!r}, expected {self.offline.texts[name, prompt]!r}")
        self.counts["texts compared"] += 1

    async def leave(self, client: Client) -> None:
        """Begin a request, and close the connection before its end."""
        body = {"model": "one", "prompt": PROMPTS[0], "max_tokens": 500, "stream": True}
        own = Client(self.server.port)
        if self.draw.random() < 0.5:
            body = {"texts": TEXTS * 5, "adapter": "two"}
        path = "/v1/completions" if "model" in body else "/v1/classify"
        asked = asyncio.ensure_future(own.begin("POST", path, body))
        await asyncio.sleep(self.draw.random() * 0.05)
        asked.cancel()
        own.close()
        await asyncio.gather(asked, return_exceptions=True)

    async def wrong_body(self, client: Client) -> None:
        """A body that is nearly right."""
        path = self.draw.choice([*BODIES])
        body = json.dumps(self.draw.choice(BODIES[path])).encode()
        for _ in range(self.draw.choice([1, 1, 2, 4])):
            body = on_json(body, self.draw)
        # Long answers are asked for elsewhere.
        body = body[: 1 << 17].replace(b'"stream": "', b'"stream":"')
        answer = await self._asked(client, "POST", path, body, {"Content-Type": "application/json"})
        self._seen(answer, f"POST {path} {body[:600]!r}")

    async def wrong_upload(self, client: Client) -> None:
        """Files that are nearly an adapter's, or a body that is nearly an upload."""
        files = dict(self.offline.files[self.draw.choice(["one", "two", "three"])])
        for _ in range(self.draw.choice([1, 2])):
            name = self.draw.choice([*files])
            change = on_bytes if name.endswith("safetensors") else on_json
            files[name] = change(files[name], self.draw)
        if self.draw.random() < 0.2:
            del files[self.draw.choice([*files])]
        body, headers = form(files)
        if self.draw.random() < 0.3:
            body = on_bytes(body, self.draw)
        path = f"/v1/adapters/upload-{self.draw.randrange(4)}"
        answer = await self._asked(client, "PUT", path, body, headers)
        self._seen(answer, f"PUT {path} of {[*files]}, {len(body)} bytes")

    async def no_http(self, client: Client) -> None:
        """Bytes that are nearly HTTP."""
        body = json.dumps(self.draw.choice(BODIES["/v1/classify"])).encode()
        head = (
            f"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        data = on_bytes(head.encode() + body, self.draw)[: 1 << 16]
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        writer.write(data)
        writer.write_eof()
        # It answers, or closes the connection.
        found = await asyncio.wait_for(reader.read(200), 30)
        writer.close()
        if found and found.split()[1][:1] == b"5":
            raise WrongError(f"{data[:300]!r}: {found!r}")

    async def wrong_path(self, client: Client) -> None:
        """Another method, or another address."""
        method = self.draw.choice(["GET", "GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
        path = self.draw.choice(PATHS)
        if self.draw.random() < 0.3:
            made = on_bytes(path.encode(), self.draw)[:3000]
            path = "/" + "".join(chr(byte) for byte in made if 0x21 <= byte < 0x7F)
        if method == "DELETE" and path.strip("/").startswith(
            ("v1/adapters/one", "v1/adapters/two")
        ):
            return
        body = b"{}" if method in ("POST", "PUT", "PATCH") else None
        answer = await self._asked(client, method, path, body, {})
        self._seen(answer, f"{method} {path[:300]}")

    async def come_and_go(self, client: Client) -> None:
        """An adapter is added, answers, and is deleted."""
        name = f"going-{self.draw.randrange(10**6)}"
        body, headers = form(self.offline.files["three"])
        _right(await client.call("PUT", f"/v1/adapters/{name}", body, headers), name)
        asked = {"texts": [TEXTS[1]], "adapter": name}
        [result] = _right(await client.call("POST", "/v1/classify", asked), asked)["results"]
        expected = self.offline.probabilities["three", TEXTS[1]]
        if abs(result["probability"] - max(expected.values())) > 1e-4:
            raise WrongError(f"{name}: {result}, expected {expected}")
        _right(await client.call("DELETE", f"/v1/adapters/{name}"), name)

    async def reload(self, client: Client) -> None:
        """The folder is looked through."""
        _right(await client.call("POST", "/v1/adapters/reload"), "reload")

    async def _asked(
        self, client: Client, method: str, path: str, body: Any, headers: Mapping[str, str]
    ) -> Answer:
        return await client.call(method, path, body, headers)

    def _seen(self, answer: Answer, of: str) -> None:
        self.counts["refused" if answer.status >= 400 else "taken"] += 1
        if answer.status >= 500:
            raise WrongError(f"{of}: {answer.status} {answer.body[:500]!r}")
        if b"Traceback" in answer.body:
            raise WrongError(f"{of}: {answer.body[:2000]!r}")
        if answer.status >= 400:
            try:
                assert answer.json()["error"]["message"]
            except (ValueError, LookupError, TypeError, AssertionError):
                raise WrongError(f"{of}: {answer.status} {answer.body[:300]!r}") from None


def _right(answer: Answer, of: object) -> Any:
    if not 200 <= answer.status < 300:
        raise WrongError(f"{of}: {answer.status} {answer.body[:500]!r}")
    return answer.json() if answer.body else None


async def _events(client: Client, body: dict[str, Any]) -> Any:
    try:
        async for event in client.events("/v1/completions", body | {"stream": True}):
            yield event
    except AssertionError as error:
        raise WrongError(f"{body}: {error}") from error


def run(seconds: float, seed: int) -> dict[str, object]:
    """Load for half of so many seconds, kills for the other half; see the module."""
    torch.set_num_threads(1)
    load_counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        offline = Offline(root)
        load = Load(offline, random.Random(seed))
        end = time.monotonic() + seconds
        _under_load(load, root / "load", seconds / 2)
        kills = _killed(load, root / "kills", end)
        _many(load, root / "many")
        load_counts.update(load.counts)
    return {**load_counts, **kills, **load.measured, "failures": load.failures}


def _server(load: Load, root: Path) -> Server:
    root.mkdir(exist_ok=True)
    options = ["--model", load.offline.model, "--adapters", root / "adapters", "--no-train"]
    load.server = Server(*options)
    return load.server


def _under_load(load: Load, root: Path, seconds: float) -> None:
    load.offline.fill(root / "adapters")
    with _server(load, root) as server:
        begun = time.monotonic()
        asyncio.run(load.run(begun + min(WARM_UP, seconds / 2)))
        before = server.resident_bytes()
        asyncio.run(load.run(begun + seconds))
        growth = server.resident_bytes() - before
        load.measured["memory when warm"] = f"{before >> 20} MiB"
        load.measured["memory grown"] = f"{growth >> 20} MiB in {seconds:.0f} s"
        if seconds >= 2 * WARM_UP and growth > GROWTH:
            load.failures.append(f"memory has grown by {growth >> 20} MiB in {seconds:.0f} s")
        _check_end(load, server)


def _check_end(load: Load, server: Server) -> None:
    """Nothing is left running, and nothing but refusals has been logged."""
    for _ in range(300):
        found = call(server.port, "GET", "/v1/load").json()
        if not found["running"] and not found["waiting"]:
            break
        time.sleep(0.1)
    else:
        load.failures.append(f"30 seconds after the last request the server is at {found}")
    for trace in traces(server.said())[:5]:
        load.failures.append(f"logged: {trace[-1200:]}")
    if (code := server.stop()) != 0:
        load.failures.append(f"told to end, the server ended with {code}")


def traces(log: str) -> list[str]:
    """The tracebacks of a log of JSON lines, one of a kind."""
    found = {}
    for line in log.splitlines():
        if "Traceback" in line:
            try:
                trace = str(json.loads(line)["trace"])
            except (ValueError, LookupError):
                trace = line
            found[trace.splitlines()[-1][:60]] = trace
    return [*found.values()]


def _killed(load: Load, root: Path, end: float) -> Counter[str]:
    """Kill it amid uploads, start it again, and look at what is there."""
    counts: Counter[str] = Counter()
    load.offline.fill(root / "adapters")
    while time.monotonic() < end - BETWEEN_KILLS:
        with _server(load, root) as server:
            _look(load, server, root / "adapters", counts)
            load.killing = True
            asyncio.run(_uploads_until_killed(load, server))
            load.killing = False
            counts["kills"] += 1
    return counts


async def _uploads_until_killed(load: Load, server: Server) -> None:
    uploads = [form(load.offline.files[name]) for name in ("one", "three")]

    async def upload(begin: int) -> None:
        client, turn = Client(server.port), begin
        try:
            while True:
                await client.call("PUT", "/v1/adapters/turning", *uploads[turn % 2])
                turn += 1
        except (OSError, EOFError):
            client.close()

    tasks = [asyncio.ensure_future(upload(begin)) for begin in range(3)]
    await asyncio.sleep(0.3 + load.draw.random())
    server.process.kill()
    await asyncio.gather(*tasks)


def _look(load: Load, server: Server, adapters: Path, counts: Counter[str]) -> None:
    """The adapter that was uploaded when the process was killed is whole, and nothing is left."""
    answer = call(server.port, "POST", "/v1/classify", {"texts": TEXTS, "adapter": "turning"})
    if answer.status == 404 and not counts["kills"]:
        return
    results = answer.json().get("results") if answer.status == 200 else None
    versions = [[load.offline.probabilities[name, t] for t in TEXTS] for name in ("one", "three")]
    found = [{e["label"]: e["probability"] for e in r["probabilities"]} for r in results or []]
    for number, version in enumerate(versions):
        if len(found) == len(version) and all(
            seen.keys() == said.keys() and all(abs(seen[k] - said[k]) < 1e-4 for k in said)
            for seen, said in zip(found, version, strict=True)
        ):
            counts[f"after a kill, version {number + 1}"] += 1
            break
    else:
        load.failures.append(f"after a kill: {answer.status} {answer.body[:800]!r}")
        shutil.rmtree(adapters / "turning", ignore_errors=True)
    names = {each["name"] for each in call(server.port, "GET", "/v1/adapters").json()["adapters"]}
    if names - {"turning"} != {"one", "two"}:
        load.failures.append(f"after a kill the adapters are {sorted(names)}")


def _many(load: Load, root: Path) -> None:
    """A server of ten thousand adapters is ready soon after one of none is, and answers."""
    seconds = {}
    for count in (0, MANY):
        folder = root / f"of-{count}" / "adapters"
        folder.mkdir(parents=True)
        load.offline.fill(folder)
        for number in range(count):
            (folder / f"a{number}").mkdir()
            for file in FILES:
                os.link(folder / "one" / file, folder / f"a{number}" / file)
        begun = time.monotonic()
        with _server(load, folder.parent) as server:
            seconds[count] = time.monotonic() - begun
            name = f"a{count - 1}" if count else "one"
            answer = call(server.port, "POST", "/v1/classify", {"texts": TEXTS, "adapter": name})
            if answer.status != 200:
                load.failures.append(f"of {count} adapters: {answer.status} {answer.body[:500]!r}")
    more = seconds[MANY] - seconds[0]
    load.measured["start with 10,000 adapters"] = f"{more:.1f} s more"
    if more > MANY_SECONDS:
        load.failures.append(f"with {MANY:,} adapters it is ready {more:.1f} seconds later")


def main() -> None:
    """Print the counts; exit with 1 where there are failures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    found = run(given.seconds, given.seed)
    print(json.dumps(found, indent=1))
    sys.exit(bool(found["failures"]))


if __name__ == "__main__":
    main()
