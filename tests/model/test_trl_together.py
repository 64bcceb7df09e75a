"""TRL's trainers in several processes train a model with adapters as in one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from model.test_trl import adapted, made, rows, text
from safetensors.torch import load_file
from support.processes import results_of
from support.trainers import ADAPTER_FILES, anew, check_together, files, values
from torch import distributed

import ia3

pytestmark = [
    pytest.mark.datasets,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]

STEPS, SAVED = 10, 5
STEP_SIZE = 8
CONSTANT = {"lr_scheduler_type": "constant"}


@pytest.fixture(scope="module")
def trl() -> Any:
    return pytest.importorskip("trl", reason="trl is not installed")


def uneven(trainer: str) -> list[dict[str, str]]:
    """Three times eight examples of unlike lengths."""
    return [
        {name: f"{value} {text(i, 1 + i % 5)}" for name, value in row.items()}
        for i, row in enumerate(rows(trainer) * 3)
    ]


def trained(
    trl: Any, trainer: str, folder: Path, resume: bool = False, **given: Any
) -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    """What is trained, after it is, the losses, and DPO's rewards."""
    anew()
    count = distributed.get_world_size() if distributed.is_initialized() else 1
    examples = STEP_SIZE // count // given.get("gradient_accumulation_steps", 1)
    sizes = {"per_device_train_batch_size": examples, "per_device_eval_batch_size": 1}
    more = {"max_steps": STEPS, "save_steps": SAVED, **CONSTANT, **sizes, **given}
    data = uneven(trainer)
    run = made(trl, trainer, adapted(ia3), folder, data, data[:7], **more)
    assert getattr(run, "ref_model", None) is None
    run.train(resume_from_checkpoint=resume or None)
    history = run.state.log_history
    found = values(run.model)
    assert run.model.active_adapter == "default"
    return found, *(
        [entry[name] for entry in history if name in entry] for name in ("loss", "rewards/chosen")
    )


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("trainer", "count", "accumulated"),
    [
        ("DPO", 2, 1),
        pytest.param("SFT", 2, 1, marks=slow),
        *(pytest.param(trainer, 2, 2, marks=slow) for trainer in ("SFT", "DPO")),
        *(pytest.param(trainer, 4, 1, marks=slow) for trainer in ("SFT", "DPO")),
    ],
)
def test_the_vectors_are_those_of_one_process(
    trl: Any, tmp_path: Path, trainer: str, count: int, accumulated: int
) -> None:
    more = {"save_strategy": "no", "gradient_accumulation_steps": accumulated}
    work = partial(trained, trl, trainer, tmp_path / "run", **more)
    expected = work()
    check_together(results_of(work, tmp_path / "group", count), expected)
    assert len(expected[1]) == STEPS
    # The adapter's vectors are random at first: the reference is another model than the policy.
    assert trainer == "SFT" or all(reward != 0 for reward in expected[2])


@slow
@pytest.mark.parametrize(("trainer", "resumed"), [("SFT", 4), ("DPO", 1), ("DPO", 4)])
def test_a_run_of_two_processes_goes_on_in_any_number(
    trl: Any, tmp_path: Path, trainer: str, resumed: int
) -> None:
    expected = trained(trl, trainer, tmp_path / "whole")
    folder = tmp_path / "parts"
    results_of(partial(trained, trl, trainer, folder, max_steps=SAVED), tmp_path / "group")
    checkpoint = folder / f"checkpoint-{SAVED}"
    assert files(checkpoint) >= ADAPTER_FILES
    weights = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*.safetensors")}
    assert weights <= {"adapter_model.safetensors", "ref/adapter_model.safetensors"}
    assert not files(checkpoint) & {"pytorch_model.bin", "config.json"}
    work = partial(trained, trl, trainer, folder, resume=True)
    found = [work()] if resumed == 1 else results_of(work, tmp_path / "group", resumed)
    check_together(found, expected)


@slow
@pytest.mark.parametrize("trainer", ["SFT", "DPO"])
def test_the_best_checkpoint_is_loaded_in_every_process(
    trl: Any, tmp_path: Path, trainer: str
) -> None:
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": SAVED}
    # The loss falls: the larger one is that of the first checkpoint.
    best |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}
    found = results_of(partial(trained, trl, trainer, tmp_path, **best), tmp_path / "group")
    first, last = (
        load_file(tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors")
        for step in (SAVED, STEPS)
    )
    assert any(not torch.equal(first[name], last[name]) for name in first)
    for vectors, *_ in found:
        torch.testing.assert_close(vectors, first, rtol=0, atol=0)
