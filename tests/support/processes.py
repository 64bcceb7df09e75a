"""Work done by several processes of one group, as a launcher starts them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed, multiprocessing


def in_processes(work: Callable[[Path], None], folder: Path, count: int = 2) -> None:
    """Call a module's function in `count` processes on the CPU; what one raises is raised here."""
    multiprocessing.spawn(_run, (count, folder, work), nprocs=count)


def _run(rank: int, count: int, folder: Path, work: Callable[[Path], None]) -> None:
    torch.set_num_threads(1)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    store = f"file://{folder / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=count)
    try:
        work(folder)
    finally:
        distributed.destroy_process_group()
    # Threads that are left would end with the interpreter, which aborts the process now and then.
    os._exit(0)
