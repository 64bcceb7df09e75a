"""vLLM's managers of adapters, which here load (IA)³ folders too.

An (IA)³ adapter takes a slot as a LoRA adapter does, so that requests, eviction and loading at run
time are vLLM's. Its vectors go into tables of our own (`sites.py`), and LoRA's tables stay empty in
that slot.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.logger import init_logger
from vllm.lora.layers import LoRAMapping, LoRAMappingType
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import DEFAULT_LANGUAGE_WRAPPER_KEY, LRUCacheLoRAModelManager
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from ..errors import IA3Error, UnknownNameError, did_you_mean, naming
from .products import CPUProducts
from .reading import holds_ia3, read_vectors
from .sites import Layer, Local, Rows

logger = init_logger("vllm.ia3")

# Output layers of classification models, which run on a row a request, not a row a token.
_OF_REQUESTS = ("score", "classifier")


class IA3Model(LoRAModel):
    """An (IA)³ adapter as vLLM's managers hold it: without LoRA's weights.

    `layers` is by vLLM's name of a layer.
    """

    def __init__(self, number: int, layers: dict[str, Local]) -> None:
        super().__init__(number, rank=1, loras={})
        self.layers = layers


class ModelManager(LRUCacheLoRAModelManager):
    """vLLM's, with the vectors of each slot."""

    def __init__(
        self, model: Any, max_num_seqs: int, max_num_batched_tokens: int, *others: Any, **named: Any
    ) -> None:
        self._empty_slots = 0
        super().__init__(model, max_num_seqs, max_num_batched_tokens, *others, **named)
        compilation = named["vllm_config"].compilation_config
        eager = (
            compilation.mode == CompilationMode.NONE
            and compilation.cudagraph_mode == CUDAGraphMode.NONE
        )
        self.rows = Rows(self.lora_slots, self.max_num_batched_tokens, self.device, eager)
        language = self._language_products()
        self.layers = {
            name: Layer(layer, self.packed_modules.get(name, [name]), self.rows)
            for name, layer in self.modules.items()
            if isinstance(layer, BaseLinearLayerWithLoRA)
            and layer.punica_wrapper is language
            and not self._is_of_requests(name)
        }
        self._layer_of = {part: name for name, layer in self.layers.items() for part in layer.parts}

    # Before the layers are made.

    @property
    def lora_slots(self) -> int:
        """How many slots there are; while LoRA's tables are made, with one that stays empty."""
        return int(super().lora_slots) + self._empty_slots

    def _init_punica_wrapper(self, max_num_batched_tokens: int, vllm_config: Any) -> None:
        super()._init_punica_wrapper(max_num_batched_tokens, vllm_config)
        for key, products in self.punica_wrapper_mapping.items():
            if type(products) is PunicaWrapperCPU:
                ours = CPUProducts(max_num_batched_tokens, self.max_num_seqs, self.device)
                self.punica_wrapper_mapping[key] = ours

    def _create_lora_modules(self) -> None:
        self._empty_slots = int(isinstance(self._language_products(), CPUProducts))
        super()._create_lora_modules()
        self._empty_slots = 0

    def _language_products(self) -> Any:
        prefix = self.mm_mapping.language_model[0] if self.supports_mm else None
        return self.punica_wrapper_mapping[prefix or DEFAULT_LANGUAGE_WRAPPER_KEY]

    # Adapters.

    def place(self, vectors: dict[str, Tensor]) -> dict[str, Local]:
        """This process's part of an adapter's vectors, by layer.

        Raises:
            UnknownNameError: a module is none of the model's, or takes no adapters in vLLM.
            IA3Error: a vector does not fit its layer, or cannot be served there.
        """
        by_layer: dict[str, dict[str, Tensor]] = {}
        for name, vector in vectors.items():
            if name not in self._layer_of:
                raise UnknownNameError(self._not_served(name))
            by_layer.setdefault(self._layer_of[name], {})[name] = vector
        return {name: self.layers[name].local(given) for name, given in by_layer.items()}

    def _is_of_requests(self, name: str) -> bool:
        return bool(self.is_pooling_model) and name.rpartition(".")[2] in _OF_REQUESTS

    def _not_served(self, name: str) -> str:
        if self._is_of_requests(name):
            return f"{name!r} is the model's output layer, on which vLLM can serve no vector"
        targets = self.lora_config.target_modules
        if targets is not None:
            return (
                f"{name!r} is not among the modules that this server has adapters on "
                f"({', '.join(sorted(targets))}): start it with others (--lora-target-modules)"
            )
        return (
            f"{name!r} is no linear layer of {type(self.model).__name__} that vLLM has adapters "
            f"on{did_you_mean(name, self._layer_of)}"
        )

    def _add_adapter(self, lora: LoRAModel) -> None:
        if isinstance(lora, IA3Model):
            self._registered_adapters[lora.id] = lora
        else:
            super()._add_adapter(lora)

    def activate_adapter(self, lora_id: int) -> bool:
        """Put an adapter into a slot, unless it is in one."""
        is_new = bool(super().activate_adapter(lora_id))
        if is_new:
            slot, adapter = self.lora_index_to_id.index(lora_id), self.get_adapter(lora_id)
            placed = adapter.layers if isinstance(adapter, IA3Model) else {}
            for name, layer in self.layers.items():
                layer.put(slot, placed.get(name))
            # Of one number, in one slot, but maybe of the other kind: rows are told apart anew.
            self._last_mapping = None
        return is_new

    def remove_all_adapters(self) -> None:
        """Empty every slot; also what vLLM does where its memory was given back meanwhile."""
        super().remove_all_adapters()
        self.rows.reset()
        for layer in self.layers.values():
            layer.reset()

    def _set_adapter_mapping(self, mapping: LoRAMapping) -> None:
        # Looked up without a touch, which would be a use.
        held = self._registered_adapters.cache
        slots = {
            number: slot
            for slot, number in enumerate(self.lora_index_to_id)
            if number is not None and isinstance(held[number], IA3Model)
        }
        if mapping.type == LoRAMappingType.LANGUAGE:
            self.rows.set([slots.get(number, self.rows.base) for number in mapping.index_mapping])
        if slots:
            # For LoRA's products our rows are the base model's: a batch without others has none.
            mapping = replace(
                mapping,
                index_mapping=tuple(0 if n in slots else n for n in mapping.index_mapping),
                prompt_mapping=tuple(0 if n in slots else n for n in mapping.prompt_mapping),
            )
        super()._set_adapter_mapping(mapping)


class WorkerManager(LRUCacheWorkerLoRAManager):
    """vLLM's, which asks a folder first whether it is an (IA)³ adapter's."""

    _manager_cls = ModelManager

    def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        folder = get_adapter_absolute_path(lora_request.lora_path)
        if not holds_ia3(folder):
            return super()._load_adapter(lora_request)
        adapter, vectors = read_vectors(folder)
        manager = self._adapter_manager
        if adapter.base and (other := adapter.base.difference(manager.model)):
            logger.warning("this may be the wrong base model for adapter %r: %s", folder, other)
        with naming(folder):
            layers = manager.place(_renamed(vectors, manager.model))
        return IA3Model(lora_request.lora_int_id, layers)


def _renamed(vectors: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The vectors by the names that vLLM has for their modules."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return vectors
    mapper = mapper.get_rename_mapper()
    renamed = {}
    for name, vector in vectors.items():
        # It maps the names of parameters.
        new = mapper._map_name(f"{name}.weight")
        if new is None:
            raise IA3Error(f"{name!r} is left out in vLLM, which has no layer for it")
        renamed[new.removesuffix(".weight")] = vector
    return renamed
