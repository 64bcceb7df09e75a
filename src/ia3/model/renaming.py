"""Adapters from before modules of their base model were renamed."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

from torch import nn
from transformers import PreTrainedModel

from ..adapter.files import Adapter, renamed
from ..adapter.layout import mapped
from .embeddings import prefix_of, pretrained_in


def as_named_in(model: nn.Module, modules: Collection[str], adapter: Adapter) -> Adapter:
    """An adapter by the names of a model's `modules`, where transformers has renamed them since.

    As transformers reads the model's own older checkpoints.
    """
    gone = [name for name in adapter.vectors if name not in modules]
    inner = next(pretrained_in(model), None) if gone else None
    if inner is None:
        return adapter
    prefix, renaming = prefix_of(inner, model), _renaming(inner)

    def now(name: str) -> str:
        inside = name.startswith(prefix)
        return prefix + renaming(name.removeprefix(prefix)) if inside else name

    names = {name: now(name) for name in adapter.copies}
    # The patterns are for parameters.
    names |= {name: now(f"{name}.weight").removesuffix(".weight") for name in gone}
    return renamed(adapter, names) if all(names[name] in modules for name in gone) else adapter


def _renaming(model: PreTrainedModel) -> Callable[[str], str]:
    """A parameter's name in an older checkpoint -> its name now."""
    own = getattr(model, "_checkpoint_conversion_mapping", None)
    if own:
        return partial(mapped, key_mapping=own)
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    return lambda key: rename_source_key(key, renamings, [])[0]
