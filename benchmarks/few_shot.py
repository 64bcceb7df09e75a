"""This project's classifiers and what else learns from a few labelled texts, on the same samples.

    python benchmarks/few_shot.py --data DIR [--mpnet DIR] [--before SRC] [--methods M ...] ...
    python benchmarks/few_shot.py --data DIR ... --curve      64 to 1,000 examples a class
    python benchmarks/few_shot.py --data DIR ... --times      seconds: nothing else may run
    python benchmarks/few_shot.py --tables                    of what is stored

Every run is a process of its own with one thread. Runs are kept in JSON Lines files, one a method
and task (those that count seconds in one of their own), and are not repeated; the tables are
printed last. Methods whose `--mpnet` or `--before` is not given are left out.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from few_shot_data import CURVE_SHOTS, FOLDS, TASKS, few_shot_split, timed_split
from few_shot_methods import METHODS, Places, is_possible, planned, run_method
from few_shot_report import report
from reporting import RESULTS, run_missing

from ia3.files.records import read_records

FOLDER = RESULTS / "few_shot"
TIMES = "times.jsonl"
# Where there are enough texts a class, and whose seconds are compared.
LARGE = ("sst2", "trec")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with sst2/, trec/, banking77/, raft/")
    parser.add_argument("--mpnet", type=Path, help="folder of all-mpnet-base-v2")
    parser.add_argument("--before", type=Path, help="another build's source folder (tfew-before)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=range(FOLDS), help="of the samples")
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of finished runs")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--curve", action="store_true", help="run with more examples a class")
    kind.add_argument("--times", action="store_true", help="run what is to be timed")
    kind.add_argument("--tables", action="store_true", help="run nothing")
    parser.add_argument(
        "--one",
        nargs=4,
        metavar=("METHOD", "TASK", "SHOTS", "SEED"),
        help="one run alone, its result printed",
    )
    given = parser.parse_args(arguments)
    if given.data is None and not given.tables:
        parser.error("--data is missing")
    places = Places(given.mpnet, given.before)
    if given.one:
        method, task, shots, seed = given.one
        one = {"method": method, "task": task, "shots": int(shots), "seed": int(seed)}
        print(json.dumps(run(one, given.data, places, timed=given.times)))
        return
    if not given.tables:
        methods = [method for method in METHODS if method in given.methods]
        keys = keys_of([m for m in methods if is_possible(m, places)], given)
        run_all(keys, given, places)
    times = given.results / TIMES
    stored = [path for path in sorted(given.results.rglob("*.jsonl")) if path != times]
    print(report([run for path in stored for run in _read(path)], _read(times)))


def keys_of(methods: Sequence[str], given: argparse.Namespace) -> list[dict[str, Any]]:
    """The runs in their order: a sample's methods in turns, a seed on everything before the next.

    More examples a class come first: they tell more.
    """
    if given.curve:
        keys = _large(methods, CURVE_SHOTS, range(1))
    elif given.times:
        keys = _large(methods, (16,), range(2))
    else:
        keys = [key for task in TASKS for m in methods for key in planned(m, task)]
    chosen = [key for key in keys if key["task"] in given.tasks and key["seed"] in given.seeds]
    places = [*TASKS]
    return sorted(chosen, key=lambda k: (k["seed"], -k["shots"], places.index(k["task"])))


def run_all(keys: Sequence[dict[str, Any]], given: argparse.Namespace, places: Places) -> None:
    """Each in a process; what failed is said and left out."""
    options = ["--data", str(given.data), *(["--times"] if given.times else [])]
    for name, place in vars(places).items():
        options += [f"--{name}", str(place)] if place else []
    for key in keys:
        path = given.results / key["task"] / f"{key['method']}.jsonl"
        path = given.results / TIMES if given.times else path
        run_missing(__file__, [key], path, options, threads=1)


def run(key: dict[str, Any], data: Path, places: Places, *, timed: bool = False) -> dict[str, Any]:
    """One method on one sample: accuracy, seconds, and which test rows were right.

    Args:
        key: `method`, `task`, `shots` and `seed`.
        data: the folder with the tasks.
        places: of what methods need.
        timed: predict 1,000 texts, and keep the machine's load instead of what each row got.
    """
    load = os.getloadavg()[0]
    method, task, shots, seed = key.values()
    train, test = (timed_split if timed else few_shot_split)(task, shots, seed, data)
    texts, labels = map(list, zip(*train, strict=True))
    test_texts, test_labels = map(list, zip(*test, strict=True))
    stops = shots in CURVE_SHOTS
    found = run_method(method, texts, labels, test_texts, seed, places, stops=stops)
    right = [a == b for a, b in zip(found.pop("predicted"), test_labels, strict=True)]
    found |= {name: round(found[name], 2) for name in ("train_seconds", "predict_seconds")}
    if timed:
        found.pop("confidence", None)
        found["load"] = round(load, 1)
    else:
        found["right"] = "".join("01"[each] for each in right)
    return {**key, "accuracy": round(sum(right) / len(right), 4), **found}


def _large(
    methods: Sequence[str], shots: Sequence[int], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    return [
        {"method": method, "task": task, "shots": number, "seed": seed}
        for task in LARGE
        for number in shots
        for seed in seeds
        for method in methods
    ]


def _read(path: Path) -> list[dict[str, Any]]:
    return read_records(path, lambda run: "accuracy" in run, "a run of the few-shot benchmark")


if __name__ == "__main__":
    main()
