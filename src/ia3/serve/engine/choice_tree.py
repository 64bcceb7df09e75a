"""Choices as a tree of tokens: what they begin with together is asked once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Tokens = tuple[int, ...]


def next_tokens(choices: Sequence[Tokens]) -> dict[Tokens, list[int]]:
    """Beginning -> the tokens that some choice goes on with, in order; the first one is empty."""
    found: dict[Tokens, set[int]] = {}
    for choice in choices:
        for place, token in enumerate(choice):
            found.setdefault(choice[:place], set()).add(token)
    return {begin: sorted(tokens) for begin, tokens in found.items()}


def mean_logprobs(
    choices: Sequence[Tokens], logprobs: Mapping[Tokens, Mapping[int, float]]
) -> list[float]:
    """The mean log-probability of each choice's tokens, `[choices]`; of each beginning's next."""
    return [
        sum(logprobs[choice[:place]][token] for place, token in enumerate(choice)) / len(choice)
        for choice in choices
    ]
