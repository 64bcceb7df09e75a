"""`fit_many`: results as from `fit`, tasks that fail, and what a break leaves."""

import gc
import json
import shutil
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from support.heads import HEAD_NAME, save_encoder
from support.kills import calls_of, ended, killed_before, started
from support.pairs import same_vectors
from support.tfew import child_environment, hook_count, state_bits, tiny_llama, word_tokenizer

import ia3.classify.estimator
from ia3 import FewShotClassifier, IA3Config, IA3Error, IA3Model, fit_many
from ia3.adapter.files import Adapter, adapter_files, write_saved
from ia3.classify.fit_many import RECORDS_NAME
from ia3.classify.language_model import RankingTask
from ia3.errors import BrokenFileError
from ia3.files.atomic import write_files
from ia3.files.saved import WEIGHTS_NAME
from ia3.tfew import DivergedError, TrainingStep

BILLS = (
    ["charged twice", "send the invoice", "parcel lost", "box in the rain", "wrong bill"],
    ["billing", "billing", "delivery", "delivery", "billing"],
)
ROWS = (("so good", "ann"), ("so bad", "bob"), ("fine", "cy"))
MOODS = ([{"text": text, "who": who} for text, who in ROWS], [2, 0, 1])
ANSWERS = {0: "bad it is", 1: "neither", 2: "good it is"}
SPOKEN = [*BILLS[0], *sum(ROWS, ()), *ANSWERS.values(), "billing delivery : Category by"]
WORDS = sorted(set(" ".join(SPOKEN).split()))
NEW = ["lost in the rain", "charged wrong"]
MODEL, TOKENIZER = tiny_llama(), word_tokenizer(WORDS)


def tiny_classifier(**settings):
    defaults = {"model": MODEL, "tokenizer": TOKENIZER, "steps": 4, "learning_rate": 3e-2}
    return FewShotClassifier(**defaults | settings)


def moods(**settings):
    return tiny_classifier(choices=ANSWERS, template="{{ text }} by {{ who }} :", **settings)


def assert_same(found: FewShotClassifier, expected: FewShotClassifier) -> None:
    """Two fitted classifiers are the same, to the last bit."""
    assert same_vectors(found, expected)
    assert found.adapter_.config == expected.adapter_.config
    assert found.adapter_.base == expected.adapter_.base
    assert found.classes_.tolist() == expected.classes_.tolist()
    for name in ("history_", "settings_", "choices_", "templates_", "fields_"):
        assert getattr(found, name) == getattr(expected, name)
    examples = MOODS[0] if "who" in found.fields_ else NEW
    assert np.array_equal(found.predict_proba(examples), expected.predict_proba(examples))


def trained_head() -> Adapter:
    """An adapter with a whole module of its own."""
    config = IA3Config(target_modules=["q_proj"], modules_to_save=["lm_head"])
    return IA3Model(tiny_llama(), config).adapter("default")


# -- as fit ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_classifiers_are_those_that_fit_gives():
    before = state_bits(MODEL), hook_count(MODEL)
    begin = tiny_classifier(seed=5).fit(*BILLS).adapter_
    settings = {
        "bills": tiny_classifier(seed=1),
        "moods": moods(steps=20),
        "two_templates": tiny_classifier(template=["{{ text }} :", "in {{ text }}"]),
        "goes_on": tiny_classifier(init_from=begin, steps=3),
        "head": tiny_classifier(init_from=trained_head()),
        "untuned": tiny_classifier(steps=0),
        "upper": tiny_classifier(upper_blocks=1),
    }
    data = dict.fromkeys(settings, BILLS) | {"moods": MOODS}
    steps: list[tuple[str, TrainingStep]] = []
    fitted = fit_many(data, settings, on_step=lambda name, step: steps.append((name, step)))
    assert fitted.failures == {}
    assert list(fitted.classifiers) == list(settings)
    for name, classifier in settings.items():
        assert not hasattr(classifier, "adapter_")
        assert_same(fitted.classifiers[name], classifier.fit(*data[name]))
        assert [s for n, s in steps if n == name] == fitted.classifiers[name].history_
    torch.testing.assert_close(state_bits(MODEL), before[0], rtol=0, atol=0)
    assert hook_count(MODEL) == before[1]


def test_one_classifier_is_the_settings_of_all():
    data = {"a": BILLS, "b": (BILLS[0][::-1], BILLS[1])}
    fitted = fit_many(data, tiny_classifier(), max_tokens=64).classifiers
    for name in data:
        assert_same(fitted[name], tiny_classifier(max_tokens=64).fit(*data[name]))
    assert not same_vectors(*fitted.values())


