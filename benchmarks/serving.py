"""A server of a thousand adapters under load, over loopback: six ratios, and those to reach.

    python benchmarks/serving.py [--seconds 8] [--turns 3] [--adapters 1000] [--write]

It makes classifiers (random vectors on SmolLM2-135M and on all-MiniLM-L6-v2, files as
`FewShotClassifier.save` writes them), starts two `ia3 serve` of them, one with room for all and one
with room for few, and is their clients. What is compared takes turns: each turn lasts `--seconds`,
and its clients send the next request when the last is answered. Tokens and texts of requests that
begin before a turn or end after it count by the share of their time within it. `--write` adds a
line to `benchmarks/results/serving.jsonl`.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))
# ruff: noqa: E402

import torch
from reporting import RESULTS, circumstances, digits, table
from support.http_client import Client
from support.served import Server
from tickets import TICKETS

from ia3 import FewShotClassifier
from ia3.files.records import append_record

MODELS = {"language model": "smollm2-135m-instruct", "encoder": "all-minilm-l6-v2"}
CLIENTS = 32
ROOM = 64
ALL_OF_ONE = 16
MAX_TOKENS = (16, 48)
LABELS = ["billing", "delivery"]
PROMPTS = [
    "Once upon a time, in a village by the sea, there lived an old woman who",
    "The history of the steam engine begins in the early eighteenth century, when",
    "To make a good soup you need onions, carrots and time. First",
    "The difference between weather and climate is that",
]


# -- what is served --------------------------------------------------------------------------------


def write_classifiers(root: Path, count: int, upper: int, blocks: int) -> None:
    """`lm0 ...` and `encoder0 ...`, `count` each, and `upper` of the uppermost `blocks`."""
    save_copies(FewShotClassifier(MODELS["encoder"], steps=0), root, "encoder", count)
    language_model = FewShotClassifier(MODELS["language model"], steps=0)
    save_copies(language_model, root, "lm", count)
    of_blocks = FewShotClassifier(MODELS["language model"], steps=0, upper_blocks=blocks)
    save_copies(of_blocks, root, "upper", upper)


def save_copies(classifier: FewShotClassifier, root: Path, name: str, count: int) -> None:
    """Save a classifier `count` times, each with other vectors, near to ones as trained ones."""
    classifier.fit(TICKETS, LABELS * (len(TICKETS) // 2))
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        for vector in classifier.adapter_.vectors.values():
            vector.copy_(1 + 0.03 * torch.randn(vector.shape, generator=generator))
        classifier.save(root / f"{name}{number}")


# -- clients ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Done:
    """A request that was answered: when, and how many tokens or texts it was."""

    began: float
    ended: float
    amount: int


Ask = Callable[[Client, random.Random], Awaitable[int]]


def generating(names: Sequence[str]) -> Ask:
    """A completion of one of these models; its amount is its tokens."""

    async def ask(client: Client, draw: random.Random) -> int:
        body = {
            "model": draw.choice(names),
            "prompt": draw.choice(PROMPTS),
            "max_tokens": draw.randint(*MAX_TOKENS),
            "temperature": 0,
        }
        found = await _asked(client, "/v1/completions", body)
        return int(found["usage"]["completion_tokens"])

    return ask


def classifying(names: Sequence[str]) -> Ask:
    """A text by one of these adapters."""

    async def ask(client: Client, draw: random.Random) -> int:
        body = {"texts": [f"{draw.choice(TICKETS)} {draw.randrange(1000)}"]}
        await _asked(client, "/v1/classify", body | {"adapter": draw.choice(names)})
        return 1

    return ask


async def _asked(client: Client, path: str, body: Mapping[str, Any]) -> Any:
    answer = await client.call("POST", path, body)
    if answer.status != 200:
        raise RuntimeError(f"{path} of {body}: {answer.status} {answer.body[:500]!r}")
    found = answer.json()
    for result in found.get("results", ()):
        if "error" in result:
            raise RuntimeError(f"{path} of {body}: {result['error']}")
    return found


async def under_load(
    port: int, ask: Ask, clients: int, seconds: float, seed: int, warm_up: float
) -> float:
    """Amount a second, of so many clients over so many seconds, after some that do not count."""
    started = time.perf_counter()
    begin, end = started + warm_up, started + warm_up + seconds
    done: list[Done] = []

    async def client(number: int) -> None:
        draw, connection = random.Random(f"{seed} {number}"), Client(port)
        try:
            while (began := time.perf_counter()) < end:
                amount = await ask(connection, draw)
                done.append(Done(began, time.perf_counter(), amount))
        finally:
            connection.close()

    async with asyncio.TaskGroup() as group:
        for number in range(clients):
            group.create_task(client(number))
    return within(done, begin, end) / seconds


def within(done: Sequence[Done], begin: float, end: float) -> float:
    """What was done between two times: of a request that reaches beyond, the share of its time."""
    return sum(
        each.amount
        * max(0.0, min(each.ended, end) - max(each.began, begin))
        / (each.ended - each.began)
        for each in done
    )


def take_turns(contestants: Mapping[str, Callable[[int], float]], turns: int) -> dict[str, Any]:
    """Name -> what it reached in each turn; a new order each turn, the same seed for all of it."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    order = random.Random(0)
    for turn in range(turns):
        for name in order.sample([*contestants], len(contestants)):
            found[name].append(contestants[name](turn))
    return found


