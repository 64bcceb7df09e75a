"""From a config and a model to the sites: which module, which side, how many values."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..core.activations import SUPPORTED, Activation, Side, activation_of, linear_features
from ..core.names import ATTRIBUTE as ATTRIBUTE
from ..core.names import Frozen, Target, base_modules, model_type_of, own_modules
from ..errors import IA3Error, did_you_mean
from .config import IA3Config, TaskType, feedforward_among, matches, matches_feedforward
from .structure import (
    PaperTarget,
    block_lists,
    feedforward_targets,
    names_or_suffixes,
    paper_targets,
)

# Where a sequence classifier keeps its output layer, in PEFT's order.
CLASSIFIERS = ("score", "classifier")

# model_type -> (target_modules, feedforward_modules), equal to PEFT 0.21's defaults.
ARCHITECTURES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "t5": (("k", "v", "wo"), ("wo",)),
    "mt5": (("k", "v", "wi_1"), ()),
    "gpt2": (("c_attn", "mlp.c_proj"), ("mlp.c_proj",)),
    "bloom": (("query_key_value", "mlp.dense_4h_to_h"), ("mlp.dense_4h_to_h",)),
    "roberta": (("key", "value", "output.dense"), ("output.dense",)),
    "opt": (("q_proj", "k_proj", "fc2"), ("fc2",)),
    "gptj": (("q_proj", "v_proj", "fc_out"), ("fc_out",)),
    "gpt_neox": (("query_key_value", "dense_4h_to_h"), ("dense_4h_to_h",)),
    "gpt_neo": (("q_proj", "v_proj", "c_proj"), ("c_proj",)),
    "bart": (("q_proj", "v_proj", "fc2"), ("fc2",)),
    "gpt_bigcode": (("c_attn", "mlp.c_proj"), ("mlp.c_proj",)),
    "llama": (("k_proj", "v_proj", "down_proj"), ("down_proj",)),
    "llama4": (("q_proj", "v_proj", "down_proj"), ("down_proj",)),
    "mistral": (("k_proj", "v_proj", "down_proj"), ("down_proj",)),
    "mixtral": (("k_proj", "v_proj", "w2"), ("w2",)),
    "bert": (("key", "value", "output.dense"), ("output.dense",)),
    "deberta-v2": (("key_proj", "value_proj", "output.dense"), ("output.dense",)),
    "deberta": (("in_proj", "output.dense"), ("output.dense",)),
    "RefinedWebModel": (("query_key_value", "dense_4h_to_h"), ("dense_4h_to_h",)),
    "RefinedWeb": (("query_key_value", "dense_4h_to_h"), ("dense_4h_to_h",)),
    "falcon": (("query_key_value", "dense_4h_to_h"), ("dense_4h_to_h",)),
    "phi": (("q_proj", "v_proj", "fc2"), ("fc2",)),
    "gemma": (("q_proj", "v_proj", "down_proj"), ("down_proj",)),
    "gemma2": (("q_proj", "v_proj", "down_proj"), ("down_proj",)),
    "gemma3_text": (("q_proj", "v_proj", "down_proj"), ("down_proj",)),
    "qwen2": (("q_proj", "v_proj", "down_proj"), ("down_proj",)),
    "qwen3": (("q_proj", "v_proj", "down_proj"), ("down_proj",)),
}


def resolve(
    model: nn.Module,
    config: IA3Config,
    frozen: Mapping[str, Frozen] | None = None,
    modules: Mapping[str, nn.Module] | None = None,
    known: list[Target] | None = None,
) -> tuple[IA3Config, list[Target]]:
    """What a config rescales on this model.

    Args:
        model: the base model, possibly with sites of other adapters on it.
        config: `None` fields are filled in: PEFT's defaults where it knows the model's type,
            otherwise the paper's sites.
        frozen: for an adapter that is loaded, module name -> the ranges that stay one. Its entries
            may match nothing: adapters trained with PEFT hold such, and their vectors say what
            they rescale.
        modules: all of the model's modules by name, where they have been looked up.
        known: the targets, where a config of the same `selection` was resolved before on the very
            same modules.

    Returns:
        A copy of the config with its modules named in the forms PEFT reads, and the targets in the
        model's order.

    Raises:
        IA3Error: a name or pattern matches nothing, or a match cannot be rescaled.
    """
    for field in ("target_modules", "exclude_modules", "feedforward_modules"):
        _check_expression(getattr(config, field), field)
    values = config.to_dict()
    values.pop("paper_sites", None)
    if values["base_model_name_or_path"] is None:
        model_config = getattr(model, "config", None)
        values["base_model_name_or_path"] = getattr(model_config, "_name_or_path", None) or None
    why: dict[str, str] = {}
    ranges = dict(frozen or {})
    found: list[PaperTarget] = []
    model_type = model_type_of(model)
    if config.target_modules is None:
        if config.paper_sites or model_type not in ARCHITECTURES:
            found = _paper_targets(model, config)
            values["target_modules"], values["feedforward_modules"] = _entries(model, found)
        else:
            values["target_modules"], default, found = _peft_defaults(model, model_type)
            if config.feedforward_modules is None:
                values["feedforward_modules"] = default
            why = {
                name: f"PEFT's default {entry!r}"
                for entry in values["target_modules"]
                for name in base_modules(model)
                if matches(name, [entry])
            }
        why.update({site.name: site.why for site in found})
        ranges.update({site.name: site.frozen for site in found if site.frozen})
    elif _is_all_linear(config.target_modules):
        linear = [name for name, module in model.named_modules() if linear_features(module)]
        chosen = [name for name in linear if name not in _output_layer(model, config.task_type)]
        values["target_modules"] = names_or_suffixes(model, chosen)
        why = dict.fromkeys(chosen, "linear layer")
    if values["feedforward_modules"] is None:
        values["target_modules"], values["feedforward_modules"] = _default_feedforward(
            model, values["target_modules"]
        )
    # Unknown keys were named when the file was read.
    fields = {key: value for key, value in values.items() if key not in config.unknown}
    resolved = IA3Config(**fields, unknown=dict(config.unknown))
    if modules is None:
        modules = dict(model.named_modules())
    targets = known
    if targets is None:
        named_by = _naming(resolved)
        matching = _matching(model, modules, resolved, strict=frozen is None)
        targets = [
            Target(
                name,
                side,
                activation,
                ranges.get(name, ()),
                why.get(name) or named_by(name, side),
            )
            for name, side, activation in matching
        ]
        for target in targets:
            _check_ranges(target)
    # PEFT warns where its loading has to mend this.
    resolved.fan_in_fan_out = any(isinstance(modules[t.name], Conv1D) for t in targets)
    return resolved, targets


def linear_in_upper_blocks(model: nn.Module, count: int) -> list[str]:
    """The names of all linear layers in a model's uppermost blocks, in the model's order.

    Args:
        model: a decoder-only or encoder-only model; may be on the meta device.
        count: how many blocks.

    Raises:
        IA3Error: the model has not so many blocks, or no one list of them.
    """
    lists = block_lists(model)
    if len(lists) != 1:
        there = f"has blocks in {', '.join(lists)}" if lists else "has no list of blocks"
        raise IA3Error(
            f"upper_blocks: {type(model).__name__} {there}, expected one list, as decoder-only "
            "models have it: rescale all blocks"
        )
    ((name, blocks),) = lists.items()
    if not 1 <= count <= len(blocks):
        raise IA3Error(
            f"upper_blocks is {count}, expected 1 to {len(blocks)}: {type(model).__name__} has "
            f"{len(blocks)} blocks"
        )
    return [
        f"{name}.{index}.{part}"
        for index in range(len(blocks) - count, len(blocks))
        for part, module in blocks[index].named_modules()
        if linear_features(module)
    ]


def selection(config: IA3Config, frozen: Mapping[str, Frozen]) -> Hashable:
    """What decides which modules a resolved config chooses from a model's, and what stays one."""
    modules = (config.target_modules, config.exclude_modules, config.feedforward_modules)
    return (
        *(frozenset(each) if isinstance(each, set) else each for each in modules),
        tuple(config.modules_to_save or ()),
        frozenset((name, tuple(map(tuple, ranges))) for name, ranges in frozen.items() if ranges),
    )


