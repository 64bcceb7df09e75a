"""Put an adapter on a base model for the length of a `with` statement, and name its sites."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..adapter.store import Adapter
from ..base.loading import BaseModel
from ..model.ia3_model import IA3Model
from ..targets.config import IA3Config, TaskType
from ..targets.resolve import linear_in_upper_blocks


def all_linear(base: BaseModel, upper_blocks: int | None = None) -> IA3Config:
    """The config that rescales the output of every linear layer, or the feed-forward input.

    A small model learns more from these sites than from the paper's, and in fewer steps
    (docs/benchmarks.md).

    With `upper_blocks`, only those of so many last blocks; the config then names each module.

    Raises:
        IA3Error: the model has fewer blocks, or has no single list of blocks.
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
    """Put one adapter on the base model; on exit the model is as it was before.

    The context holds the model's lock, so that threads take turns. On exit, each module has the
    mode (training or evaluation) that it had on entry.

    Args:
        base: the model.
        adapter: the adapter, or the config of a new one, whose vectors are ones.
        source: names the adapter in error messages.

    Yields:
        The model with the adapter active as `"default"`.

    Raises:
        IA3Error: the adapter or the config does not fit the model.
    """
    with base.lock:
        modes = [(module, module.training) for module in base.model.modules()]
        if isinstance(adapter, IA3Config):
            ia3_model = IA3Model(base.model, adapter)
        else:
            ia3_model = IA3Model.from_adapter(base.model, adapter, source=source)
        try:
            yield ia3_model
        finally:
            ia3_model.unload()
            for module, training in modes:
                module.training = training
