"""A tiny model with two adapters, of which one has vectors where the other has none."""

from __future__ import annotations

from typing import Any

import torch

from ia3 import IA3Config, IA3Model
from support.tfew import tiny_llama

WIDE = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
NARROW = IA3Config(target_modules=["k_proj"], feedforward_modules=[])


def wide_and_narrow() -> IA3Model:
    """Two adapters of random vectors, the second one with fewer of them; the first is active."""
    model = IA3Model(tiny_llama(), WIDE, "wide").eval()
    model.add_adapter("narrow", NARROW)
    generator = torch.Generator().manual_seed(0)
    for name in ("wide", "narrow"):
        for vector in model.vectors(name).values():
            vector.data.uniform_(0.2, 2, generator=generator)
    return model


@torch.no_grad()
def output(model: torch.nn.Module, **given: Any) -> torch.Tensor:
    """Its logits of a row, `[1, 5, vocabulary]`."""
    logits: torch.Tensor = model(torch.arange(5)[None], **given).logits
    return logits.clone()
