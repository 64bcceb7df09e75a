"""The schema of a classifier's task file."""

import json
import math

import pytest
from support.paths import REPOSITORY
from support.tfew import tiny_llama, word_tokenizer

from ia3 import FewShotClassifier
from ia3.classify.task_file import TaskFile
from ia3.errors import BrokenFileError, IA3Error

SAVED = REPOSITORY / "tests" / "fixtures" / "saved-0.1.0" / "classifier" / "ia3_task.json"
GOOD = json.loads(SAVED.read_text("utf-8"))


def read(**changes):
    return TaskFile.from_json(json.dumps({**GOOD, **changes}), "a.json")


def test_a_file_of_an_earlier_version_is_read_and_written_as_it_was():
    text = SAVED.read_text("utf-8")
    assert TaskFile.from_json(text, "a.json").to_json() == text
    older = {name: value for name, value in GOOD.items() if name != "upper_blocks"}
    assert TaskFile.from_json(json.dumps(older), "a.json").upper_blocks is None


def test_the_hash_of_the_vectors_is_the_last_key():
    task = read(vectors="0f" * 32)
    assert list(json.loads(task.to_json()))[-1] == "vectors"
    assert TaskFile.from_json(task.to_json(), "b.json") == task


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": [-1, 0, 2**63 - 1], "choices": ["a", "b", "c"]},
        {"labels": [True, False]},
        {"model": None},
        {"fields": ["a", "b"]},
        {"learning_rate": 1},
        {"seed": 2**32 - 1, "upper_blocks": 1, "steps": 0, "chat": True},
        {"choices": ["größe", "大"]},
    ],
    ids=str,
)
def test_what_a_file_may_hold_goes_there_and_back(changes):
    task = read(**changes)
    assert {name: getattr(task, name) for name in changes} == changes
    assert TaskFile.from_json(task.to_json(), "b.json") == task


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "has format 2, expected 1: it was written by another version of ia3"),
        ({"format": True}, "has format True, expected 1"),
        ({"format": 1.0}, "has format 1.0, expected 1"),
        ({"model": 3}, "model is 3, expected a model's name, or null"),
        ({"templates": []}, r"templates is \[\], expected a list of texts, at least one"),
        ({"templates": "{{ text }}"}, "templates is '{{ text }}', expected a list of texts"),
        ({"templates": ["a", 3]}, r"templates\[1\] is 3; templates is to be a list of texts"),
        ({"templates": ["a", "{{ text"]}, r"template 'templates\[1\]'.*line 1"),
        ({"fields": ["a", "a"]}, r"fields\[1\] is 'a' a second time"),
        ({"fields": {"a": 1}}, "fields is {'a': 1}, expected a list of names"),
        ({"labels": ["pos"]}, r"labels is \['pos'\], expected a list .* at least two"),
        ({"labels": ["a", "a"]}, r"labels\[1\] is 'a' a second time"),
        ({"labels": [1, True]}, r"labels\[1\] is True, but labels\[0\] is 1: .* one kind"),
        ({"labels": [0.5, 1.5]}, r"labels\[0\] is 0.5 \(float\), expected a string, an integer"),
        ({"labels": ["a", None]}, r"labels\[1\] is None \(NoneType\), expected a string"),
        ({"labels": [["a"], "b"]}, r"labels\[0\] is \['a'\] \(list\), expected a string"),
        ({"labels": [-1, 2**63]}, r"labels\[1\] is 922.*, expected an integer of 64 bits"),
        ({"labels": [0, -(2**63) - 1]}, r"labels\[1\] is -922.*, expected an integer of 64 bits"),
        ({"labels": ["a", "a\0"]}, r"labels\[1\] is 'a\\x00', which has a NUL"),
        ({"choices": ["one"]}, "has 1 choices for 2 labels: expected one each"),
        ({"choices": ["one", " "]}, r"choices\[1\] is ' ', expected words"),
        ({"choices": ["one", None]}, r"choices\[1\] is None; choices is to be a list of texts"),
        ({"chat": 1}, "chat is 1, expected true or false"),
        ({"steps": -3}, "steps is -3, expected a whole number, at least 0"),
        ({"steps": 3.0}, "steps is 3.0, expected a whole number"),
        ({"steps": True}, "steps is True, expected a whole number"),
        ({"learning_rate": 0}, "learning_rate is 0, expected a number above 0"),
        ({"learning_rate": "0.1"}, "learning_rate is '0.1', expected a number"),
        ({"learning_rate": True}, "learning_rate is True, expected a number"),
        ({"learning_rate": 10**400}, r"learning_rate is 10000.*\.\.\..*, expected a number"),
        ({"learning_rate": math.nan}, "NaN is not JSON"),
        ({"seed": -1}, "seed is -1, expected a whole number, 0 to"),
        ({"seed": 2**32}, "seed is 4294967296, expected a whole number, 0 to"),
        ({"upper_blocks": 0}, "upper_blocks is 0, expected a whole number, at least 1, or null"),
        ({"vectors": "0F" * 32}, "vectors is '0F0F.*expected 64 hexadecimal digits"),
        ({"stepz": 1}, "has 'stepz', which no task file has; did you mean 'steps'"),
        ({"steps": -1, "seed": -1, "chat": 0}, r"chat is 0, .* \(and 2 more to correct\)"),
    ],
    ids=str,
)
def test_what_a_file_may_not_hold_is_named_with_what_was_expected(changes, message):
    with pytest.raises(BrokenFileError, match=rf"^a\.json: .*{message}") as raised:
        read(**changes)
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize("name", [name for name in GOOD if name != "upper_blocks"])
def test_a_key_that_is_missing_is_named(name):
    rest = {key: value for key, value in GOOD.items() if key != name}
    with pytest.raises(BrokenFileError, match=f"has no '{name}', expected"):
        TaskFile.from_json(json.dumps(rest), "a.json")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"a": ', b"\xff", b'"' * 3, b"[" * 10_000], ids=lambda c: repr(c[:9])
)
def test_what_is_no_json_object_is_named(content):
    with pytest.raises(BrokenFileError, match=r"^a\.json"):
        TaskFile.from_json(content, "a.json")


@pytest.mark.parametrize(
    "changes",
    [{"labels": ["a", "a"]}, {"steps": -3}, {"templates": []}, {"learning_rate": "fast"}],
    ids=str,
)
def test_a_classifier_is_not_loaded_from_a_file_of_other_values(changes, tmp_path):
    tokenizer = word_tokenizer(["neg", "pos"])
    model = tiny_llama(vocabulary=len(tokenizer))
    texts, labels = ["a word", "a text"], ["pos", "neg"]
    FewShotClassifier(model, "{{ text }}", steps=0, tokenizer=tokenizer).fit(texts, labels).save(
        tmp_path
    )
    path = tmp_path / "ia3_task.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")
    with pytest.raises(IA3Error, match=rf"ia3_task\.json: .*{next(iter(changes))}"):
        FewShotClassifier.load(tmp_path, model=model, tokenizer=tokenizer)


def test_a_task_has_a_thousand_templates_at_most():
    # Each is compiled: a file of a megabyte could hold a hundred thousand.
    assert len(read(templates=["{{ text }}"] * 1000).templates) == 1000
    with pytest.raises(BrokenFileError, match=r"templates has 1,001, expected at most 1,000"):
        read(templates=["{{ text }}"] * 1001)
    with pytest.raises(IA3Error, match=r"^1,001 templates, expected at most 1,000"):
        FewShotClassifier(tiny_llama(), ["{{ text }}"] * 1001, tokenizer=word_tokenizer()).fit(
            ["a word", "a text"], ["pos", "neg"]
        )
