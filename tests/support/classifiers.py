"""Fitted classifiers, side by side."""

from __future__ import annotations

import torch

from ia3 import FewShotClassifier


def same_vectors(a: FewShotClassifier, b: FewShotClassifier) -> bool:
    """Whether two fitted classifiers have the same vectors, to the last bit."""
    first, second = a.adapter_.vectors, b.adapter_.vectors
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
