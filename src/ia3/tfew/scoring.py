"""Scores of answer choices: log-probabilities of their tokens after the prompt.

A decoder-only model gets the prompt and all its choices in one sequence: each choice sees the
prompt and itself (a tree mask), at the positions it would have alone, so that the prompt is
computed once. Short examples are packed into rows of one length, so that no padding is computed
either, and what all prompts of a batch begin with (an instruction, a chat template's opening) is
computed once a row. Only the positions that predict an answer token are projected to the
vocabulary.

Not every architecture takes a tree mask. `shares_prompt` tries it out on the model itself; where
the scores differ, every choice gets a row of its own, with the prompt repeated. An encoder-decoder
encodes each prompt once, and decodes every choice in a row of its own.

What is computed at once is bounded by a number of tokens: a batch of examples is computed in parts,
and the choices of one example too where they alone are more. Scores and gradients stay the same.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from ..base_model import BaseModel
from ..errors import IA3Error
from .encoding import EncodedExample
from .losses import TokenScores

# A batch of this many tokens or fewer is one row, without any padding; a longer one is packed into
# rows of the second length. Longer rows would spend attention on what the mask hides, shorter ones
# leave more padding at their ends.
ONE_ROW = 384
PACKED_LENGTH = 192
# How many tokens are computed at once, unless more memory is given, or less.
MAX_TOKENS = 4096
# How far shared scores may be from expanded ones, against what a wrong mask makes of them.
PROBE_TOLERANCE = 0.1

_verdicts: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def token_scores(
    base: BaseModel, examples: Sequence[EncodedExample], *, max_tokens: float = math.inf
) -> TokenScores:
    """Score all choices of a batch, with gradients where they are enabled.

    Args:
        base: the model, with the adapter to score with active on it.
        examples: their choices may differ in number.
        max_tokens: computed at once, unless one choice after its prompt has more; what packed rows
            leave free at their ends is not counted. Where a batch has more, each part's activations
            are computed once more for the gradients.

    Raises:
        IA3Error: the model's output layer cannot be found.
    """
    limit = _longest_shared(base)
    parts = [
        (batch, choices)
        for batch in example_batches(base, examples, max_tokens)
        for choices in _choice_groups([examples[i] for i in batch], limit, max_tokens)
    ]
    if len(parts) == 1:
        return _scores_at_once(base, examples, limit)
    scored = []
    for batch, choices in parts:
        of_part = [EncodedExample(examples[i].prompt, examples[i].choices[choices]) for i in batch]
        if torch.is_grad_enabled():
            # One part's activations are held at a time, in the backward pass too.
            part = checkpoint(_scores_at_once, base, of_part, limit, use_reentrant=False)
        else:
            part = _scores_at_once(base, of_part, limit)
        scored.append(part)
    shape = _shape(examples)
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
    limit = _longest_shared(base)
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
    was_training = base.model.training
    base.model.eval()
    try:
        with torch.no_grad():
            for batch in example_batches(base, examples, max_tokens):
                scores = token_scores(base, [examples[i] for i in batch], max_tokens=max_tokens)
                results[batch] = scores.mean_log_probs().float().cpu()
                if progress is not None:
                    progress(len(batch))
    finally:
        base.model.train(was_training)
    return results


def _scores_at_once(
    base: BaseModel, examples: Sequence[EncodedExample], longest_shared: float
) -> TokenScores:
    """All choices in one forward pass, or in two where only some prompts are short enough."""
    if base.is_encoder_decoder:
        return _encoder_decoder_scores(base, examples)
    together = [i for i, e in enumerate(examples) if _longest(e) <= longest_shared]
    apart = [i for i, e in enumerate(examples) if _longest(e) > longest_shared]
    if not apart:
        return _shared_scores(base, examples)
    expanded = _expanded_scores(base, [examples[i] for i in apart])
    if not together:
        return expanded
    # A few long examples must not repeat the prompts of all.
    shared = _shared_scores(base, [examples[i] for i in together])
    back = torch.tensor([*together, *apart], device=expanded.mask.device).argsort()
    return TokenScores(
        _stacked(shared.log_probs, expanded.log_probs)[back],
        _stacked(shared.mask, expanded.mask)[back],
    )


def shares_prompt(base: BaseModel) -> bool:
    """Whether the model computes the same scores with the prompt shared as with it repeated.

    Tried out once on every model: scores by the tree mask against scores row by row, and, for
    scale, against those of a mask that lets choices see each other. ALiBi, state-space and
    linear-attention models fail it, or raise.
    """
    if base.model not in _verdicts:
        verdict = _probe(base)
        if verdict is None:
            return False
        _verdicts[base.model] = verdict
    return _verdicts[base.model]


def _probe(base: BaseModel) -> bool | None:
    """The verdict, or `None` where the model's state allows none: it is tried again next time."""
    vocabulary = int(_output_layer(base.model).get_parameter("weight").shape[0])

    def ids(start: int, count: int) -> tuple[int, ...]:
        return tuple((start + 7919 * i) % vocabulary for i in range(count))

    examples = [
        EncodedExample(ids(11, 9), (ids(23, 3), ids(31, 1), ids(41, 2))),
        EncodedExample(ids(53, 5), (ids(61, 2), ids(71, 3), ids(83, 1))),
    ]
    was_training = base.model.training
    base.model.eval()
    try:
        with torch.no_grad():
            expanded = _expanded_scores(base, examples).log_probs
            _check_causal(base, ids(97, 4))
            try:
                shared = _shared_scores(base, examples).log_probs
                leaky = _shared_scores(base, examples, hide_other_choices=False).log_probs
            except Exception:
                # Architectures that cannot take the mask refuse it in many ways; whatever they
                # raise, the expanded way remains.
                return False
    finally:
        base.model.train(was_training)
    error = (shared - expanded).abs().max()
    wrong = (leaky - expanded).abs().max()
    if not torch.isfinite(error + wrong) or wrong == 0:
        return None
    return bool(error <= PROBE_TOLERANCE * wrong)


