"""The three loss terms: hand-computed, by property, from logits. The authors': test_golden.py."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from ia3.errors import IA3Error
from ia3.tfew import tfew_loss
from ia3.tfew.scoring.answer_tokens import TokenScores
from ia3.tfew.training.losses import Counts, token_loss

TERMS = ("lm", "length_norm", "unlikelihood", "total")


def by_hand(*log_probs):
    """The loss of one example, whose first choice is right, from token probabilities."""
    scores = torch.nn.utils.rnn.pad_sequence([torch.tensor(p).log() for p in log_probs], True)
    mask = torch.tensor([[t < len(p) for t in range(scores.shape[1])] for p in log_probs])
    return token_loss(TokenScores(scores[None], mask[None]), torch.tensor([0]))


def test_terms_by_hand():
    # The sums differ (0.25 against 0.5), the means do not: a coin toss.
    assert by_hand([0.5, 0.5], [0.5]).length_norm.item() == pytest.approx(math.log(2))
    # A certain wrong token costs no infinity.
    assert by_hand([0.5], [1.0]).unlikelihood.item() == pytest.approx(-math.log(1e-2), rel=1e-4)
    nothing_wrong = by_hand([0.5, 0.5])
    assert nothing_wrong.unlikelihood.item() == nothing_wrong.length_norm.item() == 0
    assert nothing_wrong.total.item() == pytest.approx(math.log(2))


# -- from logits -----------------------------------------------------------------------------------

PAD = -1


@st.composite
def logit_batches(draw):
    """Logits float64, padded targets, labels; some rows have fewer choices."""
    batch, choices, length, vocabulary = (draw(st.integers(1, n)) for n in (3, 4, 3, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (batch, choices, length, vocabulary)
    logits = 4 * torch.randn(shape, generator=generator, dtype=torch.float64)
    targets = torch.full((batch, choices, length), PAD)
    labels = [draw(st.integers(0, choices - 1)) for _ in range(batch)]
    for i in range(batch):
        for c in range(choices):
            count = draw(st.integers(1 if c == labels[i] else 0, length))
            ids = st.lists(st.integers(0, vocabulary - 1), min_size=count, max_size=count)
            targets[i, c, :count] = torch.tensor(draw(ids), dtype=torch.int64)
    return logits, targets, torch.tensor(labels)


def by_definition(logits, targets, labels):
    """The paper's formulas, one number after the other."""
    right, wrong, length_norms = [], [], []
    for i, label in enumerate(labels.tolist()):
        means = {}
        for c in range(targets.shape[1]):
            log_probs = []
            for t, token in enumerate(targets[i, c].tolist()):
                if token != PAD:
                    e = [math.exp(x) for x in logits[i, c, t].tolist()]
                    log_probs.append(math.log(e[token] / sum(e)))
            (right if c == label else wrong).extend(log_probs)
            if log_probs:
                means[c] = sum(log_probs) / len(log_probs)
        normaliser = sum(math.exp(mean) for mean in means.values())
        length_norms.append(-math.log(math.exp(means[label]) / normaliser))
    unlikely = [-math.log(1 - math.exp(p) + 1e-2) for p in wrong]
    return {
        "lm": -sum(right) / len(right),
        "length_norm": sum(length_norms) / len(length_norms),
        "unlikelihood": sum(unlikely) / max(1, len(unlikely)),
    }


@given(logit_batches())
@settings(max_examples=60, deadline=None)
def test_terms_from_logits_are_those_of_the_paper(batch):
    loss = tfew_loss(*batch, pad_token_id=PAD)
    expected = by_definition(*batch)
    for term, value in expected.items():
        assert getattr(loss, term).item() == pytest.approx(value, rel=1e-9, abs=1e-12), term
    assert loss.total.item() == pytest.approx(sum(expected.values()), rel=1e-9)
    assert loss.total.dtype == torch.float64


@given(logit_batches(), st.floats(0, 3), st.floats(0, 3), st.floats(0, 3))
@settings(max_examples=40, deadline=None)
def test_the_total_is_weighted(batch, lm, length_norm, unlikelihood):
    weights = {"lm": lm, "length_norm": length_norm, "unlikelihood": unlikelihood}
    loss = tfew_loss(*batch, pad_token_id=PAD, **weights)
    plain = tfew_loss(*batch, pad_token_id=PAD)
    expected = sum(weight * getattr(plain, term) for term, weight in weights.items())
    torch.testing.assert_close(loss.total, torch.as_tensor(expected, dtype=torch.float64))
    for term in weights:
        assert torch.equal(getattr(loss, term), getattr(plain, term))


