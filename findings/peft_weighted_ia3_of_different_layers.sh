#!/usr/bin/env bash
# PEFT 0.21.2: add_weighted_adapter of (IA)³ adapters that do not target the same layers. An (IA)³ adapter leaves a
# layer as it is by a vector of ones there, or by none at all, and one expects both to give the same mixture. A
# missing vector counts as zeros, though: with an adapter on the keys, another on the values, and weights 0.5 and 0.5,
# which sum to 1, keys and values are halved, even if both adapters are as initialised and have no effect. Over the
# same layers they mix to ones. There is no error and no warning. It matters because the combination of layers is
# supported (the mixture targets all of them), and its bad scores look like those of adapters that do not mix.
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

tokens = torch.tensor([[1, 2, 3, 4]])


def look(first, second):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            initializer_range=0.5,
        )
    ).eval()
    base = model(tokens).logits

    def config(targets):
        return peft.IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=[])

    def effect(name):
        model.set_adapter(name)
        return (model(tokens).logits - base).abs().max().item()

    model = peft.get_peft_model(model, config(first), adapter_name="first").eval()
    model.add_adapter("second", config(second))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "mixture")
    said = [str(warning.message) for warning in caught if warning.category is not FutureWarning]
    vectors = [parameter for name, parameter in model.named_parameters() if name.endswith("ia3_l.mixture")]
    values = sorted(set(torch.cat([vector.flatten() for vector in vectors]).tolist()))
    effects = [effect(name) for name in ("first", "second", "mixture")]
    print(f"first on {first}, second on {second}: the mixture's vectors hold {values}, warnings: {said}")
    print("  change of the output by first, second, mixture:", *(f"{value:.1e}" for value in effects))
    return effects, values, said


with torch.no_grad():
    same = look(["k_proj", "v_proj"], ["k_proj", "v_proj"])
    different = look(["k_proj"], ["v_proj"])

if max(same[0]) > 1e-4 or max(different[0][:2]) > 1e-4:
    raise SystemExit("Not as described: adapters of ones, or their mixture over the same layers, have an effect.")
if different[0][2] < 1e-2 or different[1] != [0.5]:
    raise SystemExit("Not as described: a missing vector does not count as zeros.")
if different[2]:
    raise SystemExit("Not as described: PEFT warns of layers that not all adapters have.")
PYTHON
