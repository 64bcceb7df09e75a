"""Which sites, rate and number of steps suit a small model: the estimator's defaults.

    python benchmarks/choose_defaults.py --data DIR [--seeds 2] [--shots 16] [--rows 200]

Every candidate is trained on few-shot samples and scored on other rows of the same *training* file;
no test file is opened. One JSON line a run, the table last.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from few_shot import TEMPLATES
from splits import Example, read_sst2, read_trec, sample_few_shot

from ia3 import IA3Config, IA3Model, load_base_model
from ia3.base.loading import BaseModel
from ia3.tfew.prompts.encoding import EncodedExample, Encoder, TrainingExample
from ia3.tfew.prompts.templates import Template
from ia3.tfew.scoring.choices import choice_scores
from ia3.tfew.training.trainer import TFewConfig, train

PAPER = IA3Config()
ALL = IA3Config(target_modules="all-linear")


@dataclass(frozen=True)
class Candidate:
    """One setting of the recipe."""

    name: str
    sites: IA3Config
    learning_rate: float
    steps: int
    template: str | None = None
    chat: bool = False


LISTED = "Classify the text as one of: {{ answer_choices | join(', ') }}.\n\nText: {{ text }}"
CANDIDATES = (
    Candidate("the paper's sites, 3e-3, 100 steps", PAPER, 3e-3, 100),
    Candidate("the paper's sites, 1e-2, 75 steps", PAPER, 1e-2, 75),
    Candidate("every linear layer, 3e-3, 100 steps", ALL, 3e-3, 100),
    Candidate("every linear layer, 5e-3, 75 steps", ALL, 5e-3, 75),
    Candidate("every linear layer, 1e-2, 50 steps", ALL, 1e-2, 50),
    Candidate("every linear layer, 1e-2, 100 steps", ALL, 1e-2, 100),
    Candidate("every linear layer, 1e-2, 150 steps", ALL, 1e-2, 150),
    Candidate("the same at 100 steps, chat template", ALL, 1e-2, 100, LISTED, chat=True),
)
BANKING = "Query: {{ text }}\nIntent:"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every candidate on every task and seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with sst2/ and trec/")
    parser.add_argument("--seeds", type=int, default=2, help="samples of each task")
    parser.add_argument("--shots", type=int, default=16, help="examples a class")
    parser.add_argument(
        "--rows", type=int, default=200, help="of the training file that are predicted"
    )
    given = parser.parse_args(arguments)
    base = load_base_model("smollm2-135m-instruct")
    accuracies: dict[tuple[str, str], list[float]] = {}
    tasks = read_tasks(given.data)
    for seed in range(given.seeds):
        for task, (template, examples) in tasks.items():
            sample = sample_few_shot(examples, given.shots, seed)
            rest = sorted(set(examples) - set(sample))
            held_out = random.Random(seed).sample(rest, given.rows)
            for candidate in CANDIDATES:
                started = time.perf_counter()
                accuracy = run(base, candidate, template, sample, held_out, seed)
                accuracies.setdefault((candidate.name, task), []).append(accuracy)
                seconds = round(time.perf_counter() - started)
                line = {"task": task, "seed": seed, "candidate": candidate.name}
                print(json.dumps({**line, "accuracy": accuracy, "seconds": seconds}), flush=True)
    print(f"| | {' | '.join(tasks)} |\n|---|{'---|' * len(tasks)}")
    for candidate in CANDIDATES:
        means = [f"{100 * statistics.mean(accuracies[candidate.name, task]):.1f}" for task in tasks]
        print(f"| {candidate.name} | {' | '.join(means)} |")


def read_tasks(data: Path) -> dict[str, tuple[str, list[Example]]]:
    """Task -> template and all rows of its training file; eight of Banking77's intents."""
    with (data / "banking77" / "train.csv").open(encoding="utf-8") as file:
        banking = [(row["text"], row["category"].replace("_", " ")) for row in csv.DictReader(file)]
    intents = set(random.Random(0).sample(sorted({label for _, label in banking}), 8))
    return {
        "sst2": (TEMPLATES["sst2"][0], read_sst2(data / "sst2" / "train.tsv")),
        "trec": (TEMPLATES["trec"][1], read_trec(data / "trec" / "train.txt")),
        "banking77, 8 intents": (BANKING, [row for row in banking if row[1] in intents]),
    }


def run(
    base: BaseModel,
    candidate: Candidate,
    template: str,
    sample: Sequence[Example],
    held_out: Sequence[Example],
    seed: int,
) -> float:
    """Accuracy on the held-out rows after training on the sample."""
    labels = sorted({label for _, label in sample})
    encoder = Encoder(base, labels, chat=candidate.chat)
    prompt = Template(candidate.template or template)

    def encode(examples: Sequence[Example]) -> list[EncodedExample]:
        return [encoder.encode({"text": text}, prompt) for text, _ in examples]

    adapted = IA3Model(base.model, candidate.sites)
    try:
        examples = [
            TrainingExample((encoded,), labels.index(label))
            for encoded, (_, label) in zip(encode(sample), sample, strict=True)
        ]
        recipe = TFewConfig(steps=candidate.steps, learning_rate=candidate.learning_rate, seed=seed)
        train(base, adapted, examples, recipe)
        best = choice_scores(base, encode(held_out)).argmax(1).tolist()
    finally:
        adapted.unload()
    right = [labels[i] == label for i, (_, label) in zip(best, held_out, strict=True)]
    return sum(right) / len(right)


if __name__ == "__main__":
    main()
