#!/usr/bin/env bash
# transformers 5.23.0 with PEFT 0.21.2: model.resize_token_embeddings(n) where the vocabulary has n tokens already.
# One expects a call that changes no size to change nothing; scripts make it in any case, with len(tokenizer). It sets
# requires_grad of all parameters of the embedding module to that of its weight, without a warning. With LoRA on
# embed_tokens the weight is frozen, and the call freezes the adapter in that layer with it. With
# modules_to_save=["embed_tokens"] it is the other way round: the original weight, which must stay, is trainable now.
# It matters because the loss goes down all the same, while the adapter of the embeddings is never trained.
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
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
        )
    )
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, **options))

    def trainable():
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    before = trainable()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.resize_token_embeddings(32)
    after = trainable()
    print(options)
    print("  frozen by the call:", sorted(before - after) or "nothing")
    print("  trainable by the call:", sorted(after - before) or "nothing")
    print("  warnings:", [str(warning.message) for warning in caught])
    return before - after, after - before, caught


frozen, _, said = look(target_modules=["q_proj", "embed_tokens"])
_, thawed, said_too = look(target_modules=["q_proj"], modules_to_save=["embed_tokens"])

if not frozen or not all("embed_tokens.lora_" in name for name in frozen):
    raise SystemExit("Not as described: the adapter on the embeddings stays trainable.")
if not any("embed_tokens.original_module" in name for name in thawed):
    raise SystemExit("Not as described: the original embeddings stay frozen.")
if said or said_too:
    raise SystemExit("Not as described: the call warns.")
PYTHON
