"""What becomes of two classifiers of one task that are combined, and how their heads are.

    python benchmarks/combined.py --data DIR [--seeds 2] [--workers 2]

SST-2, TREC and 16 of Banking77's intents, all-MiniLM-L6-v2, one thread: 16 examples a class in two
halves, a classifier each, and one of all of them; tested on 400 other rows of the *training* files.
Results are kept in a JSON Lines file, and finished runs are not repeated; the table comes last.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from few_shot_data import TASKS, sample_few_shot
from reporting import add_results_option, run_missing, table

CHOSEN_ON = ("sst2", "trec", "banking16")
SHOTS = 16
ROWS = 400
# What is right of 100, of whom.
SAID = {
    "half": "one half, mean of the two",
    "averaged": "vectors and heads averaged",
    "refit": "vectors averaged, the head fitted anew to all texts",
    "both": "mean of the two's probabilities",
    "whole": "all texts",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing in the results file, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="as of few_shot.py")
    parser.add_argument("--seeds", type=int, default=2, help="samples of each task")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    add_results_option(parser, "combined.jsonl")
    parser.add_argument("--one", nargs=2, metavar=("TASK", "SEED"))
    given = parser.parse_args(arguments)
    if given.one:
        task, seed = given.one
        print(json.dumps(run(task, int(seed), given.data)))
        return
    keys = [{"task": task, "seed": seed} for seed in range(given.seeds) for task in CHOSEN_ON]
    options = ["--data", str(given.data)]
    done = run_missing(__file__, keys, given.results, options, workers=given.workers, threads=1)
    print(report(done))


def run(task: str, seed: int, data: Path) -> dict[str, Any]:
    """The accuracies on one sample."""
    import numpy as np

    from ia3 import FewShotClassifier, combine
    from ia3.classify.combined import combined_fit
    from ia3.sentences.head import fit_head

    rows, _ = TASKS[task].read(data)
    sample = sample_few_shot(rows, SHOTS, seed)
    taken = {text for text, _ in sample}
    others = [row for row in dict(rows).items() if row[0] not in taken]
    asked, answers = map(list, zip(*random.Random(seed).sample(others, ROWS), strict=True))
    by_class = sorted(sample, key=lambda example: example[1])

    def trained(examples: Sequence[Any]) -> FewShotClassifier:
        texts, labels = map(list, zip(*examples, strict=True))
        return FewShotClassifier("all-minilm-l6-v2", seed=seed).fit(texts, labels)

    def with_fit(fit: Any) -> FewShotClassifier:
        classifier = FewShotClassifier("all-minilm-l6-v2")
        classifier._keep(fit)
        return classifier

    halves = [trained(by_class[part::2]) for part in (0, 1)]
    fits = [half._fit for half in halves]
    pairs = [(name, fit.adapter) for name, fit in zip("ab", fits, strict=True)]
    fit = combined_fit(fits, [1, 1], combine(pairs, [1, 1], "average"))
    averaged = with_fit(fit)
    texts = [{"text": text} for text, _ in sample]
    _, vectors = averaged._read(texts, None)
    targets = [fit.classes.index(label) for _, label in sample]
    refit = with_fit(replace(fit, head=fit_head(vectors, targets, len(fit.classes))))
    whole = trained(sample)
    found = {
        "averaged": [averaged.predict_proba(asked)],
        "refit": [refit.predict_proba(asked)],
        "both": [np.mean([half.predict_proba(asked) for half in halves], axis=0)],
        "half": [half.predict_proba(asked) for half in halves],
        "whole": [whole.predict_proba(asked)],
    }
    said: dict[str, Any] = {"task": task, "seed": seed}
    for who, each in found.items():
        right = [np.mean(whole.classes_at(p) == np.array(answers)) for p in each]
        said[who] = round(float(np.mean(right)), 4)
    return said


def report(runs: Sequence[dict[str, Any]]) -> str:
    """Right of 100: means over the seeds, whose number is in brackets, as Markdown."""
    rows = []
    for who, words in SAID.items():
        row = [words]
        for task in CHOSEN_ON:
            found = [r[who] for r in runs if r["task"] == task]
            row.append(f"{100 * statistics.mean(found):.1f} ({len(found)})" if found else "")
        rows.append(row)
    return table(("classifier", *CHOSEN_ON), rows)


if __name__ == "__main__":
    main()
