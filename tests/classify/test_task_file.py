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
SEEN = {
    "engine": "encoder",
    "name": "all-minilm-l6-v2",
    "accuracy": 0.88,
    "error": 0.04,
    "note": "5 folds",
}
SECOND = {**GOOD, "format": 2, "engine": "language-model"}
ENCODER = {**SECOND, "engine": "encoder", "templates": [], "choices": [], "head": "a1" * 32}
EMBEDDING = {
    "pooling": "cls+mean",
    "normalize": True,
    "max_length": 256,
    "prompt": "query: ",
    "prompt_tokens": 0,
    "dense": None,
    "tokens": "b2" * 32,
}
ADDED = ["engine", "temperature", "threads", "selection", "embedding", "head"]


def read(good=GOOD, **changes):
    return TaskFile.from_json(json.dumps({**good, **changes}), "a.json")


def test_a_file_of_an_earlier_version_is_read_and_written_as_it_was():
    text = SAVED.read_text("utf-8")
    assert TaskFile.from_json(text, "a.json").to_json() == text
    older = {name: value for name, value in GOOD.items() if name != "upper_blocks"}
    assert TaskFile.from_json(json.dumps(older), "a.json").upper_blocks is None


def test_a_file_of_the_first_format_is_of_a_language_model():
    task = read()
    found = [getattr(task, name) for name in ADDED]
    assert found == ["language-model", 1.0, None, None, None, None]
    assert not json.loads(task.to_json()).keys() & {*ADDED}


@pytest.mark.parametrize("name", ADDED)
def test_a_file_of_the_first_format_has_no_key_of_the_second(name):
    value = {**ENCODER, "temperature": 1.0, "threads": None, "selection": None, "embedding": None}[
        name
    ]
    with pytest.raises(BrokenFileError, match=f"has '{name}', which a task file of format 1 lacks"):
        read(**{name: value})


THIRD = {**ENCODER, "format": 3, "multilabel": True}


def test_a_task_of_several_labels_a_text_is_format_3_and_no_other_is():
    task = TaskFile.from_json(json.dumps(THIRD), "a.json")
    assert task.multilabel
    assert TaskFile.from_json(task.to_json(), "b.json") == task
    assert "multilabel" not in json.loads(read(ENCODER).to_json())
    no = {name: value for name, value in THIRD.items() if name != "multilabel"}
    for values in (
        no,
        {**THIRD, "format": 2},
        {**THIRD, "multilabel": False},
        {**GOOD, "multilabel": True},
    ):
        with pytest.raises(BrokenFileError, match="in a task file of format"):
            TaskFile.from_json(json.dumps(values), "a.json")
    for value in (1, "yes", None):
        with pytest.raises(BrokenFileError, match=r"multilabel is .*, expected true"):
            TaskFile.from_json(json.dumps({**THIRD, "multilabel": value}), "a.json")
    ranked = {**SECOND, "format": 3, "multilabel": True}
    with pytest.raises(BrokenFileError, match="expected no such key for a language model"):
        TaskFile.from_json(json.dumps(ranked), "a.json")


