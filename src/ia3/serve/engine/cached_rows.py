"""The rows of a running batch in one model: their keys and values, and one pass for all of them.

Each token of a row stands in the cache at its own position, whatever the other rows' lengths; a
mask `[rows, 1, tokens, length]` hides what lies behind a row's end. So a row joins at any place and
leaves by having the last one moved into its place, and no other row is copied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ...base.loading import BaseModel
from ...base.products import fast_products, plain_attention
from ...base.threads import OFTEN, Threads
from ...tfew.scoring.answer_tokens import compute_dtype, output_layer, pad_token, project_only
from ...tfew.scoring.probe import TOLERANCE, WIDE_TOLERANCE

# Room for so many tokens more is made at once.
GROWTH = 256
# On a CPU, tokens beyond a wider sliding window take too long to try out.
WIDEST_TRIED = 1024


class _RowCache(DynamicCache):  # type: ignore[misc]
    """Keys and values, a tensor `[rows, heads, length, dim]` a layer, of which a pass sees some.

    The pass is of the rows from `first`, writes at `positions`, `[rows, tokens]`, and sees the
    first `length` places of each row.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows = self.room = 0
        self.first = self.length = 0
        self.positions = torch.zeros(0, 0, dtype=torch.int64)
        # Of each layer, the keys and the values.
        self.tensors: list[list[Tensor]] = []

    def fit(self, rows: int, length: int) -> None:
        """Have room for these rows and so many tokens of each, in the passes that follow.

        Where there is too little of one, there is as much of both as is needed now: not the most
        rows that there ever were, times the most tokens.
        """
        if rows > self.rows or length > self.room:
            self.rows = 1 << (rows - 1).bit_length()
            self.room = -(-length // GROWTH) * GROWTH

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        while len(self.tensors) <= layer_idx:
            self.tensors.append([])
        new = (key_states, value_states)
        rows, positions = slice(self.first, self.first + len(key_states)), self.positions
        held = self.tensors[layer_idx] = [
            self._roomy(old, like)
            for old, like in zip(self.tensors[layer_idx] or (None, None), new, strict=True)
        ]
        places = torch.arange(len(positions), device=positions.device)[:, None]
        found = []
        for tensor, states in zip(held, new, strict=True):
            tensor[rows][places, :, positions] = states.transpose(1, 2)
            found.append(tensor[rows, :, : self.length])
        return found[0], found[1]

    def _roomy(self, old: Tensor | None, like: Tensor) -> Tensor:
        if old is not None and (old.shape[0], old.shape[2]) == (self.rows, self.room):
            return old
        # Zeros: what the mask hides is still multiplied, by zero.
        tensor = like.new_zeros(self.rows, like.shape[1], self.room, like.shape[3])
        if old is not None:
            kept = old[: self.rows, :, : self.room]
            tensor[: kept.shape[0], :, : kept.shape[2]] = kept
        return tensor

    @torch.inference_mode()
    def move(self, source: int, target: int, length: int) -> None:
        """Have at the place `target` the row that is at `source`, of so many tokens alone."""
        self.wipe(target)
        for tensor in (tensor for layer in self.tensors for tensor in layer):
            tensor[target, :, :length] = tensor[source, :, :length]

    @torch.inference_mode()
    def wipe(self, row: int) -> None:
        """Forget a row's values: were they not finite, they would reach the next row there.

        What a mask hides is multiplied by zero, which leaves NaN what it is.
        """
        for tensor in (tensor for layer in self.tensors for tensor in layer):
            tensor[row : row + 1].zero_()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length - self.positions.shape[1]

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        return self.length, 0


class CachedRows:
    """A language model and the cached tokens of the rows that it goes on with, place by place."""

    def __init__(self, base: BaseModel) -> None:
        self.base = base
        self._cache = _RowCache()
        # Of each place with a row, how many tokens.
        self._lengths: dict[int, int] = {}
        # By how many binary digits the number of tokens in a pass has: these take about as long.
        self._threads = [Threads(anew=OFTEN) for _ in range(32)]
        dtype = compute_dtype(base.model)
        self._hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=base.device)
        self.windows = _windows(base)

    def next_scores(
        self, first: int, tokens: Sequence[Sequence[int]], starts: Sequence[int]
    ) -> Tensor:
        """What follows each row's last token: logits, `[rows, vocabulary]`, float32.

        Args:
            first: the place of the first row; the others follow it.
            tokens: new tokens of each row, at least one.
            starts: how many of a row's tokens were computed before.
        """
        base, count = self.base, max(map(len, tokens))
        device = base.device
        fill = pad_token(base)
        ids = torch.tensor([[*row, *[fill] * (count - len(row))] for row in tokens], device=device)
        new_places = torch.arange(count, device=device)
        positions = torch.tensor(starts, device=device)[:, None] + new_places
        length = max(starts) + count
        for place, (start, new) in enumerate(zip(starts, tokens, strict=True), first):
            if place not in self._lengths:
                self._cache.wipe(place)
            self._lengths[place] = start + len(new)
        self._cache.fit(max(self._lengths) + 1, max(length, *self._lengths.values()))
        self._cache.first, self._cache.length, self._cache.positions = first, length, positions
        ends = [row * count + len(new) - 1 for row, new in enumerate(tokens)]
        last = torch.tensor(ends, device=device)
        mask = self._mask(positions, length)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}

        def run() -> Any:
            return base.model(**inputs, past_key_values=self._cache, use_cache=True)

        with (
            torch.inference_mode(),
            fast_products(),
            project_only(base.model, last) if count > 1 else nullcontext(),
            # torch's fused kernel takes several times as long for single tokens.
            plain_attention() if count == 1 and device.type == "cpu" else nullcontext(),
        ):
            logits: Tensor = self._threads[ids.numel().bit_length()].step(run).logits
            return logits.reshape(len(tokens), -1).float()

    def _mask(self, positions: Tensor, length: int) -> Tensor | dict[str, Tensor]:
        """What is added to attention's scores: one mask, or one a kind of layer."""
        places = torch.arange(length, device=positions.device)
        positions = positions[:, None, :, None]
        masks = {}
        for kind, window in self.windows.items():
            hides = places > positions
            if window is not None:
                hides |= places <= positions - window
            masks[kind] = torch.where(hides, self._hidden, 0.0)
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def move(self, source: int, target: int) -> None:
        """The row at a place, if there is one, stands at another, where there is none any more."""
        if source == target:
            return
        self.leave(target)
        if source in self._lengths:
            length = self._lengths[target] = self._lengths.pop(source)
            self._cache.move(source, target, length)

    def leave(self, place: int) -> None:
        """There is no row at a place any more."""
        self._lengths.pop(place, None)
        if not self._lengths:
            # Its memory is given back.
            self._cache = _RowCache()

    def bytes_of_token(self) -> int:
        """What a token of a row takes; 0 where no rows are there."""
        tensors = [tensor for layer in self._cache.tensors for tensor in layer]
        return sum(t.shape[1] * t.shape[3] * t.element_size() for t in tensors)


