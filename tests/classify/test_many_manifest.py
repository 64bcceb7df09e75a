"""The manifest of `ia3 fit-many`."""

from __future__ import annotations

from pathlib import Path

import pytest

from ia3 import IA3Error
from ia3.base.loading import EMBEDDED_MODEL
from ia3.classify.many_manifest import TaskToFit, read_many_manifest


@pytest.fixture
def written(tmp_path):
    def write(content: str) -> Path:
        path = tmp_path / "tasks.yaml"
        path.write_text(content, "utf-8")
        return path

    return write


def test_tasks_have_the_defaults_that_they_do_not_change(written, tmp_path):
    (tmp_path / "begin").mkdir()
    model, tasks = read_many_manifest(
        written(
            """
            defaults: {steps: 7, label: queue, learning_rate: 3e-3, init_from: begin}
            tasks:
              tickets: {data: a.csv, template: "{{ text }} :", choices: {no: not it, 01: yes}}
              reviews: {data: b.jsonl, text: [title, review], label: stars, seed: 5, chat: true,
                        init_from: somebody/adapter, split: test, subset: en}
            """
        )
    )
    assert model == EMBEDDED_MODEL
    shared = {"steps": 7, "learning_rate": 0.003}
    # Labels are the text that is written, not YAML's booleans and numbers.
    choices = {"no": "not it", "01": "yes"}
    settings = {"template": ["{{ text }} :"], **shared, "init_from": str(tmp_path / "begin")}
    assert tasks["tickets"] == TaskToFit(
        tmp_path, "a.csv", "train", None, ["text"], "queue", choices, settings
    )
    settings = {**shared, "seed": 5, "chat": True, "init_from": "somebody/adapter"}
    assert tasks["reviews"] == TaskToFit(
        tmp_path, "b.jsonl", "test", "en", ["title", "review"], "stars", None, settings
    )


def test_a_model_may_lie_beside_the_manifest(written, tmp_path):
    (tmp_path / "own").mkdir()
    model, _ = read_many_manifest(written("model: own\ntasks: {a: {data: a.csv}}"))
    assert model == str(tmp_path / "own")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("tasks: {}", "tasks is a mapping"),
        ("modle: x\ntasks: {a: {data: a.csv}}", "unknown key 'modle'.*did you mean 'model'"),
        ("defaults: [x]\ntasks: {a: {data: a.csv}}", "defaults is a list"),
        ("defaults: {step: 3}\ntasks: {a: {data: a.csv}}", "defaults: unknown key 'step'"),
        ("tasks: {a: {text: x}}", "task 'a': there is no 'data'"),
        ("tasks: {a: {data: a.csv, k: 3}}", "task 'a': unknown key 'k'"),
        ("tasks: {a: {data: a.csv, steps: many}}", "steps is 'many', expected a whole number"),
        ("tasks: {a: {data: a.csv, learning_rate: fast}}", "learning_rate is 'fast'"),
        ("tasks: {a: {data: a.csv, chat: 1}}", "chat is '1', expected true or false"),
        ("tasks: {a: {data: a.csv, text: []}}", "text is a list, expected a text or a list"),
        ("tasks: {a: {data: a.csv, choices: [x]}}", "choices is a list"),
        ("tasks: {a: {data: a.csv, choices: {x: ''}}}", "the words of 'x' are empty"),
        ("tasks: {a: {data: a.csv}, a: {data: b.csv}}", "'a' is there twice"),
    ],
)
def test_mistakes_are_named(written, content, message):
    with pytest.raises(IA3Error, match=f"tasks.yaml.*{message}"):
        read_many_manifest(written(content))