def test_each_task_asks_once_what_its_model_is(monkeypatch):
    # Of a model on the hub, that is a request.
    asked = []
    is_encoder = ia3.classify.estimator.is_sentence_encoder
    monkeypatch.setattr(
        ia3.classify.estimator,
        "is_sentence_encoder",
        lambda model: asked.append(model) or is_encoder(model),
    )
    fitted = fit_many({"a": BILLS, "b": BILLS}, tiny_classifier(steps=0))
    assert not fitted.failures
    assert asked == [MODEL, MODEL]


def test_a_task_ends_early():
    after: list[dict[str, torch.Tensor]] = []

    def vectors_now(step: TrainingStep) -> None:
        vectors = [(n, p) for n, p in MODEL.named_parameters() if ".ia3_l." in n]
        after.append({n.split(".ia3_l.")[0]: p.detach().clone() for n, p in vectors})

    tiny_classifier().fit(*BILLS, on_step=vectors_now)
    data, end = {"a": BILLS, "b": BILLS}, ("a", 2)
    fitted = fit_many(data, tiny_classifier(), on_step=lambda name, s: (name, s.step) == end)
    a, b = fitted.classifiers.values()
    assert (len(a.history_), len(b.history_)) == (2, 4)
    torch.testing.assert_close(a.adapter_.vectors, after[1], rtol=0, atol=0)


def test_one_task_at_a_time_is_in_memory():
    def prepared(*_: object) -> None:
        assert sum(type(thing) is RankingTask for thing in gc.get_objects()) == 1

    tasks = dict.fromkeys("abc", BILLS)
    assert fit_many(tasks, tiny_classifier(steps=1), on_step=prepared).failures == {}


# -- failures --------------------------------------------------------------------------------------


def test_tasks_fail_alone(tmp_path):
    other = IA3Model(tiny_llama(), IA3Config(target_modules=["q_proj"])).adapter("default")
    other.vectors = {name: vector[:3] for name, vector in other.vectors.items()}
    settings = {
        "no_file": tiny_classifier(init_from=tmp_path / "missing"),
        "misfit": tiny_classifier(init_from=other),
        "good": tiny_classifier(),
        "one_label": tiny_classifier(),
        "no_words": tiny_classifier(choices={"billing": "billing"}),
        "wild": tiny_classifier(learning_rate=1e30),
        "rate": tiny_classifier(learning_rate=-1),
        "template": tiny_classifier(template="{{ who }}"),
        "word": tiny_classifier(steps="3"),
        "blocked": tiny_classifier(),
    }
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "blocked").write_text("a file")
    data = dict.fromkeys(settings, BILLS) | {"one_label": (["a", "b"], ["x", "x"])}
    fitted = fit_many(data, settings, out=tmp_path / "out")
    assert list(fitted.classifiers) == ["good"]
    assert list(fitted.failures) == [name for name in settings if name != "good"]
    assert isinstance(fitted.failures["wild"], DivergedError)
    for name, message in {
        "no_file": "missing",
        "misfit": "init_from: ",
        "one_label": "all labels are 'x'",
        "no_words": "'delivery'",
        "rate": "learning_rate is -1",
        "template": "who",
        "word": "steps is '3' (str), expected a whole number",
        "blocked": "NotADirectoryError",
    }.items():
        assert message in str(fitted.failures[name])
    assert_same(fitted.classifiers["good"], settings["good"].fit(*BILLS))
    found = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert found == ["blocked", "good", RECORDS_NAME]


def test_data_of_no_use_fails_alone():
    texts, labels = BILLS
    bad = {
        "no_texts": ((None, labels), "texts is None (NoneType), expected a list of texts"),
        "no_labels": ((texts, None), "labels is None: a classifier requires y"),
        "one_label_in_an_array": ((texts, np.array(5)), "labels is array(5)"),
        "letters": ((texts, "abcab"), "labels is one str"),
        "nothing": (None, "the data is a NoneType, expected a pair of texts and labels"),
        "three": ((*BILLS, 1), "the data is a tuple"),
        "two_letters": ("ab", "the data is a str"),
        "mapping": ({"texts": texts, "labels": labels}, "the data is a dict"),
    }
    data = {name: given for name, (given, _) in bad.items()}
    fitted = fit_many({**data, "good": BILLS}, tiny_classifier(steps=1))
    assert list(fitted.classifiers) == ["good"]
    assert list(fitted.failures) == list(bad)
    for name, (_, message) in bad.items():
        assert message in str(fitted.failures[name])


def test_warnings_name_the_task():
    numerals = word_tokenizer([*WORDS, "0", "1", "2"])
    with pytest.warns(UserWarning, match="task 'moods': the labels .* are ranked as these words"):
        fit_many({"moods": MOODS}, tiny_classifier(steps=0, tokenizer=numerals))


