"""`IA3Model`: the adapters of one base model."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import store
from .config import IA3Config
from .errors import IA3Error, did_you_mean
from .files import write_files
from .sites import Site, check_side, displace, place, site_of
from .targets import Target, find_targets, vector_shape, with_defaults


class IA3Model(nn.Module):
    """A base model with (IA)³ adapters on it (paper section 3.3).

    No module is wrapped or replaced: the base model's own modules get a hook each, and `unload`
    gives back the very model that was passed in. The base's parameters are frozen while adapters
    are on it. Attributes that are not this class's own come from the base model.

    Args:
        model: the base model; any module with linear layers.
        config: what to rescale.
        adapter_name: the first adapter's name, active at once.
        vectors: its vectors, as in `add_adapter`; ones where not given.

    Raises:
        IA3Error: the config or the vectors do not fit the model, which is then unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        config: IA3Config,
        adapter_name: str = "default",
        vectors: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        taken = next((n for n, module in model.named_modules() if site_of(module)), None)
        if taken is not None:
            raise IA3Error(
                f"{type(model).__name__} has adapters already (at {taken!r}): use add_adapter on "
                "its IA3Model, or unload() that first"
            )
        self.peft_config: dict[str, IA3Config] = {}
        self._active: tuple[str, ...] = ()
        self._enabled = True
        self.model = model
        self._trained_before = [name for name, p in model.named_parameters() if p.requires_grad]
        self.add_adapter(adapter_name, config, vectors)
        for name in self._trained_before:
            model.get_parameter(name).requires_grad_(False)
        self.set_adapter(adapter_name)

    # -- adapters ---------------------------------------------------------------------------------

    def add_adapter(
        self,
        adapter_name: str,
        config: IA3Config,
        vectors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter, not yet active: its vectors do not require gradients until it is.

        Args:
            adapter_name: a name without dots or slashes, new to this model.
            config: what it rescales.
            vectors: module name -> `[dim, 1]` (output side) or `[1, dim]` (input side), any
                floating dtype. Ones if not given, as `init_ia3_weights` says. With vectors, entries
                of the config's lists may match nothing.

        Raises:
            IA3Error: the name is taken or malformed, the config or the vectors do not fit the
                model; the model is then unchanged.
        """
        if adapter_name in self.peft_config:
            raise IA3Error(f"adapter {adapter_name!r} exists already: delete it or choose another")
        if not re.fullmatch(r"[^./\\\s]+", adapter_name):
            raise IA3Error(f"adapter name {adapter_name!r} must have no dot, slash or white space")
        if adapter_name in {*dir(nn.Module()), *vars(Site("output", 1))}:
            # Setting the attribute ("training") would set the vector of that name.
            raise IA3Error(
                f"adapter name {adapter_name!r} is also an attribute of the modules that hold the "
                "vectors: choose another"
            )
        if config.modules_to_save:
            raise IA3Error(
                f"modules_to_save={config.modules_to_save} is not supported yet: leave it out"
            )
        config = with_defaults(self.model, config)
        targets = find_targets(self.model, config, strict=vectors is None)
        for target in targets:
            check_side(self.model.get_submodule(target.name), target)
        if vectors is not None:
            _check_vectors(vectors, targets, type(self.model).__name__)
        for target in targets:
            module = self.model.get_submodule(target.name)
            site = place(module, target)
            device = module.get_parameter("weight").device
            if vectors is not None:
                vector = vectors[target.name].to(device, torch.float32, copy=True)
            elif config.init_ia3_weights:
                vector = torch.ones(site.vector_shape, device=device)
            else:
                vector = torch.randn(site.vector_shape, device=device)
            site.add(adapter_name, vector)
        self.peft_config[adapter_name] = config

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; it is no longer active either."""
        self._check_known([adapter_name])
        if any(adapter_name in site.merged for _, _, site in self._sites()):
            raise IA3Error(f"adapter {adapter_name!r} is merged: unmerge_adapter() first")
        for _, module, site in self._sites():
            if adapter_name in site.vectors:
                site.remove(adapter_name)
            if not site.vectors:
                displace(module)
        del self.peft_config[adapter_name]
        self._activate(tuple(name for name in self._active if name != adapter_name))

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """Make these adapters the active ones; several multiply. Only they require gradients."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._check_known(names)
        for _, _, site in self._sites():
            for name, vector in site.vectors.items():
                vector.requires_grad_(name in names and not self.peft_config[name].inference_mode)
        self._activate(tuple(names))

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters."""
        return list(self._active)

    def disable_adapter_layers(self) -> None:
        """Compute as the base model does, until `enable_adapter_layers`.

        Merged adapters are unmerged, and stay so.
        """
        self.unmerge_adapter()
        self._enabled = False
        self._activate(self._active)

    def enable_adapter_layers(self) -> None:
        """Undo `disable_adapter_layers`."""
        self._enabled = True
        self._activate(self._active)

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
            self._activate(self._active)

    def vectors(self, adapter_name: str) -> dict[str, Tensor]:
        """Module name -> vector, `[dim, 1]` (output side) or `[1, dim]` (input side)."""
        self._check_known([adapter_name])
        return {
            name: site.vectors[adapter_name]
            for name, _, site in self._sites()
            if adapter_name in site.vectors
        }

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(values that require gradients, all values)."""
        sizes = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Print both numbers and their ratio, in PEFT's words."""
        trained, total = self.get_nb_trainable_parameters()
        share = 100 * trained / total
        print(
            f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {share:.4f}"
        )

    # -- computing --------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward, with the active adapters."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(super().__getattr__("model"), name)

    # -- merging ----------------------------------------------------------------------------------

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Fold adapters into the base weights; the originals are kept for `unmerge_adapter`.

        The product is taken in float32 and rounded once to the base's dtype.

        Args:
            adapter_names: the active adapters if not given.
            safe_merge: refuse a result that is not finite.

        Raises:
            IA3Error: something is merged already, a weight is packed or shared with a module that
                would change with it, or (with `safe_merge`) a merged weight is not finite; the
                model is then unchanged.
        """
        names = tuple(self._active if adapter_names is None else adapter_names)
        self._check_known(names)
        if any(site.merged for _, _, site in self._sites()):
            raise IA3Error("adapters are merged already: unmerge_adapter() first")
        owners = _owners(self.model)
        merged = []
        for name, module, site in self._sites():
            adapters = tuple(adapter for adapter in names if adapter in site.vectors)
            if not adapters:
                continue
            weights = site.merged_weights(module, adapters)
            for kind, tensor in weights.items():
                others = [o for o in owners[id(module.get_parameter(kind))] if o != name]
                if others:
                    raise IA3Error(
                        f"cannot merge into {name}.{kind}: {others[0]!r} shares it and would "
                        "change too"
                    )
                if safe_merge and not torch.isfinite(tensor).all():
                    raise IA3Error(
                        f"merging {list(adapters)} into {name}.{kind} gives values that are not "
                        "finite; nothing was merged"
                    )
            merged.append((site, module, adapters, weights))
        for site, module, adapters, weights in merged:
            site.merge(module, adapters, weights)

    def unmerge_adapter(self) -> None:
        """Put the original weights back, bit for bit."""
        for _, module, site in self._sites():
            if site.merged:
                site.unmerge(module)

    def merge_and_unload(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Fold the adapters into the base weights for good and return the plain base model.

        What is merged already stays merged; naming adapters on top of that is an error.
        """
        if adapter_names is not None or not any(site.merged for _, _, site in self._sites()):
            self.merge_adapter(adapter_names, safe_merge)
        for _, _, site in self._sites():
            site.forget_unmerged()
        return self.unload()

    def unload(self) -> nn.Module:
        """Take everything off and return the very model that was passed in, bit for bit."""
        self.unmerge_adapter()
        for _, module, _ in self._sites():
            displace(module)
        for name in self._trained_before:
            self.model.get_parameter(name).requires_grad_(True)
        self.peft_config.clear()
        self._active = ()
        return self.model

    # -- files ------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | Path, adapter_name: str | None = None) -> None:
        """Write an adapter's `adapter_config.json` and `adapter_model.safetensors`, atomically.

        Args:
            save_directory: made if absent; files of these names in it are replaced.
            adapter_name: the one active adapter if not given.

        Raises:
            OSError: the disk is full or may not be written; what was there before stays.
        """
        if adapter_name is None:
            if len(self._active) != 1:
                raise IA3Error(
                    f"active adapters are {list(self._active)}: name the one to save with "
                    "adapter_name="
                )
            adapter_name = self._active[0]
        self._check_known([adapter_name])
        saved = dataclasses.replace(self.peft_config[adapter_name], inference_mode=True)
        write_files(save_directory, store.adapter_files(saved, self.vectors(adapter_name)))

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
    ) -> IA3Model:
        """Load an adapter, written by this library or by PEFT, onto a base model.

        Args:
            model: the base model.
            model_id: the adapter's folder, or its id on the hub.
            adapter_name: the name it gets.
            is_trainable: its vectors require gradients.

        Raises:
            FileNotFoundError: there is no adapter.
            IA3Error: its files are broken or do not fit the model, which is then unchanged.
        """
        config, vectors = _read_adapter(model_id, is_trainable)
        with _naming(model_id):
            return cls(model, config, adapter_name, vectors)

    def load_adapter(
        self, model_id: str | Path, adapter_name: str, is_trainable: bool = False
    ) -> None:
        """Load a further adapter, not yet active; raises as `from_pretrained` does."""
        config, vectors = _read_adapter(model_id, is_trainable)
        with _naming(model_id):
            self.add_adapter(adapter_name, config, vectors)

    # -- private ----------------------------------------------------------------------------------

    def _sites(self) -> Iterator[tuple[str, nn.Module, Site]]:
        for name, module in list(self.model.named_modules()):
            site = site_of(module)
            if site is not None:
                yield name, module, site

    def _activate(self, names: tuple[str, ...]) -> None:
        self._active = names
        for _, module, site in self._sites():
            site.activate(module, names if self._enabled else ())

    def _check_known(self, names: list[str] | tuple[str, ...]) -> None:
        for name in names:
            if name not in self.peft_config:
                raise IA3Error(
                    f"no adapter {name!r} on this model, which has {sorted(self.peft_config)}"
                    f"{did_you_mean(name, self.peft_config)}"
                )


