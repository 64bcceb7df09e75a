"""Scores of answer choices against the plain way: one whole text after the other."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from hypothesis import given, settings, strategies as st
from support import scoring
from support.scoring import base_of, random_examples, tokens_seen
from support.tfew import (
    VOCABULARY,
    hook_count,
    plain_token_scores,
    random_base,
    tiny_llama,
    word_tokenizer,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, CohereConfig, Gemma2Config

from ia3 import IA3Config, IA3Model
from ia3.base.loading import BaseModel
from ia3.errors import IA3Error
from ia3.tfew.prompts.encoding import EncodedExample
from ia3.tfew.scoring.answer_tokens import TokenScores
from ia3.tfew.scoring.choices import choice_scores, shares_keys, shares_prompt, token_scores
from ia3.tfew.scoring.expanded import encoder_decoder_scores, expanded_scores
from ia3.tfew.scoring.shared_prompt import shared_scores
from ia3.tfew.scoring.vocabulary import POSITIONS
from ia3.tfew.training.losses import token_loss

SHAPES = [
    (12, (1, 3, 2)),
    (7, (2, 2, 1, 4)),  # one choice more than the others
    (1, (1, 1)),  # nothing but one token
    (150, (2, 5)),
    (30, (3,) * 20),
]


def assert_plain(base, examples, scores):
    assert scores.log_probs.shape[0] == len(examples)
    with torch.no_grad():
        for i, example in enumerate(examples):
            plain = plain_token_scores(base, example)
            for c, of_choice in enumerate(plain):
                assert scores.mask[i, c].sum() == len(of_choice)
                assert scores.mask[i, c, : len(of_choice)].all()
                found = scores.log_probs[i, c, : len(of_choice)]
                torch.testing.assert_close(found, of_choice, atol=1e-4, rtol=0)
            assert not scores.mask[i, len(plain) :].any()
    assert (scores.log_probs[~scores.mask] == 0).all()


def gradients(scores, vectors):
    """Of a sum with another weight for every token, so that none can stand in for another."""
    log_probs = scores.log_probs
    weights = torch.linspace(1, 2, log_probs.numel()).reshape(log_probs.shape)
    return torch.autograd.grad((log_probs * weights).sum(), vectors)


@contextmanager
def random_vectors(base):
    """Adapters well away from the identity, so that their gradients say something."""
    ia3_model = IA3Model(base.model, IA3Config())
    generator = torch.Generator().manual_seed(5)
    vectors = list(ia3_model.vectors("default").values())
    with torch.no_grad():
        for vector in vectors:
            vector.copy_(1 + 0.3 * torch.randn(vector.shape, generator=generator))
    try:
        yield vectors
    finally:
        ia3_model.unload()


# -- equal to the plain way ------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [0, 23])
@pytest.mark.parametrize("name", scoring.ALL)
def test_scores_equal_the_plain_way(name, shared):
    base = base_of(name)
    # One with nothing but the common beginning, where there is one.
    examples = random_examples([*SHAPES, (int(shared == 0), (1, 3))], shared=shared)
    # The same prompt twice.
    examples.append(examples[0])
    with torch.no_grad():
        assert_plain(base, examples, token_scores(base, examples))
        # One after the other, too: batching changes nothing.
        for example in examples[:2]:
            assert_plain(base, [example], token_scores(base, [example]))


@pytest.mark.parametrize("name", [*scoring.SHARING, *scoring.NOT_SHARING])
def test_which_share_the_prompt(name):
    assert shares_prompt(base_of(name)) == (name in scoring.SHARING)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "t5", "bart"])
def test_gradients_equal_the_plain_way(name):
    base = base_of(name)
    examples = random_examples([(12, (1, 3, 2)), (7, (2, 1))], shared=4)
    with random_vectors(base) as vectors:
        scores = token_scores(base, examples)
        log_probs = torch.zeros_like(scores.log_probs)
        for i, example in enumerate(examples):
            for c, tokens in enumerate(plain_token_scores(base, example)):
                log_probs[i, c, : len(tokens)] = tokens
        plain = gradients(TokenScores(log_probs, scores.mask), vectors)
        torch.testing.assert_close(gradients(scores, vectors), plain, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", scoring.ENCODER_DECODER)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_prompt_is_encoded_once_and_its_keys_too(name, checkpointing):
    base = random_base(scoring.ENCODER_DECODER[name])
    examples = random_examples([(12, (1, 3, 2, 2)), (7, (2, 1))])
    assert shares_keys(base)
    plain = encoder_decoder_scores(base, examples).log_probs
    if checkpointing:
        base.model.gradient_checkpointing_enable()
        base.model.train()
    end = "EncDecAttention.k" if name == "t5" else "encoder_attn.k_proj"
    keys = next(m for n, m in base.model.get_decoder().named_modules() if n.endswith(end))
    rows = []
    keys.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    scores = token_scores(base, examples)
    torch.testing.assert_close(scores.log_probs, plain, atol=1e-5, rtol=0)
    # Blocks that are checkpointed are given no cache to take them from.
    assert rows == [6 if checkpointing else 2]


choice_lengths = st.one_of(
    st.lists(st.integers(1, 6), min_size=2, max_size=5),
    st.lists(st.integers(1, 3), min_size=30, max_size=80),
)
prompts = st.one_of(st.integers(1, 20), st.integers(129, 300))


@pytest.mark.parametrize("name", ["llama", "mistral", "t5"])
@given(
    shapes=st.lists(st.tuples(prompts, choice_lengths), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    shared=st.sampled_from([0, 0, 1, 30, 140]),
    max_tokens=st.sampled_from([1, 64, 300, 4096]),
)
@settings(max_examples=10, deadline=None)
def test_any_mix_of_lengths_equals_the_plain_way(name, shapes, seed, shared, max_tokens):
    base = base_of(name)
    examples = random_examples(shapes, seed, shared)
    with torch.no_grad():
        assert_plain(base, examples, token_scores(base, examples, max_tokens=max_tokens))


# Of three tokens, so that nearly all choices begin like another, or are the beginning of one.
choice = st.lists(st.integers(3, 5), min_size=1, max_size=5).map(tuple)
alike = st.lists(choice, min_size=2, max_size=12, unique=True).map(tuple)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@given(
    choices=st.lists(alike, min_size=1, max_size=4),
    shared=st.sampled_from([0, 1, 20]),
    own=st.sampled_from([1, 7, 150]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=15, deadline=None)
def test_choices_that_begin_alike_score_as_in_rows_of_their_own(name, choices, shared, own, seed):
    base = base_of(name)
    prompts = random_examples([(own, ())] * len(choices), seed, shared)
    # The first prompt a second time, with choices of its own.
    prompts[-1] = prompts[0]
    examples = [EncodedExample(e.prompt, c) for e, c in zip(prompts, choices, strict=True)]
    with random_vectors(base) as vectors:
        together, apart = shared_scores(base, examples), expanded_scores(base, examples)
        torch.testing.assert_close(together.log_probs, apart.log_probs, atol=1e-4, rtol=0)
        assert torch.equal(together.mask, apart.mask)
        ours, plain = gradients(together, vectors), gradients(apart, vectors)
    torch.testing.assert_close(ours, plain, atol=1e-3, rtol=1e-3)


def test_what_choices_begin_with_is_computed_once():
    base = base_of("llama")
    begin = (5, 6, 7, 8)
    choices = tuple((*begin, *end) for end in [(3,), (4,), (9, 3), (9, 4), ()])
    (prompt,) = random_examples([(10, ())])
    example = EncodedExample(prompt.prompt, choices)
    assert shares_prompt(base)
    tokens = tokens_seen(base.model, lambda: token_scores(base, [example], max_tokens=15))
    # The prompt, what all begin with, and the 9 that two go on with; last tokens predict nothing.
    assert tokens == [10 + 4 + 1]


# -- choice scores ---------------------------------------------------------------------------------


def test_choice_scores_are_mean_log_probabilities_in_the_order_given():
    base = base_of("gpt2")
    examples = random_examples([(9, (1, 4)), (60, (2, 2)), (3, (3, 1))])
    done = []
    scores = choice_scores(base, examples, max_tokens=20, progress=done.append)
    with torch.no_grad():
        plain = [[float(t.mean()) for t in plain_token_scores(base, e)] for e in examples]
    torch.testing.assert_close(scores, torch.tensor(plain), atol=1e-4, rtol=0)
    assert sum(done) == len(examples)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad


def test_scoring_leaves_the_model_as_it_was():
    base = BaseModel(tiny_llama(attention_dropout=0.5), word_tokenizer(), "tiny")
    base.model.train()
    examples = random_examples([(9, (1, 4)), (60, (2, 2))])
    first = choice_scores(base, examples)
    assert base.model.training
    # Dropout does not touch scores.
    assert torch.equal(first, choice_scores(base, examples))
    with pytest.raises(IndexError):
        token_scores(base, [EncodedExample((5, VOCABULARY + 5), ((3,), (4,)))])
    assert hook_count(base.model) == 0


def test_scores_in_bfloat16_are_near_those_in_float32():
    wide = BaseModel(tiny_llama(), word_tokenizer(), "tiny")
    narrow = BaseModel(tiny_llama().to(torch.bfloat16), word_tokenizer(), "tiny")
    examples = random_examples([(9, (1, 4)), (60, (2, 2)), (150, (1, 1))])
    assert shares_prompt(narrow)
    scores = choice_scores(narrow, examples)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, choice_scores(wide, examples), atol=0.2, rtol=0)


# -- the output layer ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "opt", "bloom", "mamba", "t5", "bart"])
def test_only_answer_positions_are_projected(name):
    base = random_base(scoring.ALL[name])
    examples = random_examples([(150, (1, 3, 2)), (20, (2, 2))])
    rows = []
    base.model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: rows.append(output[..., 0].numel())
    )
    with torch.no_grad():
        token_scores(base, examples)  # the model is tried out before the first scores
        rows.clear()
        scores = token_scores(base, examples)
    assert rows
    assert sum(rows) <= int(scores.mask.sum())


def test_a_model_without_an_output_layer_is_refused():
    class Bodiless(type(tiny_llama())):
        def get_output_embeddings(self):
            return None

    model = Bodiless(tiny_llama().config)
    with pytest.raises(IA3Error, match="output embeddings"):
        token_scores(BaseModel(model, word_tokenizer(), "x"), random_examples([(3, (1, 1))]))


def test_long_examples_among_short_ones_repeat_only_their_own_prompts():
    base = base_of("mistral")
    short, long = random_examples([(6, (2, 1)), (9, (1, 3))]), random_examples([(30, (2, 2, 1))])
    examples = [short[0], long[0], short[1]]
    assert shares_prompt(base)
    tokens = tokens_seen(base.model, lambda: token_scores(base, examples))
    assert sum(tokens) < 3 * 33 + 2 * 15


def test_a_model_that_sees_the_answer_is_refused():
    with pytest.raises(IA3Error, match="BertLMHeadModel is not causal"):
        token_scores(random_base(BertConfig(**scoring.LLAMA)), random_examples(SHAPES))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ignored", ["attention_mask", "position_ids"])
def test_a_model_that_ignores_an_input_cannot_share_the_prompt(dtype, ignored):
    base = random_base(scoring.SHARING["gpt2"])
    base.model.to(dtype)
    assert shares_prompt(base)
    other = random_base(scoring.SHARING["gpt2"])
    forward = other.model.to(dtype).forward
    other.model.forward = lambda **inputs: forward(**{**inputs, ignored: None})
    assert not shares_prompt(other)


class WidestProjection(TorchDispatchMode):
    """Notes the most rows of logits that any operation gives."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape[-1:] == (VOCABULARY,):
            self.rows = max(self.rows, result.numel() // VOCABULARY)
        return result


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_logits_of_a_batch_are_never_there_at_once(name):
    base = base_of(name)
    examples = random_examples([(5, [4] * 12), (7, [3] * 12), (4, [5] * 12)])
    shares_prompt(base)
    with random_vectors(base), WidestProjection() as seen:
        scores = token_scores(base, examples)
        token_loss(scores, torch.tensor([0, 1, 2])).total.backward()
    assert scores.mask.sum() > 2 * POSITIONS
    assert 0 < seen.rows <= POSITIONS


GROUPED = {**scoring.LLAMA, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(
            **scoring.LLAMA, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.5
        ),
        CohereConfig(**scoring.LLAMA, num_key_value_heads=2, logit_scale=0.25, pad_token_id=0),
    ],
    ids=lambda config: config.model_type,
)
def test_what_a_model_does_to_its_logits_is_heeded(config):
    base = random_base(config)
    examples = random_examples([(5, [2, 1, 3]), (7, [1, 2])])
    assert_plain(base, examples, token_scores(base, examples))
    assert "forward" not in vars(base.model.get_output_embeddings())


