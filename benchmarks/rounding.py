"""Whether training in bfloat16 notices that a vector's gradient comes from a rounded result.

    python benchmarks/rounding.py --data DIR [--seeds 5] [--steps 12]

TREC, 16 examples a class, on SmolLM2-135M in bfloat16: the same batches with vectors rescaled where
it costs the least memory (the default) and by the plain product. Both adapters are then scored in
float32 on 150 test rows. Appends to a JSON Lines file, does not repeat finished runs, prints a
table. A CPU without bfloat16 instructions is ten times slower here than in float32.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import ablation
from reporting import add_results_option, read_runs

FORMS = ("least memory", "plain product")


def main() -> None:
    """Run what is missing in the results file, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with trec/")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each kind")
    parser.add_argument("--steps", type=int, default=12, help="training steps of each")
    parser.add_argument("--batch", type=int, default=4, help="examples a step")
    add_results_option(parser, "rounding.jsonl")
    given = parser.parse_args()
    done = read_runs(given.results)
    finished = {(r["form"], r["seed"], r["steps"], r["batch"]) for r in done}
    for seed in range(given.seeds):
        for form in FORMS:
            if (form, seed, given.steps, given.batch) not in finished:
                result = run(form, seed, given.data, given.steps, given.batch)
                done.append(result)
                with given.results.open("a") as file:
                    file.write(json.dumps(result) + "\n")
    print(table(done))


def run(form: str, seed: int, data: Path, steps: int, batch: int) -> dict[str, Any]:
    """Train in bfloat16 and score in float32."""
    import torch

    import ia3
    from ia3.tfew import TFewConfig, train
    from ia3.tfew.prompts.encoding import Encoder
    from ia3.tfew.prompts.tasks import encode_labelled
    from ia3.tfew.scoring.evaluation import predict_choices
    from ia3.tfew.temporary_adapter import all_linear

    task = ablation.read("trec", seed, data)
    base = ia3.load_base_model("smollm2-135m-instruct")
    encoder = Encoder(base, chat=False)
    test = [e for row in task.test if (e := encode_labelled(encoder, task.templates[0], row))]
    base.model.to(torch.bfloat16)
    model = ia3.IA3Model(base.model, all_linear(base))
    model.use_plain_product(form == "plain product")
    config = TFewConfig(steps=steps, batch_size=batch, learning_rate=1e-2, seed=seed)
    history = train(base, model, task.training_examples(encoder), config)
    base.model.float()
    predicted = predict_choices(base, [encoded for encoded, _ in test])
    model.unload()
    right = sum(p == answer for p, (_, answer) in zip(predicted, test, strict=True))
    return {
        "form": form,
        "seed": seed,
        "steps": steps,
        "batch": batch,
        "losses": [round(step.loss, 4) for step in history],
        "accuracy": right / len(test),
    }


def table(results: list[dict[str, Any]]) -> str:
    """Accuracy and the loss of the last steps, a row a seed, as Markdown."""
    lines = [
        "| seed | accuracy: least memory, plain | loss, mean of the last 4 steps |",
        "|---|---|---|",
    ]
    for seed in sorted({r["seed"] for r in results}):
        pair = [next(r for r in results if (r["form"], r["seed"]) == (f, seed)) for f in FORMS]
        accuracies = ", ".join(f"{100 * r['accuracy']:.1f}" for r in pair)
        losses = ", ".join(f"{statistics.mean(r['losses'][-4:]):.3f}" for r in pair)
        lines.append(f"| {seed} | {accuracies} | {losses} |")
    means = [
        statistics.mean(100 * r["accuracy"] for r in results if r["form"] == form) for form in FORMS
    ]
    lines.append(f"| mean | {means[0]:.1f}, {means[1]:.1f} | |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
