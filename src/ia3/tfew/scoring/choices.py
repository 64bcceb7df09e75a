"""Scores of answer choices: the log-probabilities of their tokens after the prompt.

Which layout a model gets:

| model | layout |
|---|---|
| decoder-only, and it proves to take a tree mask | `shared_scores`: each prompt once |
| the same, with adapters that leave its lowest blocks alone | `branching_scores`: once so far |
| the same, for sequences beyond its attention window | `expanded_scores`: once a choice |
| decoder-only, others (ALiBi, state-space, linear attention) | `expanded_scores` |
| encoder-decoder, and it proves to take cached keys | `shared_keys_scores` |
| encoder-decoder, others | `encoder_decoder_scores` |

A batch of more tokens than are to be computed at once is computed in parts, and so are the choices
of one example that alone has more. Scores and gradients stay the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...base.loading import BaseModel
from ...errors import IA3Error
from ..prompts.encoding import EncodedExample
from .answer_tokens import Routing, TokenScores, compute_dtype, evaluating, shape_of
from .branching import branches, branching_scores, saves
from .expanded import encoder_decoder_scores, expanded_scores, shared_keys_scores
from .probe import Scorer, proves_equal
from .shared_prompt import shared_scores, tree_length

# How many tokens are computed at once by default.
MAX_TOKENS = 4096

# What a trained model's scores are divided by: on rows of the training files, the likeliest was 4
# for sentiment, 1.75 for question types and 1.5 for intents. To find a task's own takes answers to
# examples that were held out, and so another training.
USUAL_TEMPERATURE = 2.0


def token_scores(
    base: BaseModel,
    examples: Sequence[EncodedExample],
    *,
    max_tokens: float = math.inf,
    routing: Routing | None = None,
    touched: Sequence[nn.Module] = (),
    most_passes: int = 0,
) -> TokenScores:
    """Score all choices of a batch, with gradients where they are enabled.

    At most `max_tokens` are computed at once, unless one choice after its prompt has more. Where a
    batch has more, the backward pass computes each part's activations again. With `routing`, each
    example has an adapter of its own; where these touch nothing but the model's uppermost blocks,
    `touched` says which. Where another process makes `most_passes` of the model beside this one's,
    as many are made here; see `count_passes`.
    """
    limit = longest_shared(base)
    parts = _parts(base, examples, max_tokens)
    recompute = max(len(parts), most_passes) > 1 and torch.is_grad_enabled()
    passes: list[tuple[list[int], slice, TokenScores]] = []
    for batch, choices in parts:
        part = {i: EncodedExample(examples[i].prompt, examples[i].choices[choices]) for i in batch}
        for layout, members in _by_scorer(base, part, limit, routing is None).items():
            of_pass, scorer = [part[i] for i in members], layout
            if layout is shared_scores and touched and _branches(base, of_pass, touched):
                layout = partial(branching_scores, touched=touched)
            if routing is not None:
                scorer = partial(layout, routing=_of_members(routing, members))
            if recompute:
                scores = checkpoint(scorer, base, of_pass, use_reentrant=False)
            else:
                scores = scorer(base, of_pass)
            passes.append((members, choices, scores))
    together = _together(shape_of(examples), passes)
    for _ in range(most_passes - len(passes)):
        nothing = _pass_for_nothing(base, examples[0], limit, recompute)
        together = TokenScores(together.log_probs + nothing.to(together.log_probs), together.mask)
    return together


def count_passes(base: BaseModel, examples: Sequence[EncodedExample], max_tokens: float) -> int:
    """How many passes of the model `token_scores` makes, without a routing."""
    limit = longest_shared(base)
    return sum(
        len(_by_scorer(base, {i: examples[i] for i in batch}, limit, True))
        for batch, _ in _parts(base, examples, max_tokens)
    )


def _pass_for_nothing(
    base: BaseModel, example: EncodedExample, limit: float, recompute: bool
) -> Tensor:
    """Zero, from one pass of the model and with a backward pass through all of it."""
    shortest = EncodedExample(example.prompt, example.choices[:1])
    (scorer,) = _by_scorer(base, {0: shortest}, limit, True)
    scores = (
        checkpoint(scorer, base, [shortest], use_reentrant=False)
        if recompute
        else scorer(base, [shortest])
    )
    return scores.log_probs.sum() * 0


def computes_again(base: BaseModel, examples: Sequence[EncodedExample], max_tokens: float) -> bool:
    """Whether the backward pass of `token_scores` computes activations again."""
    # The model's own property for it has another name in each of two versions.
    marked = (getattr(module, "gradient_checkpointing", False) for module in base.model.modules())
    checkpointing = base.model.training and any(marked)
    return checkpointing or len(_parts(base, examples, max_tokens)) > 1


def _parts(
    base: BaseModel, examples: Sequence[EncodedExample], max_tokens: float
) -> list[tuple[list[int], slice]]:
    """What is computed at once: examples' indices, and which of their choices."""
    limit = longest_shared(base)
    return [
        (batch, choices)
        for batch in example_batches(base, examples, max_tokens)
        for choices in choice_groups([examples[i] for i in batch], limit, max_tokens)
    ]


