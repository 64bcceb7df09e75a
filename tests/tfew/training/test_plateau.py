"""Training that ends when its loss has stopped falling: the rule, and what the Trainer makes of it.

The runs are of a small random model. At a learning rate of next to nothing its loss does not fall,
and at a high one it has learned its few examples by heart.
"""

import random
from dataclasses import replace

import pytest
import torch
from support.tfew import VOCABULARY, tiny_llama, word_tokenizer
from transformers import TrainerCallback

from ia3 import IA3Config, IA3Model
from ia3.base.loading import BaseModel
from ia3.errors import IA3Error, InvalidTypeError
from ia3.tfew import TFewConfig, TrainingExample, train
from ia3.tfew.prompts.encoding import EncodedExample
from ia3.tfew.training.plateau import (
    DECAY_STEPS,
    LEARNED,
    LEARNED_STEPS,
    MEAN_STEPS,
    PATIENCE,
    Plateau,
)

FLAT = MEAN_STEPS + PATIENCE
RECIPE = TFewConfig(steps=90, batch_size=2, seed=3, learning_rate=1e-6, stop_at_plateau=True)


def last_step(losses, choice_losses=None, bound=1000):
    plateau = Plateau(bound)
    plateau.follow(losses, losses if choice_losses is None else choice_losses)
    return plateau.last_step


# -- the rule --------------------------------------------------------------------------------------


def test_a_loss_that_falls_goes_on_to_the_bound():
    assert last_step([5 * 0.99**step + 0.5 for step in range(100)], bound=100) == 100


def test_a_noisy_loss_that_falls_goes_on():
    noise = random.Random(0)
    losses = [4 * 0.98**step * noise.lognormvariate(0, 0.4) + 0.3 for step in range(100)]
    assert last_step(losses, bound=100) == 100


def test_a_loss_that_no_longer_falls_ends_the_training():
    assert last_step([1.0] * FLAT) == FLAT + DECAY_STEPS
    assert last_step([1.0] * (FLAT - 1)) == 1000
    falling = [3 - 0.1 * step for step in range(20)]
    assert 20 + PATIENCE < last_step([*falling, *[1.0] * 100]) <= 20 + FLAT + DECAY_STEPS


def test_a_loss_that_climbs_ends_it_too():
    assert last_step([1 + 0.01 * step for step in range(FLAT)]) == FLAT + DECAY_STEPS


def test_choices_that_are_all_learned_end_it_whatever_the_words_cost():
    words = [5 * 0.9**step for step in range(40)]
    learned = [1.0] * 12 + [0.01] * LEARNED_STEPS
    assert last_step(words[: len(learned)], learned) == len(learned) + DECAY_STEPS


def test_it_decides_once_and_the_same_whatever_it_is_told_at_once():
    noise = random.Random(1)
    losses = [noise.uniform(0.5, 1.5) for _ in range(200)]
    at_once, one_by_one = Plateau(1000), Plateau(1000)
    at_once.follow(losses, losses)
    for count in range(201):
        one_by_one.follow(losses[:count], losses[:count])
    assert at_once.last_step == one_by_one.last_step < 200
    more = [*losses, *[9 - 0.04 * step for step in range(200)]]
    at_once.follow(more, more)
    assert at_once.last_step == one_by_one.last_step


def test_the_rates_share_falls_to_0_in_equal_parts():
    plateau = Plateau(1000)
    plateau.follow([1.0] * FLAT, [1.0] * FLAT)
    shares = [plateau.share_of_rate(step) for step in range(FLAT, plateau.last_step + 1)]
    assert shares == pytest.approx([1 - step / DECAY_STEPS for step in range(DECAY_STEPS + 1)])


def test_near_the_bound_the_schedule_ends_as_it_would():
    plateau = Plateau(FLAT + DECAY_STEPS - 1)
    plateau.follow([1.0] * FLAT, [1.0] * FLAT)
    assert plateau.last_step == FLAT + DECAY_STEPS - 1
    assert {plateau.share_of_rate(step) for step in range(FLAT, FLAT + DECAY_STEPS)} == {1.0}


# -- training --------------------------------------------------------------------------------------


