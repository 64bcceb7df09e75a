"""Learning once from one's own answers, where texts held out say that it helps."""

from __future__ import annotations

import math

import pytest
import torch
from support.sentences import LABELS, TEXTS, bert, tokenizer

from ia3 import FewShotClassifier
from ia3.classify.self_training import SURE
from ia3.errors import IA3Error
from ia3.sentences.head import folds

UNLABELLED = ["the bill is late", "a van", "the van", "x y z", "the invoice", "a courier", "paid"]
UNLABELLED += ["the parcel was paid", "is the van wrong", "the bill was lost", "ok", TEXTS[0]]


def make(**settings):
    return FewShotClassifier(bert(), tokenizer=tokenizer(), **{"steps": 5, **settings})


def right_by_hand(labels, seed):
    """Of each text held out: is it right without the answers, and with them."""
    others = [text for text in UNLABELLED if text not in TEXTS]
    without, learned = {}, {}
    place = {label: number for number, label in enumerate(sorted(set(labels)))}
    for train, held_out in folds([place[label] for label in labels], seed):
        texts, own = [TEXTS[i] for i in train], [labels[i] for i in train]
        first = make(seed=seed).fit(texts, own)
        answers = zip(others, first.predict(others), first.predict_proba(others), strict=True)
        more = [(text, label) for text, label, p in answers if p.max() >= SURE]
        second = make(seed=seed)
        second.fit([*texts, *(t for t, _ in more)], [*own, *(label for _, label in more)])
        for row in held_out:
            without[row] = first.predict([TEXTS[row]])[0] == labels[row]
            learned[row] = second.predict([TEXTS[row]])[0] == labels[row]
    rows = sorted(without)
    return [bool(without[r]) for r in rows], [bool(learned[r]) for r in rows]


@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_said_is_what_trainings_by_hand_give_and_decides(seed):
    classifier = make(seed=seed).fit(TEXTS, LABELS, unlabelled=UNLABELLED)
    without, learned = right_by_hand(LABELS, seed)
    _, plain, with_them = classifier.candidates_
    assert plain.accuracy == pytest.approx(sum(without) / len(without))
    assert with_them.accuracy == pytest.approx(sum(learned) / len(learned))
    assert plain.note == "trained on the labelled: held-out folds, 8 texts"
    own = make(seed=seed).fit(TEXTS, LABELS)
    others = [text for text in UNLABELLED if text not in TEXTS]
    sure = [
        text for text, p in zip(others, own.predict_proba(others), strict=True) if p.max() >= SURE
    ]
    taken = sum(learned) > sum(without)
    decided = "taken" if taken else "left out"
    assert with_them.note == (
        f"and on {len(sure)} of {len(others)} unlabelled, {decided}: held-out folds, 8 texts"
    )
    if taken:
        own = make(seed=seed).fit([*TEXTS, *sure], [*LABELS, *own.predict(sure)])
    assert all(
        torch.equal(v, own.adapter_.vectors[n]) for n, v in classifier.adapter_.vectors.items()
    )
    assert torch.equal(classifier.head_.weight, own.head_.weight)


def test_what_was_decided_is_kept_in_the_files(tmp_path):
    model = bert()
    classifier = FewShotClassifier(model, tokenizer=tokenizer(), steps=2)
    classifier.fit(TEXTS, LABELS, unlabelled=UNLABELLED)
    classifier.save(tmp_path / "saved")
    read = FewShotClassifier.load(tmp_path / "saved", model=model, tokenizer=tokenizer())
    assert read.candidates_ == classifier.candidates_
    assert "unlabelled" in read.candidates_[-1].note


def test_on_step_counts_all_trainings_and_ends_at_their_last():
    steps = []
    make(steps=3).fit(TEXTS, LABELS, unlabelled=UNLABELLED, on_step=steps.append)
    assert [step.step for step in steps] == list(range(1, len(steps) + 1))
    assert all(step.step <= step.steps and math.isfinite(step.loss) for step in steps)
    # Four folds of four texts a class, two trainings each, and one of all.
    assert len(steps) in (3 * n for n in range(5, 11))


def test_one_text_a_class_is_trained_without_a_decision():
    pair = [TEXTS[0], TEXTS[4]], ["billing", "delivery"]
    with pytest.warns(UserWarning, match="unlabelled: no labelled text can be held out"):
        classifier = make(steps=2).fit(*pair, unlabelled=UNLABELLED)
    assert len(classifier.candidates_) == 1


def test_where_no_text_is_new_there_is_one_training_and_a_warning():
    steps = []
    with pytest.warns(UserWarning, match="unlabelled: each text is a labelled one"):
        classifier = make(steps=2).fit(TEXTS, LABELS, unlabelled=TEXTS[:3], on_step=steps.append)
    assert len(steps) == 2
    assert len(classifier.candidates_) == 1


def test_what_cannot_be_is_refused_before_any_training_and_changes_nothing(tmp_path):
    classifier = make(steps=2).fit(TEXTS, LABELS)
    before = classifier.adapter_
    steps = []
    with pytest.raises(IA3Error, match="unlabelled is given, and checkpoints"):
        classifier.fit(TEXTS, LABELS, unlabelled=UNLABELLED, checkpoints=tmp_path / "kept")
    left_out = make(class_weight={"other": 0})
    with pytest.raises(IA3Error, match="unlabelled is given, and a class_weight of 0"):
        left_out.fit([*TEXTS, "x"], [*LABELS, "other"], unlabelled=UNLABELLED)
    for wrong, message in (
        ([{"title": "a van"}], "unlabelled: text 0 has no field 'text'"),
        ([{"text": None}], "unlabelled: text 0: the field 'text' is None"),
        ([3], "unlabelled: text 0 is 3"),
        ("a van", "unlabelled: "),
    ):
        with pytest.raises(IA3Error, match=message):
            classifier.fit(TEXTS, LABELS, unlabelled=wrong, on_step=steps.append)
    assert (steps, classifier.adapter_ is before) == ([], True)


def test_a_string_is_the_only_field_whatever_its_name():
    given = [{"review": text} for text in TEXTS]
    fits = [
        make(steps=1).fit(given, LABELS, unlabelled=unlabelled)
        for unlabelled in (UNLABELLED, [{"review": text} for text in UNLABELLED])
    ]
    assert fits[0].candidates_ == fits[1].candidates_
    assert fits[0].fields_ == ["review"]
