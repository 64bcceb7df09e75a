"""What a config would rescale, printed as a table."""

from __future__ import annotations

import math
from collections import defaultdict

from torch import nn

from ..core.names import Target, model_type_of
from .config import IA3Config
from .resolve import resolve


def explain(model: nn.Module, config: IA3Config | None = None) -> None:
    """Print which modules of a model would be rescaled, how many values, and why.

    Modules that differ only in the number of their layer share a line, with a `*` for the number.
    The columns are the module's name; its side that is rescaled (`output`, `input`, or `inner` of
    experts); how many such modules there are; how many values the vector of one has; and why it was
    chosen. The last line is the size of the whole adapter in float32.

    Args:
        model: the base model, which is not changed; it may be on the meta device.
        config: what to rescale; `IA3Config()`, the defaults for the architecture, if not given.

    Raises:
        IA3Error: the config does not fit the model: a name matches nothing, a module cannot be
            rescaled, or there are no defaults for such a model.

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
    _, targets = resolve(model, config or IA3Config())
    model_type = model_type_of(model)
    print(type(model).__name__ + (f" ({model_type})" if model_type != "None" else ""))
    rows = [("module", "side", "times", "values", "why"), *_rows(targets)]
    name, side, times, values = (max(len(row[column]) for row in rows) for column in range(4))
    for row in rows:
        print(
            f"{row[0]:<{name}}  {row[1]:<{side}}  {row[2]:>{times}}  {row[3]:>{values}}  {row[4]}"
        )
    total = sum(math.prod(target.activation.shape) for target in targets)
    modules = "1 module" if len(targets) == 1 else f"{len(targets)} modules"
    frozen = sum(end - start for target in targets for start, end in target.frozen)
    stay = f", {frozen:,} of them stay one" if frozen else ""
    print(f"{modules}, {total:,} values, {4 * total:,} bytes{stay}")


def _rows(targets: list[Target]) -> list[tuple[str, ...]]:
    alike: dict[object, list[Target]] = defaultdict(list)
    for target in targets:
        shape = target.activation.shape
        alike[_starred(target), target.side, shape, target.frozen, target.why].append(target)
    return [
        (
            _starred(first) if others else first.name,
            first.side,
            str(1 + len(others)),
            f"{math.prod(first.activation.shape):,}",
            first.why,
        )
        for first, *others in alike.values()
    ]


def _starred(target: Target) -> str:
    return ".".join("*" if part.isdigit() else part for part in target.name.split("."))
