"""What takes long: fuzzed files, killed processes, threads. Results add up over dated runs.

    python soak/run.py [--minutes 30] [--seed 1] [--part fuzz kills threads over_http]
    python soak/run.py --table

Each part is a module beside this one, whose `run(seconds, seed)` gives counts by what was done, and
`"failures"`: sentences that say what is needed to see it again. A line for the run is added to
`results.jsonl`; the exit code is 1 where something failed. `--table` prints the totals of all runs
as Markdown, for docs/reliability.md.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from ia3.files.records import append_record, read_records

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.jsonl"
# Each part's share of the time.
PARTS = {"fuzz": 4, "kills": 1, "threads": 1, "over_http": 1}
SEED = 20_261_129
# A part that takes so much longer than it was given has hung.
GRACE = 300.0
PACKAGES = ("torch", "transformers", "safetensors", "peft", "jinja2", "pyyaml", "hypothesis")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--table", action="store_true", help="print the totals and run nothing")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    failures = []
    if not options.table:
        record = run(options.minutes * 60, options.seed, options.part)
        append_record(options.results, record)
        failures = [
            f"{part}: {failure}"
            for part, found in record["parts"].items()
            for failure in found["failures"]
        ]
    records = read_records(options.results, lambda record: "parts" in record, "a run")
    print(table(records))
    print("".join(f"\nFAILED {failure}" for failure in failures))
    sys.exit(bool(failures))


def run(seconds: float, seed: int, parts: Sequence[str]) -> dict[str, Any]:
    """Run the parts, each in a process of its own; what there is to know about the run."""
    started, commit = datetime.now(UTC), _git("rev-parse", "--short", "HEAD")
    found = {}
    for part in parts:
        # Each its own, however long the one before took to start and to end.
        share = seconds * PARTS[part] / sum(PARTS[part] for part in parts)
        begun = time.monotonic()
        found[part] = _run_part(part, share, seed)
        found[part]["seconds"] = round(time.monotonic() - begun, 1)
    return {
        "date": started.isoformat(timespec="seconds"),
        "seed": seed,
        "commit": commit,
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no", "src", "soak")),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "cores": os.cpu_count(),
        "parts": found,
    }


def _run_part(part: str, seconds: float, seed: int) -> dict[str, Any]:
    # Of its own: a part that ends its process or hangs ends that alone.
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    future = pool.submit(_call, part, seconds, seed)
    try:
        _wait(part, seconds, future)
        if future.done():
            return future.result()
        for process in multiprocessing.active_children():
            process.kill()
        failure = f"has not ended {GRACE:.0f} s after its time"
    except BrokenProcessPool:
        failure = "ended its process"
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return {"failures": [f"the part itself {failure} (seed {seed})"]}


def _call(part: str, seconds: float, seed: int) -> dict[str, Any]:
    sys.path.insert(0, str(HERE))
    found: dict[str, Any] = importlib.import_module(part).run(seconds, seed)
    return found


def _wait(part: str, seconds: float, future: Future[Any]) -> None:
    """Wait for a part, and say how much of its time has passed."""
    started = time.monotonic()
    shown = sys.stderr.isatty()
    said = -60.0
    while not future.done() and (passed := time.monotonic() - started) < seconds + GRACE:
        if passed - said >= (1.0 if shown else 60.0):
            said = passed
            line = f"{part}: {_clock(passed)} of {_clock(seconds)}"
            print(line, end="\r" if shown else "\n", file=sys.stderr, flush=True)
        time.sleep(0.2)


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """The totals of all runs, in Markdown."""
    totals: dict[tuple[str, str], list[float]] = {}
    for record in records:
        for part, found in record["parts"].items():
            for what, count in _counts(found):
                runs_and_sum = totals.setdefault((part, what), [0, 0])
                runs_and_sum[0] += 1
                runs_and_sum[1] += count
    rows = [
        f"| {part} | {what} | {_number(total)} | {runs} |"
        for (part, what), (runs, total) in sorted(totals.items())
    ]
    head = ["| part | what | in all | runs |", "|---|---|---:|---:|"]
    dates = sorted(record["date"] for record in records)
    between = f"{dates[0][:10]} to {dates[-1][:10]}" if dates else "none yet"
    seeds = sorted({record["seed"] for record in records})
    below = f"Runs: {len(records)}, {between}; seeds {', '.join(map(str, seeds)) or 'none'}."
    return "\n".join([*head, *rows, "", below])


def _counts(found: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, float]]:
    """What was counted, and how often; counts within counts have both names."""
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield from _counts(value, f"{before}{name}: ")
        elif name == "failures":
            yield "failures", len(value)
        elif isinstance(value, int | float):
            yield f"{before}{name}", value


def _number(count: float) -> str:
    return f"{count:,.0f}" if count >= 100 or count == int(count) else f"{count:.1f}"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def _git(*command: str) -> str:
    done = subprocess.run(["git", *command], cwd=HERE, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
