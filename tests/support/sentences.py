"""A small random sentence encoder, made in memory: texts of known words, the mean of the tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel

from ia3.base.encoders import SentenceEncoder, load_encoder
from ia3.model.ia3_model import IA3Model
from support.tfew import word_tokenizer

WORDS = "a the bill invoice charge parcel van courier is was late paid wrong lost ok . , x y z"
WORDS += " Category : billing delivery other"
BILLS = ["a bill", "the invoice is wrong", "a charge . paid", "the bill was late"]
PARCELS = ["a parcel", "the van is late", "the courier lost a parcel", "the van was ok"]
TEXTS = [*BILLS, *PARCELS]
LABELS = ["billing"] * 4 + ["delivery"] * 4
HIDDEN = 16


def tokenizer() -> Any:
    return word_tokenizer(WORDS.split(), end=True)


def bert(seed: int = 0, **settings: Any) -> nn.Module:
    """Two layers, whose weights are large enough that texts differ; in evaluation mode."""
    sizes = {"vocab_size": 64, "hidden_size": HIDDEN, "intermediate_size": 24}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = BertConfig(**{**sizes, "initializer_range": 0.5, **settings}, pad_token_id=0)
        return BertModel(config, add_pooling_layer=False).eval()


def encoder(seed: int = 0, **settings: Any) -> SentenceEncoder:
    return load_encoder(bert(seed, **settings), tokenizer=tokenizer())


def vectors_of(model: IA3Model) -> dict[str, torch.Tensor]:
    """A copy of what is trained."""
    return {name: vector.detach().clone() for name, vector in model.vectors("default").items()}
