"""Tasks a minute: many tasks trained together, against one after the other.

    python benchmarks/many.py --data DIR [--tasks 8 64] [--examples 2 8] [--steps 2] [--repeats 3]

RAFT's tasks on SmolLM2-135M in float32 on the CPU, repeated with other seeds and other examples up
to so many. `--tokens` are sizes of a pass: the default of `fit_many`, and a smaller one. Each turn
trains all tasks in all ways, in a new order; a gain is the median over the turns. Writes
`benchmarks/results/many.json`, and prints the table.
"""

from __future__ import annotations

import argparse
import random
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from measuring import take_turns
from reporting import RESULTS, circumstances, digits, table, write_json

ALONE = "one after the other"


def main() -> None:
    """Measure all numbers of tasks and of examples."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with raft/")
    parser.add_argument(
        "--tasks", type=int, nargs="+", default=[8, 64], help="how many are trained together"
    )
    parser.add_argument(
        "--examples", type=int, nargs="+", default=[2, 8], help="of each task in a batch"
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1024, 4096], help="most in a batch"
    )
    parser.add_argument("--words", type=int, default=40, help="a text's, at most")
    parser.add_argument("--steps", type=int, default=2, help="training steps of each task")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument(
        "--model", default="smollm2-135m-instruct", help="a folder, a hub id or the embedded model"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS / "many.json", help="the JSON file that is written"
    )
    given = parser.parse_args()
    rows = []
    for count in given.tasks:
        for examples in given.examples:
            rows.append(measured(count, examples, given))
            print(in_a_table(rows[-1:]), flush=True)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(given).items()}
    settings.pop("data")
    settings.pop("results")
    write_json(given.results, {**circumstances(), **settings, "rows": rows})
    print(in_a_table(rows))


def tasks_of(count: int, examples: int, given: argparse.Namespace) -> dict[str, Any]:
    """Name -> texts, labels and the settings of a classifier."""
    from ia3.experiments.raft_data import read_raft

    raft = read_raft(given.data / "raft")
    tasks = {}
    for number in range(count):
        task = raft[number % len(raft)]
        seed = number // len(raft)
        rows = random.Random(seed).sample(task.train, examples)
        texts = [
            {name: " ".join(text.split()[: given.words]) for name, text in task.example(r).items()}
            for r in rows
        ]
        labels = [row["Label"] for row in rows]
        settings = {
            "template": task.template.prompt.source,
            "choices": dict(zip(task.labels, task.choices, strict=True)),
            "seed": seed,
            "steps": given.steps,
            "model": given.model,
        }
        tasks[f"{task.name}-{seed}"] = (texts, labels, settings)
    return tasks


def measured(count: int, examples: int, given: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    from ia3 import FewShotClassifier, fit_many

    tasks = tasks_of(count, examples, given)
    data = {name: (texts, labels) for name, (texts, labels, _) in tasks.items()}

    def classifiers() -> dict[str, FewShotClassifier]:
        return {name: FewShotClassifier(**settings) for name, (_, _, settings) in tasks.items()}

    def alone() -> None:
        for name, classifier in classifiers().items():
            classifier.fit(*data[name])

    def together(tokens: int) -> None:
        assert not fit_many(data, classifiers(), max_tokens=tokens).failures

    ways = {f"{tokens:,} tokens": partial(together, tokens) for tokens in given.tokens}
    # Loads the model, and tries out how it takes prompts. A whole turn to warm up takes minutes.
    first = next(iter(data))
    classifiers()[first].fit(*data[first])
    timings = take_turns({ALONE: alone, **ways}, given.repeats, warm_up=0)
    return {
        "tasks": count,
        "examples": examples,
        "tasks a minute": {
            way: 60 * count / statistics.median(seconds) for way, seconds in timings.seconds.items()
        },
        "gain": {way: 1 / timings.ratio(way, ALONE) for way in ways},
    }


def in_a_table(rows: list[dict[str, Any]]) -> str:
    """Tasks a minute and, in brackets, how many times as many as one after the other."""
    ways = list(rows[0]["gain"])
    body = [
        [
            str(row["tasks"]),
            str(row["examples"]),
            digits(row["tasks a minute"][ALONE]),
            *(f"{digits(row['tasks a minute'][w])} ({row['gain'][w]:.2f}×)" for w in ways),
        ]
        for row in rows
    ]
    return table(["tasks", "examples a step", ALONE, *ways], body)


if __name__ == "__main__":
    main()
