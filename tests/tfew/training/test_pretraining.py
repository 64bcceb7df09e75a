"""Pre-training on a mixture: its rates and draws, what is trained, breaks, and `ia3 pretrain`."""

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from support.tfew import (
    VOCABULARY,
    child_environment,
    hook_count,
    random_model,
    tiny_llama,
    word_tokenizer,
)
from transformers import GPT2Config

from ia3 import FewShotClassifier
from ia3.adapter.files import read_adapter
from ia3.base.loading import BaseModel, load_base_model
from ia3.cli import main
from ia3.errors import IA3Error
from ia3.files.saved import WEIGHTS_NAME
from ia3.tfew import TFewConfig
from ia3.tfew.prompts.encoding import Encoder
from ia3.tfew.prompts.manifest import read_manifest
from ia3.tfew.prompts.promptsource import PromptTemplate
from ia3.tfew.prompts.tasks import Task
from ia3.tfew.prompts.templates import Template
from ia3.tfew.scoring.choices import token_scores
from ia3.tfew.temporary_adapter import temporary_adapter
from ia3.tfew.training.losses import token_loss
from ia3.tfew.training.pretraining import draw, mixing_rates, pretrain

ANIMALS = ["cat", "dog", "bird", "cow", "hen", "fox", "owl", "bee"]
WORDS = [*ANIMALS, "the", "is", "it", "so", "a", "no", "yes", "big", "small", "flies", "walks"]
# Dropout makes the steps depend on the random state, which a checkpoint has to bring back.
SMALL = {"vocab_size": VOCABULARY, "initializer_range": 0.2}
GPT2 = GPT2Config(
    **SMALL, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=1
)
RECIPE = TFewConfig(steps=60, batch_size=4, learning_rate=3e-2, seed=3)


def template_of(jinja, choices):
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


def base_of(config=None):
    model = tiny_llama(max_position_embeddings=64) if config is None else random_model(config)
    return BaseModel(model, word_tokenizer(WORDS), "tiny")


@pytest.mark.parametrize(
    ("sizes", "cap", "rates"),
    [
        ({"a": 1, "b": 3}, 500_000, {"a": 1 / 4, "b": 3 / 4}),
        # 10, 100, 100 of 210.
        ({"a": 10, "b": 1000, "c": 100}, 100, {"a": 1 / 21, "b": 10 / 21, "c": 10 / 21}),
        ({"a": 7}, 500_000, {"a": 1.0}),
    ],
)
def test_rates_by_hand(sizes, cap, rates):
    found = mixing_rates(sizes, cap)
    assert list(found) == list(sizes)
    assert found == pytest.approx(rates)


def test_an_impossible_cap():
    with pytest.raises(IA3Error, match="cap is 0, expected at least 1"):
        mixing_rates({"a": 1}, 0)


# -- draws -----------------------------------------------------------------------------------------

SETS = {"a": range(10), "b": range(100, 160), "c": [200]}
RATES = mixing_rates({name: len(examples) for name, examples in SETS.items()}, cap=29)


