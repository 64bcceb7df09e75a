"""The processes of one job, as `torchrun` or `accelerate launch` start them.

No other file asks torch.distributed for a group, and this one imports torch only where there are
several processes.

What all of them have to call, they all call in the same order. Where one has ended, the others get
a `StateError` at their next call, as its connections are closed; one that does not answer is waited
for as long as torch does, half an hour by default.
"""

from __future__ import annotations

import atexit
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import IA3Error, StateError

if TYPE_CHECKING:
    from torch import Tensor

_T = TypeVar("_T")

# The process that has made the group here; empty where another program did.
_made_group: list[int] = []
_alone: ContextVar[bool] = ContextVar("alone", default=False)
# What launchers tell a process of the others, and what accelerate would ask for instead.
_TOLD = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    *("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
    *("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"),
)
# The process that belongs to the job: a child of it inherits what it was told, and is none of them.
_MEMBER = "IA3_PROCESS_OF_JOB"
# How long the others are waited for where each has work of its own.
PATIENCE = timedelta(days=1)


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
        sent = [made[0], _to_send(made[1])]
        with others_named():
            distributed.broadcast_object_list(sent)
        if not self.is_first:
            made = sent
        if made[1] is not None:
            raise made[1]
        return made[0]  # type: ignore[no-any-return]

    def gather(self, value: _T) -> list[_T]:
        """Each process's value, by rank, on all of them."""
        return [value] if self.count == 1 else _gathered(value, self.count, None)

    def patient_gather(self) -> Callable[[_T], list[_T]]:
        """What is `gather` after work that takes one process hours longer than another.

        All call this before that work, and what it returns after it.
        """
        if self.count == 1:
            return self.gather
        from torch import distributed

        with others_named():
            group = distributed.new_group(timeout=PATIENCE)
        return lambda value: _gathered(value, self.count, group)

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Put the sum over all processes into each tensor: on all of them the same, to the bit.

        It is made on the CPU, for values of any device: what is trained is small.
        """
        if self.count == 1:
            return
        import torch
        from torch import distributed

        tensors = [tensor.detach() for tensor in tensors]
        # A group that another program made may be one of GPUs alone.
        on_cpu = "cpu" in distributed.get_backend_config()
        device = torch.device("cpu") if on_cpu else tensors[0].device
        flat = torch.cat([tensor.flatten().to(device) for tensor in tensors])
        with others_named():
            distributed.all_reduce(flat)
        parts = torch.split_with_sizes(flat, [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def add_gradients(self, values: Iterable[Tensor], *more: Tensor) -> None:
        """Sum up the gradients of what is trained, none as zeros, and more tensors, as `add`."""
        if self.count == 1:
            return
        import torch

        values = list(values)
        for value in values:
            if value.grad is None:
                value.grad = torch.zeros_like(value)
        self.add([*(value.grad for value in values if value.grad is not None), *more])

    def check_same(self, values: Mapping[str, Any]) -> None:
        """Raise `IA3Error` on all processes where one has other values than the first."""
        first, *others = self.gather(values)
        for rank, of_other in enumerate(others, 1):
            names = ", ".join(dict.fromkeys(_differing(first, of_other)))
            if names:
                raise IA3Error(
                    f"the processes of this job were given different things: {names} of process "
                    f"{rank} are not those of process 0; give each the same data, in the same "
                    "order, the same model and settings"
                )


def _gathered(value: _T, count: int, group: Any) -> list[_T]:
    from torch import distributed

    values: list[Any] = [None] * count
    with others_named():
        distributed.all_gather_object(values, value, group)
    return values


def processes() -> Processes:
    """The processes of this job; those that a launcher started are made a group at the first call.

    One alone where there is no launcher, within `alone()`, and in a child of one of them.
    """
    if _alone.get() or not _is_member() or not (is_launched() or _has_group()):
        return Processes()
    from torch import distributed

    os.environ.setdefault(_MEMBER, str(os.getpid()))
    if not _has_group():
        _take_one_gpu()
        with others_named():
            distributed.init_process_group(_backend())
        _made_group.append(os.getpid())
        atexit.register(_leave_group)
        # One that fails at once would leave others that have not joined yet without a group, in
        # which they would know that it has said why.
        _all().gather(None)
    return _all()


def _all() -> Processes:
    from torch import distributed

    return Processes(distributed.get_rank(), distributed.get_world_size())


def is_launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ and _is_member()


def _is_member() -> bool:
    own = str(os.getpid())
    return os.environ.get(_MEMBER, own) == own


def on_this_machine() -> int:
    """How many processes of the job share this machine."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@contextmanager
