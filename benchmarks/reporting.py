"""What the benchmarks leave behind: JSON, and the part of docs/benchmarks.md that is theirs."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from ia3.files.atomic import write_file
from ia3.files.records import append_record, read_records

HERE = Path(__file__).parent
RESULTS = HERE / "results"
DOCUMENT = HERE.parent / "docs" / "benchmarks.md"
_TITLES = {"torch": "PyTorch", "transformers": "transformers", "peft": "PEFT"}
PICTURES = HERE.parent / "docs" / "pictures"


def add_results_option(parser: argparse.ArgumentParser, name: str) -> None:
    """Have `--results` say which file of finished runs is continued.

    Args:
        name: of the one that is kept here.
    """
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS / name,
        help="JSON Lines, added to; what is in it is not run again",
    )


def run_missing(
    program: str,
    keys: Sequence[Mapping[str, Any]],
    results: Path,
    options: Sequence[str],
    *,
    workers: int = 1,
    threads: int | None = None,
) -> list[dict[str, Any]]:
    """Add to a file of finished runs those that it lacks, each run in a process of its own.

    A process is `program --one VALUE... OPTION...`; the last line it prints is the run in JSON, the
    key's values included. A run that fails is reported on standard error; the others go on.

    Args:
        program: the benchmark's file.
        keys: of the runs, in the order that they are run.
        results: JSON Lines, to which every run is added when it is done.
        options: of each process, beside its key's values.
        workers: processes at a time.
        threads: of each process; by default torch's choice.

    Returns:
        All runs in the file, those of other keys too.
    """
    done = read_records(results, lambda record: True, "a run")
    missing = [key for key in keys if not any(key.items() <= run.items() for run in done)]
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})

    def run(key: Mapping[str, Any]) -> dict[str, Any]:
        command = [sys.executable, program, "--one", *map(str, key.values()), *options]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
        if ended.returncode:
            raise RuntimeError(f"{dict(key)}: {ended.stderr[-2000:]}")
        result: dict[str, Any] = json.loads(ended.stdout.strip().splitlines()[-1])
        return result

    with ThreadPoolExecutor(workers) as pool:
        for future in as_completed([pool.submit(run, key) for key in missing]):
            if future.exception():
                print(future.exception(), file=sys.stderr, flush=True)
                continue
            done.append(future.result())
            append_record(results, done[-1])
            print(json.dumps(done[-1]), file=sys.stderr, flush=True)
    return done


def circumstances() -> dict[str, Any]:
    """When a benchmark ran, on what, with which versions."""
    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _TITLES},
    }


def in_words(where: dict[str, Any]) -> str:
    """`circumstances` as a sentence."""
    versions = ", ".join(f"{title} {where[name]}" for name, title in _TITLES.items())
    return (
        f"{where['date']}, {where['processor']}, {where['cores']} cores, "
        f"{where['threads']} threads, {versions}."
    )


def write_json(path: Path, content: object) -> None:
    """Write a results file, whole or not at all."""
    write_file(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def write_between(document: Path, mark: str, text: str) -> None:
    """Put text between two comments of a Markdown file, in place of what is there.

    Args:
        document: it has `<!-- mark -->` and after it `<!-- end of mark -->`.
        mark: the comments' words.
        text: Markdown.

    Raises:
        ValueError: the comments are not there.
    """
    before = document.read_text("utf-8")
    first, last = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    pattern = re.compile(f"{re.escape(first)}.*?{re.escape(last)}", re.DOTALL)
    if len(pattern.findall(before)) != 1:
        raise ValueError(f"{document} has no {first} followed by {last}")
    after = pattern.sub(lambda _: f"{first}\n\n{text.strip()}\n\n{last}", before)
    write_file(document, after.encode())


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def digits(value: float) -> str:
    """Three significant digits, never in powers of ten."""
    if value == 0:
        return "0"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def _processor() -> str:
    known = Path("/proc/cpuinfo")
    lines = known.read_text("utf-8").splitlines() if known.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