def loads(
    contestants: Mapping[str, tuple[int, Ask, int]], turns: int, seconds: float, warm_up: float
) -> dict[str, Any]:
    """Name -> amounts a second, of name -> (port, what is asked, clients)."""

    def one(port: int, ask: Ask, clients: int) -> Callable[[int], float]:
        return lambda turn: asyncio.run(under_load(port, ask, clients, seconds, turn, warm_up))

    return take_turns({name: one(*each) for name, each in contestants.items()}, turns)


def times(steps: Mapping[str, Callable[[], object]], turns: int) -> dict[str, Any]:
    """Name -> seconds."""

    def timed(step: Callable[[], object]) -> Callable[[int], float]:
        def one(_: int) -> float:
            start = time.perf_counter()
            step()
            return time.perf_counter() - start

        return one

    for step in steps.values():
        step()
    return take_turns({name: timed(step) for name, step in steps.items()}, turns)


# -- the six rows ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What is compared, what was found, and what is to be reached."""

    what: str
    found: float
    target: float
    at_least: bool
    unit: str = ""
    seen: str = ""

    @property
    def reached(self) -> bool:
        return self.found >= self.target if self.at_least else self.found <= self.target


def ratio(found: Mapping[str, Sequence[float]], name: str, against: str) -> float:
    """The median over the turns of one's figure to the other's in the same turn."""
    pairs = zip(found[name], found[against], strict=True)
    return statistics.median(own / other for own, other in pairs)


def _medians(found: Mapping[str, Sequence[float]], unit: str, scale: float = 1.0) -> str:
    each = [f"{name} {digits(scale * statistics.median(v))}" for name, v in found.items()]
    return f"{', '.join(each)} {unit}"


def generation_rows(port: int, names: Sequence[str], turns: int, seconds: float) -> list[Row]:
    """32 clients over as many adapters, on the base model alone, and one request at a time."""
    base = MODELS["language model"]
    everyone_once(port, names)
    found = loads(
        {
            "adapters": (port, generating(names), CLIENTS),
            "base": (port, generating([base]), CLIENTS),
            "one at a time": (port, generating(names), 1),
        },
        turns,
        seconds,
        # Clients start together, and are to have drifted apart.
        warm_up=seconds / 2,
    )
    seen = _medians(found, "tokens/s")
    return [
        Row(
            f"{CLIENTS} clients generating over {len(names)} adapters / on the base model",
            ratio(found, "adapters", "base"),
            0.95,
            True,
            seen=seen,
        ),
        Row(
            f"{CLIENTS} clients generating over {len(names)} adapters / one at a time",
            ratio(found, "adapters", "one at a time"),
            3.0,
            True,
            seen=seen,
        ),
    ]


def classification_rows(
    engine: str, ports: tuple[int, int], names: Sequence[str], turns: int, seconds: float
) -> list[Row]:
    """32 clients over all adapters, over one, and over all where few have room."""
    for port, some in zip(ports, (names, names[: 2 * ROOM]), strict=True):
        everyone_once(port, some)
    found = loads(
        {
            "all": (ports[0], classifying(names), CLIENTS),
            "one": (ports[0], classifying(names[:1]), CLIENTS),
            f"room for {ROOM}": (ports[1], classifying(names), CLIENTS),
        },
        turns,
        seconds,
        warm_up=1.0,
    )
    seen = _medians(found, "texts/s")
    what = f"{engine}: {CLIENTS} clients classifying over {len(names):,} adapters"
    return [
        Row(f"{what} / over one", ratio(found, "all", "one"), 0.9, True, seen=seen),
        Row(
            f"{what}, room for {ROOM} / resident",
            ratio(found, f"room for {ROOM}", "all"),
            0.5,
            True,
            seen=seen,
        ),
    ]


