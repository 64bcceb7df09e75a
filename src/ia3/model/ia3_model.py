"""`IA3Model`: the adapters of one base model."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack
from weakref import WeakSet

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..adapter import store
from ..adapter.combining import CombinationType, MajoritySign, combine
from ..adapter.fingerprint import Fingerprint, fingerprint
from ..adapter.store import Adapter
from ..core.activations import device_of
from ..core.inventory import Contents, Inventory, activate
from ..core.merge import Merge
from ..core.mlp import Carriers
from ..core.names import ATTRIBUTE, Target
from ..core.route import BASE, LOCK, Names, Opening, Route, current_route, entered, watch
from ..core.saved_modules import (
    SavedModule,
    attach_saved_module,
    check_saved_modules,
    detach_saved_module,
    find_modules_to_save,
    keep_saved_module,
    load_saved_module,
    saved_module_of,
    shared_parameters,
)
from ..core.sites import Site, check_free, displace, place, site_of
from ..errors import IA3Error, did_you_mean
from ..files.atomic import check_folder, write_files
from ..files.hub import CONFIG_NAME, HubOptions, adapter_folder
from ..targets.config import IA3Config, TaskType
from ..targets.resolve import check_vectors, resolve, selection
from .fusing import fuse, is_fused, site_in, unfuse
from .gather import Rows, is_within_experts, named
from .trainers import known_to_trainer

if TYPE_CHECKING:
    from ..bank.bank import AdapterBank

# The heads that PEFT trains and saves with an adapter, by task.
HEADS = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}

# PEFT's folder for the adapter of this name is the one given, for others one inside it.
DEFAULT_ADAPTER = "default"

# The attributes of the modules that hold vectors or copies: setting one ("training") would set the
# vector, and a vector that is set ("frozen") would be the attribute.
TAKEN = {
    *dir(nn.Module()),
    *("site_state", "side", "activation", "frozen", "banked", "merged", "in_block"),
    *("must_be_hook", "_handles", "_settled", "active"),
}


@known_to_trainer
class IA3Model(nn.Module):
    """A base model with (IA)³ adapters on it (paper section 3.3).

    No module is wrapped or replaced: the base model's own modules get a hook or a forward each, and
    `unload` gives back the very model that was passed in. The base's parameters are frozen while
    adapters are on it, and keep their names. Attributes that are not this class's own come from the
    base model.

    Args:
        model: the base model; any module with linear layers.
        config: what to rescale, or a mapping that has it under the adapter's name. Model and config
            may also come in the other order.
        adapter_name: the first adapter's name, active at once.
        vectors: its vectors, as in `add_adapter`; ones where not given.

    Raises:
        IA3Error: the config or the vectors do not fit the model, which is then unchanged.
    """

    # The Trainer trains a quantized model only if it has adapters, and asks for this.
    _hf_peft_config_loaded = True

    # The task of a subclass, whose head trains and is saved with the adapters.
    task: TaskType | None = None

    model: nn.Module
    peft_config: dict[str, IA3Config]
    _active: tuple[str, ...]
    _enabled: bool
    _unloaded: bool
    _merge: Merge
    _inventory: Inventory
    _fused: list[str]
    _trained_before: list[str]
    _ignored_before: set[str] | list[str] | None
    _hidden: set[str]
    _requires_input_grads: bool
    _plain: bool
    _rows: Rows
    _routes: _Routing

    def __init__(
        self,
        model: nn.Module,
        config: IA3Config | Mapping[str, IA3Config],
        adapter_name: str = DEFAULT_ADAPTER,
        vectors: Mapping[str, Tensor] | None = None,
    ) -> None:
        if isinstance(config, nn.Module):
            model, config = config, model
        if isinstance(config, Mapping):
            config = config[adapter_name]
        if config.task_type is None and self.task is not None:
            config = dataclasses.replace(config, task_type=self.task)
        super().__init__()
        self._begin(model)
        self._add(adapter_name, config, None if vectors is None else Adapter(config, dict(vectors)))
        self._freeze_base()
        self.set_adapter(adapter_name, inference_mode=config.inference_mode)

    # -- adapters ---------------------------------------------------------------------------------

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: IA3Config,
        vectors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter, not yet active: its vectors do not require gradients until it is.

        Args:
            adapter_name: a name without dots or slashes, new to this model.
            peft_config: what it rescales.
            vectors: module name -> vector (`Activation.shape`: `[dim, 1]` on a linear layer's
                output, `[1, dim]` on its input), any floating dtype. Ones if not given, as
                `init_ia3_weights` says. With vectors, entries of the config's lists may match
                nothing.

        Raises:
            IA3Error: the name is taken or malformed, the config or the vectors do not fit the
                model; the model is then unchanged.
        """
        stored = None if vectors is None else Adapter(peft_config, dict(vectors))
        self._add(adapter_name, peft_config, stored)

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
        """Add an adapter that combines others; by default the weighted sums, as PEFT computes them.

        The new one is not active.

        Args:
            adapters: the names of those to combine.
            weights: one for each.
            adapter_name: the new name.
            combination_type: `"linear"`, `"average"`, `"geometric_mean"`, `"task_arithmetic"` or
                `"ties"`: see `ia3.combining.combine`.
            density: for `"ties"`, the share of each adapter's values that is kept.
            majority_sign_method: for `"ties"`, `"total"` or `"frequency"`.

        Raises:
            IA3Error: the names, weights or options do not fit, or two of the adapters have a copy
                of the same module (`modules_to_save`).
        """
        self._check_known(adapters)
        stored = []
        for adapter in adapters:
            having = [(name, site) for name, _, site in self._sites() if adapter in site]
            vectors = {name: site.vector(adapter).detach() for name, site in having}
            frozen = {name: site.frozen.get(adapter, ()) for name, site in having}
            config = self.peft_config[adapter]
            copies = self._copied_values(adapter)
            stored.append((adapter, Adapter(config, vectors, copies, frozen)))
        combined = combine(stored, weights, combination_type, density, majority_sign_method)
        self._add(adapter_name, combined.config, combined)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If no other is active then, the first that is left becomes so."""
        with self._unrouted("delete_adapter"):
            self._check_known([adapter_name])
            if adapter_name in self._merge.adapters:
                raise IA3Error(f"adapter {adapter_name!r} is merged: unmerge_adapter() first")
            # Before its vectors go: calls of other threads ask for those of the active ones.
            remaining = tuple(name for name in self._active if name != adapter_name)
            first = next((name for name in self.peft_config if name != adapter_name), None)
            if self._active and not remaining and first is not None:
                warnings.warn(
                    f"adapter {adapter_name!r} was active; {first!r} is active now", stacklevel=2
                )
                self._switch((first,), inference_mode=False, leaving=adapter_name)
            else:
                self._activate(remaining)
            hidden = self._keys(adapter_name, self._found())
            self._take_off(adapter_name)
            del self.peft_config[adapter_name]
            self._show_to_checkpoints(hidden)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones; several multiply. Only they require gradients.

        Args:
            adapter_name: one name, or several.
            inference_mode: they do not require gradients either.

        Raises:
            IA3Error: a name is unknown, or two of them have a copy of one module
                (`modules_to_save`).
        """
        with LOCK:
            self._switch(self._named(adapter_name), inference_mode)

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters."""
        return list(self._active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, or the names if there are several."""
        return self._active[0] if len(self._active) == 1 else list(self._active)

    @property
    def active_peft_config(self) -> IA3Config:
        """The (first) active adapter's config."""
        return self.peft_config[self._active[0]]

    def disable_adapter_layers(self) -> None:
        """Compute as the base model does, until `enable_adapter_layers`.

        Merged adapters are unmerged, and stay so.
        """
        with self._unrouted("disabling adapters (rows of the base model are named '__base__')"):
            self.unmerge_adapter()
            self._enabled = False
            self._activate()

    def enable_adapter_layers(self) -> None:
        """Undo `disable_adapter_layers`."""
        self._enabled = True
        self._activate()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the context the model computes as the base model does.

        Merged adapters are unmerged, and stay so.
        """
        enabled = self._enabled
        self.disable_adapter_layers()
        try:
            yield
        finally:
            self._enabled = enabled
            self._activate()

    def vectors(self, adapter_name: str) -> dict[str, Tensor]:
        """Module name -> the vector that trains, of `Activation.shape`."""
        self._check_known([adapter_name])
        return {name: site[adapter_name] for name, _, site in self._sites() if adapter_name in site}

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(values that require gradients, all values)."""
        sizes = [(value_count(p), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Print both numbers and their ratio, in PEFT's words."""
        trained, total = self.get_nb_trainable_parameters()
        share = 100 * trained / total
        print(
            f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {share:.4f}"
        )

    # -- computing --------------------------------------------------------------------------------

    def use_plain_product(self, plain: bool = True) -> None:
        """Rescale by activation ⊙ vector at the very module, as PEFT does, or where it costs least.

        By default vectors are applied in place where nobody else holds the activation, and those of
        a gated MLP's down projection on the up projection's output, where a probe has shown that
        it is the same. That keeps no copy of an activation for the gradients. It rounds elsewhere:
        in bfloat16 a vector's gradient comes from a rounded result.

        Args:
            plain: false to go back.
        """
        self._plain = plain
        for _, _, site in self._sites():
            site.site_state.in_place = not plain

    def forward(self, *args: Any, adapter_names: Names | None = None, **kwargs: Any) -> Any:
        """The base model's forward, with the active adapters.

        Args:
            adapter_names: instead of these, one name a row of the batch, or lists with one a
                token, as for `route`.

        Raises:
            IA3Error: as `route`; or there are not as many names as the input has rows or tokens.
        """
        if adapter_names is None:
            return self.model(*args, **kwargs)
        return self._forward_routed(adapter_names, args, kwargs)

    # A compiler knows no thread's route.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _forward_routed(
        self, adapter_names: Names, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        route = self._route(adapter_names)
        route.check(args, kwargs)
        with entered(route):
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Names | None = None, **kwargs: Any) -> Any:
        """The base model's `generate`, with the active adapters.

        Args:
            adapter_names: instead of these, one name a row of the input. Beams and returned
                sequences of a row have its name. Their values are gathered once, for all steps.

        Raises:
            IA3Error: as `route`; or there are not as many names as the input has rows.
        """
        generate: Any = self.model.generate
        route = current_route(self) if adapter_names is None else self._route(adapter_names)
        if route is None:
            return generate(*args, **kwargs)
        if route.by_token:
            raise IA3Error(
                "generate cannot be routed by tokens, those to come have no names: give one name "
                "a row"
            )
        route.check(args, kwargs)
        given = next((c for c in (*args[1:2], kwargs.get("generation_config")) if c), None)
        configs = (given, self.model.generation_config)
        times = [
            next((t for t in (kwargs.get(name), *(getattr(c, name, 0) for c in configs)) if t), 1)
            for name in ("num_beams", "num_return_sequences")
        ]
        # A compiled step would break at every site.
        if given is None:
            kwargs.setdefault("disable_compile", True)
        else:
            given = copy.deepcopy(given)
            given.disable_compile = True
            args, kwargs = args[:1], {**kwargs, "generation_config": given}
        with entered(route.repeated({1, max(times)})):
            return generate(*args, **kwargs)

    @contextmanager
    def route(self, names: Names, token_index: Tensor | None = None) -> Iterator[None]:
        """Within the context each row of a batch has an adapter of its own.

        The route belongs to the thread or task that enters it, and to what is called in it: what
        gradient checkpointing computes again has the same one, wherever the backward pass runs.
        Vectors that require gradients get those of their rows. The values of other adapters are
        gathered when the context is entered; `vector.data` must not be written to meanwhile, which
        leaves no trace. The batch is the first axis of all activations: a model that has the
        sequence there is not noticed where both are equal. A thread that is started within does not
        inherit the route, and a generator must not yield within it.

        Args:
            names: of this model's adapters, one a row, `"__base__"` for the base model's own
                output. Or, for packed sequences, lists with one a token.
            token_index: `[batch, seq]`, int64: the tokens' names, as places in `names`.

        Raises:
            IA3Error: a name is unknown, or its adapter has copies of modules (`modules_to_save`)
                or rescales experts; adapters are merged or disabled; or, in a call, the batch has
                not as many rows or tokens as were named.
        """
        with entered(self._route(names, token_index)):
            yield

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recompute activations in the backward pass, as the base model does it.

        Reentrant checkpointing gives gradients only where a block's input requires them, and
        nothing before the first site does, so that the embeddings' output is made to.
        """
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs, **options)  # type: ignore[operator]
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant", True):
            self._require_input_grads()

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """The newer name of `gradient_checkpointing_enable` in transformers."""
        self.model.activation_checkpointing_enable(activation_checkpointing_kwargs, **options)  # type: ignore[operator]
        if (activation_checkpointing_kwargs or {}).get("use_reentrant", True):
            self._require_input_grads()

    def fuse_mlp(self) -> int:
        """Have gated feed-forward layers keep less for the backward pass.

        In each of them, act(gate(x)) ⊙ up(x) ⊙ vector becomes one operation (`gated_product`) that
        keeps gate and up, where the layer's own forward keeps act(gate) as well. Results differ in
        their last bits. Layers that compute anything else are left alone, and so are those that
        are put on the model later. No other thread may be calling the model.

        Returns:
            How many layers are fused now.

        Raises:
            IA3Error: none can be; the message names one and says why.
        """
        if self._unloaded:
            raise IA3Error("this model was unloaded: make a new one")
        with LOCK:
            self._fused = fuse(self.model)
            self._activate()
            return len(self._fused)

    def unfuse_mlp(self) -> None:
        """Undo `fuse_mlp`; no other thread may be calling the model."""
        with LOCK:
            if self._fused:
                self._fused = []
                unfuse(self.model)
                self._activate()

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
            return getattr(super().__getattr__("model"), name)

    # -- bank -------------------------------------------------------------------------------------

    @classmethod
    def without_adapters(cls, model: nn.Module) -> IA3Model:
        """A base model with no adapter yet, its parameters frozen."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._begin(model)
        self._freeze_base()
        return self

    @property
    def bank(self) -> AdapterBank | None:
        """The bank whose adapters can be named beside this model's."""
        return self._routes.bank

    def attach_bank(self, bank: AdapterBank) -> None:
        """Have a bank's adapters known; `AdapterBank` calls it.

        Raises:
            IA3Error: there is one already, or the model was unloaded.
        """
        if self._unloaded:
            raise IA3Error("this model was unloaded: make a new one")
        if self.bank is not None:
            raise IA3Error("the model has a bank already: close() that first")
        self._routes.bank = bank

    def detach_bank(self) -> None:
        """Undo `attach_bank`."""
        with self._unrouted("detaching the bank"):
            self._routes.bank = None
            for _, module, site in self._sites():
                site.banked = False
                if not site._parameters:
                    displace(module)

    def sites_for_bank(self, adapter_name: str, adapter: Adapter) -> dict[str, Site]:
        """Module name -> the site for each vector of a bank's adapter, placed now if it is new.

        Raises:
            IA3Error: the adapter does not fit the model, or cannot be mixed with others; the model
                is then unchanged.
        """
        config = adapter.config
        if adapter.copies or _with_head(self.model, config):
            raise IA3Error(
                f"adapter {adapter_name!r} has copies of modules (modules_to_save), which all rows "
                "of a batch would go through: it cannot be in a bank"
            )
        found = self._found()
        _, targets = self._fitting(config, adapter, found)
        inner = next((t.name for t in targets if is_within_experts(t.name, t.side)), None)
        if inner is not None:
            raise IA3Error(
                f"adapter {adapter_name!r} rescales within the experts {inner!r}, whose tokens are "
                "no longer in the order of the batch: it cannot be in a bank"
            )
        self._warn_of_other_base(adapter_name, adapter)
        carriers = Carriers(self.model)
        sites = {}
        with LOCK:
            for target in targets:
                site = place(found.modules[target.name], target, carriers)
                site.site_state.in_place = not self._plain
                site.banked = True
                sites[target.name] = site
            # Fused layers have to know the site that is theirs.
            self._activate()
        return sites

    # -- merging ----------------------------------------------------------------------------------

    def merge_adapter(
        self, adapter_names: str | Sequence[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Fold adapters into the base weights; the originals are kept for `unmerge_adapter`.

        The product is taken in float32 and rounded once to the base's dtype; bitsandbytes and
        torchao weights have their quantization constants scaled instead. Adapters may be merged on
        top of others. SavedModule of whole modules (`modules_to_save`) stay beside the original.

        Args:
            adapter_names: the active adapters if not given.
            safe_merge: refuse a result that is not finite.

        Raises:
            IA3Error: adapters are disabled, a weight cannot take the vector exactly, it is shared
                with a module that would change with it, or (with `safe_merge`) a merged weight is
                not finite; the model is then unchanged.
        """
        if not self._enabled:
            raise IA3Error("adapters are disabled: enable_adapter_layers() before merging them")
        self._make_merged(self._named(adapter_names), safe_merge)

    def unmerge_adapter(self) -> None:
        """Put the original weights back, bit for bit."""
        self._merge.undo()
        self._activate()

    def merge_and_unload(
        self,
        safe_merge: bool = False,
        adapter_names: str | Sequence[str] | None = None,
        dequantise: bool = False,
        progressbar: bool = False,
    ) -> nn.Module:
        """Fold the adapters into the base weights for good and return the plain base model.

        What is merged already stays merged; the result computes what the model computes now, and
        the adapters named, if any. Modules in `modules_to_save` take the values of the
        active adapter's copy, or the named one's.

        Args:
            safe_merge: refuse a result that is not finite.
            adapter_names: the active adapters if not given.
            dequantise: where a quantized weight cannot take a vector exactly, put an ordinary
                linear layer in its place.
            progressbar: taken for PEFT's sake; merging is over before one could be read.

        Raises:
            IA3Error: as `merge_adapter`.
        """
        merged = self._merge.adapters
        names = self._named(adapter_names)
        # What is merged takes the place of what is active, or is part of it.
        replaces = adapter_names is None and not merged <= set(names)
        names = tuple(merged) if replaces else tuple(dict.fromkeys([*names, *merged]))
        self._check_one_copy(names)
        replaced = self._merge.dequantise(names) if dequantise else {}
        try:
            if set(names) - self._merge.adapters:
                self._make_merged(names, safe_merge)
        except BaseException:
            self._merge.requantise(replaced)
            raise
        shared = shared_parameters(self.model)
        for _, module, copies in self._copies():
            for name in set(names).intersection(copies.adapters):
                keep_saved_module(module, name, shared)
        self._merge.keep()
        model = self.unload()
        _untie(model)
        return model

    def unload(self) -> nn.Module:
        """Take everything off and return the very model that was passed in, bit for bit.

        This object is of no further use; a second call changes nothing.
        """
        if self._unloaded:
            return self.model
        with self._unrouted("unload"):
            if self.bank is not None:
                self.detach_bank()
            self._unloaded = True
            self.unfuse_mlp()
            self.unmerge_adapter()
            watch(self.model, False)
            for _, module, _ in self._sites():
                displace(module)
            for _, module, _ in self._copies():
                detach_saved_module(module)
        parameters = dict(self.model.named_parameters())
        for name in self._trained_before:
            # Somebody may have put another module in its place.
            if name in parameters:
                parameters[name].requires_grad_(True)
        if self._requires_input_grads:
            self.model.disable_input_require_grads()  # type: ignore[operator]
            self._requires_input_grads = False
        self.peft_config.clear()
        self._active = ()
        # It holds every module, also those that the model may part with later.
        self._inventory = Inventory(self.model)
        self._show_to_checkpoints(set())
        return self.model

    # -- files ------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        *,
        adapter_name: str | None = None,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        save_embedding_layers: bool | str = "auto",
    ) -> None:
        """Write adapters' `adapter_config.json` and `adapter_model.safetensors`, atomically.

        As PEFT does, the adapter `"default"` goes into the folder itself, others into a folder of
        their name inside it.

        Args:
            save_directory: made if absent; files of these names in it are replaced.
            safe_serialization: only True: pickled files can run code when they are read.
            selected_adapters: all adapters if not given.
            adapter_name: this adapter alone, into the folder itself.
            is_main_process: False writes nothing, for all processes but one of a parallel run.
            state_dict: this model's, where its values had to be gathered from several processes.
            save_embedding_layers: not True: name the embeddings in `modules_to_save` instead.

        Raises:
            OSError: the disk is full or may not be written; what was there before stays.
        """
        if save_embedding_layers is True:
            raise IA3Error(
                "save_embedding_layers=True: embeddings are saved where they are trained, by "
                "naming them in modules_to_save"
            )
        if safe_serialization is not True:
            raise IA3Error(
                f"safe_serialization is {safe_serialization!r}, expected True: a pickle could run "
                "code when it is read, so that only safetensors files are written"
            )
        if adapter_name is not None:
            folders = {adapter_name: Path(save_directory)}
        else:
            names = list(self.peft_config) if selected_adapters is None else selected_adapters
            folders = {
                name: Path(save_directory) / ("" if name == DEFAULT_ADAPTER else name)
                for name in names
            }
        self._check_known(list(folders))
        if not folders:
            raise IA3Error("there is no adapter to save")
        if is_main_process:
            gathered = {} if state_dict is None else state_dict
            base = self._fingerprint()
            files = {
                name: store.adapter_files(self._with(gathered, name, base)) for name in folders
            }
            for folder in folders.values():
                check_folder(folder)
            for name, folder in folders.items():
                write_files(folder, files[name])

    def adapter(self, adapter_name: str) -> Adapter:
        """An adapter as it is saved: its config, its vectors and copies, and what its base is."""
        self._check_known([adapter_name])
        return self._adapter(adapter_name, self._fingerprint())

    def _fingerprint(self) -> Fingerprint:
        return fingerprint(self.model, self._merged_modules())

    def _merged_modules(self) -> set[str]:
        """The modules whose weights have an adapter merged into them."""
        return {name for name, _, site in self._sites() if site.merged}

    def _adapter(self, adapter_name: str, base: Fingerprint) -> Adapter:
        config = dataclasses.replace(self.peft_config[adapter_name], inference_mode=True)
        if config.task_type is None and config.auto_mapping is None:
            base_class = type(self.model)
            config.auto_mapping = {
                "base_model_class": base_class.__name__,
                "parent_library": base_class.__module__,
            }
        having = [(name, site) for name, _, site in self._sites() if adapter_name in site]
        return Adapter(
            config,
            {name: site.vector(adapter_name).detach() for name, site in having},
            self._copied_values(adapter_name),
            {
                name: site.frozen[adapter_name]
                for name, site in having
                if adapter_name in site.frozen
            },
            base,
        )

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = DEFAULT_ADAPTER,
        is_trainable: bool = False,
        config: IA3Config | None = None,
        *,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        torch_device: str | None = None,
        **hub: Unpack[HubOptions],
    ) -> IA3Model:
        """Load an adapter, written by this library or by PEFT, onto a base model.

        Args:
            model: the base model.
            model_id: the adapter's folder, or its id on the hub.
            adapter_name: the name it gets.
            is_trainable: its vectors require gradients. Otherwise the model is put into evaluation
                mode, as PEFT does.
            config: instead of the adapter's own.
            autocast_adapter_dtype, low_cpu_mem_usage, torch_device: taken for PEFT's sake; vectors
                are always float32, made once, and go to where their modules are.
            hub: `revision`, `subfolder`, `token`, `cache_dir`, ...

        Returns:
            The class that the adapter's task type asks for, as `get_peft_model` does.

        Raises:
            FileNotFoundError: there is no adapter.
            IA3Error: its files are broken or do not fit the model, which is then unchanged.
        """
        adapter = _read_adapter(model_id, config, is_trainable, **hub)
        self = cls.from_adapter(model, adapter, adapter_name, source=str(model_id))
        return self if is_trainable else self.eval()

    @classmethod
    def from_adapter(
        cls,
        model: nn.Module,
        adapter: Adapter,
        adapter_name: str = DEFAULT_ADAPTER,
        *,
        source: str = "adapter",
    ) -> IA3Model:
        """Put an adapter that has been read onto a base model; raises as `from_pretrained`."""
        if cls is IA3Model:
            cls = model_class(adapter.config)
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._begin(model)
        with _naming(source):
            self._add(adapter_name, adapter.config, adapter)
        self._freeze_base()
        self.set_adapter(adapter_name, inference_mode=adapter.config.inference_mode)
        return self

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        *,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        torch_device: str | None = None,
        **hub: Unpack[HubOptions],
    ) -> None:
        """Load a further adapter, not yet active; raises as `from_pretrained` does.

        Under the name of one that is there, its values are loaded into that one, in place: an
        optimizer that holds its parameters goes on with them.
        """
        adapter = _read_adapter(model_id, None, is_trainable, **hub)
        with _naming(str(model_id)):
            if adapter_name in self.peft_config:
                self._load_into(adapter_name, adapter)
            else:
                self._add(adapter_name, adapter.config, adapter, copy=False)
        if not is_trainable and (
            self.training or any(map(attrgetter("training"), self._found().modules.values()))
        ):
            self.eval()

    def push_to_hub(
        self,
        repo_id: str,
        *,
        adapter_name: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload (IA)³ adapter",
        create_pr: bool = False,
    ) -> str:
        """Upload what `save_pretrained` writes, with a model card, and return the address.

        Args:
            repo_id: the repository on the hub, made if absent.
            adapter_name: this adapter alone; all if not given.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, adapter_name=adapter_name)
            names = [adapter_name] if adapter_name else list(self.peft_config)
            if not api.file_exists(repo.repo_id, "README.md", revision=revision):
                base = self.peft_config[names[0]].base_model_name_or_path
                # A folder of this machine means nothing on the hub.
                known = [f"base_model: {base}"] if base and not Path(base).exists() else []
                card = ["---", *known, "library_name: peft", "tags:", "- ia3", "---", ""]
                write_files(folder, {"README.md": "\n".join(card).encode()})
            commit = api.upload_folder(
                repo_id=repo.repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
            )
        return str(commit)

    # -- private ----------------------------------------------------------------------------------

    def _begin(self, model: nn.Module) -> None:
        taken = next(
            (name for name, module in model.named_modules() if ATTRIBUTE in module._modules), None
        )
        if taken is not None:
            raise IA3Error(
                f"{type(model).__name__} has adapters already (at {taken!r}): use add_adapter on "
                "its IA3Model, or unload() that first"
            )
        self.peft_config = {}
        self._active = ()
        self._enabled = True
        self._unloaded = False
        self._merge = Merge(model)
        self._inventory = Inventory(model)
        self._fused = []
        self._requires_input_grads = False
        self._plain = False
        self._rows = Rows()
        self._routes = _Routing()
        self.model = model
        self._trained_before = [name for name, p in model.named_parameters() if p.requires_grad]
        self._ignored_before = getattr(model, "_keys_to_ignore_on_save", None)
        self._hidden = set(self._ignored_before or ())

    def _freeze_base(self) -> None:
        for name in self._trained_before:
            self.model.get_parameter(name).requires_grad_(False)
        if any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules()):
            self._require_input_grads()

    def _require_input_grads(self) -> None:
        if hasattr(self.model, "enable_input_require_grads") and not self._requires_input_grads:
            self.model.enable_input_require_grads()  # type: ignore[operator]
            self._requires_input_grads = True

    def _add(
        self, adapter_name: str, config: IA3Config, stored: Adapter | None, *, copy: bool = True
    ) -> None:
        """Add an adapter, its values from `stored` or new; all checks come before any change.

        Without `copy` the stored vectors are the caller's to give away.
        """
        # The bank's lock is never asked for while the other is held.
        if self.bank is not None and adapter_name in self.bank:
            raise IA3Error(
                f"the model's bank has an adapter {adapter_name!r} already: remove it or choose "
                "another"
            )
        with LOCK:
            if self._unloaded:
                raise IA3Error("this model was unloaded: make a new one")
            if adapter_name in self.peft_config:
                raise IA3Error(
                    f"adapter {adapter_name!r} exists already: delete it or choose another"
                )
            check_name(adapter_name)
            config = dataclasses.replace(config, modules_to_save=_with_head(self.model, config))
            found = self._found()
            resolved, targets = self._fitting(config, stored, found)
            saved = find_modules_to_save(
                self.model, resolved.modules_to_save, strict=stored is None
            )
            self._check_can_be_copied(saved)
            if stored is not None:
                check_saved_modules(stored.copies, saved, self.model)
                self._warn_of_other_base(adapter_name, stored)
            try:
                self._put_on(adapter_name, resolved, stored, found, targets, saved, copy=copy)
                self.peft_config[adapter_name] = resolved
                ranges = {target.name: target.frozen for target in targets}
                found = self._found()
                kept = found.targets
                if len(kept) >= len(self.peft_config):  # of adapters that are gone
                    kept.clear()
                kept[selection(resolved, ranges)] = targets
                self._hide_from_checkpoints(self._keys(adapter_name, found))
            except BaseException:
                # Memory may have run out, or somebody has interrupted.
                self.peft_config.pop(adapter_name, None)
                self._take_off(adapter_name)
                raise

    def _put_on(
        self,
        adapter_name: str,
        config: IA3Config,
        stored: Adapter | None,
        found: Contents,
        targets: Sequence[Target],
        saved: Sequence[str],
        *,
        copy: bool,
    ) -> None:
        """Give the modules their vectors and copies of an adapter, which fits."""
        carriers = Carriers(self.model)
        for target in targets:
            module = found.modules[target.name]
            device = device_of(module)
            shape = target.activation.shape
            if stored is not None:
                vector = stored.vectors[target.name]
                # A model on the meta device has no values to lose; the adapter has.
                values_on = torch.device("cpu") if device.type == "meta" else device
                if copy or vector.device != values_on or vector.dtype is not torch.float32:
                    vector = vector.to(values_on, torch.float32, copy=copy)
            elif config.init_ia3_weights:
                vector = torch.ones(shape, device=device)
            else:
                vector = torch.randn(shape, device=device)
            site = place(module, target, carriers)
            site.site_state.in_place = not self._plain
            site.add(adapter_name, vector, target.frozen)
        for name in saved:
            module = self.model.get_submodule(name)
            copies = attach_saved_module(module)
            copies.add(adapter_name, module)
            if stored is not None:
                load_saved_module(copies[adapter_name], name, stored.copies)

    def _take_off(self, adapter_name: str) -> None:
        """Take away what the modules have of an adapter, and what is of no use without it."""
        # The next one of this name may get the same memory.
        self._rows.forget()
        for _, module, site in self._sites():
            site.remove(adapter_name)
            if not site._parameters and not site.banked:
                displace(module)
        for _, module, copies in self._copies():
            if adapter_name in copies:
                copies.remove(adapter_name)
            if not copies.adapters:
                detach_saved_module(module)

    def _fitting(
        self, config: IA3Config, stored: Adapter | None, found: Contents
    ) -> tuple[IA3Config, list[Target]]:
        """What a config, or a stored adapter, rescales here; nothing is changed.

        Raises:
            IA3Error: it does not fit the model, or not the other adapters on it.
        """
        known = frozen = None
        if stored is not None:
            frozen = stored.frozen
            known = found.targets.get(selection(config, frozen))
        resolved, targets = resolve(self.model, config, frozen, found.modules, known)
        if targets is not known:  # those have sites, and were checked when they got them
            for target in targets:
                check_free(found.modules[target.name], target)
                if found.copies:
                    self._check_outside_copies(target.name)
        if stored is not None:
            check_vectors(stored.vectors, targets, type(self.model).__name__)
        return resolved, targets

    def _warn_of_other_base(self, adapter_name: str, stored: Adapter) -> None:
        difference = (
            stored.base.difference(self.model, self._merged_modules()) if stored.base else None
        )
        if difference is not None:
            warnings.warn(
                f"this may be the wrong base model for adapter {adapter_name!r}: {difference}",
                stacklevel=5,
            )

    def _with(
        self, state_dict: Mapping[str, Tensor], adapter_name: str, base: Fingerprint
    ) -> Adapter:
        """An adapter with the values that a gathered state dict has for it."""
        adapter = self._adapter(adapter_name, base)
        end = f"{ATTRIBUTE}.{adapter_name}"
        for name, vector in adapter.vectors.items():
            adapter.vectors[name] = state_dict.get(f"model.{name}.{end}", vector)
        for name, _, copies in self._copies():
            for key in copies[adapter_name].state_dict() if adapter_name in copies else ():
                value = adapter.copies[f"{name}.{key}"]
                adapter.copies[f"{name}.{key}"] = state_dict.get(f"model.{name}.{end}.{key}", value)
        return adapter

    def _load_into(self, adapter_name: str, stored: Adapter) -> None:
        if adapter_name in self._merge.adapters:
            raise IA3Error(f"adapter {adapter_name!r} is merged: unmerge_adapter() first")
        having = [(name, site) for name, _, site in self._sites() if adapter_name in site]
        held = [(name, copies) for name, _, copies in self._copies() if adapter_name in copies]
        kind = type(self.model).__name__
        check_vectors(stored.vectors, [site.target(name) for name, site in having], kind)
        check_saved_modules(stored.copies, [name for name, _ in held], self.model)
        for name, site in having:
            here, there = site.frozen.get(adapter_name, ()), stored.frozen.get(name, ())
            if here != there:
                raise IA3Error(
                    f"the adapter does not fit {adapter_name!r}: other values of its vectors stay "
                    f"one: of {name!r} {list(there)}, expected {list(here)}"
                )
        with torch.no_grad():
            for name, site in having:
                site[adapter_name].copy_(stored.vectors[name])
        for name, copies in held:
            load_saved_module(copies[adapter_name], name, stored.copies)

    def _route(self, names: Names, token_index: Tensor | None = None) -> Route:
        if self._unloaded:
            raise IA3Error("this model was unloaded: make a new one")
        if not self._enabled:
            raise IA3Error("adapters are disabled: enable_adapter_layers() before routing")
        different, index = named(names, token_index)
        bank = self.bank
        for name in different:
            if name != BASE and name not in self.peft_config and (bank is None or name not in bank):
                where = "" if bank is None else f" nor in its bank of {len(bank)}"
                known = [*self.peft_config, *(bank.names() if bank is not None else ())]
                raise IA3Error(
                    f"no adapter {name!r} on this model, which has {sorted(self.peft_config)},"
                    f"{where}; {BASE!r} is the base model{did_you_mean(name, known)}"
                )
        if index.dim() == 2 and getattr(
            getattr(self.model, "config", None), "is_encoder_decoder", False
        ):
            raise IA3Error(
                f"{type(self.model).__name__} has an encoder and a decoder, whose tokens are not "
                "the same: give one name a row"
            )
        return self._rows.route(self, self._found, self.peft_config, bank, different, index)

    def _open(self, route: Route, opening: Opening) -> None:
        """Have the hooks there that ask for a route; until `_close` nothing takes them away."""
        with LOCK:
            found = self._found()
            if self._merge.adapters:
                raise IA3Error(
                    f"adapters {sorted(self._merge.adapters)} are merged, in all rows: "
                    "unmerge_adapter() before routing"
                )
            for name, _, copies in found.copies:
                if copies.active is not None:
                    raise IA3Error(
                        f"adapter {copies.active!r} is active, whose copy of {name!r} "
                        "(modules_to_save) all rows would go through: set_adapter() to another "
                        "before routing"
                    )
            lost = route.sites.keys() - {site for _, _, site in found.sites}
            if any(route.values(site) is not None for site in lost):
                raise IA3Error("the model that was routed has lost adapters since")
            self._routes.open.add(opening)
            watch(self.model, True)
            if not all(state.routed for state in found.states):
                self._activate()

    def _close(self, opening: Opening) -> None:
        with LOCK:
            self._routes.open.discard(opening)

    def _owns(self, site: Site) -> bool:
        return any(site is each for _, _, each in self._sites())

    @contextmanager
    def _unrouted(self, what: str) -> Iterator[None]:
        """Nobody enters a route of this model within the context."""
        with LOCK:
            if self._routes.open:
                raise IA3Error(f"{what}: a route of this model is on, leave it first")
            yield

    def _named(self, adapter_names: str | Sequence[str] | None) -> tuple[str, ...]:
        """The adapters of these names; the active ones for `None`."""
        if isinstance(adapter_names, str):
            adapter_names = (adapter_names,)
        names = tuple(dict.fromkeys(self._active if adapter_names is None else adapter_names))
        self._check_known(names)
        return names

    def _check_one_copy(self, names: Sequence[str]) -> None:
        for name, _, copies in self._copies():
            having = sorted(set(names).intersection(copies.adapters))
            if len(having) > 1:
                raise IA3Error(
                    f"adapters {having} each have a copy of {name!r} (modules_to_save): only one "
                    "of them can be active"
                )

    def _make_merged(self, names: tuple[str, ...], safe: bool) -> None:
        with self._unrouted("merging"):
            already = self._merge.adapters
            if already and not set(names) - already:
                warnings.warn(f"adapters {sorted(already)} are merged already", stacklevel=3)
                return
            # In the order in which they would multiply, unmerged.
            order = dict.fromkeys([*self._active, *self.peft_config])
            self._merge.make(tuple(name for name in order if name in already.union(names)), safe)
            self._activate()

    def _check_can_be_copied(self, saved: Sequence[str]) -> None:
        for name in saved:
            self._check_outside_copies(name)
            module = self.model.get_submodule(name)
            for part_name, part in module.named_modules(prefix=name):
                if site_of(part) is not None or (part is not module and saved_module_of(part)):
                    raise IA3Error(
                        f"modules_to_save: another adapter on this model has vectors or a copy in "
                        f"{part_name!r}, which is part of {name!r}"
                    )
                if is_fused(part):
                    raise IA3Error(
                        f"modules_to_save: {part_name!r} in {name!r} is fused: unfuse_mlp() first"
                    )

    def _check_outside_copies(self, name: str) -> None:
        parts = name.split(".")
        for end in range(1, len(parts)):
            around = ".".join(parts[:end])
            if saved_module_of(self.model.get_submodule(around)) is not None:
                raise IA3Error(
                    f"module {name!r} is part of {around!r}, which another adapter on this model "
                    "has in its modules_to_save"
                )

    def _sites(self) -> list[tuple[str, nn.Module, Site]]:
        return self._found().sites

    def _copies(self) -> list[tuple[str, nn.Module, SavedModule]]:
        return self._found().copies

    def _found(self) -> Contents:
        if self._inventory.model is not self.model:
            self._inventory = Inventory(self.model)
        return self._inventory.now()

    def _copied_values(self, adapter: str) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": value
            for name, _, copies in self._copies()
            if adapter in copies
            for key, value in copies[adapter].state_dict().items()
        }

    def _switch(
        self, names: tuple[str, ...], inference_mode: bool, leaving: str | None = None
    ) -> None:
        """`set_adapter`, under the lock.

        Args:
            leaving: an adapter about to be deleted, which a backward pass may be to come for.
        """
        found = self._found()
        if found.copies:
            self._check_one_copy(names)
        if self._merge.adapters:
            warnings.warn("adapters are merged; they are unmerged first", stacklevel=3)
            self.unmerge_adapter()
            found = self._found()
        with ExitStack() as alone:
            if any(name in copies for name in names for _, _, copies in found.copies):
                alone.enter_context(
                    self._unrouted("set_adapter of an adapter with modules_to_save")
                )
            self._require_grad(names, inference_mode, found, leaving)
            self._activate(names, found)

    def _activate(
        self, names: tuple[str, ...] | None = None, found: Contents | None = None
    ) -> None:
        """Have these be active, or those that are; with `found`, where nothing else has changed."""
        # What one thread fuses or activates, another may be about to activate.
        with LOCK:
            names = self._active if names is None else names
            # Not setattr: a module's looks through all that it holds.
            self.__dict__["_active"] = names
            active = names if self._enabled else ()
            if found is None:
                found = self._found()
                found.ready = None
            if self._fused:
                # Blocks may have been taken out, or given another forward.
                found.ready = None
                fused = [found.modules[name] for name in self._fused if name in found.modules]
                in_block = {id(site_in(module)) for module in fused}
                for _, _, site in found.sites:
                    site.in_block = id(site) in in_block
            if not self._routes.open:
                watch(self.model, False)
            activate(found, active, routed=bool(self._routes.open))
            for _, _, copies in found.copies:
                copies.active = next((name for name in active if name in copies), None)

    def _require_grad(
        self, names: Sequence[str], inference_mode: bool, found: Contents, leaving: str | None
    ) -> None:
        self._rows.forget()
        wanted = set() if inference_mode else set(names)
        changing = {*self._active, *names}
        # Somebody may have asked for all gradients there are: it shows at an adapter's first site.
        seen: set[str] = set()
        held = found.vectors()
        for vectors in held:
            for name in vectors.keys() - seen:
                if vectors[name].requires_grad:  # type: ignore[union-attr]
                    changing.add(name)
            seen |= vectors.keys()
            if len(seen) == len(self.peft_config):
                break
        for name in changing - {leaving}:
            wants = name in wanted
            for vector in [vectors.get(name) for vectors in held]:
                if vector is not None:
                    vector.requires_grad = wants
        for _, _, copies in found.copies:
            for name in set(copies.adapters) - {leaving}:
                for parameter in copies[name].parameters():
                    if parameter.is_floating_point():
                        parameter.requires_grad_(name in wanted)

    def _keys(self, adapter: str, found: Contents) -> set[str]:
        """What the base model's state dict calls an adapter's vectors and copies."""
        held = [f"{name}.{ATTRIBUTE}.{adapter}" for name, _, site in found.sites if adapter in site]
        held += [
            f"{name}.{ATTRIBUTE}.{adapter}.{key}"
            for name, _, copies in found.copies
            if adapter in copies
            for key in copies[adapter].state_dict()
        ]
        # The model itself may be the module.
        return {key.removeprefix(".") for key in held}

    def _hide_from_checkpoints(self, keys: set[str]) -> None:
        """Have the base model's own `save_pretrained` leave these out too."""
        self._hidden |= keys
        self._ignore_on_save()

    def _show_to_checkpoints(self, keys: set[str]) -> None:
        """Undo `_hide_from_checkpoints`."""
        self._hidden -= keys.difference(self._ignored_before or ())
        self._ignore_on_save()

    def _ignore_on_save(self) -> None:
        if isinstance(self.model, PreTrainedModel):
            ignored = self._hidden if self.peft_config else self._ignored_before
            self.model._keys_to_ignore_on_save = ignored

    def _check_known(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.peft_config:
                raise IA3Error(
                    f"no adapter {name!r} on this model, which has {sorted(self.peft_config)}"
                    f"{did_you_mean(name, self.peft_config)}"
                )


class _Routing:
    """The routes of a model that are on, each time they were entered, and its bank."""

    def __init__(self) -> None:
        self.open: WeakSet[Opening] = WeakSet()
        self.bank: AdapterBank | None = None

    def __reduce__(self) -> tuple[type[_Routing], tuple[()]]:
        # Nobody has routed a copy, and a bank is of one model.
        return _Routing, ()


def _read_adapter(
    model_id: str | Path,
    config: IA3Config | None,
    is_trainable: bool,
    **hub: Unpack[HubOptions],
) -> Adapter:
    adapter = store.read_adapter(adapter_folder(model_id, ["adapter_*"], **hub), config)
    adapter.config.inference_mode = not is_trainable
    return adapter


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Errors within the context say which adapter they are about."""
    try:
        yield
    except IA3Error as error:
        raise IA3Error(f"{source}: {error}") from error


def check_name(adapter_name: str) -> None:
    """Raise `IA3Error` where an adapter cannot have that name."""
    if not re.fullmatch(r"[^./\\\s\x00]+", adapter_name):
        raise IA3Error(f"adapter name {adapter_name!r} must have no dot, slash or white space")
    if adapter_name == BASE:
        raise IA3Error(f"adapter name {BASE!r} means the base model: choose another")
    if adapter_name in TAKEN:
        raise IA3Error(
            f"adapter name {adapter_name!r} is also an attribute of the modules that hold the "
            "vectors: choose another"
        )


def _with_head(model: nn.Module, config: IA3Config) -> list[str] | None:
    """`modules_to_save` with the head that the task trains: PEFT's names, or what is not the body.

    PEFT leaves a head of another name untrained without a word.
    """
    names = list(config.modules_to_save or ())
    if config.task_type not in HEADS:
        return names or None
    heads = [name for name in HEADS[TaskType(config.task_type)] if hasattr(model, name)]
    if not heads and isinstance(model, PreTrainedModel):
        heads = [
            name
            for name, child in model.named_children()
            if name != model.base_model_prefix and next(child.parameters(), None) is not None
        ]
    return [*names, *(head for head in heads if head not in names)] or None


def _untie(model: nn.Module) -> None:
    """Say in the config that the output layer has weights of its own, if merging gave it some."""
    config: Any = getattr(model, "config", None)
    if isinstance(model, PreTrainedModel) and getattr(config, "tie_word_embeddings", False):
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
        if outputs is not None and outputs.weight is not inputs.weight:
            config.tie_word_embeddings = False


def value_count(parameter: nn.Parameter) -> int:
    """The number of values a parameter holds, whatever they are packed into."""
    # bitsandbytes packs two 4-bit values into a byte of storage.
    packed = type(parameter).__name__ == "Params4bit"
    return parameter.numel() * (2 * parameter.element_size() if packed else 1)


# -- by task ---------------------------------------------------------------------------------------


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
        model: the base model.
        peft_config: what to rescale.
        adapter_name: the adapter's name.
        mixed: only False: there is one kind of adapter here.
        autocast_adapter_dtype, low_cpu_mem_usage: taken for PEFT's sake; vectors are always float32
            and made once.
        revision: the base model's revision on the hub, for the config.

    Returns:
        The `PeftModelFor…` of the config's task type, or an `IA3Model` where it has none.

    Raises:
        IA3Error: the config does not fit the model, which is then unchanged.
    """
    if isinstance(model, IA3Config) and isinstance(peft_config, nn.Module):
        model, peft_config = peft_config, model
    if mixed:
        raise IA3Error("mixed=True: there is only one kind of adapter here")
    if revision is not None:
        peft_config.revision = revision
    return model_class(peft_config)(model, peft_config, adapter_name)


def model_class(config: IA3Config) -> type[IA3Model]:
    """The class for a config's task type."""
    return MODEL_CLASSES[TaskType(config.task_type)] if config.task_type else IA3Model


class PeftModelForCausalLM(IA3Model):
    """A decoder-only language model with adapters."""

    task = TaskType.CAUSAL_LM


class PeftModelForSeq2SeqLM(IA3Model):
    """An encoder-decoder language model with adapters."""

    task = TaskType.SEQ_2_SEQ_LM


class PeftModelForSequenceClassification(IA3Model):
    """A sequence classifier with adapters; its head trains and is saved with them."""

    task = TaskType.SEQ_CLS


class PeftModelForTokenClassification(IA3Model):
    """A token classifier with adapters; its head trains and is saved with them."""

    task = TaskType.TOKEN_CLS


class PeftModelForFeatureExtraction(IA3Model):
    """A model whose hidden states are wanted, with adapters."""

    task = TaskType.FEATURE_EXTRACTION


class PeftModelForQuestionAnswering(IA3Model):
    """An extractive question answerer with adapters; its head trains and is saved with them."""

    task = TaskType.QUESTION_ANS


MODEL_CLASSES: dict[TaskType, type[IA3Model]] = {
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}


# Whose classes an adapter's config may name as its base model's, unless the user says otherwise.
LIBRARIES = ("transformers", "diffusers")
# What says how to fetch files from the hub, both the adapter's and the base model's.
FOR_BOTH = ("token", "cache_dir", "force_download", "local_files_only")
TOKENIZER_FILES = ("*token*.json", "vocab*", "merges.txt", "*.model", "chat_template*")


class AutoPeftModel:
    """An adapter together with its base model, which its config names.

    The base model's class is the one its config recorded (`auto_mapping`), or the one its task type
    asks for.
    """

    task_type: TaskType | None = None

    def __init__(self) -> None:
        raise IA3Error(f"{type(self).__name__} is made by {type(self).__name__}.from_pretrained()")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = DEFAULT_ADAPTER,
        is_trainable: bool = False,
        config: IA3Config | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        import_allowlist: Sequence[str] = LIBRARIES,
        **base_options: Any,
    ) -> IA3Model:
        """Load an adapter and, before it, its base model.

        Args:
            pretrained_model_name_or_path: the adapter's folder or its id on the hub.
            adapter_name: the name it gets.
            is_trainable: its vectors require gradients.
            config: instead of the adapter's own.
            revision: the adapter's, on the hub.
            subfolder: where in the folder or repository the adapter lies.
            import_allowlist: the libraries that the adapter's config may choose the base model's
                class from.
            base_options: for the base model's `from_pretrained`, e.g. `dtype`, `device_map`. What
                says how to fetch from the hub (`token`, `cache_dir`, ...) holds for both.

        Raises:
            FileNotFoundError: there is no adapter.
            IA3Error: its config names no base model, or one of another task.
            OSError: the base model is not to be had.
        """
        for_both: Any = {key: base_options[key] for key in FOR_BOTH if key in base_options}
        folder = adapter_folder(
            pretrained_model_name_or_path,
            ["adapter_*", *TOKENIZER_FILES],
            revision=revision,
            subfolder=subfolder,
            **for_both,
        )
        config = config or IA3Config.from_pretrained(folder)
        if config.base_model_name_or_path is None:
            raise IA3Error(
                f"{folder / CONFIG_NAME} names no base model: load it yourself, then "
                "PeftModel.from_pretrained(model, ...)"
            )
        if cls.task_type is not None and config.task_type not in (None, cls.task_type.value):
            raise IA3Error(
                f"{pretrained_model_name_or_path} is an adapter for {config.task_type}, expected "
                f"{cls.task_type.value}: use AutoPeftModel"
            )
        base = _base_class(cls.task_type, config, import_allowlist).from_pretrained(
            config.base_model_name_or_path, revision=config.revision, **base_options
        )
        _fit_vocabulary(base, folder, base_options.get("trust_remote_code", False))
        kind = IA3Model if cls.task_type is None else MODEL_CLASSES[cls.task_type]
        return kind.from_pretrained(base, folder, adapter_name, is_trainable, config)


