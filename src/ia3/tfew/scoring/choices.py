"""Scores of answer choices: log-probabilities of their tokens after the prompt.

A decoder-only model gets the prompt and all its choices in one sequence: each choice sees the
prompt and itself (a tree mask), at the positions it would have alone, so that the prompt is
computed once, and so is what several choices begin with. Short examples are packed into rows of one
length, so that no padding is computed either, and what all prompts of a batch begin with (an
instruction, a chat template's opening) is computed once a row.

Not every architecture takes a tree mask. `shares_prompt` tries it out on the model itself; where
the scores differ, every choice gets a row of its own, with the prompt repeated. An encoder-decoder
encodes each prompt once, and decodes every choice in a row of its own; what the choices attend to
of a prompt is computed once, too, where the model allows that.

What is computed at once is bounded by a number of tokens: a batch of examples is computed in parts,
and the choices of one example too where they alone are more. Scores and gradients stay the same.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...base.loading import BaseModel
from ...errors import IA3Error
from ..prompts.encoding import EncodedExample
from .shared_prompt import (
    RowContext,
    compute_dtype,
    encoder_decoder_scores,
    evaluating,
    expanded_scores,
    output_layer,
    shape_of,
    shared_scores,
    tree_length,
    tried_out,
    verdict,
)
from .token_scores import TokenScores

# How many tokens are computed at once, unless more memory is given, or less.
MAX_TOKENS = 4096

_verdicts: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def token_scores(
    base: BaseModel,
    examples: Sequence[EncodedExample],
    *,
    max_tokens: float = math.inf,
    within: RowContext | None = None,
) -> TokenScores:
    """Score all choices of a batch, with gradients where they are enabled.

    Args:
        base: the model, with the adapter to score with active on it.
        examples: their choices may differ in number.
        max_tokens: computed at once, unless one choice after its prompt has more; what packed rows
            leave free at their ends is not counted. Where a batch has more, each part's activations
            are computed once more for the gradients.
        within: of the rows of each pass, where all of a batch are one task's.

    Raises:
        IA3Error: the model's output layer cannot be found.
    """
    limit = longest_shared(base)
    parts = [
        (batch, choices)
        for batch in example_batches(base, examples, max_tokens)
        for choices in choice_groups([examples[i] for i in batch], limit, max_tokens)
    ]
    if len(parts) == 1:
        return _scores_at_once(base, examples, limit, within)
    scored = []
    for batch, choices in parts:
        of_part = [EncodedExample(examples[i].prompt, examples[i].choices[choices]) for i in batch]
        if torch.is_grad_enabled():
            # One part's activations are held at a time, in the backward pass too.
            part = checkpoint(_scores_at_once, base, of_part, limit, within, use_reentrant=False)
        else:
            part = _scores_at_once(base, of_part, limit, within)
        scored.append(part)
    shape = shape_of(examples)
    log_probs = scored[0].log_probs.new_zeros(shape)
    mask = torch.zeros(shape, dtype=torch.bool, device=log_probs.device)
    for (batch, choices), part in zip(parts, scored, strict=True):
        rows = torch.tensor(batch, device=log_probs.device)[:, None]
        start = choices.start or 0
        columns = torch.arange(start, start + part.mask.shape[1], device=log_probs.device)
        length = part.mask.shape[2]
        log_probs[rows, columns, :length] = part.log_probs
        mask[rows, columns, :length] = part.mask
    return TokenScores(log_probs, mask)


def example_batches(
    base: BaseModel, examples: Sequence[EncodedExample], max_tokens: float
) -> Iterator[list[int]]:
    """Indices of the examples, longest first, in parts of at most so many tokens.

    An example of more tokens is a part of its own.
    """
    limit = longest_shared(base)
    sizes = [_Size.of(example) for example in examples]
    part: list[int] = []
    for i in sorted(range(len(examples)), key=lambda i: -sizes[i].longest):
        if part and _tokens([sizes[j] for j in (*part, i)], limit) > max_tokens:
            yield part
            part = []
        part.append(i)
    if part:
        yield part


def choice_scores(
    base: BaseModel,
    examples: Sequence[EncodedExample],
    *,
    max_tokens: float = MAX_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Length-normalised log-probabilities of all choices, batch by batch, without gradients.

    Args:
        base: the model, with the adapter to score with active on it.
        examples: all with the same number of choices.
        max_tokens: computed at once, unless one choice after its prompt has more.
        progress: called with the number of examples done since the last call.

    Returns:
        `[examples, choices]`, float32, on the CPU.
    """
    if not examples:
        return torch.empty(0, 0)
    results = torch.empty(len(examples), len(examples[0].choices))
    with evaluating(base.model):
        for batch in example_batches(base, examples, max_tokens):
            scores = token_scores(base, [examples[i] for i in batch], max_tokens=max_tokens)
            results[batch] = scores.mean_log_probs().float().cpu()
            if progress is not None:
                progress(len(batch))
    return results


