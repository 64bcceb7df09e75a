"""The commands under `torchrun` and `accelerate launch`, as processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.processes import children_of, launched
from support.sentences import LABELS, TEXTS, bert, tokenizer
from support.tfew import tiny_llama

from ia3 import FewShotClassifier
from ia3.base.loading import load_base_model
from ia3.files.saved import WEIGHTS_NAME
from ia3.tfew import TFewConfig
from ia3.tfew.prompts.manifest import read_manifest
from ia3.tfew.training.pretraining import pretrain

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="processes are found in /proc"),
]
PRETRAIN = """
tasks:
  queue:
    data: train.csv
    template: "{{ text }} Category :"
    choices: {billing: billing, delivery: delivery}
"""
MANY = """
model: encoder
defaults: {data: train.csv, steps: 4}
tasks:
  one: {seed: 1}
  absent: {data: none.csv}
  two: {seed: 2}
  three: {seed: 3}
"""
LOST = "another process of this job has ended"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, manifests, an encoder and a language model."""
    folder = tmp_path_factory.mktemp("launched")
    for name, model in (("encoder", bert()), ("llama", tiny_llama())):
        model.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    rows = "".join(f"{text},{label}\n" for text, label in zip(TEXTS, LABELS, strict=True))
    (folder / "train.csv").write_text(f"text,label\n{rows}")
    (folder / "pretrain.yaml").write_text(PRETRAIN)
    (folder / "many.yaml").write_text(MANY)
    return folder


def done(*command: object, folder: Path, **how: Any) -> tuple[int, str, str]:
    process = launched(*command, folder=folder, **how)
    said, errors = process.communicate(timeout=300)
    return process.returncode, said, errors


def fit(model: str, out: str, *more: object) -> list[object]:
    return ["fit", "--data", "train.csv", "--model", model, "--out", out, "--steps", 10, *more]


def vectors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS_NAME)


def in_one_process(place: Path, model: str) -> dict[str, torch.Tensor]:
    classifier = FewShotClassifier(str(place / model), steps=10).fit(TEXTS, LABELS)
    return classifier.adapter_.vectors


def check_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """A file's names have prefixes; their order is the same."""
    assert len(found) == len(expected)
    for one, other in zip(sorted(found), sorted(expected), strict=True):
        torch.testing.assert_close(
            found[one].flatten(), expected[other].flatten(), rtol=0, atol=1e-5
        )


def ours(errors: str) -> list[str]:
    """The lines that the command has printed; the launcher's follow."""
    return [line for line in errors.splitlines() if line.startswith(("error:", "warning:"))]


@pytest.mark.parametrize(
    ("launcher", "count", "model"), [("torchrun", 4, "llama"), ("accelerate", 2, "encoder")]
)
def test_fit_writes_one_adapter_and_says_it_once(place, launcher, count, model):
    out = f"{launcher}-{model}"
    code, said, errors = done(
        *fit(model, out, "--cross-validate", "--json"),
        folder=place,
        launcher=launcher,
        count=count,
    )
    assert code == 0, errors
    told = json.loads(said)  # one object, and no more
    assert told["steps"] == 10
    assert told["measured"]["accuracy"] is not None
    assert (place / out / "ia3_report.html").is_file()
    assert "rror" not in errors
    check_near(vectors(place / out), in_one_process(place, model))


