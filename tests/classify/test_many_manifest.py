"""The manifest of `ia3 fit-many`."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings, strategies as st

from ia3.classify.many_manifest import KEYS, MODELS, TaskToFit, read_many_manifest
from ia3.errors import BrokenFileError, IA3Error


@pytest.fixture
def written(tmp_path):
    def write(content: str) -> Path:
        path = tmp_path / "tasks.yaml"
        path.write_text(content, "utf-8")
        return path

    return write


def test_tasks_have_the_defaults_that_they_do_not_change(written, tmp_path):
    (tmp_path / "begin").mkdir()
    models, tasks = read_many_manifest(
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
    assert models == {"model": "auto"}
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


@pytest.mark.parametrize("key", MODELS)
def test_a_model_may_lie_beside_the_manifest(written, tmp_path, key):
    (tmp_path / "own").mkdir()
    models, _ = read_many_manifest(written(f"{key}: own\ntasks: {{a: {{data: a.csv}}}}"))
    assert models == {"model": "auto", key: str(tmp_path / "own")}


def test_the_two_that_are_chosen_from_may_be_named(written):
    tasks = "tasks: {a: {data: a.csv}}"
    models, _ = read_many_manifest(written(f"encoder: a/b\nlanguage_model: c/d\n{tasks}"))
    assert models == {"model": "auto", "encoder": "a/b", "language_model": "c/d"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("tasks: {}", "tasks is a mapping"),
        ("encoder: [x]\ntasks: {a: {data: a.csv}}", "encoder is a list, expected a text"),
        ("modle: x\ntasks: {a: {data: a.csv}}", "unknown key 'modle'.*did you mean 'model'"),
        ("defaults: [x]\ntasks: {a: {data: a.csv}}", "defaults is a list"),
        ("defaults: {step: 3}\ntasks: {a: {data: a.csv}}", "defaults: unknown key 'step'"),
        ("tasks: {a: {text: x}}", "task 'a': there is no 'data'"),
        ("tasks: {a: {data: a.csv, k: 3}}", "task 'a': unknown key 'k'"),
        ("tasks: {a: {data: a.csv, steps: many}}", "steps is 'many', expected a whole number"),
        ("tasks: {a: {data: a.csv, learning_rate: fast}}", "learning_rate is 'fast'"),
        *(
            (f"tasks: {{a: {{data: a.csv, learning_rate: {rate}}}}}", "task 'a': learning_rate is ")
            for rate in ("nan", "inf", "-1", "0", "1e999", "1e-999", "-inf", "[1]", "{a: 1}", "１")
        ),
        *(
            (f"tasks: {{a: {{data: a.csv, seed: {seed}}}}}", "task 'a': seed is ")
            for seed in ("-1", "4294967296", "1.5", "9" * 5000, "1_0", "٣", "[1]")
        ),
        ("tasks: {a: {data: a.csv, steps: 10000001}}", "task 'a': steps is 10000001, expected 1"),
        ("tasks: {a: {data: a.csv, steps: -3}}", "task 'a': steps is '-3', expected a whole"),
        ("tasks: {a: {data: [a.csv]}}", "task 'a': data is a list, expected a text"),
        ("tasks: {a: {data: {b: c}}}", "task 'a': data is a mapping, expected a text"),
        ("tasks: {a: [b]}", "task 'a' is a list"),
        ("tasks: {[a]: {data: b}}", "is not YAML"),
        ('tasks: {a: {data: "a\\0"}}', "a NUL character"),
        ("tasks: {a: {data: a.csv, chat: 1}}", "chat is '1', expected true or false"),
        ("tasks: {a: {data: a.csv, text: []}}", "text is a list, expected a text or a list"),
        ("tasks: {a: {data: a.csv, choices: [x]}}", "choices is a list"),
        ("tasks: {a: {data: a.csv, choices: {x: ''}}}", "the words of 'x' are empty"),
        ("tasks: {a: {data: a.csv}, a: {data: b.csv}}", "'a' is there twice"),
    ],
)
def test_mistakes_are_named(written, content, message):
    with pytest.raises(BrokenFileError, match=f"tasks.yaml.*{message}") as caught:
        read_many_manifest(written(content))
    assert len(str(caught.value)) < 600


def test_names_that_are_too_long_for_a_file(written):
    long = "a" * 5000
    content = f"model: {long}\ntasks: {{a: {{data: {long}, init_from: {long}}}}}"
    models, tasks = read_many_manifest(written(content))
    assert models["model"] == tasks["a"].data == tasks["a"].settings["init_from"] == long


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab"), inner, max_size=2),
    max_leaves=4,
)
ENTRY = st.fixed_dictionaries({"data": ANYTHING}, optional=dict.fromkeys(KEYS[1:], ANYTHING))
TASKS = st.dictionaries(st.text("ab/.", min_size=1), ENTRY | ANYTHING, max_size=2)


@given(
    st.fixed_dictionaries(
        {"tasks": TASKS}, optional={**dict.fromkeys(MODELS, ANYTHING), "defaults": ENTRY}
    )
)
@settings(
    deadline=None,
    max_examples=100,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_keys_are_tasks_or_an_error_that_names_the_file(written, content):
    path = written(yaml.safe_dump(content, allow_unicode=True))
    try:
        _, tasks = read_many_manifest(path)
    except IA3Error as error:
        assert str(error).startswith(str(path))  # noqa: PT017
        assert len(str(error)) < 1500  # noqa: PT017
        return
    assert all(task.settings.get("learning_rate", 1) > 0 for task in tasks.values())
