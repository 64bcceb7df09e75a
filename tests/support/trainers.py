"""Runs of transformers' and TRL's trainers, in one process and in several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor

import ia3

QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}

# The vectors that are trained, and by step the losses and whatever else is logged.
Trained = tuple[Any, ...]


def anew() -> None:
    """Have accelerate look again for the processes there are: it keeps what it found first."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()


def values(model: Any) -> dict[str, Tensor]:
    """A copy of the active adapter, as either library saves it."""
    library = ia3 if isinstance(model, ia3.IA3Model) else peft
    name = model.active_adapter
    state_dict = library.get_peft_model_state_dict(model, adapter_name=name)
    return {key: value.detach().clone() for key, value in state_dict.items()}


def files(folder: Path) -> set[str]:
    """The names in a folder."""
    return {path.name for path in folder.iterdir()}


def check_together(found: Sequence[Trained], expected: Trained) -> None:
    """Compare the end of a run in each process with that of a run in one process."""
    for vectors, *logged in found:
        torch.testing.assert_close(vectors, found[0][0], rtol=0, atol=0)
        torch.testing.assert_close(vectors, expected[0], rtol=0, atol=1e-5)
        for values_of, wanted in zip(logged, expected[1:], strict=True):
            assert values_of == pytest.approx(wanted, rel=1e-4, abs=1e-6)
