"""The running batch of a language model: rows with any adapters, a token each at every step.

A row joins with its adapter's values copied, computes its prompt in parts beside the others' steps,
and leaves with its last token.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from ...base.loading import BaseModel
from ...core.sites import Site
from ...errors import StateError, UnknownNameError
from .bases import ServedBase
from .cached_rows import CachedRows, tried_out
from .interface import Generation, no_adapter
from .limits import check_fits, end_tokens, further_options, most_tokens, repetition_penalty
from .rows import Row, RowText
from .sampling import Picked, pick
from .text import TokenTexts

MOST_ROWS = 64
# Of prompts that are computed before the running rows' next token.
PROMPT_TOKENS = 128
# Of keys and values; on a GPU, half of what is free.
MOST_BYTES = 4 * 2**30


class RunningBatch:
    """The generations of a language model that are being computed."""

    def __init__(self, served: ServedBase) -> None:
        assert isinstance(served.base, BaseModel)
        self.served = served
        self.base: BaseModel = served.base
        # Those that go on token by token, and behind them those whose prompts are computed.
        self.rows: list[Row] = []
        self._going = 0
        self._cached = CachedRows(self.base)
        # Of keys and values, in bytes; 0 where rows run one after the other. `None`: not known yet.
        self._token: int | None = None
        self._ends = end_tokens(self.base)
        self._values: dict[Site, Tensor] | None = None
        self._texts = TokenTexts(self.base.tokenizer)
        penalty = repetition_penalty(self.base)
        self._penalty: Any = None if penalty == 1 else RepetitionPenaltyLogitsProcessor(penalty)

    def has_room(self, asked: Generation) -> bool:
        """Whether a row may join now; there is always room for one."""
        if not self.rows:
            return True
        longest = max(self._longest(asked), *(self._longest(row.asked) for row in self.rows))
        count = len(self.rows) + 1
        if not self._token or count > MOST_ROWS:
            return False
        return count * longest * self._token <= _memory(self.base.device)

    def join(self, row: Row) -> None:
        """Have a row run.

        Raises:
            UnknownNameError: there is no adapter of its name.
            StateError: the adapter cannot be loaded.
            IA3Error: the prompt leaves no room in the model's context, or has tokens that the model
                has no embedding of.
        """
        if self._token is None:
            with self.base.lock:
                self._token = 0 if further_options(self.base) else tried_out(self._cached)
        asked = row.asked
        row.most = check_fits(self.served, asked)
        if asked.adapter is not None:
            try:
                row.values = self.served.bank.gather([asked.adapter], [0])
            except UnknownNameError as error:
                raise no_adapter(asked.adapter) from error
        row.text = RowText(self.base.tokenizer, self._texts, asked)
        self.rows.append(row)

    def step(self) -> list[tuple[Row, Exception]]:
        """One token more for each row, and a part of the prompts; those that failed, with why."""
        failed: list[tuple[Row, Exception]] = []
        self._drop([row for row in self.rows if row.is_cancelled()])
        with self.base.lock:
            if not self._token:
                failed += self._run_alone()
            else:
                failed += self._compute_prompts()
                failed += self._go_on()
        return failed

    def forget(self) -> None:
        """Have no rows any more. Nothing is computed: the device may be what has failed."""
        for place in range(len(self.rows)):
            self._cached.leave(place)
        self.rows, self._going, self._values = [], 0, None

    def _longest(self, asked: Generation) -> int:
        return len(asked.prompt) + most_tokens(self.base, asked)

    # -- rows together -----------------------------------------------------------------------------

    def _compute_prompts(self) -> list[tuple[Row, Exception]]:
        """A part of the prompts, in the order in which they came."""
        failed, budget = [], PROMPT_TOKENS
        while group := self._next_prompts(budget):
            tokens = [row.new[:budget] for row in group]
            budget -= len(group) * max(map(len, tokens))
            failed += self._compute(self._going, group, tokens, _values(group))
        return failed

    def _next_prompts(self, budget: int) -> list[Row]:
        """The first prompts that are computed in one pass: whole ones, or a part of a long one."""
        group: list[Row] = []
        longest = 0
        for row in self.rows[self._going :]:
            longest = max(longest, len(row.new))
            fits = longest * (len(group) + 1) <= budget
            is_long = len(row.new) > PROMPT_TOKENS == budget
            if not fits and not (is_long and not group):
                break
            group.append(row)
            # A long one stands first for several steps, at the place that its tokens are at.
            if is_long or row.cached:
                break
        return group

    def _go_on(self) -> list[tuple[Row, Exception]]:
        """One token more of each row whose prompt was computed."""
        if not self._going:
            return []
        rows = self.rows[: self._going]
        if self._values is None:
            self._values = _values(rows)
        return self._compute(0, rows, [row.new for row in rows], self._values)

    def _compute(
        self,
        first: int,
        rows: Sequence[Row],
        tokens: Sequence[Sequence[int]],
        values: dict[Site, Tensor],
    ) -> list[tuple[Row, Exception]]:
        failed: list[tuple[Row, Exception]] = []
        try:
            with self._routed(values):
                scores = self._cached.next_scores(first, tokens, [row.cached for row in rows])
            whole_prompts = []
            for row, new in zip(rows, tokens, strict=True):
                row.cached += len(new)
                whole_prompts.append(row.cached == len(row.ids))
            places = [place for place, done in enumerate(whole_prompts) if done]
            ended = [rows[place] for place in places]
            picked = self._picked(scores[places], ended) if places else []
        except Exception as error:
            # Of one pass nothing can be said of one row.
            self._drop(rows)
            return [(row, error) for row in rows]
        if first == self._going:
            self._going += len(ended)
            self._values = None
        for row, token in zip(ended, picked, strict=True):
            try:
                if isinstance(token, StateError):
                    raise token
                row.take(token, self._ends)
            except Exception as error:
                failed.append((row, error))
        self._drop([row for row in ended if row.finished] + [row for row, _ in failed])
        return failed

    def _picked(self, scores: Tensor, rows: Sequence[Row]) -> list[Picked | StateError]:
        """The next token of each row, by the model's logits and its generation config."""
        if self._penalty is not None:
            ids = [torch.tensor([row.ids], device=scores.device) for row in rows]
            pairs = zip(ids, scores[:, None], strict=True)
            scores = torch.cat([self._penalty(of_row, each) for of_row, each in pairs])
        return pick(scores, [row.sampler for row in rows])

    def _routed(self, values: dict[Site, Tensor]) -> AbstractContextManager[Any]:
        return self.served.bank.model.routes.entered_with(values) if values else nullcontext()

    def _drop(self, rows: Sequence[Row]) -> None:
        """Have rows leave; the last of those that go on stands in the place of one of them."""
        for row in rows:
            place = self.rows.index(row)
            if place < self._going:
                self._going -= 1
                self._values = None
                self._cached.move(self._going, place)
                self.rows[place] = self.rows[self._going]
                place = self._going
            # Of the prompts, only the first one may be in the cache, by a part.
            if place + 1 < len(self.rows):
                self._cached.move(place + 1, place)
            else:
                self._cached.leave(place)
            del self.rows[place]

    # -- rows one after the other ------------------------------------------------------------------

    def _run_alone(self) -> list[tuple[Row, Exception]]:
        """The whole of the first row, by the model's own `generate`."""
        if not self.rows:
            return []
        row = self.rows.pop(0)
        try:
            self._generate(row)
            if not (row.finished or row.is_cancelled()):
                raise StateError("the model's generation config ended the text: it has a limit")
        except Exception as error:
            return [(row, error)]
        return []

    def _generate(self, row: Row) -> None:
        ids = torch.tensor([row.ids], device=self.base.device)

        def choose(_: Tensor, scores: Tensor) -> Tensor:
            token = pick(scores.float(), [row.sampler])[0]
            if isinstance(token, StateError):
                raise token
            row.take(token, self._ends)
            return torch.full_like(scores, -torch.inf).index_fill_(
                1, torch.tensor([token.token], device=scores.device), 0.0
            )

        def is_over(ids: Tensor, *_: Any, **__: Any) -> Tensor:
            over = row.finished or row.is_cancelled()
            return torch.full((len(ids),), over, device=ids.device)

        model: Any = self.served.base.model
        with torch.no_grad(), self._routed(row.values):
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=row.most,
                do_sample=False,
                num_beams=1,
                num_return_sequences=1,
                disable_compile=True,
                logits_processor=[choose],
                stopping_criteria=[is_over],
            )


def _values(rows: Sequence[Row]) -> dict[Site, Tensor]:
    """Site -> `[rows, dim]`, ones where a row has none, of the sites that one of them has."""
    found: dict[Site, Tensor] = {}
    for row in rows:
        for site, value in row.values.items():
            if site not in found:
                ones = torch.ones_like(value)
                found[site] = torch.cat([each.values.get(site, ones) for each in rows])
    return found


def _memory(device: torch.device) -> int:
    if device.type != "cuda":
        return MOST_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return free // 2