def _scores_at_once(
    base: BaseModel,
    examples: Sequence[EncodedExample],
    longest_shared: float,
    within: RowContext | None,
) -> TokenScores:
    """All choices in one forward pass, or in one for each way that some of the examples need.

    A few long examples must not repeat the prompts of all.
    """
    if base.is_encoder_decoder:
        keys_once = within is None and attends_to_one_prompt(base)
        return encoder_decoder_scores(base, examples, keys_once=keys_once, within=within)
    ways: dict[Callable[..., TokenScores], list[int]] = {}
    for i, example in enumerate(examples):
        way: Callable[..., TokenScores] = shared_scores
        if longest_sequence(example) > longest_shared:
            way = expanded_scores
        ways.setdefault(way, []).append(i)
    scored = [
        way(base, [examples[i] for i in indices], within=within) for way, indices in ways.items()
    ]
    if len(scored) == 1:
        return scored[0]
    order = [i for indices in ways.values() for i in indices]
    back = torch.tensor(order, device=scored[0].mask.device).argsort()
    return TokenScores(
        _stacked([part.log_probs for part in scored])[back],
        _stacked([part.mask for part in scored])[back],
    )


def shares_prompt(base: BaseModel) -> bool:
    """Whether the model computes the same scores with the prompt shared as with it repeated.

    Tried out once on every model: scores by the tree mask against scores row by row, and, for
    scale, against those of a mask that lets choices see each other. ALiBi, state-space and
    linear-attention models fail it, or raise.
    """
    return tried_out(base, _probe, _verdicts)


def _probe(base: BaseModel) -> bool | None:
    """The verdict, or `None` where the model's state allows none: it is tried again next time."""
    vocabulary = int(output_layer(base.model).get_parameter("weight").shape[0])

    def ids(start: int, count: int) -> tuple[int, ...]:
        return tuple((start + 7919 * i) % vocabulary for i in range(count))

    examples = [
        EncodedExample(ids(11, 9), (ids(23, 3), ids(31, 1), ids(41, 2))),
        EncodedExample(ids(53, 5), (ids(61, 2), ids(71, 3), ids(83, 1))),
    ]
    with evaluating(base.model):
        expanded = expanded_scores(base, examples).log_probs
        _check_causal(base, ids(97, 4))
        try:
            shared = shared_scores(base, examples).log_probs
            # One by one: choices are to see each other, not the other example.
            alone = [shared_scores(base, [e], hide_others=False) for e in examples]
        except Exception:
            # Architectures that cannot take the mask refuse it in many ways; whatever they
            # raise, the expanded way remains.
            return False
    return verdict(expanded, shared, torch.cat([leaky.log_probs for leaky in alone]))


def attends_to_one_prompt(base: BaseModel) -> bool:
    """Whether an encoder-decoder takes a prompt's keys and values, computed once, for all choices.

    Tried out once on every model: against keys and values computed for each choice, and, for scale,
    against those of another prompt.
    """
    # First, so that nothing is tried out within a part that gradient checkpointing runs again.
    takes_them = tried_out(base, _probe_keys, _verdicts)
    checkpointing = base.model.training and getattr(base.model, "is_gradient_checkpointing", False)
    # Its blocks are given no cache then.
    return takes_them and not checkpointing


