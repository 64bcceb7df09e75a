"""Loading a base model and its tokenizer: the embedded one, a local folder, or a hub id."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn

from ..arguments import flag
from ..errors import BrokenFileError, IA3Error, InvalidTypeError, StateError, shown
from .embedded import (
    EMBEDDED_ENCODER,
    EMBEDDED_MODEL as EMBEDDED_MODEL,
    embedded_model_folder as embedded_model_folder,
)
from .processes import processes, unlaunched
from .progress import working
from .sharding import load_sharded
from .torch_state import usual_state

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(eq=False)
class LoadedModel:
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

    def check_tokens(self, ids: Iterable[Sequence[int]]) -> None:
        """Raise `IA3Error` for a token that the model has no embedding of; `ids` are of texts."""
        get = getattr(self.model, "get_input_embeddings", None)
        count = None if get is None else getattr(get(), "num_embeddings", None)
        if count is not None and (most := max(chain.from_iterable(ids), default=0)) >= count:
            raise IA3Error(
                f"the tokenizer gives the token {most:,}, and the model "
                f"{self.name or type(self.model).__name__!r} has {count:,}: they are of two models"
            )


@dataclass(eq=False)
class BaseModel(LoadedModel):
    """A language model."""

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(getattr(self.model.config, "is_encoder_decoder", False))


_Loaded = TypeVar("_Loaded", bound=LoadedModel)

_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
# By what was asked for; of a loaded model by its id: as a key it would be kept alive by its own
# value, which holds it.
_shared: weakref.WeakValueDictionary[tuple[Any, ...], LoadedModel] = weakref.WeakValueDictionary()
# Kept alive, so that one classifier after the other does not load the same model again: the last
# language model and the last encoder.
_last_loaded: dict[type[LoadedModel], LoadedModel] = {}
_loading = threading.RLock()


def _renew_locks() -> None:
    """Have locks that nobody holds, in a process that was forked off.

    Loading and training, for which these are held, are too long to wait for. Who trained in the
    other process does not go on here: the adapter that it had put on is found by the next one.
    """
    global _loading
    _loading = threading.RLock()
    _locks.clear()
    for base in set(_shared.values()):
        base.lock = _locks.setdefault(base.model, threading.RLock())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


def load_base_model(
    model: str | Path | nn.Module,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str = "auto",
    dtype: str = "auto",
    shard: bool = False,
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
        shard: spread the weights over the processes of the job that `torchrun` or `accelerate
            launch` started, so that none of them holds all (FSDP 2). All of them call this, and
            from then on all call the model together, as often as each other. In one process it
            changes nothing.

    Raises:
        InvalidTypeError: an argument is of another type.
        StateError: there is no such device, or the model cannot be spread.
        MissingExtraError: the embedded model's package is not installed.
        IA3Error: the name or dtype means nothing, the model cannot be loaded or cannot rank
            answers, or it or its tokenizer brings code of its own: none is run, whoever named it.
    """
    if isinstance(model, nn.Module):
        return _wrap_loaded(model, tokenizer)
    if not isinstance(model, str | os.PathLike):
        expected = "a model's name, folder or hub id, or a loaded model"
        raise InvalidTypeError(f"model is {shown(model)}, expected {expected}")
    # Before a device is looked for: each process has its own.
    shard = flag("shard", shard) and processes().count > 1
    torch_device, torch_dtype = device_and_dtype(device, dtype)
    if str(model) == EMBEDDED_MODEL:
        with working(f"loading {model}"):
            folder = str(embedded_model_folder())
    else:
        folder = str(model)

    def load() -> BaseModel:
        with working(f"loading {model}"):
            return _load(folder, str(model), tokenizer, torch_device, torch_dtype, shard)

    return load_once(BaseModel, (folder, torch_device, torch_dtype, shard), tokenizer, load)


def load_once(
    kind: type[_Loaded],
    asked: tuple[Any, ...],
    tokenizer: PreTrainedTokenizerBase | None,
    load: Callable[[], _Loaded],
) -> _Loaded:
    """What was loaded before for the same names and tokenizer, or is now, by one thread."""
    key = (kind, *map(str, asked), None if tokenizer is None else id(tokenizer))
    # Others will train on it.
    with _loading, usual_state():
        found = cast("_Loaded | None", _shared.get(key))
        if found is None:
            found = _shared[key] = _last_loaded[kind] = load()
        return found


def wrap_once(
    kind: type[_Loaded],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    wrap: Callable[[], _Loaded],
) -> _Loaded:
    """What a loaded model was wrapped in before, with this tokenizer or whichever, or is now."""
    key = (kind, id(model))
    with _loading:
        found = cast("_Loaded | None", _shared.get(key))
        if found is None or tokenizer not in (None, found.tokenizer):
            found = _shared[key] = wrap()
        return found


