"""A whole model in a graph that vLLM makes once, as it does on GPUs.

On CPUs vLLM compiles nothing where it serves adapters: it is made to here. Its own LoRA for CPUs is
not written for that, so that the rows are the base's and (IA)³'s.
"""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="make test-vllm runs this in an environment with vLLM")

from support.vllm_engine import engine, greedy, prompts, write_base, write_ia3
from vllm.platforms.cpu import CpuPlatform

pytestmark = pytest.mark.vllm


@pytest.fixture
def compiling(monkeypatch):
    # Dynamo's graph, run as it is.
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    check = CpuPlatform.check_and_update_config

    def without_lora(config):
        lora, config.lora_config = config.lora_config, None
        check(config)
        config.lora_config = lora

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", staticmethod(without_lora))


def test_each_row_has_its_tokens_in_every_batch(compiling, tmp_path):
    base = write_base("llama", tmp_path / "base")
    outputs = {"target_modules": "all-linear", "feedforward_modules": []}
    adapters = [
        None,
        write_ia3(base, tmp_path / "paper-1", 1),
        write_ia3(base, tmp_path / "paper-2", 2),
        write_ia3(base, tmp_path / "outputs", 3, **outputs),
    ]
    with engine(base, max_loras=2, enforce_eager=False) as running:
        for rows in ([0, 1, 2, 0], [3, 0, 1], [2, 2, 3, 0, 0]):
            batch = prompts(len(rows))
            found = running.greedy([adapters[row] for row in rows], batch)
            expected = [
                greedy(base, adapters[row], prompt) for row, prompt in zip(rows, batch, strict=True)
            ]
            assert found == expected