@given(logit_batches(), st.integers(0, 2), st.integers(0, 2), st.sampled_from([0, -100, 10**9]))
@settings(max_examples=60, deadline=None)
def test_padding_changes_nothing(batch, longer, further, filler):
    """More length, more choices that are none, any ids there (also a token's), broken logits."""
    logits, targets, labels = batch
    mask = targets != PAD
    wide = torch.nn.functional.pad(mask, (0, longer, 0, further))
    padded = torch.full(wide.shape, filler)
    padded[wide] = targets[mask]
    broken = torch.full((*wide.shape, logits.shape[-1]), torch.nan, dtype=torch.float64)
    broken[wide] = logits[mask]
    logits = logits.clone().requires_grad_()
    broken.requires_grad_()
    before = tfew_loss(logits, targets, labels, pad_token_id=PAD)
    after = tfew_loss(broken, padded, labels, target_mask=wide)
    for term in TERMS:
        torch.testing.assert_close(getattr(after, term), getattr(before, term))
    before.total.backward()
    after.total.backward()
    torch.testing.assert_close(broken.grad[wide], logits.grad[mask])
    assert not broken.grad[~wide].any()


@given(logit_batches(), st.data())
@settings(max_examples=50, deadline=None)
def test_the_terms_of_parts_add_up(batch, data):
    logits, targets, labels = batch
    mask = targets != PAD
    tokens = targets.clamp(min=0)[..., None]
    log_probs = logits.log_softmax(-1).gather(-1, tokens)[..., 0].masked_fill(~mask, 0)
    cut = data.draw(st.integers(0, len(labels)))
    right = int(mask[torch.arange(len(labels)), labels].sum())
    counts = Counts(len(labels), right, int(mask.sum()) - right)
    weights = {"lm": 0.5, "unlikelihood": 2.0}
    whole = token_loss(TokenScores(log_probs, mask), labels, **weights)
    parts = [
        token_loss(TokenScores(log_probs[part], mask[part]), labels[part], counts=counts, **weights)
        for part in (slice(0, cut), slice(cut, None))
    ]
    for term in TERMS:
        summed = sum(getattr(part, term) for part in parts)
        torch.testing.assert_close(summed, getattr(whole, term))


def test_half_precision_is_computed_in_float32():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 2, 50, generator=generator).bfloat16()
    targets = torch.randint(1, 50, (2, 3, 2), generator=generator)
    labels = torch.tensor([0, 2])
    half = tfew_loss(logits, targets, labels, pad_token_id=PAD)
    assert half.total.dtype == torch.float32
    wide = tfew_loss(logits.float(), targets, labels, pad_token_id=PAD)
    torch.testing.assert_close(half.total, wide.total)


LOGITS = torch.zeros(2, 3, 4, 5)
TARGETS = torch.ones(2, 3, 4, dtype=torch.int64)
LABELS = torch.tensor([0, 2])
GIVEN = {"logits": LOGITS, "target_ids": TARGETS, "labels": LABELS, "target_mask": TARGETS}
HOLE = torch.ones(2, 3, 4).index_fill(1, torch.tensor([2]), 0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logits": LOGITS[0]}, r"logits are \[3, 4, 5\] torch.float32, expected floating"),
        ({"target_ids": TARGETS[:, :2]}, r"target_ids are \[2, 2, 4\].*expected.*\[2, 3, 4\]"),
        ({"target_ids": TARGETS.float()}, r"target_ids are .*torch.float32, expected integers"),
        ({"target_ids": TARGETS + 4}, r"target_ids has 5 .*expected 0 to 4: mask"),
        ({"labels": LABELS[:, None]}, r"labels are \[2, 1\].*expected integers \[2\]"),
        ({"labels": LABELS.float()}, r"labels are .*torch.float32, expected integers"),
        ({"labels": LABELS + 1}, r"labels\[1\] is 3, expected 0 to 2"),
        ({"target_mask": HOLE}, r"labels\[1\] is 2, a choice with no token.*\[0, 1\]"),
        ({"target_mask": HOLE[..., 0]}, r"target_mask is \[2, 3\].*expected \[2, 3, 4\]"),
        ({"target_mask": None}, "expected one of pad_token_id and target_mask, neither given"),
        ({"pad_token_id": 0}, "expected one of pad_token_id and target_mask, both given"),
        ({name: tensor[:0] for name, tensor in GIVEN.items()}, "no examples"),
    ],
)
def test_what_does_not_fit_is_named(changed, message):
    with pytest.raises(IA3Error, match=message):
        tfew_loss(**(GIVEN | changed))
