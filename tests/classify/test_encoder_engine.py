"""`FewShotClassifier` on a sentence encoder."""

from __future__ import annotations

import json
import os
import pickle
import signal
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from support.encoders import change
from support.kills import result_of
from support.pairs import same_vectors
from support.sentences import BILLS, HIDDEN, LABELS, PARCELS, TEXTS, WORDS, bert, tokenizer
from support.snapshots import assert_unchanged, snapshot
from support.tfew import tiny_llama, word_tokenizer
from torch.nn.functional import normalize

from ia3 import FewShotClassifier, IA3Config, IA3Model, fit_many
from ia3.base.encoders import load_encoder
from ia3.errors import BrokenFileError, IA3Error, InvalidTypeError, StateError
from ia3.sentences.embedding import embeddings, tokenized
from ia3.sentences.head import MOST_DRAWS
from ia3.tfew.training.steps import DivergedError, StopTraining

NEW = ["a charge", "the van", "is the bill paid", "x y z"]
MINILM = "all-minilm-l6-v2"


@pytest.fixture
def model():
    return bert()


@pytest.fixture
def make(model):
    """A classifier on the tiny encoder, with few steps."""

    def classifier(**settings):
        given = {"model": model, "tokenizer": tokenizer(), "steps": 4, **settings}
        return FewShotClassifier(**given)

    return classifier


def reloaded(folder, model, **more):
    return FewShotClassifier.load(folder, model=model, tokenizer=tokenizer(), **more)


# -- predictions -----------------------------------------------------------------------------------


def test_probabilities_are_the_softmax_of_the_head_on_adapted_embeddings(make):
    classifier = make().fit(TEXTS, LABELS)
    fresh = bert()
    IA3Model.from_adapter(fresh, classifier.adapter_)
    known = tokenizer()
    head, rows = classifier.head_, []
    for text in NEW:
        with torch.no_grad():
            hidden = fresh(input_ids=torch.tensor([known(text)["input_ids"]])).last_hidden_state[0]
        rows.append(hidden.mean(0).double() @ head.weight.double().T + head.bias.double())
    expected = (torch.stack(rows) / classifier.temperature_).softmax(1).numpy()
    np.testing.assert_allclose(classifier.predict_proba(NEW), expected, atol=1e-4)
    assert classifier.engine_ == "encoder"
    predicted = classifier.predict(NEW)
    assert predicted.tolist() == classifier.classes_[expected.argmax(1)].tolist()
    assert classifier.score(NEW, predicted) == 1


def test_training_learns_its_texts_and_is_recorded(make):
    seen = []
    classifier = make(steps=30).fit(TEXTS, LABELS, on_step=seen.append)
    assert classifier.history_ == seen
    assert np.mean([s.loss for s in seen[-5:]]) < np.mean([s.loss for s in seen[:5]])
    assert classifier.score(TEXTS, LABELS) > 0.8
    assert {vector.dtype for vector in classifier.adapter_.vectors.values()} == {torch.float32}


def test_no_steps_are_the_frozen_encoder_with_a_head(make):
    classifier = make(steps=0).fit(TEXTS, LABELS)
    assert all((vector == 1).all() for vector in classifier.adapter_.vectors.values())
    assert classifier.history_ == []
    assert not np.allclose(
        classifier.predict_proba(NEW), make().fit(TEXTS, LABELS).predict_proba(NEW)
    )


def test_what_is_frozen_is_reported_beside_every_fit(make, tmp_path):
    classifier = make().fit(TEXTS, LABELS)
    (frozen,) = classifier.candidates_
    assert (frozen.engine, frozen.note) == ("encoder", "frozen, held-out folds, 8 texts")
    answers = 8 * MOST_DRAWS * frozen.accuracy
    assert answers == pytest.approx(round(answers))
    classifier.save(tmp_path)
    loaded = reloaded(tmp_path, bert())
    assert loaded.candidates_ == [frozen]