def training_set():
    draws = random.Random(0)

    def ids(count):
        return tuple(draws.randrange(3, VOCABULARY) for _ in range(count))

    return [TrainingExample((EncodedExample(ids(5), (ids(2), ids(3))),), i % 2) for i in range(4)]


def trained(recipe=RECIPE, on_step=None, **settings):
    """A new model's vectors after training, and its steps."""
    base = BaseModel(tiny_llama(), word_tokenizer(), "tiny")
    model = IA3Model(base.model, IA3Config(target_modules="all-linear"))
    history = train(base, model, training_set(), recipe, on_step, **settings)
    return {name: v.detach().clone() for name, v in model.vectors("default").items()}, history


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
    assert found[1] == expected[1]


@pytest.fixture(scope="module")
def flat():
    return trained()


class Rates(TrainerCallback):
    """The learning rate of each step."""

    def __init__(self):
        self.rates = []

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])


def test_training_ends_after_the_plateaus_last_step_and_says_so(flat):
    _, history = flat
    end = FLAT + DECAY_STEPS
    assert [step.step for step in history] == list(range(1, end + 1))
    assert [step.steps for step in history] == [90] * FLAT + [end] * DECAY_STEPS


def test_the_rate_goes_from_the_schedules_to_0():
    recipe, seen, plain = replace(RECIPE, warmup_ratio=0), Rates(), Rates()
    trained(recipe, callbacks=[seen])
    trained(replace(recipe, stop_at_plateau=False), callbacks=[plain])
    assert seen.rates[:FLAT] == plain.rates[:FLAT]
    tail = [plain.rates[FLAT + step] * (1 - step / DECAY_STEPS) for step in range(DECAY_STEPS)]
    assert seen.rates[FLAT:] == pytest.approx(tail)


def test_without_the_setting_all_steps_are_taken_and_the_first_are_the_same(flat):
    _, history = trained(replace(RECIPE, stop_at_plateau=False))
    assert len(history) == 90
    assert history[:FLAT] == flat[1][:FLAT]


def test_what_is_learned_by_heart_ends_it():
    recipe = replace(RECIPE, learning_rate=0.03)
    _, history = trained(recipe)
    assert len(history) < FLAT
    decided = history[-DECAY_STEPS - LEARNED_STEPS : -DECAY_STEPS]
    assert sum(step.length_norm for step in decided) / LEARNED_STEPS < LEARNED


# Before the loss has stopped falling, where that is decided, and while the rate goes to 0.
@pytest.mark.parametrize("last", [FLAT - 5, FLAT, FLAT + 3, FLAT + DECAY_STEPS - 1])
def test_stopped_anywhere_and_resumed_ends_with_the_same_bits(tmp_path, flat, last):
    def stop(step):
        if step.step == last + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(on_step=stop, checkpoints=tmp_path, save_steps=last)
    after = []
    assert_same(trained(checkpoints=tmp_path, save_steps=last, on_step=after.append), flat)
    assert after[0].step == last + 1


def test_a_run_that_has_ended_takes_no_further_step(tmp_path, flat):
    assert_same(trained(checkpoints=tmp_path), flat)
    assert [path.name for path in tmp_path.iterdir()] == [f"checkpoint-{FLAT + DECAY_STEPS}"]
    steps = []
    assert_same(trained(checkpoints=tmp_path, on_step=steps.append), flat)
    assert not steps


def test_parts_of_a_step_change_nothing_of_when_it_ends(flat):
    _, history = trained(gradient_accumulation_steps=2)
    assert len(history) == len(flat[1])


def test_a_run_with_the_setting_is_another_one(tmp_path):
    short = replace(RECIPE, steps=2)
    trained(replace(short, stop_at_plateau=False), checkpoints=tmp_path)
    with pytest.raises(IA3Error, match="had stop_at_plateau=None, this one True"):
        trained(short, checkpoints=tmp_path)


def test_another_schedule_is_refused():
    with pytest.raises(IA3Error, match="lr_scheduler_type 'cosine' has a decay of its own"):
        trained(lr_scheduler_type="cosine")


def test_the_setting_is_true_or_false():
    with pytest.raises(InvalidTypeError, match="stop_at_plateau is 1, expected True or False"):
        TFewConfig(stop_at_plateau=1)
