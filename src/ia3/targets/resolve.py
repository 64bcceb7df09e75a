"""From a config and a model to the targets: which module, which side, how many values."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..arguments import instance
from ..core.activations import (
    SUPPORTED,
    Activation,
    Side,
    activation_of,
    is_read,
    linear_features,
    refuse_lazy,
)
from ..core.names import (
    Frozen,
    Target,
    base_modules,
    model_type_of,
    module_at,
    modules_of,
    own_modules,
    own_name,
    starred,
    unwrapped,
)
from ..core.reached import is_unreached
from ..core.tried import gives_channels
from ..errors import (
    IA3Error,
    MismatchError,
    NoMatchingPeftModuleError,
    did_you_mean,
    shown,
    warn_caller,
)
from .architectures import ARCHITECTURES
from .config import Entries, IA3Config, TaskType
from .matching import (
    Listed,
    Matching,
    feedforward_among,
    names_or_suffixes,
    saved_with,
    without_a_match,
)
from .notes import notes
from .structure import block_lists, feedforward_targets, layer_names, linear_layers, paper_targets


def resolve(
    model: nn.Module, config: IA3Config, frozen: Mapping[str, Frozen] | None = None
) -> tuple[IA3Config, list[Target]]:
    """What a config rescales on this model.

    Args:
        model: the base model, possibly with sites of other adapters on it.
        config: `None` fields are filled in: PEFT's defaults where PEFT knows the model's type,
            otherwise the paper's sites.
        frozen: for an adapter that is loaded, module name -> the ranges that stay one. The config's
            entries may match nothing then: adapters trained with PEFT hold such, and their vectors
            say what they rescale. Without it, `IA3Error` is raised for such an entry.

    Returns:
        A copy of the config with its modules named in the forms PEFT reads, and the targets in the
        model's order.
    """
    model, config = unwrapped(model), _by_own_names(config)
    modules, matching = modules_of(model), Matching()
    refuse_lazy(modules)
    entries, feedforward, sites = _choice(model, config, matching)
    chosen: dict[str, Any] = {"target_modules": entries, "feedforward_modules": feedforward}
    unknown = dict(config.unknown)
    resolved = dataclasses.replace(config, **chosen, paper_sites=False, unknown=unknown)
    if resolved.base_model_name_or_path is None:
        name = getattr(getattr(model, "config", None), "_name_or_path", None)
        resolved.base_model_name_or_path = name or None
    if frozen is None:
        _check_entries(resolved, own_modules(modules), model, matching)
    _leave_out_unused(resolved, modules, matching, stored=frozen is not None)
    found, why = {site.name: site.why for site in sites}, _reasons(config, resolved)
    ranges = {**(frozen or {}), **{site.name: site.frozen for site in sites if site.frozen}}
    targets = []
    for name, side, activation in _chosen(resolved, modules, model, matching):
        stay, dim = ranges.get(name, ()), activation.dim
        for start, end in stay:
            if not 0 <= start < end <= dim:
                which = f"values {start} to {end} are to stay one"
                raise IA3Error(f"module {name!r}: {which}, but its {side} has {dim}")
        reason = found.get(name) or why(name, side)
        targets.append(Target(name, side, activation, stay, reason))
    # PEFT warns where its loading has to mend this.
    resolved.fan_in_fan_out = any(isinstance(modules[t.name], Conv1D) for t in targets)
    return resolved, targets


def _by_own_names(config: IA3Config) -> IA3Config:
    """The config with the entries of its lists as they are without wrappers around modules."""
    fields = ("target_modules", "feedforward_modules", "exclude_modules", "modules_to_save")
    lists = {field: getattr(config, field) for field in fields}
    named: dict[str, Any] = {
        field: list(map(own_name, entries))
        for field, entries in lists.items()
        if entries is not None and not isinstance(entries, str)
    }
    return dataclasses.replace(config, **named)


def names_chosen(
    config: IA3Config, names: Iterable[str], matching: Matching | None = None
) -> list[str]:
    """Those of a model's modules, by name, that a resolved config rescales."""
    matching = matching or Matching()
    targeted = matching.rule("target_modules", config.target_modules)
    excluded = matching.rule("exclude_modules", config.exclude_modules)
    # Saved whole, they need no vector; PEFT's rule.
    saved = saved_with(config.modules_to_save)
    return [n for n in names if targeted(n) and not excluded(n) and saved(n) is None]


