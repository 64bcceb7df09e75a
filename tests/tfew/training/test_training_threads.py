"""Training with a number of threads of its own: recorded, kept when it goes on, restored after."""

import json
import random
import threading

import pytest
import torch
from support.tfew import VOCABULARY, tiny_llama, word_tokenizer

from ia3 import IA3Config, IA3Model
from ia3.base.loading import BaseModel
from ia3.base.products import plain_attention
from ia3.base.threads import Threads
from ia3.errors import BrokenFileError, InvalidTypeError
from ia3.tfew import TFewConfig, TrainingExample, train
from ia3.tfew.prompts.encoding import EncodedExample

RECIPE = TFewConfig(steps=6, batch_size=2)


@pytest.fixture(autouse=True)
def two():
    """The machine has two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def trained(threads, on_step=None, **settings):
    draws = random.Random(0)

    def ids(count):
        return tuple(draws.randrange(3, VOCABULARY) for _ in range(count))

    examples = [
        TrainingExample((EncodedExample(ids(5), (ids(2), ids(3))),), i % 2) for i in range(4)
    ]
    base = BaseModel(tiny_llama(), word_tokenizer(), "tiny")
    model = IA3Model(base.model, IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    train(base, model, examples, RECIPE, on_step, threads=threads, **settings)
    return {name: v.detach().clone() for name, v in model.vectors("default").items()}


def numbers_of(threads, **settings):
    """The number of threads after each step."""
    seen = []
    trained(threads, lambda step: seen.append(torch.get_num_threads()), **settings)
    return seen


def test_steps_are_timed_with_one_and_with_all():
    threads = Threads()
    assert numbers_of(threads)[:3] == [1, 1, 2]
    assert threads.count in (1, 2)
    assert torch.get_num_threads() == 2


def test_by_default_torchs_number_is_left_alone():
    assert numbers_of(None) == [2] * RECIPE.steps


@pytest.mark.parametrize("number", [1, 2])
def test_a_run_that_goes_on_begins_with_the_number_of_its_checkpoint(tmp_path, number):
    def stop(step):
        if step.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(Threads(number), stop, checkpoints=tmp_path, save_steps=3)
    run = json.loads((tmp_path / "checkpoint-3" / "ia3_run.json").read_text())
    assert run["threads"] == number
    assert numbers_of(Threads(), checkpoints=tmp_path, save_steps=3)[0] == number


def test_of_a_fixed_number_it_ends_with_the_same_bits(tmp_path):
    def stop(step):
        if step.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(Threads(2), stop, checkpoints=tmp_path, save_steps=3)
    found = trained(Threads(2), checkpoints=tmp_path, save_steps=3)
    torch.testing.assert_close(found, trained(Threads(2)), rtol=0, atol=0)


@pytest.mark.parametrize("wrong", [0, "2", True, 1.5])
def test_a_checkpoint_with_another_value_is_refused(tmp_path, wrong):
    trained(Threads(1), checkpoints=tmp_path)
    path = tmp_path / "checkpoint-6" / "ia3_run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "threads": wrong}))
    with pytest.raises(BrokenFileError, match=r"'threads' is .*, expected a whole number"):
        trained(Threads(1), checkpoints=tmp_path)


def test_a_number_is_no_threads():
    with pytest.raises(InvalidTypeError, match="threads is 2, expected a Threads"):
        trained(2)


# -- another thread's attention --------------------------------------------------------------------


@pytest.mark.parametrize("again", ["parts of choices", "gradient checkpointing"])
def test_a_thread_that_embeds_short_texts_meanwhile_breaks_no_step(again):
    # Rows too long for plain attention; what is computed again has to be as it was.
    prompt = tuple(3 + i % (VOCABULARY - 3) for i in range(330))
    examples = [TrainingExample((EncodedExample(prompt, ((3, 4), (5, 6), (7, 8))),), 0)]
    base = BaseModel(tiny_llama(), word_tokenizer(), "tiny")
    model = IA3Model(base.model, IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    most = 332
    if again == "gradient checkpointing":
        model.gradient_checkpointing_enable()
        most = 4096
    entered, leave = threading.Event(), threading.Event()

    def embed():
        with plain_attention():
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=embed)

    def begin(*_):
        if torch.is_grad_enabled() and thread.ident is None:
            thread.start()
            assert entered.wait(60)

    base.model.register_forward_hook(begin)
    try:
        history = train(base, model, examples, TFewConfig(steps=1, batch_size=1, max_tokens=most))
    finally:
        leave.set()
        thread.join()
    assert [step.step for step in history] == [1]
    assert torch.backends.cuda.flash_sdp_enabled()