@pytest.mark.parametrize(
    ("tasks", "classifier", "message"),
    [
        ({}, None, "there are no tasks"),
        ({"a/b": BILLS}, None, "'a/b'"),
        ({"..": BILLS}, None, "'..'"),
        ({3: BILLS}, None, "3"),
        ({"\udcff": BILLS}, None, "expected a text"),
        ({"moods": BILLS}, {"mood": tiny_classifier()}, "'moods'; did you mean 'mood'"),
        ({"a": BILLS}, dict.fromkeys("ab", tiny_classifier()), "no task for classifier 'b'"),
        (
            {"a": BILLS, "b": BILLS},
            {"a": tiny_classifier(), "b": tiny_classifier(model=tiny_llama(1))},
            "one language model and one encoder",
        ),
    ],
)
def test_what_cannot_be_begun_is_refused(tasks, classifier, message, tmp_path):
    with pytest.raises(IA3Error, match=message.replace(".", r"\.")):
        fit_many(tasks, classifier, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(IA3Error, match="max_tokens is 0, expected at least 1"):
        fit_many({"a": BILLS}, tiny_classifier(), max_tokens=0)


# -- breaks ----------------------------------------------------------------------------------------

CHILD = """
import sys, time
from classify.test_fit_many import tasks_and_settings
from ia3 import fit_many

def on_step(name, step):
    print(name, step.step, flush=True)
    time.sleep(0.05)

fit_many(*tasks_and_settings(), out=sys.argv[1], on_step=on_step)
"""


def tasks_and_settings():
    first, untuned = tiny_classifier(steps=2), tiny_classifier(steps=0)
    settings = {"first": first, "second": moods(steps=20), "untuned": untuned}
    return {"first": BILLS, "second": MOODS, "untuned": BILLS}, settings


def fitted_again(out):
    """Fit these tasks and check all results; the names of those that were trained."""
    data, settings = tasks_and_settings()
    steps: set[str] = set()
    fitted = fit_many(data, settings, out=out, on_step=lambda name, _: steps.add(name))
    assert list(fitted.classifiers) == list(settings)
    for name, classifier in fitted.classifiers.items():
        assert_same(classifier, settings[name].fit(*data[name]))
        saved = FewShotClassifier.load(out / name, model=MODEL, tokenizer=TOKENIZER)
        assert same_vectors(saved, classifier)
        assert saved.templates_ == classifier.templates_
    return steps


@pytest.mark.slow
def test_finished_tasks_are_not_trained_again_after_a_kill(tmp_path):
    arguments = [sys.executable, "-c", CHILD, str(tmp_path)]
    given = {"stdout": subprocess.PIPE, "text": True, "env": child_environment()}
    with subprocess.Popen(arguments, **given) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.split() == ["second", "4"]:
                process.send_signal(signal.SIGKILL)
                break
    assert not (tmp_path / "second").exists()
    written = (tmp_path / "first" / WEIGHTS_NAME).stat().st_mtime_ns
    assert fitted_again(tmp_path) == {"second"}
    assert (tmp_path / "first" / WEIGHTS_NAME).stat().st_mtime_ns == written


@pytest.mark.slow
def test_other_data_or_settings_are_trained_again(tmp_path):
    def trained(data, **settings):
        steps = set()
        classifiers = {"a": tiny_classifier(), "b": tiny_classifier(**settings)}
        tasks = {"a": BILLS, "b": data}
        fit_many(tasks, classifiers, out=tmp_path, on_step=lambda name, _: steps.add(name))
        return steps

    assert trained(BILLS) == {"a", "b"}
    assert trained(BILLS) == set()
    # A machine with less memory goes on where another one stopped.
    assert trained(BILLS, max_tokens=64) == set()
    # No text is longer, but what is predicted later may be.
    assert trained(BILLS, max_words=None) == {"b"}
    assert trained(BILLS, steps=3) == {"b"}
    assert trained((BILLS[0], BILLS[1][::-1]), steps=3) == {"b"}
    assert trained(BILLS, choices={"billing": "bill", "delivery": "parcel"}) == {"b"}
    begin = tiny_classifier(steps=2).fit(*BILLS).adapter_
    assert trained(BILLS, init_from=begin) == {"b"}
    write_files(tmp_path / "begin", adapter_files(begin))
    assert trained(BILLS, init_from=tmp_path / "begin") == set()
    head = trained_head()
    assert trained(BILLS, init_from=head) == {"b"}
    head.copies = {name: value + 0.1 for name, value in head.copies.items()}
    assert trained(BILLS, init_from=head) == {"b"}
    (tmp_path / "a" / WEIGHTS_NAME).write_bytes(b"cut off")
    assert trained(BILLS, init_from=head) == {"a"}
    records = [json.loads(line) for line in (tmp_path / RECORDS_NAME).read_text().splitlines()]
    assert [record["task"] for record in records].count("a") == 2


@pytest.mark.slow
def test_what_was_written_over_is_trained_again(tmp_path):
    assert fitted_again(tmp_path) == {"first", "second"}
    # As a call leaves it that is killed between saving a classifier and recording it.
    tiny_classifier(learning_rate=1e-2).fit(*BILLS).save(tmp_path / "first")
    tiny_classifier(steps=0, template="{{ text }} :").fit(*BILLS).save(tmp_path / "untuned")
    assert fitted_again(tmp_path) == {"first"}
    assert fitted_again(tmp_path) == set()
    save_encoder(tmp_path / "first", 1)
    (tmp_path / "second" / HEAD_NAME).write_bytes(b"another program's")
    assert fitted_again(tmp_path) == {"first", "second"}
    assert not [*tmp_path.rglob(HEAD_NAME)]
    # Records of earlier versions have no hashes of files.
    records = [json.loads(line) for line in (tmp_path / RECORDS_NAME).read_text().splitlines()]
    lines = (json.dumps({k: v for k, v in record.items() if k != "files"}) for record in records)
    (tmp_path / RECORDS_NAME).write_text("".join(f"{line}\n" for line in lines))
    assert fitted_again(tmp_path) == {"first", "second"}


@pytest.mark.slow
def test_several_processes_fit_into_one_folder(tmp_path):
    """The same tasks, and one that has other settings in one of them."""
    rates = {"a": (3e-2, 3e-2), "b": (3e-2, 1e-2)}

    def fit(number):
        settings = {
            name: tiny_classifier(steps=2, learning_rate=of[number]) for name, of in rates.items()
        }
        return fit_many(dict.fromkeys(rates, BILLS), settings, out=tmp_path).classifiers

    processes = [started(partial(fit, number)) for number in (0, 1)]
    assert [ended(process) for process in processes] == [0, 0]
    for number in (0, 1):
        for name, of in rates.items():
            expected = tiny_classifier(steps=2, learning_rate=of[number]).fit(*BILLS)
            assert_same(fit(number)[name], expected)
            saved = FewShotClassifier.load(tmp_path / name, model=MODEL, tokenizer=TOKENIZER)
            assert same_vectors(saved, expected)
    assert {path.name for path in tmp_path.iterdir()} == {*rates, RECORDS_NAME}


def test_what_another_process_has_saved_over_it_is_trained_again(tmp_path, monkeypatch):
    """In the moment between a classifier and its record."""
    task, settings = {"a": BILLS}, tiny_classifier(steps=2)
    other = tiny_classifier(steps=2, learning_rate=1e-2).fit(*BILLS)

    def write_and_write_over(folder, files):
        write_saved(folder, files)
        other.save(folder)

    with monkeypatch.context() as patch:
        patch.setattr("ia3.classify.fit_many.write_saved", write_and_write_over)
        fit_many(task, settings, out=tmp_path)
    assert_same(fit_many(task, settings, out=tmp_path).classifiers["a"], settings.fit(*BILLS))
    saved = FewShotClassifier.load(tmp_path / "a", model=MODEL, tokenizer=TOKENIZER)
    assert same_vectors(saved, settings)


@pytest.mark.slow
def test_killed_while_it_saves_over_an_older_fit(tmp_path):
    """In some gaps between two calls; what is then in the folder is whole, or fitted again."""
    expected = tiny_classifier(steps=1).fit(*BILLS)

    def fit(steps):
        settings = tiny_classifier(steps=steps)
        return fit_many({"a": BILLS}, settings, out=tmp_path).classifiers["a"]

    fit(0)
    before = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    calls = calls_of(partial(fit, 1))
    for call in range(calls // 6, calls + 1, calls // 6):
        shutil.rmtree(tmp_path)
        for path, content in before.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(content)
        killed_before(call, partial(fit, 1))
        assert_same(fit(1), expected)
        saved = FewShotClassifier.load(tmp_path / "a", model=MODEL, tokenizer=TOKENIZER)
        assert same_vectors(saved, expected)
        assert saved.settings_ == expected.settings_


@pytest.mark.parametrize("history", ["[{}]", "3", "{}", '[{"step": 1}]', "[3]", "null"])
def test_a_record_that_is_none_is_refused(tmp_path, history):
    (tmp_path / RECORDS_NAME).write_text(f'{{"task": "a", "digest": "0", "history": {history}}}\n')
    with pytest.raises(BrokenFileError, match=r"line 1: not a task that was fitted"):
        fit_many({"a": BILLS}, tiny_classifier(), out=tmp_path)
