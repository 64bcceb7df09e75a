#!/usr/bin/env bash
# PEFT 0.21.2: two (IA)³ adapters on one model, of which the second has other feedforward_modules. One expects each to
# follow its own config, as LoRA adapters of different ranks do: "first" rescales the input of down_proj, "second" its
# output. Whether input or output is rescaled belongs to the layer, though, and is settled by whichever adapter came
# first: "second" gets vectors for the input, with no warning, while its saved config says output. Its file cannot be
# loaded by itself, which is a size mismatch. It matters because another method than the configured one is trained,
# results depend on the order of adding, and the trained adapter works beside the first only.
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


def base():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
        )
    )


def config(feedforward_modules):
    return peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=feedforward_modules,
    )


def look(*adapters):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (name, feedforward), *others = adapters
        model = peft.get_peft_model(base(), config(feedforward), adapter_name=name)
        for name, feedforward in others:
            model.add_adapter(name, config(feedforward))
        model.save_pretrained("saved")
    said = [str(warning.message) for warning in caught if warning.category is not FutureWarning]
    vectors = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj").ia3_l
    shapes = {name: tuple(vectors[name].shape) for name, _ in adapters}
    print(f"added {' and '.join(name for name, _ in adapters)}: vectors of down_proj {shapes}, warnings: {said}")
    return shapes, said


def load():
    try:
        peft.PeftModel.from_pretrained(base(), "saved/second")
    except RuntimeError as error:
        print('  loading "second" by itself:', *str(error).splitlines()[:2], sep="\n    ")
        return False
    print('  loading "second" by itself: no error')
    return True


first, second = ("first", ["down_proj"]), ("second", [])
alone, _ = look(second)
alone_loads = load()
after, said = look(first, second)
after_loads = load()
before, _ = look(second, first)

if alone["second"] != (16, 1) or not alone_loads:
    raise SystemExit("Not as described: without feedforward_modules the output is not rescaled, or is not loaded.")
if after["second"] != (1, 64) or before["first"] != (16, 1):
    raise SystemExit("Not as described: the second adapter follows its own feedforward_modules.")
if after_loads:
    raise SystemExit("Not as described: the second adapter can be loaded by itself.")
if said:
    raise SystemExit("Not as described: PEFT warns.")
PYTHON
