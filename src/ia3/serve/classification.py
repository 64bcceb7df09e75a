"""Texts of many classifiers of one base model, in batches."""

from __future__ import annotations

from collections.abc import Sequence

from ..classify.mixed import Classified, classify
from ..errors import IA3Error
from ..tfew.prompts.labels import Text
from .bases import ServedBase


def answers(
    served: ServedBase, texts: Sequence[Text], adapters: Sequence[str]
) -> list[Classified | IA3Error]:
    """What each adapter says of its text; where that cannot be said, why."""
    return [*classify(served.bank, texts, adapters, tokenizer=served.base.tokenizer)]
