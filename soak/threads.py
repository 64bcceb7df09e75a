"""Threads, tasks and processes over one model: no wrong row, no deadlock, no leak, only `IA3Error`.

python soak/threads.py --seconds 60 --seed 1 [--part threads tasks forks classifiers leaks]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import further
import torch
from one_model import OneModel
from served import Hasty, Watch

KINDS = ("llama", "t5")


def threads(watch: Watch, seconds: float) -> None:
    """One model of each kind; the second half of the time in a hurry, and with merging."""
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            one = OneModel(kind, watch, Path(folder))
            roles = {
                "route": one.route,
                "route too": one.route,
                "call": one.call,
                "call too": one.call,
                "switch": one.switch,
                "come and go": one.come_and_go,
                "write": one.write,
                "save": one.save,
                "keep": one.keep,
                "read": one.read,
            }
            # Merging and fusing refuse, or are refused, most of the time.
            changing = {**roles, "merge": one.merge}
            if kind == "llama":
                changing["fuse"] = one.fuse
            share = seconds / len(KINDS) / 4
            for chosen, hasty in ((roles, 0), (changing, 0), (roles, 1), (changing, 1)):
                if watch.counts["hangs"]:
                    return
                if hasty:
                    with Hasty():
                        watch.run(share, chosen)
                else:
                    watch.run(share, chosen)
            one.end()


PARTS: dict[str, tuple[float, Callable[[Watch, float], None]]] = {
    "threads": (0.5, threads),
    **further.PARTS,
}


def run(seconds: float, seed: int, parts: Sequence[str] = ()) -> dict[str, object]:
    """Run the parts, each for its share of the time; counts, and what went wrong."""
    watch = Watch(seed)
    chosen = {name: PARTS[name] for name in parts or PARTS}
    whole = sum(share for share, _ in chosen.values())
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for share, part in chosen.values():
            if not watch.counts["hangs"]:
                part(watch, seconds * share / whole)
    return {**dict(sorted(watch.counts.items())), "failures": watch.failures}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--part", nargs="*", default=(), choices=[*PARTS])
    given = parser.parse_args()
    found = run(given.seconds, given.seed, given.part)
    print(json.dumps(found, indent=1))
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
