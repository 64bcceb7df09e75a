"""PEFT's questions about a model with adapters, whichever way they were put on it."""

from __future__ import annotations

from torch import nn

from ..arguments import instance
from ..errors import StateError
from ..model import status
from ..model.ia3_model import IA3Model
from ..model.status import TunerLayerStatus, TunerModelStatus
from .state_dicts import HANDLE


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """What is on each module of a model that an adapter has a vector for or a copy of.

    Args:
        model: an `IA3Model`, or a model with injected adapters; compiled or within another.

    Raises:
        InvalidTypeError: it is no module.
        StateError: there is no adapter.
    """
    face, before = _face(model)
    return status.of_layers(face._adapters, before)


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """What is on a model as a whole; as `get_layer_status` otherwise.

    Raises:
        InvalidTypeError: it is no module.
        StateError: there is no adapter.
    """
    face, _ = _face(model)
    injected = face.model.__dict__.get(HANDLE) is face
    return status.of_model(face._adapters, None if injected else face)


def _face(model: nn.Module) -> tuple[IA3Model, str]:
    """The `IA3Model` in a model, and what its base model's names begin with there."""
    for name, module in instance("model", model, nn.Module, "a torch.nn.Module").named_modules():
        before = f"{name}." if name else ""
        if isinstance(module, IA3Model):
            return module, f"{before}model."
        if HANDLE in module.__dict__:
            return module.__dict__[HANDLE], before
    raise StateError(f"no adapter on this {type(model).__name__}: add one first")
