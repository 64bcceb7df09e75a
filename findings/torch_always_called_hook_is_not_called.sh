#!/usr/bin/env bash
# torch 2.13.0: register_forward_hook(..., always_call=True). Such a hook is documented to run whether or not an
# exception is raised in the module's call, which makes it the place to undo what a pre-hook set, as a "finally"
# would. torch catches Exception there. A KeyboardInterrupt, or another exception that is a BaseException only
# (SystemExit, asyncio.CancelledError, pytest's outcomes), goes past the hook, which is not called at all. It matters
# in notebooks: the interrupted call leaves the module with what the pre-hook set, for all calls after it.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
cd "$folder"

"$folder/venv/bin/python" - <<'PYTHON'
import asyncio
import warnings

import torch

print("torch", torch.__version__)


class Layer(torch.nn.Module):
    def forward(self, error):
        if error is not None:
            raise error


called = []
layer = Layer()
layer.register_forward_hook(lambda module, args, output: called.append(type(args[0]).__name__), always_call=True)
warnings.simplefilter("error")  # a hook that fails would show

for error in [None, ValueError(), KeyboardInterrupt(), SystemExit(), asyncio.CancelledError()]:
    called.clear()
    try:
        layer(error)
    except BaseException as raised:
        assert raised is error
    print(f"{'no exception' if error is None else type(error).__name__}: the hook was called {len(called)} times")
    if isinstance(error, Exception) or error is None:
        if len(called) != 1:
            raise SystemExit("Not as described: the hook is not called once.")
    elif called:
        raise SystemExit(f"Not as described: the hook is called after a {type(error).__name__}.")
PYTHON
