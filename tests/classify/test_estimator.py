"""`FewShotClassifier`: fitting, predicting, files, and what it leaves behind."""

import gc
import json
import pickle
import random
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from sklearn.base import clone, is_classifier
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer
from support.pairs import same_vectors
from support.snapshots import assert_unchanged, snapshot
from support.tfew import hook_count, plain_token_scores, tiny_llama, tiny_t5, word_tokenizer

from ia3 import FewShotClassifier, IA3Config, IA3Model
from ia3.base.loading import EMBEDDED_MODEL, load_base_model
from ia3.errors import IA3Error
from ia3.tfew.prompts.encoding import Encoder
from ia3.tfew.prompts.templates import Template
from ia3.tfew.training.trainer import DivergedError

TEXTS = [
    "I was charged twice this month.",
    "Please send the invoice again.",
    "My parcel never arrived.",
    "The courier left the box in the rain.",
    "How much does the yearly plan cost?",
    "The tracking page shows nothing.",
]
LABELS = ["billing", "billing", "delivery", "delivery", "billing", "delivery"]
NEW = ["The bill is wrong.", "Where is the van?", "Refund me, please, at once."]


@pytest.fixture(scope="module")
def tokenizer():
    return load_base_model(EMBEDDED_MODEL).tokenizer


@pytest.fixture
def model():
    return tiny_llama(vocabulary=49152)


@pytest.fixture
def make(model, tokenizer):
    """A classifier of the tiny model, with few steps."""

    def classifier(**settings):
        settings = {"model": model, "steps": 3, "tokenizer": tokenizer, **settings}
        return FewShotClassifier(**settings)

    return classifier


# -- predictions -----------------------------------------------------------------------------------


def test_probabilities_are_the_softmax_of_mean_log_probabilities(make, model, tokenizer):
    classifier = make(steps=0, template="{{ text }}\nQueue:").fit(TEXTS, LABELS)
    base = classifier.base
    encoder = Encoder(base, ["billing", "delivery"], chat=False)
    for text, row in zip(NEW, classifier.predict_proba(NEW), strict=True):
        # steps=0 is the bare model.
        example = encoder.encode({"text": text}, Template("{{ text }}\nQueue:"))
        with torch.no_grad():
            means = torch.stack([t.mean() for t in plain_token_scores(base, example)])
        np.testing.assert_allclose(row, means.double().softmax(0).numpy(), atol=1e-5)


def test_rows_sum_to_one_and_predict_takes_the_largest(make):
    classifier = make().fit(TEXTS, LABELS)
    probabilities = classifier.predict_proba(NEW)
    assert probabilities.shape == (3, 2)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    assert (probabilities >= 0).all()
    predicted = classifier.predict(NEW)
    assert predicted.tolist() == classifier.classes_[probabilities.argmax(1)].tolist()
    answers = np.array(["billing", "delivery", "billing"])
    assert classifier.score(NEW, answers) == np.mean(predicted == answers)


def test_training_changes_the_predictions_of_the_vectors_alone(make):
    bare, tuned = (make(steps=steps).fit(TEXTS, LABELS) for steps in (0, 5))
    assert all((vector == 1).all() for vector in bare.adapter_.vectors.values())
    assert bare.history_ == []
    assert not np.allclose(bare.predict_proba(NEW), tuned.predict_proba(NEW))


def test_loss_falls_and_every_step_is_recorded(make):
    seen = []
    classifier = make(steps=30, learning_rate=3e-2).fit(TEXTS, LABELS, on_step=seen.append)
    assert classifier.history_ == seen
    # It may end before, where learning has stopped.
    assert [record.step for record in seen] == list(range(1, len(seen) + 1))
    assert 10 < len(seen) <= 30
    losses = [record.loss for record in seen]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    terms = [record.lm + record.length_norm + record.unlikelihood for record in seen]
    assert losses == pytest.approx(terms, rel=1e-5)


def test_a_training_of_one_step_trains(make):
    trained, untrained = (make(steps=steps).fit(TEXTS, LABELS) for steps in (1, 0))
    assert len(trained.history_) == 1
    assert not same_vectors(trained, untrained)


