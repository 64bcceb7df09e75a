"""Pre-training on a mixture: its rates and draws, what is trained, breaks, and `ia3 pretrain`."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.paths import SHARED
from support.tfew import (
    VOCABULARY,
    child_environment,
    hook_count,
    random_model,
    state_bits,
    word_tokenizer,
)
from torch import Tensor
from transformers import GPT2Config, LlamaConfig

from ia3 import FewShotClassifier, IA3Config, IA3Model
from ia3.adapter.layout import WEIGHTS_NAME
from ia3.adapter.store import Adapter, adapter_files, read_adapter
from ia3.base.loading import BaseModel
from ia3.errors import IA3Error
from ia3.files.rows import read_rows
from ia3.tfew import TFewConfig, TrainingExample, TrainingStep, train
from ia3.tfew.prompts.encoding import EncodedExample, Encoder
from ia3.tfew.prompts.promptsource import PromptTemplate
from ia3.tfew.prompts.tasks import HELD_OUT_TASKS, Task, load_templates
from ia3.tfew.prompts.templates import Template
from ia3.tfew.scoring.choices import token_scores
from ia3.tfew.training.losses import token_loss
from ia3.tfew.training.pretraining import Mixture, mixing_rates, pretrain
from ia3.tfew.training.trainer import DrawnExamples

DATA = SHARED / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not here")

ANIMALS = ["cat", "dog", "bird", "cow", "hen", "fox", "owl", "bee"]
WORDS = [*ANIMALS, "the", "is", "it", "so", "a", "no", "yes", "big", "small", "flies", "walks"]
# Dropout makes the steps depend on the random state, which a checkpoint has to bring back.
GPT2 = GPT2Config(
    vocab_size=VOCABULARY,
    n_embd=16,
    n_layer=1,
    n_head=2,
    n_positions=64,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=1,
)
LLAMA = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    initializer_range=0.2,
)
RECIPE = TFewConfig(steps=60, batch_size=4, learning_rate=3e-2, seed=3)


def template_of(jinja: str, choices: str) -> PromptTemplate:
    return PromptTemplate(jinja, Template(jinja), Template(choices))


SIZE = Task(
    "size",
    [
        template_of("the {{ animal }} is ||| {{ answer_choices[label] }}", "small ||| big"),
        template_of("a {{ animal }} so ||| {{ answer_choices[1 - label] }}", "big ||| small"),
    ],
    [{"animal": animal, "label": i % 2} for i, animal in enumerate(ANIMALS)],
)
MOVES = Task(
    "moves",
    [template_of("it is the {{ animal }} ||| {{ answer_choices[label] }}", "walks ||| flies")],
    [{"animal": animal, "label": int(animal in ("bird", "owl", "bee"))} for animal in ANIMALS[:4]],
)
TASKS = [SIZE, MOVES]


def base_of(config: Any = LLAMA) -> BaseModel:
    return BaseModel(random_model(config), word_tokenizer(WORDS), "tiny")


def example(number: int) -> TrainingExample:
    """One that can be told from the others."""
    return TrainingExample((EncodedExample((number,), ((1,), (2,))),), 0)


# -- rates -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "cap", "rates"),
    [
        ({"a": 1, "b": 3}, 500_000, {"a": 1 / 4, "b": 3 / 4}),
        # 10, 100, 100 of 210.
        ({"a": 10, "b": 1000, "c": 100}, 100, {"a": 1 / 21, "b": 10 / 21, "c": 10 / 21}),
        ({"a": 7, "b": 9000}, 1, {"a": 0.5, "b": 0.5}),
        ({"a": 7}, 500_000, {"a": 1.0}),
    ],
)
def test_rates_by_hand(sizes: dict[str, int], cap: int, rates: dict[str, float]) -> None:
    found = mixing_rates(sizes, cap)
    assert list(found) == list(sizes)
    assert found == pytest.approx(rates)


def test_the_cap_is_t0s_by_default() -> None:
    rates = mixing_rates({"a": 500_000, "b": 5_000_000, "c": 250_000})
    assert rates == pytest.approx({"a": 0.4, "b": 0.4, "c": 0.2})


@given(
    st.dictionaries(st.text(), st.integers(1, 10**7), min_size=1, max_size=20),
    st.integers(1, 10**7),
)
def test_rates_are_proportional_below_the_cap_and_equal_above(
    sizes: dict[str, int], cap: int
) -> None:
    rates = mixing_rates(sizes, cap)
    assert sum(rates.values()) == pytest.approx(1)
    for name, size in sizes.items():
        for other, its_size in sizes.items():
            if size <= cap and its_size <= cap:
                assert rates[name] * its_size == pytest.approx(rates[other] * size)
            elif size >= cap and its_size >= cap:
                assert rates[name] == rates[other]
            elif size < cap:
                assert rates[name] < rates[other]


@pytest.mark.parametrize(
    ("sizes", "cap", "message"),
    [
        ({}, 1, "no tasks to mix"),
        ({"a": 1}, 0, "cap is 0, expected at least 1"),
        ({"a": 1, "b": 0}, 1, "task 'b' has 0 training examples"),
    ],
)
def test_impossible_rates(sizes: dict[str, int], cap: int, message: str) -> None:
    with pytest.raises(IA3Error, match=message):
        mixing_rates(sizes, cap)


# -- draws -----------------------------------------------------------------------------------------

SETS = {
    "a": [example(i) for i in range(10)],
    "b": [example(100 + i) for i in range(60)],
    "c": [example(200)],
}
RATES = mixing_rates({name: len(examples) for name, examples in SETS.items()}, cap=29)


def drawn(mixture: Mixture) -> list[int]:
    return [mixture[i].encoded[0].prompt[0] for i in range(len(mixture))]


def test_draws_follow_the_rates_and_are_uniform_within_a_task() -> None:
    # 10, 29 and 1 of 40.
    count = 20_000
    numbers = drawn(Mixture(SETS, RATES, count, seed=5))
    tasks = Counter("abc"[number // 100] for number in numbers)
    for name, rate in {"a": 10 / 40, "b": 29 / 40, "c": 1 / 40}.items():
        # Five standard deviations of a binomial.
        assert abs(tasks[name] - count * rate) < 5 * (count * rate * (1 - rate)) ** 0.5
    of_b = Counter(number for number in numbers if 100 <= number < 200)
    expected = tasks["b"] / 60
    assert len(of_b) == 60
    assert all(abs(times - expected) < 5 * expected**0.5 for times in of_b.values())


def test_an_item_depends_on_the_seed_and_its_number_alone() -> None:
    mixture = Mixture(SETS, RATES, 1000, seed=5)
    state = random.getstate()
    numbers = drawn(mixture)
    assert random.getstate() == state
    backwards = [mixture[i].encoded[0].prompt[0] for i in reversed(range(1000))]
    assert backwards[::-1] == numbers
    assert drawn(Mixture(SETS, RATES, 1500, seed=5))[:1000] == numbers
    assert drawn(Mixture(SETS, RATES, 1000, seed=6)) != numbers
    with pytest.raises(IndexError):
        mixture[1000]


def test_the_digest_is_of_tasks_rates_examples_and_seed() -> None:
    first = Mixture(SETS, RATES, 1000, seed=5).digest()
    assert Mixture(SETS, RATES, 1000, seed=6).digest() != first
    assert Mixture(SETS, RATES, 10**9, seed=5).digest() == first
    other_rates = mixing_rates({name: len(examples) for name, examples in SETS.items()})
    other_name = {("d" if name == "c" else name): value for name, value in SETS.items()}
    its_rates = {("d" if name == "c" else name): value for name, value in RATES.items()}
    other_data = {**SETS, "c": [example(201)]}
    digests = {
        Mixture(SETS, other_rates, 1000, seed=5).digest(),
        Mixture(other_name, its_rates, 1000, seed=5).digest(),
        Mixture(other_data, RATES, 1000, seed=5).digest(),
    }
    assert len(digests) == 3
    assert first not in digests


class Watched(DrawnExamples):
    """One example, at any place, and which places were asked for."""

    def __init__(self, count: int) -> None:
        self.asked: list[int] = []
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> TrainingExample:
        self.asked.append(index)
        return TrainingExample((EncodedExample((3, 4), ((5,), (6,))),), 0)

    def digest(self) -> str:
        return "watched"


def test_no_item_is_drawn_before_its_step_nor_twice_after_a_break(tmp_path: Path) -> None:
    """As long as the longest training: nothing goes through all of it."""

    class StoppedError(Exception):
        pass

    recipe = TFewConfig(steps=10**7, batch_size=4)
    asked = []
    for last in (5, 8):
        base = base_of()
        model = IA3Model(base.model, IA3Config(target_modules="all-linear"))
        watched = Watched(recipe.steps * recipe.batch_size)

        def stop(step: TrainingStep, last: int = last) -> None:
            if step.step == last:
                raise StoppedError

        with pytest.raises(StoppedError):
            train(
                base,
                model,
                watched,
                recipe,
                stop,
                checkpoints=tmp_path,
                save_steps=2,
                train_sampling_strategy="sequential",
            )
        asked.append(watched.asked)
    # The loader is a batch ahead of the step.
    assert asked == [list(range(6 * 4)), list(range(4 * 4, 9 * 4))]


# -- training --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> tuple[BaseModel, Adapter, list[TrainingStep]]:
    """Vectors for both tasks, and the model they are for."""
    base, steps = base_of(), []
    adapter = pretrain(base, TASKS, RECIPE, on_step=steps.append)
    return base, adapter, steps


def loss_of(base: BaseModel, task: Task, adapter: Adapter | None, template: int = 0) -> float:
    """The recipe's loss on a task's training set, under one template."""
    examples = task.training_examples(Encoder(base, chat=False))
    encoded = [e.encoded[template] for e in examples]
    model = None if adapter is None else IA3Model.from_adapter(base.model, adapter)
    try:
        with torch.no_grad():
            scores = token_scores(base, encoded)
            return token_loss(scores, torch.tensor([e.label for e in examples])).total.item()
    finally:
        if model is not None:
            model.unload()


def test_the_loss_falls_on_every_task(trained: Any) -> None:
    base, adapter, steps = trained
    assert [step.step for step in steps] == list(range(1, 61))
    for task in TASKS:
        for template in range(len(task.templates)):
            before = loss_of(base, task, None, template)
            assert loss_of(base, task, adapter, template) < 0.8 * before


def test_the_vectors_are_float32_at_the_classifiers_sites(trained: Any) -> None:
    base, adapter, _ = trained
    fitted = FewShotClassifier(base.model, "{{ text }} is", tokenizer=base.tokenizer, steps=0)
    fitted.fit(["the cat", "the dog"], ["big", "small"])
    assert adapter.vectors.keys() == fitted.adapter_.vectors.keys()
    for vector in adapter.vectors.values():
        assert (vector.dtype, vector.device.type) == (torch.float32, "cpu")
        assert not vector.requires_grad
        assert (vector != 1).any()


def test_the_base_model_is_as_it_was() -> None:
    base = base_of(GPT2)
    base.model.train()
    base.model.lm_head.eval()
    base.model.transformer.wte.weight.requires_grad_(False)
    modes = [module.training for module in base.model.modules()]
    wants = [parameter.requires_grad for parameter in base.model.parameters()]
    modules = list(base.model.modules())
    bits = state_bits(base.model)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    pretrain(base, TASKS, TFewConfig(steps=2, batch_size=2))
    with pytest.raises(IA3Error, match="diverged"):
        pretrain(base, TASKS, TFewConfig(steps=50, batch_size=2, learning_rate=1e30))
    assert torch.equal(torch.get_rng_state(), state)
    assert list(base.model.modules()) == modules
    assert [module.training for module in base.model.modules()] == modes
    assert [parameter.requires_grad for parameter in base.model.parameters()] == wants
    assert all(parameter.grad is None for parameter in base.model.parameters())
    assert hook_count(base.model) == 0
    torch.testing.assert_close(state_bits(base.model), bits, rtol=0, atol=0)


def test_other_sites(trained: Any) -> None:
    base, _, _ = trained
    sites = IA3Config(task_type="CAUSAL_LM", paper_sites=True)
    adapter = pretrain(base, TASKS, TFewConfig(steps=2, batch_size=2), sites=sites)
    paper = IA3Model(base.model, IA3Config(task_type="CAUSAL_LM", paper_sites=True))
    expected = set(paper.vectors("default"))
    paper.unload()
    assert set(adapter.vectors) == expected


def test_a_task_of_rate_near_zero_is_hardly_learnt() -> None:
    """The rates decide what is trained on: a draw of MOVES has a chance of 1 in 1001."""
    many = Task("many", SIZE.templates, [*SIZE.train] * 500)
    base, steps = base_of(), []
    recipe = TFewConfig(steps=40, batch_size=4, learning_rate=3e-2)
    adapter = pretrain(base, [many, MOVES], recipe, on_step=steps.append)
    same = pretrain(base, [many], recipe)
    # Not the same vectors, as the draws differ; but no nearer to MOVES than without it.
    assert loss_of(base, SIZE, adapter) < 0.8 * loss_of(base, SIZE, None)
    assert loss_of(base, MOVES, adapter) > 0.8 * loss_of(base, MOVES, same)
    # With a cap of one, both are drawn as often.
    capped = pretrain(base, [many, MOVES], recipe, cap=1)
    assert loss_of(base, MOVES, capped) < 0.8 * loss_of(base, MOVES, adapter)


TEXTS = [f"the {animal}" for animal in ANIMALS]
LABELS = ["small", "big"] * 4


def test_a_classifier_begins_where_pre_training_ended(trained: Any, tmp_path: Path) -> None:
    base, adapter, _ = trained
    for name, content in adapter_files(adapter).items():
        (tmp_path / name).write_bytes(content)
    losses = []
    for start in (adapter, tmp_path, None):
        classifier = FewShotClassifier(
            base.model, "{{ text }} is", tokenizer=base.tokenizer, steps=1, init_from=start
        )
        classifier.fit(TEXTS, LABELS)
        losses.append(classifier.history_[0].loss)
    # The first batch is the whole of this training set, which is the task's under one template.
    assert losses[0] == losses[1]
    assert losses[0] == pytest.approx(loss_of(base, SIZE, adapter), rel=1e-5)
    assert losses[2] == pytest.approx(loss_of(base, SIZE, None), rel=1e-5)
    assert losses[0] < 0.8 * losses[2]


def test_progress_and_one_warning_for_all_cut_texts() -> None:
    long = Task("long", SIZE.templates, [{"animal": "cat " * 80, "label": 1}] * 3)
    done: list[int] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pretrain(base_of(), [SIZE, long], TFewConfig(steps=1, batch_size=2), progress=done.append)
    assert done == [8, 3]
    said = [str(w.message) for w in caught if "context" in str(w.message)]
    # Three examples under two templates, of 22 prompts in all.
    assert len(said) == 1
    assert said[0].startswith("6 of 22 prompts are longer")


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "no tasks to mix"),
        ([SIZE, MOVES, SIZE], "two tasks have the name 'size'"),
        ([SIZE, Task("none", SIZE.templates, [])], "task 'none' has 0 training examples"),
        (
            [Task("odd", SIZE.templates, [{"animal": "cat"}])],
            "task 'odd': template .*not 'label'",
        ),
    ],
)
def test_unusable_tasks(tasks: list[Task], message: str) -> None:
    base = base_of()
    with pytest.raises(IA3Error, match=message):
        pretrain(base, tasks, RECIPE)
    assert hook_count(base.model) == 0


@needs_data
def test_the_authors_samples_make_a_mixture() -> None:
    names = [name for name in HELD_OUT_TASKS if not name.startswith("anli")]
    tasks = [
        Task(name, load_templates(name), read_rows(DATA / "tfew" / name / "42_seed.jsonl"))
        for name in names
    ]
    # Words it does not know would make all choices the same tokens.
    words = sorted(
        {
            word
            for task in tasks
            for template in task.templates
            for row in task.train
            for choice in template.choices_of(row)
            for word in word_tokenizer().backend_tokenizer.pre_tokenizer.pre_tokenize_str(choice)
            for word in word[:1]
        }
    )
    tokenizer = word_tokenizer(words)
    config = LlamaConfig(**{**LLAMA.to_dict(), "vocab_size": len(tokenizer)})
    config.max_position_embeddings = 1024
    base = BaseModel(random_model(config), tokenizer, "words")
    steps: list[TrainingStep] = []
    adapter = pretrain(
        base, tasks, TFewConfig(steps=2, batch_size=16, seed=1), on_step=steps.append
    )
    assert len(steps) == 2
    assert any((vector != 1).any() for vector in adapter.vectors.values())


# -- breaks ----------------------------------------------------------------------------------------

CHILD = """
import sys, time
from test_pretraining import GPT2, RECIPE, TASKS, base_of
from ia3.tfew.training.pretraining import pretrain

