"""Training (IA)³ vectors on a sentence encoder, so that texts of one class lie together.

Each step draws a batch with its classes in turn. The loss is the supervised contrastive one (Khosla
et al. 2020, arXiv 2004.11362, equation 2) of the normalised embeddings.

Of several processes each embeds a part of the batch (`_of_all` exchanges them); the loss sees all,
and the gradients that it gives each part are added up.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as computed_again

from ..base.encoders import SentenceEncoder
from ..base.processes import processes
from ..base.products import fast_products, steady_attention
from ..base.threads import Threads
from ..model.ia3_model import DEFAULT_ADAPTER, IA3Model
from ..tfew.training.steps import DivergedError, StopTraining
from .checkpoint import CHECKPOINT_STEPS, Checkpoint, EncoderStep
from .embedding import embed
from .targets import are_lists, membership

# Cosines are divided by it before the softmax over the batch.
TEMPERATURE = 0.1
WARMUP_RATIO = 0.06
# More gain nothing, however many texts there are (docs/benchmarks.md).
MOST_STEPS = 100
FEWEST_STEPS = 15
# A frozen encoder that has this share wrong, or more, is trained at the whole rate; what is almost
# all right, at this part of it.
MUCH_TO_LEARN = 0.4
LEAST_RATE = 0.1


@dataclass(frozen=True)
class EncoderRecipe:
    """How vectors on an encoder are trained.

    Args:
        steps: optimizer steps, at least 1.
        batch_size: texts a step.
        learning_rate: of AdamW, without weight decay, at its peak. It rises in the first steps, and
            falls linearly to 0.
        seed: of the batches.
    """

    steps: int = 40
    batch_size: int = 16
    learning_rate: float = 2e-2
    seed: int = 0

    @classmethod
    def of(cls, texts: int, most_steps: int, seed: int) -> EncoderRecipe:
        """The recipe for so many texts.

        Of few texts, 24 to 64, none comes more than ten times, as what they have in common by
        chance is learned then. Of many, each comes two or three times, if `most_steps` allows it;
        the steps are then smaller.
        """
        fewest = min(cls.steps, max(FEWEST_STEPS, 10 * texts // cls.batch_size))
        steps = min(MOST_STEPS, max(fewest, texts // 6))
        rate = cls.learning_rate * min(1.0, math.sqrt(cls.steps / steps))
        return cls(max(1, min(steps, most_steps)), learning_rate=rate, seed=seed)

    def after(self, accuracy: float) -> EncoderRecipe:
        """With smaller steps, where a frozen encoder is right this often (0 to 1) already.

        Of 16 intents, of which it has nine tenths right, training at the whole rate unlearned two
        in a hundred (docs/benchmarks.md).
        """
        share = min(1.0, (1.0 - accuracy) / MUCH_TO_LEARN)
        return replace(self, learning_rate=self.learning_rate * max(share, LEAST_RATE))

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rising = (step + 1) / (WARMUP_RATIO * self.steps)
        return self.learning_rate * min(1.0, rising) * (1 - step / self.steps)


def balanced_batches(targets: Sequence[Any], size: int, steps: int, seed: int) -> list[list[int]]:
    """The texts of each step, `[steps][size]`: classes in turn, each with two texts.

    A text of several classes is drawn for each of them, and those of none are a class of their own.

    So each text has another of its class beside it, however many classes there are. No text comes a
    second time before all others of its class have. An odd `size` is rounded up.
    """
    draw = random.Random(seed)
    of_class: dict[int, list[int]] = {}
    for index, own in enumerate(targets):
        # No class has the index -1.
        for target in (own or [-1]) if isinstance(own, list) else [own]:
            of_class.setdefault(target, []).append(index)

    def turns(items: Sequence[Any]) -> Iterator[Any]:
        while True:
            yield from draw.sample(items, len(items))

    classes = turns(sorted(of_class))
    texts = {target: turns(members) for target, members in sorted(of_class.items())}
    drawn = ((next(texts[c]), next(texts[c])) for c in classes)
    return [[text for _ in range(0, size, 2) for text in next(drawn)] for _ in range(steps)]


def contrastive_loss(embeddings: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """The supervised contrastive loss, the mean over the texts that share their class with another.

    It is 0 where none does. Of texts with several classes, a pair counts by the share of its
    classes that both have.

    Args:
        embeddings: `[texts, dim]`, normalised.
        targets: the classes' indices, `[texts]`, or which of them each text has, bool
            `[texts, classes]`.
        weights: each text's loss is multiplied by its own, `[texts]`.
    """
    itself = torch.eye(len(targets), dtype=torch.bool, device=targets.device)
    cosines = embeddings @ embeddings.T / TEMPERATURE
    # A text's own place is -inf: left out before it is multiplied.
    log_probs = cosines.masked_fill(itself, -math.inf).log_softmax(-1).masked_fill(itself, 0)
    alike = _shared(targets) if targets.dim() == 2 else (targets[:, None] == targets).float()
    alike = alike.masked_fill(itself, 0)
    counts = alike.sum(1)
    anchors = counts > 0
    losses = -(log_probs * alike).sum(1)[anchors] / counts[anchors]
    if weights is not None:
        losses = losses * weights[anchors]
    return losses.sum() / anchors.sum().clamp(min=1)


def _shared(has: Tensor) -> Tensor:
    """The classes that two texts share, of those that either has, 0 to 1, `[texts, texts]`."""
    counts = has.float()
    both = counts @ counts.T
    sums = counts.sum(1)
    return both / (sums[:, None] + sums - both).clamp(min=1)


class EncoderTraining:
    """One training of the vectors of an encoder's adapter.

    Args:
        encoder: the base, with the adapter on it.
        model: has the vectors to train.
        ids: the texts' token ids, as `tokenized` gives them.
        targets: the classes' indices, `[texts]`, or a list of them for each text.
        recipe: how.
        max_tokens: computed at once; of a batch of more, parts are computed again in the backward
            pass, with the same gradients but for rounding.
        weights: of the texts' losses, `[texts]`; `None` is 1 each.

    Attributes:
        history: one record a step.
    """

    def __init__(
        self,
        encoder: SentenceEncoder,
        model: IA3Model,
        ids: Sequence[Sequence[int]],
        targets: Sequence[Any],
        recipe: EncoderRecipe,
        max_tokens: int = 4096,
        weights: Tensor | None = None,
    ) -> None:
        self._encoder = encoder
        self._model = model
        self._ids = ids
        self._recipe = recipe
        self._max_tokens = max_tokens
        self._drawn_by = targets
        if are_lists(targets):
            last = max((place for own in targets for place in own), default=0)
            self._targets = membership(targets, last + 1).to(encoder.device)
        else:
            self._targets = torch.tensor(targets, device=encoder.device)
        self._weights = None if weights is None else weights.float().to(encoder.device)
        self._vectors = {
            name: vector
            for name, vector in model.vectors(DEFAULT_ADAPTER).items()
            if vector.requires_grad
        }
        vectors = self._vectors.values()
        self._optimizer = torch.optim.AdamW(vectors, weight_decay=0.0, foreach=True)
        self.history: list[EncoderStep] = []

    def run(
        self,
        on_step: Callable[[EncoderStep], None] | None = None,
        checkpoint: Checkpoint | None = None,
        threads: Threads | None = None,
    ) -> None:
        """Take the steps that are not taken yet.

        `threads` chooses the number of threads of each step; by default torch's is left as it is.
        Of several processes the first one alone calls `on_step`.

        Raises:
            DivergedError: the loss or a gradient is not finite; the vectors are those before that
                step.
        """
        recipe = self._recipe
        if checkpoint is not None:
            self.history, count = checkpoint.restore(self._optimizer)
            if threads is not None and count is not None:
                threads.keep(count)
        sizes = recipe.batch_size, recipe.steps
        batches = balanced_batches(self._drawn_by, *sizes, recipe.seed)
        is_over = len(self.history) >= recipe.steps
        while not is_over:
            number = len(self.history)
            step = partial(self._step, number, batches[number])
            tokens = sum(len(self._ids[text]) for text in batches[number])
            self.history.append(step() if threads is None else threads.step(step, tokens))
            is_over = number + 1 == recipe.steps
            is_over |= processes().from_first(partial(_stops, on_step, self.history[-1]))
            if checkpoint is not None and (is_over or (number + 1) % CHECKPOINT_STEPS == 0):
                count = None if threads is None else threads.count
                checkpoint.keep(self._optimizer, self.history, count)

    @fast_products()
    def _step(self, number: int, batch: Sequence[int]) -> EncoderStep:
        recipe = self._recipe
        for group in self._optimizer.param_groups:
            group["lr"] = recipe.rate(number)
        ids = [self._ids[i] for i in processes().own(batch)]
        rows = max(1, self._max_tokens // max([1, *map(len, ids)]))
        self._optimizer.zero_grad()
        with steady_attention() if rows < len(ids) else nullcontext():
            # In evaluation mode: dropout gains nothing here, and would draw numbers.
            own = F.normalize(self._embedded(ids, rows), dim=-1)
            found = _of_all(own)
            weights = None if self._weights is None else self._weights[list(batch)]
            loss = contrastive_loss(found, self._targets[list(batch)], weights)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise DivergedError(number + 1, f"the loss is {value}")
            if loss.requires_grad:  # there may be more processes than texts
                loss.backward()  # type: ignore[no-untyped-call]
        processes().add_gradients(self._vectors.values())
        self._check_gradients(number + 1)
        self._update(number + 1)
        return EncoderStep(number + 1, recipe.steps, value)

    def _embedded(self, ids: Sequence[Sequence[int]], rows: int) -> Tensor:
        """In parts of so many texts, which the backward pass computes again."""
        if not ids:
            return torch.zeros(0, self._encoder.dimension, device=self._encoder.device)
        if rows >= len(ids):
            return embed(self._encoder, ids, model=self._model)

        def part(start: int) -> Tensor:
            return embed(self._encoder, ids[start : start + rows], model=self._model)

        starts = range(0, len(ids), rows)
        return torch.cat([computed_again(part, start, use_reentrant=False) for start in starts])

    def _check_gradients(self, step: int) -> None:
        gradients = {n: v.grad for n, v in self._vectors.items() if v.grad is not None}
        if math.isfinite(nn.utils.get_total_norm(gradients.values())):
            return
        broken = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
        self._optimizer.zero_grad()  # nothing of this step is left for another one
        what = f"the gradient of the vector of {broken[0]!r}" if broken else "the gradients' norm"
        raise DivergedError(step, f"{what} is not finite")

    def _update(self, step: int) -> None:
        """Take the optimizer's step, or take it back where a vector is not finite after it."""
        before = [vector.detach().clone() for vector in self._vectors.values()]
        self._optimizer.step()
        for name, vector in self._vectors.items():
            if not vector.isfinite().all():
                with torch.no_grad():
                    for each, value in zip(self._vectors.values(), before, strict=True):
                        each.copy_(value)
                raise DivergedError(step, f"the vector of {name!r} is not finite")


def _of_all(own: Tensor) -> Tensor:
    """The embeddings of the whole batch, in its order; only this process's take gradients."""
    job = processes()
    if job.count == 1:
        return own
    parts = [part.to(own.device) for part in job.gather(own.detach().cpu())]
    parts[job.rank] = own
    return torch.cat(parts)


def _stops(on_step: Callable[[EncoderStep], None] | None, step: EncoderStep) -> bool:
    """Whether `on_step` asks for the end of the training."""
    try:
        if on_step is not None:
            on_step(step)
    except StopTraining:
        return True
    return False
