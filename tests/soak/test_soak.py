"""The programs that run long, for a short time: what they count, and what they do with failures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import REPOSITORY

SOAK = REPOSITORY / "soak"


def program(name: str, *arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess:
    paths = [str(folder or SOAK), str(REPOSITORY / "src")]
    return subprocess.run(
        [sys.executable, str((folder or SOAK) / name), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_nothing_but_this_packages_errors_comes_of_fuzzed_files():
    done = program("fuzz.py", "--examples", "50", "--seed", "0")
    assert done.returncode == 0, done.stdout
    counts = json.loads(done.stdout)
    assert len(counts["targets"]) >= 18
    assert min(counts["targets"].values()) >= 50
    assert 0.2 < counts["refused"] / counts["inputs"] < 0.95


@pytest.fixture
def folder(tmp_path):
    """A folder with `run.py` and parts of ours."""
    (tmp_path / "run.py").write_bytes((SOAK / "run.py").read_bytes())
    good = 'def run(seconds, seed):\n    return {"inputs": seed, "of": {"a": 2}, "failures": []}\n'
    (tmp_path / "fuzz.py").write_text(good)
    (tmp_path / "kills.py").write_text(good.replace("[]", '["seed 7: lost"]'))
    (tmp_path / "threads.py").write_text("import os\n\ndef run(seconds, seed):\n    os._exit(3)\n")
    return tmp_path


def test_totals_add_up_over_runs(folder):
    for seed in ("3", "4"):
        done = program(
            "run.py", "--minutes", "0.1", "--seed", seed, "--part", "fuzz", folder=folder
        )
        assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [record["seed"] for record in records] == [3, 4]
    assert records[0]["parts"]["fuzz"]["inputs"] == 3
    shown = program("run.py", "--table", folder=folder).stdout
    assert "| fuzz | inputs | 7 | 2 |" in shown
    assert "| fuzz | of: a | 4 | 2 |" in shown
    assert "seeds 3, 4" in shown


@pytest.mark.parametrize(
    ("part", "says"),
    [("kills", "kills: seed 7: lost"), ("threads", "threads: the part itself ended its process")],
)
def test_a_failure_is_said_kept_and_counted(folder, part, says):
    done = program("run.py", "--minutes", "0.1", "--part", part, folder=folder)
    assert done.returncode == 1
    assert f"FAILED {says}" in done.stdout
    assert f"| {part} | failures | 1 | 1 |" in done.stdout


@pytest.mark.slow
def test_a_part_that_takes_longer_takes_nothing_of_the_next(folder):
    longer = "import time\n\ndef run(seconds, seed):\n    time.sleep(2 * seconds)\n    return {}\n"
    (folder / "fuzz.py").write_text(longer.replace("{}", '{"failures": []}'))
    given = 'def run(seconds, seed):\n    return {"given": seconds, "failures": []}\n'
    (folder / "threads.py").write_text(given)
    program("run.py", "--minutes", "0.05", "--part", "fuzz", "threads", folder=folder)
    [record] = map(json.loads, (folder / "results.jsonl").read_text().splitlines())
    assert record["parts"]["threads"]["given"] == pytest.approx(0.6)


@pytest.mark.slow
def test_nothing_wrong_comes_of_requests_that_are_nearly_right():
    pytest.importorskip("fastapi")
    done = program("over_http.py", "--seconds", "40", "--seed", "0")
    assert done.returncode == 0, done.stdout
    counts = json.loads(done.stdout)
    assert counts["kills"] >= 1
    assert counts["refused"] > counts["taken"]
    assert min(counts["answers compared"], counts["texts compared"]) >= 20