def on_step(step):
    print(step.step, flush=True)
    time.sleep(0.05)

pretrain(base_of(GPT2), TASKS, RECIPE, on_step=on_step, checkpoints=sys.argv[1])
"""


@pytest.fixture(scope="module")
def unbroken() -> tuple[dict[str, Tensor], list[TrainingStep]]:
    """The run of `CHILD` without a break."""
    steps: list[TrainingStep] = []
    adapter = pretrain(base_of(GPT2), TASKS, RECIPE, on_step=steps.append)
    return adapter.vectors, steps


def test_killed_and_resumed_ends_with_the_same_bits(tmp_path: Path, unbroken: Any) -> None:
    last = random.randint(26, 49)
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        env=child_environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == last:
                process.kill()
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-25"]
    after: list[TrainingStep] = []
    found = pretrain(base_of(GPT2), TASKS, RECIPE, on_step=after.append, checkpoints=tmp_path)
    torch.testing.assert_close(found.vectors, unbroken[0], rtol=0, atol=0)
    # It went on from the checkpoint, and did not begin anew.
    assert after == unbroken[1][25:]
    # At its end it takes no further step.
    again = pretrain(base_of(GPT2), TASKS, RECIPE, on_step=after.append, checkpoints=tmp_path)
    torch.testing.assert_close(again.vectors, unbroken[0], rtol=0, atol=0)
    assert len(after) == 35


@pytest.mark.parametrize(
    "change",
    [
        {"cap": 5},
        {"tasks": [SIZE]},
        {"tasks": [SIZE, Task("walks", MOVES.templates, MOVES.train)]},
        {"tasks": [SIZE, Task("moves", MOVES.templates, [*MOVES.train[1:], MOVES.train[0]])]},
    ],
)
def test_another_mixtures_checkpoint_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    recipe = TFewConfig(steps=2, batch_size=2)
    settings: dict[str, Any] = {"checkpoints": tmp_path, "config": recipe, "tasks": TASKS}
    pretrain(base_of(), **settings)
    with pytest.raises(IA3Error, match="checkpoint-2 is another run's: it had other examples"):
        pretrain(base_of(), **{**settings, **change})


# -- the command -----------------------------------------------------------------------------------

IA3 = Path(sys.executable).parent / "ia3"
MANIFEST = """\
tasks:
  size:
    data: size.csv
    template: ["the {{ animal }} is", "a {{ animal }} so"]
    label: size
  moves:
    data: moves.jsonl
    template: "it is the {{ animal }}"
    label: flies
    choices: {true: flies, false: walks}