@pytest.mark.parametrize("steps", [0, 3])
def test_the_names_of_labels_are_learned_from_as_texts_of_them(make, steps):
    """Where the labels are words: numbers say nothing of what is in a text."""
    settings = {"steps": steps, "learning_rate": 1e-2}
    named = make(**settings).fit(TEXTS, ["unpaidBill" if a == "billing" else a for a in LABELS])
    assert named.classes_.tolist() == ["delivery", "unpaidBill"]
    numbers = [int(label == "billing") for label in LABELS]
    spelled_out = make(**settings).fit([*TEXTS, "delivery", "unpaid bill"], [*numbers, 0, 1])
    without = make(**settings).fit(TEXTS, numbers)
    np.testing.assert_array_equal(named.predict_proba(NEW), spelled_out.predict_proba(NEW))
    assert same_vectors(named, spelled_out)
    assert np.abs(named.predict_proba(NEW) - without.predict_proba(NEW)).max() > 1e-3
    as_words = make(**settings).fit(TEXTS, [*map(str, numbers)])
    np.testing.assert_array_equal(as_words.predict_proba(NEW), without.predict_proba(NEW))
    # They are asked about no text, and counted as none.
    assert named.candidates_[0].note == "frozen, held-out folds, 8 texts"


def test_names_that_are_the_same_to_the_encoder_say_nothing(make):
    settings = {"steps": 2, "learning_rate": 1e-2}
    numbers = [int(label == "billing") for label in LABELS]
    expected = make(**settings).fit(TEXTS, numbers).predict_proba(NEW)
    # Words that are not in the vocabulary; and numbers in any form.
    for names in (["qqq", "rrr"], ["a_bill", "a bill"], ["0.5", "1.5"], ["-1", "+1"]):
        same = make(**settings).fit(TEXTS, [sorted(names)[number] for number in numbers])
        np.testing.assert_array_equal(same.predict_proba(NEW), expected)


def test_texts_are_predicted_by_themselves_and_progress_is_said(make):
    classifier = make().fit(TEXTS, LABELS)
    done = []
    together = classifier.predict_proba(TEXTS + NEW, progress=done.append)
    assert sum(done) == len(TEXTS + NEW)
    alone = np.concatenate([classifier.predict_proba([text]) for text in TEXTS + NEW])
    np.testing.assert_allclose(together, alone, atol=1e-5)


# -- labels and texts ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels",
    [[1, 0] * 4, np.array([True, False] * 4), ["lostCard", "a_card"] * 4, [3, -1, 7, 3] * 2],
)
def test_labels_of_all_kinds(make, tmp_path, labels):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what the labels are called means nothing to an encoder
        classifier = make(steps=1).fit(TEXTS, labels)
    expected = sorted(set(np.asarray(labels).tolist()))
    assert classifier.classes_.tolist() == expected
    assert {type(label) for label in classifier.predict(NEW).tolist()} == {type(expected[0])}
    classifier.save(tmp_path)
    assert reloaded(tmp_path, bert()).classes_.tolist() == expected


@pytest.mark.parametrize(
    ("texts", "labels"),
    [
        (TEXTS[:2], ["a", "b"]),
        (TEXTS[:3], ["a", "b", "c"]),
        (TEXTS[:5], ["a", "b", "b", "b", "b"]),
        (["a bill"] * 4, ["a", "b", "a", "b"]),
        (["", " "], ["a", "b"]),
    ],
)
def test_few_texts_and_the_same_ones(make, texts, labels):
    classifier = make(steps=2).fit(texts, labels)
    assert len(classifier.candidates_) == 1
    probabilities = classifier.predict_proba([*texts, "", "unknown words"])
    np.testing.assert_allclose(probabilities.sum(1), 1)


@pytest.mark.parametrize("texts", [[""] * 8, [*[""] * 7, "a bill"]])
def test_texts_without_any_token(make, texts):
    classifier = make(tokenizer=word_tokenizer(WORDS.split())).fit(texts, LABELS)
    assert classifier.base.tokenizer("")["input_ids"] == []
    assert len(classifier.history_) == 4
    np.testing.assert_allclose(classifier.predict_proba(["", "the van"]).sum(1), 1)


def test_thousands_of_texts(make):
    texts = [f"{one} {other}" for one in TEXTS for other in TEXTS] * 40
    labels = [label for label in LABELS for _ in TEXTS] * 40
    classifier = make(steps=2).fit(texts, labels)
    assert len(classifier.predict(texts)) == len(texts) == 2560


