"""What each part of the recipe is worth, and (IA)³ against LoRA and BitFit, on one small model.

    python benchmarks/ablation.py --data DIR [--pretrained ADAPTER] [--seeds 5] [--workers 2]

Four tasks: SST-2 and TREC (16 examples a class, 150 test rows), RAFT's overruling (25 of its 50
labelled examples train, the others test), and COPA (the T-Few authors' samples: one trains, the
others test). Every run is a process with one thread, so that several can share a machine. Results
are appended to a JSON Lines file, and finished runs are not repeated; the table is printed last.

`upper-15` and `upper-10` rescale only so many of the model's 30 blocks, the uppermost.
`lm`, `lm+ln` and `lm+ul` leave loss terms out; `pretrained` begins with the vectors of an adapter;
`+eos` scores an end-of-text token after every choice, in training and after it. LoRA and BitFit
come from `peft`, train with the same three loss terms, and have AdamW, as Adafactor's steps in
proportion to a parameter's size hardly move one that begins at zero.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from few_shot_data import TASKS as FEW_SHOT_TASKS, sample_few_shot
from reporting import add_results_option, run_missing

if TYPE_CHECKING:
    from torch import nn

    from ia3.base.loading import BaseModel
    from ia3.tfew.prompts.encoding import EncodedExample, TrainingExample
    from ia3.tfew.prompts.tasks import Task

TASKS = ("sst2", "trec", "overruling", "copa")
# Method -> weights of the loss's terms.
ALL_TERMS = {"lm": 1.0, "length_norm": 1.0, "unlikelihood": 1.0}
METHODS: dict[str, dict[str, float]] = {
    "untuned": {},
    "lm": {"length_norm": 0.0, "unlikelihood": 0.0},
    "lm+ln": {"unlikelihood": 0.0},
    "lm+ul": {"length_norm": 0.0},
    "tfew": {},
    "pretrained": {},
    "upper-15": {},
    "upper-10": {},
    "lora": {},
    "bitfit": {},
    "untuned+eos": {},
    "tfew+eos": {},
}
STEPS = 40
BATCH = 8
TEST_ROWS = 150
# (IA)³'s rate is FewShotClassifier's; the peers' were the best of 5e-4, 2e-3, 5e-3 and 1e-2 (LoRA)
# and of 1e-3, 3e-3 and 1e-2 (BitFit) on rows of SST-2's and TREC's training files.
RATES = {"ia3": 1e-2, "lora": 5e-3, "bitfit": 3e-3}
LORA_RANK = 4
# What a user would write: what the text is, and words that ask for the label; written and chosen on
# rows of the training files.
TEMPLATES = {
    "sst2": "Review: {{ text }}\nSentiment:",
    "trec": "Question: {{ text }}\nThe answer is a",
}
TREC_WORDS = {
    "abbreviation": "abbreviation",
    "description": "explanation",
    "entity": "thing",
    "location": "place",
    "number": "number",
    "person": "person",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing in the results file, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with sst2/, raft/, ...")
    parser.add_argument("--pretrained", type=Path, help="adapter for the method 'pretrained'")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="which to run"
    )
    parser.add_argument("--seeds", type=int, default=5, help="samples of each task")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, each on one thread")
    add_results_option(parser, "ablation.jsonl")
    parser.add_argument("--picture", type=Path, help="also draw the table into this file")
    parser.add_argument(
        "--one",
        nargs=4,
        metavar=("METHOD", "TASK", "SEED", "RATE"),
        help="one run alone, its result printed",
    )
    given = parser.parse_args(arguments)
    if given.one:
        method, task, seed, rate = given.one
        print(json.dumps(run(method, task, int(seed), float(rate), given.data, given.pretrained)))
        return
    methods = [m for m in given.methods if m != "pretrained" or given.pretrained]
    keys = [
        {"method": m, "task": task, "seed": seed, "rate": RATES.get(m, RATES["ia3"])}
        for seed in range(given.seeds)
        for task in TASKS
        for m in methods
    ]
    options = ["--data", str(given.data)]
    if given.pretrained:
        options += ["--pretrained", str(given.pretrained)]
    done = run_missing(__file__, keys, given.results, options, workers=given.workers, threads=1)
    reported = [run for run in done if any(key.items() <= run.items() for key in keys)]
    print(table(reported))
    if given.picture:
        picture(reported, given.picture)


def run(
    method: str, name: str, seed: int, rate: float, data: Path, pretrained: Path | None
) -> dict[str, Any]:
    """Train one method on one sample, and score its test rows."""
    import torch

    import ia3
    from ia3.tfew.prompts.encoding import Encoder
    from ia3.tfew.prompts.tasks import encode_labelled
    from ia3.tfew.scoring.evaluation import predict_choices

    base = ia3.load_base_model("smollm2-135m-instruct")
    base.model.requires_grad_(False)
    task = read(name, seed, data)
    encoder = Encoder(base, chat=False)
    examples = task.training_examples(encoder)
    test = [e for row in task.test if (e := encode_labelled(encoder, task.templates[0], row))]
    if method.endswith("+eos"):
        end = base.tokenizer.eos_token_id
        examples = [replace(x, encoded=tuple(_ended(e, end) for e in x.encoded)) for x in examples]
        test = [(_ended(encoded, end), answer) for encoded, answer in test]
    started = time.perf_counter()
    torch.manual_seed(seed)
    if method in ("lora", "bitfit"):
        trained = _train_peer(base, method, examples, seed, rate)
    elif method.startswith("untuned"):
        trained = 0
    else:
        weights = ALL_TERMS | METHODS[method]
        trained = _train_ia3(base, examples, seed, rate, weights, pretrained, method)
    seconds = time.perf_counter() - started
    base.model.eval()
    predicted = predict_choices(base, [encoded for encoded, _ in test])
    right = sum(p == answer for p, (_, answer) in zip(predicted, test, strict=True))
    return {
        "method": method,
        "task": name,
        "seed": seed,
        "rate": rate,
        "steps": STEPS,
        "accuracy": right / len(test),
        "test_rows": len(test),
        "trained_values": trained,
        "train_seconds": round(seconds, 1),
    }


def read(name: str, seed: int, data: Path) -> Task:
    """A task with the training sample of a seed, and its one template."""
    from ia3.files.rows import read_rows
    from ia3.tfew.prompts.tasks import SEEDS, Task, few_shot, load_templates

    if name in ("sst2", "trec"):
        whole_train, whole = FEW_SHOT_TASKS[name].read(data)
        train = sample_few_shot(whole_train, 16, seed)
        test = random.Random(0).sample(whole, TEST_ROWS)
        words = TREC_WORDS if name == "trec" else {"negative": "negative", "positive": "positive"}
        rows = [[{"text": t, "answer": words[x]} for t, x in part] for part in (train, test)]
        template = _template(name, TEMPLATES[name], "answer", list(words.values()))
        return Task(name, [template], *rows)
    if name == "overruling":
        rows_read = read_rows(data / "raft" / name / "train.csv")
        train_rows = few_shot(rows_read, 25, seed)
        test_rows = [row for row in rows_read if row not in train_rows]
        template = _template(
            name, "Sentence: {{ Sentence }}\nOverruling or not?", "Label",
            ["not overruling", "overruling"],
        )  # fmt: skip
        return Task(name, [template], train_rows, test_rows)
    samples = {s: read_rows(data / "tfew" / name / f"{s}_seed.jsonl") for s in SEEDS}
    train_rows = samples[SEEDS[seed]]
    seen = {row["idx"] for row in train_rows}
    others = {row["idx"]: row for rows in samples.values() for row in rows}
    templates = [t for t in load_templates(name) if t.name == "told-because-so"]
    return Task(name, templates, train_rows, [r for i, r in others.items() if i not in seen])


def _template(name: str, prompt: str, answer: str, choices: Sequence[str]) -> Any:
    from ia3.tfew.prompts.promptsource import PromptTemplate
    from ia3.tfew.prompts.templates import Template

    jinja = f"{prompt} ||| {{{{ {answer} }}}}"
    return PromptTemplate(name, Template(jinja, name), Template(" ||| ".join(choices), name))


def _ended(encoded: EncodedExample, end: int) -> EncodedExample:
    """With the end-of-text token after each choice."""
    return replace(encoded, choices=tuple((*choice, end) for choice in encoded.choices))


def _train_ia3(
    base: BaseModel,
    examples: Sequence[TrainingExample],
    seed: int,
    rate: float,
    weights: Mapping[str, float],
    pretrained: Path | None,
    method: str,
) -> int:
    from ia3 import IA3Model
    from ia3.adapter.files import read_adapter
    from ia3.tfew.temporary_adapter import all_linear
    from ia3.tfew.training.trainer import TFewConfig, train

    if method == "pretrained":
        assert pretrained is not None
        adapter = read_adapter(pretrained)
        config = replace(adapter.config, inference_mode=False, base_model_name_or_path=None)
        model = IA3Model.from_adapter(base.model, replace(adapter, config=config))
    else:
        _, _, upper = method.partition("upper-")
        model = IA3Model(base.model, all_linear(base, int(upper) if upper else None))
    config = TFewConfig(steps=STEPS, batch_size=BATCH, learning_rate=rate, seed=seed, **weights)
    train(base, model, examples, config)
    return sum(vector.numel() for vector in model.adapter("default").vectors.values())


def _train_peer(
    base: BaseModel, method: str, examples: Sequence[TrainingExample], seed: int, rate: float
) -> int:
    """The recipe's batches, loss, schedule and clipping, with AdamW, on a module of `peft`'s."""
    import torch
    from transformers import get_linear_schedule_with_warmup

    from ia3.tfew.scoring.choices import token_scores
    from ia3.tfew.training.losses import token_loss

    parameters = _peer_parameters(base.model, method)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0.06 * STEPS, STEPS)
    draw = random.Random(seed)
    order: list[TrainingExample] = []
    base.model.train()
    for _ in range(STEPS):
        if len(order) < BATCH:
            order += draw.sample(list(examples), len(examples))
        batch, order = order[:BATCH], order[BATCH:]
        scores = token_scores(base, [draw.choice(e.encoded) for e in batch])
        token_loss(scores, torch.tensor([e.label for e in batch])).total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return sum(p.numel() for p in parameters)


def _peer_parameters(model: nn.Module, method: str) -> list[nn.Parameter]:
    from peft import LoraConfig, inject_adapter_in_model

    # BitFit trains biases, and this model has none: `lora_bias` gives each linear layer one, whose
    # low-rank product stays zero.
    bitfit = method == "bitfit"
    config = LoraConfig(
        r=1 if bitfit else LORA_RANK,
        lora_alpha=1 if bitfit else 2 * LORA_RANK,
        target_modules="all-linear",
        lora_bias=bitfit,
    )
    inject_adapter_in_model(config, model)
    parameters = []
    for name, parameter in model.named_parameters():
        trained = name.endswith("lora_B.default.bias") if bitfit else "lora_" in name
        parameter.requires_grad_(trained)
        if trained:
            parameters.append(parameter)
    return parameters


def table(results: Sequence[dict[str, Any]]) -> str:
    """Mean accuracy a task, and over all tasks with the spread of the seeds, as Markdown."""
    lines = [
        f"| method | values | {' | '.join(TASKS)} | mean | by seed |",
        "|---|---|" + "---|" * (len(TASKS) + 2),
    ]
    for method in METHODS:
        runs = [r for r in results if r["method"] == method]
        seeds = sorted({r["seed"] for r in runs})
        by_task = [[100 * r["accuracy"] for r in runs if r["task"] == task] for task in TASKS]
        if not all(by_task):
            continue
        by_seed = [
            statistics.mean(100 * r["accuracy"] for r in runs if r["seed"] == seed)
            for seed in seeds
        ]
        cells = [f"{statistics.mean(a):.1f} ± {statistics.pstdev(a):.1f}" for a in by_task]
        lines.append(
            f"| {method} | {runs[0]['trained_values']:,} | {' | '.join(cells)} | "
            f"{statistics.mean(map(statistics.mean, by_task)):.1f} | "
            f"{min(by_seed):.1f} to {max(by_seed):.1f} |"
        )
    return "\n".join(lines)


def picture(results: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel a task: each seed a dot, the mean a line; the untuned model as a vertical line."""
    from matplotlib.figure import Figure

    methods = [m for m in METHODS if any(r["method"] == m for r in results)]
    trained = [m for m in reversed(methods) if not m.startswith("untuned")]
    figure = Figure(figsize=(10, 0.9 + 0.32 * len(trained)), layout="constrained")
    panels = figure.subplots(1, len(TASKS), sharey=True)
    for axes, task in zip(panels, TASKS, strict=True):
        for height, method in enumerate(trained):
            scores = [
                100 * r["accuracy"] for r in results if (r["method"], r["task"]) == (method, task)
            ]
            axes.plot(scores, [height] * len(scores), "o", color="#3b6ea5", alpha=0.45, ms=5)
            mean = statistics.mean(scores)
            axes.plot([mean, mean], [height - 0.3, height + 0.3], color="#17324d", lw=2.5)
        untuned = [
            100 * r["accuracy"] for r in results if (r["method"], r["task"]) == ("untuned", task)
        ]
        axes.axvline(statistics.mean(untuned), color="#b04a3a", lw=1.2, ls="--")
        axes.set_title(task, fontsize=10)
        axes.set_xlabel("accuracy, %", fontsize=9)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0, labelsize=9)
    panels[0].set_yticks(range(len(trained)), trained)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
