"""Training on a base model whose weights are spread over the processes: FSDP 2.

What is compared with are runs of one process in this one, whose model is whole.
"""

from __future__ import annotations

import os
import signal
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import in_forks, results_of
from support.tfew import tiny_llama, word_tokenizer
from support.versions import since
from tfew.training.test_trainer import training_set
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ia3 import IA3Config, IA3Model
from ia3.adapter.files import read_adapter
from ia3.base.loading import BaseModel, load_base_model
from ia3.base.processes import processes
from ia3.errors import StateError
from ia3.tfew import TFewConfig, train
from ia3.tfew.prompts.encoding import EncodedExample, TrainingExample
from ia3.tfew.temporary_adapter import temporary_adapter
from ia3.tfew.training.steps import StopTraining

pytestmark = since("transformers", "5.23", "a model that is spread as it is read")

RECIPE = TFewConfig(steps=10, batch_size=6, seed=3, learning_rate=1e-2)
SITES = IA3Config(target_modules="all-linear")
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder."""
    folder: Path = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder / "llama")
    tiny_llama(tie_word_embeddings=True).save_pretrained(folder / "tied")
    return folder


def trained(
    folder: Path, recipe: TFewConfig = RECIPE, on_step: Any = None, **settings: Any
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The vectors after a training, and the losses; in several processes the base is spread."""
    base = load_base_model(folder, tokenizer=word_tokenizer(), shard=True)
    is_spread = any(hasattr(value, "full_tensor") for value in base.model.parameters())
    assert is_spread == (processes().count > 1)
    with warnings.catch_warnings():
        # Not that gradients stay each process's own: the training adds them up.
        warnings.simplefilter("error", UserWarning)
        with temporary_adapter(base, SITES) as model:
            history = train(base, model, training_set(7), recipe, on_step, **settings)
            values = {n: v.detach().clone() for n, v in model.vectors("default").items()}
    return values, [step.loss for step in history]


def check_near(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
    assert found[1] == pytest.approx(expected[1], rel=1e-4)


# Of 7 processes one has no example of any step; of few tokens a process computes more parts than
# another, and an example's choices in several passes.
WAYS: dict[str, Any] = {
    "two processes": {},
    "four processes": {"count": 4},
    "tied embeddings": {"kind": "tied"},
    "none of some": {"count": 7},
    "few tokens at once": {"count": 3, "recipe": replace(RECIPE, max_tokens=20)},
    "choices in parts": {"count": 2, "recipe": replace(RECIPE, steps=4, max_tokens=4)},
    "parts of a step": {"gradient_accumulation_steps": 3},
}


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, marks=[slow] if i else [], id=name)
        for i, (name, way) in enumerate(WAYS.items())
    ],
)
def test_vectors_are_those_of_one_process_whose_base_is_whole(tmp_path, folder, way):
    settings = dict(way)
    count, kind = settings.pop("count", 2), settings.pop("kind", "llama")
    work = partial(trained, folder / kind, **settings)
    found = results_of(work, tmp_path, count)
    check_near(found[0], work())
    for other in found[1:]:
        torch.testing.assert_close(other[0], found[0][0], rtol=0, atol=0)


def test_a_base_that_was_called_before_is_as_frozen(tmp_path, folder):
    """FSDP leaves some of its weights whole after a call, in parameters of their own."""

    def work() -> Any:
        base = load_base_model(folder / "llama", tokenizer=word_tokenizer(), shard=True)
        with torch.no_grad():
            base.model(input_ids=torch.arange(3, 9)[None])
        with temporary_adapter(base, SITES) as model:
            model(input_ids=torch.arange(3, 9)[None]).logits.sum().backward()
            named = dict(model.named_parameters())
            return [name for name in named if named[name].requires_grad and "ia3_l" not in name]

    assert results_of(work, tmp_path) == [[], []]


