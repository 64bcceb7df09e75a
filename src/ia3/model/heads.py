"""A model's head, by its task: it trains beside the vectors, and is saved with them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress

from torch import nn
from torch.nn.parameter import is_lazy
from transformers import PreTrainedModel

from ..core.names import module_at, modules_of, own_modules, own_name
from ..core.saved_modules import has_parameters
from ..errors import IA3Error, warn_caller
from ..targets.config import IA3Config, TaskType
from ..targets.resolve import resolve
from .embeddings import embeddings_of, prefix_of, pretrained_in

# The ends of the names of the heads that PEFT trains, by task.
HEADS: dict[str | None, tuple[str, ...]] = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}
# transformers marks the parameters that it read from a checkpoint, and the modules it has been at.
MARK = "_is_hf_initialized"


def ends_of_heads(config: IA3Config) -> tuple[str, ...]:
    """PEFT's names for the head of a config's task."""
    return HEADS.get(config.task_type, ())


def with_head(model: nn.Module, config: IA3Config, *, stored: bool = False) -> list[str]:
    """A config's `modules_to_save`, and the head that its task trains.

    Where PEFT's names find none (it trains none then), the head is what stands beside the body. A
    `stored` adapter's config has it already, but for PEFT's own names.
    """
    names = [own_name(name) for name in config.modules_to_save or ()]
    if config.task_type not in HEADS:
        return names
    modules = modules_of(model)
    own = [name for name in own_modules(modules) if has_parameters(modules[name])]
    whole = tuple(f"{name}." for name in own if names and name.endswith(tuple(names)))
    heads = [
        end
        for end in HEADS[config.task_type]
        if any(name.endswith(end) and not name.startswith(whole) for name in own)
    ]
    if not heads and not stored:
        others = _other_heads(model, config)
        heads = [
            head
            for head in others
            # An entry names every module whose name ends so.
            if all(name in others for name in own if name.endswith(head))
            and not any(part.startswith(f"{head}.") for part in whole)
        ]
    return [*names, *(head for head in heads if head not in names)]


def warn_of_untrained(
    model: nn.Module,
    fresh: Sequence[str] | None,
    name: str,
    config: IA3Config,
    saved: Sequence[str],
    *,
    stored: bool = False,
) -> None:
    """Warn where an adapter leaves a head, or another part, untrained that was never trained.

    `fresh` are what `fresh_modules` has found, `saved` the modules that train and are saved with
    the adapter.
    """
    kind = type(model).__name__
    if config.task_type in HEADS and not saved and not stored:
        warn_caller(
            f"task_type {config.task_type} trains a head, and {kind} has none that is known as one "
            f"({' or '.join(ends_of_heads(config))}): only vectors train. Name it in "
            "modules_to_save, or for a language model give its own task_type",
        )
    if fresh is None:
        known = saved and config.task_type in HEADS and not stored
        fresh = [
            part
            for name in (_beside_body(model) if known else ())
            for part, module in module_at(model, name).named_modules(prefix=name)
            if any(map(_is_weight, module.parameters(recurse=False)))
        ]
    left = [f for f in fresh if not any(f"{f}.".startswith(f"{s}.") for s in saved)]
    if left:
        what = ", ".join(map(repr, left[:4])) + (f" and {len(left) - 4} more" * (len(left) > 4))
        warn_caller(
            f"{what} of {kind}: in no checkpoint, but initialised here, and neither trained nor "
            f"saved with adapter {name!r}. Name it in modules_to_save, or it will have other "
            "values where the base model is loaded again",
        )


def _other_heads(model: nn.Module, config: IA3Config) -> list[str]:
    """The head, where it has none of PEFT's names."""
    beside = _beside_body(model)
    if beside or not isinstance(model, PreTrainedModel) or model.base_model_prefix or _body(model):
        return beside
    # A model of the user's own: the body is what is rescaled, the head what comes after it.
    with suppress(IA3Error):  # what does not fit is said where the targets are looked for
        rescaled = {target.name.split(".")[0] for target in resolve(model, config)[1]}
        children = list(model._modules)
        last = max(children.index(name) for name in rescaled)
        return [name for name in _with_parameters(model) if children.index(name) > last]
    return []


def _beside_body(model: nn.Module) -> list[str]:
    """What the one transformers model in a model has beside its body and its embeddings."""
    inner = list(pretrained_in(model))
    body = _body(inner[0]) if len(inner) == 1 else []
    if not body:
        return []
    prefix = prefix_of(inner[0], model)
    return [f"{prefix}{name}" for name in _with_parameters(inner[0]) if name not in body]


def _body(model: PreTrainedModel) -> list[str]:
    """Which of a model's children are its body: by transformers' name for it, or by their class."""
    if model.base_model_prefix in model._modules:
        return [model.base_model_prefix]
    return [name for name, m in model.named_children() if isinstance(m, PreTrainedModel)]


def _with_parameters(model: PreTrainedModel) -> list[str]:
    """The children that have parameters, without embeddings and language models' heads."""
    embeddings = set(embeddings_of(model).values())
    return [
        name
        for name, child in model.named_children()
        if has_parameters(child) and embeddings.isdisjoint(child.modules())
    ]


def _is_weight(parameter: nn.Parameter) -> bool:
    """Whether it starts at random: norms and biases start as ones and zeros, everywhere."""
    return not is_lazy(parameter) and parameter.dim() > 1


def fresh_modules(model: nn.Module) -> list[str] | None:
    """The modules whose weights were in no checkpoint; `None` where that is not known."""
    modules = modules_of(model)
    passed_over = set(embeddings_of(model).values())
    # Positions that are computed, and what else checkpoints need not have.
    lists = [inner._keys_to_ignore_on_load_missing for inner in pretrained_in(model)]
    not_saved = [pattern for patterns in lists for pattern in patterns or ()]
    found, known = [], False
    for name in own_modules(modules):
        module = modules[name]
        if MARK not in vars(module):
            continue
        weights = [p for p in module._parameters.values() if p is not None and _is_weight(p)]
        read = [hasattr(p, MARK) for p in weights]
        known = known or any(read)
        if all(read) or module in passed_over:
            continue
        if not any(re.search(pattern, f"{name}.weight") for pattern in not_saved):
            found.append(name)
    return found if known else None
