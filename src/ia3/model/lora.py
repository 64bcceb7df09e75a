"""The nearest LoRA to an adapter, for programs that know no other kind.

A vector l changes a weight W by (diag(l) - 1) W, or by W (diag(l) - 1) where it rescales the input.
Of all matrices of a rank, the truncated singular value decomposition is the nearest to that change
by the Frobenius norm. LoRA keeps it as two factors, B A.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..adapter import safetensors
from ..adapter.files import write_saved
from ..adapter.layout import KEY_PREFIX
from ..arguments import check_callable, flag, folder_of, instance, whole
from ..core import quantized, weights
from ..core.activations import linear_features
from ..core.names import base_modules, module_at
from ..core.reached import describe, is_unreached
from ..core.route import LOCK
from ..core.sites import Site
from ..core.spread import any_spread
from ..errors import IA3Error, StateError, naming
from ..files.hub import CONFIG_NAME
from ..files.saved import WEIGHTS_NAME
from ..targets.config import IA3Config
from .ia3_model import DEFAULT_ADAPTER, IA3Model


@dataclass(frozen=True)
class SiteLoss:
    """What a LoRA leaves out of one vector's effect.

    Attributes:
        site: the module's name.
        change: of the change to the weight, by the Frobenius norm, 0 to 1; 0 where there is none.
        bias: of the bias, how large the change is that is left out; 0 where none is.
    """

    site: str
    change: float
    bias: float


@dataclass(frozen=True)
class Factors:
    """A linear layer's LoRA: `a` is `[rank, in]`, `b` `[out, rank]`, `bias` `[out]`; float32."""

    a: Tensor
    b: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class LoRA:
    """The LoRA that `nearest_lora` found.

    Attributes:
        rank: of the product of each two factors, at most.
        factors: module name -> its factors.
        losses: what is left out, one a module.
    """

    rank: int
    factors: Mapping[str, Factors]
    losses: tuple[SiteLoss, ...]
    _config: Mapping[str, Any]
    _copies: Mapping[str, Tensor]

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write PEFT's `adapter_config.json` and `adapter_model.safetensors`.

        Args:
            save_directory: made if absent.

        Raises:
            InvalidTypeError: the folder is of another type.
            NotAFolderError: there is a file of that name.
            IA3Error: the folder's name is malformed.
            OSError: the disk is full or may not be written; what was there before stays.
        """
        folder = folder_of("save_directory", save_directory)
        tensors = {f"{KEY_PREFIX}{name}": value for name, value in self._copies.items()}
        for name, own in self.factors.items():
            parts = {"lora_A.weight": own.a, "lora_B.weight": own.b, "lora_B.bias": own.bias}
            for end, value in parts.items():
                if value is not None:
                    tensors[f"{KEY_PREFIX}{name}.{end}"] = value
        config = json.dumps(self._config, indent=2).encode()
        content = safetensors.write(tensors, {"format": "pt"})
        write_saved(folder, {WEIGHTS_NAME: content, CONFIG_NAME: config})

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Within the context, a base model computes with this LoRA.

        Args:
            model: the model, or one like it, that the adapter was on.
        """
        with ExitStack() as hooks:
            for name, own in self.factors.items():
                hook = partial(_add, own)
                hooks.callback(module_at(model, name).register_forward_hook(hook).remove)
            yield


