"""Files from anywhere, made invalid in all ways: nothing but an `IA3Error` may come of them.

    python soak/fuzz.py --seconds 60 --seed 1 [--only TARGET ...]
    python soak/fuzz.py --again soak/found/FILE --only TARGET

Two generators, each in a process of its own: Hypothesis draws mutations of valid files, and atheris
(where it is installed, beside the environment) mutates what reached new code. Each target is read
in a forked child, under the guards of `guards.py`. An input that failed is kept in `soak/found/`.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import importlib
import io
import json
import mmap
import os
import pkgutil
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from targets import Target

HERE = Path(__file__).resolve().parent
FOUND = HERE / "found"
BESIDE = HERE.parent / ".venv-soak"
GENERATORS = ("hypothesis", "atheris")
# So long by the clock an input may wait, on a busy machine, before its process is ended.
STUCK = 60.0
RESTARTS = 5
# Examples of one call of Hypothesis, which keeps what it has drawn; and mutations by each.
BATCH, MUTATIONS = 500, 10
# Failures of a child that are kept, one for each place in the code; and time to make each small.
KEPT = 20
SHRINKING = 2.0


def run(seconds: float, seed: int, only: Sequence[str] = (), examples: int = 0) -> dict[str, Any]:
    """Fuzz for so long: counts by target and generator, and the failures in a sentence each."""
    generators = GENERATORS if not examples and _has_atheris() else GENERATORS[:1]
    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        workers = [
            subprocess.Popen(
                [sys.executable, __file__, "--worker", generator, "--folder", folder]
                + ["--seconds", str(seconds), "--seed", str(seed), "--examples", str(examples)]
                + (["--only", *only] if only else []),
                env=_environment(folder),
            )
            for generator in generators
        ]
        ended = [worker.wait() for worker in workers]
        reports = [
            json.loads(path.read_text()) if path.is_file() else {"targets": {}, "failures": []}
            for path in (Path(folder) / f"{generator}.json" for generator in generators)
        ]
    result: dict[str, Any] = {"inputs": 0, "refused": 0}
    targets: dict[str, int] = {}
    failures = []
    for generator, code, report in zip(generators, ended, reports, strict=True):
        if code:
            failures.append(f"the process of {generator} ended with {code}")
        for name, counts in report["targets"].items():
            targets[name] = targets.get(name, 0) + counts["inputs"]
            result["refused"] += counts["refused"]
        result[generator] = sum(counts["inputs"] for counts in report["targets"].values())
        result["inputs"] += result[generator]
        failures += [_kept(failure, generator) for failure in report["failures"]]
    if not examples and len(generators) == 1:
        result["without"] = "atheris, which is not installed"
    return {**result, "targets": targets, "failures": failures}


def _kept(failure: dict[str, Any], generator: str) -> str:
    """Keep a failure's input, and say what it did."""
    data = base64.b64decode(failure["data"])
    FOUND.mkdir(exist_ok=True)
    name = re.sub(r"\W+", "-", failure["target"])
    path = FOUND / f"{name}-{hashlib.sha256(data).hexdigest()[:10]}"
    path.write_bytes(data)
    return (
        f"{failure['target']} ({generator}, seed {failure['seed']}): {failure['what']} "
        f"[{failure['where']}] for {len(data)} bytes {data[:120]!r}, "
        f"whole in soak/found/{path.name}\n{failure['trace']}"
    )


def _has_atheris() -> bool:
    command = [sys.executable, "-c", "import atheris"]
    return subprocess.run(command, env=_environment(""), capture_output=True).returncode == 0