def test_several_templates_are_averaged(make):
    templates = ["{{ text }}\nCategory:", "Message: {{ text }}\nQueue:"]
    both = make(steps=0, template=templates).fit(TEXTS, LABELS)
    single = [make(steps=0, template=t).fit(TEXTS, LABELS).predict_proba(NEW) for t in templates]
    np.testing.assert_allclose(both.predict_proba(NEW), np.mean(single, axis=0), atol=1e-6)
    assert both.templates_ == templates
    done = []
    both.predict(NEW, progress=done.append)
    assert sum(done) == 2 * len(NEW)


def test_each_text_is_predicted_by_itself(make):
    classifier = make().fit(TEXTS, LABELS)
    together = classifier.predict_proba(TEXTS + NEW)
    alone = np.concatenate([classifier.predict_proba([text]) for text in TEXTS + NEW])
    np.testing.assert_allclose(together, alone, atol=1e-5)


# -- labels and choices ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "choices", "classes", "words"),
    [
        (["a_card", "lostCard"], None, ["a_card", "lostCard"], ["a card", "lost card"]),
        ([1, 0], {0: "bad", 1: "good", 10: "grand"}, [0, 1, 10], ["bad", "good", "grand"]),
        ([True, False], {True: "yes", False: "no"}, [False, True], ["no", "yes"]),
        (["b", "a"], {"b": "bill", "a": "post", "c": ","}, ["a", "b", "c"], ["post", "bill", ","]),
    ],
)
def test_labels_and_the_words_ranked_for_them(make, labels, choices, classes, words):
    labels = labels * 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classifier = make(steps=1, choices=choices).fit(TEXTS, labels)
    assert classifier.classes_.tolist() == classes
    assert classifier.choices_ == words
    assert classifier.predict_proba(NEW).shape == (3, len(classes))
    assert {type(label) for label in classifier.predict(NEW).tolist()} == {type(labels[0])}
    # Labels that never occur in training can be scored too.
    classifier.score(NEW, classes[:1] * 3)


@pytest.mark.parametrize(
    "labels", [[1, 0] * 3, np.array([1, 0] * 3), [np.int64(x) for x in (1, 0) * 3], ["1", "0"] * 3]
)
def test_numerals_as_labels_warn_and_are_ranked_as_they_are(make, labels):
    with pytest.warns(UserWarning, match=r"\[.?0.?, .?1.?\].*what they mean.*choices") as caught:
        classifier = make().fit(TEXTS, labels)
    assert [warning.filename for warning in caught] == [__file__]  # the line that called
    assert classifier.choices_ == ["0", "1"]
    assert classifier.classes_.tolist() == sorted(set(np.asarray(labels).tolist()))
    classifier.score(TEXTS, labels)


def test_fields_and_default_template(make):
    rows = [{"subject": "hello", "Body text": text} for text in TEXTS]
    classifier = make(steps=1).fit(rows, LABELS)
    assert classifier.predict(rows[:2]).shape == (2,)
    with pytest.raises(IA3Error, match="Body text"):
        classifier.predict([{"subject": "no body"}])
    with pytest.raises(IA3Error, match="did you mean 'subject'"):
        make(template="{{ sbject }}").fit(rows, LABELS)
    # Names that mean something to a template.
    rows = [{"fields": "hello", "answer_choices": text, "{{ x }}": "braces"} for text in TEXTS]
    assert make(steps=0).fit(rows, LABELS).predict(rows[:2]).shape == (2,)


# -- determinism -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    # With a batch of all examples their order makes no difference: the first case has more.
    ("repeats", "template"),
    [(4, None), (1, ["{{ text }} a:", "{{ text }} b:"])],
)
def test_the_seed_draws_examples_and_templates(make, repeats, template):
    first, again, other = (
        make(seed=seed, steps=4, template=template).fit(TEXTS * repeats, LABELS * repeats)
        for seed in (0, 0, 3)
    )
    assert same_vectors(first, again)
    assert first.history_ == again.history_
    np.testing.assert_array_equal(first.predict_proba(NEW), again.predict_proba(NEW))
    assert not same_vectors(first, other)


def test_the_global_random_state_is_neither_used_nor_changed(make):
    torch.manual_seed(1)
    first = make(steps=2).fit(TEXTS, LABELS)
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    second = make(steps=2).fit(TEXTS, LABELS)
    second.predict(NEW)
    assert random.getstate() == states[0]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[1], strict=True))
    assert torch.equal(torch.random.get_rng_state(), states[2])
    assert same_vectors(first, second)


