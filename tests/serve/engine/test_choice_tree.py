"""Choices as a tree: each beginning is asked once, and the means are those of the tokens."""

from __future__ import annotations

from hypothesis import given, strategies as st

from ia3.serve.engine.choice_tree import mean_logprobs, next_tokens

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple)


@given(st.lists(TOKENS, min_size=1, max_size=6, unique=True))
def test_each_token_of_each_choice_is_asked_for_behind_what_comes_before_it(choices):
    tree = next_tokens(choices)
    asked = {(begin, token) for begin, tokens in tree.items() for token in tokens}
    assert asked == {(c[:place], c[place]) for c in choices for place in range(len(c))}
    assert sum(map(len, tree.values())) == len(asked)
    # As if each token's log-probability were known by its place in the tree.
    value = {(begin, token): hash((begin, token)) % 100 for begin, token in asked}
    told = {begin: {t: float(value[begin, t]) for t in tokens} for begin, tokens in tree.items()}
    for choice, mean in zip(choices, mean_logprobs(choices, told), strict=True):
        values = [value[choice[:place], token] for place, token in enumerate(choice)]
        assert mean * len(choice) == sum(values) or abs(mean * len(choice) - sum(values)) < 1e-9


def test_words_that_begin_alike_share_what_is_asked():
    assert next_tokens([(5, 1), (5, 2), (7,)]) == {(): [5, 7], (5,): [1, 2]}
