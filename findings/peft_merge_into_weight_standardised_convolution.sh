#!/usr/bin/env bash
# PEFT 0.21.2 with transformers 5.23.0: merging into the convolutions of a BiT (Big Transfer),
# WeightStandardizedConv2d. One expects merging to leave the output as it is, as it does for other convolutions. These
# are subclasses of Conv2d, so that PEFT wraps and merges them, but they standardise their weight in each call, after
# what was merged into it: a factor for each output channel, (IA)³, is divided out again, and the merged model is the
# base model to rounding. LoRA, which is added to the weight, comes out wrong as well. There is no warning, with
# safe_merge=True neither: whoever merges for deployment ships a model without its training.
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


def look(config):
    torch.manual_seed(0)
    model = transformers.BitModel(
        transformers.BitConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], num_groups=4)
    ).eval()
    image = torch.randn(1, 3, 32, 32)
    base = model(image).last_hidden_state
    model = peft.get_peft_model(model, config).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.add_(torch.rand_like(parameter))
    adapted = model(image).last_hidden_state
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merged = model.merge_and_unload(safe_merge=True)(image).last_hidden_state
    said = [str(warning.message) for warning in caught]

    def distance(one, other):
        return (one - other).abs().max().item()

    print(
        f"{config.peft_type.value}: adapted - base {distance(adapted, base):.1e}, "
        f"merged - adapted {distance(merged, adapted):.1e}, merged - base {distance(merged, base):.1e}, "
        f"warnings: {said}"
    )
    return distance(adapted, base), distance(merged, adapted), distance(merged, base), said


with torch.no_grad():
    ia3 = look(peft.IA3Config(target_modules=["conv2"], feedforward_modules=[]))
    lora = look(peft.LoraConfig(target_modules=["conv2"], r=2))

if ia3[0] < 1e-2 or lora[0] < 1e-2:
    raise SystemExit("Not as described: the adapters have no effect before they are merged.")
if ia3[1] < 1e-2 or lora[1] < 1e-2:
    raise SystemExit("Not as described: the merged model gives what the adapted one gave.")
if ia3[2] > 1e-4:
    raise SystemExit("Not as described: the merged (IA)³ model is not the base model.")
if ia3[3] or lora[3]:
    raise SystemExit("Not as described: PEFT warns when merging.")
PYTHON