@slow
def test_one_without_an_example_makes_the_others_passes_where_the_shortest_has_more(
    tmp_path, folder
):
    """Of the shortest example alone a pass would be made for each of its five choices."""
    short = EncodedExample((3, 4), tuple((token, 4) for token in range(5, 10)))
    long = EncodedExample((3, 4, 5, 6, 7), ((8, 9, 10), (11, 12)))
    examples = [TrainingExample((each,), 0) for each in (long, long, short)]
    recipe = replace(RECIPE, steps=3, batch_size=2, max_tokens=3)

    def work() -> Any:
        base = load_base_model(folder / "llama", tokenizer=word_tokenizer(), shard=True)
        with temporary_adapter(base, SITES) as model:
            history = train(base, model, examples, recipe)
            values = {n: v.detach().clone() for n, v in model.vectors("default").items()}
        return values, [step.loss for step in history]

    check_near(results_of(work, tmp_path, 3)[0], work())


@slow
def test_a_process_that_is_killed_amid_a_pass_ends_the_others_with_an_error(tmp_path, folder):
    def dies(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def work() -> Any:
        base = load_base_model(folder / "llama", tokenizer=word_tokenizer(), shard=True)
        with temporary_adapter(base, SITES) as model:
            if processes().rank == 1:
                base.model.get_submodule("model.layers.1.mlp").register_forward_hook(dies)
            train(base, model, training_set(7), RECIPE)

    other, killed = in_forks(work, tmp_path)
    assert killed == -signal.SIGKILL
    assert type(other) is StateError
    assert "another process of this job has ended" in str(other)


@slow
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_run_that_was_broken_off_goes_on_in_any_number_of_processes(tmp_path, folder, count):
    def stop(step: Any) -> None:
        if step.step == 4:
            raise StopTraining

    saving = {"checkpoints": tmp_path / "checkpoints", "save_steps": 2}
    work = partial(trained, folder / "llama", **saving)
    results_of(partial(work, on_step=stop), tmp_path / "first", 2)
    found = work() if count == 1 else results_of(work, tmp_path / "second", count)[0]
    check_near(found, trained(folder / "llama"))


def test_one_process_alone_saves_and_the_file_names_the_base_model(tmp_path, folder):
    """As the trainer does: what has to be gathered for it was gathered before."""

    def saved() -> Any:
        base = load_base_model(folder / "llama", tokenizer=word_tokenizer(), shard=True)
        with temporary_adapter(base, SITES) as model:
            train(base, model, training_set(2), replace(RECIPE, steps=1))
            if processes().is_first:
                model.save_pretrained(tmp_path / "adapter")

    results_of(saved, tmp_path)
    adapter = read_adapter(tmp_path / "adapter")
    assert adapter.base.samples
    assert adapter.base.difference(tiny_llama()) is None
    assert adapter.base.difference(tiny_llama(seed=1)) is not None


def test_a_base_under_tensor_parallelism_is_no_place_to_share_examples_out(tmp_path):
    def work() -> Any:
        model: Any = tiny_llama()
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
        plan: Any = {f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
        plan["mlp.down_proj"] = RowwiseParallel()
        for layer in model.model.layers:
            parallelize_module(layer, mesh, plan)
        sites = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
        adapted, base = IA3Model(model, sites), BaseModel(model, word_tokenizer(), "llama")
        train(base, adapted, training_set(2), RECIPE)

    for error in in_forks(work, tmp_path):
        assert isinstance(error, StateError)
        assert "all have to be given the same examples" in str(error)


def test_on_a_base_that_is_spread_a_loop_of_ones_own_is_warned(tmp_path, folder):
    def work() -> Any:
        base = load_base_model(folder / "llama", tokenizer=word_tokenizer(), shard=True)
        model: nn.Module = base.model
        with pytest.warns(UserWarning, match="gradients of its vectors are not averaged"):
            IA3Model(model, SITES)

    results_of(work, tmp_path)
