"""Preparing a quantized model for training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..arguments import flag, instance

# Methods whose kernels want the other parameters in the dtype that the model was loaded in.
KEEP_DTYPE = ("gptq", "aqlm", "eetq", "hqq", "torchao")
KWARGS = "gradient_checkpointing_kwargs"


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Make a quantized model ready for adapters to be trained on it, as PEFT does.

    All parameters are frozen; those in half precision that are not quantized (norms, embeddings,
    the output layer) become float32, except beside methods that cannot take that; with
    checkpointing, gradients flow into the first block. A model that is not quantized is frozen and
    becomes float32, no more.

    Args:
        model: the quantized base model, changed in place.
        use_gradient_checkpointing: recompute activations in the backward pass.
        gradient_checkpointing_kwargs: for the model's `gradient_checkpointing_enable`.
        auto_clear_cache: give the memory of the half-precision parameters back to the GPU.

    Returns:
        The same model.

    Raises:
        InvalidTypeError: an argument is of another type.
    """
    instance("model", model, nn.Module, "a torch.nn.Module")
    checkpointing = flag("use_gradient_checkpointing", use_gradient_checkpointing)
    clear = flag("auto_clear_cache", auto_clear_cache)
    given = gradient_checkpointing_kwargs
    options = {} if given is None else dict(instance(KWARGS, given, Mapping, "a mapping"))
    method = getattr(model, "quantization_method", None)
    keeps_dtype = method in KEEP_DTYPE or getattr(model, "hqq_quantized", False)
    quantized = keeps_dtype or any(
        getattr(model, mark, False) for mark in ("is_loaded_in_8bit", "is_loaded_in_4bit")
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        half = parameter.dtype in (torch.float16, torch.bfloat16)
        # Packed weights may be stored as half precision and must stay as they are.
        plain = type(parameter) is nn.Parameter and type(parameter.data) is torch.Tensor
        if half and plain and not keeps_dtype:
            parameter.data = parameter.data.to(torch.float32)
    if clear and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if checkpointing and quantized:
        if options.get("use_reentrant", True):
            model.enable_input_require_grads()  # type: ignore[operator]
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)  # type: ignore[operator]
    return model