# -- scikit-learn ----------------------------------------------------------------------------------


def test_clone_shares_the_model_and_forgets_the_fit_and_pickle_carries_it(make, model):
    fitted = make(steps=2, choices={"billing": "bill", "delivery": "post"}).fit(TEXTS, LABELS)
    copy = clone(fitted)
    assert copy is not fitted
    assert copy.model is model
    assert copy.get_params() == fitted.get_params()
    with pytest.raises(NotFittedError):
        copy.predict(NEW)
    copy = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(copy.predict_proba(NEW), fitted.predict_proba(NEW))
    assert is_classifier(fitted)
    assert repr(FewShotClassifier(steps=5)) == "FewShotClassifier(steps=5)"


def test_pipeline(make):
    lower = FunctionTransformer(lambda texts: [text.lower() for text in texts])
    pipeline = Pipeline([("lower", lower), ("classify", make(steps=1))]).fit(TEXTS, LABELS)
    classifier = make(steps=1).fit([text.lower() for text in TEXTS], LABELS)
    expected = classifier.predict_proba([text.lower() for text in NEW])
    np.testing.assert_array_equal(pipeline.predict_proba(NEW), expected)


def test_grid_search_over_steps_and_rate(make, model):
    before = snapshot(model)
    grid = {"steps": [0, 2], "learning_rate": [1e-3, 1e-2]}
    search = GridSearchCV(make(), grid, cv=2).fit(np.array(TEXTS), np.array(LABELS))
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert search.best_estimator_.model is model
    assert set(search.predict(NEW)) <= {"billing", "delivery"}
    assert_unchanged(model, before)


@pytest.mark.parametrize("call", ["predict", "predict_proba", "save", "score"])
def test_not_fitted(make, tmp_path, call):
    arguments = {"save": [tmp_path], "score": [NEW, LABELS[:3]]}.get(call, [NEW])
    with pytest.raises(NotFittedError, match="FewShotClassifier instance is not fitted yet"):
        getattr(make(), call)(*arguments)


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "choices"),
    [
        (LABELS, {"billing": "bïll", "delivery": "parcel", "account": "login"}),
        ([1, 0] * 3, {1: "good", 0: "bad"}),
    ],
)
def test_saved_and_loaded_predicts_the_same(make, model, tokenizer, tmp_path, labels, choices):
    templates = ["{{ text }}\nQueue:", "{{ text }} ->"]
    fitted = make(template=templates, choices=choices).fit(TEXTS, labels)
    fitted.save(tmp_path / "adapter")
    loaded = FewShotClassifier.load(tmp_path / "adapter", model=model, tokenizer=tokenizer)
    np.testing.assert_array_equal(loaded.predict_proba(NEW), fitted.predict_proba(NEW))
    assert loaded.classes_.tolist() == fitted.classes_.tolist()
    assert same_vectors(loaded, fitted)
    # And it can be fitted again, with what it was fitted with.
    assert same_vectors(loaded.fit(TEXTS, labels), fitted)


def test_peft_reads_what_is_saved(make, tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    make(steps=4, learning_rate=3e-2).fit(TEXTS, LABELS).save(tmp_path)
    ids = torch.tensor([tokenizer(NEW[0])["input_ids"]])
    theirs = peft.PeftModel.from_pretrained(tiny_llama(vocabulary=49152), tmp_path).eval()
    ours = IA3Model.from_pretrained(tiny_llama(vocabulary=49152), tmp_path)
    with torch.no_grad():
        bare = tiny_llama(vocabulary=49152)(ids).logits
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, atol=1e-5, rtol=1e-5)
        assert (ours(ids).logits - bare).abs().max() > 1e-3


def test_load_of_nothing_or_of_rubbish(make, tmp_path, model, tokenizer):
    def load():
        return FewShotClassifier.load(tmp_path, model=model, tokenizer=tokenizer)

    with pytest.raises(FileNotFoundError, match="no classifier"):
        load()
    make(steps=0).fit(TEXTS, LABELS).save(tmp_path)
    task = tmp_path / "ia3_task.json"
    good = json.loads(task.read_text("utf-8"))
    for bad in ("{", "[]", "{}", json.dumps({**good, "choices": ["one"]})):
        task.write_text(bad, "utf-8")
        with pytest.raises(IA3Error, match=r"ia3_task\.json"):
            load()
    task.write_text(json.dumps({**good, "format": 99}), "utf-8")
    with pytest.raises(IA3Error, match="format 99"):
        load()
    task.write_text(json.dumps(good), "utf-8")
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
        load()


