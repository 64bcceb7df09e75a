"""The three loss terms: hand-computed, by property, and against the T-Few authors' own code."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tfew_fixtures import word_tokenizer
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from ia3 import IA3Config, IA3Model
from ia3.base_model import BaseModel
from ia3.tfew.encoding import EncodedExample
from ia3.tfew.losses import TFewLoss, TokenScores, token_loss
from ia3.tfew.scoring import token_scores

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


def scores_of(probabilities: list[list[list[float]]]) -> TokenScores:
    """Token probabilities, `[batch][choices][tokens]`, ragged."""
    batch, choices = len(probabilities), max(map(len, probabilities))
    length = max(len(tokens) for example in probabilities for tokens in example)
    log_probs = torch.zeros(batch, choices, length)
    mask = torch.zeros(batch, choices, length, dtype=torch.bool)
    for i, example in enumerate(probabilities):
        for c, tokens in enumerate(example):
            for t, p in enumerate(tokens):
                log_probs[i, c, t] = math.log(p)
                mask[i, c, t] = True
    return TokenScores(log_probs, mask)


def loss_of(probabilities: list[list[list[float]]], labels: list[int]) -> TFewLoss:
    return token_loss(scores_of(probabilities), torch.tensor(labels))


# -- by hand ---------------------------------------------------------------------------------------


def test_lm_is_the_mean_over_the_right_tokens_of_the_whole_batch():
    # Three right tokens in all, so that the longer answer weighs more.
    loss = loss_of([[[0.5, 0.25], [0.9]], [[0.1], [0.125]]], [0, 1])
    assert loss.lm.item() == pytest.approx((1 + 2 + 3) * math.log(2) / 3)


def test_length_norm_compares_means_not_sums():
    # The sums differ (0.25 against 0.5), the means do not: a coin toss.
    loss = loss_of([[[0.5, 0.5], [0.5]]], [0])
    assert loss.length_norm.item() == pytest.approx(math.log(2))


def test_length_norm_of_unequal_choices():
    loss = loss_of([[[0.8, 0.2], [0.1], [0.3, 0.3]]], [2])
    # exp(mean log p) is the geometric mean: 0.4, 0.1 and 0.3.
    assert loss.length_norm.item() == pytest.approx(-math.log(0.3 / 0.8))


def test_unlikelihood_is_the_mean_over_wrong_tokens():
    loss = loss_of([[[0.9], [0.5, 0.2]], [[0.3], [0.7]]], [0, 1])
    expected = -sum(math.log(1 - p + 1e-2) for p in (0.5, 0.2, 0.3)) / 3
    assert loss.unlikelihood.item() == pytest.approx(expected, rel=1e-6)


def test_unlikelihood_of_a_certain_wrong_token_is_finite():
    loss = loss_of([[[0.5], [1.0]]], [0])
    assert loss.unlikelihood.item() == pytest.approx(-math.log(1e-2), rel=1e-4)


def test_unlikelihood_is_zero_where_nothing_is_wrong():
    loss = loss_of([[[0.5, 0.5]]], [0])
    assert loss.unlikelihood.item() == 0
    assert loss.length_norm.item() == 0
    assert loss.total.item() == pytest.approx(math.log(2))


def test_a_choice_with_no_token_is_no_choice():
    with_hole = loss_of([[[0.5], [0.2], []], [[0.3], [0.4], [0.6]]], [1, 2])
    first, second = loss_of([[[0.5], [0.2]]], [1]), loss_of([[[0.3], [0.4], [0.6]]], [2])
    length_norm = (first.length_norm + second.length_norm) / 2
    torch.testing.assert_close(with_hole.length_norm, length_norm)
    # One wrong token in the first example, two in the second.
    unlikelihood = (first.unlikelihood + 2 * second.unlikelihood) / 3
    torch.testing.assert_close(with_hole.unlikelihood, unlikelihood)
    assert scores_of([[[0.5], [0.2], []]]).mean_log_probs()[0, 2].item() == -math.inf


# -- by property -----------------------------------------------------------------------------------


@st.composite
def batches(draw: st.DrawFn) -> tuple[TokenScores, Tensor]:
    batch, choices = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    labels = [draw(st.integers(0, choices - 1)) for _ in range(batch)]
    # From all but impossible to certain; wrong choices may be missing, the right one never.
    token = st.floats(-40, 0, width=32)
    log_probs = torch.zeros(batch, choices, 3)
    mask = torch.zeros(batch, choices, 3, dtype=torch.bool)
    for i in range(batch):
        for c in range(choices):
            values = draw(st.lists(token, min_size=1 if c == labels[i] else 0, max_size=3))
            log_probs[i, c, : len(values)] = torch.tensor(values)
            mask[i, c, : len(values)] = True
    return TokenScores(log_probs, mask), torch.tensor(labels)


@given(batches())
@settings(max_examples=100, deadline=None)
def test_total_is_the_plain_sum_and_gradients_are_finite(batch):
    scores, labels = batch
    log_probs = scores.log_probs.requires_grad_()
    loss = token_loss(TokenScores(log_probs, scores.mask), labels)
    torch.testing.assert_close(loss.total, loss.lm + loss.length_norm + loss.unlikelihood)
    loss.total.backward()
    assert torch.isfinite(loss.total)
    assert torch.isfinite(log_probs.grad[scores.mask]).all()


@given(batches(), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_the_order_of_choices_does_not_matter(batch, random):
    scores, labels = batch
    order = list(range(scores.mask.shape[1]))
    random.shuffle(order)
    permuted = TokenScores(scores.log_probs[:, order], scores.mask[:, order])
    moved = torch.tensor([order.index(label) for label in labels.tolist()])
    before, after = token_loss(scores, labels), token_loss(permuted, moved)
    for term in ("lm", "length_norm", "unlikelihood", "total"):
        torch.testing.assert_close(getattr(after, term), getattr(before, term))


@given(batches())
@settings(max_examples=50, deadline=None)
def test_every_term_falls_when_the_right_answer_is_likelier(batch):
    scores, labels = batch
    right = torch.nn.functional.one_hot(labels, scores.mask.shape[1]).bool()[:, :, None]
    better = TokenScores(
        torch.where(right, scores.log_probs / 2, scores.log_probs * 2), scores.mask
    )
    before, after = token_loss(scores, labels), token_loss(better, labels)
    for term in ("lm", "length_norm", "unlikelihood"):
        assert getattr(after, term) <= getattr(before, term) + 1e-6


# -- against the authors' code ---------------------------------------------------------------------


@pytest.fixture(params=["lm+ln+ul", "lm only scored", "lm+ln"])
def golden(request):
    """A case's figures, its inputs, and the loss of ours, with gradients on the vectors."""
    path = GOLDEN / "tfew_losses.json"
    if not path.is_file():
        pytest.skip(f"the authors' figures are not there: {path}")
    case = next(c for c in json.loads(path.read_text())["cases"] if c["name"] == request.param)
    model = AutoModelForSeq2SeqLM.from_pretrained(GOLDEN / "tiny-t5-gated").eval()
    tensors = load_file(GOLDEN / case["vectors"])
    suffix = ".multi_lora_b"
    vectors = {
        name.removeprefix("init.").removesuffix(suffix): tensor[:, None]
        for name, tensor in tensors.items()
        if name.startswith("init.")
    }
    config = IA3Config(target_modules=["k", "v", "wi_1"], feedforward_modules=[])
    ia3_model = IA3Model(model, config, vectors=vectors)
    prompts = [tuple(t for t in row if t != 0) for row in case["input_ids"]]
    examples = [
        EncodedExample(prompt, tuple(tuple(t for t in choice if t != 0) for choice in choices))
        for prompt, choices in zip(prompts, case["answer_choices_ids"], strict=True)
    ]
    scores = token_scores(BaseModel(model, word_tokenizer(), "tiny-t5-gated"), examples)
    loss = token_loss(scores, torch.tensor(case["labels"]))
    return case, tensors, examples, ia3_model, scores, loss


