"""The benchmark of a batch in vLLM runs."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("vllm", reason="make test-vllm runs this in an environment with vLLM")

from support.paths import REPOSITORY
from support.vllm_engine import load, write_base

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import vllm_batch
from mixed import write_adapters

pytestmark = pytest.mark.vllm


def test_each_kind_of_rows_is_timed(tmp_path):
    base = write_base("llama", tmp_path / "base")
    adapters = write_adapters(load(base).requires_grad_(False), tmp_path, 2)
    loras = vllm_batch.write_loras(load(base), tmp_path, 2)
    timings = vllm_batch.measured(str(base), adapters, loras, repeats=1, tokens=4)
    assert set(timings.seconds) == {
        vllm_batch.BASE,
        vllm_batch.ROWS_OF_BASE,
        vllm_batch.IA3,
        vllm_batch.LORA,
    }
    assert all(len(seconds) == 1 for seconds in timings.seconds.values())
