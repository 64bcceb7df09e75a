"""What a batch costs whose rows have different adapters, and what many of them take.

    python benchmarks/mixed.py [--adapters 10000] [--repeats 15] [--write]

SmolLM2-135M in float32. 32 rows over 32 adapters, of 1,000 that are resident: the forward pass and
one decoded token, against the frozen model with the same weights in the same turn; beside it PEFT's
LoRA with one adapter a row (`adapter_names`), and its (IA)³ one row after the other. Then adapters
are registered from disk, as many as asked for. Last, texts of 32 classifiers on all-MiniLM-L6-v2 in
one batch, against the same texts of one. `--write` keeps what was measured in
`benchmarks/results/mixed.json`.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import (
    Decoding,
    Timings,
    on_ia3,
    on_peft,
    same_weights,
    take_turns,
    take_turns_decoding,
)
from reporting import RESULTS, circumstances, digits, table, write_json
from tickets import TICKETS
from torch import Tensor, nn

ROWS = 32
RESIDENT = 1000
LENGTH = 64
FILE = "adapter_model.safetensors"
ONE = "one task"


def write_adapters(model: nn.Module, root: Path, count: int) -> list[Path]:
    """Adapters of random values for a model, each in a folder: the same header, other values."""
    template = on_ia3(same_weights(model))
    template.save_pretrained(root / "template")
    config = (root / "template" / "adapter_config.json").read_bytes()
    content = (root / "template" / FILE).read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    # As another program would leave it out; so the header keeps its length.
    head = content[:begin].replace(b"ia3_sha256", b"not_sha256")
    generator = torch.Generator().manual_seed(0)
    folders = []
    for number in range(count):
        folder = root / f"adapter{number}"
        folder.mkdir()
        values = 1 + 0.1 * torch.randn((len(content) - begin) // 4, generator=generator)
        (folder / FILE).write_bytes(head + values.numpy().tobytes())
        (folder / "adapter_config.json").write_bytes(config)
        folders.append(folder)
    return folders


def _tokens(model: Any, rows: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (rows, length), generator=generator)


def contestants(model: nn.Module, folders: Sequence[Path], rows: int) -> dict[str, Any]:
    """Name -> (the model, the options of a call), all on the same weights."""
    import peft

    from ia3 import AdapterBank

    bank = AdapterBank(same_weights(model), capacity=len(folders))
    for number, folder in enumerate(folders):
        bank.add(f"a{number}", folder)
    step = max(1, len(folders) // rows)
    names = [f"a{number * step % len(folders)}" for number in range(rows)]
    own = on_ia3(same_weights(model))
    for name in dict.fromkeys(names):
        own.load_adapter(folders[int(name[1:])], name)
    lora = peft.get_peft_model(same_weights(model), peft.LoraConfig(task_type="CAUSAL_LM"), "a0")
    for number in range(1, rows):
        lora.add_adapter(f"a{number}", peft.LoraConfig(task_type="CAUSAL_LM"))
    return {
        "base": (model, {}),
        "base again": (same_weights(model), {}),
        "ia3 bank": (bank.model.eval(), {"adapter_names": names}),
        "ia3 own adapters": (own.eval(), {"adapter_names": names}),
        "PEFT LoRA": (lora.eval(), {"adapter_names": [f"a{i}" for i in range(rows)]}),
    }


def time_batches(
    found: Mapping[str, Any], rows: int, length: int, repeats: int
) -> dict[str, Timings]:
    """The forward pass of a batch, and one decoded token of each row."""
    ids = _tokens(next(iter(found.values()))[0], rows, length)

    def forward(model: Any, options: Mapping[str, Any]) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(
                input_ids=ids, use_cache=False, logits_to_keep=1, **options
            ).logits
        return logits

    steps = {name: lambda each=each: forward(*each) for name, each in found.items()}
    decoding = {name: Decoding(model, ids, **how) for name, (model, how) in found.items()}
    return {
        f"forward of {rows} rows of {length} tokens": take_turns(steps, repeats),
        f"a decoded token of each of {rows} rows": take_turns_decoding(decoding, 2 * repeats),
    }


def time_one_by_one(model: nn.Module, rows: int, length: int, repeats: int) -> Timings:
    """PEFT's (IA)³: each row in a pass of its own, its adapter switched to."""
    import peft

    theirs = on_peft(same_weights(model)).eval()
    for number in range(1, rows):
        theirs.add_adapter(f"a{number}", peft.IA3Config(task_type="CAUSAL_LM"))
    names = ["default", *(f"a{number}" for number in range(1, rows))]
    ids = _tokens(model, rows, length)

    def one_by_one() -> None:
        with torch.no_grad():
            for row, name in enumerate(names):
                theirs.set_adapter(name)
                theirs(input_ids=ids[row : row + 1], use_cache=False, logits_to_keep=1)

    def together() -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False, logits_to_keep=1)

    return take_turns({"PEFT one by one": one_by_one, "base": together}, repeats)


def register(model: nn.Module, folders: Sequence[Path]) -> dict[str, float]:
    """Adapters registered from disk, all resident: seconds, bytes, and a lookup's time."""
    from ia3 import AdapterBank

    bank = AdapterBank(same_weights(model), capacity=len(folders))
    before = _resident_bytes()
    start = time.perf_counter()
    for number, folder in enumerate(folders):
        bank.add(f"a{number}", folder)
    seconds = time.perf_counter() - start
    taken = _resident_bytes() - before
    values = len(folders) * bank.values.shape[1] * bank.values.element_size()
    lookup = _lookup(bank, len(folders))
    bank.close()
    return {
        "adapters": len(folders),
        "values each": values / 4 / len(folders),
        "seconds": seconds,
        "bytes taken": taken,
        "bytes of the values": values,
        "taken / values": taken / values,
        "lookup, ms": 1e3 * lookup,
    }