def _memory() -> str | None:
    """A folder in memory, where there is one: a file is written for each input."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _environment(folder: str) -> dict[str, str]:
    paths = [str(HERE.parent / "src"), os.environ.get("PYTHONPATH", ""), str(BESIDE)]
    settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    settings |= {"HF_HOME": folder, "HYPOTHESIS_STORAGE_DIRECTORY": folder, "PYTHONHASHSEED": "0"}
    settings |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return {**os.environ, **settings}


# -- a generator's process -------------------------------------------------------------------------


class _Worker:
    """One generator: it reads the targets in one child after the other."""

    def __init__(self, generator: str, folder: Path, options: argparse.Namespace) -> None:
        self._generator = generator
        self._folder = folder
        self._options = options
        self._shared = Shared()
        self._report: dict[str, Any] = {"targets": {}, "failures": []}

    def work(self) -> None:
        started = time.monotonic()
        place = self._folder / self._generator
        place.mkdir()
        os.chdir(place)
        noise = self._folder / f"{self._generator}.log"
        self._noise = os.open(noise, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        targets = _load_targets(self._generator, place)
        chosen = [t for t in targets if not self._options.only or t.name in self._options.only]
        left = sum(target.weight for target in chosen)
        for number, target in enumerate(chosen):
            time_left = self._options.seconds - (time.monotonic() - started)
            self._fuzz(target, time_left * target.weight / left, self._options.seed + number)
            left -= target.weight
        path = self._folder / f"{self._generator}.json"
        path.write_text(json.dumps(self._report))

    def _fuzz(self, target: Target, seconds: float, seed: int) -> None:
        """Read a target's inputs for so long; a child that ends is followed by another."""
        end = time.monotonic() + seconds
        self._shared.begin()
        failures = self._folder / f"{self._generator}.failures"
        failures.unlink(missing_ok=True)
        log = os.open(failures, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for restart in range(RESTARTS):
            seed_here = seed + 1000 * restart
            child = os.fork()
            if child == 0:
                self._be_child(target, end - time.monotonic(), seed_here, log)
            ended = self._wait(child)
            if ended == 0:
                break
            what = f"ended its process with {os.waitstatus_to_exitcode(ended)}"
            said = os.pread(self._noise, 1 << 20, max(0, os.fstat(self._noise).st_size - 2000))
            failure = {"what": what, "where": "", "trace": said.decode("utf-8", "replace")}
            failure["seed"] = seed_here
            failure |= {"data": base64.b64encode(self._shared.data()).decode()}
            self._report["failures"].append({**failure, "target": target.name})
            if time.monotonic() > end - 1:
                break
        os.close(log)
        for line in failures.read_text().splitlines():
            self._report["failures"].append({**json.loads(line), "target": target.name})
        inputs, refused = self._shared.counts()
        self._report["targets"][target.name] = {"inputs": inputs, "refused": refused}
        took = max(time.monotonic() - end + seconds, 0.01)
        print(
            f"{self._generator:>10}  {target.name:<28} {inputs:>9,} inputs, {refused:>9,} refused, "
            f"{inputs / took:>7,.0f} a second",
            file=sys.stderr,
        )

    def _wait(self, child: int) -> int:
        """The child's status when it ends; one that is stuck in an input is ended."""
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return status
            if self._shared.waits_since() > STUCK:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.02)

    def _be_child(self, target: Target, seconds: float, seed: int, log: int) -> None:
        code = 1
        try:
            import guards

            # libFuzzer says much. What an input has printed nobody needs.
            os.dup2(self._noise, 1)
            os.dup2(self._noise, 2)
            read = _Reading(target, guards.Guard(Path.cwd()), self._shared, seed, log)
            generate = _by_atheris if self._generator == "atheris" else _by_hypothesis
            generate(target, read, seconds, seed, self._options.examples)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc(-8)
            sys.stderr.flush()
        finally:
            os._exit(code)


# Packages that no target reaches; vllm's package is not in this environment.
_LEFT_OUT = ("__main__", "cli", "experiments", "report", "vllm")


def _load_targets(generator: str, folder: Path) -> list[Target]:
    """The targets, whose code reports what it runs if the generator is atheris."""
    if generator == "atheris":
        import atheris

        quiet = contextlib.redirect_stderr(io.StringIO())
        with quiet, atheris.instrument_imports(include=["ia3"], enable_loader_override=False):
            import ia3

            for module in pkgutil.walk_packages(ia3.__path__, "ia3."):
                if module.name.split(".")[1] not in _LEFT_OUT:
                    importlib.import_module(module.name)
    import targets

    found = targets.all_targets(folder)
    if generator == "hypothesis":
        # What Hypothesis reads first it need not read in each child.
        _by_hypothesis(found[0], lambda data: None, 0.0, 0, 1000)
    return found


class Shared:
    """Memory that a child and its parent have in common: counts, and the input that is read."""

    HEAD = struct.Struct("QQdQ")
    SIZE = 1 << 18

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, self.SIZE)
        self.begin()

    def begin(self) -> None:
        self._inputs = self._refused = 0
        self._write(0.0, b"")

    def reading(self, data: bytes) -> None:
        self._inputs += 1
        self._write(time.monotonic(), data[: self.SIZE - self.HEAD.size])

    def was_read(self, refused: bool) -> None:
        self._refused += refused
        self.HEAD.pack_into(self._memory, 0, self._inputs, self._refused, 0.0, 0)

    def counts(self) -> tuple[int, int]:
        inputs, refused, _, _ = self.HEAD.unpack_from(self._memory)
        # A child that comes next counts on.
        self._inputs, self._refused = inputs, refused
        return inputs, refused

    def waits_since(self) -> float:
        """How long the input has been read, in seconds."""
        since = self.HEAD.unpack_from(self._memory)[2]
        return time.monotonic() - since if since else 0.0

    def data(self) -> bytes:
        size = self.HEAD.unpack_from(self._memory)[3]
        self.counts()
        return self._memory[self.HEAD.size : self.HEAD.size + size]

    def _write(self, since: float, data: bytes) -> None:
        self.HEAD.pack_into(self._memory, 0, self._inputs, self._refused, since, len(data))
        self._memory[self.HEAD.size : self.HEAD.size + len(data)] = data


# -- a target's process ----------------------------------------------------------------------------


