"""What the numbers of the encoder's recipe were chosen by: one changed at a time.

    python benchmarks/encoder_recipe.py --data DIR [--seeds 2] [--workers 2]

16 examples a class of TREC, of 16 of Banking77's intents and of SST-2, all-MiniLM-L6-v2, one
thread. Tested on other rows of the *training* files: test rows choose nothing. Results are kept in
a JSON Lines file, and finished runs are not repeated; the table is printed last.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from few_shot_data import TASKS, sample_few_shot
from few_shot_report import calibration_error
from reporting import add_results_option, run_missing, table

VARIANTS: dict[str, dict[str, Any]] = {
    "frozen": {"steps": 0},
    "recipe": {},
    "steps 20": {"steps": 20},
    "steps 80": {"steps": 80},
    "batch 8": {"batch_size": 8},
    "batch 32": {"batch_size": 32},
    "rate 1e-2": {"learning_rate": 1e-2},
    "rate 4e-2": {"learning_rate": 4e-2},
    "cosines over 0.05": {"temperature": 0.05},
    "cosines over 0.2": {"temperature": 0.2},
    "head 10": {"strength": 10.0},
    "head 1": {"strength": 1.0},
    "without the labels' names": {"names": False},
}
CHOSEN_ON = ("trec", "banking16", "sst2")
SHOTS = 16
ROWS = 400


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing in the results file, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="as of few_shot.py")
    parser.add_argument("--seeds", type=int, default=2, help="samples of each task")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    add_results_option(parser, "encoder_recipe.jsonl")
    parser.add_argument("--one", nargs=3, metavar=("VARIANT", "TASK", "SEED"))
    given = parser.parse_args(arguments)
    if given.one:
        variant, task, seed = given.one
        print(json.dumps(run(variant, task, int(seed), given.data)))
        return
    keys = [
        {"variant": variant, "task": task, "seed": seed}
        for seed in range(given.seeds)
        for task in CHOSEN_ON
        for variant in VARIANTS
    ]
    options = ["--data", str(given.data)]
    done = run_missing(__file__, keys, given.results, options, workers=given.workers, threads=1)
    print(report(done))


def run(variant: str, task: str, seed: int, data: Path) -> dict[str, Any]:
    """Train on one sample, and answer other rows of the training file."""
    import numpy as np

    from ia3 import FewShotClassifier
    from ia3.sentences import head, training

    changes: dict[str, Any] = dict(VARIANTS[variant])
    head.STRENGTH = changes.pop("strength", head.STRENGTH)
    training.TEMPERATURE = changes.pop("temperature", training.TEMPERATURE)
    pool, _ = TASKS[task].read(data)
    sample = sample_few_shot(pool, SHOTS, seed)
    taken = {text for text, _ in sample}
    others = random.Random(0).sample([row for row in pool if row[0] not in taken], ROWS)
    texts, labels = map(list, zip(*sample, strict=True))
    asked, answers = map(list, zip(*others, strict=True))
    if not changes.pop("names", True):  # of numbers there are none
        places = {label: place for place, label in enumerate(sorted({*labels}))}
        labels, answers = ([places[label] for label in each] for each in (labels, answers))
    steps = 0 if changes.get("steps") == 0 else training.MOST_STEPS
    classifier = FewShotClassifier("all-minilm-l6-v2", steps=steps, seed=seed, threads=1)
    engine, prepared = classifier._prepare(texts, labels)
    started = time.process_time()
    fit = engine.train(replace(prepared, recipe=replace(prepared.recipe, **changes)))
    seconds = time.process_time() - started
    classifier._keep(fit)
    found = classifier.predict_proba(asked)
    right = classifier.classes_at(found) == np.array(answers)
    return {
        "variant": variant,
        "task": task,
        "seed": seed,
        "accuracy": round(float(right.mean()), 4),
        "calibration_error": round(calibration_error(found.max(1).tolist(), right.tolist()), 4),
        "cpu_seconds": round(seconds, 1),
    }


def report(runs: Sequence[dict[str, Any]]) -> str:
    """Accuracy, calibration error in points, and seconds: means over the seeds, as Markdown."""
    rows = []
    for variant in VARIANTS:
        row = [variant]
        for task in CHOSEN_ON:
            found = [r for r in runs if (r["variant"], r["task"]) == (variant, task)]
            if not found:
                row.append("")
                continue
            accuracy, error, seconds = (
                statistics.mean(r[name] for r in found)
                for name in ("accuracy", "calibration_error", "cpu_seconds")
            )
            row.append(f"{100 * accuracy:.1f} ({100 * error:.1f}; {seconds:.0f} s)")
        rows.append(row)
    return table(("variant", *CHOSEN_ON), rows)


if __name__ == "__main__":
    main()
