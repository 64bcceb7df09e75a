"""`IA3Model`: a base model and the (IA)³ adapters on it, and its classes by task.

The model is a face over its parts: `Adapters` (what is on the base model), `Merge` (what is in its
weights) and `Routes` (which row of a batch has which adapter).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys as LoadedKeys

from ..adapter.combining import CombinationType, MajoritySign, combine
from ..adapter.files import Adapter, check_finite, named_tensors
from ..arguments import flag, folder_of, instance, listed
from ..core.merge import Merge
from ..core.names import own_names
from ..core.route import LOCK, Names, changing
from ..errors import IA3Error, UnknownNameError, naming, warn_caller, warn_ignored
from ..targets.config import IA3Config, PeftType, TaskType
from . import saving, status
from .adapters import Adapters, check_config, check_name as check_name, check_string
from .advice import offer_advice
from .routes import Routes
from .saving import DEFAULT_ADAPTER as DEFAULT_ADAPTER
from .status import TunerLayerStatus, TunerModelStatus
from .trainers import AsPeftModel, tell_others

# Task -> the class of its models: those at the end of this file.
CHECKPOINTING = "what checkpointing is enabled with"
MODEL_CLASSES: dict[str | None, type[IA3Model]] = {}


class IA3Model(AsPeftModel):
    """A base model with (IA)³ adapters on it (paper section 3.3).

    No module is wrapped or replaced: the base model's own modules get hooks, and `unload` gives
    back the very model that was passed in. The base's parameters are frozen while adapters are on
    it, and keep their names; an adapter's vectors are parameters beside them, float32 whatever the
    base's dtype unless that is asked for. Attributes that are not this class's own come from the
    base model.

    Several threads may call the model, and change its adapters meanwhile: each change is made under
    one lock, a call sees the adapters from before or after it, and a change that raises is undone.
    Merging, unloading, fusing and `use_plain_product` raise a `StateError` while another thread is
    in a call, and calls that begin meanwhile wait for them. Ctrl-C interrupts after a change.
    What is refused raises `IA3Error`, an adapter's name that is unknown in any method.

    Args:
        model: the base model; any module with linear layers.
        peft_config: what to rescale, or a mapping that has it under the adapter's name. Model and
            config may also come in the other order.
        adapter_name: the first adapter's name, active at once.
        autocast_adapter_dtype, low_cpu_mem_usage: as in `add_adapter`.
        vectors: its vectors, as in `add_adapter`; ones where not given.

    Raises:
        InvalidTypeError: an argument is of another type.
        UnknownNameError: `peft_config` is a mapping without `adapter_name`.
        StateError: the model has adapters already.
        NoMatchingPeftModuleError: a name in the config matches no module.
        MismatchError: the vectors are not those of the modules.
        IA3Error: the adapter's name is malformed, or the config does not fit. Whatever is raised,
            the model is unchanged.
    """

    # The Trainer trains a quantized model only if it has adapters, and asks for this.
    _hf_peft_config_loaded = True

    peft_type = PeftType.IA3
    # The task of a subclass, whose head trains and is saved with the adapters.
    task: TaskType | None = None

    model: nn.Module

    def __init_subclass__(cls, task: TaskType | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if task is not None:
            cls.task = task
            MODEL_CLASSES[task] = cls

    def __init__(
        self,
        model: nn.Module,
        peft_config: IA3Config | Mapping[str, IA3Config],
        adapter_name: str = DEFAULT_ADAPTER,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        *,
        vectors: Mapping[str, Tensor] | None = None,
    ) -> None:
        model, peft_config = in_order(model, peft_config)
        check_string(adapter_name)
        if isinstance(peft_config, Mapping) and adapter_name not in peft_config:
            raise UnknownNameError(
                f"peft_config has {[*peft_config]}, expected {adapter_name!r} in it"
            )
        config = peft_config[adapter_name] if isinstance(peft_config, Mapping) else peft_config
        check_config(config)
        if config.task_type is None and self.task is not None:
            config = dataclasses.replace(config, task_type=self.task)
        self._begin(model)
        self._add_first(adapter_name, config, _stored(config, vectors), autocast_adapter_dtype)
        if vectors is None:
            self._tell_notes(adapter_name, config)

    @classmethod
    def from_adapter(
        cls,
        model: nn.Module,
        adapter: Adapter,
        adapter_name: str = DEFAULT_ADAPTER,
        *,
        source: str = "adapter",
        autocast_adapter_dtype: bool = True,
    ) -> IA3Model:
        """Put an adapter that has been read, from `source`, onto a base model.

        `autocast_adapter_dtype` is as in `add_adapter`.

        Raises:
            InvalidTypeError: an argument is of another type.
            StateError: the model has adapters already.
            NoMatchingPeftModuleError: no module is left to rescale.
            MismatchError: the values are not those of the modules.
            IA3Error: the adapter's name is malformed, or its config does not fit. Whatever is
                raised, the model is unchanged.
        """
        instance("adapter", adapter, Adapter, "an Adapter, as IA3Model.adapter gives it")
        kind = MODEL_CLASSES.get(adapter.config.task_type, cls) if cls is IA3Model else cls
        self = kind.__new__(kind)
        self._begin(model)
        with naming(source):
            if adapter.unread is None:
                check_finite(adapter.vectors)
            self._add_first(adapter_name, adapter.config, adapter, autocast_adapter_dtype)
        return self

    @classmethod
    def _of_own_choice(cls, model: nn.Module, config: IA3Config, name: str) -> IA3Model:
        """As the constructor, without notes on the config, which is not the caller's."""
        self = cls.__new__(cls)
        self._begin(model)
        self._add_first(name, config, None, True)
        return self

    @classmethod
    def without_adapters(cls, model: nn.Module) -> IA3Model:
        """A base model with no adapter yet, its parameters frozen.

        Raises:
            InvalidTypeError: an argument is of another type.
            StateError: the model has adapters already.
        """
        self = cls.__new__(cls)
        self._begin(model)
        self._adapters.base.freeze()
        return self

    def _begin(self, model: nn.Module) -> None:
        super().__init__()
        offer_advice()
        self._adapters = Adapters(model, Merge(model))
        self.routes = Routes(self._adapters)
        self.model = model
        tell_others(IA3Model)

    def _add_first(self, name: str, config: IA3Config, stored: Adapter | None, wide: bool) -> None:
        try:
            with changing():
                self._adapters.add(name, config, stored, wide)
                self._adapters.base.freeze()
                self.set_adapter(name, inference_mode=config.inference_mode)
        except BaseException:  # nobody gets the model, to take it off
            self._unload()
            raise

    def __deepcopy__(self, memo: dict[int, Any]) -> IA3Model:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        # All of it has the same adapters active, and can be trained.
        with LOCK, torch.inference_mode(False):
            # Without what compile() has made of the original's call.
            twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))  # type: ignore[no-untyped-call]
        return twin

    def _tell_notes(self, name: str, config: IA3Config) -> None:
        """Warn of what the config names. An adapter with values was trained on its modules."""
        if found := self._adapters.notes_on(name, config):
            told = "".join(f"\n- {note}" for note in found)
            warn_caller(
                f"adapter {name!r} rescales what its config names, which may surprise:{told}"
            )

    @property
    def peft_config(self) -> dict[str, IA3Config]:
        """Adapter name -> its config, with its modules named."""
        return self._adapters.configs

    @property
    def modules_to_save(self) -> set[str] | None:
        """What the adapters' configs name as `modules_to_save`, or `None`."""
        named = {name for c in self.peft_config.values() for name in c.modules_to_save or ()}
        return named or None

    @property
    def targeted_module_names(self) -> list[str]:
        """The modules of the base model that have vectors, in its order."""
        return [name for name, _, _ in self._adapters.contents().sites]

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: IA3Config,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        *,
        vectors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter, not yet active: its vectors do not require gradients until it is.

        Args:
            adapter_name: a name without dots or slashes, new to this model.
            peft_config: what it rescales.
            low_cpu_mem_usage: ignored: vectors are small, and made once.
            vectors: module name -> vector: `[dim, 1]` on a linear layer's output, `[1, dim]` on its
                input, `[1, dim, 1, ...]` on a convolution, `[experts, dim]` within experts. Any
                floating dtype. With vectors, entries of the config's lists may match nothing. If
                not given, ones, or normal numbers without `init_ia3_weights`.
            autocast_adapter_dtype: vectors are float32, and stay so when the model is cast. With
                False they have the dtypes of their modules and are cast with them, as all that
                FSDP 1 flattens together must have one dtype; half precision hardly trains.

        Raises:
            InvalidTypeError: an argument is of another type.
            StateError: the model was unloaded.
            NoMatchingPeftModuleError: a name in the config matches no module.
            MismatchError: the vectors are not those of the modules.
            IA3Error: the name is taken or malformed, or the config does not fit. Whatever is
                raised, the model is unchanged.
        """
        stored = _stored(peft_config, vectors)
        self._add(adapter_name, peft_config, stored, autocast_adapter_dtype)
        if vectors is None:
            self._tell_notes(adapter_name, peft_config)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: CombinationType = "linear",
        *,
        density: float | None = None,
        majority_sign_method: MajoritySign = "total",
    ) -> None:
        """Add an adapter, not yet active, that combines others; by default PEFT's weighted sums.

        Args:
            adapters, weights: the names of those to combine, and a weight for each.
            adapter_name: the new name.
            combination_type, density, majority_sign_method: see `ia3.combine`, which also says what
                is refused.

        Raises:
            InvalidTypeError: an argument is of another type.
            UnknownNameError: there is no adapter of that name.
            StateError: the model was unloaded.
            IA3Error: the new name is taken or malformed, or see `ia3.combine`.
        """
        with LOCK:
            names = listed("adapters", adapters, "a list of names")
            self._adapters.check_known(names)
            stored = [(name, self._adapters.stored(name)) for name in names]
        combined = combine(stored, weights, combination_type, density, majority_sign_method)
        self._add(adapter_name, combined.config, combined)

    def _add(self, name: str, config: IA3Config, stored: Adapter | None, wide: bool = True) -> None:
        with changing():
            if self.routes.bank is not None and name in self.routes.bank:
                raise IA3Error(
                    f"the model's bank has an adapter {name!r} already: remove it or choose another"
                )
            self._adapters.add(name, config, stored, wide)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """As `nn.Module`'s, while no other thread adds or deletes adapters."""
        with LOCK:
            return super().state_dict(*args, **kwargs)

    def train(self, mode: bool = True) -> IA3Model:
        """As `nn.Module`'s, while no other thread adds or deletes adapters.

        Raises:
            InvalidTypeError: an argument is of another type.
        """
        instance("mode", mode, bool, "True or False")
        with LOCK:
            return super().train(mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter, neither merged nor routed. Calls with it that are running end with it.

        If no other is active then, the first that is left becomes so.

        Raises:
            InvalidTypeError: an argument is of another type.
            UnknownNameError: there is no adapter of that name.
            StateError: it is merged, a route is on, or FSDP has spread it.
        """
        self._adapters.remove(adapter_name)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones; several multiply.

        Only they require gradients, or none do in `inference_mode`.

        Raises:
            InvalidTypeError: an argument is of another type.
            UnknownNameError: there is no adapter of that name.
            StateError: two have a copy of one module (`modules_to_save`), or a route is on.

        Example:
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> from ia3 import IA3Config, get_peft_model
            >>> base = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2))
            >>> model = get_peft_model(base, IA3Config(), "first")
            >>> model.add_adapter("second", IA3Config(target_modules="all-linear"))
            >>> model.set_adapter("second")
            >>> model.active_adapters
            ['second']
        """
        self._adapters.switch(adapter_name, inference_mode)

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters."""
        return list(self._adapters.active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, or the names if there are several."""
        active = self.active_adapters
        return active[0] if len(active) == 1 else active

    @property
    def active_peft_config(self) -> IA3Config:
        """The (first) active adapter's config.

        Raises:
            StateError: no adapter is active, or the model was unloaded.
        """
        return self._adapters.active_config()

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter is active, and adapters are not disabled."""
        return self._adapters.enabled and bool(self._adapters.active)

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Have these adapters train or not, active or not; the others stay as they are.

        `set_adapter` says anew which of them do.

        Raises:
            InvalidTypeError: an argument is of another type.
            UnknownNameError: there is no adapter of that name.
        """
        self._adapters.require_grad(adapter_names, requires_grad)

    def disable_adapter_layers(self) -> None:
        """Compute as the base model does, unmerged and unrouted, until `enable_adapter_layers`.

        Raises:
            StateError: a route is on.
        """
        self._adapters.enable(False)

    def enable_adapter_layers(self) -> None:
        """Undo `disable_adapter_layers`.

        Raises:
            StateError: what is merged cannot be unmerged.
        """
        self._adapters.enable(True)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """As `disable_adapter_layers`, within the context: for all threads that call the model.

        Where several are in one, adapters are enabled again when the last one has left.

        Raises:
            StateError: a route is on.
        """
        with self._adapters.disabled():
            yield

    def vectors(self, adapter_name: str) -> dict[str, Tensor]:
        """Module name -> the vector that trains, of its shape and dtype in `add_adapter`.

        Raises:
            InvalidTypeError: an argument is of another type.
            UnknownNameError: there is no adapter of that name.
        """
        with LOCK:
            self._adapters.check_known([adapter_name])
            return {
                name: site[adapter_name] for name, site in self._adapters.sites_of(adapter_name)
            }

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(values that require gradients, all values)."""
        with LOCK:
            return status.value_counts(self)

    def print_trainable_parameters(self) -> None:
        """Print both numbers and their ratio, in PEFT's words."""
        some, total = self.get_nb_trainable_parameters()
        share = 100 * some / total
        print(f"trainable params: {some:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """What is on each module that an adapter has a vector for or a copy of; see its class.

        Raises:
            StateError: there is no adapter.
        """
        return status.of_layers(self._adapters, "model.")

    def get_model_status(self) -> TunerModelStatus:
        """What is on the model as a whole; see its class.

        Raises:
            StateError: there is no adapter.
        """
        return status.of_model(self._adapters, self)

    def supports_lora_conversion(self, adapter_name: str = DEFAULT_ADAPTER) -> bool:
        """False: a vector scales an activation, and no low-rank sum says the same."""
        return False

    # -- computing --------------------------------------------------------------------------------

    def forward(self, *args: Any, adapter_names: Names | None = None, **kwargs: Any) -> Any:
        """The base model's forward, with the active adapters.

        Args:
            adapter_names: instead of these, one name a row of the batch, or lists with one a
                token; raises as `route`.

        Raises:
            InvalidTypeError: `adapter_names` are no list of names.
            UnknownNameError: there is no adapter of that name.
            StateError: as of `route`.
            IA3Error: as of `route`; what the base model raises besides is its own.
        """
        if adapter_names is None:
            return self.model(*args, **kwargs)
        return self._forward_routed(adapter_names, args, kwargs)

    # A compiler knows no thread's route.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _forward_routed(self, names: Names, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self.routes.entered(names, call=(args, kwargs)):
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Names | None = None, **kwargs: Any) -> Any:
        """The base model's `generate`, with the active adapters.

        Args:
            adapter_names: instead of these, one name a row of the input, also for its beams and
                returned sequences; raises as `route`.

        Raises:
            InvalidTypeError: `adapter_names` are no list of names.
            UnknownNameError: there is no adapter of that name.
            StateError: as of `route`.
            IA3Error: as of `route`, or tokens are named; what the base model raises besides is its
                own.
        """
        with self._adapters.calls.opened(self.model):
            return self.routes.generate(adapter_names, args, kwargs)

    def generate_batch(self, *args: Any, adapter_names: None = None, **kwargs: Any) -> Any:
        """The base model's `generate_batch` (continuous batching), with the active adapters.

        Raises:
            IA3Error: `adapter_names` are given, or the model is routed: it has one adapter for all.
        """
        self.routes.check_generates_here("generate_batch", adapter_names)
        return self.model.generate_batch(*args, **kwargs)  # type: ignore[operator]

    def init_continuous_batching(
        self, *args: Any, adapter_names: None = None, **kwargs: Any
    ) -> Any:
        """The base model's, whose manager generates as `generate_batch` does.

        Raises:
            IA3Error: as of `generate_batch`.
        """
        self.routes.check_generates_here("continuous batching", adapter_names)
        return self.model.init_continuous_batching(*args, **kwargs)  # type: ignore[operator]

    def continuous_batching_context_manager(
        self, *args: Any, adapter_names: None = None, **kwargs: Any
    ) -> Any:
        """The base model's, whose manager generates as `generate_batch` does.

        Raises:
            IA3Error: as of `generate_batch`.
        """
        self.routes.check_generates_here("continuous batching", adapter_names)
        return self.model.continuous_batching_context_manager(*args, **kwargs)  # type: ignore[operator]

    @contextmanager
    def route(self, names: Names, token_index: Tensor | None = None) -> Iterator[None]:
        """Within the context each row of a batch has an adapter of its own.

        The route belongs to the thread or task that enters it, and to what is called in it: what
        gradient checkpointing computes again has the same one. Vectors that require gradients get
        those of their rows; the values of other adapters are gathered when the context is entered.
        The batch is the first axis of all activations. A thread that is started within does not
        inherit the route, and a generator must not yield within it.

        Args:
            names: of this model's adapters, one a row, `"__base__"` for the base model's own
                output. Or, for packed sequences, lists with one a token.
            token_index: `[batch, seq]`, int64: the tokens' names, as places in `names`.

        Raises:
            InvalidTypeError: an argument is of another type.
            UnknownNameError: there is no adapter of that name.
            StateError: adapters are merged or disabled, the model was unloaded, another adapter's
                copy of a module is active, or a context within this one is still open.
            IA3Error: an adapter has copies of modules (`modules_to_save`) or rescales experts; or,
                in a call, the batch has not as many rows or tokens as were named.

        Example:
            >>> import torch
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> from ia3 import IA3Config, get_peft_model
            >>> base = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2))
            >>> model = get_peft_model(base, IA3Config(), "first")
            >>> model.add_adapter("second", IA3Config())
            >>> with torch.no_grad(), model.route(["first", "__base__", "second"]):
            ...     logits = model(input_ids=torch.arange(12).reshape(3, 4)).logits
            >>> logits.shape
            torch.Size([3, 4, 32000])
        """
        with self.routes.entered(names, token_index):
            yield

    def use_plain_product(self, plain: bool = True) -> None:
        """Rescale by activation ⊙ vector at the very module, as PEFT does, or where it costs least.

        By default (`plain=False`) vectors are applied in place where nothing else holds the
        activation, and those of a gated MLP's down projection on the up projection's output, so
        that no copy of an activation is kept for the gradients. In bfloat16 a vector's gradient
        then comes from a rounded result.

        Raises:
            InvalidTypeError: an argument is of another type.
        """
        self._adapters.use_plain_product(plain)

    def fuse_mlp(self) -> int:
        """Have gated feed-forward layers keep less for the backward pass; how many do so now.

        In each of them, act(gate(x)) ⊙ up(x) ⊙ vector becomes one operation that keeps gate and up,
        but not act(gate). Results differ in their last bits. Other layers are left alone, and those
        that are put on the model later.

        Raises:
            StateError: the model was unloaded, or another thread is calling it.
            IA3Error: none can be fused; the message names one and says why.
        """
        return self._adapters.fuse()

    def unfuse_mlp(self) -> None:
        """Undo `fuse_mlp`; a `StateError` while another thread is calling the model."""
        self._adapters.unfuse()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recompute activations in the backward pass, as the base model does it.

        Raises:
            InvalidTypeError: an argument is of another type.
        """
        if gradient_checkpointing_kwargs is not None:
            instance(CHECKPOINTING, gradient_checkpointing_kwargs, Mapping, "a mapping")
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs, **options)  # type: ignore[operator]
        self._adapters.base.checkpointing_enabled(gradient_checkpointing_kwargs)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """The newer name of `gradient_checkpointing_enable` in transformers.

        Raises:
            InvalidTypeError: an argument is of another type.
        """
        if activation_checkpointing_kwargs is not None:
            instance(CHECKPOINTING, activation_checkpointing_kwargs, Mapping, "a mapping")
        name = "activation_checkpointing_enable"
        older = self.model.gradient_checkpointing_enable
        enable: Any = getattr(self.model, name, older)
        enable(activation_checkpointing_kwargs, **options)
        self._adapters.base.checkpointing_enabled(activation_checkpointing_kwargs)

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> None:
        """Have the embeddings' output require gradients, which reentrant checkpointing needs.

        Enabling checkpointing does so by itself; `model` is ignored, it is the base model.
        """
        self._adapters.base.checkpointing_enabled(None)

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The base model's dtype; `None` where it has no such attribute."""
        return getattr(self.model, "dtype", None)

    @property
    def base_model(self) -> IA3Model:
        """This model: PEFT keeps its tuner in a wrapper's `base_model`."""
        return self

    def get_base_model(self) -> nn.Module:
        """The base model, with the adapters on it."""
        return self.model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
        offer_advice()
        tell_others(IA3Model)
        return getattr(self.model, name)

    # -- merging ----------------------------------------------------------------------------------

    def merge_adapter(
        self, adapter_names: str | Sequence[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Merge adapters into the base weights; the originals are kept for `unmerge_adapter`.

        The product is taken in float32 and rounded once to the base's dtype; bitsandbytes and
        torchao weights have their quantization constants scaled instead. Adapters may be merged on
        top of others. Copies of whole modules (`modules_to_save`) stay beside the original.

        Args:
            adapter_names: the active adapters if not given.
            safe_merge: refuse a result that is not finite.

        Raises:
            InvalidTypeError: an argument is of another type.
            UnknownNameError: there is no adapter of that name.
            StateError: adapters are disabled, a route is on, weights are spread over processes, or
                another thread is calling the model.
            IA3Error: a weight cannot take the vector exactly or is shared with a module that would
                change too, or a result is not finite. Whatever is raised, the model is unchanged.
        """
        self._adapters.merge_in(adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Put the original weights back, bit for bit.

        Raises:
            StateError: a merged weight was replaced by one of another shape since, or another
                thread is calling the model.
        """
        self._adapters.unmerge()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: str | Sequence[str] | None = None,
        *,
        dequantise: bool = False,
    ) -> nn.Module:
        """Merge adapters for good, as `merge_adapter` does, and return the plain base model.

        What is merged already stays merged. Modules in `modules_to_save` take the values of the
        active adapter's copy, or the named one's.

        Args:
            progressbar: ignored: merging is over before one could be read.
            safe_merge: refuse a result that is not finite.
            adapter_names: the active adapters if not given.
            dequantise: where a quantized weight cannot take a vector exactly, put an ordinary
                linear layer in its place.

        Raises:
            InvalidTypeError: an argument is of another type.
            UnknownNameError: there is no adapter of that name.
            StateError: a route is on, or weights are spread over processes.
            IA3Error: as of `merge_adapter`.

        Example:
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> from ia3 import IA3Config, get_peft_model
            >>> base = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2))
            >>> merged = get_peft_model(base, IA3Config()).merge_and_unload()
            >>> merged is base, [name for name in merged.state_dict() if "ia3_l" in name]
            (True, [])
        """
        with changing(), torch.inference_mode(False), self._adapters.calls.alone("merging"):
            self._adapters.merge_for_good(adapter_names, safe_merge, dequantise)
            return self.unload()

    def unload(self) -> nn.Module:
        """Take everything off, unrouted, and return the very model that was passed in.

        Raises:
            StateError: a route of the model is on, another thread is calling the model, or what is
                merged cannot be unmerged.
        """
        with changing(), self._adapters.calls.alone("unload"):
            return self._unload()

    def _unload(self) -> nn.Module:
        """As `unload`, whoever is calling the model."""
        with changing():
            if not self._adapters.unloaded:
                self._adapters.check_unrouted("unload")
                self.routes.detach()
                self._adapters.unload()
        return self.model

    # -- files ------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        *,
        adapter_name: str | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        **further: Any,
    ) -> None:
        """Write adapters' `adapter_config.json` and `adapter_model.safetensors`, atomically.

        A model card goes with them; of one that is there, what its author wrote is kept
        (`create_or_update_model_card`).

        Args:
            save_directory: made if absent. As PEFT does, the adapter `"default"` goes into the
                folder itself, others into a folder of their name inside it.
            safe_serialization: only True: pickled files can run code when they are read.
            selected_adapters: all adapters if not given.
            save_embedding_layers: whether the base model's embeddings and output layer are saved
                too; `"auto"`: where the vocabulary was resized since the model was made or loaded.
            is_main_process: False writes nothing, for all processes but one of a parallel run.
            path_initial_model_for_weight_conversion: not taken: it is of LoRA, whose initial values
                change the base model.
            adapter_name: this adapter alone, into the folder itself.
            state_dict: this model's, gathered from several processes, for the main one alone.
                Without it, vectors that FSDP 2 has spread over processes are gathered: all of these
                have to call this.
            further: ignored: what transformers' `save_pretrained` takes besides (`max_shard_size`,
                `save_function`, ...) in silence, as an adapter is one small file; others with a
                warning.

        Raises:
            InvalidTypeError: an argument is of another type.
            UnknownNameError: there is no adapter of that name.
            StateError: there is no adapter, or FSDP 1 has the vectors in pieces and there is no
                `state_dict`.
            NotAFolderError: there is a file of that name.
            IA3Error: a vector is not finite, the folder's name is malformed, or an option cannot be
                had.
            OSError: the disk is full or may not be written; what was there before stays.
        """
        warn_ignored(further, saving.IGNORED_WHEN_SAVED)
        saving.check_form(safe_serialization, path_initial_model_for_weight_conversion)
        saving.save(
            self._adapters,
            folder_of("save_directory", save_directory),
            selected_adapters,
            adapter_name,
            state_dict,
            save_embedding_layers,
            flag("is_main_process", is_main_process),
        )

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """Write a folder's model card (`README.md`), or complete the head of the one there.

        Its text stays. The head gets the library, the tags and, where it says none, the task and
        the base model's name on the hub; a folder of this machine is not named.

        Raises:
            InvalidTypeError: an argument is of another type.
            NotAFolderError: there is a file of that name.
            IA3Error: the folder's name is malformed.
            OSError: the disk is full or may not be written.
        """
        saving.write_card(self._adapters, folder_of("output_dir", output_dir))

    def adapter(self, adapter_name: str) -> Adapter:
        """An adapter as it is saved; its tensors may share the model's memory.

        Raises:
            InvalidTypeError: an argument is of another type.
            UnknownNameError: there is no adapter of that name.
            StateError: FSDP 1 has the vectors in pieces.
        """
        with LOCK:
            return saving.to_save(self._adapters, [adapter_name])[adapter_name]

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = DEFAULT_ADAPTER,
        is_trainable: bool = False,
        config: IA3Config | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        *,
        ignore_mismatched_sizes: bool = False,
        **further: Any,
    ) -> IA3Model:
        """Load an adapter, written by this library or by PEFT, onto a base model.

        Args:
            model: the base model.
            model_id: the adapter's folder, or its id on the hub.
            adapter_name: the name that it gets.
            is_trainable: its vectors require gradients. Otherwise the model is put into evaluation
                mode, as PEFT does.
            config: instead of the adapter's own.
            autocast_adapter_dtype: as in `add_adapter`.
            ephemeral_gpu_offload, low_cpu_mem_usage: ignored: vectors are small, and made once.
            key_mapping: regular expressions -> what takes their place in the adapter's names, the
                first that is found in a name. Names that transformers has changed since the adapter
                was saved are known without it.
            ignore_mismatched_sizes: leave what is of another size in the file as it begins, with a
                warning that names it, and do not raise.
            further: `revision`, `subfolder`, `token`, `cache_dir`, ... say where on the hub it is.
                What places a base model (`device_map`, `max_memory`, `offload_folder`, `dtype`,
                `torch_device`, ...) is ignored: that one stays where it is, accelerate's hooks on
                it too, and vectors go to where their modules are.

        Returns:
            The class that the adapter's task type asks for, as `get_peft_model` does.

        Raises:
            InvalidTypeError: an argument is of another type.
            UnknownNameError: it is another kind of adapter.
            StateError: the model has adapters already.
            MissingFileError: there is no adapter.
            BrokenFileError: one of its files is broken.
            NoMatchingPeftModuleError: no module is left to rescale.
            MismatchError: its values are not those of the modules.
            IA3Error: a name is malformed, or its config does not fit. Whatever is raised, the model
                is unchanged.

        Example:
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> from ia3 import IA3Config, IA3Model, get_peft_model
            >>> base = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2))
            >>> model = get_peft_model(base, IA3Config(task_type="CAUSAL_LM"))
            >>> model.save_pretrained("my-adapter")
            >>> again = IA3Model.from_pretrained(model.unload(), "my-adapter")
            >>> type(again).__name__, again.active_adapters, again.training
            ('PeftModelForCausalLM', ['default'], False)
        """
        is_trainable = flag("is_trainable", is_trainable)
        with saving.opened(model_id, config, is_trainable, key_mapping, further) as adapter:
            if flag("ignore_mismatched_sizes", ignore_mismatched_sizes):
                adapters = Adapters(model, Merge(model))
                adapter, _ = saving.without_other_sizes(adapters, adapter, adapter_name)
            self = cls.from_adapter(
                model,
                adapter,
                adapter_name,
                source=str(model_id),
                autocast_adapter_dtype=autocast_adapter_dtype,
            )
        return self if is_trainable else self.eval()

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        *,
        ignore_mismatched_sizes: bool = False,
        **further: Any,
    ) -> LoadedKeys:
        """Load a further adapter, not yet active; as `from_pretrained` otherwise.

        Under the name of one that is there, its values are loaded into that one, in place: an
        optimizer that holds its parameters goes on with them, and a call that is running in
        another thread ends with the former ones. A new one that `is_trainable` has
        gradients at once, active or not.

        Returns:
            `missing_keys` and `unexpected_keys`, as `load_state_dict` does. Only what
            `ignore_mismatched_sizes` left out is missing; anything else that does not fit raises.

        Raises:
            InvalidTypeError: an argument is of another type.
            UnknownNameError: it is another kind of adapter.
            StateError: the model was unloaded, or the adapter of this name is merged.
            MissingFileError: there is no adapter.
            BrokenFileError: one of its files is broken.
            NoMatchingPeftModuleError: no module is left to rescale.
            MismatchError: its values are not those of the modules.
            IA3Error: a name is taken or malformed, or its config does not fit. Whatever is raised,
                the model is unchanged.
        """
        check_string(adapter_name)
        missing: list[str] = []
        is_trainable = flag("is_trainable", is_trainable)
        with saving.opened(model_id, None, is_trainable, key_mapping, further) as adapter:
            if flag("ignore_mismatched_sizes", ignore_mismatched_sizes):
                adapter, missing = saving.without_other_sizes(self._adapters, adapter, adapter_name)
            with naming(str(model_id)), changing():
                if adapter_name in self.peft_config:
                    self._adapters.load_into(adapter_name, adapter)
                else:
                    self._add(adapter_name, adapter.config, adapter, autocast_adapter_dtype)
                    if is_trainable:
                        self.set_requires_grad(adapter_name)
        modules = [self, *self._adapters.contents().modules.values()]
        if not is_trainable and any(module.training for module in modules):
            self.eval()
        return LoadedKeys(missing, [])

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = None,
        tags: Sequence[str] | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes, and return the address.

        Args:
            repo_id: the repository on the hub; made, perhaps `private`, if absent. A model card
                that it has stays as it is.
            commit_message, commit_description, create_pr: of the commit.
            private: who may see a repository that is made.
            token: of the account; the one that is logged in if not given.
            revision: the branch, made if absent.
            max_shard_size: ignored: an adapter is one small file.
            tags: further ones for the model card.

        Raises:
            InvalidTypeError: an argument is of another type.
            StateError: there is no adapter.
            IA3Error: the hub has no such names, or a vector is not finite.
            OSError: the hub cannot be reached, or refuses it.
        """
        expected, tags = "a list of texts", () if tags is None else tags
        return saving.push(
            self._adapters,
            repo_id,
            [instance("a tag", tag, str, "a text") for tag in listed("tags", tags, expected)],
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            commit_description=commit_description,
        )


def _stored(config: IA3Config, vectors: Mapping[str, Tensor] | None) -> Adapter | None:
    if vectors is None:
        return None
    given = named_tensors("vectors", vectors)
    check_finite(given)
    return Adapter(config, own_names(given))


def in_order(model: Any, config: Any) -> tuple[Any, Any]:
    """A model and a config that came in either order."""
    return (config, model) if isinstance(config, nn.Module) else (model, config)


def get_peft_model(
    model: nn.Module,
    peft_config: IA3Config,
    adapter_name: str = DEFAULT_ADAPTER,
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> IA3Model:
    """Put a first adapter on a model.

    Args:
        model, peft_config, adapter_name: as for `IA3Model`.
        mixed: only False: there is one kind of adapter here.
        autocast_adapter_dtype, low_cpu_mem_usage: as in `IA3Model.add_adapter`.
        revision: the base model's revision on the hub, for the config.

    Returns:
        The `PeftModelFor…` of the config's task type, or an `IA3Model` where it has none.

    Raises:
        InvalidTypeError: an argument is of another type.
        StateError: the model has adapters already.
        NoMatchingPeftModuleError: a name in the config matches no module.
        IA3Error: the adapter's name is malformed, `mixed` is true, or the config does not fit.
            Whatever is raised, the model is unchanged.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from ia3 import IA3Config, get_peft_model
        >>> base = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2))
        >>> model = get_peft_model(base, IA3Config(task_type="CAUSAL_LM"))
        >>> model.get_nb_trainable_parameters()  # two layers of keys, values and inner activations
        (22272, 8378432)
    """
    model, peft_config = in_order(model, peft_config)
    check_config(peft_config)
    if flag("mixed", mixed):
        raise IA3Error("mixed=True: there is only one kind of adapter here")
    if revision is not None:
        peft_config = dataclasses.replace(peft_config, revision=revision)
    kind = MODEL_CLASSES.get(peft_config.task_type, IA3Model)
    return kind(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


class PeftModelForCausalLM(IA3Model, task=TaskType.CAUSAL_LM):
    """A decoder-only language model with adapters."""


class PeftModelForSeq2SeqLM(IA3Model, task=TaskType.SEQ_2_SEQ_LM):
    """An encoder-decoder language model with adapters."""


class PeftModelForSequenceClassification(IA3Model, task=TaskType.SEQ_CLS):
    """A sequence classifier with adapters; its head trains and is saved with them."""


class PeftModelForTokenClassification(IA3Model, task=TaskType.TOKEN_CLS):
    """A token classifier with adapters; its head trains and is saved with them."""


class PeftModelForQuestionAnswering(IA3Model, task=TaskType.QUESTION_ANS):
    """An extractive question answerer with adapters; its head trains and is saved with them."""


class PeftModelForFeatureExtraction(IA3Model, task=TaskType.FEATURE_EXTRACTION):
    """A model whose hidden states are wanted, with adapters."""


# PEFT's ways to find a class.
MODEL_TYPE_TO_PEFT_MODEL_MAPPING = MODEL_CLASSES
PEFT_TYPE_TO_TUNER_MAPPING = {PeftType.IA3: IA3Model}
