"""Which token comes next."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from ia3.errors import StateError
from ia3.serve.engine.interface import Generation
from ia3.serve.engine.sampling import Sampler, pick

VOCABULARY = 50


def sampler(**options):
    return Sampler(Generation((1,), None, 1, **options))


def logits(seed=0, size=VOCABULARY):
    return 3 * torch.randn(1, size, generator=torch.Generator().manual_seed(seed))


def counts(scores, draws, **options):
    """How often each token was drawn."""
    by = sampler(seed=0, **options)
    tokens = torch.tensor([pick(scores, [by])[0].token for _ in range(draws)])
    return tokens.bincount(minlength=scores.shape[1])


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.9), (1.0, 0.3), (1.3, 0.999)]
)
def test_tokens_come_as_often_as_the_formula_says(temperature, top_p):
    scores, draws = logits(), 4000
    wide = TopPLogitsWarper(top_p)(
        None, TemperatureLogitsWarper(temperature)(None, scores.double())
    )
    expected = wide.softmax(-1)[0]
    found = counts(scores, draws, temperature=temperature, top_p=top_p)
    assert not found[expected == 0].any()
    deviation = (draws * expected * (1 - expected)).sqrt().clamp(min=1)
    assert ((found - draws * expected).abs() <= 5 * deviation).all()


def test_a_nucleus_of_very_many_tokens_is_whole():
    scores = torch.zeros(1, 5000)  # all alike
    found = counts(scores, 3000, top_p=0.5)
    assert (found > 0).sum() > 1000
    assert (found > 0).sum() <= 2501


def test_the_likeliest_token_is_in_any_nucleus():
    scores = logits()
    assert counts(scores, 20, top_p=1e-9)[scores.argmax()] == 20


@pytest.mark.parametrize("temperature", [0.0, 1e-9, 1e-300])
def test_low_temperatures_take_the_likeliest(temperature):
    scores = logits()
    assert counts(scores, 20, temperature=temperature)[scores.argmax()] == 20


def test_high_temperatures_take_any():
    assert (counts(logits(), 2000, temperature=1e30) > 0).all()


def test_tokens_that_the_model_excludes_are_never_drawn():
    scores = logits()
    scores[0, ::2] = -torch.inf
    assert not counts(scores, 500, temperature=5.0)[::2].any()


def test_a_seed_gives_the_same_tokens_and_another_one_others():
    def drawn(seed):
        by = sampler(seed=seed)
        return [pick(logits(i), [by])[0].token for i in range(20)]

    assert drawn(3) == drawn(3) != drawn(4)
    assert drawn(None) != drawn(None)


def test_log_probabilities_are_the_models_before_temperature_and_top_p():
    scores = logits()
    found = pick(scores, [sampler(temperature=0.1, top_p=0.2, logprobs=3)])[0]
    expected = scores.double().log_softmax(-1)[0]
    assert found.logprob == pytest.approx(float(expected[found.token]), abs=1e-5)
    values, ids = expected.topk(3)
    assert [token for token, _ in found.top] == ids.tolist()
    assert [logprob for _, logprob in found.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert pick(scores, [sampler(logprobs=0)])[0].top == ()
    assert pick(scores, [sampler()])[0].logprob is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_without_finite_scores_has_an_error_and_the_others_tokens(value):
    scores = torch.cat([logits(0), logits(1)])
    scores[0, 5] = value
    failed, picked = pick(scores, [sampler(temperature=0.0)] * 2)
    assert isinstance(failed, StateError)
    assert picked.token == int(scores[1].argmax())


def test_a_token_that_cannot_come_has_a_log_probability_that_json_can_say():
    scores = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    (picked,) = pick(scores, [sampler(temperature=0.0, logprobs=2)])
    assert picked.top == ((0, 0.0), (1, -9999.0))
