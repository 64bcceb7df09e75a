"""Models and vectors that are formulas of their indices: the same on every machine and version."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, LlamaConfig

from support.tfew import random_model

WORDS = ("it", "is", "a", "good", "bad", "day", "so", "what", "great", "awful", "warm", "cold")


def formula_llama() -> nn.Module:
    """Two layers, 16 wide, 64 tokens."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return _by_formula(random_model(LlamaConfig(**sizes, **heads, num_hidden_layers=2)))


def formula_gpt2() -> nn.Module:
    """Two layers, 16 wide, 64 tokens; query, key and value are one projection."""
    sizes = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return _by_formula(random_model(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)))


def formula_bert() -> nn.Module:
    """An encoder of two layers, 16 wide, 64 tokens."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return _by_formula(BertModel(BertConfig(**sizes, num_attention_heads=2)).eval())


def formula_vector(site: int, size: int) -> Tensor:
    """`[size]`, float32, in steps of 1/32 from 0.75 to 1.25, exact in float32."""
    return 1 + ((7 * torch.arange(size) + 3 * site) % 17 - 8) / 32


def _by_formula(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            index = torch.arange(parameter.numel(), dtype=torch.float64)
            values = torch.sin(1 + number + 1.7 * index + (0.013 * index) ** 2)
            around = 1.0 if parameter.dim() == 1 else 0.0
            parameter.copy_((around + 0.3 * values).reshape(parameter.shape))
    return model
