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

SMALL = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    pad_token_id=0,
)
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


def described(model: torch.nn.Module) -> dict[str, Any]:
    """What preparing may change."""
    return {
        "parameters": {
            name: (parameter.dtype, type(parameter).__name__, parameter.requires_grad)
            for name, parameter in model.named_parameters()
        },
        "checkpointing": [
            name
            for name, module in model.named_modules()
            if getattr(module, "gradient_checkpointing", False)
        ],
        "embeddings require gradients": model.get_input_embeddings()(  # type: ignore[operator]
            torch.tensor([3])
        ).requires_grad,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("base")
    plain().save_pretrained(made)
    return made


def quantized(folder: Path, quantization: str) -> PreTrainedModel:
    pytest.importorskip("bitsandbytes")
    model: PreTrainedModel = LlamaForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(**QUANTIZATIONS[quantization]),
        device_map={"": "cpu"},
    )
    return model


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


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("options", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_a_quantized_model_is_prepared_as_by_peft(folder, quantization, options):
    results = []
    for library in BOTH:
        model = quantized(folder, quantization)
        library.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=options)
        results.append(described(model))
    assert results[0] == results[1]
    assert results[0]["checkpointing"]
    assert results[0]["parameters"]["model.norm.weight"][0] == torch.float32


# -- training --------------------------------------------------------------------------------------


def train(
    library: Any, base: PreTrainedModel, folder: Path
) -> tuple[list[float], dict[str, Tensor]]:
    """Two steps with transformers' Trainer: (the losses, the adapter in the last checkpoint)."""
    rows = [
        {"input_ids": torch.arange(i, i + 8), "labels": torch.arange(i, i + 8)} for i in range(8)
    ]
    run = Trainer(
        model=library.get_peft_model(base, library.IA3Config(task_type="CAUSAL_LM")),
        args=TrainingArguments(
            str(folder),
            max_steps=2,
            save_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=rows,
    )
    run.train()
    checkpoint = folder / "checkpoint-2"
    assert not (checkpoint / "model.safetensors").exists()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    return losses, load_file(checkpoint / "adapter_model.safetensors")


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_trainer_trains_the_vectors_as_with_peft(folder, tmp_path, quantization):
    results = []
    for library in BOTH:
        base = library.prepare_model_for_kbit_training(quantized(folder, quantization))
        results.append(train(library, base, tmp_path / library.__name__))
    (losses, vectors), (their_losses, their_vectors) = results
    assert losses == pytest.approx(their_losses, rel=1e-3)
    assert vectors.keys() == their_vectors.keys()
    for name, vector in vectors.items():
        assert (vector - 1).abs().max() > 1e-3, name
        # Adam's steps have the same size whatever the gradient's: near zero its sign may differ.
        same = torch.isclose(vector, their_vectors[name], rtol=1e-2, atol=1e-3)
        assert same.float().mean() > 0.9, name


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_model_that_was_not_prepared_trains_too(folder, tmp_path, quantization):
    """In bfloat16; with PEFT the float32 vectors widen the keys alone, and attention fails."""
    losses, vectors = train(ia3, quantized(folder, quantization), tmp_path / "ours")
    assert all(math.isfinite(loss) for loss in losses)
    assert all((vector - 1).abs().max() > 1e-3 for vector in vectors.values())
    assert {vector.dtype for vector in vectors.values()} == {torch.float32}
    with pytest.raises(RuntimeError, match="same dtype"):
        train(peft, quantized(folder, quantization), tmp_path / "theirs")


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_vectors_are_counted_as_peft_counts_them(folder, quantization):
    ours, theirs = (
        library.get_peft_model(
            quantized(folder, quantization), library.IA3Config(task_type="CAUSAL_LM")
        )
        for library in BOTH
    )
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert ours.get_nb_trainable_parameters()[0] == sum(
        vector.numel() for vector in ours.vectors("default").values()
    )


@pytest.mark.quantized
def test_reentrant_checkpointing_gives_every_vector_its_gradient(folder):
    ids = torch.arange(1, 9)[None]
    gradients = []
    for checkpointing in (False, True):
        base = ia3.prepare_model_for_kbit_training(
            quantized(folder, "8-bit"), checkpointing, {"use_reentrant": True}
        )
        model = ia3.get_peft_model(base, ia3.IA3Config(task_type="CAUSAL_LM"))
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: v.grad for name, v in model.vectors("default").items()})
    assert all(gradient is not None for gradient in gradients[1].values())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
