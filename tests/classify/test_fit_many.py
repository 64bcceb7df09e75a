"""`fit_many`: results as from `fit`, tasks that fail, and what a break leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.paths import TESTS
from support.tfew import hook_count, random_model, state_bits, tiny_llama, word_tokenizer
from test_many_tasks import LISTED_EXPERTS

from ia3 import FewShotClassifier, IA3Config, IA3Error, IA3Model, fit_many
from ia3.adapter.store import WEIGHTS_NAME, Adapter, adapter_files
from ia3.classify.fit_many import RECORDS_NAME
from ia3.files.atomic import write_files
from ia3.tfew import DivergedError, TrainingStep

BILLS = (
    ["charged twice", "send the invoice", "parcel lost", "box in the rain", "wrong bill"],
    ["billing", "billing", "delivery", "delivery", "billing"],
)
MOODS = (
    [
        {"text": "so good", "who": "ann"},
        {"text": "so bad", "who": "bob"},
        {"text": "fine", "who": "cy"},
    ],
    [2, 0, 1],
)
ANSWERS = {0: "bad it is", 1: "neither", 2: "good it is"}
WORDS = sorted(
    {
        *" ".join([*BILLS[0], "billing delivery : Category by", *ANSWERS.values()]).split(),
        *" ".join(f"{e['text']} {e['who']}" for e in MOODS[0]).split(),
    }
)
NEW = ["lost in the rain", "charged wrong"]


def tiny_classifier(**settings: Any) -> FewShotClassifier:
    """Of a tiny model, the same each time."""
    settings = {
        "model": MODEL,
        "tokenizer": TOKENIZER,
        "steps": 4,
        "learning_rate": 3e-2,
        **settings,
    }
    return FewShotClassifier(**settings)


MODEL, TOKENIZER = tiny_llama(), word_tokenizer(WORDS)


def moods(**settings: Any) -> FewShotClassifier:
    return tiny_classifier(choices=ANSWERS, template="{{ text }} by {{ who }} :", **settings)


def difference(found: FewShotClassifier, expected: FewShotClassifier) -> float:
    a, b = found.adapter_.vectors, expected.adapter_.vectors
    assert a.keys() == b.keys()
    a, b = (torch.cat([v[name].flatten() for name in sorted(v)]) for v in (a, b))
    return float((a - b).norm() / b.norm())


def assert_alike(found: FewShotClassifier, expected: FewShotClassifier) -> None:
    assert difference(found, expected) < 1e-5
    assert found.settings_ == expected.settings_
    for name in ("classes_", "choices_", "templates_", "fields_"):
        assert list(getattr(found, name)) == list(getattr(expected, name))
    assert found.adapter_.config == expected.adapter_.config
    assert found.adapter_.base == expected.adapter_.base
    assert [s.loss for s in found.history_] == pytest.approx(
        [s.loss for s in expected.history_], rel=1e-4
    )
    examples = MOODS[0] if "who" in found.fields_ else NEW
    torch.testing.assert_close(
        torch.from_numpy(found.predict_proba(examples)),
        torch.from_numpy(expected.predict_proba(examples)),
        rtol=0,
        atol=1e-5,
    )


# -- as fit ----------------------------------------------------------------------------------------


def test_classifiers_are_those_that_fit_gives() -> None:
    before = state_bits(MODEL), hook_count(MODEL)
    begin = tiny_classifier(seed=5).fit(*BILLS).adapter_
    settings = {
        "bills": tiny_classifier(seed=1),
        "moods": moods(steps=20),
        "other_rate": tiny_classifier(
            learning_rate=1e-2, template=["{{ text }} :", "in {{ text }}"]
        ),
        "goes_on": tiny_classifier(init_from=begin, steps=3),
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
        assert_alike(fitted.classifiers[name], classifier.fit(*data[name]))
        assert [s for n, s in steps if n == name] == fitted.classifiers[name].history_
    bits, hooks = before
    torch.testing.assert_close(state_bits(MODEL), bits, rtol=0, atol=0)
    assert hook_count(MODEL) == hooks


def test_one_classifier_is_the_settings_of_all() -> None:
    classifier = tiny_classifier()
    fitted = fit_many({"a": BILLS, "b": (BILLS[0][::-1], BILLS[1])}, classifier)
    assert difference(*fitted.classifiers.values()) > 1e-4
    assert_alike(fitted.classifiers["a"], classifier.fit(*BILLS))


def test_a_task_ends_early() -> None:
    tasks = {"a": BILLS, "b": BILLS}
    fitted = fit_many(tasks, tiny_classifier(), on_step=lambda name, s: name == "a" and s.step == 2)
    assert [len(c.history_) for c in fitted.classifiers.values()] == [2, 4]


# -- failures --------------------------------------------------------------------------------------


def test_tasks_fail_alone(tmp_path: Path) -> None:
    copies = Adapter(IA3Config(target_modules=["q_proj"], modules_to_save=["lm_head"]), {})
    few = IA3Model(tiny_llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    other = few.adapter("default")
    other.vectors = {name: vector[:3] for name, vector in other.vectors.items()}
    settings = {
        "no_file": tiny_classifier(init_from=tmp_path / "missing"),
        "misfit": tiny_classifier(init_from=other),
        "copies": tiny_classifier(init_from=copies),
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
        "copies": "lm_head",
        "one_label": "all labels are 'x'",
        "no_words": "'delivery'",
        "rate": "learning_rate is -1",
        "template": "who",
        "word": "'str'",
        "blocked": "NotADirectoryError",
    }.items():
        assert message in str(fitted.failures[name])
    assert_alike(fitted.classifiers["good"], settings["good"].fit(*BILLS))
    found = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert found == ["blocked", "good", RECORDS_NAME]


def test_data_of_no_use_fails_alone() -> None:
    texts, labels = BILLS
    bad: dict[str, tuple[Any, str]] = {
        "no_texts": ((None, labels), "texts is None (NoneType), expected a list of texts"),
        "number_of_texts": ((5, labels), "texts is 5 (int)"),
        "no_labels": ((texts, None), "labels is None (NoneType), expected a list of labels"),
        "one_label": ((texts, 5), "labels is 5 (int)"),
        "one_label_in_an_array": ((texts, np.array(5)), "labels is 5"),
        "letters": ((texts, "abcab"), "labels is one str"),
        "nothing": (None, "the data is of type NoneType, expected a pair of texts and labels"),
        "three": ((*BILLS, 1), "the data is of type tuple and length 3"),
        "two_letters": ("ab", "the data is of type str"),
        "mapping": ({"texts": texts, "labels": labels}, "the data is of type dict"),
    }
    data = {name: given for name, (given, _) in bad.items()}
    fitted = fit_many({**data, "good": BILLS}, tiny_classifier(steps=1))
    assert list(fitted.classifiers) == ["good"]
    assert list(fitted.failures) == list(bad)
    for name, (_, message) in bad.items():
        assert message in str(fitted.failures[name])


def test_tasks_within_experts_fail_before_anything_is_trained(tmp_path: Path) -> None:
    model = random_model(LISTED_EXPERTS)
    steps: list[str] = []
    fitted = fit_many(
        {"a": BILLS, "b": BILLS},
        tiny_classifier(model=model),
        out=tmp_path / "out",
        on_step=lambda name, _: steps.append(name),
    )
    assert list(fitted.failures) == ["a", "b"]
    assert "within experts" in str(fitted.failures["a"])
    assert steps == []
    assert hook_count(model) == 0
    assert not (tmp_path / "out").exists()


def test_the_longest_name_is_that_of_a_folder(tmp_path: Path) -> None:
    name = "n" * 240
    assert fit_many({name: BILLS}, tiny_classifier(steps=0), out=tmp_path).failures == {}
    assert (tmp_path / name / WEIGHTS_NAME).is_file()


@pytest.mark.parametrize(
    ("tasks", "classifier", "message"),
    [
        ({}, None, "there are no tasks"),
        ({"a/b": BILLS}, None, "'a/b'"),
        ({"..": BILLS}, None, "'..'"),
        ({3: BILLS}, None, "3"),
        ({"n" * 241: BILLS}, None, "has 241 bytes, expected 240 at most"),
        ({"ü" * 121: BILLS}, None, "has 242 bytes"),
        ({"moods": BILLS}, {"mood": tiny_classifier()}, "'moods'; did you mean 'mood'"),
        (
            {"a": BILLS},
            {"a": tiny_classifier(), "b": tiny_classifier()},
            "no task for classifier 'b'",
        ),
        (
            {"a": BILLS, "b": BILLS},
            {"a": tiny_classifier(), "b": tiny_classifier(model=tiny_llama(1))},
            "one model",
        ),
    ],
)
def test_what_cannot_be_begun_is_refused(
    tasks: Any, classifier: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(IA3Error, match=message.replace(".", r"\.")):
        fit_many(tasks, classifier, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- breaks ----------------------------------------------------------------------------------------

CHILD = """
import sys, time
from test_fit_many import long_and_short
from ia3 import fit_many

