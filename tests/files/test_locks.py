"""Locks are those of living processes, also of ones that fork."""

import os
import signal
from pathlib import Path

from support.kills import started

from ia3.files.locks import locked


def test_a_lock_is_had_once_and_let_go(tmp_path: Path) -> None:
    with locked(tmp_path) as first, locked(tmp_path, wait=False) as second:
        assert (first, second) == (True, False)
    with locked(tmp_path, wait=False) as third:
        assert third


def test_a_forked_process_that_outlives_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    """As a data loader's worker does, or a pool's."""
    reading, writing = os.pipe()

    def hold() -> None:
        with locked(tmp_path):
            child = os.fork()
            if not child:
                signal.pause()
                os._exit(0)
            os.write(writing, b"%d" % child)
            signal.pause()

    holder = started(hold)
    child = int(os.read(reading, 20))
    try:
        with locked(tmp_path, wait=False) as is_held:
            assert not is_held
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        with locked(tmp_path, wait=False) as is_held:
            assert is_held
    finally:
        os.kill(child, signal.SIGKILL)
        os.close(reading)
        os.close(writing)


def test_a_forked_process_that_leaves_the_context_unlocks_nothing(tmp_path: Path) -> None:
    with locked(tmp_path) as is_held:
        assert is_held
        with locked(tmp_path, wait=False) as again:
            assert again is False
        child = os.fork()
        if child:
            assert os.waitpid(child, 0)[1] == 0
            with locked(tmp_path, wait=False) as again:
                assert again is False
    if not child:
        os._exit(0)