def check_vectors(
    vectors: Mapping[str, Tensor], targets: Sequence[Target], model_name: str
) -> None:
    """Check that an adapter's vectors are those that its targets want.

    Args:
        vectors: module name -> vector.

    Raises:
        IA3Error: a vector is missing, is not expected, or has another shape.
    """
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
        shape = target.activation.shape
        if tuple(vectors[name].shape) != shape or not vectors[name].is_floating_point():
            raise IA3Error(
                f"the adapter does not fit {model_name}: vector {name!r} is "
                f"{list(vectors[name].shape)} {vectors[name].dtype}, expected {list(shape)} "
                f"({math.prod(shape)} values on the {target.side} side)"
            )


def _paper_targets(model: nn.Module, config: IA3Config) -> list[PaperTarget]:
    try:
        return paper_targets(model)
    except IA3Error as error:
        if config.paper_sites:
            raise
        raise IA3Error(
            f"no default target_modules for model type {model_type_of(model)!r} "
            f"({type(model).__name__}): name them in IA3Config(target_modules=[...]); {error}"
        ) from error


def _peft_defaults(
    model: nn.Module, model_type: str
) -> tuple[list[str], list[str], list[PaperTarget]]:
    """PEFT's targets and feed-forward modules, and what stands in for those that match nothing."""
    targets, feedforward = (list(modules) for modules in ARCHITECTURES[model_type])
    names = base_modules(model)
    stale = [entry for entry in targets if not any(matches(name, [entry]) for name in names)]
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
    warnings.warn(
        f"PEFT's default {gone} for {model_type!r} matches nothing in {type(model).__name__}; "
        f"{entries} ({found[0].why}) is rescaled instead",
        stacklevel=4,
    )
    return (
        [entry for entry in targets if entry not in stale] + entries,
        [entry for entry in feedforward if entry not in stale] + entries,
        found,
    )