def test_what_is_written_says_all_but_what_is_not_known():
    keys = [*GOOD, "engine", "temperature", "threads", "selection"]
    assert list(json.loads(read(SECOND).to_json())) == keys
    encoder = read(ENCODER, vectors="0f" * 32)
    assert list(json.loads(encoder.to_json())) == [*keys, "head", "vectors"]
    known = read(ENCODER, vectors="0f" * 32, embedding=EMBEDDING)
    assert list(json.loads(known.to_json())) == [*keys, "embedding", "head", "vectors"]


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
    ("good", "changes"),
    [
        (SECOND, {}),
        (SECOND, {"temperature": 2, "threads": 1}),
        (SECOND, {"temperature": 1e-6, "threads": 4096, "head": None}),
        (SECOND, {"temperature": 1e6, "selection": []}),
        (SECOND, {"selection": [{**SEEN, "name": None}]}),
        (SECOND, {"selection": [SEEN, {**SEEN, "engine": "language-model", "name": "größe"}]}),
        (SECOND, {"selection": [{**SEEN, "accuracy": 0, "error": 0, "note": ""}] * 8}),
        (SECOND, {"selection": [{**SEEN, "name": "n" * 4096, "note": "n" * 1000}]}),
        (ENCODER, {}),
        (ENCODER, {"templates": ["{{ text }}"], "threads": 2, "selection": [SEEN]}),
        (ENCODER, {"choices": ["awful", "great"], "labels": [0, 1]}),
        (ENCODER, {"embedding": EMBEDDING}),
        (ENCODER, {"embedding": {**EMBEDDING, "dense": "c3" * 32, "prompt": "größe"}}),
    ],
    ids=str,
)
def test_what_a_file_of_the_second_format_may_hold_goes_there_and_back(good, changes):
    text = read(good, **changes).to_json()
    said, given = json.loads(text), {**good, **changes}
    assert {name: said.get(name) for name in given} == given
    assert TaskFile.from_json(text, "b.json") == read(**given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"format": 4},
            "has format 4, expected 1, 2 or 3: it was written by another version of ia3",
        ),
        ({"format": True}, "has format True, expected 1, 2 or 3"),
        ({"format": 1.0}, "has format 1.0, expected 1, 2 or 3"),
        ({"format": 2}, "has no 'engine', expected 'language-model' or 'encoder'"),
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


@pytest.mark.parametrize(
    ("good", "changes", "message"),
    [
        (SECOND, {"engine": "gpt"}, "engine is 'gpt', expected 'language-model' or 'encoder'"),
        (SECOND, {"engine": None}, "engine is None, expected 'language-model' or 'encoder'"),
        (SECOND, {"temperature": 0}, "temperature is 0, expected a number, 1e-6 to 1e6"),
        (SECOND, {"temperature": -1.0}, "temperature is -1.0, expected a number"),
        (SECOND, {"temperature": 1e-320}, "temperature is 1e-320, expected a number"),
        (SECOND, {"temperature": 1e300}, r"temperature is 1e\+300, expected a number"),
        (SECOND, {"temperature": math.inf}, "Infinity is not JSON"),
        (SECOND, {"temperature": None}, "temperature is None, expected a number"),
        (SECOND, {"temperature": True}, "temperature is True, expected a number"),
        (SECOND, {"temperature": "1"}, "temperature is '1', expected a number"),
        (SECOND, {"threads": 0}, "threads is 0, expected a whole number, 1 to 4096, or null"),
        (SECOND, {"threads": 2**40}, "threads is 1099511627776, expected a whole number"),
        (SECOND, {"threads": 1.0}, "threads is 1.0, expected a whole number"),
        (SECOND, {"threads": True}, "threads is True, expected a whole number"),
        (SECOND, {"selection": {}}, "selection is {}, expected a list of at most 8 objects"),
        (SECOND, {"selection": [SEEN] * 9}, r"selection is .*, expected a list of at most 8"),
        (SECOND, {"selection": [SEEN, 3]}, r"selection\[1\] is 3; selection is to be a list of"),
        (SECOND, {"head": "a1" * 32}, "has a head, which a language model lacks: expected null"),
        (SECOND, {"embedding": EMBEDDING}, "has an embedding, which a language model lacks: exp"),
        (ENCODER, {"embedding": 3}, "embedding is 3, expected an object, or null"),
        (ENCODER, {"embedding": [EMBEDDING]}, r"embedding is \[{.*, expected an object, or null"),
        (SECOND, {"templates": []}, r"templates is \[\], expected a list of texts, at least one"),
        (SECOND, {"choices": []}, "has 0 choices for 2 labels: expected one each"),
        (SECOND, {"treads": 1}, "has 'treads', which no task file has; did you mean 'threads'"),
        (ENCODER, {"head": None}, "has no 'head', which an encoder needs: expected 64 hexa"),
        (ENCODER, {"head": "A1" * 32}, "head is 'A1A1.*, expected 64 hexadecimal digits"),
        (ENCODER, {"head": "a1" * 33}, "head is 'a1a1.*, expected 64 hexadecimal digits"),
        (ENCODER, {"templates": ["a", "b"]}, "templates has 2, expected one for an encoder, or no"),
        (ENCODER, {"templates": ["{{ text"]}, r"template 'templates\[0\]'.*line 1"),
        (ENCODER, {"choices": ["one"]}, "has 1 choices for 2 labels: expected one each"),
        (ENCODER, {"chat": True}, "chat is True, expected false for an encoder"),
        (ENCODER, {"upper_blocks": 2}, "upper_blocks is 2, expected null for an encoder"),
        (ENCODER, {"engine": "language-model"}, "templates is|has a head"),
    ],
    ids=str,
)
def test_what_a_file_of_the_second_format_may_not_hold_is_named(good, changes, message):
    with pytest.raises(BrokenFileError, match=rf"^a\.json: .*{message}") as raised:
        read(good, **changes)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "gpt"}, r"engine is 'gpt', expected 'language-model' or 'encoder'"),
        ({"name": 3}, r"name is 3, expected a text of at most 4,096 characters, or null"),
        ({"name": "n" * 4097}, r"name is 'nnn.*, expected a text of at most 4,096"),
        ({"accuracy": 1.01}, r"accuracy is 1.01, expected a number, 0 to 1"),
        ({"accuracy": -0.1}, r"accuracy is -0.1, expected a number, 0 to 1"),
        ({"accuracy": None}, r"accuracy is None, expected a number"),
        ({"accuracy": True}, r"accuracy is True, expected a number"),
        ({"error": -0.1}, r"error is -0.1, expected a number, at least 0"),
        ({"error": "0"}, r"error is '0', expected a number, at least 0"),
        ({"note": None}, r"note is None, expected a text"),
        ({"note": "n" * 1001}, r"note is 'nnn.*, expected a text of at most 1,000"),
    ],
    ids=str,
)
def test_a_wrong_value_of_a_candidate_is_named_with_its_place(changes, message):
    with pytest.raises(BrokenFileError, match=rf"^a\.json: selection\[1\]\.{message}"):
        read(SECOND, selection=[SEEN, {**SEEN, **changes}])


