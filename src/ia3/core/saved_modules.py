"""Whole modules that train and are saved with an adapter: `modules_to_save`.

Each adapter gets a copy of a module named there, held in a `SavedModule` registered on the module
as `ia3_l`, and calls of the module go to the active adapter's copy.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import IA3Error, MismatchError, StateError, did_you_mean
from .activations import device_of
from .calls import Calls, kept, seen
from .names import ATTRIBUTE, base_modules, module_at, modules_of, own_name, own_names
from .patch import SLOTS, patch, patched, refuse_replica
from .spread import spread_like
from .weights import write

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class SavedModule(nn.Module):
    """Every adapter's copy of one base module."""

    # The adapter whose copy is called; `None` for the module itself.
    active: str | None = None
    # The adapters whose copies never train.
    frozen: set[str]
    _calls: Calls = Calls()  # those of the model; Adapters writes it

    def __init__(self) -> None:
        super().__init__()
        self.frozen = set()
        self.register_load_state_dict_post_hook(allow_plain_checkpoint)  # type: ignore[no-untyped-call]

    _replicate_for_data_parallel = refuse_replica

    def __contains__(self, adapter: object) -> bool:
        return adapter in self._modules

    def __getitem__(self, adapter: str) -> nn.Module:
        module = self._modules[adapter]
        assert module is not None
        return module

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters that have a copy."""
        return list(self._modules)

    def add(self, adapter: str, module: nn.Module) -> None:
        """Store a copy of the base module's own weights under an adapter's name."""
        memo: dict[int, Any] = {id(self): None}
        with ExitStack() as loaded:
            for part in module.modules():
                if hasattr(part, "_hf_hook"):
                    from accelerate.utils import align_module_device  # type: ignore[import-untyped]

                    loaded.enter_context(align_module_device(part, device_of(part)))
                    # accelerate's hook may hold all weights of the base model.
                    memo[id(part._hf_hook)] = None
            twin = copy.deepcopy(module, memo)
        _unpatch(twin)
        twin._modules.pop(ATTRIBUTE, None)
        # The base module's hooks run when it is called, before and after the copy.
        for hooks in HOOKS:
            getattr(twin, hooks).clear()
        for part in twin.modules():
            if "_hf_hook" in part.__dict__:
                # accelerate's hook on the base module brings the input to where the copy is.
                for attribute in ("_hf_hook", *SLOTS):
                    part.__dict__.pop(attribute, None)
        # Not add_module: it refuses names that are also attributes of this class.
        self._modules[adapter] = twin.requires_grad_(False)

    def active_copy(self) -> nn.Module | None:
        """The copy that calls go to now; `None` for the module itself."""
        active = self.active
        twin = None if active is None else self._modules.get(active)
        # Asked last: nothing changes before it says so.
        if not self._calls.disturbed:
            return twin
        active = seen(self)
        if active is None:
            return None
        twin = kept(self, active) or self._modules.get(active)
        if twin is None:
            raise StateError(f"adapter {active!r} was deleted while this was computed with it")
        return twin

    def hook(self, module: nn.Module) -> None:
        """Nothing: the module's forward asks at each call."""

    def settle(self) -> None:
        """Nothing, as `hook`."""

    def remove(self, adapter: str) -> None:
        del self._modules[adapter]
        self.frozen.discard(adapter)
        if self.active == adapter:
            self.active = None


def saved_module_of(module: nn.Module) -> SavedModule | None:
    """The copies held on a module, if it has any."""
    copies = module._modules.get(ATTRIBUTE)
    return copies if isinstance(copies, SavedModule) else None


def find(
    model: nn.Module, names: Iterable[str] | None, optional: Collection[str] = ()
) -> list[str]:
    """The modules that `modules_to_save` names, by PEFT's rule: the ends of their names.

    What has nothing to train is passed over (`out` ends `dropout` too). An `IA3Error` where nothing
    is left of an entry that is not `optional`.
    """
    found: dict[str, None] = {}
    modules = base_modules(model) if names else []
    for entry in map(own_name, names or ()):
        matching = [name for name in modules if name.endswith(entry)]
        if not matching and entry not in optional:
            last_parts = {name.rsplit(".", 1)[-1] for name in modules} | set(modules)
            raise IA3Error(
                f"modules_to_save: module {entry!r} matches nothing in {type(model).__name__}"
                f"{did_you_mean(entry, sorted(last_parts))}; what is not in the model that gets "
                "the adapter is not saved with it"
            )
        trained = [name for name in matching if has_parameters(module_at(model, name))]
        if not trained and entry not in optional:
            raise IA3Error(f"modules_to_save: module {matching[0]!r} has no parameters to train")
        found.update(dict.fromkeys(trained))
    for name in found:
        module, above = module_at(model, name), name.rpartition(".")[0]
        while above:
            if above in found:
                problem = f"{name!r} is part of {above!r}, which is saved whole"
                raise IA3Error(f"modules_to_save: {problem}")
            above = above.rpartition(".")[0]
        if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
            raise IA3Error(
                f"modules_to_save: {name!r} is a {type(module).__name__}, which is never called: "
                "name the modules in it"
            )
    return list(found)


