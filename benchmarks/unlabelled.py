"""What texts without labels are worth: learned from as they are, or labelled by suggestion.

    python benchmarks/unlabelled.py --data DIR [--seeds 2] [--steps 0] [--workers 2]

8 examples a class of SST-2, of TREC and of 16 of Banking77's intents, all-MiniLM-L6-v2, one thread,
300 texts without labels, 400 others to test on. All are rows of the *training* files: test rows
choose nothing. Results are kept in a JSON Lines file, and finished runs are not repeated; the table
is printed last.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from few_shot_data import TASKS, Example, sample_few_shot
from reporting import add_results_option, run_missing, table

if TYPE_CHECKING:
    from ia3 import FewShotClassifier

CHOSEN_ON = ("sst2", "trec", "banking16")
SHOTS = 8
UNLABELLED = 300
ROWS = 400
# Labelled besides, a class: as many again.
MORE = 8


@dataclass(frozen=True)
class Sample:
    """What a run is given; `pool` is without labels, but for who looks."""

    labelled: list[Example]
    pool: list[Example]
    tested: list[Example]
    seed: int
    steps: int

    @property
    def classes(self) -> int:
        return len({label for _, label in self.labelled})

    @property
    def texts(self) -> list[str]:
        return [text for text, _ in self.pool]

    @cached_property
    def first(self) -> FewShotClassifier:
        """Trained on the labelled texts alone."""
        return self.trained(self.labelled)

    def trained(self, examples: Sequence[Example], **more: Any) -> FewShotClassifier:
        from ia3 import FewShotClassifier

        texts, labels = map(list, zip(*examples, strict=True))
        settings = {"seed": self.seed, "steps": self.steps}
        return FewShotClassifier("all-minilm-l6-v2", **settings).fit(texts, labels, **more)


def labelled(sample: Sample) -> FewShotClassifier:
    return sample.first


def self_trained(sample: Sample) -> FewShotClassifier:
    """On what the first is sure of, whether or not that helps."""
    from ia3.classify.self_training import SURE

    answers = sample.first.predict_proba(sample.texts)
    labels = sample.first.classes_at(answers).tolist()
    sure = [
        e
        for e, p in zip(zip(sample.texts, labels, strict=True), answers, strict=True)
        if p.max() >= SURE
    ]
    return sample.trained([*sample.labelled, *sure])


def decided(sample: Sample) -> FewShotClassifier:
    """On these where cross-validation on the labelled texts says so."""
    return sample.trained(sample.labelled, unlabelled=sample.texts)


def suggested(sample: Sample) -> FewShotClassifier:
    """As many texts again, those that `suggest` names."""
    from ia3 import suggest

    found = suggest(sample.first, sample.texts, MORE * sample.classes)
    return sample.trained([*sample.labelled, *(sample.pool[each.row] for each in found)])


def uncertain(sample: Sample) -> FewShotClassifier:
    """As many texts again, the most uncertain ones."""
    from torch import tensor

    from ia3.classify.suggest import uncertainty

    order = uncertainty(tensor(sample.first.predict_proba(sample.texts))).argsort(descending=True)
    more = [sample.pool[row] for row in order[: MORE * sample.classes].tolist()]
    return sample.trained([*sample.labelled, *more])


def apart(sample: Sample) -> FewShotClassifier:
    """As many texts again, uncertain ones that are far from each other."""
    from torch import tensor
    from torch.nn.functional import normalize

    from ia3.classify.suggest import uncertainty

    probabilities, vectors = sample.first._read([{"text": text} for text in sample.texts], None)
    vectors, gain = normalize(vectors, dim=1), uncertainty(probabilities)
    chosen: list[int] = []
    while len(chosen) < MORE * sample.classes:
        cosines = vectors @ vectors[chosen].T if chosen else tensor([[-1.0]])
        far = gain * (1 - cosines).amin(1)
        far[chosen] = -1.0
        chosen.append(int(far.argmax()))
    return sample.trained([*sample.labelled, *(sample.pool[row] for row in chosen)])


def drawn(sample: Sample) -> FewShotClassifier:
    """As many texts again, drawn."""
    more = random.Random(sample.seed).sample(sample.pool, MORE * sample.classes)
    return sample.trained([*sample.labelled, *more])


METHODS: dict[str, Callable[[Sample], FewShotClassifier]] = {
    "labelled": labelled,
    "self-trained": self_trained,
    "decided": decided,
    "suggested": suggested,
    "uncertain": uncertain,
    "apart": apart,
    "drawn": drawn,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing in the results file, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="as of few_shot.py")
    parser.add_argument("--seeds", type=int, default=2, help="samples of each task")
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=METHODS)
    parser.add_argument("--steps", type=int, default=100, help="0 is the frozen encoder")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    add_results_option(parser, "unlabelled.jsonl")
    parser.add_argument("--one", nargs=4, metavar=("METHODS", "TASK", "SEED", "STEPS"))
    given = parser.parse_args(arguments)
    if given.one:
        methods, task, seed, steps = given.one
        print(json.dumps(run(methods, task, int(seed), int(steps), given.data)))
        return
    keys = [
        {"methods": ",".join(given.methods), "task": task, "seed": seed, "steps": given.steps}
        for seed in range(given.seeds)
        for task in CHOSEN_ON
    ]
    options = ["--data", str(given.data)]
    done = run_missing(__file__, keys, given.results, options, workers=given.workers, threads=1)
    print(report([run for run in done if run["steps"] == given.steps]))


def run(methods: str, task: str, seed: int, steps: int, data: Path) -> dict[str, Any]:
    """Each method's accuracy on one sample; they share the first training."""
    import numpy as np

    rows, _ = TASKS[task].read(data)
    sample = sample_few_shot(rows, SHOTS, seed)
    taken = {text for text, _ in sample}
    others = [row for row in dict(rows).items() if row[0] not in taken]
    random.Random(seed).shuffle(others)
    given = Sample(sample, others[:UNLABELLED], others[UNLABELLED:][:ROWS], seed, steps)
    asked, answers = map(list, zip(*given.tested, strict=True))
    found: dict[str, Any] = {"methods": methods, "task": task, "seed": seed, "steps": steps}
    for method in methods.split(","):
        classifier = METHODS[method](given)
        found[method] = round(float(np.mean(classifier.predict(asked) == np.array(answers))), 4)
        if method == "decided":
            found["seen"] = [str(each) for each in classifier.candidates_]
    return found


def report(runs: Sequence[dict[str, Any]]) -> str:
    """Right of 100: means over the seeds, whose number is in brackets, as Markdown."""
    rows = []
    for method in METHODS:
        row = [method]
        for task in CHOSEN_ON:
            found = [r[method] for r in runs if r["task"] == task and method in r]
            row.append(f"{100 * statistics.mean(found):.1f} ({len(found)})" if found else "")
        rows.append(row)
    return table(("trained on", *CHOSEN_ON), rows)


if __name__ == "__main__":
    main()
