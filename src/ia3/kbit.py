"""Preparing a quantized model for training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
) -> nn.Module:
    """Make a quantized model ready for adapters to be trained on it, as PEFT does.

    All parameters are frozen; those in half precision that are not quantized (norms, embeddings,
    the output layer) become float32; with checkpointing, gradients flow into the first block.

    Args:
        model: the quantized base model, changed in place.
        use_gradient_checkpointing: recompute activations in the backward pass.
        gradient_checkpointing_kwargs: for the model's `gradient_checkpointing_enable`.

    Returns:
        The same model.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        half = parameter.dtype in (torch.float16, torch.bfloat16)
        # Packed weights may be stored as half precision and must stay as they are.
        if half and type(parameter) is nn.Parameter and type(parameter.data) is torch.Tensor:
            parameter.data = parameter.data.to(torch.float32)
    if use_gradient_checkpointing:
        options = gradient_checkpointing_kwargs or {}
        if options.get("use_reentrant", True):
            model.enable_input_require_grads()  # type: ignore[operator]
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)  # type: ignore[operator]
    return model