def test_draws_follow_the_rates_and_are_uniform_within_a_task():
    # 10, 29 and 1 of 40.
    count = 20_000
    numbers = draw(SETS, RATES, count, seed=5)
    tasks = Counter("abc"[number // 100] for number in numbers)
    for name, rate in {"a": 10 / 40, "b": 29 / 40, "c": 1 / 40}.items():
        # Five standard deviations of a binomial.
        assert abs(tasks[name] - count * rate) < 5 * (count * rate * (1 - rate)) ** 0.5
    of_b = Counter(number for number in numbers if 100 <= number < 200)
    expected = tasks["b"] / 60
    assert len(of_b) == 60
    assert all(abs(times - expected) < 5 * expected**0.5 for times in of_b.values())


def test_a_place_depends_on_the_seed_and_its_number_alone():
    state = random.getstate()
    numbers = draw(SETS, RATES, 1000, seed=5)
    assert random.getstate() == state
    assert draw(SETS, RATES, 1500, seed=5)[:1000] == numbers
    assert draw(SETS, RATES, 1000, seed=6) != numbers
    assert numbers[:5] == [134, 109, 1, 121, 129]


# -- training --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """Vectors for both tasks, and the model they are for."""
    base, steps = base_of(), []
    adapter = pretrain(base, TASKS, RECIPE, on_step=steps.append)
    return base, adapter, steps


def loss_of(base, task, adapter, template=0):
    """The recipe's loss on a task's training set, under one template."""
    examples = task.training_examples(Encoder(base, chat=False))
    encoded = [e.encoded[template] for e in examples]
    with nullcontext() if adapter is None else temporary_adapter(base, adapter), torch.no_grad():
        scores = token_scores(base, encoded)
        return token_loss(scores, torch.tensor([e.label for e in examples])).total.item()


def test_the_loss_falls_on_every_task(trained):
    base, adapter, steps = trained
    assert [step.step for step in steps] == list(range(1, 61))
    kinds = {(v.dtype, v.device.type, v.requires_grad) for v in adapter.vectors.values()}
    assert kinds == {(torch.float32, "cpu", False)}
    for task in TASKS:
        for template in range(len(task.templates)):
            before = loss_of(base, task, None, template)
            assert loss_of(base, task, adapter, template) < 0.8 * before


TEXTS = [f"the {animal}" for animal in ANIMALS]
LABELS = ["small", "big"] * 4


def test_a_classifier_begins_where_pre_training_ended(trained):
    base, adapter, _ = trained
    for start in (adapter, None):
        classifier = FewShotClassifier(
            base.model, "{{ text }} is", tokenizer=base.tokenizer, steps=1, init_from=start
        )
        classifier.fit(TEXTS, LABELS)
        assert classifier.adapter_.vectors.keys() == adapter.vectors.keys()
        # The first batch is the whole of this training set: the task's under one template.
        expected = loss_of(base, SIZE, start)
        assert classifier.history_[0].loss == pytest.approx(expected, rel=1e-5)


def test_progress_and_one_warning_for_all_cut_texts():
    long = Task("long", SIZE.templates, [{"animal": "cat " * 80, "label": 1}] * 3)
    done = []
    # Three examples under two templates, of 22 prompts in all.
    with pytest.warns(UserWarning, match="6 of 22 prompts are longer") as caught:
        pretrain(base_of(), [SIZE, long], TFewConfig(steps=1, batch_size=2), progress=done.append)
    assert done == [8, 3]
    assert sum("context" in str(each.message) for each in caught) == 1


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "no tasks to mix"),
        ([SIZE, MOVES, SIZE], "two tasks have the name 'size'"),
        ([SIZE, Task("none", SIZE.templates, [])], "task 'none' has 0 training examples"),
        ([Task("odd", SIZE.templates, [{"animal": "cat"}])], "task 'odd': template .*not 'label'"),
    ],
)
def test_unusable_tasks(tasks, message):
    base = base_of()
    with pytest.raises(IA3Error, match=message):
        pretrain(base, tasks, RECIPE)
    assert hook_count(base.model) == 0


@pytest.mark.parametrize(
    "change", [{"cap": 5}, {"tasks": [Task("size", SIZE.templates, SIZE.train[1:]), MOVES]}]
)
def test_another_mixtures_checkpoint_is_refused(tmp_path, change):
    recipe = TFewConfig(steps=2, batch_size=2)
    settings = {"checkpoints": tmp_path, "config": recipe, "tasks": TASKS}
    pretrain(base_of(), **settings)
    with pytest.raises(IA3Error, match="checkpoint-2 is another run's: it had other examples"):
        pretrain(base_of(), **{**settings, **change})


