"""A base model with an adapter on it, for as long as a call lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..adapter.store import Adapter
from ..base.loading import BaseModel
from ..model.ia3_model import IA3Model
from ..targets.config import IA3Config, TaskType
from ..targets.resolve import linear_in_upper_blocks

# Every linear layer's output, and the feed-forward input of the architectures that name theirs. A
# small model learns more from more sites, and in fewer steps (docs/benchmarks.md).
SITES = "all-linear"


def all_linear(base: BaseModel, upper_blocks: int | None = None) -> IA3Config:
    """The config that rescales `SITES` of this model.

    Args:
        base: the model.
        upper_blocks: rescale only these many uppermost blocks, which the config then names module
            by module.

    Raises:
        IA3Error: the model has not so many blocks, or no one list of them.
    """
    if upper_blocks is None:
        return IA3Config(task_type=_task_type(base), target_modules=SITES)
    # Another thread may be putting an adapter on, or off.
    with base.lock:
        modules = linear_in_upper_blocks(base.model, upper_blocks)
    return IA3Config(task_type=_task_type(base), target_modules=modules)


def paper_sites(base: BaseModel) -> IA3Config:
    """The config that rescales the paper's sites (section 3.3) of this model."""
    return IA3Config(task_type=_task_type(base), paper_sites=True)


def _task_type(base: BaseModel) -> TaskType:
    return TaskType.SEQ_2_SEQ_LM if base.is_encoder_decoder else TaskType.CAUSAL_LM


@contextmanager
def adapted(
    base: BaseModel, config: IA3Config, adapter: Adapter | None, source: str = "adapter"
) -> Iterator[IA3Model]:
    """The base model with one adapter on it; afterwards it is as it was found.

    The model's lock is held meanwhile.

    Args:
        base: the model.
        config: of a new adapter, whose vectors are ones.
        adapter: put on instead of a new one.
        source: what messages call it.

    Raises:
        IA3Error: the config or the adapter does not fit the model.
    """
    with base.lock:
        modes = [(module, module.training) for module in base.model.modules()]
        if adapter is None:
            ia3_model = IA3Model(base.model, config)
        else:
            ia3_model = IA3Model.from_adapter(base.model, adapter, source=source)
        try:
            yield ia3_model
        finally:
            ia3_model.unload()
            for module, training in modes:
                module.training = training