def test_texts_that_are_too_long_are_cut(make):
    classifier = make(steps=1).fit([*TEXTS, "a bill " * 100], [*LABELS, "billing"])
    cut, whole = classifier.predict_proba(["x " * 32, "x " * 500])
    np.testing.assert_allclose(cut, whole, atol=1e-6)


def test_fields_are_joined_or_written_by_a_template(make, tmp_path):
    rows = [{"subject": "ok", "body text": text, "{{ x }}": 1} for text in TEXTS]
    joined = make(steps=1).fit(rows, LABELS)
    assert joined.fields_ == ["subject", "body text", "{{ x }}"]
    as_one = make(steps=1).fit([f"ok. {text}. 1" for text in TEXTS], LABELS)
    assert same_vectors(joined, as_one)
    with pytest.raises(IA3Error, match="text 0 has no field 'body text'"):
        joined.predict([{"subject": "no body"}])
    source = "{{ fields['body text'] }} is {{ subject }}"
    written = make(steps=1, template=source).fit(rows, LABELS)
    assert same_vectors(written, make(steps=1).fit([f"{text} is ok" for text in TEXTS], LABELS))
    assert written.templates_ == [source]
    written.save(tmp_path)
    loaded = reloaded(tmp_path, bert())
    np.testing.assert_array_equal(loaded.predict_proba(rows), written.predict_proba(rows))
    assert same_vectors(make(steps=1, template=[source]).fit(rows, LABELS), written)


# -- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"choices": {"billing": "bill", "delivery": "post"}}, "choices are a language model's"),
        ({"chat": True}, "chat is True, which is a language model's"),
        ({"upper_blocks": 1}, "upper_blocks is 1, which is a language model's"),
        ({"template": ["{{ text }}", "{{ text }}."]}, "2 templates: a sentence encoder reads a"),
        ({"template": []}, "at least one template"),
        ({"template": 3}, "template is 3, expected"),
        ({"template": "{{ txt }}"}, "did you mean 'text'"),
        ({"steps": -1}, "steps is -1"),
        ({"steps": "3"}, "steps is '3'"),
        ({"seed": -1}, r"seed is -1, expected 0 to 2\*\*32 - 1"),
        ({"learning_rate": 0}, "learning_rate is 0, expected a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": 10**400}, "learning_rate is 1000"),
        ({"max_tokens": 0}, "max_tokens is 0, expected at least 1"),
        ({"max_tokens": "many"}, "max_tokens is 'many'"),
        ({"threads": 0}, "threads is 0, expected 1 to"),
        ({"threads": "all"}, "threads is 'all'"),
        ({"threads": 1.5}, r"threads is 1\.5"),
        ({"encoder": 3}, "encoder is 3, expected a model's name"),
        ({"language_model": None}, "language_model is None, expected a model's name"),
        ({"model": 3}, "model is 3, expected 'auto', a model's name"),
        ({"init_from": 3}, "the adapter's folder is 3"),
        ({"init_from": "missing"}, "no adapter at 'missing'"),
        ({"tokenizer": "words"}, "tokenizer is 'words', expected a tokenizer"),
    ],
)
def test_arguments_are_checked_before_the_model_changes(make, model, settings, message):
    before = snapshot(model)
    with pytest.raises(IA3Error, match=message):
        make(**settings).fit(TEXTS, LABELS)
    assert_unchanged(model, before)


def test_arguments_of_fit_are_checked(make, tmp_path):
    for texts, labels, message in [
        ([], [], "no texts"),
        (TEXTS, ["billing"] * 8, "all labels are 'billing'"),
        (TEXTS, LABELS[:-1], "8 texts and 7 labels"),
        ([*TEXTS[:-1], None], LABELS, "text 7 is None"),
        ([{}] * 8, LABELS, "text 0 has no fields"),
        ([{"a": None}] * 8, LABELS, "text 0: the field 'a' is None"),
    ]:
        with pytest.raises(IA3Error, match=message):
            make().fit(texts, labels)
    with pytest.raises(InvalidTypeError, match="on_step is 3"):
        make().fit(TEXTS, LABELS, on_step=3)
    with pytest.raises(InvalidTypeError, match="checkpoints is 3"):
        make().fit(TEXTS, LABELS, checkpoints=3)


