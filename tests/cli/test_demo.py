"""`ia3 demo`, run as a user runs it."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_demo_learns_and_keeps_its_promises(tmp_path):
    command = [sys.executable, "-m", "ia3", "demo", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    # Both embedded models were asked, and the frozen one is there beside the trained one.
    assert [each["engine"] for each in result["candidates"]] == ["encoder", "language-model"]
    assert f": {result['engine']} {result['model']}\n" in done.stderr
    assert "right (frozen encoder with logistic regression)" in done.stderr
    # Four queues: a quarter is chance.
    assert min(result["accuracy_before"], result["accuracy_after"]) > 0.7
    for promise in ("reloaded_equal", "merged_equal", "unloaded_bitwise"):
        assert result[promise] is True
    weights = tmp_path / result["adapter"] / "adapter_model.safetensors"
    assert weights.stat().st_size == result["adapter_bytes"] < 1_000_000
    report = (tmp_path / result["report"]).read_text("utf-8")
    for when in ("before", "after"):
        assert f"{result[f'accuracy_{when}']:.1%}" in report
    for each in result["candidates"]:
        assert f"seen of the {each['engine']}" in report
        assert each["note"] in report
