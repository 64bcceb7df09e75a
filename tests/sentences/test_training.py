"""Training on a sentence encoder: the loss, the batches, and what a break leaves behind."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings, strategies as st
from support.kills import moments
from support.sentences import LABELS, TEXTS, encoder, vectors_of
from torch import Tensor

from ia3 import IA3Config, IA3Model
from ia3.errors import BrokenFileError, IA3Error
from ia3.sentences import training
from ia3.sentences.checkpoint import CHECKPOINT_NAME, Checkpoint, EncoderStep
from ia3.sentences.embedding import tokenized
from ia3.sentences.training import (
    TEMPERATURE,
    EncoderRecipe,
    EncoderTraining,
    balanced_batches,
    contrastive_loss,
)
from ia3.tfew.training.steps import DivergedError, StopTraining

TARGETS = [int(label == "delivery") for label in LABELS]
RECIPE = EncoderRecipe(steps=5, batch_size=4)
CONFIG = IA3Config(target_modules="all-linear", task_type="FEATURE_EXTRACTION")


@pytest.fixture
def base():
    return encoder()


@pytest.fixture
def model(base):
    return IA3Model(base.model, CONFIG)


def ready(base, model, recipe=RECIPE, max_tokens=4096):
    data = tokenized(base, TEXTS), TARGETS
    return EncoderTraining(base, model, *data, recipe, max_tokens=max_tokens)


def trained(recipe=RECIPE, on_step=None, checkpoint=None, **more):
    """The vectors and the history of a whole run on a new encoder."""
    base = encoder()
    run = ready(base, model := IA3Model(base.model, CONFIG), recipe, **more)
    run.run(on_step, checkpoint)
    return vectors_of(model), run.history


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -- the loss --------------------------------------------------------------------------------------


def plain_loss(embeddings: Tensor, targets: list[int]) -> float:
    """Khosla et al. 2020, equation 2, term by term."""
    rows = embeddings.double().tolist()
    of_anchors = []
    for i, row in enumerate(rows):
        powers = {
            a: math.exp(sum(x * y for x, y in zip(row, other, strict=True)) / TEMPERATURE)
            for a, other in enumerate(rows)
            if a != i
        }
        alike = [a for a in powers if targets[a] == targets[i]]
        if alike:
            everything = sum(powers.values())
            logs = [math.log(powers[p] / everything) for p in alike]
            of_anchors.append(-sum(logs) / len(alike))
    return sum(of_anchors) / max(1, len(of_anchors))


@pytest.mark.parametrize(
    "targets",
    [[0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 2, 2], [3, 3, 3, 3, 3, 3], [0, 1, 2, 3, 4, 5], [0, 1, 0]],
)
def test_the_loss_is_the_formula(targets):
    generator = torch.Generator().manual_seed(1)
    found = F.normalize(torch.randn(len(targets), 7, generator=generator).double(), dim=1)
    loss = contrastive_loss(found, torch.tensor(targets))
    assert float(loss) == pytest.approx(plain_loss(found, targets), abs=1e-12)
    single = contrastive_loss(found.float(), torch.tensor(targets))
    assert float(single) == pytest.approx(float(loss), abs=1e-5)


def test_the_loss_has_the_gradients_of_its_values():
    generator = torch.Generator().manual_seed(2)
    found = torch.randn(6, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 0, 1, 1, 1, 2])
    assert torch.autograd.gradcheck(
        lambda values: contrastive_loss(F.normalize(values, dim=1), targets), found
    )


def test_texts_of_which_none_shares_a_class_have_no_loss_and_no_gradient():
    found = torch.randn(3, 5, requires_grad=True)
    loss = contrastive_loss(found, torch.tensor([0, 1, 2]))
    loss.backward()
    assert float(loss.detach()) == 0
    assert torch.equal(found.grad, torch.zeros(3, 5))


# -- the batches -----------------------------------------------------------------------------------

TASKS = st.lists(st.integers(0, 6), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(TASKS, st.integers(1, 24), st.integers(0, 12), st.integers(0, 5))
def test_batches_are_pairs_of_one_class_with_classes_and_texts_in_turn(targets, size, steps, seed):
    batches = balanced_batches(targets, size, steps, seed)
    assert [len(batch) for batch in batches] == [size + size % 2] * steps
    drawn = [text for batch in batches for text in batch]
    assert [targets[text] for text in drawn[::2]] == [targets[text] for text in drawn[1::2]]
    classes, texts = Counter(dict.fromkeys(targets, 0)), Counter(dict.fromkeys(drawn, 0))
    for place, text in enumerate(drawn):
        # No class, and no text of a class, comes a second time more often than another one.
        if place % 2 == 0:
            classes[targets[text]] += 1
            assert max(classes.values()) - min(classes.values()) <= 1
        texts[text] += 1
        beside = [index for index, target in enumerate(targets) if target == targets[text]]
        counts = [texts[index] for index in beside]
        assert max(counts) - min(counts) <= 1


@settings(max_examples=30, deadline=None)
@given(TASKS, st.integers(1, 8), st.integers(0, 5))
def test_the_seed_draws_the_batches_and_more_steps_go_on_as_fewer_did(targets, size, seed):
    batches = balanced_batches(targets, size, 9, seed)
    assert balanced_batches(targets, size, 4, seed) == batches[:4]
    assert balanced_batches([*range(30)], 8, 5, seed) != balanced_batches(
        [*range(30)], 8, 5, seed + 1
    )


# -- the training ----------------------------------------------------------------------------------


def test_the_loss_falls_and_each_step_is_recorded(base, model):
    seen = []
    run = ready(base, model, EncoderRecipe(steps=30, batch_size=8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run.run(seen.append)
    assert run.history == seen
    assert [(step.step, step.steps) for step in seen] == [(n, 30) for n in range(1, 31)]
    assert sum(step.loss for step in seen[-5:]) < sum(step.loss for step in seen[:5])
    # The vectors alone have changed.
    vectors = vectors_of(model)
    assert all((vector != 1).any() for vector in vectors.values())
    after = model.state_dict()
    for name, value in before.items():
        assert torch.equal(value, after[name]) or "ia3" in name


def test_the_first_steps_loss_is_that_of_the_bare_encoder(base, model):
    ids = tokenized(base, TEXTS)
    batch = balanced_batches(TARGETS, 4, 1, RECIPE.seed)[0]
    rows = []
    with torch.no_grad():
        for text in batch:
            rows.append(
                base.model(input_ids=torch.tensor([ids[text]])).last_hidden_state[0].mean(0)
            )
    expected = plain_loss(F.normalize(torch.stack(rows), dim=1), [TARGETS[text] for text in batch])
    run = ready(base, model)
    run.run()
    assert run.history[0].loss == pytest.approx(expected, rel=1e-4)


def test_the_same_seed_has_the_same_bits_and_leaves_the_global_random_state():
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    (one, history), (two, again) = trained(), trained()
    assert same(one, two)
    assert history == again
    assert torch.equal(state, torch.random.get_rng_state())
    other, _ = trained(EncoderRecipe(steps=5, batch_size=4, seed=1))
    assert not same(one, other)


@pytest.mark.parametrize("most", [1, 9, 14])
def test_a_step_in_parts_is_the_same_but_for_rounding(most):
    (whole, history), (parts, again) = trained(), trained(max_tokens=most)
    for step, other in zip(history, again, strict=True):
        assert step.loss == pytest.approx(other.loss, rel=1e-4)
    for name, vector in whole.items():
        torch.testing.assert_close(parts[name], vector, rtol=0, atol=1e-3)


def test_no_part_is_larger_than_it_may_be(base, model):
    shapes = []
    base.model.register_forward_pre_hook(
        lambda module, args, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    ready(base, model, max_tokens=12).run()
    assert all(texts * width <= 12 for texts, width in shapes)
    assert any(texts > 1 for texts, _ in shapes)


def test_divergence_leaves_the_vectors_as_they_were_before_the_step(base, model):
    recipe = EncoderRecipe(steps=10, batch_size=4, learning_rate=1e30)
    kept = []
    run = ready(base, model, recipe)
    with pytest.raises(DivergedError, match="diverged at step") as caught:
        run.run(lambda step: kept.append(vectors_of(model)))
    assert caught.value.step == len(kept) + 1 > 1
    assert same(vectors_of(model), kept[-1])


def test_a_broken_weight_and_a_broken_gradient_are_seen_before_the_vectors_change(base, model):
    run = ready(base, model)
    name, vector = next(iter(model.vectors("default").items()))
    before = vectors_of(model)
    handle = vector.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(DivergedError, match=f"gradient of the vector of '{name}'") as caught:
        run.run()
    assert caught.value.step == 1
    handle.remove()
    with torch.no_grad():
        base.model.get_parameter("encoder.layer.1.output.dense.weight")[0, 0] = torch.nan
    with pytest.raises(DivergedError, match="the loss is nan"):
        run.run()
    assert same(vectors_of(model), before)
    assert run.history == []


def test_an_on_step_ends_the_training(base, model):
    def stop(step):
        if step.step == 2:
            raise StopTraining

    run = ready(base, model)
    run.run(stop)
    assert [step.step for step in run.history] == [1, 2]


# -- breaks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", range(1, 6))
def test_a_run_that_is_broken_off_at_any_step_ends_with_the_same_bits(tmp_path, monkeypatch, stop):
    monkeypatch.setattr(training, "CHECKPOINT_STEPS", 2)
    whole, history = trained()

    def die(step):
        if step.step == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(on_step=die, checkpoint=Checkpoint(tmp_path, {"run": 1}))
    taken = []
    resumed, again = trained(on_step=taken.append, checkpoint=Checkpoint(tmp_path, {"run": 1}))
    assert same(resumed, whole)
    assert again == history
    # Not from the beginning, where there was a checkpoint.
    assert [step.step for step in taken] == list(range((stop - 1) // 2 * 2 + 1, 6))
    finished = []
    assert same(
        trained(on_step=finished.append, checkpoint=Checkpoint(tmp_path, {"run": 1}))[0], whole
    )
    assert finished == []


def test_killed_while_it_is_written_a_checkpoint_is_the_old_one_or_the_new_one(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(training, "CHECKPOINT_STEPS", 1)

    def run_until(last):
        """A run that goes on from its checkpoint; the numbers of its steps."""
        taken = []

        def stop(step):
            taken.append(step.step)
            if step.step == last:
                raise StopTraining

        trained(on_step=stop, checkpoint=Checkpoint(tmp_path, {}))
        return taken

    assert run_until(1) == [1]
    old = (tmp_path / CHECKPOINT_NAME).read_bytes()
    keep, given = Checkpoint.keep, []
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "keep", lambda self, *arguments: given.append(arguments))
        assert run_until(2) == [2]
    begins = set()
    for _ in moments(lambda: keep(Checkpoint(tmp_path, {}), *given[-1])):
        begins.add(run_until(3)[0])
        (tmp_path / CHECKPOINT_NAME).write_bytes(old)
    assert begins == {2, 3}


def test_another_runs_checkpoint_is_refused_and_changes_nothing(tmp_path, base, model):
    trained(checkpoint=Checkpoint(tmp_path, {"seed": 0}))
    before = vectors_of(model)
    run = ready(base, model)
    with pytest.raises(IA3Error, match="of another run: its data, model or settings differ"):
        run.run(None, Checkpoint(tmp_path, {"seed": 1}))
    assert same(vectors_of(model), before)


def damaged_files(whole: bytes):
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    yield b""
    yield whole[:-1]
    yield whole + b"\0"
    yield whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]
    changed = header["__metadata__"]
    for history in (None, "{}", "[1]", "[", '[{"step": 1, "steps": 5, "loss": "low"}]'):
        metadata = {**changed, "ia3_history": history}
        if history is None:
            del metadata["ia3_history"]
        text = json.dumps({**header, "__metadata__": metadata}).encode()
        text += b" " * (-len(text) % 8)
        yield len(text).to_bytes(8, "little") + text + whole[8 + length :]


def test_a_damaged_checkpoint_is_refused_and_changes_nothing(tmp_path, base, model):
    trained(checkpoint=Checkpoint(tmp_path, {}))
    path = tmp_path / CHECKPOINT_NAME
    before = vectors_of(model)
    for content in damaged_files(path.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(BrokenFileError, match=CHECKPOINT_NAME):
            ready(base, model).run(None, Checkpoint(tmp_path, {}))
        assert same(vectors_of(model), before)


def test_a_checkpoint_of_other_sites_is_refused(tmp_path, base):
    trained(checkpoint=Checkpoint(tmp_path, {}))
    few = IA3Model(base.model, IA3Config(target_modules=["query"], feedforward_modules=[]))
    with pytest.raises(BrokenFileError, match="another shape"):
        ready(base, few).run(None, Checkpoint(tmp_path, {}))


def test_a_vector_without_a_gradient_is_kept_too(tmp_path):
    """As of a module that is never called: AdamW has no moments of it."""
    called, never = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = torch.optim.AdamW([called, never])
    called.sum().backward()
    optimizer.step()
    Checkpoint(tmp_path, {}).keep(optimizer, [EncoderStep(1, 5, 0.5)])
    others = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    fresh = torch.optim.AdamW(others)
    assert Checkpoint(tmp_path, {}).restore(fresh) == ([EncoderStep(1, 5, 0.5)], None)
    assert torch.equal(others[0], called)
    assert torch.equal(others[1], never)
    assert torch.equal(fresh.state[others[0]]["exp_avg"], optimizer.state[called]["exp_avg"])
    assert not fresh.state[others[1]]


def test_a_folder_that_is_a_file_is_said_before_the_first_step(tmp_path):
    path: Path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(OSError):
        Checkpoint(path, {})