def leave_out(config: IA3Config, names: Iterable[str]) -> None:
    """Have a config's `exclude_modules` match these very modules too: as an expression."""
    given = config.exclude_modules or ()
    entries = [f"(?:.*\\.)?{re.escape(entry)}" for entry in sorted(given)]
    before = [f"(?:{given})"] if isinstance(given, str) else entries
    config.exclude_modules = "|".join([*before, *map(re.escape, names)])


def linear_in_upper_blocks(model: nn.Module, count: int) -> list[str]:
    """The names of all linear layers in a model's uppermost `count` blocks."""
    lists, kind = block_lists(model), type(unwrapped(model)).__name__
    if len(lists) != 1:
        there = f"has blocks in {', '.join(lists)}" if lists else "has no list of blocks"
        raise IA3Error(
            f"upper_blocks: {kind} {there}, expected one list, as decoder-only models have it: "
            "rescale all blocks"
        )
    ((name, blocks),) = lists.items()
    size = len(blocks)
    if not 1 <= count <= size:
        found = f"{kind} has {size} blocks"
        raise IA3Error(f"upper_blocks is {count}, expected 1 to {size}: {found}")
    return [
        f"{name}.{index}.{part}"
        for index in range(size - count, size)
        for part in linear_layers(blocks[index])
    ]


def check_vectors(
    vectors: Mapping[str, Tensor], targets: Sequence[Target], model: nn.Module
) -> None:
    """Raise `MismatchError` unless an adapter's vectors, by module name, are those of its targets.

    PEFT's may have more, on modules that are never called: they never had an effect.
    """
    model_name = type(model).__name__
    expected = {target.name: target for target in targets}
    missing = sorted(expected.keys() - vectors.keys())
    extra = sorted(vectors.keys() - expected.keys())
    if extra:
        without = {name for name, module in modules_of(model).items() if is_read(module)}
        extra = [name for name in extra if name not in without]
    if missing or extra:
        which = f"has no vector for {missing[0]!r}" if missing else f"has a vector for {extra[0]!r}"
        raise MismatchError(
            f"the adapter does not fit {model_name}: it {which} ({len(missing)} missing, "
            f"{len(extra)} not expected); is this the model it was trained on?"
        )
    for name, target in expected.items():
        shape = target.activation.shape
        if tuple(vectors[name].shape) != shape or not vectors[name].is_floating_point():
            raise MismatchError(
                f"the adapter does not fit {model_name}: vector {name!r} is "
                f"{list(vectors[name].shape)} {vectors[name].dtype}, expected {list(shape)} "
                f"({math.prod(shape)} values on the {target.side} side)"
            )


