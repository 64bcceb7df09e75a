"""What `model="auto"` sees before it trains, beside what comes of training each of its two models.

    python benchmarks/choosing.py --data DIR [--seeds 5] [--workers 2]

Samples of the *training* files of SST-2, TREC and 16 of Banking77's intents, 8 and 16 examples a
class, tested on 200 other rows of the same files; and halves of the 50 labelled rows of RAFT tasks
that few_shot.py does not read, tested on the other half. Test rows choose nothing. The encoder is
asked trained on each sample, also where its frozen answers decide. One thread; a sample takes two
minutes or three. Results are kept in a JSON Lines file, and finished runs are not repeated; the
table is printed last.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from few_shot_data import TASKS, Split, fold, read_raft, sample_few_shot
from reporting import add_results_option, run_missing, table

RAFT = ("overruling", "terms_of_service", "tweet_eval_hate", "semiconductor_org_types")
# Task -> examples a class; 0: one half of all.
SHOTS = dict.fromkeys(("sst2", "trec", "banking16"), (8, 16)) | dict.fromkeys(RAFT, (0,))
ROWS = 200
# Of the training texts, and of others after training.
SEEN = ("frozen", "untuned", "trained")
TESTED = ("encoder", "language_model")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing in the results file, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="as of few_shot.py")
    parser.add_argument("--seeds", type=int, default=5, help="samples of each task")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    parser.add_argument("--tasks", nargs="+", choices=SHOTS, default=list(SHOTS))
    add_results_option(parser, "choosing.jsonl")
    parser.add_argument("--one", nargs=3, metavar=("TASK", "SHOTS", "SEED"))
    given = parser.parse_args(arguments)
    if given.one:
        task, shots, seed = given.one
        print(json.dumps(run(task, int(shots), int(seed), given.data)))
        return
    keys = [
        {"task": task, "shots": shots, "seed": seed}
        for seed in range(given.seeds)
        for task in given.tasks
        for shots in SHOTS[task]
    ]
    options = ["--data", str(given.data)]
    done = run_missing(__file__, keys, given.results, options, workers=given.workers, threads=1)
    print(report(done))


def run(task: str, shots: int, seed: int, data: Path) -> dict[str, Any]:
    """Accuracies on one sample: seen before training, and of the trained models."""
    from ia3 import FewShotClassifier

    sample, others = _split(task, shots, seed, data)
    texts, labels = map(list, zip(*sample, strict=True))
    engine, prepared = FewShotClassifier(seed=seed, threads=1)._prepare(texts, labels)
    frozen, untuned, *more = engine.seen(prepared)
    trained = more[0] if more else engine.encoder.seen_trained(prepared.encoder, [frozen])
    found = {"task": task, "shots": shots, "seed": seed}
    for name, seen in zip(SEEN, (frozen, untuned, trained), strict=True):
        found[name] = round(seen.candidate.accuracy, 4)
    asked, answers = map(list, zip(*others, strict=True))
    for name, model in zip(TESTED, ("all-minilm-l6-v2", "smollm2-135m-instruct"), strict=True):
        classifier = FewShotClassifier(model, seed=seed, threads=1).fit(texts, labels)
        found[name] = round(classifier.score(asked, answers), 4)
    return found


def _split(task: str, shots: int, seed: int, data: Path) -> Split:
    if shots == 0:
        sample, others = fold(read_raft(task)(data)[0], seed, 2)
        random.Random(seed).shuffle(sample)
        return sample, others
    pool, _ = TASKS[task].read(data)
    sample = sample_few_shot(pool, shots, 1000 + seed)
    taken = {text for text, _ in sample}
    return sample, random.Random(0).sample([row for row in pool if row[0] not in taken], ROWS)


def report(runs: Sequence[dict[str, Any]]) -> str:
    """By task: what was seen, what is taken, and what training gave, as Markdown."""
    rows: list[list[str]] = []
    for task, numbers in SHOTS.items():
        for shots in numbers:
            found = [r for r in runs if (r["task"], r["shots"]) == (task, shots)]
            if not found:
                continue
            means = {n: f"{_mean(found, n):.1f}" for n in SEEN + TESTED}
            taken = [f"{sum(_takes_encoder(r, n) for r in found)}" for n in (SEEN[:2], SEEN)]
            row = [task, str(shots or "half"), str(len(found)), *means.values()]
            row[-2:-2] = taken
            rows.append(row)
    seen = ("frozen", "untuned", "trained on folds", "taken by the frozen", "taken")
    tested = ("encoder trained", "language model trained")
    return table(("task", "a class", "samples", *seen, *tested), rows)


def _mean(runs: Sequence[dict[str, Any]], name: str) -> float:
    return 100 * statistics.mean(run[name] for run in runs)


def _takes_encoder(run: dict[str, Any], names: Sequence[str]) -> bool:
    """Whether `auto` would, by what was seen first and, where that is not enough, by all of it."""
    from ia3.classify.choosing import promises_more
    from ia3.classify.engine import ENCODER, LANGUAGE_MODEL, Candidate

    engines = {"untuned": LANGUAGE_MODEL}
    seen = [
        Candidate(
            engine=engines.get(name, ENCODER),
            name=None,
            accuracy=run[name],
            error=0.0,  # the rule looks at accuracies alone
            note=name,
        )
        for name in names
    ]
    return ENCODER in (promises_more(seen[:2]), promises_more(seen))


if __name__ == "__main__":
    main()
