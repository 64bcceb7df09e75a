"""Scores after a prefix that is computed once: demonstrations, or what many prompts begin with."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ...base.loading import BaseModel
from ..prompts.encoding import EncodedExample
from .choices import MAX_TOKENS, choice_groups, choice_scores, longest_sequence, longest_shared
from .shared_prompt import (
    Targets,
    TreeRow,
    common_prefix,
    evaluating,
    expanded_scores,
    output_layer,
    project_only,
    scores,
    tree_inputs,
    tree_length,
    tried_out,
    verdict,
)
from .token_scores import TokenScores

# So many tokens follow a cached prefix at once. More would spend attention on what the mask hides.
ROW = 512
# From so many tokens on that all prompts begin with, keeping their keys and values saves time.
WORTH_CACHING = 64

_verdicts: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Prefix:
    """What prompts begin with, as a model has computed it.

    Attributes:
        ids: its tokens.
        layers: each layer's keys and values, `[1, heads, len(ids), head_dim]`.
        model: that has computed them.
    """

    ids: tuple[int, ...]
    layers: tuple[tuple[Tensor, Tensor], ...]
    model: nn.Module

    def belongs_to(self, base: BaseModel) -> bool:
        """Whether the keys and values are this model's, and on the device that it is on now."""
        parameter = output_layer(base.model).get_parameter("weight")
        keys = self.layers[-1][0]
        return self.model is base.model and keys.device == parameter.device

    def shared_with(self, examples: Sequence[EncodedExample]) -> int:
        """The number of tokens that all prompts begin with, less the last, which predicts."""
        common = zip(self.ids, common_prefix(examples), strict=False)
        return sum(1 for _ in takewhile(lambda ab: ab[0] == ab[1], common))


def cached_prefix(base: BaseModel, ids: Sequence[int]) -> Prefix:
    """Compute the keys and values of the tokens that prompts begin with, without gradients."""
    from transformers import DynamicCache

    # Not the cache that the model would make: a sliding window's forgets what lies behind it.
    cache = DynamicCache()
    last = torch.tensor([len(ids) - 1], device=base.device)
    with evaluating(base.model), project_only(base.model, last):
        base.model(
            input_ids=torch.tensor([list(ids)], device=base.device),
            past_key_values=cache,
            use_cache=True,
        )
    layers = tuple((layer.keys, layer.values) for layer in cache.layers)
    return Prefix(tuple(ids), layers, base.model)


def ranking_scores(
    base: BaseModel,
    examples: Sequence[EncodedExample],
    *,
    max_tokens: float = MAX_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """`choice_scores`, with what all prompts begin with computed once where that saves time.

    Its keys and values are forgotten afterwards: they are those of the adapter that is active now.

    The arguments and the result are those of `choice_scores`.
    """
    limit = longest_shared(base)
    near = [e for e in examples if longest_sequence(e) <= limit]
    prefix = common_prefix(near) if near else ()
    behind = sum(tree_length(e) - len(prefix) for e in near)
    # What computing the prefix again for each example takes; a cache takes a pass of its own.
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

    Args:
        base: a model that `caches_prefix`, as it was when the prefix was computed.
        prefix: of most of the prompts, in whole or in part.
        examples: all with the same number of choices.
        max_tokens: computed at once where no prefix is seen, and fewer behind a long one, whose
            part of the mask takes memory too; unless one choice after its prompt has more.
        progress: called with the number of examples done since the last call.

    Returns:
        `[examples, choices]`, float32, on the CPU.
    """
    if not examples:
        return torch.empty(0, 0)
    results = torch.empty(len(examples), len(examples[0].choices))
    limit = longest_shared(base)
    shared = [prefix.shared_with([e]) if longest_sequence(e) <= limit else 0 for e in examples]
    far = [i for i, count in enumerate(shared) if not count]
    if far:
        results[far] = choice_scores(
            base, [examples[i] for i in far], max_tokens=max_tokens, progress=progress
        )
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
    """Whether the model computes the same scores after a cached prefix as with whole prompts.

    Tried out once on every model that shares prompts: against whole prompts, and, for scale,
    against the keys and values of another prefix.
    """
    if longest_shared(base) == 0:
        return False
    return tried_out(base, _probe, _verdicts)


def _probe(base: BaseModel) -> bool | None:
    """The verdict, or `None` where the model's state allows none: it is tried again next time."""
    vocabulary = int(output_layer(base.model).get_parameter("weight").shape[0])
    ids = [(13 + 7919 * i) % vocabulary for i in range(20)]
    start, other = tuple(ids[:4]), tuple(ids[4:8])
    examples = [
        EncodedExample((*start, *ids[8:10]), (tuple(ids[10:12]), (ids[12],))),
        EncodedExample((*start, ids[13]), ((ids[14],), tuple(ids[15:17]))),
    ]
    with evaluating(base.model):
        whole = expanded_scores(base, examples).log_probs
        try:
            prefix = cached_prefix(base, start)
            after = _scores_after(base, prefix, examples).log_probs
            wrong = replace(prefix, layers=cached_prefix(base, other).layers)
            astray = _scores_after(base, wrong, examples).log_probs
        except Exception:
            # As with the mask: whatever a model raises that keeps no plain keys and values.
            return False
    return verdict(whole, after, astray)


def _scores_after(
    base: BaseModel, prefix: Prefix, examples: Sequence[EncodedExample]
) -> TokenScores:
    """All examples in one row behind the prefix; each sees it, itself and none of the others."""
    from transformers import DynamicCache

    shared = prefix.shared_with(examples)
    targets = Targets()
    row = TreeRow(0)
    for i, example in enumerate(examples):
        row.append(i, example, shared, targets)
    inputs = tree_inputs(base, [row])
    inputs["attention_mask"] = F.pad(inputs["attention_mask"], (shared, 0))

    def new_cache() -> DynamicCache:
        cache = DynamicCache()
        for index, (keys, values) in enumerate(prefix.layers):
            cache.update(keys[:, :, :shared], values[:, :, :shared], index)
        return cache

    return scores(base, examples, targets, inputs, new_cache)


def _rows(
    examples: Sequence[EncodedExample], shared: Sequence[int], room: float
) -> Iterator[list[int]]:
    """Indices of the examples in rows of at most so many tokens behind the prefix, or of one.

    Args:
        examples: to fill the rows with.
        shared: how many tokens each has in common with the prefix; those with none are left out.
        room: of a row.
    """
    lengths = [tree_length(example) for example in examples]
    row: list[int] = []
    for i in sorted((i for i, count in enumerate(shared) if count), key=lambda i: -shared[i]):
        # What the last one does not share with the prefix is computed for all.
        if row and sum(lengths[j] - shared[i] for j in (*row, i)) > room:
            yield row
            row = []
        row.append(i)
    if row:
        yield row