def test_a_key_that_a_candidate_lacks_or_has_too_many_is_named():
    for name in SEEN:
        rest = {key: value for key, value in SEEN.items() if key != name}
        with pytest.raises(BrokenFileError, match=rf"selection\[0\] has no '{name}', expected"):
            read(SECOND, selection=[rest])
    with pytest.raises(BrokenFileError, match=r"\[0\] has 'nota', .*did you mean 'note'"):
        read(SECOND, selection=[{**SEEN, "nota": ""}])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooling": 3}, "pooling is 3, expected a text"),
        ({"pooling": ["cls", "mean"]}, r"pooling is \['cls', 'mean'\], expected a text"),
        ({"normalize": 1}, "normalize is 1, expected true or false"),
        ({"max_length": 0}, "max_length is 0, expected a whole number, at least 1"),
        ({"max_length": 256.0}, "max_length is 256.0, expected a whole number"),
        ({"max_length": True}, "max_length is True, expected a whole number"),
        ({"max_length": None}, "max_length is None, expected a whole number"),
        ({"prompt": None}, "prompt is None, expected a text"),
        ({"prompt_tokens": -1}, "prompt_tokens is -1, expected a whole number, at least 0"),
        ({"dense": "C3" * 32}, "dense is 'C3C3.*, expected 64 hexadecimal digits, or null"),
        ({"tokens": None}, "tokens is None, expected 64 hexadecimal digits"),
        ({"tokens": "b2" * 33}, "tokens is 'b2b2.*, expected 64 hexadecimal digits"),
    ],
    ids=str,
)
def test_a_wrong_value_of_an_embedding_is_named_with_its_place(changes, message):
    with pytest.raises(BrokenFileError, match=rf"^a\.json: embedding\.{message}"):
        read(ENCODER, embedding={**EMBEDDING, **changes})


def test_a_key_that_an_embedding_lacks_or_has_too_many_is_named():
    for name in EMBEDDING:
        rest = {key: value for key, value in EMBEDDING.items() if key != name}
        with pytest.raises(BrokenFileError, match=f"embedding has no '{name}', expected"):
            read(ENCODER, embedding=rest)
    with pytest.raises(BrokenFileError, match=r"embedding has 'promt', .*did you mean 'prompt'"):
        read(ENCODER, embedding={**EMBEDDING, "promt": ""})


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
