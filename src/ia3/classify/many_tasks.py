"""Many tasks trained in the same batches, by the T-Few recipe.

Each task has its own vectors, and the rows of its examples are rescaled by them and no others. The
vectors of all tasks are one tensor a site, `[tasks, *shape]`, so that one operation is a step of
them all; what it does to one task's part is what the Trainer does to that task alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from accelerate.data_loader import SeedableRandomSampler  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.utils.data import BatchSampler
from transformers.optimization import Adafactor

from ..base.loading import BaseModel
from ..core.inventory import sites
from ..core.route import Route, entered
from ..core.sites import Site
from ..errors import IA3Error
from ..model.gather import is_within_experts
from ..model.ia3_model import IA3Model
from ..tfew.prompts.encoding import EncodedExample, TrainingExample
from ..tfew.scoring.choices import (
    MAX_TOKENS,
    example_batches,
    longest_sequence,
    longest_shared,
    token_scores,
)
from ..tfew.scoring.shared_prompt import (
    Packing,
    RowContext,
    encoder_decoder_scores,
    expanded_scores,
    packed_scores,
    packings,
)
from ..tfew.scoring.token_scores import TokenScores
from ..tfew.training.losses import Counts, token_loss
from ..tfew.training.trainer import (
    ADAFACTOR,
    DivergedError,
    TFewConfig,
    TrainingStep,
    count,
    linear_schedule,
    not_finite,
    random_state_kept,
    template_draws,
)

# Tokens that rows may be filled up with: about what reading the weights once more costs.
PADDING = 32


@dataclass(frozen=True)
class TaskToTrain:
    """One of many tasks.

    Attributes:
        examples: its training set.
        config: its recipe; `max_tokens` is not read.
        adapter: the model's adapter whose vectors it begins with, at whose sites.
    """

    examples: Sequence[TrainingExample]
    config: TFewConfig
    adapter: str


@dataclass(frozen=True)
class Ended:
    """A task that has ended.

    Attributes:
        vectors: module name -> vector, in memory of its own; none where the task failed.
        history: one `TrainingStep` a step.
        error: why the task failed.
    """

    vectors: dict[str, Tensor]
    history: list[TrainingStep]
    error: IA3Error | None = None


def train_many(
    base: BaseModel,
    ia3_model: IA3Model,
    tasks: Mapping[str, TaskToTrain],
    *,
    max_tokens: int = MAX_TOKENS,
    on_step: Callable[[str, TrainingStep], bool | None] | None = None,
    on_end: Callable[[str, Ended], None] | None = None,
) -> dict[str, Ended]:
    """Train the vectors of many tasks; the global random state is left as it was.

    Every task sees the batches and the prompts that `train` would give it alone, and its vectors
    end as they would alone but for rounding. A model with dropout drops other values. Where
    gradients are nothing but rounding, Adafactor makes steps of their signs, here as alone.

    Args:
        base: the model under `ia3_model`, with its tokenizer.
        ia3_model: carries the adapters to begin with; they stay as they are.
        tasks: by name.
        max_tokens: computed at once, of all tasks together and with padding.
        on_step: called after every step of every task. Where it returns true, the task ends.
        on_end: called for each task as soon as it ends.

    Returns:
        Of each task, in the order in which they ended. One whose loss or vectors are not finite has
        an `error`.

    Raises:
        IA3Error: a task has vectors within experts.
    """
    ended: dict[str, Ended] = {}
    if not tasks:
        return ended
    with random_state_kept():
        # Of dropout alone.
        torch.manual_seed(next(iter(tasks.values())).config.seed)
        stacks = _Stacks(ia3_model, list(tasks.values()))
        training = {name: _Training(task, k) for k, (name, task) in enumerate(tasks.items())}
        ia3_model.model.train()
        while training:
            batches = [task.next_batch() for task in training.values()]
            terms = _gradients(base, stacks, batches, max_tokens)
            failed = {k for k, (loss, *_) in enumerate(terms.tolist()) if not math.isfinite(loss)}
            stacks.step([task for task in training.values() if task.index not in failed])
            for name, task in list(training.items()):
                record = TrainingStep(task.done + 1, task.config.steps, *terms[task.index].tolist())
                error = None
                if task.index in failed:
                    error = DivergedError(record.step, f"the loss is {record.loss}")
                    over = True
                else:
                    task.history.append(record)
                    over = record.step == record.steps
                    over = bool(on_step is not None and on_step(name, record)) or over
                if not over:
                    continue
                del training[name]
                vectors = {} if error else stacks.vectors(task.index)
                error = error or not_finite(vectors, record.step)
                ended[name] = Ended({} if error else vectors, task.history, error)
                if on_end is not None:
                    on_end(name, ended[name])
    return ended


# -- a task's batches ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """One task's examples of one step.

    Attributes:
        task: the task's place among all.
        examples: with a template drawn for each.
        labels: the index of each right choice.
        counts: what the loss's terms are divided by.
        weights: of the loss's terms.
    """

    task: int
    examples: list[EncodedExample]
    labels: list[int]
    counts: Counts
    weights: Mapping[str, float]


class _Training:
    """A task that is being trained."""

    def __init__(self, task: TaskToTrain, index: int) -> None:
        self.config = task.config
        self.index = index
        self.history: list[TrainingStep] = []
        self._batches = batches(task.examples, task.config, index)
        # The schedule gives its factors by step, whatever the optimizer.
        nothing = torch.optim.SGD([torch.zeros(())], lr=1.0)
        schedule = linear_schedule(nothing, task.config.warmup_ratio, task.config.steps)
        self._factor = schedule.lr_lambdas[0]

    @property
    def done(self) -> int:
        """How many steps it has taken."""
        return len(self.history)

    def next_batch(self) -> Batch:
        return next(self._batches)

    def learning_rate(self, step: int) -> float:
        """Of a step, from 0."""
        return self.config.learning_rate * float(self._factor(step))


def batches(
    examples: Sequence[TrainingExample], config: TFewConfig, task: int = 0
) -> Iterator[Batch]:
    """The batches of a task, step by step, as the Trainer draws them for it alone."""
    # accelerate puts this sampler in the place of the Trainer's own.
    sampler = SeedableRandomSampler(examples, data_seed=config.seed)
    loader = BatchSampler(sampler, config.batch_size, drop_last=False)
    step = epoch = 0
    while True:
        sampler.set_epoch(epoch)
        for indices in loader:
            draws = template_draws(config, step)
            drawn = [draws.choice(examples[i].encoded) for i in indices]
            labels = [examples[i].label for i in indices]
            yield Batch(task, drawn, labels, count(drawn, labels), config.weights)
            step += 1
        epoch += 1


# -- a step's passes -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """Examples of one batch that stay together: those in one row, or one with all its choices.

    Attributes:
        batch: that they are of.
        members: their indices in it.
        rows: how many rows they take.
        length: of a row.
        packing: of the one row; none where each choice has a row of its own.
    """

    batch: Batch
    members: tuple[int, ...]
    rows: int
    length: int
    packing: Packing | None


def _gradients(
    base: BaseModel, stacks: _Stacks, round_: Sequence[Batch], max_tokens: int
) -> Tensor:
    """Add the gradients of one step of all tasks to the stacks'.

    Returns:
        `[tasks, 4]`, float32, on the CPU: the loss and its terms of each task; zeros of those that
        have no batch.
    """
    pieces = [piece for batch in round_ for piece in _pieces(base, batch, max_tokens)]
    terms = torch.zeros(stacks.tasks, 4)
    for of_pass in _passes(pieces, max_tokens):
        examples = [piece.batch.examples[i] for piece in of_pass for i in piece.members]
        owners = [piece.batch.task for piece in of_pass for _ in piece.members]
        scores = _scores(base, of_pass, examples, stacks.rows_of(owners), max_tokens)
        tasks, losses = _losses(scores, of_pass)
        seen = losses.detach().cpu()
        terms[tasks] += seen
        # One that is not finite ends its task, which needs no gradients any more.
        finite = torch.isfinite(seen[:, 0])
        if finite.any():
            torch.autograd.backward(losses[finite.to(losses.device), 0].sum())
    return terms


def _losses(scores: TokenScores, of_pass: Sequence[_Piece]) -> tuple[list[int], Tensor]:
    """The tasks of a pass, and the loss and its terms of each, `[tasks, 4]`, float32."""
    batches: dict[int, Batch] = {}
    places: dict[int, list[int]] = {}
    labels: dict[int, list[int]] = {}
    place = 0
    for piece in of_pass:
        task = piece.batch.task
        batches[task] = piece.batch
        for i in piece.members:
            places.setdefault(task, []).append(place)
            labels.setdefault(task, []).append(piece.batch.labels[i])
            place += 1
    losses = []
    for task, batch in batches.items():
        rows = torch.tensor(places[task], device=scores.mask.device)
        loss = token_loss(
            TokenScores(scores.log_probs[rows], scores.mask[rows]),
            torch.tensor(labels[task], device=scores.mask.device),
            counts=batch.counts,
            **batch.weights,
        )
        losses.append(torch.stack([loss.total, loss.lm, loss.length_norm, loss.unlikelihood]))
    return list(batches), torch.stack(losses).float()


def _pieces(base: BaseModel, batch: Batch, max_tokens: int) -> Iterator[_Piece]:
    """A batch in the rows that it would have alone."""
    limit = longest_shared(base)
    for part in example_batches(base, batch.examples, max_tokens):
        together = []
        for i in part:
            example = batch.examples[i]
            length = longest_sequence(example)
            if length > limit:
                yield _Piece(batch, (i,), len(example.choices), length, None)
            else:
                together.append(i)
        for packing in packings([batch.examples[i] for i in together]) if together else ():
            members = tuple(together[i] for i in packing.members)
            yield _Piece(batch, members, 1, packing.length, packing)


def _passes(pieces: Sequence[_Piece], max_tokens: int) -> Iterator[list[_Piece]]:
    """The pieces that are computed at once, of like lengths.

    A row is filled up with no more than `PADDING` tokens, or a quarter of the longest: beyond that
    a pass of its own costs less. So does a piece of more tokens than `max_tokens`.
    """
    kinds: dict[bool, list[_Piece]] = {}
    for piece in pieces:
        kinds.setdefault(piece.packing is None, []).append(piece)
    for of_kind in kinds.values():
        of_pass: list[_Piece] = []
        rows = 0
        for piece in sorted(of_kind, key=lambda piece: -piece.length):
            longest = of_pass[0].length if of_pass else piece.length
            padded = longest - piece.length > max(PADDING, longest // 4)
            if of_pass and (padded or (rows + piece.rows) * longest > max_tokens):
                yield of_pass
                of_pass, rows = [], 0
            of_pass.append(piece)
            rows += piece.rows
        if of_pass:
            yield of_pass


def _scores(
    base: BaseModel,
    of_pass: Sequence[_Piece],
    examples: Sequence[EncodedExample],
    within: RowContext,
    max_tokens: int,
) -> TokenScores:
    if len(of_pass) == 1 and of_pass[0].rows * of_pass[0].length > max_tokens:
        return token_scores(base, examples, max_tokens=max_tokens, within=within)
    if of_pass[0].packing is not None:
        packed = []
        start = 0
        for piece in of_pass:
            assert piece.packing is not None
            members = tuple(range(start, start + len(piece.members)))
            packed.append(Packing(piece.packing.prefix, members, piece.length))
            start += len(members)
        return packed_scores(base, examples, packed, within=within)
    if base.is_encoder_decoder:
        return encoder_decoder_scores(base, examples, within=within)
    return expanded_scores(base, examples, within=within)


# -- the vectors -----------------------------------------------------------------------------------


class _Stacks:
    """The vectors of all tasks, a tensor `[tasks, *shape]` for each site, and their optimizer.

    Values that stay one, those of frozen ranges and of sites that a task has not, get no gradient,
    so that Adafactor does not move them.
    """

    def __init__(self, ia3_model: IA3Model, tasks: Sequence[TaskToTrain]) -> None:
        check_not_within_experts(ia3_model.model)
        self.tasks = len(tasks)
        self._host = ia3_model
        self._names: dict[Site, str] = {}
        self._stacks: dict[Site, nn.Parameter] = {}
        self._fixed: dict[Site, Tensor] = {}
        self._having: dict[Site, list[bool]] = {}
        for name, _, site in sites(ia3_model.model):
            self._names[site] = name
            having = [task.adapter in site for task in tasks]
            if not any(having):
                continue
            one = torch.ones_like(next(iter(site.vectors.values())))
            stack = torch.stack(
                [
                    site.vector(task.adapter).detach() if has else one
                    for task, has in zip(tasks, having, strict=True)
                ]
            )
            fixed = torch.stack(
                [
                    site.is_frozen(task.adapter) if has else torch.ones_like(one, dtype=torch.bool)
                    for task, has in zip(tasks, having, strict=True)
                ]
            )
            self._stacks[site] = nn.Parameter(stack)
            self._having[site] = having
            if fixed.any():
                self._fixed[site] = fixed
        self._optimizer = _EachAlone(list(self._stacks.values()), lr=0.0, **ADAFACTOR)

    def rows_of(self, owners: Sequence[int]) -> RowContext:
        """Routes the rows of a pass whose examples are these tasks'."""

        def within(of_row: Sequence[int]) -> AbstractContextManager[object]:
            index = torch.tensor([owners[i] for i in of_row])
            return entered(Route(self._host, self._names, self._stacks.get, index))

        return within

    def step(self, training: Sequence[_Training]) -> None:
        """Step these tasks' vectors, and forget all gradients."""
        rates, norms = torch.zeros(self.tasks), torch.full((self.tasks,), math.inf)
        for task in training:
            rates[task.index] = task.learning_rate(task.done)
            norms[task.index] = task.config.max_grad_norm or math.inf
        moved = [stack for stack in self._stacks.values() if stack.grad is not None]
        for site, fixed in self._fixed.items():
            gradient = self._stacks[site].grad
            if gradient is not None:
                gradient.masked_fill_(fixed, 0.0)
        if moved:
            _clip(moved, norms)
            for group in self._optimizer.param_groups:
                group["lr"] = rates
            self._optimizer.step()
        self._optimizer.zero_grad()

    def vectors(self, task: int) -> dict[str, Tensor]:
        """One task's vectors, by the names of their modules."""
        return {
            self._names[site]: stack[task].detach().clone()
            for site, stack in self._stacks.items()
            if self._having[site][task]
        }