def test_an_adapter_of_another_model_is_refused_and_changes_nothing(make, model):
    other = IA3Model(tiny_llama(), IA3Config()).adapter("default")
    before = snapshot(model)
    with pytest.raises(IA3Error, match="init_from"):
        make(init_from=other).fit(TEXTS, LABELS)
    assert_unchanged(model, before)


def test_a_head_that_could_not_be_saved_is_refused_before_training(make, monkeypatch):
    monkeypatch.setattr("ia3.classify.head_file.LARGEST_HEAD", 1300)
    with pytest.raises(IA3Error, match="head of 8 classes on embeddings of 16 values is too large"):
        make().fit(TEXTS, [*"abcdefgh"], on_step=lambda step: pytest.fail("trained"))
    make(steps=1).fit(TEXTS, LABELS)


def test_the_base_is_asked_for_before_auto_has_chosen():
    with pytest.raises(StateError, match="model is 'auto', which fit chooses"):
        _ = FewShotClassifier().base


# -- determinism and files -------------------------------------------------------------------------


def test_the_seed_draws_batches_and_the_global_random_state_is_left(make):
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    settings = {"steps": 6}
    texts, labels = TEXTS * 3, [*LABELS * 2, *"abcdefgh"]
    one, again, other = (make(seed=s, **settings).fit(texts, labels) for s in (0, 0, 1))
    assert same_vectors(one, again)
    assert torch.equal(one.head_.weight, again.head_.weight)
    assert not same_vectors(one, other)
    assert torch.equal(state, torch.random.get_rng_state())


def test_most_tokens_at_once_change_nothing_but_rounding(make, tmp_path):
    whole = make().fit(TEXTS, LABELS)
    for most in (1, 10):
        parts = make(max_tokens=most).fit(TEXTS, LABELS)
        # AdamW's first steps are as long for a small gradient as for a large one.
        np.testing.assert_allclose(parts.predict_proba(NEW), whole.predict_proba(NEW), atol=1e-2)
        whole.save(tmp_path)
        loaded = reloaded(tmp_path, bert(), max_tokens=most)
        np.testing.assert_allclose(loaded.predict_proba(NEW), whole.predict_proba(NEW), atol=1e-5)


def test_a_model_in_training_mode_is_fitted_without_dropout_and_left_so(make):
    expected = make().fit(TEXTS, LABELS)
    other = bert().train()
    before = snapshot(other)
    classifier = make(model=other).fit(TEXTS, LABELS)
    assert same_vectors(classifier, expected)
    np.testing.assert_array_equal(classifier.predict_proba(NEW), expected.predict_proba(NEW))
    assert_unchanged(other, before)
    assert all(module.training for module in other.modules())


def test_saved_and_loaded_predicts_the_same_bits_and_fits_the_same_vectors(make, tmp_path):
    fitted = make().fit(TEXTS, LABELS)
    fitted.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock") == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "ia3_head.safetensors",
        "ia3_task.json",
    ]
    loaded = reloaded(tmp_path, bert())
    np.testing.assert_array_equal(loaded.predict_proba(NEW), fitted.predict_proba(NEW))
    assert loaded.get_params() == {
        **fitted.get_params(),
        **{
            name: getattr(loaded, name)
            for name in ("model", "tokenizer", "template", "learning_rate")
        },
    }
    assert same_vectors(loaded.fit(TEXTS, LABELS), fitted)
    # A few kilobytes.
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 20_000


def test_an_old_task_file_without_templates_or_choices_reads_the_fields(make, tmp_path):
    rows = [{"subject": "ok", "body": text} for text in TEXTS]
    fitted = make().fit(rows, LABELS)
    fitted.save(tmp_path)
    path = tmp_path / "ia3_task.json"
    task = {**json.loads(path.read_text()), "templates": [], "choices": []}
    path.write_text(json.dumps(task))
    loaded = reloaded(tmp_path, bert())
    np.testing.assert_array_equal(loaded.predict_proba(rows), fitted.predict_proba(rows))
    assert loaded.choices_ == ["billing", "delivery"]
    loaded.save(tmp_path)


