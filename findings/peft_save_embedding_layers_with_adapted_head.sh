#!/usr/bin/env bash
# PEFT 0.21.2: save_pretrained(save_embedding_layers=True) after the vocabulary was extended. One expects both
# embedding layers in the adapter's file, the input's and the output's, as long as they are not tied. So it is, unless
# lm_head is among the targets: then the base weight of lm_head is saved and the input embeddings are not, although
# both were resized, and although saving was asked for explicitly. Whoever resizes a fresh base model and loads the
# adapter gets other random rows for the new tokens, and other outputs. It matters because both steps follow the
# documentation, and neither saving nor loading warns.
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


def base(seed):
    torch.manual_seed(0)  # the same "pretrained" weights each time
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
        )
    )
    torch.manual_seed(seed)  # the new tokens' rows are random
    model.resize_token_embeddings(40, mean_resizing=False)
    return model.eval()


def look(targets):
    tokens = torch.tensor([[38, 39, 3]])
    model = peft.get_peft_model(base(1), peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets)).eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_pretrained("saved", save_embedding_layers=True)
        loaded = peft.PeftModel.from_pretrained(base(2), "saved").eval()
    said = [str(warning.message) for warning in caught if warning.category is not FutureWarning]
    keys = [key for key in load_file("saved/adapter_model.safetensors") if "lora_" not in key]
    with torch.no_grad():
        off = (loaded(tokens).logits - model(tokens).logits).abs().max().item()
    print(f"targets {targets}: saved {keys}, loaded model off by {off:.1e}, warnings: {said}")
    return any("embed_tokens" in key for key in keys), off, said


without = look(["q_proj"])
with_head = look(["q_proj", "lm_head"])

if not without[0] or without[1] > 1e-5:
    raise SystemExit("Not as described: the input embeddings are not saved without a target on lm_head either.")
if with_head[0] or with_head[1] < 1e-2:
    raise SystemExit("Not as described: the input embeddings are saved with a target on lm_head.")
if with_head[2]:
    raise SystemExit("Not as described: saving or loading warns.")
PYTHON