def _branches(
    base: BaseModel, examples: Sequence[EncodedExample], touched: Sequence[nn.Module]
) -> bool:
    """Whether what lies below these blocks is better computed once for equal prompts."""
    return not torch.is_grad_enabled() and saves(examples) and branches(base, touched)


def _of_members(routing: Routing, members: Sequence[int]) -> Routing:
    """The routing of a pass in which some of the examples are."""
    return lambda index: routing(torch.tensor(members, device=index.device)[index])


def _by_scorer(
    base: BaseModel, examples: Mapping[int, EncodedExample], limit: float, may_share_keys: bool
) -> dict[Scorer, list[int]]:
    """The examples' keys by layout: a few long examples must not repeat the prompts of all."""
    if base.is_encoder_decoder:
        shares = may_share_keys and shares_keys(base)
        return {shared_keys_scores if shares else encoder_decoder_scores: [*examples]}
    found: dict[Scorer, list[int]] = {}
    for i, example in examples.items():
        fits = longest_sequence(example) <= limit
        found.setdefault(shared_scores if fits else expanded_scores, []).append(i)
    return found


def _together(
    shape: tuple[int, int, int], passes: Sequence[tuple[list[int], slice, TokenScores]]
) -> TokenScores:
    """The scores of all passes, `[batch, choices, length]`."""
    device = passes[0][2].mask.device
    log_probs = passes[0][2].log_probs.new_zeros(shape)
    mask = torch.zeros(shape, dtype=torch.bool, device=device)
    for members, choices, scores in passes:
        rows = torch.tensor(members, device=device)[:, None]
        start, (_, count, length) = choices.start or 0, scores.mask.shape
        columns = torch.arange(start, start + count, device=device)
        log_probs[rows, columns, :length] = scores.log_probs
        mask[rows, columns, :length] = scores.mask
    return TokenScores(log_probs, mask)


def choice_scores(
    base: BaseModel,
    examples: Sequence[EncodedExample],
    *,
    max_tokens: float = MAX_TOKENS,
    progress: Callable[[int], None] | None = None,
    routing: Routing | None = None,
    touched: Sequence[nn.Module] = (),
) -> Tensor:
    """Length-normalised log-probabilities, without gradients: `[examples, choices]` on the CPU.

    Where an example has fewer choices than others, the rest are minus infinity. `progress` is
    called with the number of examples done since the last call. `routing` and `touched` are as of
    `token_scores`.
    """
    if not examples:
        return torch.empty(0, 0, dtype=torch.float32)
    shape = len(examples), max(len(e.choices) for e in examples)
    results = torch.full(shape, -torch.inf, dtype=torch.float32)
    with evaluating(base.model):
        for batch in example_batches(base, examples, max_tokens):
            of_batch = [examples[i] for i in batch]
            routed = None if routing is None else _of_members(routing, batch)
            scores = token_scores(
                base, of_batch, max_tokens=max_tokens, routing=routed, touched=touched
            )
            found = scores.mean_log_probs().float().cpu()
            results[batch, : found.shape[1]] = found
            if progress is not None:
                progress(len(batch))
    return results


# -- what a model proves to take -------------------------------------------------------------------