def explain(model: nn.Module, config: IA3Config | None = None) -> None:
    """Print which modules of a model would be rescaled, how many values, and why.

    Modules that differ only in the number of their layer share a line, with a `*` for the number.
    The columns are the module's name; its side that is rescaled (`output`, `input`, or `inner` of
    experts); how many such modules there are; how many values the vector of one has; and why it was
    chosen, or that the model never calls it, so that a vector there has no effect. Below them is
    the size of the whole adapter in float32, and notes on what the config's names may not have been
    meant to name.

    Args:
        model: the base model, which is not changed; it may be on the meta device.
        config: what to rescale; `IA3Config()`, the defaults for the architecture, if not given.

    Raises:
        InvalidTypeError: an argument is of another type.
        NoMatchingPeftModuleError: a name in the config matches no module.
        IA3Error: a module cannot be rescaled, or there are no defaults for such a model.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> import ia3
        >>> sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32}
        >>> layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        >>> ia3.explain(LlamaForCausalLM(LlamaConfig(**sizes, **layers)))
        LlamaForCausalLM (llama)
        module                           side    times  values  why
        model.layers.*.self_attn.k_proj  output      2       8  PEFT's default 'k_proj'
        model.layers.*.self_attn.v_proj  output      2       8  PEFT's default 'v_proj'
        model.layers.*.mlp.down_proj     input       2      32  PEFT's default 'down_proj'
        6 modules, 96 values, 384 bytes
    """
    instance("model", model, nn.Module, "a torch.nn.Module")
    config = IA3Config() if config is None else config
    instance("config", config, IA3Config, "an ia3.IA3Config")
    _, targets = resolve(model, config)
    targets = [
        dataclasses.replace(t, why=f"{t.why}; never called: no effect")
        if is_unreached(model, t.name)
        else t
        for t in targets
    ]
    model = unwrapped(model)
    model_type = model_type_of(model)
    print(type(model).__name__ + (f" ({model_type})" if model_type != "None" else ""))
    rows = [("module", "side", "times", "values", "why"), *_rows(targets)]
    name, side, times, values = (max(len(row[column]) for row in rows) for column in range(4))
    for a, b, c, d, why in rows:
        print(f"{a:<{name}}  {b:<{side}}  {c:>{times}}  {d:>{values}}  {why}")
    total = sum(math.prod(target.activation.shape) for target in targets)
    modules = "1 module" if len(targets) == 1 else f"{len(targets)} modules"
    frozen = sum(end - start for target in targets for start, end in target.frozen)
    stay = f", {frozen:,} of them stay one" if frozen else ""
    print(f"{modules}, {total:,} values, {4 * total:,} bytes{stay}")
    for note in notes(model, config, {target.name: target.side for target in targets}):
        print(f"note: {note}")


def _rows(targets: list[Target]) -> list[tuple[str, ...]]:
    alike: dict[object, list[Target]] = defaultdict(list)
    for target in targets:
        shape = target.activation.shape
        alike[starred(target.name), target.side, shape, target.frozen, target.why].append(target)
    rows: list[tuple[str, ...]] = []
    for first, *others in alike.values():
        name, values = starred(first.name) if others else first.name, first.activation.shape
        size = f"{math.prod(values):,}"
        rows.append((name, first.side, str(1 + len(others)), size, first.why))
    return rows


def _choice(
    model: nn.Module, config: IA3Config, matching: Matching
) -> tuple[Entries, Entries, list[Target]]:
    """`target_modules`, `feedforward_modules`, and those targets that were found by structure."""
    entries, feedforward = config.target_modules, config.feedforward_modules
    sites: list[Target] = []
    if entries is None and (config.paper_sites or model_type_of(model) not in ARCHITECTURES):
        try:
            sites = paper_targets(model)
        except IA3Error as error:
            if config.paper_sites:
                raise
            raise IA3Error(
                f"no default target_modules for model type {model_type_of(model)!r} "
                f"({type(model).__name__}): name them in IA3Config(target_modules=[...]); {error}"
            ) from error
        entries, feedforward = _entries(model, sites)
    elif entries is None:
        entries, default, sites = _peft_defaults(model)
        feedforward = default if feedforward is None else feedforward
    elif str(entries).lower() == "all-linear":
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        if head is None and config.task_type == TaskType.SEQ_CLS:
            # Where a sequence classifier keeps its output layer, in PEFT's order. A model may have
            # a method of that name.
            heads = (getattr(model, name, None) for name in ("score", "classifier"))
            head = next((module for module in heads if isinstance(module, nn.Module)), None)
        apart = set() if head is None else set(head.modules())
        linear = [
            name
            for name, module in linear_layers(model).items()
            if (features := linear_features(module))
            and module not in apart
            and gives_channels(module, features[1])
        ]
        entries = names_or_suffixes(model, linear)
    if feedforward is None:
        entries, feedforward = _default_feedforward(model, entries, matching)
    return entries, feedforward, sites