def alone() -> Iterator[None]:
    """Within the context this process works by itself, whatever the others do."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


@contextmanager
def unlaunched() -> Iterator[None]:
    """Within the context nothing that is started or imported hears of the other processes.

    A group that there is already stays.
    """
    told = {name: os.environ.pop(name) for name in _TOLD if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(told)


def fails_first() -> bool:
    """Whether no process of the job has failed before this one: it is to say why it does.

    The others then end because this one is gone. Asked once, when the process is about to end.
    """
    if not _has_group():  # they fail alike: the first of each machine says it
        return os.environ.get("LOCAL_RANK", "0") == "0"
    from torch.distributed import distributed_c10d

    try:
        return distributed_c10d._get_default_store().add("ia3: failed", 1) == 1
    except RuntimeError:  # the process that kept the store is gone
        return True


@contextmanager
def others_named() -> Iterator[None]:
    """Within the context, an error of the connection to other processes says what it means.

    Also within a pass of a model that is spread over them.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_of_connection(error):
            raise
        # What is kept has no place in the source before it, and no advice behind it.
        said = re.sub(r"^\[\S+\] ", "", (str(error).splitlines() or [""])[0]).partition(". ")[0]
        raise StateError(
            f"another process of this job has ended or does not answer ({said}): if it said why, "
            "that stands above; a job with checkpoints goes on from the last one when it is "
            "started again"
        ) from error


def _is_of_connection(error: RuntimeError) -> bool:
    if isinstance(error, IA3Error):
        return False
    from torch import distributed

    # Gloo has no kind of error of its own, but names its files.
    return isinstance(error, distributed.DistError) or "gloo" in str(error).lower()


def _take_one_gpu() -> None:
    """Let this process of a job see one of its machine's GPUs, unless it has used one already.

    Where there are fewer of them than processes, some share one. Not where a model is loaded is
    this done: a script may give it to a Trainer, which counts on seeing all.
    """
    import torch

    is_late = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if is_late or torch.cuda.device_count() <= 1:
        return
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = [name for name in seen if name] or list(map(str, range(torch.cuda.device_count())))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    os.environ["CUDA_VISIBLE_DEVICES"] = names[local % len(names)]


def end_process(code: object) -> None:
    """End this process at once, with the exit code, if it is one of a group made here; else return.

    Threads of torch.distributed that are left abort the interpreter, now and then, as it ends: a
    job that has done all would have failed.
    """
    if os.getpid() not in _made_group or not (code is None or isinstance(code, int)):
        return
    _leave_group()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code or 0)


def _backend() -> str:
    """What connects the processes; torch by itself would connect GPUs alone where there are any."""
    import torch
    from torch import distributed

    has_gpus = torch.cuda.is_available() and distributed.is_nccl_available()
    return "cpu:gloo,cuda:nccl" if has_gpus else "gloo"


def _has_group() -> bool:
    # Without torch there is none, and commands that need no torch ask too.
    distributed: Any = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _leave_group() -> None:
    from torch import distributed

    if _has_group() and _is_member():
        distributed.destroy_process_group()


def _to_send(error: Exception | None) -> Exception | None:
    """The error, or one that says the same, where pickle does not bring it back."""
    try:
        return pickle.loads(pickle.dumps(error))  # type: ignore[no-any-return]
    except Exception:
        return IA3Error(f"{type(error).__name__}: {error}")


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[str]:
    """The names under which two mappings, which may hold others, have different values."""
    for name in {**one, **other}:
        here, there = one.get(name), other.get(name)
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            yield from _differing(here, there)
        elif here != there:
            yield name
