"""A base model whose weights are spread over the processes of a job, by FSDP 2.

transformers makes the model on the meta device, and each process reads its parts of the weights
from the files, so that no process ever holds all. Each block is a unit, whose weights are whole
while it computes. Every pass is then the work of all processes together: all of them make the same
number of passes, in the same order.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import StateError
from .processes import processes


def is_asked(shard: bool | None) -> bool:
    """Whether a base model is to be spread: as `shard` says or, for `None`, accelerate's launcher.

    One process has nobody to spread it over.

    Raises:
        StateError: the launcher asks for the first version of FSDP.
    """
    if shard is None:
        shard = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
        if shard and os.environ.get("FSDP_VERSION", "1") != "2":
            raise StateError(
                "accelerate was told to use FSDP 1, which would take the vectors to pieces with "
                "the base model: expected --fsdp_version 2"
            )
    return shard and processes().count > 1


def load_sharded(
    kind: Any, config: Any, folder: str | Path, device: torch.device, dtype: Any
) -> nn.Module:
    """A transformers model, of which this process has a part; all of the job call this.

    Args:
        kind: the class with `from_pretrained`.
        config: the model's.
        folder: the model's, or its id on the hub.
        device: where it is to compute.
        dtype: as `from_pretrained` takes it.

    Raises:
        StateError: this version of transformers cannot, the weights are quantized, the model is an
            encoder-decoder or does not say what its blocks are, or the machine has another
            accelerator.
    """
    # transformers asks the machine, not the caller.
    found = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if device.type != found.type:
        raise StateError(
            f"device is {str(device)!r}, and a model is spread over the processes' {found.type} "
            "devices: leave out device, or shard"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise StateError(
            f"{str(folder)!r} is an encoder-decoder, whose encoder is called by itself, outside of "
            "what FSDP spreads as one model: train a decoder-only model, or without shard"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise StateError(
            f"{str(folder)!r} is quantized, and transformers does not spread quantized weights "
            "over processes as it reads them: take the model as floating-point numbers, or train "
            "without shard"
        )
    try:
        from transformers.distributed import DistributedConfig

        plan = dict.fromkeys(_blocks(kind, config), "free_full_weight")
        spread = DistributedConfig(fsdp_size=processes().count, fsdp_plan=plan)
    except (ImportError, TypeError) as error:
        raise StateError(
            "this version of transformers does not spread a model over processes as it reads it: "
            "pip install 'transformers>=5.23'"
        ) from error
    if device.type == "cpu":
        _give_memory_back()
    with _quiet():
        model: nn.Module = kind.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, distributed_config=spread
        )
    # Now, as FSDP leaves some weights whole after a pass: who freezes those then freezes a copy.
    return model.requires_grad_(False)


def _blocks(kind: Any, config: Any) -> list[str]:
    """The names of a model's blocks, with stars for their numbers."""
    with torch.device("meta"):
        model = kind.from_config(config, trust_remote_code=False)
    whole = set(getattr(model, "_no_split_modules", None) or ())
    names = [name for name, part in model.named_modules() if type(part).__name__ in whole]
    if not names:
        raise StateError(
            f"{type(model).__name__} does not say what its blocks are (_no_split_modules), so that "
            "each process would have to hold all of it at once: train without shard"
        )
    return list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))


def _give_memory_back() -> None:
    """Have the C library give freed memory of a megabyte or more back to the system at once.

    Weights come and go with each block. glibc keeps what is as large as what was freed before, in
    pieces: the process would grow to several times the whole model.
    """
    with suppress(OSError, AttributeError, TypeError):  # another system's library
        m_mmap_threshold = -3
        ctypes.CDLL(None).mallopt(m_mmap_threshold, 2**20)


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the context transformers does not name the rules of its plan that match nothing."""
    log = logging.getLogger("transformers.distributed.mixin")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