def _add(own: Factors, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    a, b = own.a.to(output), own.b.to(output)
    bias = None if own.bias is None else own.bias.to(output)
    return output + nn.functional.linear(nn.functional.linear(args[0].to(output), a), b, bias)


def nearest_lora(
    model: IA3Model,
    rank: int,
    adapter_name: str = DEFAULT_ADAPTER,
    *,
    bias: bool = False,
    progress: Callable[[int], None] | None = None,
) -> LoRA:
    """The LoRA of a rank that is nearest to an adapter's effect on the weights.

    A vector scales an activation, and no change of low rank says the same: `losses` tells what is
    left out. At a rank as high as a weight's smaller side nothing is, but the changes of biases.

    Args:
        model: the adapter's model.
        rank: of each product.
        adapter_name: which adapter.
        bias: also write what a vector changes in its module's bias, as the bias of LoRA's second
            factor. PEFT reads that (`lora_bias`), and few servers do.
        progress: called with the number of modules done since the last call.

    Raises:
        InvalidTypeError: an argument is of another type.
        UnknownNameError: there is no adapter of that name.
        StateError: the weights are spread over processes, or FSDP has the vectors in pieces.
        IA3Error: the rank is not above 0, or higher than any weight has; or a module is none that
            LoRA can say this of: only linear layers are.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from ia3 import IA3Config, get_peft_model, nearest_lora
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4}
        >>> base = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, num_hidden_layers=1))
        >>> model = get_peft_model(base, IA3Config(target_modules=["k_proj"]))
        >>> for vector in model.vectors("default").values():
        ...     vector.data[:4] = 2.0  # four of sixteen rows: a change of rank 4
        >>> [nearest_lora(model, rank).losses[0].change > 1e-6 for rank in (2, 4)]
        [True, False]
    """
    instance("model", model, IA3Model, "an IA3Model")
    whole("rank", rank, 1)
    bias = flag("bias", bias)
    check_callable("progress", progress)
    base, adapters = model.model, model._adapters
    with LOCK, torch.no_grad():
        adapters.check_known([adapter_name])
        if any_spread(base):
            raise StateError(
                "the model's weights are spread over processes (FSDP or tensor parallelism): save "
                "the adapter, and load it on a model that is not"
            )
        stored = adapters.stored(adapter_name)
        sites = adapters.sites_of(adapter_name)
        with naming(f"no LoRA can say what adapter {adapter_name!r} does"):
            for name, site in sites:
                _check(base, name, site, adapter_name, stored.copies)
        sizes = [min(linear_features(module_at(base, name)) or ()) for name, _ in sites]
        if rank > max(sizes):
            raise IA3Error(
                f"rank is {rank:,}, expected at most {max(sizes):,}: no weight that is rescaled "
                "has more"
            )
        factors, losses = {}, []
        for name, site in sites:
            module = module_at(base, name)
            vector = site.product((adapter_name,)).detach().double().cpu().flatten()
            values = _weight(adapters.merge.original, name, module).detach().double().cpu()
            if site.side == "output":
                change = (vector - 1)[:, None] * values
            else:
                change = values * (vector - 1)
            a, b = _nearest(change, rank)
            left_out, own = 0.0, None
            constant = getattr(module, "bias", None) if site.side == "output" else None
            if constant is not None:
                constant = adapters.merge.original(name, "bias").detach().double().cpu()
                moved = (vector - 1) * constant
                own = moved.float() if bias else None
                left_out = 0.0 if bias else _ratio(moved, constant)
            if bias and own is None:
                own = torch.zeros(len(b))  # PEFT has it for all or none
            factors[name] = Factors(a, b, own)
            lost = _ratio(change - b.double() @ a.double(), change)
            losses.append(SiteLoss(name, lost, left_out))
            if progress is not None:
                progress(1)
        config = _config(base, stored.config, list(factors), rank, bias)
    return LoRA(rank, factors, tuple(losses), config, stored.copies)


def _check(
    base: nn.Module, name: str, site: Site, adapter: str, copies: Mapping[str, Tensor]
) -> None:
    """Raise `IA3Error` where a module is not a product with a weight, which the vector scales."""
    module = module_at(base, name)
    if linear_features(module) is None:
        raise IA3Error(f"{name!r} is a {type(module).__name__}, expected linear layers alone")
    if is_unreached(base, name):
        raise IA3Error(f"{describe([name])}, so that its vector has no effect")
    if any(copy.rpartition(".")[0] == name for copy in copies):
        raise IA3Error(f"{name!r} is rescaled, and has a weight of its own (modules_to_save)")
    if not quantized.is_quantized(module):
        vector = site.product((adapter,)).detach().flatten()
        weights.products(module, name, {site.side: vector})


def _weight(original: Callable[[str, str], Any], name: str, module: nn.Module) -> Tensor:
    """A linear layer's weight, `[out, in]`, as no adapter is merged into it."""
    if quantized.is_quantized(module):
        return quantized.dequantised(module, torch.float32).weight
    weight: Tensor = original(name, "weight")
    return weight.T if isinstance(module, Conv1D) else weight


def _nearest(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors `[rank, in]` and `[out, rank]`, float32, of the nearest matrix of that rank.

    The largest singular vectors on the smaller side are those of a square matrix, which takes a
    part of the time; in float64 squaring costs nothing of float32.
    """
    is_wide = matrix.shape[0] <= matrix.shape[1]
    wide = matrix if is_wide else matrix.T
    _, vectors = torch.linalg.eigh(wide @ wide.T)  # from the smallest to the largest
    left = vectors[:, -rank:].flip(1)
    right = left.T @ wide
    a, b = (right, left) if is_wide else (left.T, right.T)
    missing = rank - a.shape[0]
    a, b = nn.functional.pad(a, (0, 0, 0, missing)), nn.functional.pad(b, (0, missing))
    return a.float().contiguous(), b.float().contiguous()


def _ratio(part: Tensor, whole: Tensor) -> float:
    norm = float(whole.norm())
    return float(part.norm()) / norm if norm else 0.0


def _config(
    base: nn.Module, config: IA3Config, names: list[str], rank: int, bias: bool
) -> dict[str, Any]:
    """PEFT's config of it; what is not said has PEFT's defaults."""
    ends = sorted({name.rpartition(".")[2] for name in names})
    meant = [name for name in base_modules(base) if name.rpartition(".")[2] in ends]
    said = {
        "peft_type": "LORA",
        "task_type": config.task_type,
        "auto_mapping": config.auto_mapping,
        "base_model_name_or_path": config.base_model_name_or_path,
        "revision": config.revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": all(isinstance(module_at(base, name), Conv1D) for name in names),
        # As PEFT matches them: a last part means every module that has it.
        "target_modules": ends if {*meant} == {*names} else sorted(names),
        "modules_to_save": config.modules_to_save and sorted(config.modules_to_save),
    }
    # Older readers do not know it.
    return said | ({"lora_bias": True} if bias else {})
