"""`fit` and `fit_many` in several processes: the classifiers of one, on all of them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classify.test_self_training import UNLABELLED
from support.processes import in_forks, results_of
from support.sentences import LABELS, TEXTS, bert, tokenizer
from support.tfew import tiny_llama
from torch import distributed

from ia3 import FewShotClassifier, fit_many
from ia3.base.processes import processes
from ia3.classify.estimator import Fit
from ia3.classify.fit_many import RECORDS_NAME
from ia3.errors import IA3Error
from ia3.files.saved import WEIGHTS_NAME

NEW = ["a charge", "the van", "is the bill paid", "x y z"]
LISTS = [["billing"], ["billing", "late"], [], ["billing", "late"]] + [["delivery"]] * 4


def encoder(**settings: Any) -> FewShotClassifier:
    return FewShotClassifier(bert(), tokenizer=tokenizer(), **{"steps": 10, **settings})


def ranking(**settings: Any) -> FewShotClassifier:
    return FewShotClassifier(tiny_llama(), tokenizer=tokenizer(), **{"steps": 10, **settings})


def either(folders: dict[str, str], **settings: Any) -> FewShotClassifier:
    return FewShotClassifier(**{**folders, "steps": 10, **settings})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A small encoder and a small language model."""
    found = {}
    for name, model in (("encoder", bert()), ("language_model", tiny_llama())):
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        found[name] = str(folder)
    return found


def fitted(make: Callable[[], FewShotClassifier], *data: Any, **more: Any) -> tuple[Fit, Any, Any]:
    classifier = make().fit(*data, **more)
    return classifier._fit, classifier.predict_proba(NEW), classifier.to_files()


def check_near(found: tuple[Fit, Any, Any], expected: tuple[Fit, Any, Any]) -> None:
    one, other = found[0], expected[0]
    torch.testing.assert_close(one.adapter.vectors, other.adapter.vectors, rtol=0, atol=1e-5)
    # scikit-learn's regression ends where its steps are small: 1e-7 in a text moves it by 1e-2.
    np.testing.assert_allclose(found[1], expected[1], atol=1e-2)
    for name in ("engine", "classes", "choices", "templates", "candidates", "settings"):
        assert getattr(one, name) == getattr(other, name)
    assert [step.loss for step in one.history] == pytest.approx(
        [step.loss for step in other.history], rel=1e-3
    )


slow = pytest.mark.slow
WAYS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "encoder": (encoder, (TEXTS, LABELS)),
    "several labels": (partial(encoder, multilabel=True), (TEXTS, LISTS)),
    "language model": (ranking, (TEXTS, LABELS)),
    "weights": (partial(ranking, class_weight="balanced"), (TEXTS[:6], LABELS[:6])),
    "an encoder's weights": (partial(encoder, class_weight={"billing": 3.0}), (TEXTS, LABELS)),
    "untuned": (partial(ranking, steps=0), (TEXTS, LABELS)),
    "untrained encoder": (partial(encoder, steps=0), (TEXTS, LABELS)),
    "one text a class": (encoder, ([TEXTS[0], TEXTS[-1]], [LABELS[0], LABELS[-1]])),
}


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=slow)])
@pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, id=name, marks=() if name == "encoder" else slow)
        for name, way in WAYS.items()
    ],
)
def test_a_fit_is_that_of_one_process_and_the_same_on_all(tmp_path, way, count):
    make, data = way
    found = results_of(lambda: fitted(make, *data), tmp_path, count)
    check_near(found[0], fitted(make, *data))
    for other in found[1:]:
        assert other[2] == found[0][2]
        assert np.array_equal(other[1], found[0][1])


@slow
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("repeated", [1, 4])
def test_auto_chooses_as_one_process_does(tmp_path, folders, count, repeated):
    data = TEXTS * repeated, LABELS * repeated
    make = partial(either, folders)
    found = results_of(lambda: fitted(make, *data), tmp_path, count)
    check_near(found[0], fitted(make, *data))
    # Of few texts it asks the encoder trained too, which is then the work of all processes.
    assert len(found[0][0].candidates) == {1: 3, 4: 2}[repeated]
    assert {each[0].engine for each in found} == {found[0][0].engine}


@slow
def test_unlabelled_texts_are_learned_from_as_in_one_process(tmp_path):
    work = partial(fitted, partial(encoder, steps=5), TEXTS, LABELS, unlabelled=UNLABELLED)
    found = results_of(work, tmp_path)
    expected = work()
    assert [str(each) for each in found[0][0].candidates] == list(map(str, expected[0].candidates))
    assert found[0][2] == found[1][2]
    np.testing.assert_allclose(found[0][1], expected[1], atol=1e-2)


