"""Log-probabilities of chosen tokens, without the logits of all positions at once.

A position's logits are one number for every token of the vocabulary: with many answer choices they
would be the largest tensors of a training step. They are computed for a few positions at a time.
What the gradients need of them is no larger than the hidden states, and is computed at once too:

    ∂ log p(t) / ∂h = W_t − Σ_v p(v) W_v
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ...errors import IA3Error

# So many positions are projected at a time: of a vocabulary of 50,000 tokens 12 MB in float32,
# which most processors' caches hold.
POSITIONS = 64


def is_plain(head: nn.Module) -> bool:
    """Whether a layer computes just F.linear of weights that do not train."""
    return (
        type(head) is nn.Linear
        and "forward" not in head.__dict__
        and not head._forward_hooks
        and not head._forward_pre_hooks
        and not torch_module._global_forward_hooks
        and not any(p.requires_grad or p.is_meta for p in head.parameters())
    )


def token_log_probs(head: nn.Linear, hidden: Tensor, prediction: Tensor, token: Tensor) -> Tensor:
    """Natural logarithms of chosen tokens' probabilities, `[scores]`, with gradients for `hidden`.

    `hidden` is `[positions, dim]`; `token` and the position that predicts it (`prediction`) are
    `[scores]`, int64, on the CPU. float64 stays, other dtypes give float32.
    """
    # In the order of the positions, so that each part of them has a slice of the scores.
    order = prediction.argsort(stable=True)
    scored = _TokenLogProbs.apply(hidden, head.weight, head.bias, prediction[order], token[order])  # type: ignore[no-untyped-call]
    return scored[order.argsort().to(scored.device)]  # type: ignore[no-any-return]


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        prediction: Tensor,
        token: Tensor,
    ) -> Tensor:
        count = len(hidden)
        starts = [*range(0, count, POSITIONS), count]
        bounds = torch.searchsorted(prediction, torch.tensor(starts)).tolist()
        prediction, token = prediction.to(hidden.device), token.to(hidden.device)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        scored = hidden.new_empty(len(token), dtype=wide)
        # Σ_v p(v) W_v
        expected = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for (start, stop), (first, last) in zip(pairwise(starts), pairwise(bounds), strict=True):
            logits = F.linear(hidden[start:stop], weight, bias).to(wide)
            logits -= logits.logsumexp(-1, keepdim=True)
            scored[first:last] = logits[prediction[first:last] - start, token[first:last]]
            if expected is not None:
                expected[start:stop] = logits.exp_().to(weight.dtype) @ weight
        ctx.save_for_backward(expected, weight, prediction, token)
        return scored

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        if torch.is_grad_enabled():
            raise IA3Error(
                "scores of choices have no second derivatives (create_graph=True): take the "
                "model's logits and their log_softmax instead"
            )
        expected, weight, prediction, token = ctx.saved_tensors
        (grad,) = grads
        of_position = grad.new_zeros(len(expected)).index_add_(0, prediction, grad)
        grad_hidden = -of_position[:, None] * expected
        grad_hidden.index_add_(0, prediction, grad[:, None] * weight[token])
        return grad_hidden.to(expected.dtype), None, None, None, None
