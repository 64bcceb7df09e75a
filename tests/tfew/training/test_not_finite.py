"""Training where a number is not finite any more: found at its step, named, and taken back."""

import random

import pytest
import torch
from support.scoring import SHARING
from support.tfew import VOCABULARY, random_base, tiny_llama, tiny_t5, word_tokenizer
from transformers import TrainerCallback

from ia3 import FewShotClassifier, IA3Config, IA3Model
from ia3.tfew import TFewConfig, TrainingExample, train
from ia3.tfew.prompts.encoding import EncodedExample
from ia3.tfew.training.trainer import DivergedError, StopTraining

LLAMA = SHARING["llama"]
RECIPE = TFewConfig(steps=4, batch_size=2, seed=3)
FIRST = "model.layers.0.self_attn.q_proj"


def adapted(base):
    return IA3Model(base.model, IA3Config(target_modules="all-linear"))


def values(model):
    return {name: vector.detach().clone() for name, vector in model.vectors("default").items()}


def training_set():
    draws = random.Random(0)

    def ids(count):
        return tuple(draws.randrange(3, VOCABULARY) for _ in range(count))

    return [TrainingExample((EncodedExample(ids(5), (ids(2), ids(3))),), i % 2) for i in range(5)]


def steps_until(last, **settings):
    """The vectors after `last` steps of a run of four."""
    base = random_base(LLAMA)
    model = adapted(base)

    def stop(step):
        if step.step == last:
            raise StopTraining

    train(base, model, training_set(), RECIPE, stop, **settings)
    return values(model)


class NoGradientFrom:
    """From a step on a layer's gradient is 0 · ∞, while what it computes stays as it was."""

    def __init__(self, layer, first):
        self.step, self.first = 0, first
        layer.register_forward_hook(self.hook)

    def hook(self, module, arguments, output):
        return output + (output * 0).sqrt() if self.step + 1 >= self.first else output

    def on_step(self, step):
        self.step = step.step


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}], ids=str)
@pytest.mark.parametrize("first", [1, 3])
def test_a_gradient_that_is_not_finite_is_named_before_the_optimizer_uses_it(first, settings):
    base = random_base(LLAMA)
    model = adapted(base)
    begin = values(model)
    broken = NoGradientFrom(base.model.model.layers[0].self_attn.o_proj, first)
    steps = []

    def on_step(step):
        broken.on_step(step)
        steps.append(step)

    with pytest.raises(
        DivergedError, match=rf"step {first}: the gradient of the vector of '{FIRST}' is not finite"
    ):
        train(base, model, training_set(), RECIPE, on_step, **settings)
    # As after the last good step, and nothing is left for the next backward pass.
    expected = begin if first == 1 else steps_until(first - 1, **settings)
    torch.testing.assert_close(values(model), expected, rtol=0, atol=0)
    assert [step.step for step in steps] == list(range(1, first))
    assert all(vector.grad is None for vector in model.vectors("default").values())


def test_gradients_too_large_for_their_norm_are_named():
    """Clipping by an infinite norm would make all of them 0."""
    base = random_base(LLAMA)
    model = adapted(base)
    begin = values(model)
    for vector in model.vectors("default").values():
        vector.register_hook(lambda gradient: gradient * 0 + 1e30)
    with pytest.raises(DivergedError, match="step 1: the gradients' norm is inf"):
        train(base, model, training_set(), RECIPE)
    torch.testing.assert_close(values(model), begin, rtol=0, atol=0)


@pytest.mark.parametrize("first", [1, 3])
def test_an_update_that_is_not_finite_is_taken_back(first):
    base = random_base(LLAMA)
    model = adapted(base)
    begin = values(model)

    class FarTooHigh(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == first - 1:
                kwargs["optimizer"].param_groups[0]["lr"] = 1e300

    steps = []
    with pytest.raises(
        DivergedError, match=rf"step {first}: the vector of '.*' is not finite any more"
    ):
        train(base, model, training_set(), RECIPE, steps.append, callbacks=[FarTooHigh()])
    expected = begin if first == 1 else steps_until(first - 1)
    torch.testing.assert_close(values(model), expected, rtol=0, atol=0)
    assert len(steps) == first - 1


def test_an_update_of_a_resumed_run_is_taken_back(tmp_path):
    settings = {"checkpoints": tmp_path, "save_steps": 2}
    after_two = steps_until(2, **settings)

    class FarTooHigh(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            kwargs["optimizer"].param_groups[0]["lr"] = 1e300

    base = random_base(LLAMA)
    model = adapted(base)
    with pytest.raises(DivergedError, match=r"step 3: the vector of .* is not finite any more"):
        train(base, model, training_set(), RECIPE, callbacks=[FarTooHigh()], **settings)
    torch.testing.assert_close(values(model), after_two, rtol=0, atol=0)


def test_saved_modules_are_taken_back_with_the_vectors():
    base = random_base(LLAMA)
    config = IA3Config(target_modules="all-linear", modules_to_save=["norm"])
    model = IA3Model(base.model, config)
    begin = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert any("norm" in name for name in begin)
    wild = TFewConfig(steps=1, batch_size=2, warmup_ratio=0, learning_rate=1e45)
    with pytest.raises(DivergedError, match=r"step 1: .* is not finite any more"):
        train(base, model, training_set(), wild)
    end = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    torch.testing.assert_close(end, begin, rtol=0, atol=0)


@pytest.mark.parametrize("make", [tiny_llama, tiny_t5])
def test_what_was_fitted_before_stays(make):
    tokenizer = word_tokenizer(["yes", "no", "cold", "hot"], end=make is tiny_t5)
    model = make(vocabulary=len(tokenizer))
    texts, labels = ["cold", "hot", "cold"], ["yes", "no", "yes"]
    classifier = FewShotClassifier(model, "{{ text }}", steps=2, tokenizer=tokenizer)
    classifier.fit(texts, labels)
    before = classifier.predict_proba(texts)
    classifier.set_params(learning_rate=1e45)
    with pytest.raises(DivergedError):
        classifier.fit(texts, labels)
    assert (classifier.predict_proba(texts) == before).all()
    assert classifier.settings_["learning_rate"] == 1e-2