class AutoPeftModelForCausalLM(AutoPeftModel):
    """An adapter with its decoder-only language model."""

    task_type = TaskType.CAUSAL_LM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """An adapter with its encoder-decoder language model."""

    task_type = TaskType.SEQ_2_SEQ_LM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """An adapter with its sequence classifier."""

    task_type = TaskType.SEQ_CLS


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """An adapter with its token classifier."""

    task_type = TaskType.TOKEN_CLS


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """An adapter with its question answerer."""

    task_type = TaskType.QUESTION_ANS


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """An adapter with its model of hidden states."""

    task_type = TaskType.FEATURE_EXTRACTION


AUTO_CLASSES = {
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "AutoModel",
}


def _base_class(task_type: TaskType | None, config: IA3Config, allowed: Sequence[str]) -> Any:
    if task_type is None and config.task_type is not None:
        task_type = TaskType(config.task_type)
    if task_type is not None:
        return getattr(transformers, AUTO_CLASSES[task_type])
    mapping = config.auto_mapping or {}
    library, name = mapping.get("parent_library"), mapping.get("base_model_class")
    # An adapter's file must not choose which code is run.
    if not isinstance(library, str) or not any(f"{library}.".startswith(f"{a}.") for a in allowed):
        raise IA3Error(
            f"the adapter's config has no task_type, and its auto_mapping {mapping} names no class "
            f"of {', '.join(allowed)}: load the base model yourself, then "
            "PeftModel.from_pretrained(model, ...), or name the library in import_allowlist, if it "
            "is to be trusted"
        )
    found = getattr(importlib.import_module(library), str(name), None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise IA3Error(f"auto_mapping: {library} has no model class {name!r}")
    return found


def _fit_vocabulary(base: Any, folder: Path, trust_remote_code: bool) -> None:
    """Make room for the tokens of a tokenizer that was saved beside the adapter."""
    if not (folder / "tokenizer_config.json").is_file():
        return
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        folder, trust_remote_code=trust_remote_code
    )
    if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(len(tokenizer))
