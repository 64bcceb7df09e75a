"""Peak memory and speed of training, and decoding by CUDA graphs, on a GPU.

    python benchmarks/gpu.py [--methods METHOD ...] [--steps 10]

A LLaMA of Llama-3.2-3B's shape with random weights in bfloat16, batches of 4 × 768 tokens, AdamW.
Each method is a process of its own, so that peaks are its own. The table goes to
`benchmarks/results/gpu-CARD.md` and `.json`; methods that ran on the same day on the same card with
the same versions stay in it. Without a GPU a small model runs on the CPU, and nothing is written.

PEFT's comparison on Llama-3.2-3B (its repository's method_comparison/MetaMathQA) has (IA)³ at
21.6 GB, LoRA of rank 32 at 20.8, the leanest method at 18.8.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from measuring import batch_of, fused, llama, on_ia3, on_peft
from reporting import RESULTS, circumstances, digits, in_words, table, write_json
from torch import nn

BIG = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
    "tie_word_embeddings": True,
}
BIG_BATCH, SMALL_BATCH = (4, 768), (2, 64)
CACHED = 64
DECODED = 50
GIGA = 1e9


# -- methods ---------------------------------------------------------------------------------------


def plain_product(model: nn.Module) -> nn.Module:
    """This project's adapter with the plain product, which keeps the scaled activations too."""
    adapted = on_ia3(model)
    adapted.use_plain_product()
    return adapted


def lora(model: nn.Module) -> nn.Module:
    """PEFT's LoRA of rank 32 on its default modules, as in its comparison."""
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=32, lora_alpha=64))


METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "frozen": lambda model: model,
    "ia3": on_ia3,
    "ia3 plain product": plain_product,
    "ia3 fused": lambda model: fused(on_ia3(model)),
    "PEFT (IA)³": on_peft,
    "PEFT LoRA 32": lora,
}
TITLES = {
    "frozen": "frozen, gradients to its input (the limit)",
    "ia3": "ia3, the default sites as they are",
}


# -- one method ------------------------------------------------------------------------------------


def measured(method: str, steps: int, device: str) -> dict[str, Any]:
    """What one method costs, in this process.

    Args:
        method: of `METHODS`.
        steps: of training that are timed.
        device: "cuda" or "cpu".

    Returns:
        `peak_gb` (allocated; on the CPU the process's own), `reserved_gb`, `tokens_per_second`,
        `decode_ms` and `graph_decode_ms`; what could not be measured is `None`, and `failed` says
        why.
    """
    on_gpu = device == "cuda"
    with torch.device(device):
        dtype = torch.bfloat16 if on_gpu else torch.float32
        base = llama(**(BIG if on_gpu else SMALL), dtype=dtype)
    model = METHODS[method](base)
    result: dict[str, Any] = {"failed": {}}
    result |= _training(method, base, model, BIG_BATCH if on_gpu else SMALL_BATCH, steps, on_gpu)
    model.eval()
    ways: dict[str, Callable[[nn.Module], Callable[..., Any]]] = {"decode_ms": lambda m: m}
    if on_gpu:
        ways["graph_decode_ms"] = lambda m: torch.compile(m, mode="reduce-overhead")
    for name, way in ways.items():
        try:
            result[name] = _decoding(way, base, model, device)
        except Exception as error:  # a compiler's, of any kind; the other figures stand
            result[name] = None
            result["failed"][name] = f"{type(error).__name__}: {str(error).strip()[:300]}"
    return result


