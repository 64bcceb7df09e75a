"""Scores after a prefix that is computed once: demonstrations, or what many prompts begin with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import DynamicCache

from ...base.loading import BaseModel
from ..prompts.encoding import EncodedExample
from .answer_tokens import AnswerTokens, TokenScores, answer_scores, evaluating, project_only
from .choices import MAX_TOKENS, choice_groups, choice_scores, longest_sequence, longest_shared
from .expanded import expanded_scores
from .probe import proves_equal
from .shared_prompt import TreeRow, common_prefix, tree_inputs, tree_length

# How many tokens follow a cached prefix at once. More would spend attention on what the mask hides.
ROW = 512
# Caching the keys and values of a shorter common prefix saves no time.
WORTH_CACHING = 64


@dataclass(frozen=True, eq=False)
class Prefix:
    """Tokens that prompts begin with; each layer's keys and values, `[1, heads, length, dim]`."""

    ids: tuple[int, ...]
    layers: tuple[tuple[Tensor, Tensor], ...]
    model: nn.Module

    def belongs_to(self, base: BaseModel) -> bool:
        """Whether this model computed the keys and values, on the device that it is on now."""
        head = base.model.get_output_embeddings()  # type: ignore[operator]
        return self.model is base.model and self.layers[-1][0].device == head.weight.device

    def shared_with(self, examples: Sequence[EncodedExample]) -> int:
        """How many tokens of the prefix all prompts begin with, less the last, which predicts."""
        common = zip(self.ids, common_prefix(examples), strict=False)
        return sum(1 for _ in takewhile(lambda ab: ab[0] == ab[1], common))


def cached_prefix(base: BaseModel, ids: Sequence[int]) -> Prefix:
    """Compute the keys and values of the tokens that prompts begin with, without gradients."""
    # Not the cache that the model would make: a sliding window's forgets what lies behind it.
    cache = DynamicCache()
    last = torch.tensor([len(ids) - 1], device=base.device)
    with evaluating(base.model), project_only(base.model, last):
        tokens = torch.tensor([list(ids)], device=base.device)
        base.model(input_ids=tokens, past_key_values=cache, use_cache=True)
    layers = tuple((layer.keys, layer.values) for layer in cache.layers)
    return Prefix(tuple(ids), layers, base.model)


def ranking_scores(
    base: BaseModel,
    examples: Sequence[EncodedExample],
    *,
    max_tokens: float = MAX_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """`choice_scores`, with what all prompts begin with computed once where that saves time."""
    limit = longest_shared(base)
    near = [e for e in examples if longest_sequence(e) <= limit]
    prefix = common_prefix(near) if near else ()
    behind = sum(tree_length(e) - len(prefix) for e in near)
    # The tokens of computing the prefix again for each example; a cache takes a pass of its own.
    again = len(prefix) * (len(near) - 1)
    if len(prefix) < WORTH_CACHING or max(behind, again) <= ROW or not caches_prefix(base):
        return choice_scores(base, examples, max_tokens=max_tokens, progress=progress)
    cached = cached_prefix(base, prefix)
    return choice_scores_after(base, cached, examples, max_tokens=max_tokens, progress=progress)


def choice_scores_after(
    base: BaseModel,
    prefix: Prefix,
    examples: Sequence[EncodedExample],
    *,
    max_tokens: float = MAX_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """`choice_scores`, with what the prompts share with the prefix not computed again.

    The model is one that `caches_prefix`, as it was when the prefix was computed. Behind a long
    prefix, fewer than `max_tokens` are computed at once: its part of the mask takes memory too.
    """
    if not examples:
        return torch.empty(0, 0, dtype=torch.float32)
    shape = len(examples), len(examples[0].choices)
    results = torch.empty(shape, dtype=torch.float32)
    limit = longest_shared(base)
    shared = [prefix.shared_with([e]) if longest_sequence(e) <= limit else 0 for e in examples]
    if far := [i for i, count in enumerate(shared) if not count]:
        of_far = [examples[i] for i in far]
        results[far] = choice_scores(base, of_far, max_tokens=max_tokens, progress=progress)
    # A row's mask, [room, prefix + room], is as large as [max_tokens, max_tokens].
    room = (math.hypot(len(prefix.ids), 2 * max_tokens) - len(prefix.ids)) / 2
    with evaluating(base.model):
        for row in _rows(examples, shared, min(ROW, room)):
            of_row = [examples[i] for i in row]
            for choices in choice_groups(of_row, limit, min(shared[i] for i in row) + room):
                part = [EncodedExample(e.prompt, e.choices[choices]) for e in of_row]
                after = _scores_after(base, prefix, part).mean_log_probs()
                results[row, choices] = after.float().cpu()
            if progress is not None:
                progress(len(row))
    return results


def caches_prefix(base: BaseModel) -> bool:
    """Whether the model scores the same after a cached prefix as with whole prompts."""
    return longest_shared(base) > 0 and proves_equal(base, _after_own_prefix, expanded_scores)


def _after_own_prefix(base: BaseModel, examples: Sequence[EncodedExample]) -> TokenScores:
    return _scores_after(base, cached_prefix(base, common_prefix(examples)), examples)


def _scores_after(
    base: BaseModel, prefix: Prefix, examples: Sequence[EncodedExample]
) -> TokenScores:
    """Score all examples in one row behind the prefix; each sees the prefix and itself."""
    shared = prefix.shared_with(examples)
    answers = AnswerTokens()
    row = TreeRow()
    for i, example in enumerate(examples):
        row.append(i, example, shared, answers)
    inputs = tree_inputs(base, [row])
    inputs["attention_mask"] = F.pad(inputs["attention_mask"], (shared, 0))

    def new_cache() -> DynamicCache:
        cache = DynamicCache()
        for index, (keys, values) in enumerate(prefix.layers):
            cache.update(keys[:, :, :shared], values[:, :, :shared], index)
        return cache

    return answer_scores(base, examples, answers, inputs, new_cache)


def _rows(
    examples: Sequence[EncodedExample], shared: Sequence[int], room: float
) -> Iterator[list[int]]:
    """Indices of each row's examples, which fit behind the prefix, or are one; without far ones."""
    lengths = [tree_length(example) for example in examples]
    row: list[int] = []
    for i in sorted((i for i, count in enumerate(shared) if count), key=lambda i: -shared[i]):
        # A row computes again what its last example does not share with the prefix.
        if row and sum(lengths[j] - shared[i] for j in (*row, i)) > room:
            yield row
            row = []
        row.append(i)
    if row:
        yield row