def tried_out(rows: CachedRows) -> int:
    """The bytes that a token takes; 0 where the model gives a row something else than alone.

    Rows join, grow at unlike lengths and beyond a sliding window, leave and are moved, and none is
    left.
    """
    base = rows.base
    window = max((each for each in rows.windows.values() if each is not None), default=0)
    is_wide = window > WIDEST_TRIED and base.device.type == "cpu"
    if base.is_encoder_decoder or not rows.windows or is_wide:
        return 0
    vocabulary = output_layer(base.model).get_parameter("weight").shape[0]
    ids = [(13 + 7919 * i) % vocabulary for i in range(31 + window)]
    texts = [ids[:9], ids[9:15], ids[15:]]
    try:
        found = _together(rows, texts, window)
        expected = [
            _alone(base, ids, [place for text, place, _ in found if text == number])
            for number, ids in enumerate(texts)
        ]
        together = [
            torch.stack([scores for text, _, scores in found if text == number])
            for number in range(len(texts))
        ]
        pairs = zip(together, expected, strict=True)
        error = max(float((scores - exact).abs().max()) for scores, exact in pairs)
        scale = float((expected[0][0] - expected[0][1]).abs().max())
        bytes_of_token = rows.bytes_of_token()
    except Exception:
        # Architectures refuse a mask, positions or a cache with many kinds of exception.
        return 0
    finally:
        for place in range(len(texts)):
            rows.leave(place)
    wide = compute_dtype(base.model).itemsize >= 4
    is_equal = error <= (WIDE_TOLERANCE if wide else TOLERANCE) * scale
    return bytes_of_token if 0 < scale < math.inf and is_equal else 0


def _windows(base: BaseModel) -> dict[str, int | None]:
    """Kind of layer -> its sliding window, or `None`; nothing where layers keep something else."""
    try:
        layers = DynamicCache(config=base.model.config).layers
    except Exception:  # a config of a model without such a cache
        return {}
    found: dict[str, int | None] = {}
    for layer in layers:
        if type(layer) is DynamicLayer:
            found["full_attention"] = None
        elif type(layer) is DynamicSlidingWindowLayer:
            found["sliding_attention"] = layer.sliding_window
        else:
            return {}
    return found or {"full_attention": None}


def _alone(base: BaseModel, ids: Sequence[int], places: Sequence[int]) -> Tensor:
    """What follows these places of a text: logits, `[places, vocabulary]`."""
    positions = torch.tensor(places, device=base.device)
    with torch.inference_mode(), fast_products(), project_only(base.model, positions):
        tokens = torch.tensor([list(ids)], device=base.device)
        logits: Tensor = base.model(input_ids=tokens, use_cache=False).logits
        return logits.reshape(len(places), -1).float()


def _together(
    rows: CachedRows, texts: Sequence[Sequence[int]], far: int
) -> list[tuple[int, int, Tensor]]:
    """What was computed of three texts: (text, place of a token, logits); the last is `far`."""
    found: list[tuple[int, int, Tensor]] = []

    def add(first: int, *parts: tuple[int, int, int]) -> None:
        new = [texts[text][start:end] for text, start, end in parts]
        scores = rows.next_scores(first, new, [start for _, start, _ in parts])
        for (text, _, end), of_row in zip(parts, scores, strict=True):
            found.append((text, end - 1, of_row))

    add(0, (0, 0, 5), (1, 0, 2))  # join together
    add(0, (0, 5, 6), (1, 2, 3))
    add(2, (2, 0, 6 + far))  # joins in two parts
    add(0, (0, 6, 7), (1, 3, 4))
    add(2, (2, 6 + far, 13 + far))
    add(0, (0, 7, 8), (1, 4, 5), (2, 13 + far, 14 + far))
    rows.move(2, 0)  # the first leaves
    add(0, (2, 14 + far, 15 + far), (1, 5, 6))
    add(0, (2, 15 + far, 16 + far))
    return found
