#!/usr/bin/env bash
# PEFT 0.21.2: add_weighted_adapter under a name that an adapter has already. One expects the new mixture under that
# name, or an error, as add_adapter raises one. The call returns at once, without a warning: the adapter stays what
# it was, whatever weights, adapters and combination_type are given. So it is for (IA)³ and for LoRA, and no docstring
# says so. It matters because mixtures are searched in a loop over weights, with one name for the mixture: each round
# evaluates the first one, all scores are the same, and "the best weights" are those of whichever round was first.
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
grid = [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]


def look(config, prefix, **options):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            initializer_range=0.5,
        )
    )
    model = peft.get_peft_model(model, config, adapter_name="first").eval()
    model.add_adapter("second", config)
    for name, parameter in model.named_parameters():
        if prefix in name:  # in place of two trainings
            parameter += torch.randn_like(parameter)

    def outputs(names):
        for name, weights in zip(names, grid):
            model.add_weighted_adapter(["first", "second"], weights, name, **options)
            model.set_adapter(name)
            yield model(tokens).logits

    def spread(names):
        one, *others = outputs(names)
        return [(other - one).abs().max().item() for other in others]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        apart, same = spread(["a", "b", "c"]), spread(["mixture"] * 3)
    said = [str(warning.message) for warning in caught if warning.category is not FutureWarning]
    print(f"{config.peft_type.value}, outputs for {grid[1:]} against those for {grid[0]}:")
    print("  each under a name of its own, they differ by", *(f"{distance:.1e}" for distance in apart))
    print("  all under one name, they differ by", *(f"{distance:.1e}" for distance in same), "and warnings are", said)
    try:
        model.add_adapter("mixture", config)
        raised = None
    except ValueError as error:
        raised = error
    print("  add_adapter under that name raises", repr(raised))
    return apart, same, said, raised


with torch.no_grad():
    targets = ["k_proj", "v_proj"]
    ia3 = look(peft.IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=[]), "ia3_l")
    lora = look(peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets), "lora_", combination_type="cat")

for apart, same, said, raised in (ia3, lora):
    if min(apart) < 1e-2:
        raise SystemExit("Not as described: the weights make no difference even under names of their own.")
    if max(same) > 0:
        raise SystemExit("Not as described: the second call makes another mixture.")
    if said:
        raise SystemExit("Not as described: PEFT warns of the name.")
    if raised is None:
        raise SystemExit("Not as described: add_adapter takes a name that is in use.")
PYTHON