@pytest.mark.parametrize("value", [0, float("nan"), "hot", -1.0, None])
def test_what_could_not_be_read_again_is_not_saved(make, tmp_path, value):
    classifier = make(steps=0).fit(TEXTS, LABELS)
    classifier.temperature_ = value
    message = f"^the classifier cannot be saved: temperature is {value!r}, expected a number, 1e-6"
    with pytest.raises(IA3Error, match=message):
        classifier.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_head_that_another_program_put_there_is_refused(make, tmp_path):
    make().fit(TEXTS, LABELS).save(tmp_path / "one")
    make(seed=1).fit(TEXTS[::-1], LABELS).save(tmp_path / "two")
    name = "ia3_head.safetensors"
    os.replace(tmp_path / "two" / name, tmp_path / "one" / name)
    with pytest.raises(BrokenFileError, match="not the head that was saved"):
        reloaded(tmp_path / "one", bert())


def test_a_run_that_was_broken_off_goes_on_from_its_checkpoint(make, tmp_path, monkeypatch):
    monkeypatch.setattr("ia3.sentences.training.CHECKPOINT_STEPS", 2)
    expected = make(steps=6).fit(TEXTS, LABELS)

    def die(step):
        if step.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(steps=6).fit(TEXTS, LABELS, on_step=die, checkpoints=tmp_path)
    taken = []
    resumed = make(steps=6).fit(TEXTS, LABELS, on_step=taken.append, checkpoints=tmp_path)
    assert [step.step for step in taken] == [3, 4, 5, 6]
    assert same_vectors(resumed, expected)
    assert torch.equal(resumed.head_.weight, expected.head_.weight)
    assert resumed.history_ == expected.history_
    for other in ({"seed": 1}, {"steps": 5}, {"learning_rate": 0.5}, {"template": "{{ text }}!"}):
        with pytest.raises(IA3Error, match="of another run"):
            make(**{"steps": 6, **other}).fit(TEXTS, LABELS, checkpoints=tmp_path)
    with pytest.raises(IA3Error, match="of another run"):
        make(steps=6).fit(TEXTS, LABELS[::-1], checkpoints=tmp_path)


def test_an_encoder_that_pools_to_more_values_than_the_head_takes_is_refused(make, tmp_path):
    make().fit(TEXTS, LABELS).save(tmp_path)
    model = bert()
    base = load_encoder(model, tokenizer=tokenizer())
    base.pooling, base.dimension = "cls+mean", 2 * HIDDEN
    # Of an earlier version, whose file does not say how texts were embedded.
    change(tmp_path / "ia3_task.json", embedding=None)
    loaded = FewShotClassifier.load(tmp_path, model=model)
    with pytest.raises(IA3Error, match="embeddings of 16 values, and those of the encoder have 32"):
        loaded.predict(NEW)


def test_an_adapter_to_begin_with(make, tmp_path):
    first = make().fit(TEXTS, LABELS)
    first.save(tmp_path)
    kept = make(init_from=tmp_path, steps=0).fit(TEXTS, LABELS)
    assert same_vectors(kept, first)
    np.testing.assert_array_equal(kept.predict_proba(NEW), first.predict_proba(NEW))
    trained = make(init_from=first.adapter_).fit(TEXTS, LABELS)
    assert not same_vectors(trained, first)
    assert same_vectors(make(init_from=tmp_path).fit(TEXTS, LABELS), trained)


def test_many_tasks_on_one_encoder(make, tmp_path):
    tasks = {"queue": (TEXTS, LABELS), "mood": (TEXTS, [1, 0] * 4), "bad": (TEXTS, [1] * 8)}
    fitted = fit_many(tasks, make(), out=tmp_path)
    assert list(fitted.failures) == ["bad"]
    for name, found in fitted.classifiers.items():
        assert same_vectors(found, make().fit(*tasks[name]))
    taken = []
    again = fit_many(tasks, make(), out=tmp_path, on_step=lambda name, step: taken.append(name))
    assert taken == []
    for name, found in again.classifiers.items():
        assert found.history_ == fitted.classifiers[name].history_
        expected = fitted.classifiers[name].predict_proba(NEW)
        np.testing.assert_array_equal(found.predict_proba(NEW), expected)
    fit_many(tasks, make(seed=1), out=tmp_path, on_step=lambda name, step: taken.append(name))
    assert set(taken) == {"queue", "mood"}


