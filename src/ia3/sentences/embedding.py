"""From texts to vectors with a sentence encoder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_callable, listed, whole
from ..base.encoders import SentenceEncoder
from ..base.products import fast_products, plain_attention
from ..errors import IA3Error, InvalidTypeError, shown

# Up to so many pairs of tokens in a batch, attention is faster as plain products. Each layer then
# keeps a number of every head for each pair in training.
SHORT_ROWS = 400_000


def tokenized(encoder: SentenceEncoder, texts: Sequence[str]) -> list[list[int]]:
    """Each text's token ids: the prompt first, special tokens with it, cut to `max_length`.

    Raises:
        InvalidTypeError: the texts are no list, or one of them is no text.
        IA3Error: one has half a character, or a token that the model does not know.
    """
    texts = listed("texts", texts, "a list of texts")
    if not texts:
        return []
    for text in texts:
        if not isinstance(text, str):
            raise InvalidTypeError(f"texts has {shown(text)}, expected texts")
    prompt, most = encoder.prompt, encoder.max_length
    options = {"truncation": True, "max_length": most, "return_attention_mask": False}
    given = [prompt + text for text in texts] if prompt else texts
    try:
        ids = encoder.tokenizer(given, return_token_type_ids=False, **options)["input_ids"]
    except TypeError as error:
        # They are texts, of which the tokenizer takes all but those that cannot be encoded.
        half = next((text for text in texts if not _is_whole(text)), None)
        if half is None:
            raise
        raise IA3Error(f"texts has {shown(half)}, which is no text: half a character") from error
    encoder.check_tokens(ids)
    return ids  # type: ignore[no-any-return]


def _is_whole(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def embed(
    encoder: SentenceEncoder,
    ids: Sequence[Sequence[int]],
    *,
    model: Callable[..., Any] | None = None,
    **call: Any,
) -> Tensor:
    """The texts' vectors, float32 `[texts, dimension]` on the encoder's device, with gradients.

    Args:
        ids: each text's token ids, as `tokenized` gives them; they are computed in one batch.
        model: called in place of `encoder.model`, e.g. an `IA3Model` around it.
        call: for that call, e.g. `adapter_names`, one a text.
    """
    device, lengths = encoder.device, [len(row) for row in ids]
    if not lengths:
        return torch.zeros(0, encoder.dimension, dtype=torch.float32, device=device)
    width = max(1, *lengths)
    pad = _padding(encoder)
    rows = [[*row, *[pad] * (width - len(row))] for row in ids]
    counts = torch.tensor(lengths, device=device).unsqueeze(1)
    positions = torch.arange(width, device=device)
    # Attention over no token at all has no value.
    attended = (positions < counts.clamp(min=1)).long()
    tokens = torch.tensor(rows, device=device)
    called = encoder.model if model is None else model
    short = device.type == "cpu" and tokens.numel() * width <= SHORT_ROWS
    with plain_attention() if short else nullcontext():
        output = called(input_ids=tokens, attention_mask=attended, **call)
    mask = (positions < counts) & (positions >= encoder.prompt_tokens)
    hidden = output.last_hidden_state.float()
    vectors = torch.cat([_POOL[mode](hidden, mask) for mode in encoder.pooling.split("+")], dim=1)
    if encoder.dense is not None:
        vectors = encoder.dense(vectors)
    return nn.functional.normalize(vectors, dim=1) if encoder.normalize else vectors


def embeddings(
    encoder: SentenceEncoder,
    ids: Sequence[Sequence[int]],
    *,
    max_tokens: int = 1024,
    progress: Callable[[int], None] | None = None,
    model: Callable[..., Any] | None = None,
    adapter_names: Sequence[str] | None = None,
) -> Tensor:
    """The vectors of many texts, float32 `[texts, dimension]` on the CPU, without gradients.

    They are computed in batches of texts of like lengths, and what is there twice but once.

    Args:
        ids: each text's token ids, as `tokenized` gives them.
        max_tokens: of a batch, with padding; a text that is longer is one of its own.
        progress: called with the number of texts done since the last call.
        model: called in place of `encoder.model`, e.g. an `IA3Model` around it.
        adapter_names: one a text, for a model that takes them.

    Raises:
        InvalidTypeError: an argument is of another type.
        IA3Error: `max_tokens` is below 1, or there is not one adapter's name a text.
    """
    whole("max_tokens", max_tokens, 1)
    check_callable("progress", progress)
    names: Sequence[str | None] = [None] * len(ids) if adapter_names is None else adapter_names
    if len(names) != len(ids):
        raise IA3Error(f"adapter_names has {len(names)} names, expected {len(ids)}, one a text")
    # Each different text, with its adapter -> its place among them.
    places: dict[tuple[str | None, tuple[int, ...]], int] = {}
    found = [places.setdefault((n, tuple(i)), len(places)) for n, i in zip(names, ids, strict=True)]
    different = list(places)
    order = sorted(range(len(different)), key=lambda place: -len(different[place][1]))
    # Made outside of inference mode: what is learned on the vectors may need them for gradients.
    vectors = torch.empty(len(different), encoder.dimension, dtype=torch.float32)
    times, done = Counter(found), 0
    with torch.inference_mode(), fast_products():
        while done < len(order):
            rows = max(1, max_tokens // max(1, len(different[order[done]][1])))
            batch = order[done : done + rows]
            of_batch = [different[place] for place in batch]
            call = {} if adapter_names is None else {"adapter_names": [n for n, _ in of_batch]}
            part = embed(encoder, [i for _, i in of_batch], model=model, **call)
            vectors[torch.tensor(batch)] = part.cpu()
            done += len(batch)
            if progress is not None:
                progress(sum(times[place] for place in batch))
    return vectors[torch.tensor(found, dtype=torch.long)]


def _padding(encoder: SentenceEncoder) -> int:
    for source in (encoder.tokenizer, encoder.model.config):
        if (pad := getattr(source, "pad_token_id", None)) is not None:
            return int(pad)
    return 0


# Poolings of hidden states [texts, tokens, values]; the mask, [texts, tokens], says which tokens
# count. A text without any becomes zeros.


def _weighted(hidden: Tensor, weights: Tensor) -> Tensor:
    return torch.bmm(weights.unsqueeze(1), hidden).squeeze(1)


def _counts(mask: Tensor) -> Tensor:
    # Of whole numbers, a quotient would have torch's default dtype.
    return mask.sum(dim=1, keepdim=True).clamp(min=1).float()


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    return _weighted(hidden, mask / _counts(mask))


def _mean_of_root(hidden: Tensor, mask: Tensor) -> Tensor:
    return _weighted(hidden, mask / _counts(mask).sqrt())


def _weighted_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean weighted by the tokens' positions, which count from 1."""
    weights = mask * torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
    return _weighted(hidden, weights / _counts(weights))


def _max(hidden: Tensor, mask: Tensor) -> Tensor:
    largest = hidden.masked_fill(~mask.unsqueeze(2), float("-inf")).amax(dim=1)
    return largest.masked_fill(~mask.any(dim=1, keepdim=True), 0)


def _first(hidden: Tensor, mask: Tensor) -> Tensor:
    return _picked(hidden, mask, mask.long().argmax(dim=1))


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    positions = torch.arange(hidden.shape[1], device=hidden.device)
    return _picked(hidden, mask, (mask * positions).argmax(dim=1))


def _picked(hidden: Tensor, mask: Tensor, which: Tensor) -> Tensor:
    rows = torch.arange(len(hidden), device=hidden.device)
    return hidden[rows, which].masked_fill(~mask.any(dim=1, keepdim=True), 0)


_POOL = {
    "cls": _first,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_of_root,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}
