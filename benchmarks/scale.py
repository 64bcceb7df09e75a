"""What adapters take from one to a million, on models of 7B, 70B and 405B: docs/scale.md's tables.

    python benchmarks/scale.py [--measure] [--write]

The arithmetic is all here: shapes are those of published LLaMA configs, a vector's places are what
`ia3.explain` would rescale, bandwidths are round figures of one card, link or disk. `--measure`
adds what this machine takes to load adapters of those shapes, on base models without weights.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from reporting import circumstances, in_words, table, write_between
from transformers import LlamaConfig, LlamaForCausalLM

import ia3
from ia3.adapter.files import Adapter, adapter_files, read_adapter, write_saved
from ia3.targets.resolve import resolve

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "scale.md"
SHAPES = {
    "7B": LlamaConfig(),
    "70B": LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
    "405B": LlamaConfig(
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
}
PLACES = {"the paper's": None, "all-linear": "all-linear"}
COUNTS = (1, 1_000, 100_000, 1_000_000)
BATCH = 32
RANK = 8
# Measured with so many rows: the largest take a gigabyte then.
GATHERED = 8

BF16, FLOAT32 = 2, 4
# A second. Of one card's memory (HBM3 of 80 GB), its link to the host (PCIe 5, 16 lanes), a disk
# (NVMe, PCIe 4), and an object store through one network card.
CARD, LINK, DISK, NETWORK = 3.35e12, 50e9, 7e9, 1.25e9
TIERS = {"host to card, PCIe 5": LINK, "NVMe disk": DISK, "object store, 10 Gbit/s": NETWORK}
# What a server has beside the weights and the keys and values of running requests.
ROOM = {"on the card, 8 GB": 8e9, "in the host, 256 GB": 256e9, "on a disk, 4 TB": 4e12}


@dataclass(frozen=True)
class Shape:
    """A model's parameters and linear weights, and how many values an adapter has by its places."""

    parameters: int
    lora: int  # of rank `RANK`, on the linear layers of the paper's places
    values: dict[str, int]


def shape_of(config: LlamaConfig) -> Shape:
    """As the resolver counts it, on a model without weights."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    values, lora = {}, 0
    for name, modules in PLACES.items():
        _, targets = resolve(model, ia3.IA3Config(target_modules=modules))
        values[name] = sum(target.activation.dim for target in targets)
        if modules is None:
            sizes = [model.get_submodule(target.name).weight.shape for target in targets]
            lora = RANK * sum(map(sum, sizes))
    return Shape(sum(p.numel() for p in model.parameters()), lora, values)


def size(count: float) -> str:
    """Bytes in three digits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    return f"{count:.3g} {unit}" if count < 999.5 else f"{count:,.0f} {unit}"


def duration(seconds: float) -> str:
    """A time in three digits."""
    if seconds < 1e-3:
        return f"{seconds / 1e-6:.3g} µs"
    return f"{seconds / 1e-3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def rate(each: float) -> str:
    return f"{each:,.3g}" if each < 1000 else f"{float(f'{each:.3g}'):,.0f}"


def one_adapter(shapes: dict[str, Shape]) -> str:
    """How large an adapter is, beside its model and a LoRA."""
    rows = [
        [
            model,
            places,
            f"{values:,}",
            size(values * FLOAT32),
            size(values * BF16),
            size(shape.lora * BF16) if places == "the paper's" else "",
            size(shape.parameters * BF16),
            f"1/{float(f'{shape.parameters * BF16 / (values * BF16):.3g}'):,.0f}",
        ]
        for model, shape in shapes.items()
        for places, values in shape.values.items()
    ]
    header = ["model", "places", "values", "float32", "bfloat16", f"LoRA, rank {RANK}, bfloat16"]
    return table([*header, "model, bfloat16", "adapter / model, of one type"], rows)


def many_adapters(shapes: dict[str, Shape]) -> str:
    """What so many take in float32, and how many have room where."""
    rows = []
    for model, shape in shapes.items():
        for places, values in shape.values.items():
            row = values * FLOAT32
            fits = [f"{int(room // row):,}" for room in ROOM.values()]
            rows.append([model, places, *(size(count * row) for count in COUNTS), *fits])
    counts = [f"{count:,}" for count in COUNTS]
    return table(["model", "places", *counts, *(f"room {where}" for where in ROOM)], rows)