def _training(
    method: str, base: Any, model: Any, batch: tuple[int, int], steps: int, on_gpu: bool
) -> dict[str, Any]:
    embeddings, ids = batch_of(base, *batch)
    # As training does it; the frozen model has nothing to train but its input.
    inputs = {"inputs_embeds": embeddings} if method == "frozen" else {"input_ids": ids}
    trained = [p for p in model.parameters() if p.requires_grad] or [embeddings]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    model.train()
    seconds = []
    for step in range(steps + 2):
        if step == 1 and on_gpu:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        optimizer.zero_grad()
        model(**inputs, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()
        if step >= 2:
            seconds.append(time.perf_counter() - start)
    optimizer.zero_grad()
    if on_gpu:
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    else:
        peak, reserved = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, 0
    return {
        "peak_gb": peak / GIGA,
        "reserved_gb": reserved / GIGA or None,
        "tokens_per_second": batch[0] * batch[1] / statistics.median(seconds),
        "trained": sum(p.numel() for p in trained) if method != "frozen" else 0,
    }


def _decoding(
    way: Callable[[nn.Module], Callable[..., Any]], base: Any, model: nn.Module, device: str
) -> float:
    """Milliseconds a token, batch 1, static cache."""
    from transformers import StaticCache

    length = 2 * CACHED + DECODED
    cache = StaticCache(config=base.config, max_cache_len=length)
    prompt = torch.arange(CACHED, device=device)[None]
    token = torch.tensor([[7]], device=device)
    # The same mask and position each time: whatever is computed of them once is not timed.
    mask = (torch.arange(length, device=device) <= CACHED)[None, None, None]
    position = torch.tensor([[CACHED]], device=device)
    causal = torch.ones(CACHED, length, dtype=torch.bool, device=device).tril()[None, None]
    with torch.no_grad():
        kept: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        model(input_ids=prompt, attention_mask=causal, position_ids=prompt, **kept)
        run = way(model)

        def step() -> None:
            torch.compiler.cudagraph_mark_step_begin()
            run(input_ids=token, attention_mask=mask, position_ids=position, **kept)
            if device == "cuda":
                torch.cuda.synchronize()

        seconds = []
        for turn in range(DECODED):
            start = time.perf_counter()
            step()
            if turn >= 10:  # compiled, recorded and warm by then
                seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


# -- all of them -----------------------------------------------------------------------------------


def in_markdown(methods: dict[str, dict[str, Any]], where: dict[str, Any]) -> str:
    """The table, under what it was measured on."""
    on_gpu = where["card"] is not None
    shape, batch = (BIG, BIG_BATCH) if on_gpu else (SMALL, SMALL_BATCH)
    sentence = (
        f"A LLaMA of {shape['layers']} layers, {shape['hidden_size']} wide, random weights, "
        f"{'bfloat16' if on_gpu else 'float32'}, batches of {batch[0]} × {batch[1]} tokens, AdamW, "
        f"no gradient checkpointing. {where['card'] or 'No GPU'}; {in_words(where)}"
    )
    if not on_gpu:
        sentence += (
            " **Without a GPU this is a small model on the CPU: it shows that the program runs, and"
            " its peaks are those of whole processes.**"
        )
    limit = methods.get("frozen", {})

    def cell(of: dict[str, Any], name: str) -> str:
        if of.get(name) is None:
            return "failed" if name in of.get("failed", {}) else ""
        other = limit.get(name)
        beside = f" ({of[name] / other:.3f})" if other and of is not limit else ""
        return f"{digits(of[name])}{beside}"

    columns = {
        "peak_gb": "peak, GB",
        "reserved_gb": "reserved, GB",
        "tokens_per_second": "tokens a second",
        "decode_ms": "a token decoded, ms",
        "graph_decode_ms": "by CUDA graphs, ms",
    }
    lines = [
        [TITLES.get(method, method), *(cell(methods[method], name) for name in columns)]
        for method in METHODS
        if methods.get(method)
    ]
    failures = [
        f"{method}, {columns.get(what, what)}: {why}"
        for method, of in methods.items()
        for what, why in of.get("failed", {}).items()
    ]
    text = table(["", *columns.values()], lines)
    return "\n\n".join(
        [sentence, text, "In parentheses: to the frozen model, in a process of its own.", *failures]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run each method in a process of its own, print the table, and write it where it counts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="which to run"
    )
    parser.add_argument("--steps", type=int, default=10, help="training steps that are timed")
    parser.add_argument("--one", choices=METHODS, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if given.one:
        print(json.dumps(measured(given.one, given.steps, device)))
        return
    card = torch.cuda.get_device_name() if device == "cuda" else None
    where = {"card": card, **circumstances()}
    path = RESULTS / f"gpu-{re.sub('[^a-z0-9]+', '-', (card or 'none').lower())}.json"
    methods: dict[str, dict[str, Any]] = {}
    if path.is_file():
        before = json.loads(path.read_text("utf-8"))
        methods = before["methods"] if before["where"] == where else {}
    for method in given.methods:
        command = [sys.executable, __file__, "--one", method, "--steps", str(given.steps)]
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode:
            last = (ran.stderr.strip().splitlines() or [""])[-1]
            methods[method] = {"failed": {"process": f"ended with {ran.returncode}: {last}"}}
        else:
            methods[method] = json.loads(ran.stdout.strip().splitlines()[-1])
        print(method, json.dumps(methods[method]), file=sys.stderr, flush=True)
        if card is not None:
            write_json(path, {"where": where, "methods": methods})
            text = f"{in_markdown(methods, where)}\n"
            path.with_suffix(".md").write_text(text, "utf-8")
    print(in_markdown(methods, where))


if __name__ == "__main__":
    main()
