#!/usr/bin/env bash
# transformers 5.23.0: MPNetConfig(relative_attention_num_buckets=...), documented as the number of buckets of the
# relative positions. MPNetModel makes the embedding of so many rows, but always computes indices for 32 buckets. With
# fewer, a forward pass raises an IndexError as soon as a text is long enough; with more, the rows above 31 are never
# read, so that positions far apart are told apart no better than before. T5, where the scheme is from, passes the number
# on. It matters for whoever trains an MPNet of another size: the larger setting is silently without effect.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cd "$folder"
export HF_HUB_OFFLINE=1

"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers

print("torch", torch.__version__, "transformers", transformers.__version__)


def tried(buckets):
    """Which rows of the embedding of relative positions a text of 400 tokens gives gradients to."""
    torch.manual_seed(0)
    config = transformers.MPNetConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        relative_attention_num_buckets=buckets,
    )
    model = transformers.MPNetModel(config).eval()
    rows = model.encoder.relative_attention_bias.weight
    try:
        model(input_ids=torch.randint(5, 50, (1, 400))).last_hidden_state.square().sum().backward()
    except IndexError as error:
        return f"{len(rows)} rows, IndexError: {error}"
    return f"{len(rows)} rows, read: {int((rows.grad.abs().sum(1) > 0).sum())}"


found = {buckets: tried(buckets) for buckets in (16, 32, 64)}
for buckets, what in found.items():
    print(f"relative_attention_num_buckets={buckets}: {what}")

if "IndexError" not in found[16]:
    raise SystemExit("Not as described: 16 buckets work.")
if int(found[64].split()[-1]) > 32:
    raise SystemExit("Not as described: more than 32 rows are read.")
PYTHON
