"""Embeddings and output layers: where the vocabulary was resized they go with the adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.names import ATTRIBUTE, modules_of, unwrapped
from ..core.sites import Site
from ..core.spread import gathered
from ..errors import MismatchError, StateError

# What transformers calls the number of tokens, in configs and in the modules that embed them.
VOCABULARY = "vocab_size"
RESIZE = "resize_token_embeddings"


def pretrained_in(model: nn.Module) -> Iterator[PreTrainedModel]:
    """The outermost models of transformers in a model, which may be one itself."""
    if isinstance(model, PreTrainedModel):
        yield model
    else:
        for child in model.children():
            yield from pretrained_in(child)


def prefix_of(inner: nn.Module, model: nn.Module) -> str:
    """What the names of an inner model's modules begin with in the model around it."""
    name = next(name for name, module in modules_of(model).items() if module is inner)
    return f"{name}.".removeprefix(".")


def embeddings_of(model: nn.Module) -> dict[str, nn.Module]:
    """The embeddings of tokens and the output layers in a model, by name."""
    names = {module: name for name, module in modules_of(model).items()}
    found = (module for inner in pretrained_in(model) for module in _embeddings(inner))
    return {names[module]: module for module in found if module in names}


def _embeddings(model: PreTrainedModel) -> Iterator[nn.Module]:
    for get in ("get_input_embeddings", "get_output_embeddings"):
        with suppress(AttributeError, NotImplementedError):  # not every model has both
            module = getattr(model, get)()
            if isinstance(module, nn.Module):
                yield unwrapped(module)


def were_resized(model: nn.Module) -> bool:
    """Whether a model has another number of tokens than when it was made or loaded.

    Known from the module that holds the embeddings, which may keep the number it was made with, or
    from the config that it was loaded with, in a folder or in the cache: nothing is downloaded.
    """
    return any(map(_was_resized, pretrained_in(model)))


def _was_resized(model: PreTrainedModel) -> bool:
    now, embeddings = _vocabulary(model.config), next(_embeddings(model), None)
    if not isinstance(now, int) or embeddings is None:
        return False
    owner = next((m for m in model.modules() if embeddings in m._modules.values()), model)
    # Resizing sets it on the model that is asked to.
    made_with = None if owner is model else vars(owner).get(VOCABULARY)
    if isinstance(made_with, int) and made_with != now:
        return True
    loaded = _vocabulary(_loaded_config(model.config))
    return isinstance(loaded, int) and loaded != now


def _vocabulary(config: Any) -> Any:
    return None if config is None else getattr(config.get_text_config(), VOCABULARY, None)


def _loaded_config(config: Any) -> Any:
    """The config of the checkpoint that a model came from, if it can be had here."""
    from huggingface_hub import try_to_load_from_cache

    name = getattr(config, "_name_or_path", None)
    if not name:
        return None
    with suppress(Exception):  # a file of another version may hold anything
        file: Any = Path(name) / "config.json"
        if not file.is_file():
            revision = getattr(config, "_commit_hash", None)
            file = try_to_load_from_cache(name, "config.json", revision=revision)
        return type(config).from_json_file(file)
    return None


def own_values(
    copies: Mapping[str, Tensor], saved: Sequence[str], model: nn.Module
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """What an adapter has of modules that it saves, and of embeddings that are not the model's.

    Args:
        copies: as an `Adapter` has them.
        saved: the modules that train with it.

    Returns:
        Parameter name -> value in modules that are `saved`; and module name -> slot -> value of
        embeddings that came with the adapter. Those that the model has already are in neither.

    Raises:
        IA3Error: embeddings are of another shape than the model's.
    """
    inside = tuple(f"{module}." for module in saved)
    rest = {key: value for key, value in copies.items() if key.startswith(inside)}
    if len(rest) == len(copies):
        return rest, {}
    rest = dict(copies)
    own: dict[str, dict[str, Tensor]] = {}
    for name, module in embeddings_of(model).items():
        for slot, parameter in module._parameters.items():
            key = f"{name}.{slot}"
            value = None if key.startswith(inside) else rest.pop(key, None)
            if value is None or parameter is None:
                continue
            if value.shape != parameter.shape:
                raise MismatchError(
                    f"the adapter does not fit {type(model).__name__}: {key!r} is "
                    f"{list(value.shape)}, expected {list(parameter.shape)}; its base model had "
                    f"{len(value)} tokens: {RESIZE}({len(value)}) first"
                )
            if not _same(value, parameter):
                own.setdefault(name, {})[slot] = value
    return rest, own


def _same(value: Tensor, parameter: Tensor) -> bool:
    """Whether both are the same numbers, one of them perhaps rounded."""
    if parameter.is_meta or value.is_meta:
        return False
    here = gathered(parameter).to(value.device)
    return torch.equal(value.to(here.dtype), here) or torch.equal(here.to(value.dtype), value)


class GuardedResize:
    """The `resize_token_embeddings` of a model with adapters: not of what they have put on it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        *args: Any,
        **options: Any,
    ) -> Any:
        """As transformers has it; an `IA3Error` where an adapter's part would keep its size."""
        embeddings = unwrapped(self.model.get_input_embeddings())
        for name, module in embeddings_of(self.model).items():
            on = module._modules.get(ATTRIBUTE)
            # Embeddings get another weight, in place of an output layer comes another module.
            if on is None or (module is embeddings and isinstance(on, Site)):
                continue
            tokens = len(module.get_parameter("weight"))
            asked, step = new_num_tokens or tokens, pad_to_multiple_of or 1
            if ceil(asked / step) * step != tokens:
                raise StateError(
                    f"{RESIZE}: adapters have a vector on {name!r} or a copy of it, for its "
                    f"{tokens} tokens (modules_to_save): unload(), resize, and adapt it again"
                )
        # transformers freezes all of an embedding that was frozen, and so a vector on it.
        trained = [p for p in self.model.parameters() if p.requires_grad]
        resize = type(self.model).resize_token_embeddings
        resized = resize(self.model, new_num_tokens, pad_to_multiple_of, *args, **options)
        for parameter in trained:
            parameter.requires_grad_(True)
        return resized