def _lookup(bank: Any, count: int) -> float:
    """Seconds for the rows of a batch, of adapters drawn anew each time."""
    draw = random.Random(0)
    times = []
    for _ in range(200):
        names = [f"a{draw.randrange(count)}" for _ in range(ROWS)]
        different = list(dict.fromkeys(names))
        index = [different.index(name) for name in names]
        start = time.perf_counter()
        bank.gather(different, index)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def write_classifiers(model: str, root: Path, count: int) -> list[Path]:
    """Classifiers of random vectors on an encoder, each in a folder."""
    import ia3

    classifier = ia3.FewShotClassifier(model, steps=0).fit(TICKETS, ["billing", "delivery"] * 4)
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        for vector in classifier.adapter_.vectors.values():
            vector.copy_(1 + 0.1 * torch.randn(vector.shape, generator=generator))
        classifier.save(root / f"classifier{number}")
    return [root / f"classifier{number}" for number in range(count)]


def time_classifiers(
    model: nn.Module, folders: Sequence[Path], rows: int, repeats: int, clock: Callable[[], float]
) -> Timings:
    """Texts of as many classifiers as there are folders in one batch, or all of the first."""
    import ia3

    bank = ia3.AdapterBank(model, capacity=len(folders))
    for number, folder in enumerate(folders):
        bank.add(f"a{number}", folder)
    texts = [f"{TICKETS[row % len(TICKETS)]} {row}" for row in range(rows)]
    many = [f"a{row % len(folders)}" for row in range(rows)]
    steps = {
        "many tasks": lambda: ia3.classify(bank, texts, many),
        ONE: lambda: ia3.classify(bank, texts, ["a0"] * rows),
        "one task again": lambda: ia3.classify(bank, texts, ["a0"] * rows),
    }
    return take_turns(steps, repeats, warm_up=3, clock=clock)


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _classifiers(repeats: int, clock: Callable[[], float]) -> Timings:
    from transformers import AutoModel

    from ia3.base.embedded import embedded_encoder_folder

    with tempfile.TemporaryDirectory() as root:
        folders = write_classifiers("all-minilm-l6-v2", Path(root), ROWS)
        model = AutoModel.from_pretrained(embedded_encoder_folder())
        return time_classifiers(model, folders, ROWS, repeats, clock)


def _in_lines(timings: Timings) -> str:
    lines = [
        [name, f"{1e3 * timings.median(name):.1f} ms", f"{timings.ratio(name, ONE):.3f}"]
        for name in timings.seconds
    ]
    return table([f"{ROWS} texts of classifiers", "median", "to one task"], lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and with `--write` keep it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--adapters", type=int, default=10_000, help="how many are registered")
    parser.add_argument("--resident", type=int, default=RESIDENT, help="adapters in the bank")
    parser.add_argument("--repeats", type=int, default=15, help="turns")
    parser.add_argument(
        "--classifiers", action="store_true", help="only these, in the processor's time"
    )
    parser.add_argument("--write", action="store_true", help="keep the results")
    options = parser.parse_args(arguments)
    import ia3

    if options.classifiers:
        print(_in_lines(_classifiers(options.repeats, time.process_time)))
        return
    model = ia3.load_base_model("smollm2-135m-instruct").model.requires_grad_(False).eval()
    with tempfile.TemporaryDirectory() as root:
        folders = write_adapters(model, Path(root), max(options.adapters, options.resident))
        registered = [
            register(model, folders[:count])
            for count in sorted({min(100, options.adapters), options.adapters})
        ]
        found = contestants(model, folders[: options.resident], ROWS)
        timings = time_batches(found, ROWS, LENGTH, options.repeats)
    alone = time_one_by_one(model, ROWS, LENGTH, max(3, options.repeats // 3))
    of_classifiers = _classifiers(options.repeats, time.perf_counter)
    lines = [
        [what, name, f"{1e3 * each.median(name):.1f} ms", f"{each.ratio(name, 'base'):.3f}"]
        for what, each in timings.items()
        for name in found
    ]
    ratio = alone.ratio("PEFT one by one", "base")
    milliseconds = 1e3 * alone.median("PEFT one by one")
    lines.append(["the forward", "PEFT (IA)³ one by one", f"{milliseconds:.1f} ms", f"{ratio:.3f}"])
    print(table(["measured", "who", "median", "to the base model"], lines))
    print(table([*registered[0]], [[digits(v) for v in each.values()] for each in registered]))
    print(_in_lines(of_classifiers))
    if options.write:
        batches = {
            what: {
                name: {"seconds": each.median(name), "ratio": each.ratio(name, "base")}
                for name in found
            }
            for what, each in timings.items()
        }
        batches["the forward, PEFT (IA)³ one by one"] = {"PEFT": {"ratio": ratio}}
        content = {"where": circumstances(), "batches": batches, "registered": registered}
        content["classifiers"] = {
            name: {"seconds": of_classifiers.median(name), "ratio": of_classifiers.ratio(name, ONE)}
            for name in of_classifiers.seconds
        }
        write_json(RESULTS / "mixed.json", content)


if __name__ == "__main__":
    main()
