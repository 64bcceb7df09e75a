#!/usr/bin/env bash
# torch 2.13.0: torch.backends.mkldnn.matmul.fp32_precision, the newer way to say how exact float32 products of one
# backend are to be. torch.get_float32_matmul_precision(), which only reads, raises a RuntimeError from then on, also in
# a program that has set nothing by the older functions: the message says that it has used a mix of both. Setting it back
# to "none" ends that. It matters because libraries read the older one before they do something else, and an application
# cannot know when it sets the newer one for a while.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
cd "$folder"

"$folder/venv/bin/python" - <<'PYTHON'
import torch

print("torch", torch.__version__)


def read():
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError as error:
        return f"RuntimeError: {error}"


before = read()
torch.backends.mkldnn.matmul.fp32_precision = "bf16"
within = read()
torch.backends.mkldnn.matmul.fp32_precision = "none"
after = read()
print("before:", before)
print("within:", within)
print("after:", after)

if (before, after) != ("highest", "highest") or "mix of the legacy and new APIs" not in within:
    raise SystemExit("Not as described.")
PYTHON
