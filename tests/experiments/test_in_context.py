"""In-context learning against the plain way: every prompt written out and computed in whole."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError
from support.scoring import ALL, plain_scores, tokens_seen
from support.snapshots import assert_unchanged, snapshot
from support.tfew import random_model, tiny_llama, tiny_t5, word_tokenizer

from ia3.base.loading import EMBEDDED_MODEL, load_base_model
from ia3.errors import IA3Error
from ia3.experiments.in_context import InContextClassifier
from ia3.tfew.prompts.encoding import EncodedExample

TEXTS = ["charged twice this month", "send the invoice again please", "my parcel never came"]
TEXTS += ["the box was left outside in the rain", "what does one year cost", "it shows nothing"]
LABELS = ["bill", "bill", "van", "van", "bill", "van"]
NEW = ["the invoice was charged twice", "where is my box", "N/A in the parcel", "rain"]
CHOICES = {"bill": "money", "van": "the delivery"}
TEMPLATE = "question : {{ text }}\nabout"
TOKENIZER = word_tokenizer(
    " ".join([*TEXTS, *NEW, *CHOICES.values(), "question : about topic N / A where is"]).split()
)


def make(name="llama", **changed) -> InContextClassifier:
    model = tiny_t5() if name == "t5" else random_model(ALL[name])
    arguments = {"template": TEMPLATE, "choices": CHOICES, "tokenizer": TOKENIZER, **changed}
    return InContextClassifier(model, **arguments)


def written_out(classifier, text):
    """The probabilities of one text from prompts that are put together here, word by word."""
    base = classifier.base

    def ids(of_text):
        return tuple(base.tokenizer(of_text)["input_ids"])

    space = "" if base.is_encoder_decoder else " "
    choices = tuple(ids(space + words) for words in CHOICES.values())

    def probabilities(demonstrations, of_text):
        prompt = ids(f"{demonstrations}question : {of_text}\nabout")
        return plain_scores(base, EncodedExample(prompt, choices)).double().softmax(-1)

    members = []
    for demonstrations in classifier.demonstrations_[0]:
        member = probabilities(demonstrations, text)
        if classifier.calibrate:
            member /= probabilities(demonstrations, "N/A")
        members.append(member / member.sum())
    return torch.stack(members).mean(0).numpy()


@pytest.mark.parametrize(
    ("ensemble", "calibrate"), [("none", False), ("orderings", True), ("one-shot", False)]
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "bloom", "mistral", "gemma3", "t5"])
def test_probabilities_are_those_of_prompts_written_out(name, ensemble, calibrate):
    classifier = make(name, ensemble=ensemble, orderings=2, calibrate=calibrate)
    classifier.fit(TEXTS, LABELS)
    probabilities = classifier.predict_proba(NEW)
    expected = np.stack([written_out(classifier, text) for text in NEW])
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    assert np.ptp(probabilities[:, 0]) > 1e-3
    assert (classifier.predict(NEW) == np.array(["bill", "van"])[expected.argmax(1)]).all()


def test_a_real_tokenizer_sees_the_text_in_one_piece():
    # Its tokens reach over the line breaks between demonstrations and texts.
    tokenizer = load_base_model(EMBEDDED_MODEL).tokenizer
    model = tiny_llama(vocabulary=49152)
    classifier = InContextClassifier(model, TEMPLATE, CHOICES, tokenizer=tokenizer)
    classifier.fit(TEXTS, LABELS)
    texts = [*NEW, " indented", "\nbroken"]
    expected = np.stack([written_out(classifier, text) for text in texts])
    np.testing.assert_allclose(classifier.predict_proba(texts), expected, atol=1e-5)


def test_demonstrations_are_prompts_with_their_answers():
    one_shot = make(ensemble="one-shot").fit(TEXTS, LABELS)
    written = [
        f"question : {text}\nabout {CHOICES[label]}\n\n"
        for text, label in zip(TEXTS, LABELS, strict=True)
    ]
    assert one_shot.demonstrations_ == [written]
    assert one_shot.demonstration_tokens_ == [[len(TOKENIZER(w)["input_ids"]) for w in written]]
    (alone,) = make(seed=3).fit(TEXTS, LABELS).demonstrations_[0]
    orderings = make(ensemble="orderings", orderings=4, seed=3).fit(TEXTS, LABELS)
    for together in [alone, *orderings.demonstrations_[0]]:
        assert sorted(together.split("\n\n")[:-1]) == sorted(w.strip() for w in written)
    assert len({*orderings.demonstrations_[0]}) == 4
    assert make(seed=3).fit(TEXTS, LABELS).demonstrations_ == [[alone]]
    assert make(seed=4).fit(TEXTS, LABELS).demonstrations_ != [[alone]]


def test_templates_are_averaged_each_with_its_own_demonstrations():
    other = "{{ text }}\ntopic :"
    both = make(template=[TEMPLATE, other]).fit(TEXTS, LABELS)
    each = [make(template=t).fit(TEXTS, LABELS).predict_proba(NEW) for t in (TEMPLATE, other)]
    np.testing.assert_allclose(both.predict_proba(NEW), np.mean(each, 0), atol=1e-6)
    assert np.abs(each[0] - each[1]).max() > 1e-3


def test_demonstrations_are_computed_once():
    classifier = make(ensemble="orderings", orderings=2, calibrate=True).fit(TEXTS, LABELS)
    demonstrations = sum(classifier.demonstration_tokens_[0])
    classifier.predict_proba(NEW)
    model = classifier.model
    one_by_one = tokens_seen(model, lambda: [classifier.predict_proba([text]) for text in NEW])
    # Four texts and a text without content each time, for two members.
    assert sum(one_by_one) < demonstrations
    classifier.fit(TEXTS, LABELS)
    assert sum(tokens_seen(model, lambda: classifier.predict_proba(NEW[:1]))) > demonstrations


def test_another_model_computes_its_own_demonstrations():
    classifier = make().fit(TEXTS, LABELS)
    classifier.predict_proba(NEW)
    other = tiny_llama(seed=1)
    expected = make().set_params(model=other).fit(TEXTS, LABELS).predict_proba(NEW)
    classifier.set_params(model=other)
    np.testing.assert_allclose(classifier.predict_proba(NEW), expected, atol=1e-6)


def test_many_texts_in_any_order():
    classifier = make().fit(TEXTS, LABELS)
    texts = [f"{a} {b}" for a in NEW * 9 for b in TEXTS + NEW]
    done = []
    probabilities = classifier.predict_proba(texts, progress=done.append)
    assert sum(done) == len(texts) == 360
    alone = [classifier.predict_proba([texts[i]])[0] for i in (0, 100, 359)]
    np.testing.assert_allclose(probabilities[[0, 100, 359]], alone, atol=1e-5)


def test_mappings_and_integer_labels():
    rows = [{"text": text, "place": place} for place, text in enumerate(TEXTS)]
    choices = {0: "money", 1: "the delivery"}
    classifier = make(template="{{ place }} {{ text }}", choices=choices, calibrate=True)
    classifier.fit(rows, [int(label == "van") for label in LABELS])
    # Numbers of the first example stand in the text without content.
    blank = {"text": "N/A", "place": 0}
    np.testing.assert_allclose(classifier.predict_proba([blank]), [[0.5, 0.5]], atol=1e-6)
    assert classifier.score(rows, classifier.predict(rows)) == 1.0
    with pytest.raises(IA3Error, match="no field 'place'"):
        classifier.predict([{"text": "rain"}])


def test_the_model_stays_as_it_was_and_a_pickle_answers_the_same():
    classifier = make(ensemble="orderings", orderings=2, calibrate=True)
    model = classifier.model.train()
    before = snapshot(model)
    found = classifier.fit(TEXTS, LABELS).predict_proba(NEW)
    assert_unchanged(model, before)
    copy = pickle.loads(pickle.dumps(classifier))
    np.testing.assert_allclose(copy.predict_proba(NEW), found, atol=1e-6)


# -- what does not fit -----------------------------------------------------------------------------


def limited(context, **changed):
    model = tiny_llama(max_position_embeddings=context)
    return InContextClassifier(model, TEMPLATE, CHOICES, tokenizer=TOKENIZER, **changed)


@pytest.mark.parametrize("context", [30, 37, 45, 60])
def test_as_many_demonstrations_fit_as_the_error_says(context):
    with pytest.raises(IA3Error, match=r"\d+ demonstrations fit") as caught:
        limited(context).fit(TEXTS, LABELS)
    fitting = int(str(caught.value).split(" demonstrations fit")[0].split()[-1])
    assert 0 < fitting < len(TEXTS)
    # Those that take the most room.
    longest = sorted(range(len(TEXTS)), key=lambda i: -len(TEXTS[i].split()))
    texts, labels = [TEXTS[i] for i in longest], ["bill", "van"] * 3
    if fitting > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            limited(context).fit(texts[:fitting], labels[:fitting]).predict(texts[:1])
    with pytest.raises(IA3Error, match="demonstrations fit"):
        limited(context).fit(texts[: fitting + 1], labels[: fitting + 1])


def test_one_shot_fits_where_all_together_do_not():
    classifier = limited(40, ensemble="one-shot").fit(TEXTS, LABELS)
    assert classifier.predict_proba(NEW).shape == (4, 2)
    with pytest.raises(IA3Error, match=r"0 demonstrations fit; give shorter ones$"):
        limited(16, ensemble="one-shot").fit(TEXTS, LABELS)


def test_a_text_too_long_behind_its_demonstrations_is_cut():
    classifier = limited(96).fit(TEXTS, LABELS)
    with pytest.warns(UserWarning, match="1 of 2 prompts is longer"):
        probabilities = classifier.predict_proba(["rain " * 90, "rain"])
    assert np.isfinite(probabilities).all()


def test_unusable_settings():
    with pytest.raises(IA3Error, match="ensemble is 'one_shot', expected one of"):
        make(ensemble="one_shot").fit(TEXTS, LABELS)
    with pytest.raises(IA3Error, match="orderings is 0"):
        make(orderings=0).fit(TEXTS, LABELS)
    with pytest.raises(NotFittedError, match="InContextClassifier"):
        make().predict(NEW)
