"""T-Few's training in several processes: the vectors of one process, checkpoints, and what ends it.

What is compared with are runs of one process in this one.
"""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from support.processes import in_forks, results_of
from support.tfew import tiny_llama, tiny_t5, word_tokenizer
from tfew.training.test_trainer import training_set
from transformers import TrainerCallback

from ia3 import IA3Config, IA3Model
from ia3.base.loading import BaseModel
from ia3.base.processes import processes
from ia3.errors import IA3Error, StateError
from ia3.tfew import TFewConfig, train
from ia3.tfew.training.recipe import TFewConfig as Recipe
from ia3.tfew.training.steps import DivergedError, StopTraining

RECIPE = TFewConfig(steps=10, batch_size=6, seed=3, learning_rate=1e-2)
KINDS = {"llama": tiny_llama, "t5": tiny_t5}


def base_of(kind: str = "llama") -> BaseModel:
    return BaseModel(KINDS[kind](), word_tokenizer(), kind)


def values(model: IA3Model) -> dict[str, torch.Tensor]:
    return {
        name: value.detach().clone()
        for name, value in model.named_parameters()
        if value.requires_grad
    }


def trained(
    recipe: Recipe = RECIPE,
    kind: str = "llama",
    on_step: Any = None,
    sites: Any = None,
    weights: Any = None,
    **settings: Any,
) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """What is trained of a new model, after it is, and the steps."""
    base = base_of(kind)
    model = IA3Model(base.model, sites or IA3Config(target_modules="all-linear"))
    examples = [
        replace(example, weight=weight)
        for example, weight in zip(training_set(7), weights or [1.0] * 7, strict=True)
    ]
    history = train(base, model, examples, recipe, on_step, **settings)
    return values(model), history