def traffic(shapes: dict[str, Shape]) -> str:
    """What a step of one token a row reads, and what the vectors add to it."""
    rows = []
    for model, shape in shapes.items():
        weights = shape.parameters * BF16
        for places, values in shape.values.items():
            own, lora = BATCH * values * FLOAT32, BATCH * shape.lora * BF16
            of_lora = f"{lora / weights:.2%}" if places == "the paper's" else ""
            cells = [size(weights), size(own), f"{own / weights:.2%}", of_lora]
            rows.append([model, places, *cells, duration(own / CARD)])
    vectors = f"{BATCH} adapters' vectors"
    header = ["model", "places", "weights", vectors, "vectors / weights"]
    return table([*header, f"{BATCH} LoRAs / weights", "the vectors at 3.35 TB/s"], rows)


def misses(shapes: dict[str, Shape]) -> str:
    """How many adapters a second can come through a link, and what one waits for."""
    rows = []
    for model, shape in shapes.items():
        for places, values in shape.values.items():
            row = values * FLOAT32
            cells = [f"{rate(speed / row)} ({duration(row / speed)})" for speed in TIERS.values()]
            rows.append([model, places, size(row), *cells])
    return table(["model", "places", "adapter", *TIERS], rows)


def measured(configs: dict[str, LlamaConfig]) -> str:
    """What one process takes to read and register adapters of these shapes, in processor time."""
    rows = [
        [name, places, *_measured(config, modules)]
        for name, config in configs.items()
        for places, modules in PLACES.items()
    ]
    header = ["model", "places", "files", "read", "register in a bank", f"gather {GATHERED} rows"]
    return table([*header, "kept of one that is not resident"], rows)


def _measured(config: LlamaConfig, modules: str | None) -> list[str]:
    with torch.device("meta"):
        base = LlamaForCausalLM(config)
    adapter = _adapter(base, ia3.IA3Config(target_modules=modules))
    bank = ia3.AdapterBank(base, capacity=1, device="cpu", host_bytes=0)
    names = map(str, range(10**9))
    with tempfile.TemporaryDirectory() as folder:
        write_saved(folder, adapter_files(adapter))
        held = sum(path.stat().st_size for path in Path(folder).iterdir())
        bank.add("first", folder)
        read = min(_seconds(lambda: read_adapter(folder), 5))
        added = min(_seconds(lambda: bank.add(next(names), folder), 10))
        gathered = min(_seconds(lambda: bank.gather(["first"], [0] * GATHERED), 5))
        entry = _bytes_of_entries(bank, Path(folder), 20)
    times = [f"{1000 * each:.1f} ms" for each in (read, added, gathered)]
    return [size(held), *times, f"{entry:,} B"]


def _adapter(base: LlamaForCausalLM, config: ia3.IA3Config) -> Adapter:
    resolved, targets = resolve(base, config)
    vectors = {t.name: torch.rand(t.activation.shape) + 0.5 for t in targets}
    return Adapter(resolved, vectors)


def _seconds(call: Callable[[], object], times: int) -> Iterator[float]:
    for _ in range(times):
        started = time.process_time()
        call()
        yield time.process_time() - started


def _bytes_of_entries(bank: ia3.AdapterBank, folder: Path, count: int) -> int:
    tracemalloc.start()
    bank.add("b", folder)
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    for number in range(count):
        bank.add(f"b{number}", folder)
    gc.collect()
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return (after - before) // count


def tables() -> dict[str, str]:
    """What is computed, by title."""
    shapes = {name: shape_of(config) for name, config in SHAPES.items()}
    return {
        "One adapter": one_adapter(shapes),
        "Many adapters": many_adapters(shapes),
        "Traffic": traffic(shapes),
        "Misses": misses(shapes),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="also load adapters here")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scale.md")
    options = parser.parse_args(arguments)
    found = tables()
    if options.measure:
        torch.set_num_threads(1)
        found["Measured"] = f"{in_words(circumstances())}\n\n{measured(SHAPES)}"
    for title, content in found.items():
        print(f"## {title}\n\n{content}\n")
        if options.write:
            write_between(DOCUMENT, f"{title}, by benchmarks/scale.py", content)


if __name__ == "__main__":
    main()