"""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    random_model(GPT2).save_pretrained(folder)
    word_tokenizer(WORDS).save_pretrained(folder)
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a manifest and its data."""
    (tmp_path / "tasks.yaml").write_text(MANIFEST, "utf-8")
    rows = [f"{row['animal']},{('small', 'big')[row['label']]}" for row in SIZE.train]
    (tmp_path / "size.csv").write_text("\n".join(["animal,size", *rows]), "utf-8")
    lines = [{"animal": row["animal"], "flies": bool(row["label"])} for row in MOVES.train]
    (tmp_path / "moves.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    return tmp_path


@pytest.fixture
def command(place: Path, model_folder: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `ia3 pretrain` of the tiny model in the folder."""
    started: list[subprocess.Popen[str]] = []
    # Tests may run where Ctrl-C is ignored, which would be inherited.
    listening = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    command = [sys.executable, "-c", listening, str(IA3), "pretrain"]

    def start(*arguments: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*command, *map(str, arguments), "--model", str(model_folder)],
            cwd=place,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_the_command(
    place: Path, model_folder: Path, command: Callable[..., subprocess.Popen[str]]
) -> None:
    arguments = ["tasks.yaml", "--out", "start", "--steps", 30, "--cap", 6, "--seed", 2]
    process = command(*arguments, "--learning-rate", 0.03, "--batch-size", 8, "--json")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    said = json.loads(out)
    # 6 and 4 of 10.
    assert said["tasks"] == [
        {"task": "size", "examples": 8, "templates": 2, "rate": 0.6},
        {"task": "moves", "examples": 4, "templates": 1, "rate": 0.4},
    ]
    assert (said["adapter"], said["steps"]) == ("start", 30)
    assert said["final_loss"] > 0
    assert said["seconds"] > 0
    assert said["adapter_bytes"] == (place / "start" / WEIGHTS_NAME).stat().st_size
    adapter = read_adapter(place / "start")
    assert adapter.config.base_model_name_or_path == str(model_folder)
    base = BaseModel(random_model(GPT2), word_tokenizer(WORDS), "tiny")
    for task in TASKS:
        assert loss_of(base, task, adapter) < loss_of(base, task, None)
    # For a person: the mixture before, a line after; and what is there is not replaced.
    process = command("tasks.yaml", "--out", "other", "--steps", 1, "--max-tokens", 20)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (0, "")
    assert "size" in err
    assert "66.7%" in err
    assert "33.3%" in err
    assert "Trained on 2 tasks" in err
    process = command("tasks.yaml", "--out", "other")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err.count("\n")) == (1, "", 1)
    assert "--force" in err


def test_ctrl_c_and_the_same_command_again(
    place: Path, command: Callable[..., subprocess.Popen[str]]
) -> None:
    arguments = ["tasks.yaml", "--steps", 600, "--json", "--checkpoints"]
    process = command(*arguments, "broken", "--out", "broken-out")
    while not list((place / "broken").glob("checkpoint-*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (130, "", "")
    assert not (place / "broken-out").exists()
    for folder in ("broken", "whole"):
        process = command(*arguments, folder, "--out", f"{folder}-out")
        out, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (0, "")
    broken, whole = (read_adapter(place / f"{folder}-out") for folder in ("broken", "whole"))
    assert broken.config == whole.config
    torch.testing.assert_close(broken.vectors, whole.vectors, rtol=0, atol=0)


def test_data_that_do_not_fit_leave_nothing_behind(
    place: Path, command: Callable[..., subprocess.Popen[str]]
) -> None:
    (place / "tasks.yaml").write_text("tasks: {copa: {data: size.csv}}", "utf-8")
    before = set(place.iterdir())
    process = command("tasks.yaml", "--out", "start", "--checkpoints", "run", "--json")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err.count("\n")) == (1, "", 1), err
    assert err.startswith("error: task 'copa': template")
    assert "not 'choice1', 'choice2'" in err
    assert set(place.iterdir()) == before
