"""The T-Few trainer: breaks, parts of a step, narrow numbers, and where the vectors begin."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.scoring import NOT_SHARING, SHARING
from support.tfew import (
    VOCABULARY,
    child_environment,
    random_base,
    random_model,
    state_bits,
    tiny_llama,
    tiny_t5,
    word_tokenizer,
)
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    TrainerCallback,
)

from ia3 import FewShotClassifier, IA3Config, IA3Model
from ia3.base.loading import BaseModel
from ia3.errors import IA3Error
from ia3.tfew import TFewConfig, TFewTrainer, TrainingExample, TrainingStep, train
from ia3.tfew import training_arguments as make_arguments
from ia3.tfew.prompts.encoding import EncodedExample
from ia3.tfew.scoring.choices import choice_scores, token_scores
from ia3.tfew.training.losses import token_loss

# Its steps depend on the random state.
DROPOUT = SHARING["gpt2"]
RECIPE = TFewConfig(steps=10, batch_size=2, seed=3)


def encoded(generator: random.Random, prompt: int, choices: list[int]) -> EncodedExample:
    """Random ids of these lengths."""

    def ids(count: int) -> tuple[int, ...]:
        return tuple(generator.randrange(3, VOCABULARY) for _ in range(count))

    return EncodedExample(ids(prompt), tuple(ids(count) for count in choices))


def training_set(count: int = 5) -> list[TrainingExample]:
    """Of two templates each, and with unlike numbers of choices and tokens."""
    generator = random.Random(0)
    examples = []
    for i in range(count):
        lengths = [generator.randint(1, 4) for _ in range(2 + i % 3)]
        templates = tuple(encoded(generator, generator.randint(3, 9), lengths) for _ in range(2))
        examples.append(TrainingExample(templates, i % 2))
    return examples


def base_with_dropout() -> BaseModel:
    return random_base(DROPOUT)


def adapted(base: BaseModel) -> IA3Model:
    return IA3Model(base.model, IA3Config(target_modules="all-linear"))


def values(model: IA3Model) -> dict[str, Tensor]:
    return {name: vector.detach().clone() for name, vector in model.vectors("default").items()}


def trained(
    recipe: TFewConfig = RECIPE,
    make_base: Callable[[], BaseModel] = base_with_dropout,
    on_step: Callable[[TrainingStep], None] | None = None,
    **settings: Any,
) -> tuple[dict[str, Tensor], list[TrainingStep]]:
    """A new model's vectors after training, and its steps."""
    base = make_base()
    model = adapted(base)
    history = train(base, model, training_set(), recipe, on_step, **settings)
    return values(model), history


def assert_same(
    found: tuple[dict[str, Tensor], list[TrainingStep]],
    expected: tuple[dict[str, Tensor], list[TrainingStep]],
) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
    assert found[1] == expected[1]


@pytest.fixture(scope="module")
def unbroken() -> tuple[dict[str, Tensor], list[TrainingStep]]:
    """The run without a break."""
    return trained()


# -- breaks ----------------------------------------------------------------------------------------

CHILD = """
import os, signal, sys, time
import torch
from test_trainer import trained
from ia3.tfew import TFewTrainer

folder, dies_at = sys.argv[1:]

class Dies(TFewTrainer):
    # In the middle of a checkpoint: the adapter is written, the rest is not.
    def _save_optimizer_and_scheduler(self, output_dir):
        if dies_at == "saving" and self.state.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_optimizer_and_scheduler(output_dir)

import ia3.tfew.training.trainer
ia3.tfew.training.trainer.TFewTrainer = Dies

def on_step(step):
    print(step.step, flush=True)
    time.sleep(0.1)

trained(on_step=on_step, checkpoints=folder, save_steps=3)
"""


