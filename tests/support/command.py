"""The `ia3` command as processes, in a folder of their own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

IA3 = Path(sys.executable).parent / "ia3"
Done = subprocess.CompletedProcess[str]

# What no process loads before it has to.
HEAVY = ("torch", "transformers", "numpy", "sklearn", "matplotlib")
# Files of at most 1024 bytes.
SMALL_FILES_ONLY = ["sh", "-c", 'ulimit -f 1 && exec "$0" "$@"', str(IA3)]

# A line that says how far work is; a command's ones follow the end of the one before.
_PROGRESS = re.compile(r"(?m)(?:^|(?<=\0))[^\s\0][^\0\n]* \d:\d\d:\d\d( \d:\d\d:\d\d left)?\n")

# Most of a process's time is spent on importing torch.
_ONE_AFTER_THE_OTHER = """
import json, sys
from ia3.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv, code = ["ia3", *arguments], 0
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
    for stream in (sys.stdout, sys.stderr):
        print(f"\\0{code}", file=stream, end="\\0", flush=True)
print(*sys.modules)
"""


class Place:
    """A folder to run the command in."""

    def __init__(self, folder: Path, model: Path | None = None) -> None:
        self.folder = folder
        self.model = model
        self.loaded: set[str] = set()
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "TMPDIR": str(self.temporary),
        }

    def write(self, name: str, content: str | bytes) -> str:
        encoded = content.encode() if isinstance(content, str) else content
        (self.folder / name).write_bytes(encoded)
        return name

    def run(self, *command: Any, under: list[str] | None = None, **environment: str) -> Done:
        """Run `ia3` with these arguments, as an argument of `under` if given.

        Lines that say how far it is, which a slow machine gets, are left out.
        """
        done = subprocess.run(
            [*(under or [str(IA3)]), *map(str, command)],
            cwd=self.folder,
            env=self.environment | environment,
            capture_output=True,
            encoding="utf-8",
            timeout=600,
        )
        done.stderr = _PROGRESS.sub("", done.stderr)
        return done

    def run_all(self, *commands: tuple[Any, ...], **environment: str) -> list[Done]:
        """Run several commands in one process, and tell what each of them said.

        What of `HEAVY` the process has loaded is left in `loaded`.
        """
        arguments = [list(map(str, command)) for command in commands]
        python = [sys.executable, "-c", _ONE_AFTER_THE_OTHER]
        done = self.run(json.dumps(arguments), under=python, **environment)
        said, remarks = (stream.split("\0") for stream in (done.stdout, done.stderr))
        assert len(said) == len(remarks) == 2 * len(commands) + 1, done.stderr
        self.loaded = {*HEAVY} & {*said[-1].split()}
        return [
            Done(command, int(said[2 * i + 1]), said[2 * i], remarks[2 * i])
            for i, command in enumerate(commands)
        ]

    def fit(self, *command: Any, under: list[str] | None = None) -> Done:
        """`ia3 fit` of the model."""
        return self.run("fit", "--model", self.model, *command, under=under)

    def killed_when(self, seen: str, *command: Any) -> None:
        """`ia3 fit` of the model, killed as soon as a path is there."""
        process = subprocess.Popen(
            [str(IA3), "fit", "--model", str(self.model), *map(str, command)],
            cwd=self.folder,
            env=self.environment,
        )
        try:
            while process.poll() is None and not list(self.folder.glob(seen)):
                time.sleep(0.01)
        finally:
            process.kill()
        assert process.wait(60) == -signal.SIGKILL

    def names(self) -> set[str]:
        """What is in the folder; nothing may be left in the temporary one."""
        assert not list(self.temporary.iterdir())
        return {path.name for path in self.folder.iterdir()} - {"tmp"}


def assert_refused(done: Done, message: str) -> None:
    """One line on standard error that says this, exit code 1, nothing on standard output."""
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert done.stderr.startswith("error: ")
    assert message in done.stderr, done.stderr


def said(done: Done) -> Any:
    """What `--json` printed, of a command that worked and warned of nothing."""
    assert done.returncode == 0, done.stderr
    # On a slow machine, a line may say how far it is.
    assert "warning:" not in done.stderr
    return json.loads(done.stdout)
