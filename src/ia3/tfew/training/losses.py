"""The three loss terms of T-Few (paper section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ...arguments import LARGEST, instance, number, whole
from ...errors import IA3Error
from ..scoring.answer_tokens import TokenScores

# Added to 1 − p, as in the authors' code: a certain wrong token costs −log(1e-2), not infinity.
UNLIKELIHOOD_FLOOR = 1e-2


@dataclass(frozen=True)
class TFewLoss:
    """The terms of T-Few's loss, each a scalar and unweighted, and `total`, their weighted sum."""

    total: Tensor
    lm: Tensor
    length_norm: Tensor
    unlikelihood: Tensor


@dataclass(frozen=True)
class Counts:
    """What the terms of a batch are divided by: its examples, and its right and wrong tokens."""

    examples: int
    right: int
    wrong: int


def tfew_loss(
    logits: Tensor,
    target_ids: Tensor,
    labels: Tensor,
    *,
    pad_token_id: int | None = None,
    target_mask: Tensor | None = None,
    lm: float = 1.0,
    length_norm: float = 1.0,
    unlikelihood: float = 1.0,
) -> TFewLoss:
    """T-Few's loss from the logits of all answer choices.

    Args:
        logits: `[batch, choices, length, vocabulary]`, floating; those at a place predict the token
            of `target_ids` at the same place.
        target_ids: `[batch, choices, length]`, integers; any value where there is no token.
        labels: `[batch]`, integers, the index of each right choice.
        pad_token_id: the id in `target_ids` that is no token. Give the mask instead where the end
            of a text has the same id.
        target_mask: `[batch, choices, length]`, true (or not 0) where there is a token. A choice
            with no token is no choice.
        lm: weight of the right choices' mean token cross-entropy.
        length_norm: weight of the cross-entropy over the choices' mean log-probabilities.
        unlikelihood: weight of the mean of −log(1 − p + 1e-2) over the wrong choices' tokens.

    Returns:
        Scalars, float32 (float64 for float64 logits). `unlikelihood` is 0 where nothing is wrong.

    Raises:
        InvalidTypeError: an argument is of another type.
        IA3Error: shapes or dtypes do not fit together, a label or a target is out of range, a label
            points at a choice with no token, or not exactly one of `pad_token_id` and `target_mask`
            is given.
    """
    for name, tensor in (("logits", logits), ("target_ids", target_ids), ("labels", labels)):
        instance(name, tensor, Tensor, "a tensor")
    given = {"lm": lm, "length_norm": length_norm, "unlikelihood": unlikelihood}
    shares: Any = {name: number(name, weight, "a number") for name, weight in given.items()}
    if logits.dim() != 4 or not logits.is_floating_point():
        raise IA3Error(
            f"logits are {_described(logits)}, expected floating [batch, choices, length, "
            "vocabulary]"
        )
    for name, tensor, dims in (("target_ids", target_ids, 3), ("labels", labels, 1)):
        if tensor.shape != logits.shape[:dims] or not _is_integer(tensor):
            raise IA3Error(
                f"{name} are {_described(tensor)}, expected integers {list(logits.shape[:dims])}, "
                f"as the logits {list(logits.shape)} have them"
            )
    mask = _target_mask(target_ids, pad_token_id, target_mask).to(logits.device)
    _check_labels(labels, mask)
    tokens = target_ids[mask].to(logits.device, torch.int64)
    outside = tokens[(tokens < 0) | (tokens >= logits.shape[-1])]
    if outside.numel():
        raise IA3Error(
            f"target_ids has {int(outside[0])} at a place with a token, expected 0 to "
            f"{logits.shape[-1] - 1}: mask what is no token (target_mask or pad_token_id)"
        )
    # Only places with a token: whatever the logits are elsewhere, they get no gradient.
    rows = logits[mask]
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    scored = rows.gather(1, tokens[:, None])[:, 0] - rows.logsumexp(-1)
    log_probs = scored.new_zeros(mask.shape).masked_scatter(mask, scored)
    scores, labels = TokenScores(log_probs, mask), labels.to(mask.device, torch.int64)
    return token_loss(scores, labels, **shares)


def token_loss(
    scores: TokenScores,
    labels: Tensor,
    *,
    lm: float = 1.0,
    length_norm: float = 1.0,
    unlikelihood: float = 1.0,
    counts: Counts | None = None,
    weights: Tensor | None = None,
) -> TFewLoss:
    """`tfew_loss` from token log-probabilities (equations 1 to 3).

    With the `counts` of a whole batch, terms and gradients of its parts add up to the batch's. What
    an example adds to the sums is multiplied by its weight, of `weights` `[batch]`.
    """
    log_probs, mask = scores.log_probs, scores.mask
    right = F.one_hot(labels, log_probs.shape[1]).bool()[:, :, None] & mask
    wrong = mask & ~right
    right_log_probs, wrong_log_probs = log_probs[right], log_probs[wrong]
    counts = counts or Counts(len(labels), right_log_probs.numel(), wrong_log_probs.numel())
    unlikely = -torch.log1p(UNLIKELIHOOD_FLOOR - wrong_log_probs.exp())
    reduction = "sum" if weights is None else "none"
    of_examples = F.cross_entropy(scores.mean_log_probs(), labels, reduction=reduction)
    if weights is not None:
        of_tokens = weights[:, None, None].expand(mask.shape)
        right_log_probs = right_log_probs * of_tokens[right]
        unlikely, of_examples = unlikely * of_tokens[wrong], of_examples * weights
    terms = {
        "lm": -right_log_probs.sum() / counts.right,
        "length_norm": of_examples.sum() / counts.examples,
        "unlikelihood": unlikely.sum() / max(counts.wrong, 1),
    }
    shares = {"lm": lm, "length_norm": length_norm, "unlikelihood": unlikelihood}
    # A term of weight 0 is left out: 0 times a term that is not finite would not be 0.
    weighted = [shares[name] * term for name, term in terms.items() if shares[name]]
    total = torch.stack(weighted).sum() if weighted else terms["lm"] * 0
    return TFewLoss(total, **terms)


def _target_mask(
    target_ids: Tensor, pad_token_id: int | None, target_mask: Tensor | None
) -> Tensor:
    if (pad_token_id is None) == (target_mask is None):
        both = "neither" if pad_token_id is None else "both"
        raise IA3Error(f"expected one of pad_token_id and target_mask, {both} given")
    if target_mask is None:
        return torch.ne(target_ids, whole("pad_token_id", pad_token_id, -LARGEST))
    instance("target_mask", target_mask, Tensor, "a tensor")
    if target_mask.shape != target_ids.shape:
        raise IA3Error(
            f"target_mask is {_described(target_mask)}, expected {list(target_ids.shape)}, as "
            "target_ids"
        )
    return target_mask.bool()


def _check_labels(labels: Tensor, mask: Tensor) -> None:
    batch, choices, _ = mask.shape
    if not batch:
        raise IA3Error("the batch has no examples: there is nothing to average over")
    having = mask.any(-1).tolist()
    for row, label in enumerate(labels.tolist()):
        if not 0 <= label < choices:
            raise IA3Error(f"labels[{row}] is {label}, expected 0 to {choices - 1}")
        if not having[row][label]:
            raise IA3Error(
                f"labels[{row}] is {label}, a choice with no token: row {row} has tokens in "
                f"choices {[c for c, has in enumerate(having[row]) if has]}"
            )


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _described(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"