def everyone_once(port: int, names: Sequence[str]) -> None:
    """Ask each adapter once, so that those that have room are resident."""

    async def ask_all() -> None:
        client = Client(port)
        for begin in range(0, len(names), ROOM // 2):
            some = names[begin : begin + ROOM // 2]
            await _asked(client, "/v1/classify", {"texts": ["late"] * len(some), "adapters": some})
        client.close()

    asyncio.run(ask_all())


def sharing_row(port: int, names: Sequence[str], turns: int) -> Row:
    """One text with many adapters of the upper half, at once and in as many calls."""

    def in_turn(bodies: Sequence[Mapping[str, Any]]) -> Callable[[], object]:
        async def ask_all() -> None:
            client = Client(port)
            for body in bodies:
                await _asked(client, "/v1/classify", body)
            client.close()

        return lambda: asyncio.run(ask_all())

    text = TICKETS[0]
    found = times(
        {
            "one call": in_turn([{"text": text, "adapters": [*names]}]),
            "single calls": in_turn([{"texts": [text], "adapter": name} for name in names]),
        },
        turns,
    )
    return Row(
        f"one text with {len(names)} adapters of the upper half / {len(names)} calls, time",
        ratio(found, "one call", "single calls"),
        0.6,
        False,
        seen=_medians(found, "ms", 1e3),
    )


def http_row(engine: str, port: int, folder: Path, turns: int) -> Row:
    """One classification over HTTP, less the same one in a process without HTTP."""
    from ia3.serve.engine.bases import serve_base
    from ia3.serve.engine.classification import answers

    served = serve_base(MODELS[engine], 1)
    served.bank.add(folder.name, folder)
    text = TICKETS[0]

    # On a connection that is open, as clients keep theirs.
    loop = asyncio.new_event_loop()
    client = Client(port)
    body = {"texts": [text], "adapter": folder.name}
    found = times(
        {
            "HTTP": lambda: loop.run_until_complete(_asked(client, "/v1/classify", body)),
            "without": lambda: answers(served, [text], [folder.name]),
        },
        turns,
    )
    client.close()
    loop.close()
    served.bank.close()
    return Row(
        f"{engine}: added by HTTP to one classification, median",
        1e3 * (statistics.median(found["HTTP"]) - statistics.median(found["without"])),
        5.0,
        False,
        unit=" ms",
        seen=_medians(found, "ms", 1e3),
    )


def in_markdown(rows: Sequence[Row]) -> str:
    """The rows as a table."""
    return table(
        ["measured", "found", "reach", "reached", "medians"],
        [
            [
                row.what,
                f"{digits(row.found)}{row.unit}",
                f"{'≥' if row.at_least else '≤'} {row.target:g}{row.unit}",
                "yes" if row.reached else "**no**",
                row.seen,
            ]
            for row in rows
        ],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and with `--write` keep it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8.0, help="of each turn")
    parser.add_argument("--turns", type=int, default=3, help="of each contestant")
    parser.add_argument("--adapters", type=int, default=1000, help="of each base model")
    parser.add_argument("--write", action="store_true", help="keep the results")
    options = parser.parse_args(arguments)
    count, turns, seconds = options.adapters, options.turns, options.seconds
    started = time.monotonic()
    rows: list[Row] = []

    def say(what: str) -> None:
        print(f"{time.monotonic() - started:.0f} s: {what}", file=sys.stderr, flush=True)

    def measured(new: Sequence[Row]) -> None:
        for row in new:
            say(f"{row.what}: {digits(row.found)}{row.unit} ({row.seen})")
        rows.extend(new)

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        folder = root / "adapters"
        folder.mkdir()
        say("making adapters")
        write_classifiers(folder, count, ALL_OF_ONE, blocks=15)
        models = [word for name in MODELS.values() for word in ("--model", name)]
        common = [*models, "--adapters", folder, "--log-level", "warning"]
        with (
            Server(*common, "--capacity", count + ALL_OF_ONE) as all_of_them,
            Server(*common, "--capacity", ROOM) as few,
        ):
            say("both servers are ready")
            ports = all_of_them.port, few.port
            try:
                names = [f"lm{number}" for number in range(count)]
                measured(generation_rows(ports[0], names[:CLIENTS], turns, seconds))
                for engine, name in (("encoder", "encoder"), ("language model", "lm")):
                    each = [f"{name}{number}" for number in range(count)]
                    measured(classification_rows(engine, ports, each, turns, seconds))
                upper = [f"upper{number}" for number in range(ALL_OF_ONE)]
                measured([sharing_row(ports[0], upper, 2 * turns)])
                for engine, name in (("encoder", "encoder"), ("language model", "lm")):
                    measured([http_row(engine, ports[0], folder / f"{name}0", 30 * turns)])
            except BaseException:
                print(all_of_them.said()[-3000:], few.said()[-3000:], file=sys.stderr)
                raise
            say(f"memory of the server with all: {all_of_them.resident_bytes() / 2**20:.0f} MiB")
    print(in_markdown(rows))
    say("done")
    if options.write:
        record = {"where": circumstances(), "rows": [vars(row) for row in rows]}
        append_record(RESULTS / "serving.jsonl", record)


if __name__ == "__main__":
    main()
