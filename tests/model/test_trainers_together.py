"""transformers' `Trainer` in several processes trains a model with adapters as in one.

What is compared with are runs of one process, of the same steps' examples.
"""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from support.processes import in_forks, results_of
from support.tfew import tiny_llama
from support.trainers import ADAPTER_FILES, QUIET, anew, check_together, files, values
from torch import distributed

import ia3

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

STEPS, SAVED = 10, 5
STEP_SIZE = 8
FAST = {"learning_rate": 1e-2, "logging_steps": 1, "lr_scheduler_type": "constant"}


def rows(count: int = 24) -> list[dict[str, list[int]]]:
    """Texts of unlike lengths, so that the mean of the processes' means is not the step's mean."""
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, 32, (2 + i % 9,), generator=generator).tolist() for i in range(count)]
    return [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} for ids in texts]


def padded(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in batch)
    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in batch])
        for name, fill in fills.items()
    }


def adapted(library: Any = ia3, **config: Any) -> Any:
    return library.get_peft_model(tiny_llama(), library.IA3Config(task_type="CAUSAL_LM", **config))


class Killed(hf.TrainerCallback):
    """Kills the second process at a step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == SAVED + 2 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def trained(
    folder: Path,
    config: dict[str, Any] | None = None,
    resume: bool = False,
    scores: Any = None,
    callbacks: Any = None,
    library: Any = ia3,
    **given: Any,
) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """What is trained, after it is, and the losses."""
    anew()
    count = distributed.get_world_size() if distributed.is_initialized() else 1
    examples = STEP_SIZE // count // given.get("gradient_accumulation_steps", 1)
    sizes = {"per_device_train_batch_size": examples, "per_device_eval_batch_size": 2}
    more = {"max_steps": STEPS, "save_steps": SAVED, **QUIET, **FAST, **sizes, **given}
    model = adapted(library, **(config or {}))
    run = hf.Trainer(
        model=model,
        args=hf.TrainingArguments(str(folder), **more),
        train_dataset=rows(),
        eval_dataset=rows(7),
        data_collator=padded,
        callbacks=callbacks,
    )
    if scores is not None:
        left = iter(scores)
        run.compute_metrics = lambda _: {"score": next(left)}
    run.train(resume_from_checkpoint=resume or None)
    return values(model), [entry["loss"] for entry in run.state.log_history if "loss" in entry]


slow = pytest.mark.slow
CHOICES = {
    "plain": {},
    "head": {"config": {"modules_to_save": ["lm_head"]}},
    "all": {"config": {"target_modules": "all-linear"}, "gradient_checkpointing": True},
    "accumulation": {"gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize(
    ("choice", "count"),
    [
        ("plain", 2),
        *(pytest.param(choice, 2, marks=slow) for choice in ("head", "all", "accumulation")),
        *(pytest.param(choice, 4, marks=slow) for choice in CHOICES),
    ],
)
def test_the_vectors_are_those_of_one_process(tmp_path: Path, choice: str, count: int) -> None:
    work = partial(trained, save_strategy="no", **CHOICES[choice])
    expected = work(tmp_path / "one")
    check_together(
        results_of(partial(work, tmp_path / "several"), tmp_path / "group", count), expected
    )
    start = values(adapted(**CHOICES[choice].get("config", {})))
    assert all(not torch.equal(expected[0][name], start[name]) for name in start)


@slow
def test_pefts_model_comes_to_the_same_vectors(tmp_path: Path) -> None:
    work = partial(trained, tmp_path / "run", save_strategy="no")
    ours = results_of(work, tmp_path / "group")
    theirs = results_of(partial(work, library=peft), tmp_path / "group")
    check_together(ours, theirs[0])


@pytest.mark.parametrize("resumed", [1, pytest.param(2, marks=slow), pytest.param(4, marks=slow)])
def test_a_run_of_two_processes_goes_on_in_any_number(tmp_path: Path, resumed: int) -> None:
    expected = trained(tmp_path / "whole")
    folder = tmp_path / "parts"
    results_of(partial(trained, folder, max_steps=SAVED), tmp_path / "group")
    checkpoint = folder / f"checkpoint-{SAVED}"
    assert files(checkpoint) >= ADAPTER_FILES
    assert sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")) < 4096
    assert not files(checkpoint) & {"model.safetensors", "pytorch_model.bin", "config.json"}
    work = partial(trained, folder, resume=True)
    found = [work()] if resumed == 1 else results_of(work, tmp_path / "group", resumed)
    check_together(found, expected)


def test_the_best_checkpoint_is_loaded_in_every_process(tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score", "eval_steps": SAVED}
    work = partial(trained, tmp_path, scores=[1.0, 0.0], eval_strategy="steps", **best)
    found = results_of(work, tmp_path / "group")
    first, last = (
        load_file(tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors")
        for step in (SAVED, STEPS)
    )
    assert any(not torch.equal(first[name], last[name]) for name in first)
    for vectors, _ in found:
        torch.testing.assert_close(vectors, first, rtol=0, atol=0)


@slow
def test_a_killed_process_ends_the_others_and_a_restart_goes_on(tmp_path: Path) -> None:
    expected = trained(tmp_path / "whole")
    folder = tmp_path / "parts"
    broken = in_forks(partial(trained, folder, callbacks=[Killed()]), tmp_path / "group")
    assert isinstance(broken[0], RuntimeError), broken
    assert broken[1] == -signal.SIGKILL
    again = results_of(partial(trained, folder, resume=True), tmp_path / "group")
    check_together(again, expected)
