#!/usr/bin/env bash
# PEFT 0.21.2: IA3Config(feedforward_modules="down_proj"), one name instead of a list of one. The docstring says that
# it must be a name or a subset of the names in target_modules, so that one expects both to do the same: the vector
# rescales the input of down_proj, the MLP's activations, as in the paper. A string is a regular expression for the
# whole name of a module, though, and "down_proj" matches none: down_proj stays a target, but its output is rescaled,
# by a vector of another size. There is no error and no warning. It matters because another method is trained, with
# fewer parameters, and its files do not fit a correct model.
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


def look(feedforward_modules):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
        )
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.get_peft_model(
            model,
            peft.IA3Config(
                task_type="CAUSAL_LM",
                target_modules=["k_proj", "v_proj", "down_proj"],
                feedforward_modules=feedforward_modules,
            ),
        )
    said = [str(warning.message) for warning in caught if warning.category is not FutureWarning]
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    side = "input" if layer.is_feedforward else "output"
    shape = tuple(layer.ia3_l["default"].shape)
    trainable, _ = model.get_nb_trainable_parameters()
    print(
        f"feedforward_modules={feedforward_modules!r}: down_proj's {side} is rescaled, the vector's shape is {shape}, "
        f"{trainable} trainable parameters, warnings: {said}"
    )
    return side, said


listed, _ = look(["down_proj"])
named, said = look("down_proj")

if listed != "input":
    raise SystemExit("Not as described: a list of one does not rescale the input.")
if named != "output":
    raise SystemExit("Not as described: one name rescales the input, as a list of one does.")
if said:
    raise SystemExit("Not as described: PEFT warns of a name that matches nothing.")
PYTHON
