"""What `examples/serve` runs, and what docs/serving.md shows, is what the command takes."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys

import pytest
from support.paths import REPOSITORY

pytest.importorskip("fastapi")

import typer

from ia3.cli import app

EXAMPLES = REPOSITORY / "examples" / "serve"
GUIDE = (REPOSITORY / "docs" / "serving.md").read_text("utf-8")
UNIT = (EXAMPLES / "ia3-serve.service").read_text("utf-8")


def options() -> set[str]:
    """The options of `ia3 serve`."""
    command = typer.main.get_command(app)
    found = command.get_command(None, "serve")  # type: ignore[attr-defined, arg-type]
    return {name for option in found.params for name in (*option.opts, *option.secondary_opts)}


def named(command: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z-]+", command))


def test_the_commands_of_the_examples_and_of_the_guide_have_options_that_there_are():
    dockerfile = (EXAMPLES / "Dockerfile").read_text("utf-8")
    [words] = re.findall(r"^CMD (\[.*?\])", dockerfile, re.S | re.M)
    command = json.loads(words.replace("\\\n", ""))
    assert command[:2] == ["ia3", "serve"]
    [started] = re.findall(r"^ExecStart=(.*)$", UNIT, re.M)
    make = (REPOSITORY / "Makefile").read_text("utf-8")
    of_make = " ".join(line for line in make.splitlines() if "ia3 serve" in line)
    shown = " ".join(re.findall(r"ia3 serve [^\n`]*|`--[^`]*`", GUIDE))
    for each in (" ".join(command), started, of_make, shown):
        assert named(each)
        assert named(each) <= options()


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not here")
def test_the_unit_is_one_that_systemd_takes(tmp_path):
    # It looks whether the program is there, too.
    unit = tmp_path / "ia3-serve.service"
    unit.write_text(UNIT.replace("/opt/ia3/bin/ia3", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_programs_are_python():
    ast.parse((EXAMPLES / "locustfile.py").read_text("utf-8"))
    for program in re.findall(r"```python\n(.*?)```", GUIDE, re.S):
        ast.parse(program)
