"""What no input may do, watched from inside the process that reads it.

A `Guard` is for the rest of a process: an audit hook cannot be taken off again. While an input is
read, the process may read and write its own temporary folder and read Python's packages. It may not
open a socket, start a process, load a library, unpickle a class or compile code, but for what
Jinja compiles. Each input has bounded processor time and memory.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ia3.errors import IA3Error

SECONDS = 5.0
# An input may take so many times its own size, and so much besides.
TIMES_ITS_SIZE, MEMORY = 10, 100 << 20
# Memory that is asked for and never touched does not show in what a process has.
ADDRESS_SPACE = 1 << 30
# So often what the process has is taken anew: what it gained by then, no single input took.
RENEWED = 100

# Audit events by the part before the dot, or whole.
FORBIDDEN = {
    *("socket", "subprocess", "ctypes", "urllib", "http", "ftplib", "smtplib", "webbrowser", "pty"),
    *("os.exec", "os.fork", "os.forkpty", "os.kill", "os.killpg", "os.posix_spawn", "os.spawn"),
    *("os.system", "os.putenv", "os.unsetenv", "signal.pthread_kill", "builtins.breakpoint"),
    *("builtins.input", "code.interact", "pickle.find_class", "sys.addaudithook"),
}
WRITING = {
    *("os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.removexattr", "os.rename"),
    *("os.rmdir", "os.setxattr", "os.symlink", "os.truncate", "os.utime", "tempfile.mkdtemp"),
    *("tempfile.mkstemp", "shutil.copyfile", "shutil.move", "shutil.rmtree", "shutil.copytree"),
}
READING = {"os.chdir", "os.getxattr", "os.listdir", "os.listxattr", "os.scandir", "os.walk"}
COMPILING = {"compile", "exec", "marshal.loads", "marshal.load", "code.__new__"}
# Whose code may compile: (the file that does, the file that called it, or nothing). An import may
# too, and what a module does while it is imported.
COMPILERS = (
    ("/jinja2/", ""),
    ("/ast.py", "/jinja2/"),  # its numbers
)
IMPORTING = "<frozen importlib"
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class GuardError(BaseException):
    """Past every `except Exception` of the code under it."""


@dataclass(frozen=True)
class Failure:
    """What an input did: `what` in a line, `where` in the code, the traceback's last lines."""

    what: str
    where: str
    trace: str


class Guard:
    """Watches calls; `folder` is what they may write. The limits are for tests of the guard."""

    def __init__(self, folder: Path, seconds: float = SECONDS, memory: int = MEMORY) -> None:
        self._folder = os.path.realpath(folder)
        given = [*sys.path, sys.prefix, f"{sys.base_prefix}/lib", os.path.dirname(__file__)]
        readable = ["/proc/self", "/dev/null", "/dev/urandom", "/usr/share/zoneinfo", self._folder]
        self._readable = [os.path.realpath(path) for path in (*filter(None, given), *readable)]
        self._seconds, self._memory = seconds, memory
        self._watching = False
        self._tripped: list[str] = []
        self._calls = 0
        self._had = 0
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_SPACE,) * 2)
        self._peak_of = os.open("/proc/self/clear_refs", os.O_WRONLY)
        self._resident = os.open("/proc/self/statm", os.O_RDONLY)
        self._status = os.open("/proc/self/status", os.O_RDONLY)
        signal.signal(signal.SIGPROF, self._too_long)
        sys.addaudithook(self._audit)

    def failure_of(self, call: Callable[[bytes], Any], data: bytes) -> Failure | bool | None:
        """Call with an input: its `Failure`; `None` if it was refused, `True` if it was taken."""
        if self._calls % RENEWED == 0:
            self._take_memory()
        self._calls += 1
        self._tripped.clear()
        result: Failure | bool | None = True
        raised: BaseException | None = None
        # Processor time, as others may use the machine too. Again and again, should one be caught.
        signal.setitimer(signal.ITIMER_PROF, self._seconds, 1.0)
        self._watching = True
        try:
            call(data)
        except IA3Error:
            result = None
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raised = error
        finally:
            self._watching = False
            signal.setitimer(signal.ITIMER_PROF, 0)
        if raised is not None:
            result = _failure(raised)
        if self._tripped and not isinstance(result, Failure):
            result = Failure(f"{self._tripped[0]}, and went on", self._tripped[0], "")
        limit = self._memory + TIMES_ITS_SIZE * len(data)
        if self._took(limit) > limit:
            self._take_memory()
            # Once more: memory of the inputs before, and of the generator, may be in the peak.
            if not isinstance(result, Failure):
                with suppress(IA3Error):
                    call(data)
                if (took := self._took(limit)) > limit:
                    what = f"took {took >> 20} MiB for {len(data)} bytes"
                    result = Failure(what, "memory", "")
            self._take_memory()
        return result

    def _take_memory(self) -> None:
        """Have the peak begin again at what the process has now."""
        os.pwrite(self._peak_of, b"5", 0)
        pages = int(os.pread(self._resident, 100, 0).split()[1])
        self._had = pages * resource.getpagesize()

    def _took(self, limit: int) -> int:
        """What the process had at most, beyond what it had: the peak."""
        took = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - self._had
        # Quick, but it may be the peak of what this process was before it became Python.
        if took > limit:
            status = os.pread(self._status, 10_000, 0)
            took = int(status.partition(b"VmHWM:")[2].split()[0]) * 1024 - self._had
        return took

    def _too_long(self, *_: Any) -> None:
        if self._watching:
            raise GuardError(f"ran longer than {self._seconds} s")

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._watching:
            return
        if event == "open":
            path, _, flags = args
            # Without flags it is what io.open_code reads.
            writes = isinstance(flags, int) and flags & WRITES
            problem = self._outside([path], [self._folder] if writes else self._readable)
        elif event in WRITING:
            problem = self._outside(args, [self._folder])
        elif event in READING:
            problem = self._outside(args[:1], self._readable)
        elif event in COMPILING:
            problem = "" if _may_compile() else "code"
        else:
            forbidden = event in FORBIDDEN or event.partition(".")[0] in FORBIDDEN
            problem = "forbidden" if forbidden else ""
        if problem:
            self._tripped.append(f"guard: {event} {problem}")
            raise GuardError(f"guard: {event} {problem} {args!r:.200}")

    def _outside(self, paths: Any, roots: list[str]) -> str:
        for path in paths:
            if isinstance(path, str | bytes | os.PathLike):
                whole = os.path.realpath(os.fsdecode(path))
                if not any(whole == root or whole.startswith(f"{root}/") for root in roots):
                    return f"outside: {whole}"
        return ""


def _may_compile() -> bool:
    frame: Any = sys._getframe(2)
    files = []
    while frame is not None and frame.f_code is not Guard.failure_of.__code__:
        files.append(frame.f_code.co_filename)
        frame = frame.f_back
    if any(file.startswith(IMPORTING) for file in files):
        return True
    by = files[0]
    caller = next((file for file in files if file != by), "")
    return any(file in by and above in caller for file, above in COMPILERS)


def _failure(error: BaseException) -> Failure:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/ia3/" in frame.filename] or frames
    at = own[-1]
    where = f"{at.filename.rpartition('/ia3/')[2]}:{at.lineno} in {at.name}"
    try:
        text = str(error)
    except Exception as unprintable:
        text = f"(its message raises {type(unprintable).__name__})"
    lines = "".join(
        f"    {frame.filename}:{frame.lineno} in {frame.name}: {frame.line}\n"
        for frame in frames[-6:]
    )
    return Failure(f"{type(error).__name__}: {text:.200}", where, lines)