# -- the command -----------------------------------------------------------------------------------

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
# Tests may run where Ctrl-C is ignored, which a process would inherit.
LISTENING = (
    "import signal, sys; from ia3.cli import main; "
    "signal.signal(signal.SIGINT, signal.default_int_handler); sys.argv[0] = 'ia3'; main()"
)
MODEL = ["--model", "model"]


@pytest.fixture
def place(tmp_path):
    """A folder with a manifest, its data and a model."""
    random_model(GPT2).save_pretrained(tmp_path / "model")
    word_tokenizer(WORDS).save_pretrained(tmp_path / "model")
    (tmp_path / "tasks.yaml").write_text(MANIFEST, "utf-8")
    rows = [f"{row['animal']},{('small', 'big')[row['label']]}" for row in SIZE.train]
    (tmp_path / "size.csv").write_text("\n".join(["animal,size", *rows]), "utf-8")
    lines = [{"animal": row["animal"], "flies": bool(row["label"])} for row in MOVES.train]
    (tmp_path / "moves.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    return tmp_path


@pytest.fixture
def run(place, monkeypatch, capsys):
    """Runs `ia3 pretrain` in the folder: the exit code, and what it writes."""

    def run(*arguments):
        monkeypatch.chdir(place)
        monkeypatch.setattr("sys.argv", ["ia3", "pretrain", "tasks.yaml", *arguments, *MODEL])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, *capsys.readouterr()

    return run


@pytest.mark.slow
def test_ctrl_c_and_the_same_command_again(place, run):
    arguments = ["--steps", "600", "--cap", "6", "--seed", "2", "--learning-rate", "0.03"]
    arguments += ["--out", "start", "--checkpoints", "run", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-c", LISTENING, "pretrain", "tasks.yaml", *arguments, *MODEL],
        cwd=place,
        env=child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list((place / "run").glob("checkpoint-*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out, err) == (130, "", "")
    assert not (place / "start").exists()
    code, out, _ = run(*arguments)
    assert code == 0
    said = json.loads(out)
    # 6 and 4 of 10.
    assert said["tasks"] == [
        {"task": "size", "examples": 8, "templates": 2, "rate": 0.6},
        {"task": "moves", "examples": 4, "templates": 1, "rate": 0.4},
    ]
    assert (said["adapter"], said["steps"]) == ("start", 600)
    assert said["final_loss"] > 0
    assert said["adapter_bytes"] == (place / "start" / WEIGHTS_NAME).stat().st_size
    # Without a break, and in this process.
    adapter = read_adapter(place / "start")
    base = load_base_model(place / "model")
    config = TFewConfig(steps=600, batch_size=16, seed=2, learning_rate=0.03)
    whole = pretrain(base, read_manifest(place / "tasks.yaml"), config, cap=6)
    torch.testing.assert_close(adapter.vectors, whole.vectors, rtol=0, atol=0)
    assert adapter.config.base_model_name_or_path == "model"
    for task in TASKS:
        assert loss_of(base, task, adapter) < loss_of(base, task, None)


def test_the_command_for_a_person(run):
    """The mixture before, a line after; and what is there is not replaced."""
    arguments = ["--out", "start", "--steps", "1", "--max-tokens", "20"]
    code, out, err = run(*arguments)
    assert (code, out) == (0, "")
    for said in ("size", "66.7%", "33.3%", "Trained on 2 tasks"):
        assert said in err
    code, out, err = run(*arguments)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "--force" in err


def test_data_that_do_not_fit_leave_nothing_behind(place, run):
    (place / "tasks.yaml").write_text("tasks: {copa: {data: size.csv}}", "utf-8")
    before = set(place.iterdir())
    code, out, err = run("--out", "start", "--checkpoints", "run", "--json")
    assert (code, out, err.count("\n")) == (1, "", 1), err
    assert err.startswith("error: task 'copa': template")
    assert "not 'choice1', 'choice2'" in err
    assert set(place.iterdir()) == before