class _Reading:
    """Reads inputs under the guard, and writes failures down, one for each place in the code."""

    def __init__(self, target: Target, guard: Any, shared: Shared, seed: int, log: int) -> None:
        self._target, self._guard, self._shared = target, guard, shared
        self._seed, self._log = seed, log
        self._seen: set[tuple[str, str]] = set()

    def __call__(self, data: bytes) -> None:
        self._shared.reading(data)
        result = self._guard.failure_of(self._target.call, data)
        self._shared.was_read(result is None)
        if result is None or result is True:
            return
        place = _place(result)
        if place in self._seen or len(self._seen) >= KEPT:
            return
        self._seen.add(place)
        data = self._smaller(data, place)
        record = {"what": result.what, "where": result.where, "trace": result.trace}
        record |= {"seed": self._seed, "data": base64.b64encode(data).decode()}
        os.write(self._log, f"{json.dumps(record)}\n".encode())

    def _smaller(self, data: bytes, place: tuple[str, str]) -> bytes:
        """An input that fails at the same place, with pieces taken out while there is time."""
        end, size = time.monotonic() + SHRINKING, len(data) // 2
        while size and time.monotonic() < end:
            start = 0
            while start < len(data) and time.monotonic() < end:
                less = data[:start] + data[start + size :]
                self._shared.reading(less)
                result = self._guard.failure_of(self._target.call, less)
                self._shared.was_read(result is None)
                if result is None or result is True or _place(result) != place:
                    start += size
                else:
                    data = less
            size //= 2
        return data


def _place(failure: Any) -> tuple[str, str]:
    return failure.where, failure.what.partition(":")[0]


def _by_hypothesis(
    target: Target, read: Callable[[bytes], None], seconds: float, seed: int, examples: int
) -> None:
    """Read texts and bytes of Hypothesis's, and mutations of valid inputs that it seeds."""
    import hypothesis
    from hypothesis import strategies as st
    from mutations import chosen_of

    end = time.monotonic() + seconds
    made = chosen_of(target.valid, target.mutate)
    words = st.lists(st.sampled_from([*target.words, "\n", " "]), max_size=12).map("".join)
    plain = st.one_of(words.map(_utf8), st.text(max_size=40).map(_utf8), st.binary(max_size=60))

    class OutOfTime(BaseException):
        pass

    def test(random: Random, data: bytes) -> None:
        read(data)
        for _ in range(MUTATIONS):
            if time.monotonic() > end and not examples:
                raise OutOfTime
            read(made(random))

    def batch(size: int, seed: int) -> None:
        settings = hypothesis.settings(
            max_examples=size,
            database=None,
            deadline=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        random = st.randoms(use_true_random=True)
        hypothesis.seed(seed)(settings(hypothesis.given(random, plain)(test)))()

    for data in target.valid:
        read(data)
    with contextlib.suppress(OutOfTime):
        batch(max(1, examples // MUTATIONS) if examples else BATCH, seed)
        while not examples:
            seed += 1_000_000
            batch(BATCH, seed)


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _by_atheris(
    target: Target, read: Callable[[bytes], None], seconds: float, seed: int, examples: int
) -> None:
    import atheris
    from mutations import LONGEST

    corpus = Path("corpus")
    corpus.mkdir(exist_ok=True)
    for path in corpus.iterdir():
        path.unlink()
    for number, data in enumerate(target.valid):
        (corpus / str(number)).write_bytes(data)
    words = Path("words")
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words))

    def mutate(data: bytes, size: int, drawn: int) -> bytes:
        random = Random(drawn)
        if random.random() < 0.5:
            return atheris.Mutate(data, len(data))[:size]
        return target.mutate(data, random)[:size]

    # Its own limits are off: the guard has others.
    options = [f"-seed={seed % 2**32 or 1}", f"-max_total_time={max(1, round(seconds))}"]
    options += [f"-max_len={LONGEST}", f"-dict={words}", "-rss_limit_mb=0", "-timeout=600"]
    options += ["-artifact_prefix=./", "-print_final_stats=0", "-verbosity=0", str(corpus)]
    atheris.Setup(["fuzz", *options], read, custom_mutator=mutate, internal_libfuzzer=True)
    atheris.Fuzz()


def _escaped(word: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in _utf8(word))


# -- command line ----------------------------------------------------------------------------------


def _again(path: Path, name: str) -> None:
    """Read one input once more, without guards, so that a debugger can follow."""
    os.environ.update(_environment(""))
    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        [target] = [t for t in _load_targets("hypothesis", Path(folder)) if t.name == name]
        target.call(path.read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], help="the names of targets")
    parser.add_argument("--examples", type=int, default=0, help="so many of each, by Hypothesis")
    parser.add_argument("--again", type=Path, help="read a kept input once more")
    parser.add_argument("--worker", choices=GENERATORS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _Worker(options.worker, options.folder, options).work()
        return
    if options.again:
        _again(options.again, *options.only)
        return
    result = run(options.seconds, options.seed, options.only, options.examples)
    failures = result.pop("failures")
    print(json.dumps(result, indent=2))
    print("\n".join(failures))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
