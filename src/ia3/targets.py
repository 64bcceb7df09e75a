"""From a config and a model to the sites: which module, which side, how many values."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import IA3Config, feedforward_among, matches, matches_feedforward
from .errors import IA3Error, did_you_mean

Side = Literal["output", "input"]

# The name under which a module's vectors are registered on it.
ATTRIBUTE = "ia3_l"

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


def vector_shape(side: Side, dim: int) -> tuple[int, int]:
    """PEFT's shape of a vector, in memory and on disk: a column on an output, a row on an input."""
    return (1, dim) if side == "input" else (dim, 1)


@dataclass(frozen=True)
class Target:
    """A module to rescale: its name, which side of it, and how many values that side has."""

    name: str
    side: Side
    dim: int


def with_defaults(model: nn.Module, config: IA3Config) -> IA3Config:
    """A copy of the config whose `None` fields are filled in for this model.

    Raises:
        IA3Error: no `target_modules` were given and the model's type has no defaults.
    """
    values = config.to_dict()
    model_config = getattr(model, "config", None)
    if values["base_model_name_or_path"] is None:
        values["base_model_name_or_path"] = getattr(model_config, "_name_or_path", None) or None
    model_type = _model_type(model)
    if values["target_modules"] is None:
        if model_type not in ARCHITECTURES:
            raise IA3Error(
                f"no default target_modules for model type {model_type!r} "
                f"({type(model).__name__}): name them in IA3Config(target_modules=[...])"
            )
        values["target_modules"] = list(ARCHITECTURES[model_type][0])
        if values["feedforward_modules"] is None:
            values["feedforward_modules"] = list(ARCHITECTURES[model_type][1])
    if values["feedforward_modules"] is None:
        default = ARCHITECTURES.get(model_type, ((), ()))[1]
        if isinstance(values["target_modules"], str):
            names = [name for name, _ in model.named_modules()]
            values["feedforward_modules"] = [
                module
                for module in default
                if any(matches_feedforward(name, [module]) for name in names)
            ]
        else:
            values["target_modules"], values["feedforward_modules"] = feedforward_among(
                values["target_modules"], default
            )
    # Both are recorded in the forms PEFT reads; unknown keys were named when the file was read.
    known = {key: value for key, value in values.items() if key not in config.unknown}
    return IA3Config(**known, unknown=dict(config.unknown))


def find_targets(model: nn.Module, config: IA3Config, *, strict: bool = True) -> list[Target]:
    """The modules that a config with its defaults filled in rescales, in the model's order.

    Args:
        model: the base model; sites already on it are passed over.
        config: with its defaults filled in.
        strict: every entry of a list must match a module. Adapters trained with PEFT may hold
            entries that match nothing; their vectors say what they rescale.

    Raises:
        IA3Error: a name or pattern matches nothing, or a match cannot be rescaled.
    """
    assert config.target_modules is not None
    assert config.feedforward_modules is not None
    names = [name for name, _ in model.named_modules() if name and name.split(".")[-1] != ATTRIBUTE]

    def check(
        modules: str | Iterable[str], field: str, rule: Callable[[str, list[str]], bool] = matches
    ) -> None:
        _check_expression(modules, field)
        if strict:
            _check_all_match(modules, names, field, model, rule)

    linear = {name for name, module in model.named_modules() if _features(module) is not None}
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        chosen = sorted(linear - _output_layer(model), key=names.index)
    else:
        check(config.target_modules, "target_modules")
        chosen = [name for name in names if matches(name, config.target_modules)]
    if config.exclude_modules:
        check(config.exclude_modules, "exclude_modules")
        chosen = [name for name in chosen if not matches(name, config.exclude_modules)]
    if not chosen:
        raise IA3Error(f"no module of {type(model).__name__} is left to rescale")
    if config.feedforward_modules:
        check(config.feedforward_modules, "feedforward_modules", matches_feedforward)
    targets = []
    for name in chosen:
        features = _features(model.get_submodule(name))
        if features is None:
            raise IA3Error(
                f"module {name!r} is a {type(model.get_submodule(name)).__name__}, which cannot "
                "be rescaled: expected Linear or Conv1D"
            )
        side: Side = "input" if matches_feedforward(name, config.feedforward_modules) else "output"
        targets.append(Target(name, side, features[0] if side == "input" else features[1]))
    return targets


def _model_type(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", None))


def _features(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return None


def _output_layer(model: nn.Module) -> set[str]:
    """Names of the output layer: the language model's head or a classifier's."""
    get_output = getattr(model, "get_output_embeddings", None)
    head = get_output() if get_output is not None else None
    names = {name for name, module in model.named_modules() if head is not None and module is head}
    return names or {name for name in ("score", "classifier") if hasattr(model, name)}


def _check_expression(modules: str | Iterable[str], field: str) -> None:
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
            usual = ARCHITECTURES.get(_model_type(model), ((), ()))[0]
            hint = did_you_mean(module, usual) or did_you_mean(module, sorted(last_parts))
            raise IA3Error(f"{field}: module {module!r} matches nothing in {kind}{hint}")
