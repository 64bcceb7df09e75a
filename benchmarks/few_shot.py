"""T-Few, the untuned model and SetFit on the same few-shot splits, one after the other.

    python benchmarks/few_shot.py --data DIR [--seeds 5] [--results FILE]

Every run is a process of its own with the machine to itself. Results are appended to a JSON Lines
file as they come, and runs that are in it already are not repeated; the table is printed last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reporting import add_results_option, read_runs
from splits import TASKS, Split, few_shot_split

HERE = Path(__file__).parent
SETFIT_PYTHON = HERE.parent / ".venv-setfit" / "bin" / "python"
METHODS = ("untuned", "tfew", "setfit")
# What a user would write: what the text is, and words that ask for the label. One template, or
# three to draw from and to average; written and chosen on rows of the training files.
TEMPLATES = {
    "sst2": ["Review: {{ text }}\nSentiment:"],
    "trec": [
        "Question: {{ text }}\nThe answer is a",
        "Question: {{ text }}\nType:",
        "{{ text }}\nThis asks for a",
    ],
}
TREC_WORDS = {
    "abbreviation": "abbreviation",
    "description": "explanation",
    "entity": "thing",
    "location": "place",
    "number": "number",
    "person": "person",
}
CHOICES = {"sst2": None, "trec": TREC_WORDS}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing in the results file, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with sst2/ and trec/")
    parser.add_argument("--seeds", type=int, default=5, help="samples of each task")
    add_results_option(parser, "few_shot.jsonl")
    parser.add_argument(
        "--one",
        nargs=3,
        metavar=("METHOD", "TASK", "SEED"),
        help="one run alone, its result printed",
    )
    given = parser.parse_args(arguments)
    if given.one:
        method, task, seed = given.one
        print(json.dumps(run(method, task, int(seed), given.data)))
        return
    given.results.parent.mkdir(parents=True, exist_ok=True)
    done = read_runs(given.results)
    for seed in range(given.seeds):
        for task in TASKS:
            for method in METHODS:
                # The untuned model is the same whatever the seed.
                if method == "untuned" and seed > 0:
                    continue
                if any((r["method"], r["task"], r["seed"]) == (method, task, seed) for r in done):
                    continue
                result = _process(method, task, seed, given.data)
                done.append(result)
                with given.results.open("a") as file:
                    file.write(json.dumps(result) + "\n")
                print(json.dumps(result), file=sys.stderr, flush=True)
    print(table(done))


def run(method: str, task: str, seed: int, data: Path) -> dict[str, Any]:
    """Accuracy on the full test set, and seconds, of one method on one split."""
    from ia3 import FewShotClassifier

    split = few_shot_split(task, seed, data)
    if method == "setfit":
        return _setfit(split)
    # But for these words, the estimator's defaults whatever the task.
    classifier = FewShotClassifier(template=TEMPLATES[task], choices=CHOICES[task], seed=seed)
    if method == "untuned":
        classifier.set_params(steps=0)
    _ = classifier.base
    started = time.perf_counter()
    classifier.fit(split.train_texts, split.train_labels)
    trained = time.perf_counter()
    accuracy = classifier.score(split.test_texts, split.test_labels)
    return {
        "method": method,
        "task": task,
        "seed": seed,
        "accuracy": accuracy,
        "train_seconds": round(trained - started, 2),
        "predict_seconds": round(time.perf_counter() - trained, 2),
    }


def _setfit(split: Split) -> dict[str, Any]:
    from ia3.experiments.setfit import SetFit, run_setfit

    result = run_setfit(
        SetFit(SETFIT_PYTHON),
        split.train_texts,
        split.train_labels,
        split.test_texts,
        seed=split.seed,
        use_gpu=False,
    )
    right = sum(a == b for a, b in zip(result.predicted, split.test_labels, strict=True))
    return {
        "method": "setfit",
        "task": split.task,
        "seed": split.seed,
        "accuracy": right / len(split.test_labels),
        "train_seconds": round(result.train_seconds, 2),
        "predict_seconds": round(result.answer_seconds * len(split.test_texts), 2),
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Mean accuracy, its spread over seeds and median seconds, as Markdown."""
    lines = [
        "| task | method | accuracy, mean | lowest to highest | seconds to train | to predict |",
        "|---|---|---|---|---|---|",
    ]
    for task in TASKS:
        for method in METHODS:
            runs = [r for r in results if (r["method"], r["task"]) == (method, task)]
            if not runs:
                continue
            accuracies = [100 * r["accuracy"] for r in runs]
            train, predict = (
                statistics.median(r[f"{what}_seconds"] for r in runs)
                for what in ("train", "predict")
            )
            lines.append(
                f"| {task} | {method} | {statistics.mean(accuracies):.1f} | "
                f"{min(accuracies):.1f} to {max(accuracies):.1f} | {train:.0f} | {predict:.0f} |"
            )
    return "\n".join(lines)


def _process(method: str, task: str, seed: int, data: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", method, task, str(seed)]
    output = subprocess.run(
        [*command, "--data", str(data)], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    result: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