def shares_prompt(base: BaseModel) -> bool:
    """Whether a decoder-only model scores the same with the prompt shared; raises if not causal."""
    ignoring_the_mask = partial(shared_scores, hide_others=False)
    return proves_equal(base, shared_scores, _causal_scores, ignoring_the_mask)


def shares_keys(base: BaseModel) -> bool:
    """Whether an encoder-decoder's choices may share a prompt's keys and values now."""
    # First, so that no probe runs in a part that gradient checkpointing computes again.
    shares = proves_equal(base, shared_keys_scores, encoder_decoder_scores)
    # Under gradient checkpointing the blocks get no cache.
    checkpointing = base.model.training and getattr(base.model, "is_gradient_checkpointing", False)
    return shares and not checkpointing


def _causal_scores(base: BaseModel, examples: Sequence[EncodedExample]) -> TokenScores:
    """`expanded_scores`; raises where a score depends on what follows the token."""
    a, b, c = examples[0].prompt[:3]
    alike = EncodedExample((c, b), ((a, b, b), (a, c, c)))
    first, second = expanded_scores(base, [alike]).log_probs[0, :, 0]
    # In half precision the two rows may round apart.
    tolerance = 1e-3 if compute_dtype(base.model).itemsize >= 4 else 0.25
    if (first - second).abs() > tolerance:
        expected = "expected a decoder-only or encoder-decoder language model"
        problem = "is not causal: it sees an answer before it scores it"
        raise IA3Error(f"{type(base.model).__name__} {problem}; {expected}")
    return expanded_scores(base, examples)


def longest_shared(base: BaseModel) -> float:
    """The longest prompt with a choice whose prompt may be shared; 0 where none may."""
    if base.is_encoder_decoder or not shares_prompt(base):
        return 0
    return _attention_window(base.model)


def _attention_window(model: Any) -> float:
    """How far every layer sees: a mask of four dimensions replaces a sliding window's, silently."""
    config = model.config.get_text_config(decoder=True)
    if "local" in getattr(config, "attention_layers", ()):
        # GPT-Neo's window lies over places in the row, whatever the mask and the positions.
        return 0
    windows = [getattr(config, "attention_chunk_size", None)]
    if getattr(config, "use_sliding_window", True):
        windows.append(getattr(config, "sliding_window", None))
    return min((w for w in windows if isinstance(w, int) and w > 0), default=math.inf)


# -- what fits -------------------------------------------------------------------------------------


def example_batches(
    base: BaseModel, examples: Sequence[EncodedExample], max_tokens: float
) -> Iterator[list[int]]:
    """Indices of the examples, longest first, in batches of `max_tokens` or of one example."""
    limit = longest_shared(base)
    sizes = [_size(example, limit) for example in examples]
    batch: list[int] = []
    for i in sorted(range(len(examples)), key=lambda i: -longest_sequence(examples[i])):
        if batch and _tokens([sizes[j] for j in (*batch, i)]) > max_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def choice_groups(
    batch: Sequence[EncodedExample], limit: float, max_tokens: float
) -> Iterator[slice]:
    """All choices of a batch that fits, or those of its one example, in groups that do."""
    prompt, choices = batch[0].prompt, batch[0].choices
    if len(batch) > 1 or _tokens([_size(batch[0], limit)]) <= max_tokens:
        yield slice(None)
        return
    start = 0
    for stop in range(2, len(choices) + 1):
        group = EncodedExample(prompt, choices[start:stop])
        if stop - start > 1 and _tokens([_size(group, limit)]) > max_tokens:
            yield slice(start, stop - 1)
            start = stop - 1
    yield slice(start, len(choices))


def _size(example: EncodedExample, limit: float) -> tuple[int, int, int]:
    """Tokens in a tree row, rows of one choice, and the longest of these."""
    longest = longest_sequence(example)
    return (tree_length(example), 0, 0) if longest <= limit else (0, len(example.choices), longest)


def _tokens(sizes: Sequence[tuple[int, int, int]]) -> int:
    """What a batch takes, without padding of tree rows. An encoder has a prompt once a choice."""
    tree, rows, longest = zip(*sizes, strict=True)
    return int(sum(tree) + sum(rows) * max(longest))


def longest_sequence(example: EncodedExample) -> int:
    """The length of the prompt with its longest choice."""
    return len(example.prompt) + max(map(len, example.choices))