@pytest.mark.parametrize("max_tokens", [40, 4096])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "t5", "gemma2"])
def test_examples_are_scored_each_with_an_adapter_of_its_own(name, max_tokens):
    gemma2 = {**scoring.LLAMA, "num_key_value_heads": 2, "head_dim": 8}
    base = random_base(Gemma2Config(**gemma2) if name == "gemma2" else scoring.ALL[name])
    examples = random_examples(SHAPES)
    names = ["first", "second", "first", "__base__", "second"]
    model = IA3Model(base.model, IA3Config(), "first")
    model.add_adapter("second", IA3Config())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for vector in (*model.vectors("first").values(), *model.vectors("second").values()):
            vector.copy_(1 + 0.3 * torch.randn(vector.shape, generator=generator))
        of_adapters = [set() for _ in examples]

        def routing(index):
            for i in index.unique().tolist():
                of_adapters[i].add(names[i])
            if index.dim() == 2:
                return model.route(names, index)
            return model.route([names[i] for i in index])

        found = choice_scores(base, examples, max_tokens=max_tokens, routing=routing)
        for i, example in enumerate(examples):
            with model.disable_adapter() if names[i] == "__base__" else nullcontext():
                if names[i] != "__base__":
                    model.set_adapter(names[i])
                plain = torch.stack([each.mean() for each in plain_token_scores(base, example)])
            torch.testing.assert_close(found[i, : len(plain)], plain, atol=1e-4, rtol=0)
            assert (found[i, len(plain) :] == -torch.inf).all()
    assert of_adapters == [{each} for each in names]
