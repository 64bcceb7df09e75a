#!/usr/bin/env bash
# regex 2026.11.19 (on Linux): the argument timeout. "The timeout (in seconds) applies to the entire operation", the
# documentation says, with a replacement function that sleeps as its example: one expects seconds of the clock. It is
# the CPU time of the whole process that counts (C's clock()), of all threads together. The documented example does
# not end in TimeoutError, 1.5 s with a timeout of 0.5 s pass. What other threads compute counts, though: below, the
# limit is reached while the thread that replaces sleeps, and n busy cores use it up in an n-th of the time. It matters
# in servers and data loaders with threads: the same text and pattern pass when little else runs, and fail when much
# does.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q regex==2026.11.19
cd "$folder"

"$folder/venv/bin/python" - <<'PYTHON'
import hashlib
import importlib.metadata
import threading
import time

import regex

print("regex", importlib.metadata.version("regex"))


def replace(function, timeout):
    clock, thread = time.perf_counter(), time.thread_time()
    try:
        regex.sub("[a-z]", function, "abcde", timeout=timeout)
        ended = "no error"
    except TimeoutError:
        ended = "TimeoutError"
    clock, thread = time.perf_counter() - clock, time.thread_time() - thread
    print(f"  timeout {timeout} s: {ended} after {clock:.2f} s, of which the thread computed {thread:.3f} s")
    return ended, clock, thread


def sleep(match):
    time.sleep(0.3)
    return "X"


print("five replacements that sleep 0.3 s each, nothing else at work:")
alone = replace(sleep, 0.5)

done = threading.Event()
block = bytes(1 << 20)


def work():  # most of it without the GIL
    while not done.is_set():
        hashlib.sha256(block).digest()


threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
start = time.process_time()


def wait(match):  # sleeps until the others have used a second, however busy the machine is
    while time.process_time() < start + 1:
        time.sleep(0.01)
    return "X"


print("four threads at work, the first replacement sleeps until they have used 1 s together:")
beside = replace(wait, 0.9)
done.set()
for thread in threads:
    thread.join()

if alone[0] != "no error" or alone[1] < 1:
    raise SystemExit("Not as described: time of the clock counts.")
if beside[0] != "TimeoutError":
    raise SystemExit("Not as described: the other threads' time does not count.")
if beside[2] > 0.45:
    raise SystemExit("Not as described: the thread itself computed for long.")
PYTHON
