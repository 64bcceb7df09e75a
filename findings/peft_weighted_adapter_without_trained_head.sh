#!/usr/bin/env bash
# PEFT 0.21.2: add_weighted_adapter with a classifier, whose head is trained along with the adapter (modules_to_save).
# Where two of the adapters have a head, it raises an error: heads are not mixed. Where only one has, as after mixing
# a classifier with an adapter of the language model, one expects that head to be taken along: nothing else could be
# meant. The mixture gets a head of its own instead, a fresh copy of the base model's, which is random there. There is
# no warning, and the file of the saved mixture holds that head. With one adapter and weight 1, which should be a
# copy, it is the same. It matters because such a mixture guesses, and its bad scores look like those of the weights.
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


def look(config_class, prefix, **options):
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_labels=3, pad_token_id=0,
        )
    )
    # modules_to_save by hand, not by task_type="SEQ_CLS", which would give a head to each adapter
    model = peft.get_peft_model(model, config_class(modules_to_save=["score"], **options), adapter_name="classifier")
    model.add_adapter("language", config_class(**options))
    for name, parameter in model.named_parameters():
        if prefix in name or "modules_to_save.classifier" in name:  # in place of two trainings
            parameter += torch.randn_like(parameter)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.add_weighted_adapter(["classifier", "language"], [0.5, 0.5], "mixture")
        model.add_weighted_adapter(["classifier"], [1.0], "alone")
        model.save_pretrained("saved")
    said = [str(warning.message) for warning in caught if warning.category is not FutureWarning]
    heads = model.base_model.model.score
    trained, random = heads.modules_to_save["classifier"].weight, heads.original_module.weight
    results = []
    for name in ("mixture", "alone"):
        head = load_file(f"saved/{name}/adapter_model.safetensors")["base_model.model.score.weight"]
        results.append(["random" if torch.equal(head, random) else "trained" if torch.equal(head, trained) else "new"])
        print(
            f"{model.peft_config[name].peft_type.value}, the head of {name!r}: {(head - trained).abs().max():.1e} from "
            f"the trained one, {(head - random).abs().max():.1e} from the base model's, warnings: {said}"
        )
    model.add_adapter("another", config_class(modules_to_save=["score"], **options))
    try:
        model.add_weighted_adapter(["classifier", "another"], [0.5, 0.5], "two heads")
        raised = None
    except ValueError as error:
        raised = error
    print("  two adapters with heads:", repr(raised))
    return results, said, raised


with torch.no_grad():
    targets = ["k_proj", "v_proj"]
    ia3 = look(peft.IA3Config, "ia3_l", target_modules=targets, feedforward_modules=[])
    lora = look(peft.LoraConfig, "lora_", target_modules=targets, r=2)

for results, said, raised in (ia3, lora):
    if results != [["random"], ["random"]]:
        raise SystemExit("Not as described: the mixture's head is not the base model's.")
    if said:
        raise SystemExit("Not as described: PEFT warns of the head.")
    if raised is None:
        raise SystemExit("Not as described: two adapters with heads can be mixed.")
PYTHON