# -- the base model --------------------------------------------------------------------------------


def test_two_classifiers_share_one_base(make):
    first = make().fit(TEXTS, LABELS)
    expected = first.predict_proba(NEW)
    second = make(seed=3).fit(TEXTS[::-1], LABELS)
    assert first.base is second.base
    np.testing.assert_array_equal(first.predict_proba(NEW), expected)
    assert not np.allclose(second.predict_proba(NEW), expected)


def test_the_base_is_untouched_after_fit_and_predict(make, model):
    model.get_parameter("lm_head.weight").requires_grad_(False)
    model.model.layers[1].train()  # a mode of its own
    before, config = snapshot(model), model.config.to_dict()
    classifier = make().fit(TEXTS, LABELS)
    assert_unchanged(model, before)
    classifier.predict(NEW)
    assert_unchanged(model, before)
    assert model.config.to_dict() == config


def test_the_base_is_untouched_after_an_exception(make, model):
    before = snapshot(model)

    def stop(record):
        if record.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make().fit(TEXTS, LABELS, on_step=stop)
    assert_unchanged(model, before)
    classifier = make().fit(TEXTS, LABELS)

    def fail(done):
        raise RuntimeError("the screen is gone")

    with pytest.raises(RuntimeError, match="the screen is gone"):
        classifier.predict(NEW, progress=fail)
    assert_unchanged(model, before)


def test_a_loaded_model_is_let_go(tokenizer):
    model = tiny_llama(vocabulary=49152)
    gone = weakref.ref(model)
    classifier = FewShotClassifier(model, steps=1, tokenizer=tokenizer).fit(TEXTS, LABELS)
    del model, classifier
    gc.collect()
    assert gone() is None


def test_a_model_with_adapters_on_it_is_refused(make, model):
    ia3_model = IA3Model(model, IA3Config())
    with pytest.raises(IA3Error, match="has adapters already"):
        make().fit(TEXTS, LABELS)
    ia3_model.unload()
    make(steps=1).fit(TEXTS, LABELS)


def test_threads_take_turns(make, tokenizer):
    # One model, several tokenizer objects: it is the model that can carry one adapter at a time.
    tokenizers = [tokenizer, tokenizer, pickle.loads(pickle.dumps(tokenizer))]
    classifiers = [make(seed=i, steps=2, tokenizer=t) for i, t in enumerate(tokenizers)]
    expected = [clone(c).fit(TEXTS, LABELS).predict_proba(NEW) for c in classifiers]
    with ThreadPoolExecutor(3) as pool:
        found = pool.map(lambda c: c.fit(TEXTS, LABELS).predict_proba(NEW), classifiers)
        np.testing.assert_allclose(list(found), expected, atol=1e-5)


def test_vectors_are_float32_on_a_bfloat16_base(make, model):
    model.to(torch.bfloat16)
    before = snapshot(model)
    classifier = make(steps=4).fit(TEXTS, LABELS)
    assert {vector.dtype for vector in classifier.adapter_.vectors.values()} == {torch.float32}
    # Changes finer than bfloat16 holds near 1 (2**-8 below it, 2**-7 above).
    assert any((v.bfloat16().float() != v).any() for v in classifier.adapter_.vectors.values())
    np.testing.assert_allclose(classifier.predict_proba(NEW).sum(1), 1)
    assert_unchanged(model, before)


# -- divergence ------------------------------------------------------------------------------------


def test_divergence_says_the_step_and_keeps_the_earlier_fit(make, model):
    classifier = make().fit(TEXTS, LABELS)
    expected = classifier.predict_proba(NEW)
    before = snapshot(model)
    classifier.set_params(learning_rate=1e30, steps=10)
    with pytest.raises(DivergedError, match="diverged at step") as caught:
        classifier.fit(TEXTS, LABELS)
    assert 1 < caught.value.step <= 10
    assert_unchanged(model, before)
    np.testing.assert_array_equal(classifier.predict_proba(NEW), expected)


