"""Merging a model's adapters into its weights, to be undone later or for good."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..core.route import LOCK
from ..core.saved_modules import keep_saved_module, shared_parameters
from .adapters import Adapters


def merge_adapters(adapters: Adapters, names: Sequence[str], safe: bool) -> None:
    """Merge adapters, beside those that are merged already.

    Raises:
        IA3Error: they cannot be merged, or a route is on; nothing has changed then.
    """
    with LOCK:
        adapters.check_unrouted("merging")
        merged = adapters.merge.adapters
        if merged and not set(names) - merged:
            warnings.warn(f"adapters {sorted(merged)} are merged already", stacklevel=3)
            return
        # In the order in which they would multiply, unmerged.
        order = dict.fromkeys([*adapters.active, *adapters.configs])
        adapters.merge.make(tuple(name for name in order if name in merged.union(names)), safe)
        adapters.activate()


def merge_for_good(
    adapters: Adapters, names: str | Sequence[str] | None, safe: bool, dequantise: bool
) -> None:
    """Merge adapters, let the original weights go, and give modules the values of their copies.

    The caller holds the lock.

    Args:
        names: beside what is merged already; the active adapters if not given.
        safe: refuse weights that are not finite.
        dequantise: replace the quantized layers that cannot take a vector exactly.

    Raises:
        IA3Error: they cannot be merged, or a route is on; nothing has changed then.
    """
    adapters.check_unrouted("merging")
    merge = adapters.merge
    merged = merge.adapters
    chosen = adapters.named(names)
    # What is merged takes the place of what is active, or is part of it.
    replaces = names is None and not merged <= set(chosen)
    chosen = tuple(merged) if replaces else tuple(dict.fromkeys([*chosen, *merged]))
    adapters.check_one_copy(chosen)
    replaced = merge.dequantise(chosen) if dequantise else {}
    try:
        if set(chosen) - merge.adapters:
            merge_adapters(adapters, chosen, safe)
    except BaseException:
        merge.requantise(replaced)
        raise
    shared = shared_parameters(adapters.model)
    for _, module, copies in adapters.contents().copies:
        for name in set(chosen).intersection(copies.adapters):
            keep_saved_module(module, name, shared)
    merge.keep()


def untie(model: nn.Module) -> None:
    """Say in a model's config that its output layer has weights of its own, if it has since."""
    config: Any = getattr(model, "config", None)
    if isinstance(model, PreTrainedModel) and getattr(config, "tie_word_embeddings", False):
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
        if outputs is not None and outputs.weight is not inputs.weight:
            config.tie_word_embeddings = False
