"""Texts of many classifiers of one base model, in batches."""

from __future__ import annotations

from collections.abc import Sequence

from ...classify.mixed import Classified, Ranking, classify_each
from ...errors import IA3Error, UnknownNameError
from ...tfew.prompts.labels import Text
from .bases import ServedBase
from .interface import no_adapter


def answers(
    served: ServedBase,
    texts: Sequence[Text],
    adapters: Sequence[str],
    untuned: bool = False,
    ranking: Ranking | None = None,
) -> list[Classified | IA3Error]:
    """What each adapter says of its text, `[texts]`; where that cannot be said, why.

    With `untuned`, what the base model says without the adapter's vectors: see `Classification`.
    With a `ranking`, that scores a language model's choices.
    """
    tokenizer = served.base.tokenizer
    found = classify_each(
        served.bank, texts, adapters, tokenizer=tokenizer, untuned=untuned, ranking=ranking
    )
    return [
        no_adapter(name) if isinstance(each, UnknownNameError) else each
        for name, each in zip(adapters, found, strict=True)
    ]
