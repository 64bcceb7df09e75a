"""A small language model, adapters on it, and an engine that serves them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedConfig

import ia3
from ia3.base.loading import BaseModel
from ia3.serve.engine.bases import ServedBase
from ia3.serve.engine.interface import Engine, Generation, Piece
from ia3.serve.engine.joined import JoinedEngine
from ia3.serve.engine.worker import LocalEngine
from support.pairs import randomize, vectors
from support.tfew import random_model, word_tokenizer

VOCABULARY = 64
WORDS = [f"w{i}" for i in range(3, VOCABULARY)]
# Such weights that another adapter gives other tokens.
LLAMA = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.6,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=1,
)


def served_base(config: PreTrainedConfig = LLAMA, adapters: int = 8, **options: Any) -> ServedBase:
    """A model with adapters `"a0"`, `"a1"`, ... of random vectors, given in memory."""
    model = random_model(config)
    base = BaseModel(model, word_tokenizer(WORDS), config.model_type)
    served = ServedBase(config.model_type, base, ia3.AdapterBank(model, **options))
    for i in range(adapters):
        served.bank.add(f"a{i}", adapter(config, i))
    return served


def adapter(config: PreTrainedConfig, seed: int) -> Any:
    """An adapter of such a model, with random vectors."""
    model = adapted(config, seed)
    return model.adapter("default")


def adapted(config: PreTrainedConfig, seed: int | None) -> Any:
    """Such a model of its own, with that adapter active; the base model for `None`."""
    model: Any = random_model(config)
    if seed is None:
        return model
    model = ia3.get_peft_model(model, ia3.IA3Config())
    randomize(vectors(model), seed)
    return model


def generated_alone(
    config: PreTrainedConfig, seed: int | None, prompt: Sequence[int], count: int, **options: Any
) -> list[int]:
    """What transformers' own `generate` gives for one prompt, greedily: the new tokens."""
    ids = torch.tensor([list(prompt)])
    model = adapted(config, seed)
    options = {"do_sample": False, "max_new_tokens": count, **options}
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    new: list[int] = found[0].tolist()
    return new if config.is_encoder_decoder else new[len(prompt) :]


def prompts(count: int, most: int = 30) -> list[tuple[int, ...]]:
    """Prompts of unlike lengths."""
    generator = torch.Generator().manual_seed(7)

    def ids(length: int) -> tuple[int, ...]:
        drawn = torch.randint(3, VOCABULARY, (length,), generator=generator)
        return tuple(drawn.tolist())

    return [ids(1 + (11 * i) % most) for i in range(count)]


def greedy(prompt: Sequence[int], adapter: str | None, max_tokens: int, **more: Any) -> Generation:
    return replace(Generation(tuple(prompt), adapter, max_tokens, temperature=0.0), **more)


def tokens_of(pieces: Sequence[Piece]) -> list[int]:
    """The tokens that a text of `WORDS` has; the one that ends it is none."""
    return [int(word[1:]) for word in "".join(piece.text for piece in pieces).split()]


@contextmanager
def engine_of(*bases: ServedBase) -> Iterator[JoinedEngine]:
    engine = JoinedEngine([LocalEngine(base) for base in bases])
    try:
        yield engine
    finally:
        engine.close()


async def pieces_of(stream: AsyncIterator[Piece]) -> list[Piece]:
    return [piece async for piece in stream]


async def all_pieces(engine: Engine, asked: Sequence[Generation]) -> list[list[Piece]]:
    """The pieces of several generations that run at once."""
    return await asyncio.gather(*(pieces_of(engine.submit(each)) for each in asked))
