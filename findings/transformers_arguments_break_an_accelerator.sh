#!/usr/bin/env bash
# transformers 5.23.0 with accelerate 1.15.0: making a TrainingArguments breaks an Accelerator that the script has.
# One expects that arguments, of which no Trainer is made, leave the script's own Accelerator as it is. But they reset
# the state that all Accelerators of a process share: its accumulate() then raises an AttributeError of its inside, and
# so do num_processes and device.
# It matters because the error names neither TrainingArguments nor what to do, and comes at another line.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
export HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES=

venv/bin/python - <<'PYTHON'
import accelerate
import torch
import transformers

print("torch", torch.__version__, "transformers", transformers.__version__, "accelerate", accelerate.__version__)
own = accelerate.Accelerator(gradient_accumulation_steps=2)
model = torch.nn.Linear(2, 2)
model, optimizer = own.prepare(model, torch.optim.SGD(model.parameters(), 0.1))


def train():
    for _ in range(2):
        with own.accumulate(model):
            own.backward(model(torch.ones(1, 2)).sum())
            optimizer.step()
            optimizer.zero_grad()


def said(action):
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:80]}"
    return "fine"


first = said(train)
transformers.TrainingArguments(output_dir="out", use_cpu=True)
after = said(train)
count = said(lambda: own.num_processes)
print("a step before:", first)
print("a step after:", after)
print("num_processes after:", count)
if first != "fine" or not all(s.startswith("AttributeError") for s in (after, count)):
    raise SystemExit("Not as described.")
PYTHON
