"""Files of other libraries: whose a folder is that holds no adapter of this one's format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import MissingFileError
from .hub import CONFIG_NAME

# Keys that stand in another library's adapter_config.json, and whose it is then.
_KEYS = {
    ("config", "model_class"): (
        "an adapter of AdapterHub's library `adapters`, which loads it with "
        "model.load_adapter(folder)"
    ),
    ("lora_parameters",): "mlx-lm's, which loads it with load(model, adapter_path=folder)",
    ("fine_tune_type",): "mlx-lm's, which loads it with load(model, adapter_path=folder)",
    ("lora_alpha",): "a LoRA adapter's: peft's LoraConfig has such keys",
    ("model_type",): "a whole model's, which transformers loads",
    ("architectures",): "a whole model's, which transformers loads",
}
# Files that stand in other libraries' folders; the first that is there tells.
_FILES = {
    "config_setfit.json": "a SetFit model: SetFitModel.from_pretrained(folder) loads it",
    "adapter_fusion_config.json": "an adapter fusion of AdapterHub's library `adapters`",
    "head_config.json": "a prediction head of AdapterHub's library `adapters`",
    "pytorch_lora_weights.safetensors": "LoRA weights of diffusers",
    "modules.json": "a sentence-transformers model: SentenceTransformer(folder) loads it",
    "model_index.json": "a pipeline of diffusers",
    "config.json": "a whole model without an adapter: transformers' from_pretrained loads it",
}


def owner_of_config(values: Mapping[str, Any]) -> str | None:
    """Whose an adapter_config.json without a `peft_type` is, in words; `None` if none can tell."""
    return next((whose for keys, whose in _KEYS.items() if values.keys() >= {*keys}), None)


def no_adapter(folder: Path) -> MissingFileError:
    """The error for a folder without an adapter_config.json; it says what the folder holds."""
    inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
    whose = next((whose for name, whose in _FILES.items() if (folder / name).is_file()), None)
    held = f"; it holds {whose}" if whose else ""
    if inside:
        held += f"; there are adapters in its folders {inside[:5]}: name one of them"
    return MissingFileError(f"no adapter in {folder}: {CONFIG_NAME} is not there{held}")
