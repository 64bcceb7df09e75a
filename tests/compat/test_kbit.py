"""`prepare_model_for_kbit_training`, and training over a quantized base model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.utils.quantization_config import QuantizationMethod

import ia3

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "pad_token_id": 0}
SMALL = LlamaConfig(**SIZES, num_hidden_layers=2, num_attention_heads=4)
QUANTIZATIONS = {
    "4-bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "4-bit in bfloat16 storage": {"load_in_4bit": True, "bnb_4bit_quant_storage": torch.bfloat16},
    "8-bit": {"load_in_8bit": True},
}
BOTH = (ia3, peft)


def plain() -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(SMALL).to(torch.bfloat16)


def described(model: torch.nn.Module) -> tuple[Any, ...]:
    """What preparing may change."""
    modules, embed = model.named_modules(), model.get_input_embeddings()
    return (
        {n: (p.dtype, type(p).__name__, p.requires_grad) for n, p in model.named_parameters()},
        [name for name, module in modules if getattr(module, "gradient_checkpointing", False)],
        embed(torch.tensor([3])).requires_grad,
    )


@pytest.fixture(params=[pytest.param(q, marks=pytest.mark.quantized) for q in QUANTIZATIONS])
def quantized(tmp_path, request):
    """A function that loads the model quantized."""
    pytest.importorskip("bitsandbytes")
    plain().save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(**QUANTIZATIONS[request.param])
    options = {"quantization_config": config, "device_map": {"": "cpu"}}
    return lambda: LlamaForCausalLM.from_pretrained(tmp_path / "base", **options)


# -- equal to PEFT ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [None, *QuantizationMethod])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_an_ordinary_model_is_prepared_as_by_peft(method, checkpointing):
    """Also one that says that it is quantized, but holds ordinary parameters beside."""
    results = []
    for library in BOTH:
        model = plain()
        if method is not None:
            model.quantization_method = method
        assert library.prepare_model_for_kbit_training(model, checkpointing) is model
        results.append(described(model))
    assert results[0] == results[1]


@pytest.mark.parametrize("options", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_a_quantized_model_is_prepared_as_by_peft(quantized, options):
    results = []
    for library in BOTH:
        model = quantized()
        library.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=options)
        results.append(described(model))
    assert results[0] == results[1]
    parameters, checkpointing, _ = results[0]
    assert checkpointing
    assert parameters["model.norm.weight"][0] == torch.float32


# -- training --------------------------------------------------------------------------------------


def train(library: Any, base: Any, folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    """Two steps with transformers' Trainer: (the losses, the adapter in the last checkpoint)."""
    ids = [torch.arange(start, start + 8) for start in range(8)]
    steps = {"max_steps": 2, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
    run = Trainer(
        model=library.get_peft_model(base, library.IA3Config(task_type="CAUSAL_LM")),
        args=TrainingArguments(str(folder), **steps, **quiet, per_device_train_batch_size=4),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
    )
    run.train()
    checkpoint = folder / "checkpoint-2"
    assert not (checkpoint / "model.safetensors").exists()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    return losses, load_file(checkpoint / "adapter_model.safetensors")


def test_the_trainer_trains_the_vectors_as_with_peft(quantized, tmp_path):
    results = []
    for library in BOTH:
        base = library.prepare_model_for_kbit_training(quantized())
        results.append(train(library, base, tmp_path / library.__name__))
    (losses, vectors), (their_losses, their_vectors) = results
    assert losses == pytest.approx(their_losses, rel=1e-3)
    assert vectors.keys() == their_vectors.keys()
    for name, vector in vectors.items():
        assert (vector - 1).abs().max() > 1e-3, name
        # Adam's steps have the same size whatever the gradient's: near zero its sign may differ.
        same = torch.isclose(vector, their_vectors[name], rtol=1e-2, atol=1e-3)
        assert same.float().mean() > 0.9, name


def test_a_model_that_was_not_prepared_trains_too(quantized, tmp_path):
    """In bfloat16; with PEFT the float32 vectors widen the keys alone, and attention fails."""
    losses, vectors = train(ia3, quantized(), tmp_path / "ours")
    assert all(math.isfinite(loss) for loss in losses)
    assert all((vector - 1).abs().max() > 1e-3 for vector in vectors.values())
    assert {vector.dtype for vector in vectors.values()} == {torch.float32}
    with pytest.raises(RuntimeError, match="same dtype"):
        train(peft, quantized(), tmp_path / "theirs")


def test_vectors_are_counted_as_peft_counts_them(quantized):
    config = {"task_type": "CAUSAL_LM"}
    ours, theirs = (lib.get_peft_model(quantized(), lib.IA3Config(**config)) for lib in BOTH)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    values = sum(vector.numel() for vector in ours.vectors("default").values())
    assert ours.get_nb_trainable_parameters()[0] == values


def test_reentrant_checkpointing_gives_every_vector_its_gradient(quantized):
    ids = torch.arange(1, 9)[None]
    gradients = []
    for checkpointing in (False, True):
        options = {"use_reentrant": True}
        base = ia3.prepare_model_for_kbit_training(quantized(), checkpointing, options)
        model = ia3.get_peft_model(base, ia3.IA3Config(task_type="CAUSAL_LM")).train()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: v.grad for name, v in model.vectors("default").items()})
    assert all(gradient is not None for gradient in gradients[1].values())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
