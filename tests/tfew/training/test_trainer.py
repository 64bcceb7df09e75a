"""The T-Few trainer: breaks, parts of a step, narrow numbers, and where the vectors begin."""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from support.disks import full_disk
from support.kills import calls_of, ended, killed_before, result_of, started
from support.scoring import LLAMA, NOT_SHARING, SHARING, tokens_seen
from support.tfew import (
    VOCABULARY,
    random_base,
    random_model,
    tiny_llama,
    tiny_t5,
    word_tokenizer,
)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, TrainerCallback

from ia3 import FewShotClassifier, IA3Config, IA3Model
from ia3.base.loading import BaseModel
from ia3.errors import BrokenFileError, IA3Error, StateError
from ia3.tfew import (
    TFewConfig,
    TFewTrainer,
    TrainingExample,
    train,
    training_arguments as make_arguments,
)
from ia3.tfew.prompts.encoding import EncodedExample
from ia3.tfew.scoring.choices import choice_scores, token_scores
from ia3.tfew.training import trainer
from ia3.tfew.training.losses import token_loss
from ia3.tfew.training.trainer import DivergedError

# Its steps depend on the random state.
DROPOUT = SHARING["gpt2"]
RECIPE = TFewConfig(steps=10, batch_size=2, seed=3)
SHORT = TFewConfig(steps=2, batch_size=2)


def encoded(generator, prompt, choices):
    """Random ids of these lengths."""

    def ids(count):
        return tuple(generator.randrange(3, VOCABULARY) for _ in range(count))

    return EncodedExample(ids(prompt), tuple(ids(count) for count in choices))


def training_set(count=5):
    """Of two templates each, and with unlike numbers of choices and tokens."""
    generator = random.Random(0)
    examples = []
    for i in range(count):
        lengths = [generator.randint(1, 4) for _ in range(2 + i % 3)]
        templates = tuple(encoded(generator, generator.randint(3, 9), lengths) for _ in range(2))
        examples.append(TrainingExample(templates, i % 2))
    return examples


def base_with_dropout():
    return random_base(DROPOUT)


def adapted(base):
    return IA3Model(base.model, IA3Config(target_modules="all-linear"))


def values(model):
    return {name: vector.detach().clone() for name, vector in model.vectors("default").items()}


def trained(recipe=RECIPE, make_base=base_with_dropout, on_step=None, **settings):
    """A new model's vectors after training, and its steps."""
    base = make_base()
    model = adapted(base)
    history = train(base, model, training_set(), recipe, on_step, **settings)
    return values(model), history


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
    assert found[1] == expected[1]


# -- breaks ----------------------------------------------------------------------------------------


class Dies(trainer.TFewTrainer):
    """In the middle of a checkpoint: the adapter is written, the rest is not."""

    def _save_optimizer_and_scheduler(self, output_dir):
        if self.state.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_optimizer_and_scheduler(output_dir)


def test_killed_while_writing_a_checkpoint_and_resumed_ends_with_the_same_bits(tmp_path):
    def dies():
        trainer.TFewTrainer = Dies
        trained(checkpoints=tmp_path, save_steps=3)

    assert ended(started(dies)) == -signal.SIGKILL
    names = [path.name for path in tmp_path.iterdir()]
    assert [name for name in names if name.startswith("checkpoint")] == ["checkpoint-3"]
    assert len(names) == 2  # and what was begun
    after = []
    assert_same(trained(checkpoints=tmp_path, save_steps=3, on_step=after.append), trained())
    assert [step.step for step in after] == list(range(4, 11))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]


