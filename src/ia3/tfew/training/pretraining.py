"""Vectors trained on a mixture of tasks, for new tasks to begin with (paper section 3.4)."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...adapter.files import Adapter
from ...base.loading import BaseModel
from ...errors import IA3Error
from ..prompts.encoding import Encoder, TrainingExample, warn_of_cut_texts
from ..prompts.tasks import Task
from ..temporary_adapter import all_linear, temporary_adapter
from .trainer import CHECKPOINT_STEPS, TFewConfig, TrainingStep, train

# The size limit of T0's mixture (Sanh et al. 2022, arXiv 2110.08207). T0 also counts a small data
# set's examples once a template; here templates do not change the rates.
CAP = 500_000


def mixing_rates(sizes: Mapping[str, int], cap: int = CAP) -> dict[str, float]:
    """How often each task is drawn: in proportion to its number of examples, up to `cap`.

    Raffel et al. 2020 (arXiv 1910.10683), section 3.5.2: min(n, cap) / Σ min(n, cap).
    """
    if not sizes:
        raise IA3Error("there are no tasks to mix: expected at least one")
    if cap < 1:
        raise IA3Error(f"cap is {cap}, expected at least 1")
    for name, size in sizes.items():
        if size < 1:
            raise IA3Error(f"task {name!r} has {size} training examples, expected at least one")
    total = sum(min(size, cap) for size in sizes.values())
    return {name: min(size, cap) / total for name, size in sizes.items()}


def draw(
    examples: Mapping[str, Sequence[TrainingExample]],
    rates: Mapping[str, float],
    count: int,
    seed: int,
) -> list[TrainingExample]:
    """So many times a task by its rate and one of its examples, by the seed and the place alone."""
    names, weights = list(examples), [rates[name] for name in examples]
    drawn = []
    for place in range(count):
        draws = random.Random(f"{seed}, item {place}")
        (name,) = draws.choices(names, weights)
        drawn.append(draws.choice(examples[name]))
    return drawn


def pretrain(
    base: BaseModel,
    tasks: Sequence[Task],
    config: TFewConfig,
    *,
    cap: int = CAP,
    on_step: Callable[[TrainingStep], None] | None = None,
    checkpoints: str | Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Adapter:
    """Train new vectors on a mixture of tasks (paper section 3.4); the base model is left as found.

    Every example of every step is of a task drawn by `mixing_rates`. The paper takes 100,000 steps
    with a batch of 16. Its authors' code trains on the right answers alone there:
    `TFewConfig(length_norm=0, unlikelihood=0)`.

    `checkpoints` is `train`'s, every 25 steps, or 200 times where that is less often. `progress` is
    called with the number of examples that were encoded, once a task.

    Returns the vectors at the sites of `FewShotClassifier`, float32 on the CPU, and raises as
    `train` does, or for tasks that are none, unusable or of one name.
    """
    names = [task.name for task in tasks]
    for name in {name for name in names if names.count(name) > 1}:
        raise IA3Error(f"two tasks have the name {name!r}: expected different names")
    rates = mixing_rates({task.name: len(task.train) for task in tasks}, cap)
    encoder = Encoder(base, chat=False)
    examples: dict[str, list[TrainingExample]] = {}
    for task in tasks:
        examples[task.name] = task.training_examples(encoder)
        if progress is not None:
            progress(len(task.train))
    prompts = sum(len(e.encoded) for of_task in examples.values() for e in of_task)
    warn_of_cut_texts(encoder.truncated, prompts)
    mixture = draw(examples, rates, config.steps * config.batch_size, config.seed)
    settings: dict[str, Any] = {"train_sampling_strategy": "sequential"}
    if checkpoints is not None:
        # A checkpoint holds a record of every step before it: a long run writes 200 at most.
        settings["save_steps"] = max(CHECKPOINT_STEPS, config.steps // 200)
    with temporary_adapter(base, all_linear(base)) as ia3_model:
        train(base, ia3_model, mixture, config, on_step, checkpoints=checkpoints, **settings)
        adapter = ia3_model.adapter("default")
    adapter.vectors = {name: vector.cpu().clone() for name, vector in adapter.vectors.items()}
    adapter.copies = {name: value.cpu().clone() for name, value in adapter.copies.items()}
    return adapter
