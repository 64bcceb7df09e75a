"""What (IA)³ adapters cost in vLLM, beside its own LoRA.

    make bench-vllm

32 prompts of 32 tokens, and 64 tokens more for each, in one batch, on SmolLM2-135M in float32. They
take turns: vLLM's engine without adapters; an engine that serves adapters, with 32 (IA)³ adapters,
with 32 LoRA adapters of rank 8 on the same modules, and with rows of the base alone. On CPUs vLLM
compiles nothing where it serves adapters, so that none of the four is compiled. `--write` keeps
what was measured in `benchmarks/results/vllm_batch.json`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import Timings, take_turns
from mixed import write_adapters
from reporting import RESULTS, circumstances, digits, table, write_json
from torch import nn

# Before vLLM's first import; what is set already stays.
_ENVIRONMENT = {
    "VLLM_PLUGINS": "ia3",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
os.environ |= _ENVIRONMENT | dict(os.environ)

ROWS = 32
PROMPT = 32
TOKENS = 64
RANK = 8
BASE = "base, no adapters served"
IA3 = "(IA)³ adapters"
LORA = f"LoRA adapters of rank {RANK}"
ROWS_OF_BASE = "rows of the base, adapters served"


def write_loras(model: nn.Module, root: Path, count: int) -> list[Path]:
    """LoRA adapters of random values, on the modules that (IA)³ has its vectors on."""
    import peft

    config = peft.LoraConfig(
        r=RANK, target_modules=["k_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    wrapped = peft.get_peft_model(model, config)
    folders = [root / f"lora{number}" for number in range(count)]
    for folder in folders:
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter.data, std=0.02)
        wrapped.save_pretrained(folder)
    return folders


def engine(base: str, **options: Any) -> Any:
    """vLLM's engine in this process; each prompt is computed anew."""
    from vllm import LLM

    return LLM(
        base,
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=PROMPT + TOKENS,
        max_num_seqs=ROWS,
        **options,
    )


def measured(
    base: str, adapters: Sequence[Path], loras: Sequence[Path], repeats: int, tokens: int = TOKENS
) -> Timings:
    """Seconds of a batch, a row an adapter."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    rows = len(adapters)
    served = engine(base, enable_lora=True, max_loras=rows, max_cpu_loras=2 * rows, max_lora_rank=8)
    plain = engine(base)
    requests = [LoRARequest(f.name, n + 1, str(f)) for n, f in enumerate((*adapters, *loras))]
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(3, 100, (rows, PROMPT), generator=generator).tolist()
    prompts = [{"prompt_token_ids": prompt} for prompt in drawn]

    def batch(llm: Any, of: Sequence[LoRARequest] | None) -> None:
        llm.generate(prompts, sampling, lora_request=of, use_tqdm=False)

    steps = {
        BASE: lambda: batch(plain, None),
        ROWS_OF_BASE: lambda: batch(served, None),
        IA3: lambda: batch(served, requests[:rows]),
        LORA: lambda: batch(served, requests[rows:]),
    }
    return take_turns(steps, repeats)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and with `--write` keep it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="turns")
    parser.add_argument("--write", action="store_true", help="keep the results")
    options = parser.parse_args(arguments)
    import ia3

    base = ia3.embedded_model_folder()
    model = ia3.load_base_model("smollm2-135m-instruct").model.requires_grad_(False).eval()
    with tempfile.TemporaryDirectory() as root:
        adapters = write_adapters(model, Path(root), ROWS)
        loras = write_loras(model, Path(root), ROWS)
        timings = measured(str(base), adapters, loras, options.repeats)
    per_second = {name: ROWS * TOKENS / timings.median(name) for name in timings.seconds}
    ratios = {name: timings.ratio(BASE, name) for name in timings.seconds}
    lines = [[name, digits(per_second[name]), f"{ratios[name]:.3f}"] for name in timings.seconds]
    print(table([f"{ROWS} rows", "tokens a second", "to the base"], lines))
    print("0.95 of the base reached:", "yes" if ratios[IA3] >= 0.95 else "no")
    print("above LoRA's reached:", "yes" if ratios[IA3] > ratios[LORA] else "no")
    if options.write:
        import vllm

        where = circumstances() | {"vllm": vllm.__version__}
        batches = {n: {"tokens a second": per_second[n], "ratio": ratios[n]} for n in per_second}
        write_json(RESULTS / "vllm_batch.json", {"where": where, "batches": batches})


if __name__ == "__main__":
    main()