def test_a_broken_weight_is_seen_at_the_first_step(make, model):
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] = torch.nan
    with pytest.raises(DivergedError, match="loss is nan") as caught:
        make().fit(TEXTS, LABELS)
    assert caught.value.step == 1
    assert hook_count(model) == 0
    # The untuned model's answers are refused, not made up.
    with pytest.raises(IA3Error, match="not finite"):
        make(steps=0).fit(TEXTS, LABELS).predict(NEW)


# -- bad input -------------------------------------------------------------------------------------


def test_unusable_texts_and_labels(make):
    for texts, labels, message in [
        ([], [], "no texts"),
        (TEXTS, ["billing"] * 6, r"all labels are 'billing'.*at least two"),
        (TEXTS, LABELS[:-1], "6 texts and 5 labels"),
        ([*TEXTS[:-1], None], LABELS, "text 5 is None"),
        ([*TEXTS[:-1], 3.5], LABELS, r"text 5 is 3\.5"),
        ("one text", ["billing"], "one str"),
        (TEXTS, [*LABELS[:-1], None], "label 5 is None"),
        (TEXTS, [*LABELS[:-1], float("nan")], "label 5 is nan"),
        (
            TEXTS,
            [*LABELS[:-1], 3],
            "label 5 is 3, but label 0 is 'billing': expected labels of one kind",
        ),
        (TEXTS, ["a_b", "a b"] * 3, "the same tokens"),
    ]:
        with pytest.raises(IA3Error, match=message):
            make().fit(texts, labels)


