"""An encoder's training in several processes: the vectors of one, and what a break leaves."""

from __future__ import annotations

import os
import signal
from functools import partial
from typing import Any

import pytest
import torch
from sentences.test_training import CONFIG, TARGETS
from support.processes import in_forks, results_of
from support.sentences import TEXTS, encoder, vectors_of

from ia3 import IA3Model
from ia3.base.processes import processes
from ia3.errors import IA3Error, StateError
from ia3.sentences import training
from ia3.sentences.checkpoint import CHECKPOINT_NAME, Checkpoint
from ia3.sentences.embedding import tokenized
from ia3.sentences.training import EncoderRecipe, EncoderTraining
from ia3.tfew.training.steps import DivergedError, StopTraining

RECIPE = EncoderRecipe(steps=10, batch_size=6, seed=1)
LISTS = [[target] if place % 3 else [0, 1] for place, target in enumerate(TARGETS)]


def trained(
    targets: Any = TARGETS, on_step: Any = None, checkpoint: Any = None, **more: Any
) -> tuple[dict[str, torch.Tensor], list[Any]]:
    base = encoder()
    model = IA3Model(base.model, CONFIG)
    run = EncoderTraining(base, model, tokenized(base, TEXTS), targets, RECIPE, **more)
    run.run(on_step, checkpoint)
    return vectors_of(model), run.history


def check_near(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
    assert [step.step for step in found[1]] == [step.step for step in expected[1]]
    for one, other in zip(found[1], expected[1], strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)


slow = pytest.mark.slow
MORE: dict[str, dict[str, Any]] = {
    "several labels": {"targets": LISTS},
    "weights": {"weights": torch.tensor([0.5, 3, 1, 1, 2, 0.1, 1, 1])},
    "few tokens at once": {"max_tokens": 8},
}
WAYS = [{}, *(pytest.param(way, marks=slow, id=name) for name, way in MORE.items())]
SEVERAL = [pytest.param(count, marks=slow) for count in (2, 4, 7)]


@pytest.mark.parametrize("count", [3, *SEVERAL])
@pytest.mark.parametrize("way", WAYS)
def test_vectors_are_those_of_one_process_and_the_same_bits_on_all(tmp_path, way, count):
    """The loss compares texts of all processes; of 7, one has no text of a batch."""
    found = results_of(partial(trained, **way), tmp_path, count)
    check_near(found[0], trained(**way))
    for other in found[1:]:
        torch.testing.assert_close(other[0], found[0][0], rtol=0, atol=0)
        assert other[1] == found[0][1]


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


def test_an_on_step_on_one_process_alone_is_no_hindrance(tmp_path):
    def work(first):
        has = processes().is_first == first
        return len(trained(on_step=(lambda step: None) if has else None)[1])

    for first in (True, False):
        assert results_of(partial(work, first), tmp_path) == [10, 10]


def test_what_on_step_raises_ends_all(tmp_path):
    def on_step(step):
        raise OSError(28, "No space left on device", "here")

    for error in in_forks(partial(trained, on_step=on_step), tmp_path):
        assert isinstance(error, OSError)


@pytest.mark.parametrize("then", [1, pytest.param(2, marks=slow), pytest.param(4, marks=slow)])
def test_a_run_of_two_processes_that_was_killed_goes_on_with_any_number(
    tmp_path, then, monkeypatch
):
    monkeypatch.setattr(training, "CHECKPOINT_STEPS", 3)
    folder = tmp_path / "checkpoints"

    def dies(step):
        if step.step == 8:
            os.kill(os.getpid(), signal.SIGKILL)

    def run(on_step=None):
        return trained(on_step=on_step, checkpoint=Checkpoint(folder, {}))

    killed, other = in_forks(partial(run, dies), tmp_path)
    assert killed == -signal.SIGKILL
    assert isinstance(other, StateError)
    told: list[int] = []
    found = results_of(lambda: (*run(lambda step: told.append(step.step)), told), tmp_path, then)
    check_near(found[0], trained())
    assert found[0][2] == [7, 8, 9, 10]
    assert [path.name for path in folder.iterdir()] == [CHECKPOINT_NAME]


def test_another_runs_checkpoint_is_refused_by_all(tmp_path):
    folder = tmp_path / "checkpoints"
    trained(checkpoint=Checkpoint(folder, {"run": 1}))
    for error in in_forks(lambda: trained(checkpoint=Checkpoint(folder, {"run": 2})), tmp_path):
        assert isinstance(error, IA3Error)
        assert "is of another run" in str(error)


def test_an_embedding_that_is_not_finite_ends_all_alike(tmp_path):
    def work():
        base = encoder()
        model = IA3Model(base.model, CONFIG)
        before = vectors_of(model)
        if processes().rank == 1:
            with torch.no_grad():
                base.model.embeddings.word_embeddings.weight.fill_(torch.nan)
        with pytest.raises(DivergedError) as raised:
            EncoderTraining(base, model, tokenized(base, TEXTS), TARGETS, RECIPE).run()
        torch.testing.assert_close(vectors_of(model), before, rtol=0, atol=0)
        return str(raised.value)

    first, second = results_of(work, tmp_path)
    assert first == second
    assert "diverged at step 1" in first
