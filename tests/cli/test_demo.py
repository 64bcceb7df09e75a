"""`ia3 demo`, run as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_demo_learns_and_keeps_its_promises(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "ia3", "demo", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    # Four queues: a quarter is chance.
    assert result["accuracy_after"] > result["accuracy_before"] + 0.2
    assert result["accuracy_after"] > 0.5
    assert result["reloaded_equal"] is True
    assert result["merged_equal"] is True
    assert result["unloaded_bitwise"] is True
    weights = tmp_path / result["adapter"] / "adapter_model.safetensors"
    assert weights.stat().st_size == result["adapter_bytes"] < 1_000_000
    report = (tmp_path / result["report"]).read_text("utf-8")
    assert f"{result['accuracy_after']:.1%}" in report
    assert f"{result['accuracy_before']:.1%}" in report
