"""AdapterHub's `adapters` and its (IA)³, by its own interpreter, against its own base model.

    .venv-adapters/bin/python benchmarks/adapters_peer.py --model FOLDER [--repeats 9]

`benchmarks/speed.py` calls it. The last line of what it prints is JSON: versions, and for each row
a value and, where there is one, its ratio to the base model. That library scales the keys, the
values and the *output* of the down projection.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import adapters
import torch
from measuring import (
    batch_of,
    forward_pass,
    same_weights,
    saved_bytes,
    take_turns,
    time_decoding,
    training_step,
)
from transformers import AutoModelForCausalLM


def load(folder: Path) -> Any:
    """The model as newer transformers wrote it: this one looks elsewhere for rotary settings."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    theta = config.get("rope_parameters", config).get("rope_theta", 10000.0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, rope_theta=theta)
    return model.eval().requires_grad_(False)


def adapted(frozen: Any, name: str = "a") -> Any:
    """The model with an adapter that trains."""
    model = same_weights(frozen)
    adapters.init(model)
    model.add_adapter(name, config="ia3")
    model.train_adapter(name)
    return model.eval()


def compare(frozen: Any, rows: set[str], batch: tuple[int, int], repeats: int) -> dict[str, Any]:
    """What is against the base model."""
    found: dict[str, Any] = {}
    model = adapted(frozen)
    embeddings, labels = batch_of(frozen, *batch)
    if "saved" in rows:
        own, limit = (saved_bytes(m, forward_pass(m, embeddings)) for m in (model, frozen))
        found["saved"] = {"value": own / 2**20, "ratio": own / limit}
    if "step" in rows:
        timings = take_turns(
            {
                "adapters": training_step(model, embeddings, labels),
                "frozen": training_step(frozen, embeddings, labels),
            },
            repeats,
        )
        found["step"] = in_milliseconds(timings)
    if rows & {"decode unmerged", "decode merged"}:
        vocabulary = frozen.config.vocab_size
        timings = time_decoding({"adapters": model, "frozen": frozen}, vocabulary, 8 * repeats)
        found["decode unmerged"] = in_milliseconds(timings)
        # Weights of its own: merging writes into them.
        model = adapted(copy.deepcopy(frozen))
        model.merge_adapter("a")
        timings = time_decoding({"adapters": model, "frozen": frozen}, vocabulary, 8 * repeats)
        found["decode merged"] = in_milliseconds(timings)
    return found


def in_milliseconds(timings: Any) -> dict[str, float]:
    """Its time, and what that is to the base model's."""
    return {"value": 1e3 * timings.median("adapters"), "ratio": timings.ratio("adapters", "frozen")}


def handle(frozen: Any, rows: set[str], others: list[int], repeats: int) -> dict[str, Any]:
    """Save, load and switch, in milliseconds."""
    found: dict[str, Any] = {}
    model = adapted(frozen)
    with tempfile.TemporaryDirectory() as folder:

        def alone(step: Callable[[], object], times: int, after: Any = None) -> dict[str, Any]:
            ends = None if after is None else {"adapters": after}
            timings = take_turns({"adapters": step}, times, after=ends)
            return {"value": 1e3 * timings.median("adapters"), "ratio": None}

        found["save"] = alone(lambda: model.save_adapter(folder, "a"), 2 * repeats)
        there = 0
        for count in sorted(others):
            for number in range(there, count):
                model.add_adapter(f"other{number}", config="ia3")
            there = count
            if f"load {count}" in rows:
                found[f"load {count}"] = alone(
                    lambda: model.load_adapter(folder, load_as="loaded"),
                    max(3, repeats // 2),
                    after=lambda: model.delete_adapter("loaded"),
                )
            if "switch" not in found:
                turn = 0

                def switch() -> None:
                    nonlocal turn
                    turn = 1 - turn
                    model.set_active_adapters(f"other{turn}")

                found["switch"] = alone(switch, 8 * repeats)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--batch", type=int, nargs=2, default=(4, 128), help="rows, tokens of each")
    parser.add_argument("--others", type=int, nargs="+", default=[10, 100], help="adapters there")
    parser.add_argument("--repeats", type=int, default=9, help="turns")
    rows = ["saved", "step", "decode unmerged"]
    parser.add_argument("--rows", nargs="+", default=rows, help="what is measured")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    rows = set(given.rows)
    frozen = load(given.model)
    found = compare(frozen, rows, tuple(given.batch), given.repeats)
    if rows - set(found):
        found |= handle(frozen, rows, given.others, given.repeats)
    versions = {n: importlib.metadata.version(n) for n in ("adapters", "transformers", "torch")}
    wanted = {name: figures for name, figures in found.items() if name in rows}
    print(json.dumps({"versions": versions, "rows": wanted}))


if __name__ == "__main__":
    main()