def _peft_defaults(model: nn.Module) -> tuple[list[str], list[str], list[Target]]:
    """PEFT's targets and feed-forward modules, and what stands in for those that match nothing."""
    model_type = model_type_of(model)
    targets, feedforward = (list(modules) for modules in ARCHITECTURES[model_type])
    stale = without_a_match("target_modules", targets, base_modules(model))
    if not stale:
        return targets, feedforward, []
    gone = [entry for entry in stale if entry in feedforward]
    if gone != stale:
        raise IA3Error(
            f"PEFT's default target_modules for {model_type!r} are {targets}, but {stale} match "
            f"nothing in {type(model).__name__}: name them in IA3Config(target_modules=[...])"
        )
    found = feedforward_targets(model)
    _, entries = _entries(model, found)
    warn_caller(
        f"PEFT's default {gone} for {model_type!r} matches nothing in {type(model).__name__}; "
        f"{entries} ({found[0].why}) is rescaled instead"
    )
    kept = ([entry for entry in given if entry not in stale] for given in (targets, feedforward))
    return next(kept) + entries, next(kept) + entries, found


def _entries(model: nn.Module, found: Iterable[Target]) -> tuple[list[str], list[str]]:
    """The sites as PEFT's `target_modules` and `feedforward_modules` name them."""
    outputs = [site.name for site in found if site.side == "output"]
    inputs = [site.name for site in found if site.side != "output"]
    feedforward = names_or_suffixes(model, inputs, outputs)
    return names_or_suffixes(model, outputs) + feedforward, feedforward


def _default_feedforward(
    model: nn.Module, targets: Entries, matching: Matching
) -> tuple[Entries, list[str]]:
    """The targets, and those of them that are a feed-forward's down projection."""
    names = list(filter(matching.rule("target_modules", targets), base_modules(model)))
    if model_type_of(model) in ARCHITECTURES:
        # Experts have no module of PEFT's names.
        experts = [name for name in names if activation_of(module_at(model, name), "inner")]
        default = [*ARCHITECTURES[model_type_of(model)][1], *experts]
    else:
        default = []
        with suppress(IA3Error):
            among = set(names)
            default = [site.name for site in feedforward_targets(model) if site.name in among]
    if not isinstance(targets, str):
        return feedforward_among(targets, default)
    unmatched = without_a_match("feedforward_modules", default, names)
    return targets, [entry for entry in default if entry not in unmatched]


def _check_entries(
    config: IA3Config, names: list[str], model: nn.Module, matching: Matching
) -> None:
    """Every entry must match a module: a silent mismatch would train less than was asked for."""
    kind = type(model).__name__
    for field in ("target_modules", "exclude_modules", "feedforward_modules"):
        entries = getattr(config, field) or ()
        if isinstance(entries, str):
            if any(map(matching.rule(field, entries), names)):
                continue
            listed = not without_a_match(field, [entries], names)
            hint = f"; did you mean the list [{shown(entries)}]?" if listed else ""
            raise NoMatchingPeftModuleError(
                f"{field}: the expression {shown(entries)} matches no whole name in {kind}{hint}"
            )
        for entry in without_a_match(field, entries, names):
            last_parts = {name.rsplit(".", 1)[-1] for name in names}
            usual = ARCHITECTURES.get(model_type_of(model), ((), ()))[0]
            known = [*sorted(last_parts), *sorted(names)]
            hint = did_you_mean(entry, usual) or did_you_mean(entry, known)
            hint = hint or f"; its layers are called {layer_names(model)}"
            message = f"{field}: module {entry!r} matches nothing in {kind}{hint}"
            raise NoMatchingPeftModuleError(message)
    matched = list(filter(matching.rule("target_modules", config.target_modules), names))
    feedforward = config.feedforward_modules
    if feedforward and not any(map(matching.rule("feedforward_modules", feedforward), matched)):
        first = f", of which {matched[0]!r} is the first" if matched else ""
        raise IA3Error(
            f"feedforward_modules {shown(feedforward)} match none of the targets{first}: they must "
            "be among target_modules"
        )


