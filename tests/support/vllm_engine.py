"""Tiny models and adapters for vLLM, its engine in this process, and what PEFT generates."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

VOCABULARY = 128
# vLLM's attention on CPUs has no heads of less than 32.
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # What is small leaves all adapters with one another's tokens.
    "initializer_range": 0.3,
}
OPT = {k: v for k, v in SIZES.items() if k not in ("intermediate_size", "num_key_value_heads")}
OPT |= {"ffn_dim": 192, "word_embed_proj_dim": 128, "init_std": OPT.pop("initializer_range")}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    # With biases on queries, keys and values.
    "qwen2": Qwen2Config(**SIZES),
    # Its weights are fused in its files already.
    "phi3": Phi3Config(**SIZES),
    # Biases everywhere, and a feed-forward layer without a gate.
    "opt": OPTConfig(**OPT, do_layer_norm_before=True, dropout=0.0),
}

TOKENS = 16


def write_base(kind: str, folder: Path) -> Path:
    """A random model of that kind, with biases that are not zero; the same every time."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
    model.save_pretrained(folder)
    return folder


def write_ia3(
    base: Path, folder: Path, seed: int, low: float = 0.25, high: float = 1.75, **config: Any
) -> Path:
    """An (IA)³ adapter that PEFT writes, with random values."""
    model = get_peft_model(load(base), IA3Config(task_type="CAUSAL_LM", **config))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3_l" in name:
                parameter.uniform_(low, high)
    model.save_pretrained(folder)
    return folder


def write_lora(base: Path, folder: Path, seed: int, **config: Any) -> Path:
    """A LoRA adapter of rank 8, far from the identity."""
    config = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **config}
    torch.manual_seed(seed)
    config["init_lora_weights"] = False
    get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", **config)).save_pretrained(folder)
    return folder


def load(base: Path, adapter: Path | None = None) -> PreTrainedModel | PeftModel:
    """The base model in transformers, with an adapter in PEFT."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    return model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()


def greedy(base: Path, adapter: Path | None, prompt: Sequence[int]) -> list[int]:
    """The tokens that transformers and PEFT generate."""
    tokens = load(base, adapter).generate(
        input_ids=torch.tensor([list(prompt)]),
        do_sample=False,
        max_new_tokens=TOKENS,
        min_new_tokens=TOKENS,
        eos_token_id=None,
        pad_token_id=0,
    )
    return tokens[0, len(prompt) :].tolist()


def scores(base: Path, adapter: Path | None, prompt: Sequence[int]) -> Tensor:
    """The log-probability of each token of a prompt but the first, in transformers and PEFT."""
    with torch.no_grad():
        logits = load(base, adapter)(input_ids=torch.tensor([list(prompt)])).logits[0]
    return logits.log_softmax(-1)[range(len(prompt) - 1), prompt[1:]]


def prompts(count: int, length: int = 6) -> list[list[int]]:
    """Random prompts; the same every time."""
    generator = torch.Generator().manual_seed(count)
    return torch.randint(3, VOCABULARY, (count, length), generator=generator).tolist()


class Engine:
    """vLLM's engine, with adapters by their folders; each gets the next number."""

    def __init__(self, base: Path, **options: Any) -> None:
        from vllm import LLM

        usual = {"enable_lora": True, "max_lora_rank": 8, "dtype": "float32", "enforce_eager": True}
        self.llm = LLM(
            str(base),
            skip_tokenizer_init=True,
            max_model_len=128,
            max_num_batched_tokens=256,
            max_num_seqs=16,
            **usual | options,
        )
        self.numbers: dict[str, int] = {}

    def request(self, adapter: Path | None) -> Any:
        """vLLM's name of an adapter, `None` of the base."""
        from vllm.lora.request import LoRARequest

        if adapter is None:
            return None
        number = self.numbers.setdefault(str(adapter), len(self.numbers) + 1)
        return LoRARequest(adapter.name, number, str(adapter))

    def greedy(
        self, adapters: Sequence[Path | None], prompts: Sequence[Sequence[int]]
    ) -> list[list[int]]:
        """The tokens of each prompt with its adapter, all in one batch."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False
        )
        results = self.llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            sampling,
            lora_request=[self.request(adapter) for adapter in adapters],
            use_tqdm=False,
        )
        return [list(result.outputs[0].token_ids) for result in results]

    def scores(self, adapters: Sequence[Path | None], prompt: Sequence[int]) -> list[Tensor]:
        """As the function, of one prompt with each of the adapters, all in one batch."""
        from vllm import SamplingParams

        results = self.llm.generate(
            [{"prompt_token_ids": list(prompt)}] * len(adapters),
            SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False),
            lora_request=[self.request(adapter) for adapter in adapters],
            use_tqdm=False,
        )
        told = [zip(result.prompt_logprobs[1:], prompt[1:], strict=True) for result in results]
        return [torch.tensor([at[token].logprob for at, token in each]) for each in told]

    def add(self, adapter: Path) -> None:
        """Load an adapter, as a server does when it is asked to."""
        self.llm.llm_engine.add_lora(self.request(adapter))

    def model_runner(self) -> Any:
        """vLLM's part that holds the model and the slots."""
        core = self.llm.llm_engine.engine_core.engine_core
        return core.model_executor.driver_worker.worker.model_runner

    def close(self) -> None:
        """Leave room for the next engine."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        cleanup_dist_env_and_memory()


@contextmanager
def engine(base: Path, **options: Any) -> Iterator[Engine]:
    """vLLM's engine, closed at the end."""
    running = Engine(base, **options)
    try:
        yield running
    finally:
        running.close()
