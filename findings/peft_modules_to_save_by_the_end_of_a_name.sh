#!/usr/bin/env bash
# PEFT 0.21.2: LoraConfig(modules_to_save=["norm"]) on a Qwen3, to train its last norm, "model.norm", with the adapter.
# One expects names to be compared as for target_modules: there "proj" is not found, as no module has that name, and
# "q_proj" is needed. modules_to_save takes every module whose full name ends in these letters, so that "norm" also
# takes input_layernorm, post_attention_layernorm, q_norm and k_norm of each block: 9 modules instead of one below.
# exclude_modules does not help, and only the full name ("model.norm") does. It matters because many more weights than
# meant are trained, and saved, without a warning; with 36 layers it is 145 norms instead of one.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
cd "$folder"
export HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore::FutureWarning

"$folder/venv/bin/python" - <<'PYTHON'
import warnings

import peft
import torch
import transformers

print("torch", torch.__version__, "transformers", transformers.__version__, "peft", peft.__version__)


def look(**options):
    model = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, head_dim=8,
        )
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, **options))
    said = [str(warning.message) for warning in caught if warning.category is not FutureWarning]
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_" not in name]
    print(f"{options}: warnings {said}, trained besides LoRA:")
    names = [name.removeprefix("base_model.model.").replace(".modules_to_save.default.weight", "") for name in names]
    print("  " + "\n  ".join(names))
    return names, said


try:
    look(target_modules=["proj"])
    raised = None
except ValueError as error:
    raised = error
print('target_modules=["proj"]:', repr(raised))

full, _ = look(target_modules=["q_proj"], modules_to_save=["model.norm"])
short, said = look(target_modules=["q_proj"], modules_to_save=["norm"])
excluded, _ = look(
    target_modules=["q_proj"], modules_to_save=["norm"],
    exclude_modules=["input_layernorm", "post_attention_layernorm", "q_norm", "k_norm"],
)

if raised is None:
    raise SystemExit("Not as described: target_modules takes the end of a name too.")
if full != ["model.norm"]:
    raise SystemExit("Not as described: the full name takes other modules too.")
ends = {name.split(".")[-1] for name in short}
if len(short) != 9 or ends != {"norm", "q_norm", "k_norm", "input_layernorm", "post_attention_layernorm"}:
    raise SystemExit('Not as described: "norm" does not take all names that end so.')
if excluded != short:
    raise SystemExit("Not as described: exclude_modules has an effect.")
if said:
    raise SystemExit("Not as described: PEFT warns.")
PYTHON
