"""How much longer `fit` takes beside a process that keeps one core busy.

    python benchmarks/busy.py [--turns 3]     nothing else may run

The demo's tickets, both engines, each with the number of threads that it chooses for itself. A fit
alone and a fit beside the other process take turns.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial

from few_shot_data import TASKS, TICKETS
from measuring import Step, take_turns
from reporting import digits, table

from ia3 import FewShotClassifier

MODELS = ("all-minilm-l6-v2", "smollm2-135m-instruct")
BUSY = [sys.executable, "-c", "while True: pass"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Time the fits, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=3, help="of each fit that count")
    given = parser.parse_args(arguments)
    train, _ = TASKS["tickets"].read(TICKETS)
    texts, labels = map(list, zip(*train, strict=True))
    rows = []
    for model in MODELS:
        fit = partial(FewShotClassifier(model).fit, texts, labels)
        timings = take_turns({"alone": fit, "beside": partial(beside, fit)}, given.turns)
        seconds = [digits(timings.median(name)) for name in ("alone", "beside")]
        rows.append([model, *seconds, digits(timings.ratio("beside", "alone"))])
    print(f"{os.cpu_count()} cores, {len(texts)} texts")
    print(table(["model", "seconds alone", "beside a busy process", "ratio"], rows))


def beside(step: Step) -> None:
    """The step while another process computes without a pause."""
    other = subprocess.Popen(BUSY)
    try:
        step()
    finally:
        other.kill()
        other.wait()


if __name__ == "__main__":
    main()
