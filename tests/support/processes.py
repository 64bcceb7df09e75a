"""Work done by several processes of one group, as a launcher starts them."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

from support.tfew import child_environment


def in_processes(work: Callable[[Path], None], folder: Path, count: int = 2) -> None:
    """Call a module's function in `count` processes on the CPU; what one raises is raised here."""
    multiprocessing.spawn(_run, (count, folder, work), nprocs=count)


def _run(rank: int, count: int, folder: Path, work: Callable[[Path], None]) -> None:
    _join(rank, count, folder)
    try:
        work(folder)
    finally:
        distributed.destroy_process_group()
    # Threads that are left would end with the interpreter, which aborts the process now and then.
    os._exit(0)


def _join(rank: int, count: int, folder: Path) -> None:
    torch.set_num_threads(1)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    store = f"file://{folder / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=count)


def in_forks(work: Callable[[], Any], folder: Path, count: int = 2) -> list[Any]:
    """What `work` returns in each of `count` forked processes of one group, or raises there.

    They have everything loaded, so that they begin at once. One that is killed has its signal.
    """
    folder.mkdir(exist_ok=True)
    (folder / "store").unlink(missing_ok=True)
    sys.stdout.flush()
    children = [_forked(work, folder, rank, count) for rank in range(count)]
    results: list[Any] = []
    for rank, child in enumerate(children):
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said = folder / f"{rank}.pickle"
        results.append(pickle.loads(said.read_bytes()) if code == 0 else code)
        said.unlink(missing_ok=True)
    return results


def _forked(work: Callable[[], Any], folder: Path, rank: int, count: int) -> int:
    child = os.fork()
    if child:
        return child
    try:
        _join(rank, count, folder)
        try:
            result = work()
        except Exception as error:
            error.add_note(traceback.format_exc())
            result = error
        (folder / f"{rank}.pickle").write_bytes(pickle.dumps(result))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    finally:
        os._exit(0)


def results_of(work: Callable[[], Any], folder: Path, count: int = 2) -> list[Any]:
    """What `work` returns in each forked process; an error of one is raised."""
    results = in_forks(work, folder, count)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node"],
    "accelerate": [
        *("accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_machines=1"),
        "--num_processes",
    ],
    "fsdp": [
        *("accelerate.commands.accelerate_cli", "launch", "--use_fsdp", "--fsdp_version", "2"),
        *("--num_machines=1", "--num_processes"),
    ],
}


def launched(
    *command: object,
    folder: Path,
    count: int = 2,
    launcher: str = "torchrun",
    script: Path | None = None,
) -> subprocess.Popen[str]:
    """The `ia3` command, or a script in its place, as a launcher starts it in `count` processes."""
    module = ["-m", "ia3"] if launcher == "torchrun" else ["--module", "ia3"]
    program = module if script is None else [str(script)]
    return subprocess.Popen(
        [sys.executable, "-m", *LAUNCHERS[launcher], str(count), *program, *map(str, command)],
        env={**child_environment(), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def children_of(process: int) -> list[int]:
    """The ids of a process's children, in the order in which they were started."""
    found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return sorted(map(int, found))
