"""Tiny random models, built from their configs: nothing is downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable

os.environ["HF_HUB_OFFLINE"] = "1"  # before the first import of huggingface_hub

import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 48

MakeModel = Callable[[str], PreTrainedModel]
MakeInputs = Callable[[str], dict[str, Tensor]]


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def _gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            tie_word_embeddings=False,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=2,
        )
    )


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """`"llama"`, `"gpt2"` or `"t5"` -> a new model without dropout, the same bits every time."""
    makers = {"llama": _llama, "gpt2": _gpt2, "t5": _t5}

    def make(kind: str) -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return makers[kind]().eval()

    return make


@pytest.fixture(scope="session")
def make_inputs() -> MakeInputs:
    """A batch of that kind of model, labels included; the same every time."""

    def make(kind: str) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, VOCABULARY, (3, 11), generator=generator)
        labels = torch.randint(3, VOCABULARY, (3, 5), generator=generator)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": labels if kind == "t5" else ids,
        }

    return make


@pytest.fixture
def tiny_llama(make_model: MakeModel) -> PreTrainedModel:
    """A LLaMA of two layers."""
    return make_model("llama")


@pytest.fixture
def tiny_gpt2(make_model: MakeModel) -> PreTrainedModel:
    """A GPT-2 of two layers, whose linear layers are `Conv1D`."""
    return make_model("gpt2")


@pytest.fixture
def tiny_t5(make_model: MakeModel) -> PreTrainedModel:
    """A T5 v1.1 (gated feed-forward layers) of two and two layers."""
    return make_model("t5")
