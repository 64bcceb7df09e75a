"""Scores after a prefix whose keys and values are kept, against whole prompts."""

import pytest
import torch
from support.scoring import (
    NOT_SHARING,
    SHARING,
    WINDOWED,
    base_of,
    plain_scores,
    random_examples,
    tokens_seen,
)
from support.tfew import tiny_llama, word_tokenizer

from ia3.base.loading import BaseModel
from ia3.tfew.prompts.encoding import EncodedExample
from ia3.tfew.scoring.prefix import (
    cached_prefix,
    caches_prefix,
    choice_scores_after,
    ranking_scores,
)


def assert_scores(base, scores, examples):
    """They are those of whole prompts, one after the other."""
    plain = torch.stack([plain_scores(base, example) for example in examples])
    torch.testing.assert_close(scores, plain, atol=1e-5, rtol=0)


SHAPES = [(12, (1, 3, 2)), (7, (2, 2, 1)), (1, (1, 1, 1)), (90, (2, 5, 1)), (30, (3, 3, 3))]


@pytest.mark.parametrize("name", SHARING)
def test_scores_after_a_prefix_equal_those_of_whole_prompts(name):
    base = base_of(name)
    examples = random_examples(SHAPES * 3, shared=180)
    assert caches_prefix(base)
    prefix = cached_prefix(base, examples[0].prompt)
    scores = choice_scores_after(base, prefix, examples)
    assert not scores.requires_grad
    assert_scores(base, scores, examples)


@pytest.mark.parametrize("name", [*SHARING, *WINDOWED])
def test_prompts_that_share_a_part_of_the_prefix_or_nothing(name):
    base = base_of(name)
    whole = random_examples([(9, (2, 1)), (4, (1, 3))], shared=60)
    part = [EncodedExample((*e.prompt[:20], 5, 6, 7), e.choices) for e in whole]
    none = random_examples([(3, (2, 2)), (40, (1, 2))], seed=9)
    examples = [*none, *whole, *part, EncodedExample(whole[0].prompt[:1], whole[0].choices)]
    prefix = cached_prefix(base, whole[0].prompt[:60])
    scores = choice_scores_after(base, prefix, examples)
    assert_scores(base, scores, examples)
    # The prefix itself is as it was: the same scores again, in another order.
    again = choice_scores_after(base, prefix, examples[::-1])
    torch.testing.assert_close(again.flip(0), scores, atol=1e-5, rtol=0)


def test_these_keep_no_prefix():
    for name in [*NOT_SHARING, "t5", "bart", "gpt_neo"]:
        assert not caches_prefix(base_of(name)), name


def test_bfloat16_keeps_a_prefix_too():
    base = BaseModel(tiny_llama().to(torch.bfloat16), word_tokenizer(), "tiny")
    assert caches_prefix(base)
    examples = random_examples(SHAPES, shared=50)
    scores = choice_scores_after(base, cached_prefix(base, examples[0].prompt), examples)
    wide = BaseModel(tiny_llama(), word_tokenizer(), "tiny")
    plain = torch.stack([plain_scores(wide, example) for example in examples])
    torch.testing.assert_close(scores, plain, atol=0.2, rtol=0)


@pytest.mark.parametrize(("shared", "count"), [(300, 10), (60, 10), (150, 2), (700, 2)])
def test_what_prompts_share_is_computed_once(shared, count):
    """Also where a few tokens follow it, so that all of them together are not many."""
    base = base_of("llama")
    examples = random_examples([(6, (1, 2))] * count, shared=shared)
    caches_prefix(base)
    seen = tokens_seen(base.model, lambda: ranking_scores(base, examples, max_tokens=800))
    assert sum(seen) <= shared + max(512, count * (6 + 1 + 2))
