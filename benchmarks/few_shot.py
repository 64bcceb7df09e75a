"""T-Few, the untuned model and SetFit on the same few-shot splits, one after the other.

    python benchmarks/few_shot.py --data DIR [--seeds 5] [--results FILE]

Every run is a process of its own with the machine to itself. Results are appended to a JSON Lines
file as they come, and runs that are in it already are not repeated; the table is printed last.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reporting import add_results_option, run_missing

SETFIT_PYTHON = Path(__file__).parent.parent / ".venv-setfit" / "bin" / "python"
METHODS = ("untuned", "tfew", "setfit")
# Task -> the name of each label digit in its files.
LABELS = {
    "sst2": ("negative", "positive"),
    "trec": ("description", "entity", "abbreviation", "person", "location", "number"),
}
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
    keys = [
        {"method": method, "task": task, "seed": seed}
        for seed in range(given.seeds)
        for task in LABELS
        for method in METHODS
        # The untuned model is the same whatever the seed.
        if method != "untuned" or seed == 0
    ]
    print(table(run_missing(__file__, keys, given.results, ["--data", str(given.data)])))


# -- the data --------------------------------------------------------------------------------------

# A text and the name of its label.
Example = tuple[str, str]


def few_shot_split(task: str, seed: int, data: Path) -> tuple[list[Example], list[Example]]:
    """Draw 16 training examples of each class with a seed; the test set stays whole."""
    train, test = read_task(task, data)
    return sample_few_shot(train, 16, seed), test


def read_task(task: str, data: Path) -> tuple[list[Example], list[Example]]:
    """The training and the test examples of a task.

    SST-2 has `text<TAB>digit` a line in UTF-8, TREC `digit text` in latin-1.
    """
    ending, encoding = ("tsv", "utf-8") if task == "sst2" else ("txt", "latin-1")
    train, test = (
        [
            _example(line, task)
            for line in (data / task / f"{part}.{ending}").read_text(encoding).split("\n")
            if line.strip()
        ]
        for part in ("train", "test")
    )
    return train, test


def sample_few_shot(examples: Sequence[Example], shots: int, seed: int) -> list[Example]:
    """`shots` distinct texts of each class, shuffled together.

    A text that occurs more than once counts once, with its first label. The result depends only on
    the examples, their order, `shots` and `seed`.
    """
    first_label: dict[str, str] = {}
    for text, label in examples:
        first_label.setdefault(text, label)
    by_class: dict[str, list[str]] = {}
    for text, label in first_label.items():
        by_class.setdefault(label, []).append(text)
    draw = random.Random(seed)
    sample = [
        (text, label) for label in sorted(by_class) for text in draw.sample(by_class[label], shots)
    ]
    draw.shuffle(sample)
    return sample


def _example(line: str, task: str) -> Example:
    if task == "sst2":
        text, _, digit = line.rpartition("\t")
    else:
        digit, _, text = line.partition(" ")
    return text.strip(), LABELS[task][int(digit)]


# -- one run ---------------------------------------------------------------------------------------


def run(method: str, task: str, seed: int, data: Path) -> dict[str, Any]:
    """Accuracy on the full test set, and seconds, of one method on one split."""
    from ia3 import FewShotClassifier

    train, test = few_shot_split(task, seed, data)
    texts, labels = map(list, zip(*train, strict=True))
    test_texts, test_labels = map(list, zip(*test, strict=True))
    if method == "setfit":
        from ia3.experiments.setfit import SetFit, run_setfit

        found = run_setfit(
            SetFit(SETFIT_PYTHON), texts, labels, test_texts, seed=seed, use_gpu=False
        )
        right = sum(a == b for a, b in zip(found.predicted, test_labels, strict=True))
        accuracy, train_seconds = right / len(test_labels), found.train_seconds
        predict_seconds = found.answer_seconds * len(test_texts)
    else:
        # But for these words, the estimator's defaults whatever the task.
        classifier = FewShotClassifier(template=TEMPLATES[task], choices=CHOICES[task], seed=seed)
        if method == "untuned":
            classifier.set_params(steps=0)
        _ = classifier.base
        started = time.perf_counter()
        classifier.fit(texts, labels)
        trained = time.perf_counter()
        accuracy, train_seconds = classifier.score(test_texts, test_labels), trained - started
        predict_seconds = time.perf_counter() - trained
    return {
        "method": method,
        "task": task,
        "seed": seed,
        "accuracy": accuracy,
        "train_seconds": round(train_seconds, 2),
        "predict_seconds": round(predict_seconds, 2),
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Mean accuracy, its spread over seeds and median seconds, as Markdown."""
    lines = [
        "| task | method | accuracy, mean | lowest to highest | seconds to train | to predict |",
        "|---|---|---|---|---|---|",
    ]
    for task in LABELS:
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


if __name__ == "__main__":
    main()
