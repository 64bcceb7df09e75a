#!/usr/bin/env bash
# TRL 1.16.0 with PEFT 0.21.2: DPOTrainer is given a PEFT model with an adapter that is trained, and no reference
# model. One expects the reference to be a frozen copy of that adapter, which the trainer keeps as a second adapter,
# "ref", so that policy and reference agree at the first step and its loss is ln 2 = 0.6931: so it is with LoRA. With
# (IA)³ nothing is copied, and nothing is said: parameters are copied whose names hold ".default.", and those of (IA)³
# end in ".default". The reference is an adapter of ones, which is the base model; the trainers for GRPO, RLOO and KTO
# have the same lines. It matters because training holds the policy near a model that it was not started from, and the
# logged rewards are relative to that one.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 \
  trl==1.16.0 datasets==5.2.0
cd "$folder"
export HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore::FutureWarning

"$folder/venv/bin/python" - <<'PYTHON'
import math

import peft
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers

print("torch", torch.__version__, "transformers", transformers.__version__)
print("peft", peft.__version__, "trl", trl.__version__)

words = ["<pad>", "<eos>", "<unk>", "one", "two", "three", "four", "five"]
tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
)
rows = Dataset.from_list([{"prompt": "one two", "chosen": " three four", "rejected": " five five"}] * 4)


def first_step(config):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, initializer_range=0.5, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )
    )
    model = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():  # in place of an earlier training
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter)
    trained = {name: parameter.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    trainer = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(
            output_dir="out", max_steps=1, logging_steps=1, per_device_train_batch_size=4, report_to="none",
            save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    parameters = dict(trainer.model.named_parameters())
    # The adapter's name is the last or the last but one part of a parameter's name.
    copies = [
        torch.equal(value, parameters[".".join("ref" if part == "default" else part for part in name.split("."))])
        for name, value in trained.items()
    ]
    trainer.train()
    return sum(copies), len(copies), trainer.state.log_history[0]["loss"]


targets = ["k_proj", "v_proj", "down_proj"]
lora = first_step(peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets))
ia3 = first_step(peft.IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=["down_proj"]))
for name, (equal, parameters, loss) in {"LoRA": lora, "(IA)³": ia3}.items():
    print(f"{name}: {equal} of {parameters} parameters of the reference equal the trained ones, first loss {loss:.4f}")

if lora[0] != lora[1] or abs(lora[2] - math.log(2)) > 1e-3:
    raise SystemExit("Not as described: with LoRA the reference is not the trained adapter either.")
if ia3[0] or abs(ia3[2] - math.log(2)) < 1e-3:
    raise SystemExit("Not as described: with (IA)³ the reference is the trained adapter.")
PYTHON