# -- scikit-learn ----------------------------------------------------------------------------------


def test_clone_pickle_and_grid_search(make, model):
    fitted = make().fit(TEXTS, LABELS)
    copy = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(copy.predict_proba(NEW), fitted.predict_proba(NEW))
    assert clone(fitted).model is model
    assert not hasattr(clone(fitted), "classes_")
    grid = {"steps": np.array([0, 2]), "learning_rate": [np.float32(0.01)], "seed": [np.int64(1)]}
    search = GridSearchCV(make(), grid, cv=2, error_score="raise")
    search.fit(np.array(TEXTS), np.array(LABELS))
    assert search.best_estimator_.model is model
    assert {type(value) for value in search.best_estimator_.settings_.values()} <= {
        *(int, float, bool, type(None))
    }


# -- the base model --------------------------------------------------------------------------------


def test_the_base_is_untouched_after_fits_predictions_and_failures(make, model):
    model.encoder.layer[1].train()  # a mode of its own
    next(model.parameters()).requires_grad_(False)
    before = snapshot(model)
    classifier = make().fit(TEXTS, LABELS)
    assert_unchanged(model, before)
    expected = classifier.predict_proba(NEW)
    assert_unchanged(model, before)

    def fail(step):
        raise RuntimeError("the screen is gone")

    with pytest.raises(RuntimeError, match="the screen is gone"):
        make().fit(TEXTS, LABELS, on_step=fail)
    with pytest.raises(RuntimeError, match="the screen is gone"):
        classifier.predict(NEW, progress=fail)
    classifier.set_params(learning_rate=1e30, steps=10)
    with pytest.raises(DivergedError, match="diverged at step"):
        classifier.fit(TEXTS, LABELS)
    assert_unchanged(model, before)
    np.testing.assert_array_equal(classifier.predict_proba(NEW), expected)


def test_broken_weights_are_said(make, model):
    fitted = make(steps=0).fit(TEXTS, LABELS)
    with torch.no_grad():
        model.get_parameter("encoder.layer.1.output.dense.weight")[0, 0] = torch.nan
    for steps in (0, 3):
        with pytest.raises(IA3Error, match="embedding of text 0 is not finite"):
            make(steps=steps).fit(TEXTS, LABELS)
    with pytest.raises(IA3Error, match="scores of text 0 are not finite"):
        fitted.predict(NEW)


def test_a_label_whose_name_is_not_finite_is_named(make, model):
    with torch.no_grad():
        row = tokenizer().convert_tokens_to_ids("billing")
        model.get_input_embeddings().weight[row] = torch.nan
    with pytest.raises(IA3Error, match="embedding of the label 'billing' is not finite"):
        make(steps=0).fit(TEXTS, LABELS)


def test_a_model_with_adapters_on_it_is_refused(make, model):
    adapted = IA3Model(model, IA3Config(target_modules="all-linear"))
    with pytest.raises(IA3Error, match="has adapters already"):
        make().fit(TEXTS, LABELS)
    adapted.unload()
    make().fit(TEXTS, LABELS)


def test_an_on_step_may_end_the_training(make):
    def stop(step):
        raise StopTraining

    classifier = make().fit(TEXTS, LABELS, on_step=stop)
    assert [step.step for step in classifier.history_] == [1]
    assert not same_vectors(classifier, make(steps=0).fit(TEXTS, LABELS))


def test_bfloat16(make, model):
    model.to(torch.bfloat16)
    before = snapshot(model)
    classifier = make().fit(TEXTS, LABELS)
    assert_unchanged(model, before)
    vectors = classifier.adapter_.vectors.values()
    assert {vector.dtype for vector in vectors} == {torch.float32}
    # Changes finer than bfloat16 holds near 1.
    assert any((vector.bfloat16().float() != vector).any() for vector in vectors)
    np.testing.assert_allclose(classifier.predict_proba(NEW).sum(1), 1)