def check_not_within_experts(model: nn.Module) -> None:
    """Raise `IA3Error` where a model has vectors that rows cannot have of their own."""
    for name, _, site in sites(model):
        if is_within_experts(name, site.side):
            raise IA3Error(
                f"{name!r} has vectors within experts, whose activations are not in the order of "
                "the batch's rows: such tasks cannot be mixed, fit them one after the other"
            )


def _clip(stacks: Sequence[nn.Parameter], norms: Tensor) -> None:
    """Scale each task's gradients down to its greatest norm, as `clip_grad_norm_` does for one.

    Args:
        stacks: with gradients, `[tasks, *shape]`.
        norms: `[tasks]`, on the CPU.
    """
    gradients = [stack.grad for stack in stacks if stack.grad is not None]
    here = gradients[0].device
    each = torch.stack([g.flatten(1).norm(dim=1).to(here) for g in gradients])
    scale = (norms.to(here) / (each.norm(dim=0) + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(_along(scale, gradient))


def _along(of_task: Tensor, stack: Tensor) -> Tensor:
    """`[tasks]` so that it multiplies `[tasks, *shape]`."""
    return of_task.to(stack.device).reshape(-1, *[1] * (stack.dim() - 1))


class _EachAlone(Adafactor):  # type: ignore[misc]
    """transformers' Adafactor for stacks `[tasks, *shape]`, a step of each task being its own.

    It computes by value, by row or by column but for two means over a whole parameter, which here
    are means over each task's part. Its rate, `lr`, is a tensor `[tasks]`.
    """

    @staticmethod
    def _rms(tensor: Tensor) -> Tensor:
        flat = tensor.flatten(1)
        return _along(flat.norm(dim=1) / flat.shape[1] ** 0.5, tensor)

    @staticmethod
    def _get_lr(param_group: dict[str, object], param_state: dict[str, Tensor]) -> Tensor:
        size = param_state["RMS"].clamp(min=param_group["eps"][1])  # type: ignore[index]
        return size * _along(param_group["lr"], size)  # type: ignore[arg-type]