def _entries(model: nn.Module, found: Iterable[PaperTarget]) -> tuple[list[str], list[str]]:
    """The sites as PEFT's `target_modules` and `feedforward_modules` name them."""
    outputs = [site.name for site in found if site.side == "output"]
    inputs = [site.name for site in found if site.side != "output"]
    feedforward = names_or_suffixes(model, inputs, outputs)
    return names_or_suffixes(model, outputs) + feedforward, feedforward


def _default_feedforward(
    model: nn.Module, targets: str | list[str]
) -> tuple[str | list[str], list[str]]:
    """The targets, and those of them that are a feed-forward's down projection."""
    model_type = model_type_of(model)
    names = base_modules(model)
    if model_type in ARCHITECTURES:
        default = list(ARCHITECTURES[model_type][1])
        # Experts have no module of PEFT's names.
        default += [
            name
            for name in names
            if matches(name, targets) and activation_of(model.get_submodule(name), "inner")
        ]
    else:
        try:
            default = [site.name for site in feedforward_targets(model)]
        except IA3Error:
            default = []
        default = [name for name in default if matches(name, targets)]
    if isinstance(targets, str):
        chosen = [name for name in names if matches(name, targets)]
        return targets, [
            entry for entry in default if any(matches_feedforward(name, [entry]) for name in chosen)
        ]
    return feedforward_among(targets, default)


