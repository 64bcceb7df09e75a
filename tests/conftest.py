"""Tiny random models, built from their configs: nothing is downloaded."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

os.environ["HF_HUB_OFFLINE"] = "1"  # before the first import of huggingface_hub

import pytest
import torch
from support.tfew import random_model
from torch import Tensor
from transformers import GPT2Config, LlamaConfig, PreTrainedModel, T5Config

# A shell that runs the tests in the background has Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

VOCABULARY = 48

MakeModel = Callable[[str], PreTrainedModel]
MakeInputs = Callable[[str], dict[str, Tensor]]

LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
LLAMA |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# Its linear layers are `Conv1D`.
GPT2 = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
# Version 1.1, whose feed-forward layers are gated.
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
T5 |= {"feed_forward_proj": "gated-gelu", "dropout_rate": 0.0, "tie_word_embeddings": False}
T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
CONFIGS = {"llama": (LlamaConfig, LLAMA), "gpt2": (GPT2Config, GPT2), "t5": (T5Config, T5)}


@pytest.fixture(scope="session")
def make_model():
    """`"llama"`, `"gpt2"` or `"t5"` -> a new model without dropout, the same bits every time."""

    def make(kind):
        config, settings = CONFIGS[kind]
        return random_model(config(vocab_size=VOCABULARY, **settings))

    return make


@pytest.fixture(scope="session")
def make_inputs():
    """A batch of that kind of model, labels included; the same every time."""

    def make(kind):
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, VOCABULARY, (3, 11), generator=generator)
        labels = torch.randint(3, VOCABULARY, (3, 5), generator=generator)
        labels = labels if kind == "t5" else ids
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    return make


@pytest.fixture
def tiny_llama(make_model):
    """A LLaMA of two layers."""
    return make_model("llama")


@pytest.fixture
def tiny_gpt2(make_model):
    """A GPT-2 of two layers."""
    return make_model("gpt2")


@pytest.fixture
def tiny_t5(make_model):
    """A T5 of two and two layers."""
    return make_model("t5")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, make_model):
    """The folder of a random model with the embedded model's tokenizer."""
    from transformers import AutoTokenizer

    from ia3.base.loading import embedded_model_folder

    folder, model = tmp_path_factory.mktemp("model"), make_model("llama")
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_folder())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, getattr(tokenizer, name))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
