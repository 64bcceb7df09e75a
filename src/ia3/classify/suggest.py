"""Which texts to label next: those that stand for many that a classifier is unsure of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..arguments import check_callable, instance, whole
from ..base.torch_state import usual_state
from ..tfew.prompts.labels import Label, Text
from ..tfew.prompts.templates import Template
from .estimator import FewShotClassifier
from .inputs import check_fields, examples_of, rows_of, with_field
from .text_classifier import not_finite

# Of more texts the most uncertain are looked at, as each is compared with each.
MOST_COMPARED = 4096


@dataclass(frozen=True)
class Suggestion:
    """A text to label.

    Attributes:
        row: its place among the texts, from 0.
        text: as it was given.
        label: what the classifier would say; a list where a text may have several.
        probability: of that label; of several, of the most probable one.
    """

    row: int
    text: Text
    label: Label | list[Label]
    probability: float


@usual_state()
def suggest(
    classifier: FewShotClassifier,
    texts: Sequence[Text],
    number: int = 10,
    *,
    progress: Callable[[int], None] | None = None,
) -> list[Suggestion]:
    """The texts whose labels would teach a classifier most, the first one most.

    Each is the one that brings the most uncertainty nearer to a text that is chosen: what is summed
    over all texts is how uncertain one is, times how much more like the nearest chosen one it is
    than before (Wei et al. 2015's facility location, weighted). So neither ten texts of one kind
    take all places, nor those that are like no other. A text is uncertain as far as the second
    class is near the first. Likeness is the cosine: of an encoder's embeddings, with the adapter;
    of a language model's probabilities, each as its root.

    >>> from ia3 import FewShotClassifier, suggest
    >>> classifier = FewShotClassifier("all-minilm-l6-v2", steps=2)
    >>> texts = ["I was charged twice.", "The courier left my parcel in the rain."]
    >>> classifier = classifier.fit(texts, ["billing", "delivery"])
    >>> unlabelled = ["The bill is wrong.", "Hello, is anybody there?", "The bill is wrong!"]
    >>> sum("bill" in each.text for each in suggest(classifier, unlabelled, 2))
    1

    Args:
        classifier: fitted.
        texts: without labels: strings, or mappings from field names to values, `[texts]`.
        number: how many, 1 or more. Where there are fewer different texts, all of these.
        progress: called with the number of prompts done since the last call, as of
            `FewShotClassifier.predict_proba`.

    Returns:
        At most `number`, no two of the same text.

    Raises:
        NotFittedError: `fit` was not called.
        InvalidTypeError: an argument or a text is of another type.
        IA3Error: `number` is below 1, a text lacks a field or has one that is no
            text, finite number or date, or the model's scores of it are not finite.
    """
    instance("classifier", classifier, FewShotClassifier, "a fitted FewShotClassifier")
    whole("number", number, 1, expected="at least 1")
    check_callable("progress", progress)
    classifier._check_fitted()
    given = rows_of(texts)
    if not given:
        return []
    fitted = classifier._as_fitted()
    examples = with_field(examples_of(given), fitted.fields_)
    with fitted.base.lock:
        templates = [Template(source) for source in fitted.templates_]
        check_fields(examples, fitted.fields_, templates)
        probabilities, vectors = fitted._read(examples, progress)
    for row in (~probabilities.isfinite().all(1)).nonzero()[:1].flatten().tolist():
        raise not_finite(f"text {row}")
    first: dict[str, int] = {}
    for row, example in enumerate(examples):
        first.setdefault("\0".join(t.render(example, []) for t in templates), row)
    rows = torch.tensor(list(first.values()))
    unsure = uncertainty(probabilities[rows], multilabel=fitted.multilabel_)
    chosen = rows[_covering(unsure, vectors[rows], number)].tolist()
    labels = fitted.classes_at(probabilities[chosen].numpy()).tolist()
    surest = probabilities[chosen].amax(1).tolist()
    return [
        Suggestion(row, given[row], label, probability)
        for row, label, probability in zip(chosen, labels, surest, strict=True)
    ]


def uncertainty(probabilities: Tensor, *, multilabel: bool = False) -> Tensor:
    """How near the second class is to the first, `[texts, classes]` → `[texts]`, 0 to 1.

    Where a text may have several labels it is how near one of them is to one half.
    """
    if multilabel:
        return 1 - (2 * probabilities - 1).abs().amin(1)
    first, second = probabilities.topk(2, dim=1).values.unbind(1)
    return 1 - (first - second)


def _covering(weights: Tensor, vectors: Tensor, number: int) -> list[int]:
    """The places of up to `number` texts that are near many of the largest weight."""
    order = weights.argsort(descending=True, stable=True)
    compared = order[:MOST_COMPARED]
    vectors, weights = F.normalize(vectors[compared].float(), dim=1), weights[compared].float()
    likeness = (vectors @ vectors.T).clamp(min=0)
    covered = torch.zeros_like(weights)
    # What each would bring, or brought before: it only falls as more are chosen.
    gain = weights @ likeness
    chosen: list[int] = []
    while len(chosen) < min(number, len(compared)):
        place = int(gain.argmax())
        gain[place] = weights @ (likeness[place] - covered).clamp(min=0)
        if int(gain.argmax()) == place:
            chosen.append(place)
            covered = covered.maximum(likeness[place])
            gain[place] = -1.0
    return [*compared[chosen].tolist(), *order[MOST_COMPARED:number].tolist()]