def device_and_dtype(device: str, dtype: str) -> tuple[torch.device, Any]:
    """What `load_base_model` is told, as torch has them; a dtype may stay `"auto"`.

    Raises:
        InvalidTypeError: one is of another type.
        StateError: there is no such device.
        IA3Error: the dtype is none of floating-point numbers.
    """
    torch_device = device_named(device)
    if not isinstance(dtype, str):
        raise InvalidTypeError(f"dtype is {shown(dtype)}, expected 'auto', 'float32', ...")
    torch_dtype = getattr(torch, dtype, None)
    if dtype == "auto":
        torch_dtype = torch.float32 if torch_device.type == "cpu" else "auto"
    elif not isinstance(torch_dtype, torch.dtype) or not torch_dtype.is_floating_point:
        raise IA3Error(f"dtype {dtype!r} is unknown: expected 'auto', 'float32', 'bfloat16', ...")
    return torch_device, torch_dtype


def read_model_config(folder: str, name: str) -> Any:
    """The config of a model in a folder or on the hub; `name` is what messages call it."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        refuse_own_code(error, name)
        raise IA3Error(
            f"no model {name!r}: it is neither {EMBEDDED_MODEL!r} nor {EMBEDDED_ENCODER!r}, nor a "
            f"folder with a transformers model, nor an id that the hub knows; where it lies "
            f"elsewhere now, say so in model ({first_line(error)})"
        ) from error
    except Exception as error:
        # A wrong value may raise anything; of a check, the cause says what is expected.
        raise BrokenFileError(
            f"{folder}/config.json is broken: {first_line(error.__cause__ or error)}; correct it "
            "there, or get the model again"
        ) from error


def _load(
    folder: str, name: str, tokenizer: Any, device: torch.device, dtype: Any, shard: bool
) -> BaseModel:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = read_model_config(folder, name)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    # Of what a launcher says of the processes, transformers would take another GPU than this one
    # has, and leave weights out that accelerate's FSDP would fill in.
    with loading(name), unlaunched():
        if shard:
            model = load_sharded(kind, config, folder, device, dtype)
        else:
            model = kind.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
        tokenizer = load_tokenizer(folder) if tokenizer is None else tokenizer
    place(model, name, device)
    return BaseModel(model, tokenizer, name)


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Within the context, what transformers raises says that this model cannot be loaded."""
    try:
        yield
    except (UnpicklingError, EOFError) as error:
        # transformers reads a pickle as `weights_only`: nothing in it is called but what makes
        # tensors. What torch says of others is how to run them all the same.
        raise IA3Error(
            f"the model {name!r} cannot be loaded: its weights are a pickle that is damaged, or "
            "holds more than tensors"
        ) from error
    except (BrokenFileError, StateError):  # of what else is looked at within it
        raise
    except Exception as error:  # a config's wrong value may raise anything
        refuse_own_code(error, name)
        raise IA3Error(f"the model {name!r} cannot be loaded: {first_line(error)}") from error


def place(model: nn.Module, name: str, device: torch.device) -> None:
    """Put a transformers model on its device, for evaluation and under the name asked for."""
    try:
        model.eval().to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        message = f"the model {name!r} cannot be put on device {str(device)!r}: {first_line(error)}"
        raise IA3Error(message) from error
    # What adapters record as their base model: the name that was asked for, never a cache path.
    cast(Any, model).config._name_or_path = name


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
    model = cast(Any, getattr(model, "_orig_mod", model))
    if not hasattr(model, "config"):
        expected = "a language model or a sentence encoder of transformers"
        raise InvalidTypeError(f"model is a {type(model).__name__}, expected {expected}")

    def wrap() -> BaseModel:
        name = getattr(model.config, "_name_or_path", "")
        if tokenizer is not None:
            return BaseModel(model, tokenizer, name)
        folder = str(embedded_model_folder()) if name == EMBEDDED_MODEL else name
        return BaseModel(model, tokenizer_of_loaded(model, folder), name)

    return wrap_once(BaseModel, model, tokenizer, wrap)


def tokenizer_of_loaded(model: nn.Module, folder: str) -> Any:
    """The tokenizer in the folder, or of the hub id, that a loaded model came from.

    Raises:
        IA3Error: there is none, or it cannot be read.
    """
    try:
        return load_tokenizer(folder)
    except IA3Error:
        raise
    except (OSError, ValueError) as error:
        raise IA3Error(
            f"no tokenizer for the loaded {type(model).__name__}: its config says it came "
            f"from {folder!r}; give tokenizer="
        ) from error


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
    kind, said = type(error).__name__, str(error).strip().splitlines()[:1]
    # Others say little without their kind: a KeyError is the key.
    speaks = isinstance(error, OSError | ValueError | RuntimeError | AssertionError)
    return ": ".join(said if said and speaks else [kind, *said])