def test_unusable_settings(make):
    for settings, message in [
        ({"choices": {"billing": "bill", "deliveries": "post"}}, "did you mean 'deliveries'"),
        ({"choices": {"billing": "same", "delivery": "same"}}, "the same tokens"),
        *(({"choices": dict.fromkeys(LABELS, w)}, "expected words") for w in (1, " ", None)),
        ({"template": []}, "at least one template"),
        ({"template": "{{ text"}, "line 1"),
        ({"template": "{{ txt }}"}, "did you mean 'text'"),
        ({"steps": -1}, "steps is -1"),
        ({"upper_blocks": 0}, "upper_blocks is 0, expected 1 to 2: .* has 2 blocks"),
        ({"upper_blocks": 3}, "upper_blocks is 3, expected 1 to 2"),
        ({"upper_blocks": 1, "init_from": "folder"}, "give one of them"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
    ]:
        with pytest.raises(IA3Error, match=message):
            make(**settings).fit(TEXTS, LABELS)


def test_unknown_names_of_models_devices_and_dtypes(tmp_path, model):
    model.config._name_or_path = ""
    for settings, message in [
        ({"model": str(tmp_path)}, "no model"),
        ({"device": "gpu"}, "device 'gpu' is unknown"),
        ({"dtype": "float33"}, "dtype 'float33' is unknown"),
        ({"dtype": "int64"}, "dtype 'int64' is unknown"),
        ({"model": model}, "tokenizer="),
    ]:
        with pytest.raises(IA3Error, match=message):
            FewShotClassifier(**settings).fit(TEXTS, LABELS)


def test_an_unknown_label_in_evaluation_is_named(make):
    classifier = make(steps=0).fit(TEXTS, LABELS)
    with pytest.raises(IA3Error, match=r"'deliver' \(row 1\).*did you mean 'delivery'"):
        classifier.score(NEW, ["billing", "deliver", "billing"])
    with pytest.raises(IA3Error, match="3 texts and 2 labels"):
        classifier.score(NEW, ["billing", "delivery"])
    with pytest.raises(IA3Error, match="text 1 is None"):
        classifier.predict(["x", None])


def test_truncation_is_one_warning(tokenizer):
    model = tiny_llama(vocabulary=49152, max_position_embeddings=64)
    classifier = FewShotClassifier(model, steps=1, tokenizer=tokenizer)
    long = "word " * 500
    with pytest.warns(UserWarning, match="2 of 6 prompts are longer") as caught:
        classifier.fit([*TEXTS[:4], long, long], LABELS)
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(UserWarning, match="1 of 2 prompts is longer") as caught:
        assert classifier.predict([long, "short"]).shape == (2,)
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classifier.predict(["short"])


# -- other models ----------------------------------------------------------------------------------


def test_encoder_decoder():
    words = sorted({word for text in TEXTS + NEW for word in text.replace(".", " ").split()})
    tokenizer = word_tokenizer([*words[:80], "billing", "delivery"], end=True)
    model = tiny_t5()
    before = snapshot(model)
    classifier = FewShotClassifier(model, steps=4, tokenizer=tokenizer).fit(TEXTS, LABELS)
    assert_unchanged(model, before)
    assert classifier.adapter_.config.task_type == "SEQ_2_SEQ_LM"
    probabilities = classifier.predict_proba(NEW)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    bare = FewShotClassifier(model, steps=0, tokenizer=tokenizer).fit(TEXTS, LABELS)
    assert not np.allclose(bare.predict_proba(NEW), probabilities)


def test_upper_blocks(make, model, tokenizer, tmp_path):
    classifier = make(upper_blocks=1).fit(TEXTS, LABELS)
    assert {name.split(".")[2] for name in classifier.adapter_.vectors} == {"1"}
    whole = make(upper_blocks=2).fit(TEXTS, LABELS)
    assert same_vectors(whole, make().fit(TEXTS, LABELS))
    classifier.save(tmp_path)
    loaded = FewShotClassifier.load(tmp_path, model=model, tokenizer=tokenizer)
    assert loaded.upper_blocks == 1
    np.testing.assert_array_equal(loaded.predict_proba(NEW), classifier.predict_proba(NEW))
    # Files of earlier versions do not have the setting.
    path = tmp_path / "ia3_task.json"
    task = json.loads(path.read_text())
    del task["upper_blocks"]
    path.write_text(json.dumps(task))
    old = FewShotClassifier.load(tmp_path, model=model, tokenizer=tokenizer)
    assert old.upper_blocks is None


def test_settings_changed_after_the_fit_change_no_prediction_until_the_next(make, tmp_path):
    classifier = make(steps=1).fit(TEXTS, LABELS)
    before = classifier.predict_proba(NEW)
    classifier.set_params(chat=True, steps=2)
    assert np.array_equal(classifier.predict_proba(NEW), before)
    classifier.save(tmp_path)
    task = json.loads((tmp_path / "ia3_task.json").read_text())
    assert (task["chat"], task["steps"]) == (False, 1)
    assert not np.allclose(classifier.fit(TEXTS, LABELS).predict_proba(NEW), before)


# -- the real model --------------------------------------------------------------------------------

FOOD = """The soup needs more salt. She baked a loaf of bread this morning. We had pasta with
tomato sauce. Peel the onions and fry them in butter. The cake was sweet and full of cream. He
ordered rice with grilled chicken. These apples taste sour. Boil the potatoes for twenty
minutes."""
SPORT = """The striker scored in the last minute. She won the tennis match in two sets. Our team
lost the final by one goal. He ran the marathon in three hours. The referee showed him a red
card. The swimmer broke the world record. They trained for the relay race all summer. The
goalkeeper saved the penalty."""
NEW_FOOD = """Add some pepper to the stew. The cheese melted on the pizza. I drank a cup of
coffee with milk. The salad came with olives and fish. Grandmother makes the best pancakes. Stir
the flour into the eggs."""
NEW_SPORT = """The cyclist won the final stage. Their coach praised the defenders after the
game. She lifted the trophy after the championship. The boxer was knocked out in round two. The
basketball player missed both free throws. Fans cheered as the runner crossed the line."""


def sentences(text: str) -> list[str]:
    return [f"{sentence}." for sentence in " ".join(text.split()).removesuffix(".").split(". ")]


@pytest.mark.slow
def test_the_real_model_learns():
    # The words say nothing of the texts, so that the untuned model can only guess.
    settings = {"choices": {"food": "blue", "sport": "green"}, "learning_rate": 1e-2}
    texts, labels = sentences(FOOD) + sentences(SPORT), ["food"] * 8 + ["sport"] * 8
    held_out, answers = sentences(NEW_FOOD) + sentences(NEW_SPORT), ["food"] * 6 + ["sport"] * 6
    untuned = FewShotClassifier(steps=0, **settings).fit(texts, labels)
    tuned = FewShotClassifier(steps=20, **settings).fit(texts, labels)
    assert tuned.score(held_out, answers) > untuned.score(held_out, answers)
    assert tuned.base is untuned.base
