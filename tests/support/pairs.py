"""Adapters of this library and of PEFT, side by side on the same base models."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import peft
import torch
from torch import Tensor, nn

import ia3

Values = dict[str, Tensor]
# An `ia3.IA3Model` or a `peft.PeftModel`: they share their names.
Adapted = Any


def adapted_pair(
    make: Callable[[torch.dtype], nn.Module],
    modules: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    adapters: tuple[str, ...] = ("default",),
) -> list[Adapted]:
    """Ours, PEFT's and, for bfloat16, PEFT's on the same weights in float32.

    All have the same random vectors; the first adapter is active. Ours rescales as PEFT does, by
    the plain product.

    Args:
        make: the base model in a dtype, the same bits every time.
        modules: arguments of both `IA3Config`s.
    """
    ours = ia3.get_peft_model(make(dtype), ia3.IA3Config(**modules), adapters[0])
    ours.use_plain_product()
    models: list[Adapted] = [ours, _pefts(make(dtype), modules, adapters[0])]
    if dtype != torch.float32:
        models.append(_pefts(make(dtype).float(), modules, adapters[0]))
    for model in models:
        library = ia3 if model is ours else peft
        for adapter in adapters[1:]:
            model.add_adapter(adapter, library.IA3Config(**modules))
        for seed, adapter in enumerate(adapters):
            randomize(vectors(model, adapter), seed)
    return models


def _pefts(base: nn.Module, modules: Mapping[str, Any], adapter: str) -> Adapted:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
        return peft.get_peft_model(base, peft.IA3Config(**modules), adapter)


def vectors(model: Adapted, adapter: str = "default") -> dict[str, nn.Parameter]:
    """Module name -> vector, whichever library's model it is."""
    prefix = "model." if isinstance(model, ia3.IA3Model) else "base_model.model."
    suffix = f".ia3_l.{adapter}"
    return {
        name.removeprefix(prefix).removesuffix(suffix): parameter
        for name, parameter in model.named_parameters()
        if name.endswith(suffix)
    }


def randomize(vectors: Mapping[str, Tensor], seed: int = 0) -> None:
    """Values around one, drawn by name, so that two models get the same."""
    with torch.no_grad():
        for i, name in enumerate(sorted(vectors)):
            generator = torch.Generator().manual_seed(1000 * seed + i)
            vector = vectors[name]
            vector.copy_(1 + 0.5 * torch.randn(vector.numel(), generator=generator).view_as(vector))


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def assert_equal_to_peft(
    measure: Callable[[Adapted], Values], models: list[Adapted], bound: float = 1e-6
) -> None:
    """What is measured on ours is within `bound` of what it is on PEFT's.

    In bfloat16, where both round at every step, it is within a hundredth of PEFT's or of the
    float32 run, or no further from that than PEFT's.
    """
    ours, theirs, *float32 = (measure(model) for model in models)
    assert theirs
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        found = ours[name]
        assert found.shape == expected.shape, name
        assert found.dtype == expected.dtype, name
        error = relative(found, expected)
        if not float32:
            assert error < bound, name
        elif error >= 1e-2:
            exact = float32[0][name]
            assert relative(found, exact) <= max(1e-2, relative(expected, exact)), name


def adapted(base: nn.Module, seed: int = 0, **config: Any) -> ia3.IA3Model:
    """An adapter of random vectors on a base model; the keywords are `IA3Config`'s."""
    model = ia3.IA3Model(base, ia3.IA3Config(**config))
    randomize(vectors(model), seed)
    return model


def logits(model: Any, **inputs: Any) -> Tensor:
    """What a model answers, without gradients: `[batch, seq, vocabulary]`."""
    with torch.no_grad():
        result: Tensor = model(**inputs).logits
    return result


def same_vectors(a: ia3.FewShotClassifier, b: ia3.FewShotClassifier) -> bool:
    """Whether two fitted classifiers have the same vectors, to the last bit."""
    first, second = a.adapter_.vectors, b.adapter_.vectors
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
