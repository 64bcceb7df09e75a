#!/usr/bin/env bash
# PEFT 0.21.2: the state dict of one adapter, where another adapter has the name of a module. Nothing speaks against
# such names, and one expects "attention" and "mlp" to be as good as "first" and "second". But
# get_peft_model_state_dict drops every key that has another adapter's name between two of its dots: with an adapter
# "mlp" on a LLaMA, all that "default" has within the MLPs (8 of 12 tensors below) is missing, also in the file of
# save_pretrained. No error and no warning when saving; "mlp" itself is complete. It matters because most of a trained
# adapter is lost just because a second one was given a telling name.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 safetensors==0.8.0
cd "$folder"
export HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore::FutureWarning

"$folder/venv/bin/python" - <<'PYTHON'
import warnings

import peft
import torch
import transformers
from safetensors.torch import load_file

print("torch", torch.__version__, "transformers", transformers.__version__, "peft", peft.__version__)

model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
)
config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "up_proj", "down_proj"])
model = peft.get_peft_model(model, config)


def saved():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_pretrained("saved")
    return set(load_file("saved/adapter_model.safetensors")), [str(warning.message) for warning in caught]


alone, _ = saved()
model.add_adapter("second", config)
beside_second, _ = saved()
model.delete_adapter("second")
model.add_adapter("mlp", config)
beside_mlp, said = saved()
for what, keys in {"alone": alone, 'beside "second"': beside_second, 'beside "mlp"': beside_mlp}.items():
    print(f'the file of "default", {what}: {len(keys)} tensors')
print("warnings while saving:", said)
print("missing:", *sorted(alone - beside_mlp), sep="\n  ")

if beside_second != alone:
    raise SystemExit("Not as described: a second adapter of any name takes tensors away.")
if {key for key in alone if ".mlp." in key} != alone - beside_mlp:
    raise SystemExit('Not as described: what "default" has within the MLPs is saved.')
if said:
    raise SystemExit("Not as described: PEFT warns while saving.")
PYTHON
