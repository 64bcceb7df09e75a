"""Put an adapter on a base model for the length of a `with` statement, and name its sites."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..adapter.files import Adapter
from ..base.loading import BaseModel, LoadedModel
from ..core.route import changing
from ..core.spread import gradients_added_up
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
    base: LoadedModel, adapter: Adapter | IA3Config, *, source: str = "adapter"
) -> Iterator[IA3Model]:
    """Put one adapter on the base model, or a new one, whose vectors are ones.

    The context holds the model's lock, so that threads take turns. On exit the model is as it was
    before, the training and evaluation modes of its modules included.
    """
    with without_adapter(base), gradients_added_up():
        found = _Found(base.model)
        try:
            with changing():
                if isinstance(adapter, IA3Config):
                    ia3_model = IA3Model._of_own_choice(base.model, adapter, DEFAULT_ADAPTER)
                else:
                    ia3_model = IA3Model.from_adapter(base.model, adapter, source=source)
                found.ia3_model, _carried[base.model] = ia3_model, found
            yield ia3_model
        finally:
            found.put_back()


@contextmanager
def without_adapter(base: LoadedModel) -> Iterator[None]:
    """Within the context, no other thread has an adapter on the model.

    Nor has it the one of a thread of the process that this one was forked off.
    """
    with base.lock:
        left = _carried.get(base.model)
        if left is not None and left.process != os.getpid():
            left.put_back()
        yield


class _Found:
    """A base model as it was before it carried an adapter.

    A process that is forked off meanwhile has the adapter, and no thread that would take it off:
    the next one that puts an adapter on does so.
    """

    def __init__(self, model: nn.Module) -> None:
        self.process = os.getpid()
        self.ia3_model: IA3Model | None = None
        self._model = model
        self._modes = [(module, module.training) for module in model.modules()]
        # Where answers are scored, the output layer's input is caught.
        head = getattr(model, "get_output_embeddings", lambda: None)()
        self._head = nn.Module() if head is None else head
        self._forward = vars(self._head).get("forward")
        self._hooks = dict(self._head._forward_pre_hooks)

    def put_back(self) -> None:
        """Have the model be so again."""
        with changing():
            if self.ia3_model is not None:
                self.ia3_model._unload()
                _carried.pop(self._model, None)
            for module, training in self._modes:
                module.training = training
            if self.process == os.getpid():
                return
            vars(self._head).pop("forward", None)
            if self._forward is not None:
                vars(self._head)["forward"] = self._forward
            self._head._forward_pre_hooks.clear()
            self._head._forward_pre_hooks.update(self._hooks)


# By model, while it carries an adapter.
_carried: weakref.WeakKeyDictionary[nn.Module, _Found] = weakref.WeakKeyDictionary()
