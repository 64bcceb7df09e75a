"""Scripts written for PEFT run with their import line changed and nothing else."""

import os
import re
import subprocess
import sys

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
config = T5Config(
    vocab_size=48, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
    decoder_start_token_id=0, pad_token_id=0, eos_token_id=2, tie_word_embeddings=False,
)
T5ForConditionalGeneration(config).save_pretrained(base_name)

rows = [
    {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "labels": answer}
    for prompt, answer in zip(torch.randint(3, 48, (16, 7)), torch.randint(3, 48, (16, 4)))
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
config = RobertaConfig(
    vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=20, num_labels=3, pad_token_id=1,
)
RobertaForSequenceClassification(config).save_pretrained(os.path.join(folder, "base"))
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

# A causal model: configs from dictionaries, several adapters on one model, and what is asked of it.
CAUSAL = """
from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING, AutoPeftModelForCausalLM, IA3Config, PeftConfig, PeftModel,
    PeftType, TaskType, cast_mixed_precision_params, get_layer_status, get_model_status,
    get_peft_config, get_peft_model, load_peft_weights, prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)

import os, sys, torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

folder = sys.argv[1]
base_name = os.path.join(folder, "base")
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2,
)
LlamaForCausalLM(config).save_pretrained(base_name)
load = AutoModelForCausalLM.from_pretrained
ids = torch.randint(3, 64, (4, 9))


def train(model, steps=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"trained to {loss.item():.4f}")


def evaluate(model, what):
    with torch.no_grad():
        print(f"{what}: {model(input_ids=ids, labels=ids).loss.item():.4f}")


config = {"peft_type": "IA3", "task_type": "CAUSAL_LM", "inference_mode": False}
peft_config = get_peft_config({**config, "target_modules": ["k_proj", "v_proj", "down_proj"],
                               "feedforward_modules": ["down_proj"]})
print(type(peft_config).__name__, PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.IA3].__name__)
model = prepare_model_for_kbit_training(load(base_name), use_gradient_checkpointing=False)
model = get_peft_model(model, peft_config, "first", False)
model.print_trainable_parameters()
train(model)
model.save_pretrained(folder, selected_adapters=["first"])
first = os.path.join(folder, "first")

model = PeftModel.from_pretrained(load(base_name), first, is_trainable=True)
evaluate(model, "again")
train(model)
model.save_pretrained(os.path.join(folder, "second"))
print(sorted(os.listdir(os.path.join(folder, "second"))))
print(PeftConfig.from_pretrained(folder, subfolder="first").task_type == TaskType.CAUSAL_LM)

model = PeftModel.from_pretrained(
    load(base_name), first, "first", torch_dtype=torch.float32, device_map=None
)
report = model.load_adapter(os.path.join(folder, "second"), adapter_name="second")
print([key for key in report.missing_keys if "ia3" in key], report.unexpected_keys)
for name in ("first", "second"):
    model.set_adapter(name)
    print(model.active_adapter, model.active_peft_config.peft_type == PeftType.IA3)
    evaluate(model, name)
model.base_model.set_adapter(["first", "second"])
evaluate(model, "both")
model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "mean")
model.set_adapter("mean")
evaluate(model, "mean")
with model.disable_adapter():
    evaluate(model, "neither")
for status in (get_layer_status(model)[0], model.get_model_status(), get_model_status(model)):
    print(sorted((k, v) for k, v in vars(status).items() if k not in ("module_type", "devices")))
print(sorted(n for n, p in model.named_parameters() if p.requires_grad and "layers.0" in n)[0][-5:])
model.set_requires_grad(["first", "second"])
print(sum(p.requires_grad for p in model.parameters()), model.has_active_enabled_adapter)
model.delete_adapter("mean")
print(model.active_adapters, sorted(model.peft_config), model.supports_lora_conversion("first"))

weights = load_peft_weights(os.path.join(folder, "second"), "cpu")
print(sorted((name, tuple(value.shape)) for name, value in weights.items()))
print(set_peft_model_state_dict(model, weights, "first").unexpected_keys)
model.set_adapter("first")
evaluate(model, "second's values in first")
print(model.base_model_torch_dtype)
merged = model.merge_and_unload(False, True, ["first"])
evaluate(merged, "merged")
auto = AutoPeftModelForCausalLM.from_pretrained(
    os.path.join(folder, "second"), is_trainable=True, torch_dtype=torch.float32
)
evaluate(auto, "auto")
cast_mixed_precision_params(auto, torch.bfloat16)
print(sorted({str(p.dtype) for p in auto.parameters()}))
with torch.autocast("cpu", dtype=torch.bfloat16):
    train(auto, 1)
torch.manual_seed(0)
print(tuple(auto.generate(input_ids=ids[:1], max_new_tokens=3, min_new_tokens=3).shape))
"""

# The other tasks of PEFT's examples, each trained, saved and loaded onto a base model of its own.
TASKS = """
from peft import IA3Config, PeftModel, TaskType, get_peft_model

import copy, os, sys, torch
from transformers import (
    RobertaConfig, RobertaForQuestionAnswering, RobertaForTokenClassification, RobertaModel,
    ViTConfig, ViTForImageClassification, BertConfig, BertForSequenceClassification,
)

folder = sys.argv[1]
torch.manual_seed(0)
small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2}
three = {"num_labels": 3}
text = {"vocab_size": 48, "max_position_embeddings": 20}
ids = {"input_ids": torch.randint(3, 48, (4, 9))}
image = {"pixel_values": torch.randn(4, 3, 8, 8)}
cases = {
    "sequence": (BertForSequenceClassification(BertConfig(**small, **text, **three)),
                 {"task_type": "SEQ_CLS"}, {**ids, "labels": torch.tensor([0, 1, 2, 0])}),
    "tokens": (RobertaForTokenClassification(RobertaConfig(**small, **text, **three)),
               {"task_type": TaskType.TOKEN_CLS}, {**ids, "labels": torch.ones(4, 9).long()}),
    "questions": (RobertaForQuestionAnswering(RobertaConfig(**small, **text)),
                  {"task_type": "QUESTION_ANS"},
                  {**ids, "start_positions": torch.ones(4).long(),
                   "end_positions": torch.full((4,), 3)}),
    "features": (RobertaModel(RobertaConfig(**small, **text), add_pooling_layer=False),
                 {"task_type": "FEATURE_EXTRACTION"}, ids),
    "images": (ViTForImageClassification(ViTConfig(**small, **three, image_size=8, patch_size=4)),
               {"target_modules": ["q_proj", "v_proj", "fc2"], "feedforward_modules": ["fc2"],
                "modules_to_save": ["classifier"]},
               {**image, "labels": torch.tensor([0, 1, 2, 0])}),
}


def result(model, batch):
    torch.manual_seed(1)
    outputs = model(**batch)
    loss = outputs.get("loss")
    return outputs.last_hidden_state.square().mean() if loss is None else loss


for name, (base, config, batch) in cases.items():
    model = get_peft_model(copy.deepcopy(base), IA3Config(**config))
    print(name, isinstance(model, PeftModel))
    model.print_trainable_parameters()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        loss = result(model.train(), batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"{name}: {loss.item():.4f}")
    model.eval()
    with torch.no_grad():
        print(f"{name}, trained: {result(model, batch).item():.4f}")
        model.save_pretrained(os.path.join(folder, name))
        again = PeftModel.from_pretrained(copy.deepcopy(base), os.path.join(folder, name))
        print(f"{name}, again: {result(again, batch).item():.4f}")
        again.load_adapter(os.path.join(folder, name), "twin")
        again.set_adapter("twin")
        print(f"{name}, twin: {result(again, batch).item():.4f}")
        merged = again.merge_and_unload()
        print(f"{name}, merged: {result(merged, batch).item():.4f}", type(merged).__name__)
"""

# Without a wrapper: PEFT's low-level functions on a model of one's own.
INJECTED = """
from peft import IA3Config, get_layer_status, get_peft_model_state_dict, inject_adapter_in_model
from peft import set_peft_model_state_dict

import torch


class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 10)
        self.linear = torch.nn.Linear(10, 10)
        self.lm_head = torch.nn.Linear(10, 10)

    def forward(self, ids):
        return self.lm_head(self.linear(self.embedding(ids)).relu())


torch.manual_seed(0)
ids = torch.arange(10)[None]
model, plain = Own(), Own()
plain.load_state_dict(model.state_dict())
config = IA3Config(target_modules=["linear", "lm_head"], feedforward_modules=["lm_head"])
model = inject_adapter_in_model(config, model)
print(type(model).__name__, sorted(n for n, p in model.named_parameters() if "ia3" in n))
vectors = [p for n, p in model.named_parameters() if "ia3" in n]
print([bool(vector.requires_grad) for vector in vectors])
optimizer = torch.optim.SGD(vectors, lr=0.5)
for step in range(5):
    loss = torch.nn.functional.cross_entropy(model(ids)[0], ids[0])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: {loss.item():.4f}")
tensors = get_peft_model_state_dict(model)
print(sorted((name, tuple(value.shape)) for name, value in tensors.items()))
again = inject_adapter_in_model(config, plain, "other")
report = set_peft_model_state_dict(again, tensors, "other")
print([key for key in report.missing_keys if "ia3" in key], report.unexpected_keys)
print(f"again: {torch.nn.functional.cross_entropy(again(ids)[0], ids[0]).item():.4f}")
print([(status.name, status.available_adapters) for status in get_layer_status(again)])
"""


def run(script, folder):
    folder.mkdir()
    command = [sys.executable, "-W", "ignore", "-c", script, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    # What the Trainer prints of itself holds times.
    return [line for line in done.stdout.splitlines() if not line.startswith("{")]


NUMBER = re.compile(r"-?\d+\.\d+")


SCRIPTS = {
    "seq2seq": SEQ2SEQ,
    "Trainer": TRAINER,
    "causal": CAUSAL,
    "tasks": TASKS,
    "injected": INJECTED,
}


# All but one are slow.
@pytest.mark.parametrize(
    "script",
    [
        pytest.param(script, id=name, marks=[pytest.mark.slow] if name != "causal" else [])
        for name, script in SCRIPTS.items()
    ],
)
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