def get_peft_model(
    model: nn.Module, peft_config: IA3Config, adapter_name: str = "default"
) -> IA3Model:
    """PEFT's way to write `IA3Model(model, peft_config, adapter_name)`."""
    return IA3Model(model, peft_config, adapter_name)


def _read_adapter(model_id: str | Path, is_trainable: bool) -> tuple[IA3Config, dict[str, Tensor]]:
    folder = Path(model_id)
    if not folder.is_dir():
        folder = _download(str(model_id))
    config = store.read_config(folder)
    config.inference_mode = not is_trainable
    return config, store.read_vectors(folder)


@contextmanager
def _naming(model_id: str | Path) -> Iterator[None]:
    """Errors within the context say which adapter they are about."""
    try:
        yield
    except IA3Error as error:
        raise IA3Error(f"{model_id}: {error}") from error


def _download(model_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(model_id, allow_patterns=["adapter_*"]))
    except HFValidationError as error:
        raise FileNotFoundError(
            f"no adapter at {model_id!r}: no such folder, and not a hub id"
        ) from error
    except (LocalEntryNotFoundError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(
            f"no adapter at {model_id!r}: no such folder, and not to be had from the hub: {error}"
        ) from error


def _check_vectors(vectors: Mapping[str, Tensor], targets: list[Target], model_name: str) -> None:
    expected = {target.name: target for target in targets}
    missing = sorted(expected.keys() - vectors.keys())
    extra = sorted(vectors.keys() - expected.keys())
    if missing or extra:
        which = f"has no vector for {missing[0]!r}" if missing else f"has a vector for {extra[0]!r}"
        raise IA3Error(
            f"the adapter does not fit {model_name}: it {which} ({len(missing)} missing, "
            f"{len(extra)} not expected); is this the model it was trained on?"
        )
    for name, target in expected.items():
        shape = vector_shape(target.side, target.dim)
        if tuple(vectors[name].shape) != shape or not vectors[name].is_floating_point():
            raise IA3Error(
                f"the adapter does not fit {model_name}: vector {name!r} is "
                f"{list(vectors[name].shape)} {vectors[name].dtype}, expected {list(shape)} "
                f"({math.prod(shape)} values on the {target.side} side)"
            )


def _owners(model: nn.Module) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    return owners
