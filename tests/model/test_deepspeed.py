"""DeepSpeed's ZeRO-2 on the CPU trains a model with adapters as one process does."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from model.test_trainers_together import SAVED, STEPS, trained
from safetensors.torch import load_file
from support.processes import results_of
from support.trainers import ADAPTER_FILES, check_together, files

pytestmark = [
    pytest.mark.deepspeed,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]

AUTOMATIC = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
ZERO_2 = {"zero_optimization": {"stage": 2}, **dict.fromkeys(AUTOMATIC, "auto")}


@pytest.fixture(scope="module", autouse=True)
def deepspeed() -> Any:
    return pytest.importorskip("deepspeed", reason="make test-deepspeed runs this")


def test_the_vectors_are_those_of_one_process(tmp_path: Path) -> None:
    expected = trained(tmp_path / "one", save_strategy="no")
    for count in (2, 4):
        work = partial(trained, tmp_path / "run", save_strategy="no", deepspeed=ZERO_2)
        check_together(results_of(work, tmp_path / "group", count), expected)


def test_checkpoints_hold_what_is_trained_and_are_gone_on_from(tmp_path: Path) -> None:
    expected = trained(tmp_path / "whole")
    work = partial(trained, tmp_path / "parts", deepspeed=ZERO_2)
    results_of(partial(work, max_steps=SAVED), tmp_path / "group")
    checkpoint = tmp_path / "parts" / f"checkpoint-{SAVED}"
    assert files(checkpoint) >= ADAPTER_FILES
    (states,) = checkpoint.glob("global_step*/*model_states.pt")
    module = torch.load(states, weights_only=False)["module"]
    assert all(".ia3_l." in name for name in module)
    check_together(results_of(partial(work, resume=True), tmp_path / "group"), expected)


def test_the_best_checkpoint_is_loaded_in_every_process(tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score", "eval_steps": SAVED}
    best |= {"scores": [1.0, 0.0], "eval_strategy": "steps", "deepspeed": ZERO_2}
    found = results_of(partial(trained, tmp_path, **best), tmp_path / "group")
    first, last = (
        load_file(tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors")
        for step in (SAVED, STEPS)
    )
    assert any(not torch.equal(first[name], last[name]) for name in first)
    for vectors, _ in found:
        torch.testing.assert_close(vectors, first, rtol=0, atol=0)
