#!/usr/bin/env bash
# PEFT 0.21.2 with torch 2.13.0: saving a LoRA adapter of a model under FullyShardedDataParallel (FSDP 1) whose blocks
# are wrapped too, as PEFT's own fsdp_auto_wrap_policy wraps them. One expects get_peft_model_state_dict to give the
# adapter's tensors, as it does where the model is wrapped as a whole. With wrapped blocks it gives none, whether it
# is asked for the wrapped or the inner model, or given the full state dict: keys are sought by names of modules,
# which hold "_fsdp_wrapped_module", and keys of FSDP's state dicts do not. save_pretrained with the full state dict
# writes a file of no tensors, without a warning. It matters because that is the usual way to shard, and what is left
# after training is an adapter's file without adapter.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 safetensors==0.8.0
cd "$folder"
export HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore::FutureWarning

"$folder/venv/bin/python" - <<'PYTHON'
import copy
import os
import warnings

import peft
import torch
import transformers
from peft.utils.other import fsdp_auto_wrap_policy
from safetensors.torch import load_file
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

print("torch", torch.__version__, "transformers", transformers.__version__, "peft", peft.__version__)

torch.distributed.init_process_group("gloo", init_method=f"file://{os.getcwd()}/group", rank=0, world_size=1)
base = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
)
model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"]))
expected = len(peft.get_peft_model_state_dict(model))
print("tensors of the adapter:", expected)


def look(policy):
    sharded = FullyShardedDataParallel(
        copy.deepcopy(model), auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with FullyShardedDataParallel.state_dict_type(sharded, StateDictType.FULL_STATE_DICT):
            full = sharded.state_dict()
            numbers = {
                "in FSDP's state dict": sum("lora_" in key for key in full),
                "of the wrapped model": len(peft.get_peft_model_state_dict(sharded)),
                "of the inner model": len(peft.get_peft_model_state_dict(sharded.module)),
                "given the state dict": len(peft.get_peft_model_state_dict(sharded.module, state_dict=full)),
            }
            sharded.module.save_pretrained("saved", state_dict=full)
            numbers["in the file"] = len(load_file("saved/adapter_model.safetensors"))
    said = {str(warning.message) for warning in caught if warning.category is not FutureWarning}
    return list(numbers.values()), numbers, [message for message in said if "NO_SHARD" not in message]


whole, numbers, said = look(None)
print("the model wrapped as a whole:", numbers, "warnings:", said)
blocks, numbers, said = look(fsdp_auto_wrap_policy(model))
print("its blocks wrapped too:", numbers, "warnings:", said)
torch.distributed.destroy_process_group()

if whole != [expected] * 5 or blocks[0] != expected:
    raise SystemExit("Not as described: the adapter is not complete where the model is wrapped as a whole.")
if any(blocks[1:]):
    raise SystemExit("Not as described: some of the adapter is saved where blocks are wrapped.")
if said:
    raise SystemExit("Not as described: there is a warning.")
PYTHON