def has_parameters(module: nn.Module) -> bool:
    """Whether there is something to train."""
    return next(module.parameters(), None) is not None


def attach(module: nn.Module) -> SavedModule:
    """The module's copies, registered on it now if it has none: calls go to the active one."""
    copies = saved_module_of(module)
    if copies is None:
        copies = SavedModule()
        module.add_module(ATTRIBUTE, copies)
        _ToActiveCopy(module, copies)
    return copies


def detach(module: nn.Module) -> None:
    """Take the copies off a module, which is then what it was before `attach`."""
    copies, forward = saved_module_of(module), patched(module, _ToActiveCopy)
    if copies is not None:
        if forward is not None:
            # Calls that are running may go to a copy.
            copies._calls.later(forward.remove)
        del module._modules[ATTRIBUTE]


def keep_all(model: nn.Module, twins: Mapping[nn.Module, nn.Module]) -> None:
    """Give modules of a model the values of their copies, but not others that share theirs."""
    parts = {
        part: module_at(twin, path)
        for module, twin in twins.items()
        for path, part in modules_of(module).items()
        if ATTRIBUTE not in path.split(".")
    }
    # A parameter -> what it becomes in each of the modules that have it.
    becomes: dict[nn.Parameter, list[Tensor | None]] = {}
    for module in model.modules():
        for slot, parameter in module._parameters.items():
            if parameter is not None:
                value = parts.get(module, module)._parameters.get(slot)
                becomes.setdefault(parameter, []).append(value)
    apart = {id(parameter) for parameter, values in becomes.items() if not _are_same(values)}
    for module, twin in twins.items():
        _keep(module, twin, apart)


def _are_same(values: Sequence[Tensor | None]) -> bool:
    first = values[0]
    return all(
        value is first
        or (
            value is not None
            and first is not None
            and not (value.is_meta or first.is_meta)
            and torch.equal(value.to(first.device), first)
        )
        for value in values
    )


def _keep(module: nn.Module, twin: nn.Module, apart: Collection[int]) -> None:
    for name, tensor in [*twin.named_parameters(remove_duplicate=False), *twin.named_buffers()]:
        path, _, last = own_name(name).rpartition(".")
        owner, value = module_at(module, path), tensor.detach().clone()
        parameter = owner._parameters.get(last)
        if parameter is None:
            owner._buffers[last] = value
        elif id(parameter) in apart and not parameter.is_meta:
            owner._parameters[last] = nn.Parameter(value, requires_grad=False)
        else:
            write(owner, last, value)


def check(values: Mapping[str, Tensor], saved: Sequence[str], model: nn.Module) -> None:
    """Raise `IA3Error` where values of copies, by their names in the base model, do not fit it."""
    kind = type(model).__name__
    expected = {
        f"{name}.{key}": value
        for name in saved
        for key, value in own_names(module_at(model, name).state_dict()).items()
        if ATTRIBUTE not in key.split(".")
    }
    missing = sorted(expected.keys() - values.keys())
    extra = sorted(values.keys() - expected.keys())
    if missing or extra:
        which = f"lacks {missing[0]!r}" if missing else f"holds {extra[0]!r}"
        raise MismatchError(
            f"the adapter does not fit {kind}: of its modules_to_save it {which} "
            f"({len(missing)} missing, {len(extra)} not expected)"
        )
    for key, value in expected.items():
        if values[key].shape != value.shape:
            raise MismatchError(
                f"the adapter does not fit {kind}: {key!r} is {list(values[key].shape)}, expected "
                f"{list(value.shape)}"
            )


def load(twin: nn.Module, name: str, values: Mapping[str, Tensor]) -> None:
    """Give the copy of the module `name` its values, as `check` has seen them."""
    own = {f"{name}.{own_name(key)}": (key, now) for key, now in twin.state_dict().items()}
    twin.load_state_dict(
        {key: spread_like(values[full], now) for full, (key, now) in own.items() if full in values}
    )


def allow_plain_checkpoint(module: nn.Module, incompatible_keys: Any) -> None:
    """A load hook: the base model's own checkpoint is complete without what adapters hold."""
    missing = incompatible_keys.missing_keys
    missing[:] = [key for key in missing if ATTRIBUTE not in key.split(".")]


class _ToActiveCopy:
    """The forward of a module with copies: calls go to the active adapter's, if there is one."""

    def __init__(self, module: nn.Module, copies: SavedModule) -> None:
        self.copies = copies
        self.patch = patch(module, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        twin = self.copies.active_copy()
        return (self.patch.below if twin is None else twin)(*args, **kwargs)


def _unpatch(module: nn.Module) -> None:
    found = patched(module, _ToActiveCopy)
    if found is not None:
        found.remove()