def test_threads_take_turns(make):
    classifiers = [make(seed=seed) for seed in range(3)]
    data = TEXTS * 2, [*LABELS, *"abcdefgh"]
    expected = [clone(c).fit(*data).predict_proba(NEW) for c in classifiers]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda c: c.fit(*data).predict_proba(NEW), classifiers))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_that_is_forked_off_during_a_fit_fits_and_predicts(make):
    fitted = make().fit(TEXTS, LABELS)
    expected = fitted.predict_proba(NEW)
    found = []

    def in_the_child():
        signal.alarm(60)
        again = make().fit(TEXTS, LABELS)
        return fitted.predict_proba(NEW), again.predict_proba(NEW), again.candidates_

    def fork(step):
        if step.step == 2:
            found.append(result_of(in_the_child))

    make().fit(TEXTS, LABELS, on_step=fork)
    ((one, two, candidates),) = found
    np.testing.assert_allclose(one, expected, atol=1e-6)
    np.testing.assert_allclose(two, expected, atol=1e-6)
    assert candidates == fitted.candidates_


# -- the embedded encoder --------------------------------------------------------------------------

REAL = [
    "I was charged twice.",
    "Send the invoice again.",
    "My parcel is lost.",
    "Where is the van?",
]
REAL_LABELS = ["billing", "billing", "delivery", "delivery"]
REAL_NEW = ["The bill is wrong.", "The courier never came.", "Refund me, please, at once."]


def test_the_embedded_encoder_learns_and_peft_reads_its_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModel

    classifier = FewShotClassifier(MINILM, steps=10).fit(REAL, REAL_LABELS)
    assert classifier.model_ == MINILM
    assert classifier.predict(REAL_NEW).tolist() == ["billing", "delivery", "billing"]
    classifier.save(tmp_path)
    loaded = FewShotClassifier.load(tmp_path)
    np.testing.assert_array_equal(
        loaded.predict_proba(REAL_NEW), classifier.predict_proba(REAL_NEW)
    )
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == MINILM
    assert config["task_type"] == "FEATURE_EXTRACTION"
    # The model as PEFT's users load it: with its own package's pooling, by the formula.
    base = load_encoder(MINILM)
    from ia3.base.embedded import embedded_encoder_folder

    theirs = peft.PeftModel.from_pretrained(
        AutoModel.from_pretrained(embedded_encoder_folder()), tmp_path
    ).eval()
    batch = base.tokenizer(REAL_NEW, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = theirs(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    expected = normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    head = load_file(tmp_path / "ia3_head.safetensors")
    scores = (expected @ head["weight"].T + head["bias"]).double() / classifier.temperature_
    np.testing.assert_allclose(
        classifier.predict_proba(REAL_NEW), scores.softmax(1).numpy(), atol=1e-4
    )
    frozen = embeddings(base, tokenized(base, REAL_NEW))
    assert (expected - frozen).abs().max() > 1e-3


def test_a_loaded_language_model_and_an_encoder_of_the_other_kind_are_told(make, model):
    given = {"language_model": model}
    with pytest.raises(IA3Error, match="language_model: a BertModel is no language model"):
        FewShotClassifier(template="{{ text }}", **given).fit(TEXTS, LABELS)
    llama = tiny_llama()
    with pytest.raises(IA3Error, match="encoder: a LlamaForCausalLM is no sentence encoder"):
        FewShotClassifier(encoder=llama).fit(TEXTS, LABELS)
    with pytest.raises(IA3Error, match="language_model: 'all-minilm-l6-v2' is no language model"):
        FewShotClassifier(choices={}, language_model=MINILM).fit(TEXTS, LABELS)
    with pytest.raises(IA3Error, match="encoder: 'smollm2-135m-instruct' is no sentence encoder"):
        FewShotClassifier(encoder="smollm2-135m-instruct").fit(TEXTS, LABELS)


def test_a_classifier_of_one_kind_on_a_model_of_the_other_is_refused(make, tmp_path):
    make().fit(TEXTS, LABELS).save(tmp_path)
    wrong = FewShotClassifier.load(tmp_path, model=tiny_llama(), tokenizer=word_tokenizer())
    with pytest.raises(IA3Error, match="no sentence encoder"):
        wrong.predict(NEW)


def test_sizes_of_the_tests_data():
    assert len(BILLS) + len(PARCELS) == len(TEXTS) == len(LABELS)
    assert bert().config.hidden_size == HIDDEN