def check_near(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
    assert [step.step for step in found[1]] == [step.step for step in expected[1]]
    for one, other in zip(found[1], expected[1], strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        assert one.unlikelihood == pytest.approx(other.unlikelihood, rel=1e-4)


slow = pytest.mark.slow
SEVERAL = [pytest.param(count, marks=slow) for count in (3, 4, 7)]


@pytest.mark.parametrize("count", [2, *SEVERAL])
@pytest.mark.parametrize("kind", ["llama", pytest.param("t5", marks=slow)])
def test_vectors_are_those_of_one_process_and_the_same_bits_on_all(tmp_path, count, kind):
    """Of 7 processes one has no example of any step."""
    found = results_of(partial(trained, kind=kind), tmp_path, count)
    check_near(found[0], trained(kind=kind))
    for other in found[1:]:
        torch.testing.assert_close(other[0], found[0][0], rtol=0, atol=0)
        assert other[1] == found[0][1]


HEAD = IA3Config(target_modules=["q_proj"], feedforward_modules=[], modules_to_save=["lm_head"])
WAYS: dict[str, dict[str, Any]] = {
    "parts of a step": {"gradient_accumulation_steps": 3},
    "few tokens at once": {"recipe": replace(RECIPE, max_tokens=20)},
    "weights": {"weights": [0.5, 3, 1, 1, 2, 0.1, 1]},
    "a whole head": {"sites": HEAD},
    "another optimizer": {"optim": "adamw_torch", "learning_rate": 3e-3},
    "a step larger than the data": {"recipe": replace(RECIPE, batch_size=16)},
}


@slow
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_in_every_way_to_train(tmp_path, way):
    found, _ = results_of(partial(trained, **way), tmp_path)
    check_near(found, trained(**way))


@slow
def test_it_ends_at_the_plateau_of_one_process(tmp_path):
    recipe = replace(RECIPE, steps=80, learning_rate=1e-4, stop_at_plateau=True)
    expected = trained(recipe)
    assert len(expected[1]) < 80
    found = results_of(partial(trained, recipe), tmp_path)
    assert [len(history) for _, history in found] == [len(expected[1])] * 2


@slow
def test_the_first_process_alone_is_told_of_steps_and_ends_it_for_all(tmp_path):
    def work():
        told = []

        def on_step(step):
            told.append(step.step)
            if step.step == 4:
                raise StopTraining

        return told, len(trained(on_step=on_step)[1])

    assert results_of(work, tmp_path) == [([1, 2, 3, 4], 4), ([], 4)]


@slow
def test_callbacks_of_the_first_process_end_it_for_all_and_know_who_writes(tmp_path):
    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            writers.append(state.is_world_process_zero)
            last = 3 if processes().is_first else 2
            control.should_training_stop = state.global_step == last

    writers: list[bool] = []

    def work():
        history = trained(callbacks=[Stops()])[1]
        return len(history), writers

    assert results_of(work, tmp_path) == [(3, [True] * 3), (3, [False] * 3)]


@pytest.mark.parametrize("event", ["on_log", "on_save"])
def test_what_they_say_of_a_log_or_a_checkpoint_ends_it_for_all_too(tmp_path, event):
    def stops(self, args, state, control, **kwargs):
        # Amid an epoch, of two steps.
        control.should_training_stop = processes().is_first and state.global_step >= 3

    def work():
        callback = type("Stops", (TrainerCallback,), {event: stops})()
        more = {"logging_steps": 1, "checkpoints": tmp_path / "checkpoints", "save_steps": 1}
        return len(trained(callbacks=[callback], **more)[1])

    assert results_of(work, tmp_path) == [3, 3]


@slow
def test_logged_losses_are_those_of_all_processes(tmp_path):
    class Logged(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                losses.append(logs["loss"])

    losses: list[float] = []

    def work():
        history = trained(callbacks=[Logged()], logging_steps=1)[1]
        return losses, [step.loss for step in history]

    for logged, expected in results_of(work, tmp_path):
        assert logged == pytest.approx(expected, rel=1e-3)


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("then", [1, pytest.param(2, marks=slow), pytest.param(4, marks=slow)])
def test_a_run_of_two_processes_that_was_killed_goes_on_with_any_number(tmp_path, then):
    folder = tmp_path / "checkpoints"

    def dies(step):
        if step.step == 8:
            os.kill(os.getpid(), signal.SIGKILL)

    run = partial(trained, checkpoints=folder, save_steps=3)
    killed, other = in_forks(partial(run, on_step=dies), tmp_path)
    assert killed == -signal.SIGKILL
    assert isinstance(other, StateError)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-6"]

    def goes_on():
        told: list[int] = []
        return (*run(on_step=lambda step: told.append(step.step)), told)

    found = results_of(goes_on, tmp_path, then)
    check_near(found[0], trained())
    assert found[0][2] == [7, 8, 9, 10]
    assert [path.name for path in folder.iterdir()] == ["checkpoint-10"]


@slow
def test_a_run_of_one_process_goes_on_with_two(tmp_path):
    folder = tmp_path / "checkpoints"

    def stop(step):
        if step.step == 7:
            raise KeyboardInterrupt

    run = partial(trained, checkpoints=folder, save_steps=6)
    with pytest.raises(KeyboardInterrupt):
        run(on_step=stop)
    for found in results_of(run, tmp_path):
        check_near(found, trained())


@slow
def test_a_run_at_its_end_takes_no_further_step_on_any_process(tmp_path):
    run = partial(trained, checkpoints=tmp_path / "checkpoints")
    first, history = results_of(run, tmp_path)[0]
    for found in results_of(run, tmp_path, 3):
        torch.testing.assert_close(found[0], first, rtol=0, atol=0)
        assert found[1] == history


@slow
def test_a_checkpoint_that_not_all_processes_see_is_an_error(tmp_path):
    """As on two machines that share no disk."""
    recipe = replace(RECIPE, steps=2)
    trained(recipe, checkpoints=tmp_path / "checkpoints")

    def work():
        if processes().rank == 1:
            Path.is_dir = lambda self: not self.name.startswith("checkpoint-")
        trained(recipe, checkpoints=tmp_path / "checkpoints")

    _, second = in_forks(work, tmp_path)
    assert isinstance(second, StateError)
    assert "is not there in process 1" in str(second)


@slow
def test_one_run_at_a_time_has_a_folder_whichever_process_asks(tmp_path):
    folder = tmp_path / "checkpoints"
    found: list[Any] = []

    def another(step):
        found.extend(in_forks(partial(trained, checkpoints=folder), tmp_path))

    trained(replace(RECIPE, steps=1), on_step=another, checkpoints=folder)
    for error in found:
        assert isinstance(error, StateError)
        assert "another process trains with these checkpoints" in str(error)
    assert len(found) == 2


# -- errors ----------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_all_alike(tmp_path):
    """The text that does it is another process's than the first."""

    def work():
        base = base_of()
        model = IA3Model(base.model, IA3Config(target_modules="all-linear"))
        before = values(model)
        if processes().rank == 1:
            with torch.no_grad():
                base.model.lm_head.weight[5:].fill_(torch.inf)
        try:
            train(base, model, training_set(), RECIPE)
        except DivergedError as error:
            return str(error), {
                name: torch.equal(value, before[name]) for name, value in values(model).items()
            }

    first, second = results_of(work, tmp_path)
    assert first == second
    assert "diverged at step 1" in first[0]
    assert all(first[1].values())


DIFFERENT = {
    "examples": lambda rank: {"weights": [1.0] * 6 + [1.0 + rank]},
    "steps": lambda rank: {"recipe": replace(RECIPE, steps=9 + rank)},
    "save_strategy": lambda rank: {"checkpoints": [None, "checkpoints"][rank]},
    "base model": lambda rank: {"kind": ["llama", "t5"][rank]},
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_different_things_on_different_processes_are_an_error_before_any_step(tmp_path, what):
    def work():
        try:
            trained(**DIFFERENT[what](processes().rank))
        except IA3Error as error:
            return str(error)

    first, second = results_of(work, tmp_path)
    assert first == second
    assert what in first
    assert "of process 1 are not those of process 0" in first


@slow
def test_accelerates_own_state_is_as_it_was_before(tmp_path):
    def work():
        AcceleratorState._reset_state(True)  # of the test before
        accelerator = Accelerator(cpu=True)
        before = accelerator.num_processes, accelerator.process_index
        trained(replace(RECIPE, steps=2))
        assert (accelerator.num_processes, accelerator.process_index) == before
        return before

    assert results_of(work, tmp_path) == [(2, 0), (2, 1)]


def test_in_one_process_too():
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    trained(replace(RECIPE, steps=1))
    assert accelerator.mixed_precision == "bf16"
    AcceleratorState._reset_state(True)


@slow
def test_the_trainers_warning_of_an_unused_group_is_not_given(tmp_path, capfd):
    results_of(partial(trained, replace(RECIPE, steps=1)), tmp_path)
    said = capfd.readouterr()
    assert "torch.distributed" not in said.err + said.out
