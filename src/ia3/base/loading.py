"""Loading a base model and its tokenizer: the embedded one, a local folder, or a hub id."""

from __future__ import annotations

import os
import threading
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import IA3Error, InvalidTypeError, StateError, shown
from .embedded import (
    EMBEDDED_MODEL as EMBEDDED_MODEL,
    embedded_model_folder as embedded_model_folder,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(eq=False)
class BaseModel:
    """A frozen model with its tokenizer, shared by all callers that name the same one.

    `name` is the folder, hub id or embedded model's name that was asked for. `lock` is held while
    an adapter is on the model: one lock a model, whatever the tokenizer.
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
        return bool(getattr(self.model.config, "is_encoder_decoder", False))


_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_loaded: weakref.WeakValueDictionary[tuple[Any, ...], BaseModel] = weakref.WeakValueDictionary()
# By the model's id: as a key it would be kept alive by its own value, which holds it.
_wrapped: weakref.WeakValueDictionary[int, BaseModel] = weakref.WeakValueDictionary()
# Kept alive, so that one classifier after the other does not load the same model again.
_last_loaded: list[BaseModel] = []
_loading = threading.RLock()


def _renew_locks() -> None:
    """Have locks that nobody holds, in a process that was forked off.

    Loading and training, for which these are held, are too long to wait for. Who trained in the
    other process does not go on here: the adapter that it had put on is found by the next one.
    """
    global _loading
    _loading = threading.RLock()
    _locks.clear()
    for base in {*_loaded.values(), *_wrapped.values()}:
        base.lock = _locks.setdefault(base.model, threading.RLock())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


def load_base_model(
    model: str | Path | nn.Module,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> BaseModel:
    """The base model with its tokenizer, in evaluation mode on its device.

    It is loaded once and shared: weights that one caller merges an adapter into are changed for all
    callers that name the same model. For a copy of your own, use transformers' `from_pretrained`.

    >>> from ia3 import load_base_model
    >>> base = load_base_model("smollm2-135m-instruct")
    >>> base.tokenizer("A short text", return_tensors="pt").input_ids.shape
    torch.Size([1, 3])
    >>> load_base_model("smollm2-135m-instruct") is base
    True

    Args:
        model: `"smollm2-135m-instruct"`, a folder, a hub id, or a loaded transformers model.
        tokenizer: needed with a loaded model whose config does not say where it came from.
        device: `"auto"` (a GPU if there is one), or torch's name of one.
        dtype: `"auto"` (the checkpoint's own on a GPU, float32 on a CPU), or torch's name of one.

    Raises:
        InvalidTypeError: an argument is of another type.
        StateError: there is no such device.
        MissingExtraError: the embedded model's package is not installed.
        IA3Error: the name or dtype means nothing, the model cannot be loaded or cannot rank
            answers, or it or its tokenizer brings code of its own: none is run, whoever named it.
    """
    if isinstance(model, nn.Module):
        return _wrap_loaded(model, tokenizer)
    if not isinstance(model, str | os.PathLike):
        expected = "a model's name, folder or hub id, or a loaded model"
        raise InvalidTypeError(f"model is {shown(model)}, expected {expected}")
    torch_device = device_named(device)
    if not isinstance(dtype, str):
        raise InvalidTypeError(f"dtype is {shown(dtype)}, expected 'auto', 'float32', ...")
    torch_dtype = getattr(torch, dtype, None)
    if dtype == "auto":
        torch_dtype = torch.float32 if torch_device.type == "cpu" else "auto"
    elif not isinstance(torch_dtype, torch.dtype) or not torch_dtype.is_floating_point:
        raise IA3Error(f"dtype {dtype!r} is unknown: expected 'auto', 'float32', 'bfloat16', ...")
    folder = str(embedded_model_folder()) if str(model) == EMBEDDED_MODEL else str(model)
    key = (folder, str(torch_device), str(torch_dtype), id(tokenizer) if tokenizer else None)
    with _loading:
        base = _loaded.get(key)
        if base is None:
            base = _load(folder, str(model), tokenizer, torch_device, torch_dtype)
            _loaded[key] = base
            _last_loaded[:] = [base]
        return base


def read_model_config(folder: str, name: str) -> Any:
    """The config of a model in a folder or on the hub; `name` is what messages call it."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        refuse_own_code(error, name)
        raise IA3Error(
            f"no model {name!r}: it is neither {EMBEDDED_MODEL!r}, nor a folder with a "
            f"transformers model, nor an id that the hub knows; where it lies elsewhere now, say "
            f"so in model ({first_line(error)})"
        ) from error
    except StrictDataclassError as error:
        # Its cause says which field has which value, and what is expected.
        raise IA3Error(
            f"{folder}/config.json is broken: {first_line(error.__cause__ or error)}; correct it "
            "there, or get the model again"
        ) from error


def _load(folder: str, name: str, tokenizer: Any, device: torch.device, dtype: Any) -> BaseModel:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = read_model_config(folder, name)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    try:
        model = kind.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
        tokenizer = tokenizer or load_tokenizer(folder)
    except (UnpicklingError, EOFError) as error:
        # transformers reads a pickle as `weights_only`: nothing in it is called but what makes
        # tensors. What torch says of others is how to run them all the same.
        raise IA3Error(
            f"the model {name!r} cannot be loaded: its weights are a pickle that is damaged, or "
            "holds more than tensors"
        ) from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        refuse_own_code(error, name)
        raise IA3Error(f"the model {name!r} cannot be loaded: {first_line(error)}") from error
    try:
        model.eval().to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        message = f"the model {name!r} cannot be put on device {str(device)!r}: {first_line(error)}"
        raise IA3Error(message) from error
    # What adapters record as their base model: the name that was asked for, never a cache path.
    model.config._name_or_path = name
    return BaseModel(model, tokenizer, name)


def refuse_own_code(error: Exception, name: str) -> None:
    """Raise an `IA3Error` where the error is transformers' for code that it was not to run.

    Unless it is told, transformers asks at the terminal whether to run a model's code.
    """
    if "trust_remote_code" in str(error):
        raise IA3Error(
            f"{name!r} brings code of its own, which is not run here: look at it, and if you trust "
            "it, load model and tokenizer with transformers and trust_remote_code=True, and give "
            "them as model= and tokenizer="
        ) from error


def load_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> Any:
    """A tokenizer by transformers.

    Raises:
        IA3Error: it brings code of its own that is not trusted, or a package that reads it is
            missing. transformers says then that tiktoken is, which reads files of another kind.
    """
    from transformers import AutoTokenizer
    from transformers.utils import is_protobuf_available, is_sentencepiece_available

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ImportError, ValueError) as error:
        refuse_own_code(error, str(folder))
        packages = {"protobuf": is_protobuf_available, "sentencepiece": is_sentencepiece_available}
        missing = " ".join(name for name, is_there in packages.items() if not is_there())
        if not missing or "tiktoken" not in str(error).lower():
            raise
        raise IA3Error(
            f"the tokenizer of {str(folder)!r} cannot be read without the packages that read "
            f"SentencePiece models: pip install {missing}"
        ) from error


def _wrap_loaded(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> BaseModel:
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
                tokenizer = load_tokenizer(folder)
            except IA3Error:
                raise
            except (OSError, ValueError) as error:
                raise IA3Error(
                    f"no tokenizer for the loaded {type(model).__name__}: its config says it came "
                    f"from {name!r}; give tokenizer="
                ) from error
        base = _wrapped[id(model)] = BaseModel(model, tokenizer, name)
        return base


def device_named(name: str | int | torch.device) -> torch.device:
    """The device of torch's name or number, or for `"auto"` the best there is."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    expected = "expected 'auto', 'cpu', 'cuda', 'cuda:1', 'mps', ..."
    if isinstance(name, bool) or not isinstance(name, str | int | torch.device):
        raise InvalidTypeError(f"device is {shown(name)}, {expected}")
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError) as error:
        raise StateError(f"device {shown(name)} is unknown: {expected}") from error
    if device.type == "meta":
        raise IA3Error(f"device {name!r} computes nothing: {expected}")
    return device


def first_line(error: BaseException) -> str:
    """What a library's error says first; the rest is advice on that library."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
