"""The processes of one job, as `torchrun` or `accelerate launch` start them.

No other file asks torch.distributed for a group, and this one imports it only where there are
several processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")

_alone: ContextVar[bool] = ContextVar("alone", default=False)


@dataclass(frozen=True)
class Processes:
    """This process among those of its job.

    Attributes:
        rank: counted from 0.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether it is the one that chooses, prints and writes files."""
        return self.rank == 0

    def own(self, items: Sequence[_T]) -> Sequence[_T]:
        """This process's part of what all of them have: contiguous, at most one item more."""
        ends = [len(items) * rank // self.count for rank in (self.rank, self.rank + 1)]
        return items[slice(*ends)]

    def from_first(self, make: Callable[[], _T]) -> _T:
        """What the first process makes; where that raises, it is raised on all."""
        if self.count == 1:
            return make()
        from torch import distributed

        made: list[Any] = [None, None]
        if self.is_first:
            try:
                made[0] = make()
            except Exception as error:
                made[1] = error
        distributed.broadcast_object_list(made)
        if made[1] is not None:
            raise made[1]
        return made[0]  # type: ignore[no-any-return]

    def gather(self, value: _T) -> list[_T]:
        """Each process's value, by rank, on all of them."""
        if self.count == 1:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value)
        return values

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Put the sum over all processes into each tensor."""
        if self.count == 1:
            return
        from torch import distributed

        tensors = list(tensors)
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
        distributed.all_reduce(flat)
        sizes = [tensor.numel() for tensor in tensors]
        for tensor, part in zip(tensors, flat.split(sizes), strict=True):
            tensor.detach().copy_(part.view_as(tensor))


def processes() -> Processes:
    """The processes of this job; those that a launcher started are made a group at the first call.

    One alone where there is no launcher, and within `alone()`.
    """
    if _alone.get():
        return Processes()
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
    if not launched:
        return Processes()
    from torch import distributed

    if not distributed.is_initialized():
        distributed.init_process_group()
    return Processes(distributed.get_rank(), distributed.get_world_size())


@contextmanager
def alone() -> Iterator[None]:
    """Within the context this process works by itself, whatever the others do."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)
