"""Supervised fine-tuning with TRL: a small model learns to write a lighthouse keeper's log.

In one process, or in several, with the same result:

    pip install 'ia3[smollm2,peft]' trl
    python sft.py
    torchrun --nproc-per-node 2 sft.py
"""

import argparse
import os
from pathlib import Path

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import ia3

HERE = Path(__file__).parent
EXAMPLES_A_STEP = 4

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--out", default="log-adapter", help="folder of the adapter and checkpoints")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
given = parser.parse_args()

lines = [{"text": line} for line in (HERE / "log.txt").read_text().splitlines()]
learned, held_out = lines[:-4], lines[-4:]

base = ia3.load_base_model("smollm2-135m-instruct")
model = ia3.get_peft_model(base.model, ia3.IA3Config(task_type="CAUSAL_LM"))
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        given.out,
        max_steps=given.steps,
        # What one process learns from in a step, several share.
        per_device_train_batch_size=max(
            1, EXAMPLES_A_STEP // int(os.environ.get("WORLD_SIZE", "1"))
        ),
        learning_rate=2e-2,  # (IA)³ has few values: ten times and more what LoRA takes
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        save_steps=10,
        eval_strategy="steps",
        eval_steps=10,
        load_best_model_at_end=True,
        logging_steps=5,
        # Without this, processes on CPUs would each train by themselves.
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        report_to="none",
    ),
    train_dataset=Dataset.from_list(learned),
    eval_dataset=Dataset.from_list(held_out),
    processing_class=base.tokenizer,
)
before = trainer.evaluate()["eval_loss"]
trainer.train(resume_from_checkpoint=given.resume or None)
after = trainer.evaluate()["eval_loss"]
trainer.save_model()

if trainer.is_world_process_zero():
    begun = base.tokenizer("Second of April.", return_tensors="pt").to(base.device)
    written = model.eval().generate(**begun, max_new_tokens=24, do_sample=False)
    print(f"loss on lines that were held out: {before:.3f}, then {after:.3f}")
    print(base.tokenizer.decode(written[0], skip_special_tokens=True))
