"""PEFT's model for adapters of different kinds, which there are none of here."""

from __future__ import annotations

from typing import Any, NoReturn

from ..errors import IA3Error


class PeftMixedModel:
    """A name to ask `isinstance` for; making one is refused.

    Several (IA)³ adapters multiply together on an `IA3Model`: `set_adapter([...])`.

    Raises:
        IA3Error: always.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _refuse()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused, as the constructor is."""
        _refuse()


def _refuse() -> NoReturn:
    raise IA3Error(
        "PeftMixedModel mixes different kinds of adapters, and there is one kind here: use "
        "get_peft_model, and set_adapter([...]) for several (IA)³ adapters at once"
    )