def _probe_keys(base: BaseModel) -> bool | None:
    vocabulary = int(output_layer(base.model).get_parameter("weight").shape[0])
    ids = [(13 + 7919 * i) % vocabulary for i in range(20)]
    one, other = tuple(ids[:4]), tuple(ids[4:10])
    two, three = ((ids[10],), tuple(ids[11:13])), (tuple(ids[13:16]), (ids[16],), (ids[17],))
    examples = [EncodedExample(one, two), EncodedExample(other, three)]
    swapped = [EncodedExample(other, two), EncodedExample(one, three)]
    with evaluating(base.model):
        whole = encoder_decoder_scores(base, examples).log_probs
        try:
            once = encoder_decoder_scores(base, examples, keys_once=True).log_probs
        except Exception:
            # As with the mask: a model that computes them in its own way has them repeated.
            return False
        wrong = encoder_decoder_scores(base, swapped).log_probs
    return verdict(whole, once, wrong)


def _check_causal(base: BaseModel, ids: tuple[int, ...]) -> None:
    """Raise where a token's score depends on what follows it: such a model sees the answer."""
    a, b, c, d = ids
    example = EncodedExample((d, c, b), ((a, b, b), (a, c, c)))
    first = expanded_scores(base, [example]).log_probs[0, :, 0]
    # In half precision the two rows may round apart.
    tolerance = 1e-3 if compute_dtype(base.model) == torch.float32 else 0.25
    if (first[0] - first[1]).abs() > tolerance:
        raise IA3Error(
            f"{type(base.model).__name__} is not causal: it sees an answer before it scores it; "
            "expected a decoder-only or encoder-decoder language model"
        )


# -- what fits -------------------------------------------------------------------------------------


def longest_shared(base: BaseModel) -> float:
    """The longest prompt with a choice whose prompt may be shared; 0 where none may."""
    if base.is_encoder_decoder or not shares_prompt(base):
        return 0
    return _attention_window(base.model)


def longest_sequence(example: EncodedExample) -> int:
    """The length of the prompt with its longest choice."""
    return len(example.prompt) + max(map(len, example.choices))


class _Size(NamedTuple):
    """Of an example: its prompt with the longest choice, with all as a tree, and their number."""

    longest: int
    tree: int
    choices: int

    @classmethod
    def of(cls, example: EncodedExample) -> _Size:
        return cls(longest_sequence(example), tree_length(example), len(example.choices))


def _tokens(sizes: Sequence[_Size], longest_shared: float) -> int:
    """How many tokens are computed at once for a batch, with the padding of rows of one choice.

    Packed rows are counted without theirs, and an encoder's prompts once for each choice.
    """
    apart = [size for size in sizes if size.longest > longest_shared]
    width = max((size.longest for size in apart), default=0)
    together = sum(size.tree for size in sizes if size.longest <= longest_shared)
    return together + sum(size.choices for size in apart) * width


def choice_groups(
    batch: Sequence[EncodedExample], longest_shared: float, max_tokens: float
) -> Iterator[slice]:
    """All choices of a batch that fits, or those of one example in groups that do."""
    if len(batch) > 1 or _tokens([_Size.of(batch[0])], longest_shared) <= max_tokens:
        yield slice(None)
        return
    prompt, choices = batch[0].prompt, batch[0].choices
    start = longest = 0
    beginnings: set[tuple[int, ...]] = set()
    for i, choice in enumerate(choices):
        longest = max(longest, len(choice))
        beginnings.update(choice[:t] for t in range(1, len(choice)))
        size = _Size(len(prompt) + longest, len(prompt) + len(beginnings), i + 1 - start)
        if i > start and _tokens([size], longest_shared) > max_tokens:
            yield slice(start, i)
            start, longest = i, len(choice)
            beginnings = {choice[:t] for t in range(1, len(choice))}
    yield slice(start, len(choices))


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """`[batch, choices, length]` of all parts, filled up with zeros to one size."""
    choices, length = (max(part.shape[i] for part in parts) for i in (1, 2))
    return torch.cat([F.pad(t, (0, length - t.shape[2], 0, choices - t.shape[1])) for t in parts])


def _attention_window(model: Any) -> float:
    """The longest sequence over which every layer attends to everything.

    A mask of four dimensions takes the place of a sliding window's, silently.
    """
    config = model.config.get_text_config(decoder=True)
    if "local" in getattr(config, "attention_layers", ()):
        # GPT-Neo's window lies over places in the sequence, whatever the mask and the positions.
        return 0
    windows = [getattr(config, "attention_chunk_size", None)]
    if getattr(config, "use_sliding_window", True):
        windows.append(getattr(config, "sliding_window", None))
    return min((w for w in windows if isinstance(w, int) and w > 0), default=float("inf"))