def _check_causal(base: BaseModel, ids: tuple[int, ...]) -> None:
    """Raise where a token's score depends on what follows it: such a model sees the answer."""
    a, b, c, d = ids
    example = EncodedExample((d, c, b), ((a, b, b), (a, c, c)))
    first = _expanded_scores(base, [example]).log_probs[0, :, 0]
    # In half precision the two rows may round apart.
    tolerance = 1e-3 if _compute_dtype(base.model) == torch.float32 else 0.25
    if (first[0] - first[1]).abs() > tolerance:
        raise IA3Error(
            f"{type(base.model).__name__} is not causal: it sees an answer before it scores it; "
            "expected a decoder-only or encoder-decoder language model"
        )


# -- one sequence for all choices ------------------------------------------------------------------

# Owners of the positions that belong to no example: the common prefix, and the padding.
_EVERYBODY = -1
_NOBODY = -2


@dataclass
class _Targets:
    """Which tokens are scored, from which positions' predictions, and where the scores go."""

    positions: list[int] = field(default_factory=list)
    prediction: list[int] = field(default_factory=list)
    token: list[int] = field(default_factory=list)
    slot: list[tuple[int, int, int]] = field(default_factory=list)

    def project(self, position: int) -> int:
        """Have a position (in the flattened batch) projected to the vocabulary."""
        self.positions.append(position)
        return len(self.positions) - 1

    def score(self, prediction: int, token: int, slot: tuple[int, int, int]) -> None:
        """Score a token by a projected position; the slot is (example, choice, place)."""
        self.prediction.append(prediction)
        self.token.append(token)
        self.slot.append(slot)


def _shared_scores(
    base: BaseModel, examples: Sequence[EncodedExample], *, hide_other_choices: bool = True
) -> TokenScores:
    # Every choice's last token predicts nothing that is scored, so it is left out.
    prefix = _common_prefix(examples)
    shared = len(prefix)
    lengths = [len(e.prompt) - shared + sum(len(c) - 1 for c in e.choices) for e in examples]
    one_row = shared + sum(lengths) <= ONE_ROW
    rows = _fill_rows(lengths, sum(lengths) if one_row else max(PACKED_LENGTH + shared, *lengths))
    length = shared + max(sum(lengths[i] for i in row) for row in rows)
    ids = [[*prefix, *[_pad_token(base)] * (length - shared)] for _ in rows]
    positions = [[*range(shared), *[0] * (length - shared)] for _ in rows]
    owner = [[_EVERYBODY] * shared + [_NOBODY] * (length - shared) for _ in rows]
    branch = [[0] * length for _ in rows]
    targets = _Targets()
    for r, row in enumerate(rows):
        at = shared
        for i in row:
            prompt, choices = examples[i].prompt, examples[i].choices
            end = at + len(prompt) - shared
            ids[r][at:end] = prompt[shared:]
            positions[r][at:end] = range(shared, len(prompt))
            owner[r][at : at + lengths[i]] = [i] * lengths[i]
            first = targets.project(r * length + end - 1)
            at = end
            for c, choice in enumerate(choices):
                targets.score(first, choice[0], (i, c, 0))
                for t, (token, following) in enumerate(pairwise(choice)):
                    ids[r][at] = token
                    positions[r][at] = len(prompt) + t
                    branch[r][at] = c + 1
                    targets.score(targets.project(r * length + at), following, (i, c, t + 1))
                    at += 1
    device = base.device
    mask = _tree_mask(
        torch.tensor(owner, device=device),
        torch.tensor(branch, device=device),
        _compute_dtype(base.model),
        hide_other_choices,
    )
    return _scores(
        base,
        examples,
        targets,
        input_ids=torch.tensor(ids, device=device),
        attention_mask=mask,
        position_ids=torch.tensor(positions, device=device),
        use_cache=False,
    )