@contextmanager
def child(folder: Path, dies_at: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that trains the same, and writes each step's number."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), dies_at],
        env=child_environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_killed_and_resumed_ends_with_the_same_bits(
    tmp_path: Path, unbroken: tuple[dict[str, Tensor], list[TrainingStep]]
) -> None:
    last = random.randint(4, 9)
    with child(tmp_path, "") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == last:
                process.kill()
    assert process.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob("checkpoint-*"))) == 1
    after: list[int] = []
    found = trained(
        checkpoints=tmp_path, save_steps=3, on_step=lambda step: after.append(step.step)
    )
    assert_same(found, unbroken)
    # It went on from a checkpoint, and did not begin anew.
    assert after[0] in (4, 7, 10)
    assert after == list(range(after[0], 11))


def test_killed_while_writing_a_checkpoint(
    tmp_path: Path, unbroken: tuple[dict[str, Tensor], list[TrainingStep]]
) -> None:
    with child(tmp_path, "saving") as process:
        process.wait()
    assert process.returncode == -signal.SIGKILL
    names = [path.name for path in tmp_path.iterdir()]
    assert [name for name in names if name.startswith("checkpoint")] == ["checkpoint-3"]
    assert len(names) == 2  # and what was begun
    assert_same(trained(checkpoints=tmp_path, save_steps=3), unbroken)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]


class StoppedError(Exception):
    pass


@pytest.mark.parametrize(
    ("last", "settings"),
    [
        (4, {}),  # in an epoch
        (5, {}),  # before its last step
        (6, {}),  # at its end
        (5, {"gradient_accumulation_steps": 2}),
        (4, {"bf16": True}),
    ],
)
def test_stopped_anywhere_and_resumed(tmp_path: Path, last: int, settings: dict[str, Any]) -> None:
    def stop(step: TrainingStep) -> None:
        if step.step == last + 1:
            raise StoppedError

    recipe = TFewConfig(steps=8, batch_size=2, seed=3)
    with pytest.raises(StoppedError):
        trained(recipe, on_step=stop, checkpoints=tmp_path, save_steps=last, **settings)
    found = trained(recipe, checkpoints=tmp_path, save_steps=last, **settings)
    assert_same(found, trained(recipe, **settings))


def test_a_checkpoint_holds_the_adapter_and_no_base_weights(tmp_path: Path) -> None:
    vectors, _ = trained(TFewConfig(steps=2, batch_size=2), checkpoints=tmp_path)
    (checkpoint,) = tmp_path.iterdir()
    files = {path.name for path in checkpoint.iterdir()}
    assert files >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not files & {"model.safetensors", "pytorch_model.bin", "config.json"}
    again = IA3Model.from_pretrained(random_model(DROPOUT), checkpoint)
    torch.testing.assert_close(values(again), vectors, rtol=0, atol=0)


def test_a_run_at_its_end_takes_no_further_step(tmp_path: Path) -> None:
    recipe = TFewConfig(steps=4, batch_size=2)
    first = trained(recipe, checkpoints=tmp_path)
    steps: list[TrainingStep] = []
    assert_same(trained(recipe, checkpoints=tmp_path, on_step=steps.append), first)
    assert not steps


def test_a_run_may_go_on_in_smaller_parts(tmp_path: Path) -> None:
    """One that ran out of memory."""
    recipe = TFewConfig(steps=2, batch_size=2)
    first = trained(recipe, checkpoints=tmp_path)
    smaller = TFewConfig(steps=2, batch_size=2, max_tokens=10)
    assert_same(trained(smaller, checkpoints=tmp_path), first)


@pytest.mark.parametrize(
    ("recipe", "seed", "message"),
    [
        (TFewConfig(steps=3, batch_size=2), 0, "had steps=2, this one 3"),
        (
            TFewConfig(steps=2, batch_size=2, learning_rate=1e-2),
            0,
            "had learning_rate=0.003, this one 0.01",
        ),
        (TFewConfig(steps=2, batch_size=2), 1, "had other base model"),
    ],
)
def test_another_runs_checkpoint_is_refused(
    tmp_path: Path, recipe: TFewConfig, seed: int, message: str
) -> None:
    trained(TFewConfig(steps=2, batch_size=2), checkpoints=tmp_path)
    with pytest.raises(IA3Error, match=f"checkpoint-2 is another run's: it {message}"):
        trained(recipe, lambda: random_base(DROPOUT, seed), checkpoints=tmp_path)
    assert (tmp_path / "checkpoint-2").is_dir()


