"""Direct preference optimization with TRL: a small model learns to answer shortly.

In one process, or in several, with the same result:

    pip install 'ia3[smollm2,peft]' trl
    python dpo.py
    torchrun --nproc-per-node 2 dpo.py
"""

import argparse
import json
import os
from pathlib import Path

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

import ia3

HERE = Path(__file__).parent
EXAMPLES_A_STEP = 4

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--out", default="answers-adapter", help="folder of adapter and checkpoints")
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
given = parser.parse_args()


def as_pair(line):
    """A question with the answer that is wanted, and one that is not."""
    row = json.loads(line)
    return {
        "prompt": f"Question: {row['prompt']}\nAnswer:",
        "chosen": f" {row['chosen']}",
        "rejected": f" {row['rejected']}",
    }


pairs = [as_pair(line) for line in (HERE / "answers.jsonl").read_text().splitlines()]
learned, held_out = pairs[:-8], pairs[-8:]

base = ia3.load_base_model("smollm2-135m-instruct")
model = ia3.get_peft_model(base.model, ia3.IA3Config(task_type="CAUSAL_LM"))
trainer = DPOTrainer(
    model=model,
    args=DPOConfig(
        given.out,
        max_steps=given.steps,
        # What one process learns from in a step, several share.
        per_device_train_batch_size=max(
            1, EXAMPLES_A_STEP // int(os.environ.get("WORLD_SIZE", "1"))
        ),
        learning_rate=1e-2,  # (IA)³ has few values: ten times and more what LoRA takes
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        save_steps=5,
        eval_strategy="steps",
        eval_steps=5,
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
# The trainer has added a second adapter as its reference. Without that, the reference is the base
# model: the same weights, with the adapter off.
model.delete_adapter("ref")
trainer.train(resume_from_checkpoint=given.resume or None)
measured = trainer.evaluate()
trainer.save_model()

if trainer.is_world_process_zero():
    asked = base.tokenizer("Question: Which animal says moo?\nAnswer:", return_tensors="pt")
    asked = asked.to(base.device)
    answer = model.eval().generate(**asked, max_new_tokens=24, do_sample=False)
    print(f"held-out pairs in the right order: {measured['eval_rewards/accuracies']:.2f}")
    print(f"loss on them: {measured['eval_loss']:.3f}; it was 0.693 before")
    print(base.tokenizer.decode(answer[0, asked.input_ids.shape[1] :], skip_special_tokens=True))