def test_pretrain_and_fit_many_write_what_one_process_does(place):
    command = ["pretrain", "pretrain.yaml", "--model", "llama", "--steps", 5]
    code, _, errors = done(*command, "--out", "pretrained-2", folder=place)
    assert code == 0, errors
    assert errors.count("Trained on 1 task") == 1
    base = load_base_model(str(place / "llama"))
    tasks = read_manifest(place / "pretrain.yaml")
    expected = pretrain(base, tasks, TFewConfig(steps=5, batch_size=16, learning_rate=0.003))
    check_near(vectors(place / "pretrained-2"), expected.vectors)

    code, said, errors = done("fit-many", "many.yaml", "--out", "many", "--json", folder=place)
    assert code == 1  # a task has no data
    tasks = {task["task"]: task for task in json.loads(said)["tasks"]}
    assert list(tasks) == ["one", "absent", "two", "three"]
    assert "does not exist" in tasks["absent"]["error"]
    for seed, name in enumerate(("one", "two", "three"), 1):
        classifier = FewShotClassifier(str(place / "encoder"), steps=4, seed=seed)
        expected = classifier.fit(TEXTS, LABELS).adapter_.vectors
        check_near(vectors(place / "many" / name), expected)
    assert LOST not in errors


def test_killed_with_kill_9_it_ends_at_once_and_goes_on_with_more_processes(place):
    kept = place / "kept"
    # Steps that last, so that there is time to kill one of the processes.
    command = fit("llama", "resumed", "--checkpoints", kept, "--no-report")
    command[command.index(10)] = 5000
    process = launched(*command, folder=place)
    deadline = time.monotonic() + 240
    while not list(kept.glob("checkpoint-*")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(children_of(process.pid)[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)  # half an hour is what torch waits for an answer
    assert process.returncode == 1
    (error,) = ours(errors)
    assert LOST in error
    assert not (place / "resumed").exists()

    # Begun anew, as 5000 steps take too long, from a checkpoint that two processes have left.
    shutil.rmtree(kept)
    fails = place / "fails.py"
    fails.write_text(
        """
import os
from ia3.cli import main
from ia3.tfew.training.trainer import TFewTrainer

check = TFewTrainer._check_gradients

def fail(self, step):
    if step == 8 and os.environ["RANK"] == "1":
        raise OSError(5, "Input/output error", "the disk")
    check(self, step)

TFewTrainer._check_gradients = fail
import ia3.tfew.training.trainer as trainer
trainer.CHECKPOINT_STEPS = 6
main()
"""
    )
    command = fit("llama", "resumed", "--checkpoints", kept, "--no-report")
    code, _, errors = done(*command, folder=place, script=fails)
    assert code == 1
    assert ours(errors) == ["error: the disk: Input/output error"]
    assert [path.name for path in kept.glob("checkpoint-*")] == ["checkpoint-6"]
    command = fit("llama", "resumed", "--checkpoints", kept, "--no-report", "--json")
    code, said, errors = done(*command, folder=place, count=4)
    assert code == 0, errors
    assert json.loads(said)["steps"] == 10
    check_near(vectors(place / "resumed"), in_one_process(place, "llama"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["fit", "--data", "none.csv", "--out", "no"], "error: data file none.csv does not exist"),
        (["fitt"], "error: No such command 'fitt'"),
    ],
)
def test_what_all_processes_find_wrong_is_said_once(place, command, message):
    code, said, errors = done(*command, folder=place)
    assert code == 1
    assert said == ""
    (error,) = ours(errors)
    assert error.startswith(message)


def test_help_is_shown_once(place):
    code, said, errors = done("fit", "--help", folder=place)
    assert code == 0, errors
    assert said.count("Usage:") == 1


def test_what_a_process_leaves_behind_does_not_fail_a_job_that_is_done(place):
    # As threads that a library has left running do now and then.
    fails = place / "fails_at_its_end.py"
    fails.write_text(
        """
import atexit, os
from ia3.cli import main
atexit.register(os._exit, 7)
main()
"""
    )
    code, _, errors = done(*fit("encoder", "left", "--no-report"), folder=place, script=fails)
    assert code == 0, errors
    assert errors.count("Trained on") == 1


def test_what_one_process_can_do_is_done_by_the_first(place):
    code, said, errors = done("check", "train.csv", folder=place)
    assert code == 0
    assert errors.count("warning: ia3 check is one process's work") == 1
    assert (said + errors).count("8 texts") == 1
