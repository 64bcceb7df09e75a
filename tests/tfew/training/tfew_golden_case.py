"""Figures of T-Few from the paper's formulas alone: NumPy in float64, and nothing of this project.

A one-block decoder with (IA)³ (paper section 3.3), the three losses (section 3.2, equations 1 to 3,
with the floor 1e-2 of the authors' code in the unlikelihood) and gradients by central differences.
`python tfew_golden_case.py` writes `tfew_golden_case.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

PATH = Path(__file__).with_suffix(".json")
VOCABULARY, DIM, HEADS, INNER, LENGTH = 11, 8, 2, 12, 16

# Each prompt with its choices, whose numbers and lengths differ, and the index of the right one.
EXAMPLES = [([3, 9, 4, 7], [[5, 6], [8], [5, 2, 10]], 1), ([3, 9, 1], [[6, 6, 7], [2, 4]], 0)]


def wave(*shape: int, seed: float, scale: float = 0.6) -> Array:
    """Numbers without a pattern that any language can make again: scale * sin(seed * i²)."""
    index = np.arange(1, np.prod(shape) + 1, dtype=np.float64)
    return (scale * np.sin(seed * index * index)).reshape(shape)


def weights() -> dict[str, Array]:
    """The decoder's weights, `[out, in]`, by the names of transformers' OPT."""
    made = {"embed_tokens.weight": wave(VOCABULARY, DIM, seed=0.71)}
    made["embed_positions.weight"] = wave(LENGTH + 2, DIM, seed=0.37)
    linear = {"self_attn.q_proj": (DIM, DIM), "self_attn.k_proj": (DIM, DIM)}
    linear |= {"self_attn.v_proj": (DIM, DIM), "self_attn.out_proj": (DIM, DIM)}
    linear |= {"fc1": (INNER, DIM), "fc2": (DIM, INNER)}
    for n, (name, shape) in enumerate(linear.items()):
        made[f"layers.0.{name}.weight"] = wave(*shape, seed=0.13 + 0.11 * n)
        made[f"layers.0.{name}.bias"] = wave(shape[0], seed=0.19 + 0.07 * n, scale=0.2)
    norms = ("layers.0.self_attn_layer_norm", "layers.0.final_layer_norm", "final_layer_norm")
    for n, name in enumerate(norms):
        made[f"{name}.weight"] = 1 + wave(DIM, seed=0.23 + 0.09 * n, scale=0.3)
        made[f"{name}.bias"] = wave(DIM, seed=0.29 + 0.05 * n, scale=0.1)
    return made


def vectors() -> dict[str, Array]:
    """l_k and l_v `[dim]`, and l_ff `[inner]`."""
    sizes = {"self_attn.k_proj": DIM, "self_attn.v_proj": DIM, "fc2": INNER}
    return {
        f"layers.0.{name}": 1 + wave(size, seed=0.43 + 0.17 * n, scale=0.5)
        for n, (name, size) in enumerate(sizes.items())
    }


# -- the model -------------------------------------------------------------------------------------


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def norm(w: dict[str, Array], name: str, x: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return np.asarray(scaled * w[f"{name}.weight"] + w[f"{name}.bias"])


def linear(w: dict[str, Array], name: str, x: Array) -> Array:
    return np.asarray(x @ w[f"layers.0.{name}.weight"].T + w[f"layers.0.{name}.bias"])


def logits_of(ids: list[int], w: dict[str, Array], v: dict[str, Array]) -> Array:
    """`[length, vocabulary]`: softmax(Q (l_k ⊙ K)ᵀ / √d) (l_v ⊙ V), then (l_ff ⊙ γ(W₁ x)) W₂."""
    count = len(ids)
    hidden = w["embed_tokens.weight"][ids] + w["embed_positions.weight"][np.arange(count) + 2]
    x = norm(w, "layers.0.self_attn_layer_norm", hidden)
    q = linear(w, "self_attn.q_proj", x)
    k = v["layers.0.self_attn.k_proj"] * linear(w, "self_attn.k_proj", x)
    value = v["layers.0.self_attn.v_proj"] * linear(w, "self_attn.v_proj", x)
    later = np.triu(np.full((count, count), -np.inf), 1)
    heads = []
    for part in np.split(np.arange(DIM), HEADS):
        seen = q[:, part] @ k[:, part].T / np.sqrt(len(part)) + later
        heads.append(softmax(seen) @ value[:, part])
    hidden = hidden + linear(w, "self_attn.out_proj", np.concatenate(heads, -1))
    x = norm(w, "layers.0.final_layer_norm", hidden)
    inner = v["layers.0.fc2"] * np.maximum(linear(w, "fc1", x), 0)
    hidden = hidden + linear(w, "fc2", inner)
    return np.asarray(norm(w, "final_layer_norm", hidden) @ w["embed_tokens.weight"].T)


# -- the losses ------------------------------------------------------------------------------------

# log p of each token: [example][choice][token].
LogProbs = list[list[list[float]]]


def losses(log_probs: LogProbs, labels: list[int]) -> dict[str, float]:
    """The paper's three terms, over the tokens and examples of a batch, and their sum."""
    right, wrong, length_norm = [], [], []
    for choices, label in zip(log_probs, labels, strict=True):
        beta = [sum(choice) / len(choice) for choice in choices]  # equation 2
        normaliser = sum(np.exp(b) for b in beta)
        length_norm.append(-np.log(np.exp(beta[label]) / normaliser))  # equation 3
        for c, choice in enumerate(choices):
            (right if c == label else wrong).extend(choice)
    terms = {
        "lm": -sum(right) / len(right),
        "length_norm": sum(length_norm) / len(length_norm),
        # Equation 1.
        "unlikelihood": sum(-np.log(1 - np.exp(p) + 1e-2) for p in wrong) / len(wrong),
    }
    return {name: float(term) for name, term in terms.items()} | {"total": sum(terms.values())}