def _leave_out_unused(
    config: IA3Config, modules: Mapping[str, nn.Module], matching: Matching, *, stored: bool
) -> None:
    """Take out of a resolved config what would have no effect, but PEFT puts vectors on.

    Of a config that is not `stored` with them, this is what it names in full, as PEFT writes all
    linear layers.
    """
    targets, exclude = config.target_modules, config.exclude_modules or set()
    named = set() if isinstance(targets, str) else set(targets or ())
    read = [name for name in own_modules(modules) if is_read(modules[name])]
    unused = {name for name in names_chosen(config, read, matching) if stored or name in named}
    if not unused or isinstance(exclude, str):
        return
    if not stored:
        warn_caller(
            f"{sorted(unused)} stay as they are: nn.MultiheadAttention reads their weights and "
            "never calls them, so that a vector there would have no effect"
        )
    if unused & named:
        config.target_modules = named - unused
    if unused - named:
        config.exclude_modules = {*exclude, *unused - named}
    if config.feedforward_modules and not isinstance(config.feedforward_modules, str):
        config.feedforward_modules = set(config.feedforward_modules) - unused


def _chosen(
    config: IA3Config, modules: Mapping[str, nn.Module], model: nn.Module, matching: Matching
) -> Iterator[tuple[str, Side, Activation]]:
    """The modules that a resolved config chooses, by name, and which activation of them."""
    chosen = names_chosen(config, own_modules(modules), matching)
    feedforward = matching.rule("feedforward_modules", config.feedforward_modules)
    if not chosen:
        message = f"no module of {type(model).__name__} is left to rescale"
        raise NoMatchingPeftModuleError(message)
    for name in chosen:
        module = modules[name]
        side: Side = "output"
        if feedforward(name):
            side = "inner" if activation_of(module, "inner") else "input"
        activation = activation_of(module, side)
        if activation and side == "output" and not gives_channels(module, activation.dim):
            raise IA3Error(
                f"module {name!r} is a {type(module).__name__}, whose output cannot be rescaled: "
                f"it is not one tensor of {activation.dim} channels; leave it out of target_modules"
            )
        if activation is None:
            hint = ""
            if activation_of(module, "inner"):
                hint = "; experts have an inner activation: name them in feedforward_modules too"
            elif inside := _inside(name, module, side):
                hint = f"; it is a container, name what is in it: {', '.join(inside)}"
            elif isinstance(module, nn.Linear):
                hint = "; nn.MultiheadAttention reads its weight without calling it"
            raise IA3Error(
                f"module {name!r} is a {type(module).__name__}, whose {side} cannot be rescaled: "
                f"expected {SUPPORTED}{hint}"
            )
        yield name, side, activation


def _inside(name: str, container: nn.Module, side: Side) -> list[str]:
    """The ends of the names of what a container holds that can be rescaled, a few of them."""
    last = name.rpartition(".")[2]
    held = (part for part, m in container.named_modules() if part and activation_of(m, side))
    names = [*dict.fromkeys(starred(f"{last}.{part}") for part in held)]
    return [*names[:6], "..."] if len(names) > 6 else names


def _reasons(config: IA3Config, resolved: IA3Config) -> Callable[[str, Side], str]:
    """Of a target's name and side, which of the resolved config's entries names it."""
    if str(config.target_modules).lower() == "all-linear":
        return lambda name, side: "linear layer"
    whose = "PEFT's default" if config.target_modules is None else "named by"

    def reasons(field: str) -> Callable[[str], str]:
        modules = getattr(resolved, field)
        if isinstance(modules, str):
            return lambda name: f"matches {shown(modules)}"
        entries = Listed(field, modules or ())
        return lambda name: f"{whose} {entries.naming(name)!r}"

    outputs, inputs = reasons("target_modules"), reasons("feedforward_modules")
    return lambda name, side: outputs(name) if side == "output" else inputs(name)