def on_step(name, step):
    print(name, step.step, flush=True)
    time.sleep(0.05)

fit_many(*long_and_short(), out=sys.argv[1], on_step=on_step)
"""


def long_and_short() -> tuple[dict[str, Any], dict[str, FewShotClassifier]]:
    """Tasks of which one ends early, and their settings."""
    settings = {
        "short": tiny_classifier(steps=2),
        "moods": moods(steps=20),
        "long": tiny_classifier(steps=20),
    }
    return {"short": BILLS, "moods": MOODS, "long": BILLS}, settings


def test_finished_tasks_are_not_trained_again_after_a_kill(tmp_path: Path) -> None:
    out = tmp_path / "out"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    arguments = [sys.executable, "-c", CHILD, str(out)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.split() == ["long", "4"]:
                process.send_signal(signal.SIGKILL)
                break
    assert (out / "short" / WEIGHTS_NAME).is_file()
    assert not (out / "long").exists()
    written = (out / "short" / WEIGHTS_NAME).stat().st_mtime_ns
    data, settings = long_and_short()
    steps: list[str] = []
    fitted = fit_many(data, settings, out=out, on_step=lambda name, _: steps.append(name))
    assert set(steps) == {"moods", "long"}
    assert (out / "short" / WEIGHTS_NAME).stat().st_mtime_ns == written
    for name, classifier in settings.items():
        assert_alike(fitted.classifiers[name], classifier.fit(*data[name]))
        saved = FewShotClassifier.load(out / name, model=MODEL, tokenizer=TOKENIZER)
        assert difference(saved, fitted.classifiers[name]) == 0


def test_other_data_or_settings_are_trained_again(tmp_path: Path) -> None:
    def trained(data: Any, **settings: Any) -> set[str]:
        steps: set[str] = set()
        fit_many(
            {"a": BILLS, "b": data},
            {"a": tiny_classifier(), "b": tiny_classifier(**settings)},
            out=tmp_path,
            on_step=lambda name, _: steps.add(name),
        )
        return steps

    assert trained(BILLS) == {"a", "b"}
    assert trained(BILLS) == set()
    # Memory is the machine's matter.
    assert trained(BILLS, max_tokens=64) == set()
    assert trained(BILLS, steps=3) == {"b"}
    assert trained((BILLS[0], BILLS[1][::-1]), steps=3) == {"b"}
    assert trained(BILLS, choices={"billing": "bill", "delivery": "parcel"}) == {"b"}
    begin = tiny_classifier(steps=2).fit(*BILLS).adapter_
    assert trained(BILLS, init_from=begin) == {"b"}
    write_files(tmp_path / "begin", adapter_files(begin))
    assert trained(BILLS, init_from=tmp_path / "begin") == set()
    (tmp_path / "a" / WEIGHTS_NAME).write_bytes(b"cut off")
    assert trained(BILLS, init_from=begin) == {"a"}
    records = [json.loads(line) for line in (tmp_path / RECORDS_NAME).read_text().splitlines()]
    assert [record["task"] for record in records].count("a") == 2


def test_what_was_written_over_is_trained_again(tmp_path: Path) -> None:
    settings = {"a": tiny_classifier(), "untuned": tiny_classifier(steps=0), "b": moods()}
    data = {"a": BILLS, "untuned": BILLS, "b": MOODS}

    def trained() -> set[str]:
        steps: set[str] = set()
        fitted = fit_many(data, settings, out=tmp_path, on_step=lambda name, _: steps.add(name))
        for name, classifier in settings.items():
            assert_alike(fitted.classifiers[name], classifier.fit(*data[name]))
            saved = FewShotClassifier.load(tmp_path / name, model=MODEL, tokenizer=TOKENIZER)
            assert difference(saved, fitted.classifiers[name]) == 0
            assert saved.templates_ == fitted.classifiers[name].templates_
        return steps

    assert trained() == {"a", "b"}
    # As a training leaves it that is killed before it can record what it has saved.
    tiny_classifier(learning_rate=1e-2).fit(*BILLS).save(tmp_path / "a")
    # All vectors are ones, whatever the prompts.
    tiny_classifier(steps=0, template="{{ text }} :").fit(*BILLS).save(tmp_path / "untuned")
    assert trained() == {"a"}
    assert trained() == set()
    # Earlier versions recorded nothing of the files.
    records = [json.loads(line) for line in (tmp_path / RECORDS_NAME).read_text().splitlines()]
    lines = (json.dumps({k: v for k, v in record.items() if k != "files"}) for record in records)
    (tmp_path / RECORDS_NAME).write_text("".join(f"{line}\n" for line in lines))
    assert trained() == {"a", "b"}