def model_log_probs(v: dict[str, Array]) -> LogProbs:
    w = weights()
    found: LogProbs = []
    for prompt, choices, _ in EXAMPLES:
        found.append([])
        for choice in choices:
            scores = np.log(softmax(logits_of(prompt + choice[:-1], w, v)[len(prompt) - 1 :]))
            found[-1].append([float(scores[t, token]) for t, token in enumerate(choice)])
    return found


def given_logits() -> list[list[Array]]:
    """Logits `[tokens, vocabulary]` of each example's choices, without a model."""
    return [
        [wave(len(ids), VOCABULARY, seed=0.31 + i + 0.17 * c, scale=3) for c, ids in enumerate(cs)]
        for i, (_, cs, _) in enumerate(EXAMPLES)
    ]


def log_probs_of(logits: list[list[Array]]) -> LogProbs:
    return [
        [
            [float(np.log(softmax(row)[token])) for row, token in zip(rows, choice, strict=True)]
            for rows, choice in zip(of_example, choices, strict=True)
        ]
        for of_example, (_, choices, _) in zip(logits, EXAMPLES, strict=True)
    ]


def differences(function: Callable[[], float], at: Array, step: float = 1e-5) -> list[Any]:
    """Central differences of a function of an array that it reads, in the array's shape."""
    gradient = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        before = at[index]
        at[index] = before + step
        above = function()
        at[index] = before - step
        gradient[index] = (above - function()) / (2 * step)
        at[index] = before
    found: list[Any] = gradient.tolist()
    return found


def figures() -> dict[str, Any]:
    """All that `tfew_golden_case.json` holds."""
    labels = [label for _, _, label in EXAMPLES]
    v, logits = vectors(), given_logits()

    def total_of_model() -> float:
        return losses(model_log_probs(v), labels)["total"]

    def total_of_logits() -> float:
        return losses(log_probs_of(logits), labels)["total"]

    return {
        "logits": {
            "losses": losses(log_probs_of(logits), labels),
            "gradient": [[differences(total_of_logits, rows) for rows in e] for e in logits],
        },
        "model": {
            "log_probs": model_log_probs(v),
            "losses": losses(model_log_probs(v), labels),
            "gradient": {name: differences(total_of_model, vector) for name, vector in v.items()},
        },
    }


if __name__ == "__main__":
    PATH.write_text(json.dumps(figures()) + "\n", "utf-8")
