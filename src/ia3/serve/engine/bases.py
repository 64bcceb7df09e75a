"""The base models of a server, each with a bank of the adapters that were fitted on it."""

from __future__ import annotations

from dataclasses import dataclass

from ...bank.bank import AdapterBank
from ...base.encoders import SentenceEncoder, load_base
from ...base.loading import BaseModel
from ...classify.engine import ENCODER, LANGUAGE_MODEL


@dataclass(frozen=True, eq=False)
class ServedBase:
    """A base model and the bank of its adapters; `name` is what clients call the model."""

    name: str
    base: BaseModel | SentenceEncoder
    bank: AdapterBank

    @property
    def kind(self) -> str:
        """`"encoder"` or `"language-model"`."""
        return ENCODER if isinstance(self.base, SentenceEncoder) else LANGUAGE_MODEL

    @property
    def generates(self) -> bool:
        """Whether it can go on with a text."""
        return isinstance(self.base, BaseModel)


def serve_base(model: str, capacity: int, device: str = "auto", dtype: str = "auto") -> ServedBase:
    """Load a base model, of which up to `capacity` adapters stay on the device.

    Raises:
        As `load_base`.
    """
    base = load_base(model, device=device, dtype=dtype)
    return ServedBase(model, base, AdapterBank(base.model, capacity=capacity))
