"""A model that two processes of vLLM compute together."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("vllm", reason="make test-vllm runs this in an environment with vLLM")

from support.paths import REPOSITORY
from support.vllm_engine import greedy, prompts, write_base, write_ia3, write_lora

pytestmark = pytest.mark.vllm

# vLLM starts the processes from a program's main module, which it imports again.
PROGRAM = """
import json, sys
from pathlib import Path
from support.vllm_engine import engine

if __name__ == "__main__":
    base, adapters, prompts = json.loads(sys.argv[1])
    options = {"max_loras": 4, "tensor_parallel_size": 2}
    with engine(Path(base), **options) as running:
        adapters = [adapter and Path(adapter) for adapter in adapters]
        print("tokens", json.dumps(running.greedy(adapters, prompts)))
"""


def test_each_process_has_its_part_of_the_vectors(tmp_path):
    base = write_base("qwen2", tmp_path / "base")
    outputs = {"target_modules": "all-linear", "feedforward_modules": []}
    adapters = [
        None,
        write_ia3(base, tmp_path / "paper", 1),
        write_lora(base, tmp_path / "lora", 1),
        write_ia3(base, tmp_path / "outputs", 2, **outputs),
    ]
    batch = prompts(len(adapters))
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    given = json.dumps([str(base), [adapter and str(adapter) for adapter in adapters], batch])
    done = subprocess.run(
        [sys.executable, str(program), given],
        env={
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "PYTHONPATH": os.pathsep.join(map(str, (REPOSITORY / "src", REPOSITORY / "tests"))),
        },
        capture_output=True,
        text=True,
    )
    tokens = [line for line in done.stdout.splitlines() if line.startswith("tokens ")]
    assert tokens, done.stdout + done.stderr
    expected = [greedy(base, a, prompt) for a, prompt in zip(adapters, batch, strict=True)]
    assert json.loads(tokens[0].removeprefix("tokens ")) == expected