def test_other_examples_and_other_first_vectors_are_another_run(tmp_path: Path) -> None:
    recipe = TFewConfig(steps=2, batch_size=2)
    trained(recipe, checkpoints=tmp_path)
    base = base_with_dropout()
    model = adapted(base)
    with pytest.raises(IA3Error, match="had other examples"):
        train(base, model, training_set(4), recipe, checkpoints=tmp_path)
    with torch.no_grad():
        next(iter(model.vectors("default").values())).mul_(1.5)
    with pytest.raises(IA3Error, match="had other first vectors"):
        train(base, model, training_set(), recipe, checkpoints=tmp_path)


def test_anything_elses_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-500").mkdir()
    with pytest.raises(IA3Error, match="checkpoint-500 is no checkpoint of a T-Few run"):
        trained(checkpoints=tmp_path)


def test_the_random_state_is_neither_used_nor_changed(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = trained(TFewConfig(steps=2, batch_size=2), checkpoints=tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert_same(trained(TFewConfig(steps=2, batch_size=2), checkpoints=tmp_path / "b"), first)


# -- a step in parts -------------------------------------------------------------------------------


class Gradients(TrainerCallback):  # type: ignore[misc]
    """The first step's."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        vectors: dict[str, nn.Parameter] = kwargs["model"].vectors("default")
        self.found = {name: v.grad.clone() for name, v in vectors.items() if v.grad is not None}
        control.should_training_stop = True


BASES: dict[str, Callable[[], BaseModel]] = {
    "llama": lambda: BaseModel(tiny_llama(), word_tokenizer(), "llama"),
    "bloom": lambda: random_base(NOT_SHARING["bloom"]),
    "t5": lambda: BaseModel(tiny_t5(), word_tokenizer(), "t5"),
}


def first_gradients(kind: str, max_tokens: int, **settings: Any) -> tuple[Any, dict[str, Tensor]]:
    base, gradients = BASES[kind](), Gradients()
    config = TFewConfig(steps=3, batch_size=4, max_grad_norm=1e9, max_tokens=max_tokens)
    history = train(base, adapted(base), training_set(), config, callbacks=[gradients], **settings)
    return history, gradients.found


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize(
    ("max_tokens", "parts"),
    [(4096, 4), (30, 1), (13, 2), (1, 1)],
)
def test_the_gradients_of_parts_are_those_of_the_whole(
    kind: str, max_tokens: int, parts: int
) -> None:
    whole, expected = first_gradients(kind, 4096)
    history, found = first_gradients(kind, max_tokens, gradient_accumulation_steps=parts)
    assert len(history) == len(whole) == 1
    for term in ("loss", "lm", "length_norm", "unlikelihood"):
        assert getattr(history[0], term) == pytest.approx(getattr(whole[0], term), rel=1e-5)
    assert found.keys() == expected.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < 1e-5 * largest, name


def test_accumulation_draws_the_same_examples_and_templates() -> None:
    """Over epochs whose last batch is a smaller one."""
    recipe = TFewConfig(steps=6, batch_size=2)
    whole = trained(recipe, BASES["llama"])[1]
    parts = trained(recipe, BASES["llama"], gradient_accumulation_steps=2)[1]
    assert [s.loss for s in parts] == pytest.approx([s.loss for s in whole], rel=1e-4)


@contextmanager
def sizes_seen(base: BaseModel) -> Iterator[list[int]]:
    """How many tokens each call of the embeddings got."""
    sizes: list[int] = []
    handles = [
        module.register_forward_pre_hook(lambda _, args: sizes.append(args[0].numel()))
        for module in base.model.modules()
        if isinstance(module, nn.Embedding) and module.num_embeddings == VOCABULARY
    ]
    try:
        yield sizes
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("max_tokens", [25, 40, 90])
def test_no_more_tokens_than_given_are_computed_at_once(kind: str, max_tokens: int) -> None:
    base = BASES[kind]()
    model = adapted(base)
    generator = random.Random(1)
    # One short prompt with many choices would repeat the longest prompt beside it as often.
    examples = [encoded(generator, 3, [1] * 20)] + [
        encoded(generator, 6, [generator.randint(1, 4) for _ in range(5)]) for _ in range(4)
    ]
    labels = torch.tensor([0, 1, 2, 3, 4])
    whole = token_scores(base, examples)
    vectors = list(model.vectors("default").values())
    expected = torch.autograd.grad(token_loss(whole, labels).total, vectors)
    with sizes_seen(base) as sizes:
        scores = token_scores(base, examples, max_tokens=max_tokens)
        gradients = torch.autograd.grad(token_loss(scores, labels).total, vectors)
    assert max(sizes) <= max_tokens
    torch.testing.assert_close(scores.log_probs, whole.log_probs, rtol=1e-5, atol=1e-5)
    assert torch.equal(scores.mask, whole.mask)
    for gradient, one in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, one, rtol=1e-4, atol=1e-5)
    with sizes_seen(base) as sizes:
        found = choice_scores(base, examples[1:], max_tokens=max_tokens)
    assert max(sizes) <= max_tokens
    torch.testing.assert_close(found, whole.mean_log_probs()[1:, :5], rtol=1e-5, atol=1e-5)


# -- the Trainer's settings ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BASES)
def test_autocast_to_bfloat16_is_near_and_keeps_the_vectors_wide(kind: str) -> None:
    recipe = TFewConfig(steps=4, batch_size=4)
    wide, plain = trained(recipe, BASES[kind])
    narrow, steps = trained(recipe, BASES[kind], bf16=True)
    assert {vector.dtype for vector in narrow.values()} == {torch.float32}
    assert [s.loss for s in steps] == pytest.approx([s.loss for s in plain], rel=0.02)
    # It did compute in bfloat16.
    assert [s.loss for s in steps] != [s.loss for s in plain]
    assert wide.keys() == narrow.keys()


def test_logs_hold_the_terms(tmp_path: Path) -> None:
    base = BASES["llama"]()
    config = TFewConfig(steps=5, batch_size=2)
    arguments = make_arguments(base, config, tmp_path, logging_steps=2)
    trainer = TFewTrainer(base, adapted(base), training_set(), config, arguments)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    for entry, two in zip(logged, (trainer.history[:2], trainer.history[2:4]), strict=True):
        for term in ("loss", "lm", "length_norm", "unlikelihood"):
            mean = sum(getattr(step, term) for step in two) / 2
            assert entry[term] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("left_out", ["lm", "length_norm", "unlikelihood"])
def test_a_term_of_weight_zero_does_not_train(left_out: str) -> None:
    steps = trained(TFewConfig(steps=2, batch_size=2, **{left_out: 0.0}), BASES["llama"])[1]
    for step in steps:
        kept = {"lm": step.lm, "length_norm": step.length_norm, "unlikelihood": step.unlikelihood}
        assert kept.pop(left_out) != 0
        assert step.loss == pytest.approx(sum(kept.values()), rel=1e-5)


@pytest.mark.quantized
def test_a_quantized_base_trains(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    settings = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        initializer_range=0.2,
    )
    random_model(settings).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    base = BaseModel(model, word_tokenizer(), "quantized")
    ia3_model = adapted(base)
    recipe = TFewConfig(steps=8, batch_size=5, learning_rate=3e-2)
    one_template = [TrainingExample(e.encoded[:1], e.label) for e in training_set()]
    steps = train(base, ia3_model, one_template, recipe, checkpoints=tmp_path / "run")
    assert steps[-1].loss < steps[0].loss
    assert any((vector != 1).any() for vector in values(ia3_model).values())
    assert all(parameter.grad is None for parameter in ia3_model.unload().parameters())
    (checkpoint,) = (tmp_path / "run").iterdir()
    assert not (checkpoint / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"max_tokens": 0}, "max_tokens is 0, expected at least 1"),
        ({"warmup_ratio": 1.0}, "warmup_ratio is 1.0, expected 0 to less than 1"),
        ({"lm": -1.0}, "lm is -1.0, expected 0"),
        ({"lm": 0.0, "length_norm": 0.0, "unlikelihood": 0.0}, "all 0: there is no loss"),
    ],
)
def test_unusable_recipes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(IA3Error, match=message):
        TFewConfig(**settings)


def test_unusable_arguments(tmp_path: Path) -> None:
    with pytest.raises(IA3Error, match="is 3, expected a divisor of the batch_size 2"):
        trained(gradient_accumulation_steps=3)
    base = base_with_dropout()
    with pytest.raises(IA3Error, match="no examples to train on"):
        train(base, adapted(base), [], RECIPE)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        trained(checkpoints=tmp_path / "file")


# -- where the vectors begin -----------------------------------------------------------------------

TEXTS = ["the cat sat", "a dog ran", "the cat slept", "a dog barked"]
LABELS = ["cat", "dog", "cat", "dog"]
WORDS = word_tokenizer(sorted({word for text in TEXTS for word in text.split()}))


def classifier(model: nn.Module | None = None, **settings: Any) -> FewShotClassifier:
    given = {"steps": 6, "learning_rate": 3e-2, **settings}
    return FewShotClassifier(
        tiny_llama() if model is None else model, "{{ text }} is a", tokenizer=WORDS, **given
    )


@pytest.mark.parametrize("form", ["folder", "adapter"])
def test_fit_begins_with_the_given_vectors(tmp_path: Path, form: str) -> None:
    first = classifier().fit(TEXTS, LABELS)
    first.save(tmp_path)
    init: Any = tmp_path if form == "folder" else first.adapter_
    untrained = classifier(init_from=init, steps=0).fit(TEXTS, LABELS)
    np.testing.assert_array_equal(untrained.predict_proba(TEXTS), first.predict_proba(TEXTS))
    further = classifier(init_from=init, steps=4).fit(TEXTS, LABELS)
    assert further.history_[0].loss < first.history_[0].loss
    kept = {name: vector.clone() for name, vector in first.adapter_.vectors.items()}
    for name, vector in further.adapter_.vectors.items():
        assert not torch.equal(vector, kept[name])
    again = classifier(init_from=init, steps=0).fit(TEXTS, LABELS)
    torch.testing.assert_close(again.adapter_.vectors, kept, rtol=0, atol=0)


def test_the_sites_are_those_of_the_adapter_to_begin_with(tmp_path: Path) -> None:
    model = tiny_llama()
    paper = IA3Model(model, IA3Config(task_type="CAUSAL_LM", paper_sites=True))
    paper.save_pretrained(tmp_path)
    sites = set(paper.vectors("default"))
    paper.unload()
    fitted = classifier(model, init_from=tmp_path).fit(TEXTS, LABELS)
    assert set(fitted.adapter_.vectors) == sites
    fitted.save(tmp_path / "fitted")
    again = FewShotClassifier.load(tmp_path / "fitted", model=model, tokenizer=WORDS)
    np.testing.assert_array_equal(again.predict_proba(TEXTS), fitted.predict_proba(TEXTS))


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    classifier(steps=0).fit(TEXTS, LABELS).save(tmp_path)
    other = tiny_t5()
    before = state_bits(other)
    with pytest.raises(IA3Error, match="init_from: "):
        classifier(other, init_from=tmp_path).fit(TEXTS, LABELS)
    assert state_bits(other).keys() == before.keys()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        classifier(init_from=tmp_path / "nowhere").fit(TEXTS, LABELS)
