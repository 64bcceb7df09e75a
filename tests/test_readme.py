"""The README's code, run as it stands there."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import REPOSITORY

README = (REPOSITORY / "README.md").read_text("utf-8")


def test_the_readme_code_runs_in_its_order_and_prints_what_the_readme_says(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    printed = re.findall(r"prints `(.*?)`", README)
    assert (len(blocks), len(printed)) == (3, 2)
    command = [sys.executable, "-c", "\n".join(blocks)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == printed
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_the_readme_commands_run_in_their_order(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "examples", tmp_path / "examples")
    commands = re.findall(r"^    ia3 (.*)$", README, re.M)
    assert [each.split()[0] for each in commands] == ["check", "fit", "predict", "suggest"]
    for command in commands:
        words = [sys.executable, "-m", "ia3", *shlex.split(command)]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
    assert len(done.stdout.splitlines()) == 6  # a head and five texts
    for left in ("tickets/ia3_report.html", "labelled.csv"):
        assert (tmp_path / left).is_file()


def test_the_readme_links_to_files_that_are_there() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (REPOSITORY / target).is_file(), target


def test_the_readme_picture_shows_every_folder() -> None:
    picture = (REPOSITORY / "docs" / "pictures" / "layers.svg").read_text("utf-8")
    folders = {path.parent.name for path in (REPOSITORY / "src" / "ia3").glob("*/__init__.py")}
    assert set(re.findall(r">(\w+)/<", picture)) == folders
