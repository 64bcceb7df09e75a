"""Put an adapter on a base model for the length of a `with` statement, and name its sites."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..adapter.files import Adapter
from ..base.loading import BaseModel
from ..model.ia3_model import DEFAULT_ADAPTER, IA3Model
from ..targets.config import IA3Config, TaskType
from ..targets.resolve import linear_in_upper_blocks


def all_linear(base: BaseModel, upper_blocks: int | None = None) -> IA3Config:
    """The config that rescales every linear layer's output, or the feed-forward input.

    A small model learns more from these sites than from the paper's, and in fewer steps
    (docs/benchmarks.md). With `upper_blocks`, the config names those of so many last blocks.
    """
    if upper_blocks is None:
        return IA3Config(task_type=_task_type(base), target_modules="all-linear")
    with base.lock:
        modules = linear_in_upper_blocks(base.model, upper_blocks)
    return IA3Config(task_type=_task_type(base), target_modules=modules)


def paper_sites(base: BaseModel) -> IA3Config:
    """The config that rescales the paper's sites (section 3.3)."""
    return IA3Config(task_type=_task_type(base), paper_sites=True)


def _task_type(base: BaseModel) -> TaskType:
    return TaskType.SEQ_2_SEQ_LM if base.is_encoder_decoder else TaskType.CAUSAL_LM


@contextmanager
def temporary_adapter(
    base: BaseModel, adapter: Adapter | IA3Config, *, source: str = "adapter"
) -> Iterator[IA3Model]:
    """Put one adapter on the base model, or a new one, whose vectors are ones.

    The context holds the model's lock, so that threads take turns. On exit the model is as it was
    before, the training and evaluation modes of its modules included.
    """
    with base.lock:
        modes = [(module, module.training) for module in base.model.modules()]
        if isinstance(adapter, IA3Config):
            ia3_model = IA3Model._of_own_choice(base.model, adapter, DEFAULT_ADAPTER)
        else:
            ia3_model = IA3Model.from_adapter(base.model, adapter, source=source)
        try:
            yield ia3_model
        finally:
            ia3_model.unload()
            for module, training in modes:
                module.training = training
