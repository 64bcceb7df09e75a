"""Scripts written for PEFT run with their import line changed and nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# How PEFT's own guides train (IA)3: a loop of one's own over an encoder-decoder, the adapter saved,
# and loaded again in the order of the config, the base model it names, and the adapter.
SEQ2SEQ = """
from peft import IA3Config, PeftConfig, PeftModel, TaskType
from peft import get_peft_model, get_peft_model_state_dict

import os, sys, torch
from torch.utils.data import DataLoader
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration
from transformers import get_linear_schedule_with_warmup

folder = sys.argv[1]
base_name, adapter_name = os.path.join(folder, "base"), os.path.join(folder, "adapter")
torch.manual_seed(0)
T5ForConditionalGeneration(
    T5Config(
        vocab_size=48, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=2, tie_word_embeddings=False,
    )
).save_pretrained(base_name)

prompts = torch.randint(3, 48, (16, 7))
answers = torch.randint(3, 48, (16, 4))
rows = [
    {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "labels": answer}
    for prompt, answer in zip(prompts, answers)
]
loader = DataLoader(rows, batch_size=4, shuffle=True)

model = AutoModelForSeq2SeqLM.from_pretrained(base_name)
peft_config = IA3Config(task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False)
model = get_peft_model(model, peft_config)
model.print_trainable_parameters()
print(type(model).__name__, model.active_adapter)

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
schedule = get_linear_schedule_with_warmup(optimizer, 0, 2 * len(loader))
torch.manual_seed(1)
for epoch in range(2):
    model.train()
    total = 0.0
    for batch in loader:
        loss = model(**batch).loss
        total += loss.detach().float()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    print(f"epoch {epoch}: {total / len(loader):.5f}")
    model.eval()
    with torch.no_grad():
        print(f"evaluated: {model(**batch).loss.item():.5f}")

model.save_pretrained(adapter_name)
print(sorted(file for file in os.listdir(adapter_name) if file != "README.md"))

config = PeftConfig.from_pretrained(adapter_name)
print(config.peft_type == "IA3", config.task_type == TaskType.SEQ_2_SEQ_LM, config.inference_mode)
print(sorted(config.target_modules), sorted(config.feedforward_modules))
base = AutoModelForSeq2SeqLM.from_pretrained(config.base_model_name_or_path)
loaded = PeftModel.from_pretrained(base, adapter_name)
loaded.eval()
with torch.no_grad():
    print(f"loaded: {loaded(**batch).loss.item():.5f}")
    generated = loaded.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=6,
        num_beams=2, min_new_tokens=6, suppress_tokens=[0],
    )
    print(generated.tolist())
    with loaded.disable_adapter():
        print(f"without: {loaded(**batch).loss.item():.5f}")
for name, tensor in sorted(get_peft_model_state_dict(loaded).items()):
    print(name, tuple(tensor.shape), f"{tensor.double().sum().item():.3f}")
merged = loaded.merge_and_unload()
print(type(merged).__name__)
with torch.no_grad():
    print(f"merged: {merged(**batch).loss.item():.5f}")
"""

# transformers' Trainer over a classifier whose head trains too, with checkpoints.
TRAINER = """
from peft import AutoPeftModelForSequenceClassification, IA3Config, get_peft_model

import os, sys, torch
import numpy as np
from transformers import AutoModelForSequenceClassification, RobertaConfig
from transformers import RobertaForSequenceClassification, Trainer, TrainingArguments, set_seed

folder = sys.argv[1]
set_seed(0)
RobertaForSequenceClassification(
    RobertaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=20, num_labels=3, pad_token_id=1,
    )
).save_pretrained(os.path.join(folder, "base"))
model = AutoModelForSequenceClassification.from_pretrained(os.path.join(folder, "base"))
model = get_peft_model(model, IA3Config(task_type="SEQ_CLS", inference_mode=False))
model.print_trainable_parameters()

generator = np.random.default_rng(0)
rows = []
for index in range(24):
    label = index % 3
    ids = [3 + label, *generator.integers(3, 48, 8).tolist()]
    rows.append({"input_ids": ids, "attention_mask": [1] * 9, "label": label, "sentence": index})


def compute_metrics(prediction):
    logits, labels = prediction
    return {"accuracy": float((np.argmax(logits, axis=1) == labels).mean())}


arguments = TrainingArguments(
    output_dir=os.path.join(folder, "run"), learning_rate=1e-2, num_train_epochs=3,
    per_device_train_batch_size=8, per_device_eval_batch_size=8, weight_decay=0.01,
    eval_strategy="epoch", save_strategy="epoch", logging_strategy="epoch",
    load_best_model_at_end=True, label_names=["labels"],
    report_to="none", disable_tqdm=True, use_cpu=True,
)
trainer = Trainer(
    model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:12],
    compute_metrics=compute_metrics,
)
trainer.train()
for entry in trainer.state.log_history:
    for name in ("loss", "grad_norm", "eval_loss", "eval_accuracy"):
        if name in entry:
            print(entry["step"], name, f"{entry[name]:.4f}")
print(os.path.basename(trainer.state.best_model_checkpoint))
for step in (3, 6, 9):
    kept = os.listdir(os.path.join(folder, "run", f"checkpoint-{step}"))
    print(step, sorted(file for file in kept if file != "README.md"))
print(f"best: {trainer.evaluate()['eval_loss']:.4f}")
predictions = trainer.predict(rows[12:])
print(np.round(predictions.predictions, 3).tolist(), predictions.label_ids.tolist())
trainer.save_model(os.path.join(folder, "final"))
final = os.path.join(folder, "final")
again = AutoPeftModelForSequenceClassification.from_pretrained(final, num_labels=3)
inputs = torch.tensor([row["input_ids"] for row in rows[12:]])
with torch.no_grad():
    print([[round(score, 3) for score in scores] for scores in again(inputs).logits.tolist()])
"""


def run(script: str, folder: Path) -> list[str]:
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # What the Trainer prints of itself holds times.
    return [line for line in done.stdout.splitlines() if not line.startswith("{")]


NUMBER = re.compile(r"-?\d+\.\d+")


@pytest.mark.parametrize("script", [SEQ2SEQ, TRAINER], ids=["seq2seq", "Trainer"])
def test_prints_what_it_prints_with_peft(tmp_path, script):
    assert "from peft import" in script
    theirs = run(script, tmp_path / "peft")
    ours = run(script.replace("from peft import", "from ia3 import"), tmp_path / "ia3")
    assert len(ours) == len(theirs) > 10
    for our_line, their_line in zip(ours, theirs, strict=True):
        # Words and whole numbers are the same; fractions may differ in their last digits.
        assert NUMBER.sub("_", our_line) == NUMBER.sub("_", their_line)
        found, expected = (
            [float(number) for number in NUMBER.findall(line)] for line in (our_line, their_line)
        )
        assert found == pytest.approx(expected, rel=1e-3, abs=2e-3), our_line