def test_terms_equal_the_authors(golden):
    case, _, examples, _, _, loss = golden
    figures, config = case["losses"], case["config"]
    rows = sum(len(e.choices) for e in examples)
    positions = rows * len(case["answer_choices_ids"][0][0])
    counted = sum(
        len(choice)
        for e, label in zip(examples, case["labels"], strict=True)
        for c, choice in enumerate(e.choices)
        if c != label
    )
    # Their sum runs over padding and the right answers too, where p is 0: −log(1.01) each.
    constant = (positions - counted) / counted * math.log(1.01)
    assert loss.lm.item() == pytest.approx(figures["lm_loss"], abs=1e-5)
    expected = figures["loss"]
    total = loss.lm
    if config["mc_loss"]:
        assert loss.length_norm.item() == pytest.approx(figures["mc_loss"], abs=1e-5)
        total = total + loss.length_norm
    if config["unlikely_loss"]:
        theirs = figures["unlikely_loss"] + constant
        assert loss.unlikelihood.item() == pytest.approx(theirs, abs=1e-5)
        total = total + loss.unlikelihood
        expected += constant
    assert total.item() == pytest.approx(expected, abs=1e-5)
    if all(config.values()):
        assert loss.total.item() == pytest.approx(expected, abs=1e-5)


def test_gradients_equal_the_authors(golden):
    case, tensors, _, ia3_model, _, loss = golden
    config = case["config"]
    total = loss.lm
    if config["mc_loss"]:
        total = total + loss.length_norm
    if config["unlikely_loss"]:
        total = total + loss.unlikelihood
    vectors = ia3_model.vectors("default")
    gradients = torch.autograd.grad(total, list(vectors.values()))
    for name, gradient in zip(vectors, gradients, strict=True):
        theirs = tensors[f"grad.{name}.multi_lora_b"]
        torch.testing.assert_close(gradient.flatten(), theirs, atol=1e-5, rtol=1e-4)


def test_ranking_equals_the_authors(golden):
    case, _, _, _, scores, _ = golden
    # Without length normalisation they rank by the plain sum. Their scores are negated.
    normalised = case["config"]["length_norm"]
    ranked = scores.mean_log_probs() if normalised else scores.log_probs.sum(-1)
    assert ranked.argmax(1).tolist() == case["prediction"]
    labels = torch.tensor(case["labels"])[:, None]
    ours = -ranked.gather(1, labels)[:, 0]
    torch.testing.assert_close(ours, torch.tensor(case["score_of_label"]), atol=1e-5, rtol=1e-5)
    others = -ranked.scatter(1, labels, -torch.inf).amax(1)
    theirs = torch.tensor(case["best_score_of_others"])
    torch.testing.assert_close(others, theirs, atol=1e-5, rtol=1e-5)