@pytest.mark.parametrize(
    "change",
    [
        lambda rank: ((TEXTS[rank:], LABELS[rank:]), {}),
        lambda rank: ((TEXTS, LABELS), {"seed": rank}),
        lambda rank: ((TEXTS, [*LABELS[:-1], ["other", "delivery"][rank]]), {}),
    ],
)
@pytest.mark.parametrize("make", [encoder, ranking])
def test_other_data_or_settings_on_one_process_are_said_before_training(tmp_path, make, change):
    def work():
        data, settings = change(processes().rank)
        make(**settings).fit(*data, on_step=lambda step: pytest.fail("trained"))

    for error in in_forks(work, tmp_path):
        assert type(error) is IA3Error
        assert "of process 1 are not those of process 0; give each the same data" in str(error)


@pytest.mark.parametrize("make", [encoder, ranking])
@pytest.mark.parametrize("given", [{"checkpoints": "checkpoints"}, {"unlabelled": UNLABELLED}])
def test_an_argument_on_one_process_alone_is_an_error(tmp_path, make, given, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def work():
        make().fit(TEXTS, LABELS, **(given if processes().is_first else {}))

    for error in in_forks(work, tmp_path):
        (name,) = given
        assert f"were given different things: {name} of process 1" in str(error)


def test_other_unlabelled_texts_on_one_process_are_an_error(tmp_path):
    def work():
        texts = [*UNLABELLED, ["the van", "the bill"][processes().rank]]
        encoder().fit(TEXTS, LABELS, unlabelled=texts)

    for error in in_forks(work, tmp_path):
        assert "unlabelled of process 1 are not those of process 0" in str(error)


def test_both_engines_of_auto_are_compared(tmp_path, folders):
    def work():
        either(folders, seed=processes().rank).fit(TEXTS, LABELS)

    for error in in_forks(work, tmp_path):
        assert "were given different things: seed of process 1" in str(error)


# -- many tasks ------------------------------------------------------------------------------------

TASKS = {
    "queue": (TEXTS, LABELS),
    "mood": (TEXTS, [1, 0] * 4),
    "bad": (TEXTS, [1] * 8),
    "few": (TEXTS[2:6], LABELS[2:6]),
    "long": ([*TEXTS, "a " * 40], [*LABELS, "other"]),
}


def fitted_many(out: Path | None = None, tasks: Any = TASKS, **more: Any) -> Any:
    taken: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = fit_many(
            tasks, encoder(), out=out, on_step=lambda name, step: taken.append(name), **more
        )
    files = {name: each.to_files() for name, each in result.classifiers.items()}
    failures = {name: str(error) for name, error in result.failures.items()}
    said = [str(warning.message) for warning in caught if warning.category is UserWarning]
    return files, failures, set(taken), [text for text in said if text.startswith("task")]


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=slow), pytest.param(7, marks=slow)])
def test_each_process_fits_its_own_tasks_to_the_last_bit(tmp_path, count):
    expected = fitted_many()
    found = results_of(partial(fitted_many, tmp_path / "out"), tmp_path, count)
    for files, failures, _, _ in found:
        assert files == expected[0]
        assert list(files) == list(expected[0])
        assert failures == expected[1]
    shares = [taken for _, _, taken, _ in found]
    assert set.union(*shares) == set(expected[0])
    assert sum(map(len, shares)) == len(expected[0])
    # Of the tasks of others too, once.
    assert [said for *_, said in found] == [expected[3], *[[]] * (count - 1)]
    assert any("task 'long'" in text for text in expected[3])
    for name, files in expected[0].items():
        saved = (tmp_path / "out" / name / WEIGHTS_NAME).read_bytes()
        assert saved == files[WEIGHTS_NAME]
    assert len((tmp_path / "out" / RECORDS_NAME).read_text().splitlines()) == len(expected[0])
    again = results_of(partial(fitted_many, tmp_path / "out"), tmp_path, 2)
    assert [taken for _, _, taken, _ in again] == [set(), set()]


def test_the_first_machine_has_all_classifiers_where_each_has_a_disk_of_its_own(tmp_path):
    def work():
        return fitted_many(tmp_path / f"machine-{processes().rank}")[0]

    # One that was fitted before with other data, and is another's now.
    fitted_many(tmp_path / "machine-0", {"long": TASKS["queue"]})
    files, _ = results_of(work, tmp_path)
    for name, of_task in files.items():
        saved = (tmp_path / "machine-0" / name / WEIGHTS_NAME).read_bytes()
        assert saved == of_task[WEIGHTS_NAME]


def test_other_tasks_on_one_process_are_an_error(tmp_path):
    def work():
        fitted_many(tasks=dict([*TASKS.items()][processes().rank :]))

    for error in in_forks(work, tmp_path):
        assert "the tasks of process 1 are not those of process 0" in str(error)


@slow
def test_one_that_has_no_task_left_waits_longer_than_a_sum_may_take(tmp_path):
    def work():
        store = distributed.FileStore(str(tmp_path / "impatient"), 2)
        rank = processes().rank
        distributed.destroy_process_group()
        distributed.init_process_group(
            "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=5)
        )
        gather = processes().patient_gather()
        time.sleep(8 * rank)
        return gather(rank)

    assert results_of(work, tmp_path) == [[0, 1], [0, 1]]