@pytest.mark.slow
def test_killed_between_two_calls_that_change_files_and_resumed(tmp_path):
    """Here at some places, one after the other; among them where old checkpoints are removed."""
    recipe = replace(RECIPE, steps=3)
    saving = {"save_steps": 1, "save_total_limit": 1}
    work = partial(trained, recipe, checkpoints=tmp_path, **saving)
    calls = calls_of(work)
    shutil.rmtree(tmp_path)
    kills = sum(killed_before(call, work) for call in range(calls // 5, calls // 2, calls // 11))
    assert kills > 1
    assert_same(result_of(work), trained(recipe))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_killed_before_the_older_checkpoint_is_removed(tmp_path):
    trained(SHORT, checkpoints=tmp_path)
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-1")
    trained(SHORT, checkpoints=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_one_run_at_a_time_has_a_folder(tmp_path):
    refused = []

    def another(step):
        with pytest.raises(StateError, match="another process trains with these checkpoints"):
            trained(SHORT, checkpoints=tmp_path)
        refused.append(step.step)

    dead = tmp_path / ".checkpoint.ia3-0123456789ab"
    (dead / "checkpoint-1").mkdir(parents=True)
    trained(SHORT, checkpoints=tmp_path, save_steps=1, on_step=another)
    assert refused == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


class Saves(TrainerCallback):
    """Has a checkpoint written after the first step, and puts files of its own into it."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step == 1

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (folder / "notes.txt").write_text("of a callback")
        kwargs["model"].save_pretrained(folder)


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_a_callback_may_save_and_write_into_a_checkpoint(tmp_path, strategy):
    def work():
        settings = {"save_strategy": strategy, "callbacks": [Saves()]}
        return trained(SHORT, checkpoints=tmp_path, **settings)

    first = work()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert_same(work(), first)


@pytest.mark.parametrize("limit", [1000, 9000])  # of the adapter's file, of torch's
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, limit):
    trained(SHORT, checkpoints=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    longer = partial(trained, SHORT, checkpoints=tmp_path, save_steps=1)
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "kept")
    shutil.rmtree(tmp_path / "checkpoint-2")
    with full_disk(limit), pytest.raises(OSError) as raised:
        longer()
    assert raised.value.filename == str(tmp_path / "checkpoint-1")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    (tmp_path / "kept").rename(tmp_path / "checkpoint-2")
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    trained(SHORT, checkpoints=folder)
    return folder / "checkpoint-2"


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


@pytest.mark.parametrize("change", [half, flipped, lambda content: b"", None])
def test_a_damaged_checkpoint_is_refused_by_its_files_name(checkpoint, tmp_path, change):
    for path in checkpoint.iterdir():
        if path.name in ("README.md", "ia3_run.json"):
            continue
        shutil.copytree(checkpoint, tmp_path / "checkpoint-2")
        damaged = tmp_path / "checkpoint-2" / path.name
        if change is None:
            damaged.unlink()
        else:
            damaged.write_bytes(change(path.read_bytes()))
        with pytest.raises(BrokenFileError, match=rf"{path.name} is not as it was written"):
            trained(SHORT, checkpoints=tmp_path)
        shutil.rmtree(tmp_path / "checkpoint-2")


RUN_FILES: dict[str, Callable[[dict], object]] = {
    "cut": lambda run: json.dumps(run)[:-20],
    "empty": lambda run: "",
    "list": lambda run: "[]",
    "deep": lambda run: "[" * 5000,
    "long number": lambda run: json.dumps(run).replace('"steps": 2', '"steps": 2' + "0" * 5000),
    "no run": lambda run: {**run, "run": 3},
    "no hashes": lambda run: {**run, "files": []},
    "other hash": lambda run: {**run, "files": {"optimizer.pt": {}}},
    "no history": lambda run: {"run": run["run"]},
    "history": lambda run: {**run, "history": {"step": 1}},
    "step": lambda run: {**run, "history": [3]},
    "lacking": lambda run: {**run, "history": [{"step": 1}]},
    "text": lambda run: {**run, "history": [{**run["history"][0], "loss": "0.5"}]},
    "boolean": lambda run: {**run, "history": [{**run["history"][0], "step": True}]},
    "fraction": lambda run: {**run, "history": [{**run["history"][0], "step": 1.5}]},
}


@pytest.mark.parametrize("change", RUN_FILES.values(), ids=RUN_FILES)
def test_a_broken_run_file_is_refused(checkpoint, tmp_path, change):
    shutil.copytree(checkpoint, tmp_path / "checkpoint-2")
    path = tmp_path / "checkpoint-2" / "ia3_run.json"
    broken = change(json.loads(path.read_text()))
    path.write_text(broken if isinstance(broken, str) else json.dumps(broken))
    with pytest.raises(BrokenFileError, match="to go on from the one before it"):
        trained(SHORT, checkpoints=tmp_path)


def test_a_checkpoint_of_an_earlier_version_has_no_hashes(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "checkpoint-2")
    path = tmp_path / "checkpoint-2" / "ia3_run.json"
    run = json.loads(path.read_text())
    assert run.pop("files")
    path.write_text(json.dumps(run))
    assert_same(trained(SHORT, checkpoints=tmp_path), trained(SHORT))


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
def test_stopped_anywhere_and_resumed(tmp_path, last, settings):
    def stop(step):
        if step.step == last + 1:
            raise KeyboardInterrupt

    recipe = TFewConfig(steps=8, batch_size=2, seed=3)
    with pytest.raises(KeyboardInterrupt):
        trained(recipe, on_step=stop, checkpoints=tmp_path, save_steps=last, **settings)
    found = trained(recipe, checkpoints=tmp_path, save_steps=last, **settings)
    assert_same(found, trained(recipe, **settings))


def test_a_checkpoint_holds_the_adapter_and_no_base_weights(tmp_path):
    vectors, _ = trained(SHORT, checkpoints=tmp_path)
    (checkpoint,) = tmp_path.iterdir()
    files = {path.name for path in checkpoint.iterdir()}
    assert files >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not files & {"model.safetensors", "pytorch_model.bin", "config.json"}
    again = IA3Model.from_pretrained(random_model(DROPOUT), checkpoint)
    torch.testing.assert_close(values(again), vectors, rtol=0, atol=0)


def test_a_run_at_its_end_takes_no_further_step(tmp_path):
    """Also one that ran out of memory, and goes on in smaller parts."""
    first = trained(SHORT, checkpoints=tmp_path)
    steps = []
    smaller = replace(SHORT, max_tokens=10)
    assert_same(trained(smaller, checkpoints=tmp_path, on_step=steps.append), first)
    assert not steps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": replace(SHORT, steps=3)}, "had steps=2, this one 3"),
        ({"base": random_base(DROPOUT, seed=1)}, "had other base model"),
        ({"examples": training_set(4)}, "had other examples"),
        ({"first": 1.5}, "had other first vectors"),
    ],
)
def test_another_runs_checkpoint_is_refused(tmp_path, change, message):
    trained(SHORT, checkpoints=tmp_path)
    base = change.get("base", base_with_dropout())
    model = adapted(base)
    with torch.no_grad():
        next(iter(model.vectors("default").values())).mul_(change.get("first", 1))
    examples, recipe = change.get("examples", training_set()), change.get("recipe", SHORT)
    with pytest.raises(IA3Error, match=f"checkpoint-2 is another run's: it {message}"):
        train(base, model, examples, recipe, checkpoints=tmp_path)
    assert (tmp_path / "checkpoint-2").is_dir()


def test_anything_elses_checkpoint_is_refused(tmp_path):
    (tmp_path / "checkpoint-500").mkdir()
    with pytest.raises(IA3Error, match="checkpoint-500 is no checkpoint of a T-Few run"):
        trained(checkpoints=tmp_path)


def test_vectors_that_diverged_leave_no_checkpoint(tmp_path):
    """They are infinite after the last step, whose loss was finite."""
    recipe = replace(SHORT, steps=1, warmup_ratio=0, learning_rate=1e45)
    with pytest.raises(DivergedError, match=r"step 1: the vector of .* is not finite"):
        trained(recipe, checkpoints=tmp_path)
    assert not [*tmp_path.glob("checkpoint-*")]


def test_the_random_state_is_neither_used_nor_changed(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = trained(SHORT, checkpoints=tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert_same(trained(SHORT, checkpoints=tmp_path / "b"), first)


# -- a step in parts -------------------------------------------------------------------------------


class Gradients(TrainerCallback):
    """The first step's."""

    def __init__(self):
        self.found = {}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        vectors = kwargs["model"].vectors("default")
        self.found = {name: v.grad.clone() for name, v in vectors.items() if v.grad is not None}
        control.should_training_stop = True


BASES = {
    "llama": lambda: BaseModel(tiny_llama(), word_tokenizer(), "llama"),
    "bloom": lambda: random_base(NOT_SHARING["bloom"]),
    "t5": lambda: BaseModel(tiny_t5(), word_tokenizer(), "t5"),
}


def first_gradients(kind, max_tokens, **settings):
    base, gradients = BASES[kind](), Gradients()
    config = TFewConfig(steps=3, batch_size=4, max_grad_norm=1e9, max_tokens=max_tokens)
    history = train(base, adapted(base), training_set(), config, callbacks=[gradients], **settings)
    return history, gradients.found


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize(("max_tokens", "parts"), [(4096, 4), (30, 1), (13, 2), (1, 1)])
def test_the_gradients_of_parts_are_those_of_the_whole(kind, max_tokens, parts):
    whole, expected = first_gradients(kind, 4096)
    history, found = first_gradients(kind, max_tokens, gradient_accumulation_steps=parts)
    assert len(history) == len(whole) == 1
    for term in ("loss", "lm", "length_norm", "unlikelihood"):
        assert getattr(history[0], term) == pytest.approx(getattr(whole[0], term), rel=1e-5)
    assert found.keys() == expected.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < 1e-5 * largest, name


def test_accumulation_draws_the_same_examples_and_templates():
    """Over epochs whose last batch is a smaller one."""
    whole = trained(RECIPE, BASES["llama"])[1]
    parts = trained(RECIPE, BASES["llama"], gradient_accumulation_steps=2)[1]
    assert [s.loss for s in parts] == pytest.approx([s.loss for s in whole], rel=1e-4)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("max_tokens", [25, 90])
def test_no_more_tokens_than_given_are_computed_at_once(kind, max_tokens):
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

    def compute():
        scores = token_scores(base, examples, max_tokens=max_tokens)
        torch.testing.assert_close(scores.log_probs, whole.log_probs, rtol=1e-5, atol=1e-5)
        assert torch.equal(scores.mask, whole.mask)
        gradients = torch.autograd.grad(token_loss(scores, labels).total, vectors)
        torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-5)
        found = choice_scores(base, examples[1:], max_tokens=max_tokens)
        torch.testing.assert_close(found, whole.mean_log_probs()[1:, :5], rtol=1e-5, atol=1e-5)

    assert max(tokens_seen(base.model, compute)) <= max_tokens


# -- the Trainer's settings ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BASES)
def test_autocast_to_bfloat16_is_near_and_keeps_the_vectors_wide(kind):
    recipe = TFewConfig(steps=4, batch_size=4)
    plain = [step.loss for step in trained(recipe, BASES[kind])[1]]
    vectors, steps = trained(recipe, BASES[kind], bf16=True)
    narrow = [step.loss for step in steps]
    assert {vector.dtype for vector in vectors.values()} == {torch.float32}
    assert narrow == pytest.approx(plain, rel=0.02)
    assert narrow != plain  # it did compute in bfloat16


def test_logging(tmp_path):
    base = BASES["llama"]()
    config = TFewConfig(steps=5, batch_size=2)
    arguments = make_arguments(base, config, tmp_path, logging_steps=2)
    trainer = TFewTrainer(base, adapted(base), training_set(), config, arguments)
    trainer.train()
    logged = {e["step"]: e["loss"] for e in trainer.state.log_history if "loss" in e}
    losses = [step.loss for step in trainer.history]
    means = {2: sum(losses[:2]) / 2, 4: sum(losses[2:4]) / 2}
    assert logged == pytest.approx(means, rel=1e-4)


@pytest.mark.quantized
def test_a_quantized_base_trains(tmp_path):
    pytest.importorskip("bitsandbytes")
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    settings = LlamaConfig(**{**LLAMA, **shape})
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
        ({"warmup_ratio": 1.0}, "warmup_ratio is 1.0, expected 0 to less than 1"),
        ({"lm": -1.0}, "lm is -1.0, expected 0"),
        ({"lm": 0.0, "length_norm": 0.0, "unlikelihood": 0.0}, "all 0: there is no loss"),
    ],
)
def test_unusable_recipes(settings, message):
    with pytest.raises(IA3Error, match=message):
        TFewConfig(**settings)


def test_unusable_arguments(tmp_path):
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


def classifier(model=None, **settings):
    given = {"steps": 6, "learning_rate": 3e-2, **settings}
    return FewShotClassifier(
        tiny_llama() if model is None else model, "{{ text }} is a", tokenizer=WORDS, **given
    )


@pytest.mark.parametrize("form", ["folder", "adapter"])
def test_fit_begins_with_the_given_vectors(tmp_path, form):
    first = classifier().fit(TEXTS, LABELS)
    first.save(tmp_path)
    init = tmp_path if form == "folder" else first.adapter_
    untrained = classifier(init_from=init, steps=0).fit(TEXTS, LABELS)
    np.testing.assert_array_equal(untrained.predict_proba(TEXTS), first.predict_proba(TEXTS))
    kept = {name: vector.clone() for name, vector in first.adapter_.vectors.items()}
    further = classifier(init_from=init, steps=4).fit(TEXTS, LABELS)
    assert not any(torch.equal(v, kept[name]) for name, v in further.adapter_.vectors.items())
    torch.testing.assert_close(first.adapter_.vectors, kept, rtol=0, atol=0)


def test_the_sites_are_those_of_the_adapter_to_begin_with(tmp_path):
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
