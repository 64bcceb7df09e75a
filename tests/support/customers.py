"""Classifiers of random vectors on a tiny model, each saved in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel

from ia3 import FewShotClassifier
from support.tfew import word_tokenizer

TEXTS = ["red fox", "a lazy dog", "the fox", "my brown dog jumps over the fox", "dog", "red red"]
LABELS = ["fox", "dog", "bird", "red"]
WORDS = [*" ".join([*TEXTS, *LABELS, "Fox Dog Bird Red Is it : ? Kind Category"]).split()]
TOKENIZER = word_tokenizer(WORDS)
TASK = "ia3_task.json"


def save_encoder(folder: Path) -> Path:
    """A sentence encoder of two blocks, with its tokenizer."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0)
        model = BertModel(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def saved(folder: Path, seed: int, model: Any, **settings: Any) -> Path:
    """A classifier of 2 to 4 labels with random vectors."""
    some = LABELS[: 2 + seed % 3]
    texts = [TEXTS[(seed + i) % len(TEXTS)] for i in range(2 * len(some))]
    classifier = FewShotClassifier(model, steps=0, **settings).fit(texts, [*some, *some])
    generator = torch.Generator().manual_seed(seed)
    for vector in classifier.adapter_.vectors.values():
        vector.copy_(1 + 0.3 * torch.randn(vector.shape, generator=generator))
    classifier.save(folder)
    # As held-out folds would have it.
    task = json.loads((folder / TASK).read_text("utf-8"))
    (folder / TASK).write_text(json.dumps(task | {"temperature": 0.5 + seed % 4}), "utf-8")
    return folder
