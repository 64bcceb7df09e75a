"""How a batch of examples becomes one forward pass, and its logits scores.

Three layouts: one sequence for a prompt and all its choices, a row for each choice, and an
encoder-decoder. In all of them only the positions that predict an answer token are projected to the
vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ...base.loading import BaseModel
from ...errors import IA3Error
from ..prompts.encoding import EncodedExample
from .token_scores import TokenScores
from .vocabulary import is_plain, token_log_probs

# A batch of this many tokens or fewer is one row, without any padding; a longer one is packed into
# rows of the second length. Longer rows would spend attention on what the mask hides, shorter ones
# leave more padding at their ends.
ONE_ROW = 384
PACKED_LENGTH = 192
# How far the scores of a way that is tried out may be off, against what a mistake makes of them.
PROBE_TOLERANCE = 0.1

# Given an example of each row that the model is about to be run on: what it is run within. Rows of
# different tasks have vectors of their own.
RowContext = Callable[[Sequence[int]], AbstractContextManager[object]]

# Models that were seen to do something to their logits, or to read more than those asked for.
_work_on_logits: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass
class Targets:
    """Which tokens are scored, from which positions' predictions, and where the scores go.

    Attributes:
        projected: position in the flattened batch -> its number among those that are projected to
            the vocabulary.
        prediction: of each score, the number of the position that predicts its token.
        token: of each score, the token.
        slot: of each score, (example, choice, place).
    """

    projected: dict[int, int] = field(default_factory=dict)
    prediction: list[int] = field(default_factory=list)
    token: list[int] = field(default_factory=list)
    slot: list[tuple[int, int, int]] = field(default_factory=list)

    def score(self, position: int, token: int, slot: tuple[int, int, int]) -> None:
        """Score a token by what a position (in the flattened batch) predicts."""
        self.prediction.append(self.projected.setdefault(position, len(self.projected)))
        self.token.append(token)
        self.slot.append(slot)


# -- one sequence for all choices ------------------------------------------------------------------


class TreeRow:
    """A row of examples whose choices branch off from their prompts.

    A token stands in it once for all choices that have the same tokens up to it. Whatever follows a
    token stands behind it, one branch after the other (depth first).

    Args:
        start: the row's first position in the flattened batch.
        prefix: begins all prompts, and is in the row once.

    Attributes:
        ids: token ids, `[length]`.
        positions: where each would stand in a row of its own.
        shared: the length of the prefix.
        members: the examples in the row, in their order.
    """

    def __init__(self, start: int, prefix: Sequence[int] = ()) -> None:
        self.ids = list(prefix)
        self.positions = list(range(len(prefix)))
        self.shared = len(prefix)
        self.members: list[int] = []
        self._start = start

    def append(self, index: int, example: EncodedExample, shared: int, targets: Targets) -> None:
        """Put an example into the row, less the first tokens of its prompt, which are elsewhere."""
        self.members.append(index)
        self._extend(example.prompt[shared:], shared)
        predicts: dict[tuple[int, ...], int] = {(): self._last}
        for beginning in _beginnings(example.choices):
            self._extend(beginning[-1:], len(example.prompt) + len(beginning) - 1)
            predicts[beginning] = self._last
        for c, choice in enumerate(example.choices):
            for t, token in enumerate(choice):
                targets.score(predicts[choice[:t]], token, (index, c, t))

    def pad(self, length: int, token: int) -> None:
        """Fill the row up with tokens that nobody sees."""
        count = length - len(self.ids)
        self.ids += [token] * count
        self.positions += [0] * count

    def ends(self) -> list[int]:
        """Up to where each position is seen: all that follows it stands at later positions."""
        ends = [len(self.ids)] * len(self.ids)
        path: list[int] = []
        for place, position in enumerate(self.positions):
            while path and self.positions[path[-1]] >= position:
                ends[path.pop()] = place
            path.append(place)
        return ends

    @property
    def _last(self) -> int:
        return self._start + len(self.ids) - 1

    def _extend(self, ids: Sequence[int], position: int) -> None:
        self.ids += ids
        self.positions += range(position, position + len(ids))


def tree_length(example: EncodedExample) -> int:
    """How many positions an example takes up in a row of its own."""
    return len(example.prompt) + len(_beginnings(example.choices))


def _beginnings(choices: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """All that choices begin with, each once and before what goes on from it (sorted: depth first).

    Not the choices themselves: their last tokens predict nothing that is scored.
    """
    return sorted({choice[:t] for choice in choices for t in range(1, len(choice))})


def tree_inputs(
    base: BaseModel, rows: Sequence[TreeRow], *, hide_others: bool = True
) -> dict[str, Tensor]:
    """The model's arguments for rows of one length: ids, a mask of four dimensions, positions.

    Args:
        base: the model.
        rows: `[rows]`.
        hide_others: false only to find out whether a model heeds the mask.
    """

    def stacked(part: list[list[int]]) -> Tensor:
        return torch.tensor(part, device=base.device)

    ends = [row.ends() if hide_others else [len(row.ids)] * len(row.ids) for row in rows]
    return {
        "input_ids": stacked([row.ids for row in rows]),
        "attention_mask": _tree_mask(stacked(ends), compute_dtype(base.model)),
        "position_ids": stacked([row.positions for row in rows]),
    }


@dataclass(frozen=True)
class Packing:
    """What is put into one row.

    Attributes:
        prefix: begins the prompts of all its examples.
        members: the examples' indices.
        length: how many positions they take, without padding.
    """

    prefix: tuple[int, ...]
    members: tuple[int, ...]
    length: int


def packings(examples: Sequence[EncodedExample]) -> list[Packing]:
    """A batch in one row, or in rows of about one length, with what all prompts begin with once."""
    prefix = common_prefix(examples)
    shared = len(prefix)
    lengths = [tree_length(e) - shared for e in examples]
    one_row = shared + sum(lengths) <= ONE_ROW
    # Where much is shared, every row computes it again: fewer and longer ones then.
    capacity = sum(lengths) if one_row else max(PACKED_LENGTH + 2 * shared, *lengths)
    return [
        Packing(prefix, tuple(row), shared + sum(lengths[i] for i in row))
        for row in _fill_rows(lengths, capacity)
    ]


def shared_scores(
    base: BaseModel,
    examples: Sequence[EncodedExample],
    *,
    hide_others: bool = True,
    within: RowContext | None = None,
) -> TokenScores:
    """Every prompt once, with all its choices; what all prompts begin with once a row.

    Args:
        base: a decoder-only model that takes the mask.
        examples: of any number of choices.
        hide_others: false only to find out whether a model heeds the mask.
        within: of the rows.
    """
    packed = packings(examples)
    return packed_scores(base, examples, packed, hide_others=hide_others, within=within)


def packed_scores(
    base: BaseModel,
    examples: Sequence[EncodedExample],
    packed: Sequence[Packing],
    *,
    hide_others: bool = True,
    within: RowContext | None = None,
) -> TokenScores:
    """`shared_scores` of rows that are packed already, each example in one of them."""
    length = max(packing.length for packing in packed)
    targets = Targets()
    rows = []
    for r, packing in enumerate(packed):
        row = TreeRow(r * length, packing.prefix)
        for i in packing.members:
            row.append(i, examples[i], len(packing.prefix), targets)
        row.pad(length, _pad_token(base))
        rows.append(row)
    inputs = tree_inputs(base, rows, hide_others=hide_others)
    with _entered(within, [row.members[0] for row in rows]):
        return scores(base, examples, targets, inputs)


def _tree_mask(ends: Tensor, dtype: torch.dtype) -> Tensor:
    """The additive mask `[rows, 1, length, length]`: 0 where a position sees, else the minimum.

    Args:
        ends: `[rows, length]`, up to where a position is seen, from itself on.
        dtype: of the mask.
    """
    places = torch.arange(ends.shape[1], device=ends.device)
    sees = (places[:, None] >= places) & (places[:, None] < ends[:, None, :])
    mask = torch.zeros(sees.shape, dtype=dtype, device=ends.device)
    return mask.masked_fill(~sees, torch.finfo(dtype).min)[:, None]


def common_prefix(examples: Sequence[EncodedExample]) -> tuple[int, ...]:
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


def expanded_scores(
    base: BaseModel, examples: Sequence[EncodedExample], *, within: RowContext | None = None
) -> TokenScores:
    """Every choice in a row of its own, with its prompt."""
    flat = [(i, c) for i, e in enumerate(examples) for c in range(len(e.choices))]
    sequences = [examples[i].prompt + examples[i].choices[c][:-1] for i, c in flat]
    ids, mask = _padded(sequences, _pad_token(base), base.device)
    targets = Targets()
    for row, (i, c) in enumerate(flat):
        start = row * ids.shape[1] + len(examples[i].prompt) - 1
        for t, token in enumerate(examples[i].choices[c]):
            targets.score(start + t, token, (i, c, t))
    with _entered(within, [i for i, _ in flat]):
        return scores(base, examples, targets, {"input_ids": ids, "attention_mask": mask})


def encoder_decoder_scores(
    base: BaseModel,
    examples: Sequence[EncodedExample],
    *,
    keys_once: bool = False,
    within: RowContext | None = None,
) -> TokenScores:
    """Every prompt through the encoder once, every choice in a row of the decoder.

    Args:
        base: an encoder-decoder model.
        examples: of any number of choices.
        keys_once: compute the keys and values of a prompt that the decoder attends to once, not for
            each choice. The decoder then has rows of two kinds, which no route tells apart.
        within: of the encoder's rows, and of the decoder's.
    """
    from transformers import DynamicCache, EncoderDecoderCache

    prompts, prompt_mask = _padded([e.prompt for e in examples], _pad_token(base), base.device)
    model: Any = base.model
    with _entered(within, range(len(examples))):
        encoded = model.get_encoder()(input_ids=prompts, attention_mask=prompt_mask)[0]
    flat = [(i, c) for i, e in enumerate(examples) for c in range(len(e.choices))]
    start = int(model.config.decoder_start_token_id)
    sequences = [(start, *examples[i].choices[c][:-1]) for i, c in flat]
    ids, mask = _padded(sequences, _pad_token(base), base.device)
    targets = Targets()
    for row, (i, c) in enumerate(flat):
        for t, token in enumerate(examples[i].choices[c]):
            targets.score(row * ids.shape[1] + t, token, (i, c, t))
    of_example = torch.tensor([i for i, _ in flat], device=base.device)
    seen = prompt_mask
    if keys_once:
        # Of four dimensions: the model would make one of as many rows as there are prompts.
        dtype = compute_dtype(base.model)
        seen = (1 - prompt_mask[:, None, None]).to(dtype) * torch.finfo(dtype).min

    def new_cache() -> Any:
        return EncoderDecoderCache(DynamicCache(), _repeating_cache(of_example))

    inputs = {
        "encoder_outputs": (encoded if keys_once else encoded[of_example],),
        "attention_mask": seen[of_example],
        "decoder_input_ids": ids,
        "decoder_attention_mask": mask,
    }
    with _entered(within, [i for i, _ in flat]):
        return scores(base, examples, targets, inputs, new_cache if keys_once else None)


def _repeating_cache(of_example: Tensor) -> Any:
    """Keeps nothing: it repeats the keys and values of each example for each of its choices."""
    from transformers import DynamicCache

    class Repeating(DynamicCache):  # type: ignore[misc]
        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            rows = of_example.to(key_states.device)
            return key_states[rows], value_states[rows]

    return Repeating()


# -- common to all ---------------------------------------------------------------------------------


def _entered(within: RowContext | None, of_row: Sequence[int]) -> AbstractContextManager[object]:
    return nullcontext() if within is None else within(of_row)


def scores(
    base: BaseModel,
    examples: Sequence[EncodedExample],
    targets: Targets,
    inputs: Mapping[str, Any],
    new_cache: Callable[[], Any] | None = None,
) -> TokenScores:
    """Run the model, and score the targets.

    Args:
        base: the model.
        examples: that the targets' slots are of.
        targets: what to score.
        inputs: the model's arguments.
        new_cache: makes the keys and values that the model goes on from, and changes.

    Raises:
        IA3Error: the model's output layer is not where its logits come from.
    """
    positions = torch.tensor(list(targets.projected), device=base.device)

    def run() -> Any:
        cache = {} if new_cache is None else {"past_key_values": new_cache()}
        return base.model(**inputs, **cache, use_cache=bool(cache)).logits

    scored = _without_logits(base.model, positions, targets, run)
    if scored is None:
        scored = _by_logits(base.model, positions, targets, run)
    # A model over several devices answers on its last one.
    device = scored.device
    slots = torch.tensor(targets.slot, device=device).unbind(1)
    shape = shape_of(examples)
    log_probs = scored.new_zeros(shape).index_put(slots, scored)
    mask = torch.zeros(shape, dtype=torch.bool, device=device)
    mask[slots] = True
    return TokenScores(log_probs, mask)


def _without_logits(
    model: nn.Module, positions: Tensor, targets: Targets, run: Callable[[], Any]
) -> Tensor | None:
    """The log-probability of each target, or `None` where the logits are more than a projection."""
    head = output_layer(model)
    if model in _work_on_logits or not is_plain(head):
        return None
    caught: list[Tensor] = []

    def catch(hidden: Tensor) -> Tensor:
        caught.append(hidden.flatten(0, -2).index_select(0, positions.to(hidden.device)))
        return caught[0]

    vars(head)["forward"] = catch
    try:
        logits = run()
    except Exception:
        if not caught:
            raise
        # The model misses the vocabulary's size.
        logits = None
    finally:
        del vars(head)["forward"]
    # Whatever a model does to its logits gives another tensor, or another version of this one.
    if len(caught) != 1 or logits is not caught[0] or _is_written_over(logits):
        _work_on_logits.add(model)
        return None
    prediction, token = torch.tensor(targets.prediction), torch.tensor(targets.token)
    return token_log_probs(head, logits, prediction, token)  # type: ignore[arg-type]


def _is_written_over(tensor: Tensor) -> bool:
    return not tensor.is_inference() and tensor._version > 0


def _by_logits(
    model: nn.Module, positions: Tensor, targets: Targets, run: Callable[[], Any]
) -> Tensor:
    """The log-probability of each target, from the logits of all positions that predict one."""
    with project_only(model, positions):
        logits = run()
    if logits.shape[:-1] != positions.shape:
        raise IA3Error(
            f"{type(model).__name__} does not project its output layer's input: logits are "
            f"{list(logits.shape)}, expected [{len(positions)}, vocabulary]"
        )
    prediction = torch.tensor(targets.prediction, device=logits.device)
    token = torch.tensor(targets.token, device=logits.device)
    # By parts: in float32 a large vocabulary's logits would take twice their own memory again.
    normalisers = torch.cat([part.float().logsumexp(-1) for part in logits.split(512)])
    scored: Tensor = logits[prediction, token].float() - normalisers[prediction]
    return scored


@contextmanager
def project_only(model: nn.Module, positions: Tensor) -> Iterator[None]:
    """Within the context the output layer sees only these positions of the flattened batch."""

    def gather(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (args[0].flatten(0, -2).index_select(0, positions.to(args[0].device)),)

    handle = output_layer(model).register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


def tried_out(
    base: BaseModel,
    probe: Callable[[BaseModel], bool | None],
    verdicts: MutableMapping[nn.Module, bool],
) -> bool:
    """What a probe found of a model, probed once; `False` while it finds nothing out."""
    if base.model not in verdicts:
        verdict = probe(base)
        if verdict is None:
            return False
        verdicts[base.model] = verdict
    return verdicts[base.model]


def verdict(whole: Tensor, tried: Tensor, wrong: Tensor) -> bool | None:
    """Whether scores are what they should be, as far as a broken model lets it be said.

    Args:
        whole: the scores as they should be.
        tried: those of the way that is tried out.
        wrong: what a mistake makes of them, for scale.
    """
    error, scale = (tried - whole).abs().max(), (wrong - whole).abs().max()
    if not torch.isfinite(error + scale) or scale == 0:
        return None
    return bool(error <= PROBE_TOLERANCE * scale)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the context a model has no dropout, and no gradients are kept."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def output_layer(model: Any) -> nn.Module:
    """The layer that projects to the vocabulary.

    Raises:
        IA3Error: the model has none that it says.
    """
    head: nn.Module | None = model.get_output_embeddings()
    if head is None:
        raise IA3Error(f"{type(model).__name__} has no output embeddings to score tokens with")
    return head


def shape_of(examples: Sequence[EncodedExample]) -> tuple[int, int, int]:
    """`[batch, choices, length]` of the scores."""
    return (
        len(examples),
        max(len(e.choices) for e in examples),
        max(len(c) for e in examples for c in e.choices),
    )


def compute_dtype(model: nn.Module) -> torch.dtype:
    """Of the model's first floating-point parameter."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _padded(
    sequences: Iterable[Sequence[int]], pad: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`[rows, length]` ids padded on the right, and their mask."""
    tensors = [torch.tensor(s, device=device) for s in sequences]
    ids = pad_sequence(tensors, batch_first=True, padding_value=pad)
    mask = pad_sequence([torch.ones_like(t) for t in tensors], batch_first=True)
    return ids, mask


def _pad_token(base: BaseModel) -> int:
    # A padding token added to the tokenizer alone is none the model has; masked, any other will do.
    pad = base.tokenizer.pad_token_id
    model: Any = base.model
    known = model.get_input_embeddings().weight.shape[0]
    return int(pad) if pad is not None and pad < known else 0
