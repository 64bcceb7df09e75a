"""A base model that another engine computes with: its modules and its tokenizer, without memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import IA3Error
from ..files.hub import snapshot
from .embedded import EMBEDDED_MODEL, embedded_model_folder
from .loading import BaseModel, load_tokenizer, loading, read_model_config


def model_folder(model: str) -> str:
    """The folder of a model's files: the embedded one's, a local one, or a fetched one.

    Raises:
        MissingExtraError: the embedded model's package is not installed.
        MissingFileError: there is no such folder, and no such model on the hub.
    """
    if model == EMBEDDED_MODEL:
        return str(embedded_model_folder())
    if os.path.isdir(model):
        return model
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    return str(snapshot("model", model, patterns))


def load_structure(model: str, folder: str) -> BaseModel:
    """A language model as its adapters see it: nothing can be computed with it.

    Its parameters are on the meta device, but for those by which models are told apart
    (`Fingerprint`): these are views of the files, which take no memory until they are read.

    Raises:
        BrokenFileError: its config is broken.
        IA3Error: it cannot be read, is no decoder-only model, or brings code of its own.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = read_model_config(folder, model)
    if config.is_encoder_decoder:
        raise IA3Error(
            f"the model {model!r} has an encoder and a decoder: expected a decoder alone"
        )
    with loading(model):
        tokenizer = load_tokenizer(folder)
        with torch.device("meta"):
            found = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        if (Path(folder) / "generation_config.json").is_file():
            found.generation_config = GenerationConfig.from_pretrained(folder)
        _view(found, Path(folder))
    found.eval().requires_grad_(False)
    found.config._name_or_path = model
    return BaseModel(found, tokenizer, model)


def _view(model: nn.Module, folder: Path) -> None:
    """Have views of the files as the parameters that are no linear layer's."""
    from safetensors import safe_open

    wanted = {
        f"{name}.{own}" if name else own: (module, own)
        for name, module in model.named_modules()
        if not isinstance(module, nn.Linear)
        for own in module._parameters
    }
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in wanted.keys() & {*file.keys()}:
                module, own = wanted[name]
                value: Any = file.get_tensor(name)
                before = module._parameters[own]
                if before is not None and value.shape == before.shape:
                    module._parameters[own] = nn.Parameter(value, requires_grad=False)
