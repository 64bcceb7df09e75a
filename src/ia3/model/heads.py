"""The head that trains, and is saved, with an adapter for a task."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ..targets.config import IA3Config, TaskType

# The names of the heads that PEFT trains, by task.
HEADS = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}


def with_head(model: nn.Module, config: IA3Config) -> list[str]:
    """A config's `modules_to_save`, and the head that its task trains.

    The head is what PEFT's names find, else every child of a transformers model that is not its
    body: PEFT leaves a head of another name untrained without a word.
    """
    names = list(config.modules_to_save or ())
    if config.task_type not in HEADS:
        return names
    heads = [name for name in HEADS[TaskType(config.task_type)] if hasattr(model, name)]
    if not heads and isinstance(model, PreTrainedModel):
        heads = [
            name
            for name, child in model.named_children()
            if name != model.base_model_prefix and next(child.parameters(), None) is not None
        ]
    return [*names, *(head for head in heads if head not in names)]
