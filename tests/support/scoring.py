"""Tiny models that share a prompt among choices, and some that cannot."""

import random
from collections.abc import Callable

import torch
import transformers as hf
from torch import nn

from ia3.base.loading import BaseModel
from ia3.tfew.prompts.encoding import EncodedExample
from support.tfew import T5, VOCABULARY, plain_token_scores, random_base

WIDTH = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}

GPT = {"vocab_size": VOCABULARY, "initializer_range": 0.2}
LLAMA = {**WIDTH, "intermediate_size": 48, "num_attention_heads": 4, "initializer_range": 0.2}
GEMMA = {**LLAMA, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16}
GEMMA |= {"layer_types": ["sliding_attention", "full_attention"]}
NEO = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 512}
NEO |= {"attention_types": [[["global", "local"], 1]], "window_size": 16}
OPT = {**WIDTH, "ffn_dim": 48, "num_attention_heads": 4, "word_embed_proj_dim": 32}
BART = {"vocab_size": VOCABULARY, "d_model": 32, "max_position_embeddings": 256}
for _part in ("encoder", "decoder"):
    BART |= {f"{_part}_layers": 2, f"{_part}_attention_heads": 4, f"{_part}_ffn_dim": 48}
BART |= {"dropout": 0.0, "init_std": 0.2, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
BART |= {"decoder_start_token_id": 2, "forced_eos_token_id": 2}

SHARING = {
    "llama": hf.LlamaConfig(**LLAMA, num_key_value_heads=2, max_position_embeddings=512),
    "gpt2": hf.GPT2Config(**GPT, n_embd=32, n_layer=2, n_head=4, n_positions=512),
    "qwen2": hf.Qwen2Config(**LLAMA, num_key_value_heads=2),
    "gpt_neox": hf.GPTNeoXConfig(**LLAMA, max_position_embeddings=512),
    "opt": hf.OPTConfig(**OPT, init_std=0.2),
}

NOT_SHARING = {
    "bloom": hf.BloomConfig(**GPT, hidden_size=32, n_layer=2, n_head=4),
    "falcon-alibi": hf.FalconConfig(
        **WIDTH, num_attention_heads=4, alibi=True, initializer_range=0.2
    ),
    "mamba": hf.MambaConfig(**WIDTH, state_size=8, initializer_range=0.2),
}

# Share short prompts; beyond the window each choice needs a row of its own.
WINDOWED = {
    "mistral": hf.MistralConfig(**LLAMA, num_key_value_heads=2, sliding_window=16),
    "gemma3": hf.Gemma3TextConfig(**GEMMA),
    # Its window lies over places in the sequence, which sharing changes.
    "gpt_neo": hf.GPTNeoConfig(**GPT, **NEO),
}

ENCODER_DECODER = {
    "t5": hf.T5Config(**T5),
    "bart": hf.BartConfig(**BART),
}

ALL = {**SHARING, **NOT_SHARING, **WINDOWED, **ENCODER_DECODER}

bases: dict[str, BaseModel] = {}


def base_of(name: str) -> BaseModel:
    if name not in bases:
        bases[name] = random_base(ALL[name])
    return bases[name]


def random_examples(shapes, seed=0, shared=0):
    """Examples of random tokens.

    Args:
        shapes: for every example its prompt's length and its choices' lengths.
        seed: of the tokens.
        shared: so many tokens at the beginning of every prompt are the same.
    """
    draw = random.Random(seed)

    def ids(count):
        return tuple(draw.randrange(3, VOCABULARY) for _ in range(count))

    prefix = ids(shared)
    return [
        EncodedExample(prefix + ids(prompt), tuple(ids(c) for c in choices))
        for prompt, choices in shapes
    ]


def plain_scores(base: BaseModel, example: EncodedExample) -> torch.Tensor:
    """The choices' mean log-probabilities by whole prompts, one after the other, `[choices]`."""
    with torch.no_grad():
        return torch.stack([tokens.mean() for tokens in plain_token_scores(base, example)])


def tokens_seen(model: nn.Module, work: Callable[[], object]) -> list[int]:
    """How many tokens the model embeds, call by call: an encoder-decoder has two calls."""
    seen = []
    handles = [
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.num_embeddings == model.config.vocab_size
    ]
    try:
        work()
    finally:
        for handle in handles:
            handle.remove()
    return seen
