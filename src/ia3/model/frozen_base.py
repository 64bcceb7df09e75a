"""The base model while adapters are on it: frozen, and saved without them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from transformers import PreTrainedModel

from ..core import weights
from ..core.names import ATTRIBUTE, module_at, own_name, own_names
from .embeddings import RESIZE, GuardedResize, pretrained_in


class FrozenBase:
    """A base model that is to be frozen, and given back as it was."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._trained = {own_name(name) for name, p in model.named_parameters() if p.requires_grad}
        self._ignored = getattr(model, "_keys_to_ignore_on_save", None)
        self._requires_input_grads = False
        # (module, slot) -> the base's own value, where an adapter came with another.
        self.replaced: dict[tuple[str, str], Any] = {}

    def freeze(self) -> None:
        """Stop the base's parameters training, and hide adapters from its `save_pretrained`."""
        self._set_trained(False)
        if isinstance(self.model, PreTrainedModel):
            self.model._keys_to_ignore_on_save = AdapterKeys(self.model, self._ignored or ())
        for inner in pretrained_in(self.model):
            vars(inner)[RESIZE] = GuardedResize(inner)
        if any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules()):
            self.checkpointing_enabled({})

    def _set_trained(self, trained: bool) -> None:
        # They may have come into wrappers, or out of them, since.
        parameters = own_names(dict(self.model.named_parameters()))
        for name in self._trained & parameters.keys():
            if is_lazy(parameters[name]):  # adapters are refused until it has a size
                continue
            # What was made in inference mode may be told only there.
            with torch.inference_mode(parameters[name].is_inference()):
                parameters[name].requires_grad_(trained)

    def checkpointing_enabled(self, options: Mapping[str, Any] | None) -> None:
        """Have the embeddings' output require gradients where checkpointing is reentrant.

        It gives gradients only where a block's input requires them, and nothing before the first
        vector does.
        """
        reentrant = (options or {}).get("use_reentrant", True)
        possible = hasattr(self.model, "enable_input_require_grads")
        if reentrant and possible and not self._requires_input_grads:
            self.model.enable_input_require_grads()  # type: ignore[operator]
            self._requires_input_grads = True

    def replace(self, name: str, values: Mapping[str, Any]) -> None:
        """Have the module `name` hold an adapter's values, or the base's own: slot -> value."""
        module = module_at(self.model, name)
        for slot, value in values.items():
            own = self.replaced.setdefault((name, slot), weights.read(module, slot))
            weights.write(module, slot, value)
            if value is own:
                del self.replaced[name, slot]

    def put_back(self, name: str) -> None:
        """Have the module `name` hold the base's own values again."""
        own = {slot: value for (module, slot), value in self.replaced.items() if module == name}
        self.replace(name, own)

    def keep_replaced(self) -> None:
        """Let the base's own values go: what has replaced them stays."""
        self.replaced = {}

    def give_back(self) -> None:
        """Undo `freeze` and `replace`. Parameters that are no longer there are passed over."""
        for (name, slot), value in self.replaced.items():
            weights.write(module_at(self.model, name), slot, value)
        self.keep_replaced()
        for inner in pretrained_in(self.model):
            vars(inner).pop(RESIZE, None)
        self._set_trained(True)
        if isinstance(self.model, PreTrainedModel):
            self.model._keys_to_ignore_on_save = self._ignored
        if self._requires_input_grads:
            self.model.disable_input_require_grads()  # type: ignore[operator]
            self._requires_input_grads = False


@dataclass(eq=False)
class AdapterKeys(Iterable[str], Sized):
    """What `save_pretrained` leaves out: what the model ignores, and the adapters by then."""

    _model: nn.Module
    _ignored: Collection[str]

    def __iter__(self) -> Iterator[str]:
        yield from self._ignored
        for key in self._model.state_dict(keep_vars=True):
            if ATTRIBUTE in key.split("."):
                yield key

    def __len__(self) -> int:
        return sum(1 for _ in self)