def _tree_mask(
    owner: Tensor, branch: Tensor, dtype: torch.dtype, hide_other_choices: bool
) -> Tensor:
    """The additive mask `[rows, 1, length, length]`: 0 where a position sees, else the minimum.

    Args:
        owner: `[rows, length]`, the example a position belongs to, or one of the two below.
        branch: `[rows, length]`, 0 in a prompt, else the number of the choice.
        dtype: of the mask.
        hide_other_choices: false only for the probe.
    """
    length = owner.shape[1]
    sees = (owner[:, :, None] == owner[:, None, :]) | (owner[:, None, :] == _EVERYBODY)
    sees &= torch.ones(length, length, dtype=torch.bool, device=owner.device).tril()
    if hide_other_choices:
        sees &= (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    mask = torch.zeros(sees.shape, dtype=dtype, device=owner.device)
    return mask.masked_fill(~sees, torch.finfo(dtype).min)[:, None]


def _common_prefix(examples: Sequence[EncodedExample]) -> tuple[int, ...]:
    """What all prompts begin with, less the last token of the shortest, which predicts answers."""
    first = min(e.prompt for e in examples)
    last = max(e.prompt for e in examples)
    limit = min(len(e.prompt) for e in examples) - 1
    # Whatever the least and the greatest sequence share, every one between them shares.
    return tuple(
        a for a, _ in takewhile(lambda ab: ab[0] == ab[1], zip(first, last, strict=False))
    )[:limit]


def _fill_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing: indices of the examples in each row."""
    rows: list[list[int]] = []
    free: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, room in enumerate(free) if room >= lengths[i]), None)
        if row is None:
            rows.append([])
            free.append(capacity)
            row = len(rows) - 1
        rows[row].append(i)
        free[row] -= lengths[i]
    return rows


# -- one row a choice ------------------------------------------------------------------------------


def _expanded_scores(base: BaseModel, examples: Sequence[EncodedExample]) -> TokenScores:
    flat = [(i, c) for i, e in enumerate(examples) for c in range(len(e.choices))]
    sequences = [examples[i].prompt + examples[i].choices[c][:-1] for i, c in flat]
    ids, mask = _padded(sequences, _pad_token(base), base.device)
    targets = _Targets()
    for row, (i, c) in enumerate(flat):
        start = row * ids.shape[1] + len(examples[i].prompt) - 1
        for t, token in enumerate(examples[i].choices[c]):
            targets.score(targets.project(start + t), token, (i, c, t))
    return _scores(base, examples, targets, input_ids=ids, attention_mask=mask, use_cache=False)


def _encoder_decoder_scores(base: BaseModel, examples: Sequence[EncodedExample]) -> TokenScores:
    prompts, prompt_mask = _padded([e.prompt for e in examples], _pad_token(base), base.device)
    model: Any = base.model
    encoded = model.get_encoder()(input_ids=prompts, attention_mask=prompt_mask)[0]
    flat = [(i, c) for i, e in enumerate(examples) for c in range(len(e.choices))]
    start = int(model.config.decoder_start_token_id)
    sequences = [(start, *examples[i].choices[c][:-1]) for i, c in flat]
    ids, mask = _padded(sequences, _pad_token(base), base.device)
    targets = _Targets()
    for row, (i, c) in enumerate(flat):
        for t, token in enumerate(examples[i].choices[c]):
            targets.score(targets.project(row * ids.shape[1] + t), token, (i, c, t))
    of_example = torch.tensor([i for i, _ in flat], device=base.device)
    return _scores(
        base,
        examples,
        targets,
        encoder_outputs=(encoded[of_example],),
        attention_mask=prompt_mask[of_example],
        decoder_input_ids=ids,
        decoder_attention_mask=mask,
        use_cache=False,
    )


# -- common to all ---------------------------------------------------------------------------------


def _scores(
    base: BaseModel,
    examples: Sequence[EncodedExample],
    targets: _Targets,
    **inputs: Tensor | tuple[Tensor] | bool,
) -> TokenScores:
    positions = torch.tensor(targets.positions, device=base.device)
    with _project_only(base.model, positions):
        logits = base.model(**inputs).logits
    if logits.shape[:-1] != positions.shape:
        raise IA3Error(
            f"{type(base.model).__name__} does not project its output layer's input: logits are "
            f"{list(logits.shape)}, expected [{len(positions)}, vocabulary]"
        )
    # A model over several devices answers on its last one.
    device = logits.device
    prediction = torch.tensor(targets.prediction, device=device)
    token = torch.tensor(targets.token, device=device)
    # By parts: in float32 a large vocabulary's logits would take twice their own memory again.
    normalisers = torch.cat([part.float().logsumexp(-1) for part in logits.split(512)])
    scored = logits[prediction, token].float() - normalisers[prediction]
    slots = torch.tensor(targets.slot, device=device).unbind(1)
    shape = _shape(examples)
    log_probs = scored.new_zeros(shape).index_put(slots, scored)
    mask = torch.zeros(shape, dtype=torch.bool, device=device)
    mask[slots] = True
    return TokenScores(log_probs, mask)


@contextmanager
def _project_only(model: nn.Module, positions: Tensor) -> Iterator[None]:
    """Within the context the output layer sees only these positions of the flattened batch."""

    def gather(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (args[0].flatten(0, -2).index_select(0, positions.to(args[0].device)),)

    handle = _output_layer(model).register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


def _output_layer(model: Any) -> nn.Module:
    head: nn.Module | None = model.get_output_embeddings()
    if head is None:
        raise IA3Error(f"{type(model).__name__} has no output embeddings to score tokens with")
    return head


def _padded(
    sequences: Iterable[Sequence[int]], pad: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`[rows, length]` ids padded on the right, and their mask."""
    tensors = [torch.tensor(s, device=device) for s in sequences]
    ids = pad_sequence(tensors, batch_first=True, padding_value=pad)
    mask = pad_sequence([torch.ones_like(t) for t in tensors], batch_first=True)
    return ids, mask


def _longest_shared(base: BaseModel) -> float:
    """The longest prompt with a choice whose prompt may be shared; 0 where none may."""
    if base.is_encoder_decoder or not shares_prompt(base):
        return 0
    return _attention_window(base.model)


def _longest(example: EncodedExample) -> int:
    """The length of the prompt with its longest choice."""
    return len(example.prompt) + max(map(len, example.choices))


class _Size(NamedTuple):
    """Of an example: its prompt with the longest choice, with all of them, and their number."""

    longest: int
    tokens: int
    choices: int

    @classmethod
    def of(cls, example: EncodedExample) -> _Size:
        tokens = len(example.prompt) + sum(map(len, example.choices))
        return cls(_longest(example), tokens, len(example.choices))


def _tokens(sizes: Sequence[_Size], longest_shared: float) -> int:
    """How many tokens are computed at once for a batch, with the padding of rows of one choice.

    Packed rows are counted without theirs. An encoder's output is repeated for each choice.
    """
    apart = [size for size in sizes if size.longest > longest_shared]
    width = max((size.longest for size in apart), default=0)
    together = sum(size.tokens for size in sizes if size.longest <= longest_shared)
    return together + sum(size.choices for size in apart) * width


def _shape(examples: Sequence[EncodedExample]) -> tuple[int, int, int]:
    """`[batch, choices, length]` of the scores."""
    return (
        len(examples),
        max(len(e.choices) for e in examples),
        max(len(c) for e in examples for c in e.choices),
    )


def _choice_groups(
    batch: Sequence[EncodedExample], longest_shared: float, max_tokens: float
) -> Iterator[slice]:
    """All choices of a batch that fits, or those of one example in groups that do."""
    if len(batch) > 1 or _tokens([_Size.of(batch[0])], longest_shared) <= max_tokens:
        yield slice(None)
        return
    prompt, choices = batch[0].prompt, batch[0].choices
    start = 0
    for stop in range(1, len(choices) + 1):
        with_next = _Size.of(EncodedExample(prompt, choices[start : stop + 1]))
        if stop == len(choices) or _tokens([with_next], longest_shared) > max_tokens:
            yield slice(start, stop)
            start = stop


def _stacked(one: Tensor, other: Tensor) -> Tensor:
    """`[batch, choices, length]` of both, filled up with zeros to one size."""
    choices, length = (max(a, b) for a, b in zip(one.shape[1:], other.shape[1:], strict=True))
    filled = [F.pad(t, (0, length - t.shape[2], 0, choices - t.shape[1])) for t in (one, other)]
    return torch.cat(filled)


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


def _compute_dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _pad_token(base: BaseModel) -> int:
    # A padding token added to the tokenizer alone is none the model has; masked, any other will do.
    pad = base.tokenizer.pad_token_id
    model: Any = base.model
    known = model.get_input_embeddings().weight.shape[0]
    return int(pad) if pad is not None and pad < known else 0
