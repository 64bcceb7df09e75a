"""One forward pass whose result is the log-probability of every answer token.

Only positions that predict an answer token are projected to the vocabulary. A layout of the batch
(`shared_prompt`, `expanded`) says which positions those are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ...base.loading import BaseModel
from ...base.products import fast_products, plain_attention
from ...errors import IA3Error
from ..prompts.encoding import EncodedExample
from .vocabulary import is_plain, token_log_probs

# For a call whose rows `[rows]`, or tokens `[rows, length]`, belong to these of the examples: a
# context in which they have the examples' adapters.
Routing = Callable[[Tensor], AbstractContextManager[Any]]
# Up to so many numbers of a mask `[rows, 1, length, length]`, attention with gradients is faster as
# plain products. Their memory, times the heads, is what each layer then keeps.
SHORT_ROWS = 100_000

# Models that change their logits after the projection, such as by a soft cap.
_change_logits: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass(frozen=True)
class TokenScores:
    """What a model says of every token of every answer choice, `[batch, choices, length]`.

    `log_probs` are natural logarithms, float32 or float64, 0 where there is no token; `mask` is
    true where there is one. A choice with no token is no choice.
    """

    log_probs: Tensor
    mask: Tensor

    def mean_log_probs(self) -> Tensor:
        """`[batch, choices]`: β of equation 2; minus infinity where there is no choice."""
        counts = self.mask.sum(-1)
        means = self.log_probs.sum(-1) / counts.clamp(min=1)
        return means.masked_fill(counts == 0, -torch.inf)


@dataclass
class AnswerTokens:
    """For each score the index of its predicting position in `projected`, its token, its slot.

    `projected` has positions of the flattened batch `[rows * length]` as keys; a slot is (example,
    choice, place in the choice).
    """

    projected: dict[int, int] = field(default_factory=dict)
    prediction: list[int] = field(default_factory=list)
    token: list[int] = field(default_factory=list)
    slot: list[tuple[int, int, int]] = field(default_factory=list)

    def add(self, position: int, token: int, slot: tuple[int, int, int]) -> None:
        """Score a token by what a position of the flattened batch predicts."""
        self.prediction.append(self.projected.setdefault(position, len(self.projected)))
        self.token.append(token)
        self.slot.append(slot)


def answer_scores(
    base: BaseModel,
    examples: Sequence[EncodedExample],
    answers: AnswerTokens,
    inputs: Mapping[str, Any],
    new_cache: Callable[[], Any] | None = None,
) -> TokenScores:
    """Run the model on `inputs` and score all tokens of the examples' choices.

    `new_cache` makes the cache of keys and values that the model reads and extends.
    """
    positions = torch.tensor(list(answers.projected), device=base.device)

    def run() -> Any:
        cache = {} if new_cache is None else {"past_key_values": new_cache()}
        mask = inputs.get("attention_mask")
        short = mask is not None and mask.dim() == 4 and mask.numel() <= SHORT_ROWS
        plain = short and torch.is_grad_enabled() and base.device.type == "cpu"
        with plain_attention() if plain else nullcontext():
            return base.model(**inputs, **cache, use_cache=bool(cache)).logits

    scored = _from_hidden_states(base.model, positions, answers, run)
    if scored is None:
        scored = _from_logits(base.model, positions, answers, run)
    # A model over several devices returns its logits on the last one.
    device = scored.device
    slots = torch.tensor(answers.slot, device=device).unbind(1)
    shape = shape_of(examples)
    log_probs = scored.new_zeros(shape).index_put(slots, scored)
    mask = torch.zeros(shape, dtype=torch.bool, device=device)
    mask[slots] = True
    return TokenScores(log_probs, mask)


def _from_hidden_states(
    model: nn.Module, positions: Tensor, answers: AnswerTokens, run: Callable[[], Any]
) -> Tensor | None:
    """`[scores]`; `None` where the logits are more than a linear projection."""
    head = output_layer(model)
    if model in _change_logits or not is_plain(head):
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
        # The model expects logits of the vocabulary's size, and works on them.
        logits = None
    finally:
        del vars(head)["forward"]
    # Whatever a model does to its logits gives another tensor, or another version of this one.
    written_over = logits is not None and not logits.is_inference() and logits._version > 0
    if len(caught) != 1 or logits is not caught[0] or written_over:
        _change_logits.add(model)
        return None
    prediction, token = torch.tensor(answers.prediction), torch.tensor(answers.token)
    return token_log_probs(head, logits, prediction, token)  # type: ignore[arg-type]


def _from_logits(
    model: nn.Module, positions: Tensor, answers: AnswerTokens, run: Callable[[], Any]
) -> Tensor:
    """`[scores]`, from the logits of the projected positions."""
    with project_only(model, positions):
        logits = run()
    if logits.shape[:-1] != positions.shape:
        raise IA3Error(
            f"{type(model).__name__} does not project its output layer's input: logits are "
            f"{list(logits.shape)}, expected [{len(positions)}, vocabulary]"
        )
    prediction = torch.tensor(answers.prediction, device=logits.device)
    token = torch.tensor(answers.token, device=logits.device)
    # In parts: logits of a large vocabulary in float32 take twice their own memory again.
    normalisers = torch.cat([part.float().logsumexp(-1) for part in logits.split(512)])
    scored: Tensor = logits[prediction, token].float() - normalisers[prediction]
    return scored


def routed(routing: Routing | None, examples: Tensor) -> AbstractContextManager[Any]:
    """The context of a call whose rows or tokens belong to these of the examples."""
    return nullcontext() if routing is None else routing(examples)


@contextmanager
def project_only(model: nn.Module, positions: Tensor) -> Iterator[None]:
    """Within the context the output layer gets only these positions of the flattened batch."""

    def gather(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (args[0].flatten(0, -2).index_select(0, positions.to(args[0].device)),)

    handle = output_layer(model).register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the context the model is in evaluation mode and records no gradients, and is fast."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), fast_products():
            yield
    finally:
        model.train(was_training)


def output_layer(model: Any) -> nn.Module:
    """The layer that projects hidden states to the vocabulary."""
    head: nn.Module | None = model.get_output_embeddings()
    if head is None:
        raise IA3Error(f"{type(model).__name__} has no output embeddings to score tokens with")
    return head


def shape_of(examples: Sequence[EncodedExample]) -> tuple[int, int, int]:
    """`[batch, choices, length]` of the scores."""
    choices = max(len(e.choices) for e in examples)
    return len(examples), choices, max(len(c) for e in examples for c in e.choices)


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the model's first floating-point parameter."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def padded(base: BaseModel, sequences: Iterable[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids `[rows, length]`, padded on the right, and their mask of ones and zeros."""
    tensors = [torch.tensor(s, device=base.device) for s in sequences]
    ids = pad_sequence(tensors, batch_first=True, padding_value=pad_token(base))
    mask = pad_sequence([torch.ones_like(t) for t in tensors], batch_first=True)
    return ids, mask


def pad_token(base: BaseModel) -> int:
    """An id to pad with. The model may lack the tokenizer's; masked, any other will do."""
    pad = base.tokenizer.pad_token_id
    known = base.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    return int(pad) if pad is not None and pad < known else 0
