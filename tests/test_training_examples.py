"""The examples of training with TRL, as somebody would run them, one of them in two processes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import REPOSITORY
from support.tfew import child_environment
from support.trainers import ADAPTER_FILES, files

pytestmark = [pytest.mark.slow, pytest.mark.datasets]

IN_TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def printed(folder: Path, *command: str) -> str:
    pytest.importorskip("trl", reason="trl is not installed")
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def number_after(begin: str, said: str) -> float:
    (number,) = re.findall(re.escape(begin) + r" (-?\d+\.\d+)", said)  # one process prints
    return float(number)


def test_sft_learns_the_log(tmp_path: Path) -> None:
    said = printed(tmp_path, str(REPOSITORY / "examples" / "sft.py"))
    before, after = number_after("held out:", said), number_after("then", said)
    assert after < 0.7 * before
    assert files(tmp_path / "log-adapter") >= ADAPTER_FILES
    assert not list(tmp_path.rglob("model.safetensors"))


def test_dpo_learns_to_answer_shortly_in_two_processes(tmp_path: Path) -> None:
    said = printed(tmp_path, *IN_TWO, str(REPOSITORY / "examples" / "dpo.py"))
    assert number_after("right order:", said) > 0.8
    assert number_after("loss on them:", said) < 0.5
    weights = {path.name for path in tmp_path.rglob("*.safetensors")}
    assert weights == {"adapter_model.safetensors"}
    assert not list(tmp_path.rglob("ref"))
