"""Write the mixture that the ablation's pre-trained vectors come from, for `ia3 pretrain`.

    python benchmarks/mixture.py --data DIR --out FOLDER
    ia3 pretrain FOLDER/mixture.yaml --out start --steps 200 --batch-size 8 --learning-rate 0.01

Six of the paper's tasks (all of the T-Few authors' samples of each, without repetitions) and five
of RAFT's; none that `ablation.py` tests on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

PAPER = ("wic", "winogrande", "wsc", "rte", "cb", "storycloze")
RAFT = (
    "ade_corpus_v2",
    "twitter_complaints",
    "tweet_eval_hate",
    "terms_of_service",
    "semiconductor_org_types",
)


def main() -> None:
    """Write the data files and the manifest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with tfew/ and raft/")
    parser.add_argument("--out", type=Path, required=True, help="the folder that is written")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    tasks = []
    for name in PAPER:
        rows = {}
        for path in sorted((given.data / "tfew" / name).glob("*_seed.jsonl")):
            for line in path.open(encoding="utf-8"):
                row = json.loads(line)
                rows[json.dumps(row, sort_keys=True)] = row
        lines = "".join(json.dumps(row) + "\n" for row in rows.values())
        (given.out / f"{name}.jsonl").write_text(lines, "utf-8")
        tasks.append(f"  {name}:\n    data: {name}.jsonl\n")
    for name in RAFT:
        path = (given.data / "raft" / name / "train.csv").resolve()
        tasks.append(f"  {name}:\n    data: {path}\n")
    (given.out / "mixture.yaml").write_text("tasks:\n" + "".join(tasks), "utf-8")


if __name__ == "__main__":
    main()
