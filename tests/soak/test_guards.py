"""The guards over fuzzed inputs: each sees what it is for, and lets the rest be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import REPOSITORY

# Each call in a process of its own, as the hook stays for the rest of it. The folder is `allowed`.
PROGRAM = """
import ctypes, io, json, os, pickle, signal, socket, subprocess, sys, time
from pathlib import Path

import jinja2

import guards
from ia3.errors import BrokenFileError

allowed, outside = Path(sys.argv[1]) / "allowed", Path(sys.argv[1]) / "outside"
NESTED = b"cbuiltins\\nlen\\n."

def refused():
    raise BrokenFileError("refused")

def swallowed():
    try:
        socket.socket()
    except BaseException:
        pass

CALLS = {
    "taken": lambda: (allowed / "new").write_text("x") and (allowed / "new").read_text(),
    "refused": refused,
    "a template": lambda: jinja2.Template("{% for i in [1.5] %}{{ i }}{% endfor %}").render(),
    "an error of a template": lambda: jinja2.Template("{{ 1 / 0 }}").render(),
    "another error": lambda: [][1],
    "a socket": lambda: socket.socket(),
    "a socket, swallowed": swallowed,
    "a process": lambda: subprocess.run(["true"]),
    "a command": lambda: os.system("true"),
    "a fork": lambda: os.fork() or os._exit(0),
    "writing outside": lambda: (outside / "new").write_text("x"),
    "writing by a link": lambda: (allowed / "link").write_text("x"),
    "a folder outside": lambda: (outside / "new").mkdir(),
    "renaming to outside": lambda: (allowed / "old").rename(outside / "old"),
    "reading outside": lambda: (outside / "secret").read_text(),
    "reading through dots": lambda: (allowed / ".." / "outside" / "secret").read_text(),
    "listing outside": lambda: os.listdir(outside),
    "compiled code": lambda: eval("1 + 1"),
    "a class in a pickle": lambda: pickle.loads(NESTED),
    "a library": lambda: ctypes.CDLL(None),
    "memory": lambda: len(bytearray(b"x") * (30 << 20)),
    "memory, never touched": lambda: bytearray(8 << 30),
    "time": lambda: sum(1 for _ in iter(int, 1)),
}

guard = guards.Guard(allowed, seconds=0.3, memory=20 << 20)
result = guard.failure_of(lambda data: CALLS[sys.argv[2]](), b"")
print(json.dumps(result if isinstance(result, bool | None) else [result.what, result.where]))
"""


def watched(call: str, folder: Path) -> list[str] | bool | None:
    (folder / "allowed").mkdir()
    (folder / "allowed" / "old").touch()
    (folder / "outside").mkdir()
    (folder / "outside" / "secret").touch()
    (folder / "allowed" / "link").symlink_to(folder / "outside" / "linked")
    paths = [str(REPOSITORY / "soak"), str(REPOSITORY / "src")]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), call],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (folder / "outside").iterdir()] == ["secret"]
    return json.loads(done.stdout)


@pytest.mark.parametrize("call", ["taken", "a template"])
def test_what_an_input_may_do_passes(call, tmp_path):
    assert watched(call, tmp_path) is True


def test_an_error_of_this_package_is_a_refusal(tmp_path):
    assert watched("refused", tmp_path) is None


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("an error of a template", "ZeroDivisionError"),
        ("another error", "IndexError"),
        ("a socket", "guard: socket."),
        ("a socket, swallowed", "guard: socket."),
        ("a process", "guard: subprocess.Popen"),
        ("a command", "guard: os.system"),
        ("a fork", "guard: os.fork"),
        ("writing outside", "guard: open outside"),
        ("writing by a link", "guard: open outside"),
        ("a folder outside", "guard: os.mkdir outside"),
        ("renaming to outside", "guard: os.rename outside"),
        ("reading outside", "guard: open outside"),
        ("reading through dots", "guard: open outside"),
        ("listing outside", "guard: os.listdir outside"),
        ("compiled code", "guard: compile code"),
        ("a class in a pickle", "guard: pickle.find_class"),
        ("a library", "guard: ctypes.dlopen"),
        ("memory", "MiB for 0 bytes"),
        ("memory, never touched", "MemoryError"),
        ("time", "ran longer than 0.3 s"),
    ],
)
def test_what_no_input_may_do_is_a_failure(call, says, tmp_path):
    result = watched(call, tmp_path)
    assert isinstance(result, list)
    assert says in result[0]