def _matching(
    model: nn.Module, modules: Mapping[str, nn.Module], config: IA3Config, *, strict: bool
) -> list[tuple[str, Side, Activation]]:
    assert config.target_modules is not None
    assert config.feedforward_modules is not None
    names = own_modules(modules)

    def check(
        modules: str | Iterable[str], field: str, rule: Callable[[str, list[str]], bool] = matches
    ) -> None:
        if strict:
            _check_all_match(modules, names, field, model, rule)

    check(config.target_modules, "target_modules")
    chosen = matched = [name for name in names if matches(name, config.target_modules)]
    # Saved whole, they need no vector; PEFT's rule.
    saved = [f".{entry}." for entry in config.modules_to_save or ()]
    chosen = [name for name in chosen if not any(entry in f".{name}." for entry in saved)]
    if config.exclude_modules:
        check(config.exclude_modules, "exclude_modules")
        chosen = [name for name in chosen if not matches(name, config.exclude_modules)]
    if not chosen:
        raise IA3Error(f"no module of {type(model).__name__} is left to rescale")
    if config.feedforward_modules:
        check(config.feedforward_modules, "feedforward_modules", matches_feedforward)
        if strict and not any(matches_feedforward(n, config.feedforward_modules) for n in matched):
            raise IA3Error(
                f"feedforward_modules {config.feedforward_modules!r} match none of the targets, of "
                f"which {matched[0]!r} is the first: they must be among target_modules"
            )
    matching = []
    for name in chosen:
        module = modules[name]
        feedforward = matches_feedforward(name, config.feedforward_modules)
        side: Side = "output"
        if feedforward:
            side = "inner" if activation_of(module, "inner") else "input"
        activation = activation_of(module, side)
        if activation is None:
            raise IA3Error(
                f"module {name!r} is a {type(module).__name__}, whose {side} cannot be rescaled: "
                f"expected {SUPPORTED}{_hint(module, side)}"
            )
        matching.append((name, side, activation))
    return matching


def _hint(module: nn.Module, side: Side) -> str:
    if activation_of(module, "inner"):
        return "; experts have an inner activation only: name them in feedforward_modules too"
    if isinstance(module, nn.Linear) and activation_of(module, side) is None:
        return "; nn.MultiheadAttention reads its weight without calling it"
    return ""


def _check_ranges(target: Target) -> None:
    for start, end in target.frozen:
        if not 0 <= start < end <= target.activation.dim:
            raise IA3Error(
                f"module {target.name!r}: values {start} to {end} are to stay one, but its "
                f"{target.side} has {target.activation.dim}"
            )


def _naming(config: IA3Config) -> Callable[[str, Side], str]:
    """By module and side: which of the config's entries names it."""
    targets, feedforward = (
        modules if isinstance(modules, str) else sorted(modules or ())
        for modules in (config.target_modules, config.feedforward_modules)
    )

    def why(name: str, side: Side) -> str:
        modules, rule = (
            (targets, matches) if side == "output" else (feedforward, matches_feedforward)
        )
        if isinstance(modules, str):
            return f"matches {modules!r}"
        return f"named by {next(entry for entry in modules if rule(name, [entry]))!r}"

    return why


def _is_all_linear(modules: object) -> bool:
    return isinstance(modules, str) and modules.lower() == "all-linear"


def _output_layer(model: nn.Module, task_type: str | None) -> set[str]:
    """Names of the output layer: the language model's head, or a sequence classifier's."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if head is None and task_type == TaskType.SEQ_CLS:
        head = next((getattr(model, name) for name in CLASSIFIERS if hasattr(model, name)), None)
    if head is None:
        return set()
    return {name for name, module in model.named_modules() if module is head}


def _check_expression(modules: object, field: str) -> None:
    if isinstance(modules, str):
        try:
            re.compile(modules)
        except re.error as error:
            raise IA3Error(f"{field} {modules!r} is not a regular expression: {error}") from error


def _check_all_match(
    modules: str | Iterable[str],
    names: list[str],
    field: str,
    model: nn.Module,
    rule: Callable[[str, list[str]], bool],
) -> None:
    """Every entry must match a module: a silent mismatch would train less than was asked for."""
    kind = type(model).__name__
    if isinstance(modules, str):
        if not any(re.fullmatch(modules, name) for name in names):
            raise IA3Error(f"{field}: the expression {modules!r} matches no whole name in {kind}")
        return
    for module in sorted(modules):
        if not any(rule(name, [module]) for name in names):
            last_parts = {name.rsplit(".", 1)[-1] for name in names} | set(names)
            usual = ARCHITECTURES.get(model_type_of(model), ((), ()))[0]
            hint = did_you_mean(module, usual) or did_you_mean(module, sorted(last_parts))
            raise IA3Error(f"{field}: module {module!r} matches nothing in {kind}{hint}")
