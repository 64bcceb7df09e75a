"""The head on embeddings, against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict

from ia3.sentences import head
from ia3.sentences.head import ITERATIONS, STRENGTH, fit_head, folds, held_out_answers


def embedded(classes: int, texts: int = 30, dim: int = 6):
    generator = torch.Generator().manual_seed(classes)
    targets = [text % classes for text in range(texts)]
    centres = torch.randn(classes, dim, generator=generator)
    noise = torch.randn(texts, dim, generator=generator)
    found = torch.nn.functional.normalize(centres[targets] + noise, dim=1)
    return found, targets


def theirs() -> LogisticRegression:
    return LogisticRegression(C=STRENGTH, max_iter=ITERATIONS)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_scores_and_probabilities_are_those_of_scikit_learn(classes):
    found, targets = embedded(classes)
    head = fit_head(found, targets, classes)
    assert (head.weight.dtype, head.bias.dtype) == (torch.float32, torch.float32)
    assert (head.weight.shape, head.bias.shape) == ((classes, 6), (classes,))
    model = theirs().fit(found.double().numpy(), targets)
    scores = head.scores(found)
    assert scores.dtype == torch.float64
    expected = model.predict_proba(found.double().numpy())
    np.testing.assert_allclose(scores.softmax(1).numpy(), expected, atol=1e-5)
    decision = model.decision_function(found.double().numpy())
    if classes == 2:
        np.testing.assert_allclose((scores[:, 1] - scores[:, 0]).numpy(), decision, atol=1e-4)
    else:
        np.testing.assert_allclose(scores.numpy(), decision, atol=1e-4)


@pytest.mark.parametrize("missing", [0, 1, 3])
def test_a_class_without_texts_is_never_chosen_and_changes_no_other(missing):
    found, targets = embedded(3)
    others = [target for target in range(4) if target != missing]
    head = fit_head(found, [others[target] for target in targets], 4)
    probabilities = head.scores(found).softmax(1)
    assert (probabilities[:, missing] == 0).all()
    expected = theirs().fit(found.double().numpy(), targets).predict_proba(found.double().numpy())
    np.testing.assert_allclose(probabilities[:, others].numpy(), expected, atol=1e-5)


def test_two_texts_in_all_make_a_head():
    found = torch.eye(2)
    head = fit_head(found, [1, 0], 2)
    assert head.scores(found).argmax(1).tolist() == [1, 0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(0, 3), st.integers(2, 6))
def test_folds_hold_out_each_text_once_but_the_only_one_of_its_class(targets, seed, most):
    split = folds(targets, seed, most)
    counts = {target: targets.count(target) for target in targets}
    held_out = sorted(text for _, part in split for text in part)
    assert held_out == [text for text, target in enumerate(targets) if counts[target] > 1]
    assert len(split) == (min(most, max(counts.values())) if max(counts.values()) > 1 else 0)
    for train, part in split:
        assert part
        assert sorted([*train, *part]) == [*range(len(targets))]
        # There is a text of each class to learn from.
        assert {targets[text] for text in train} == {*targets}
        for target, count in counts.items():
            of_class = sum(targets[text] == target for text in part)
            assert of_class <= -(-count // len(split))
    assert folds(targets, seed, most) == split


@pytest.mark.parametrize(("classes", "draws"), [(3, 5), (5, 2)])
def test_held_out_answers_are_the_mean_of_cross_validation_drawn_several_times(
    classes, draws, monkeypatch
):
    found, targets = embedded(classes)
    monkeypatch.setattr(head, "ANSWERS", draws * len(targets))
    answers = held_out_answers(found, targets, classes, seed=1)
    expected = []
    for draw in range(draws):
        splits = [(np.array(train), np.array(part)) for train, part in folds(targets, 1 + draw)]
        expected.append(
            cross_val_predict(
                theirs(), found.double().numpy(), targets, cv=splits, method="predict_proba"
            )
        )
    assert answers.texts == [*range(len(targets))]
    np.testing.assert_allclose(answers.probabilities.numpy(), np.mean(expected, 0), atol=1e-4)
    right = np.mean([each.argmax(1) == targets for each in expected], 0)
    np.testing.assert_allclose(answers.right.numpy(), right)


def test_texts_that_are_always_learned_from_are_never_held_out():
    found, targets = embedded(3)
    count = len(targets) - 4
    answers = held_out_answers(found, targets, 3, seed=1, always=4)
    assert answers.texts == [*range(count)]
    expected = torch.zeros(count, 3, dtype=torch.float64)
    for draw in range(head.MOST_DRAWS):
        for train, part in folds(targets[:count], 1 + draw):
            learned = [*train, *range(count, len(targets))]
            of_fold = fit_head(found[learned], [targets[i] for i in learned], 3)
            expected[part] += of_fold.scores(found[part]).softmax(-1) / head.MOST_DRAWS
    torch.testing.assert_close(answers.probabilities, expected)


def test_the_last_seed_draws_folds_too():
    found, targets = embedded(3)
    assert len(held_out_answers(found, targets, 3, seed=2**32 - 1).right) == len(targets)


def test_the_only_text_of_each_class_leaves_nothing_to_hold_out():
    answers = held_out_answers(torch.eye(3), [0, 1, 2], 3, seed=0)
    assert (answers.texts, answers.probabilities.shape) == ([], (0, 3))


def test_the_only_text_of_one_class_is_not_held_out():
    assert held_out_answers(torch.eye(5), [0, 0, 1, 1, 2], 3, seed=0).texts == [0, 1, 2, 3]
