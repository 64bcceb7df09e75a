"""Adapters in other layouts: the (IA)³ vectors of the T-Few authors' code."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..base.loading import first_line, read_model_config
from ..core.activations import activation_of
from ..core.names import modules_of
from ..errors import BrokenFileError, IA3Error, did_you_mean, shown
from ..targets.config import IA3Config
from ..targets.matching import names_or_suffixes
from ..targets.structure import paper_targets
from .files import check_finite
from .pickled import check_archive, unpickle_tensors

SUFFIX = ".multi_lora_b"


def convert_tfew_authors(path: str | Path, model: nn.Module) -> tuple[IA3Config, dict[str, Tensor]]:
    """(config, module name -> vector) of the T-Few authors' `.pt` file, as PEFT has it.

    Their feed-forward vector is on the output of `wi_1`, half of the gated layer's product; the
    other half is not scaled, so that it is just as well on the product, the input of `wo`. Nothing
    but tensors is unpickled: a file cannot run code. The model, a T5 v1.1 with gated layers, may be
    on the meta device. The vectors are float32, on the CPU: `[dim, 1]` on the outputs of `k` and
    `v`, `[1, dim]` on the input of `wo`.

    Raises:
        BrokenFileError: the file holds something else than (IA)³ vectors.
        IA3Error: they do not fit the model.
    """
    vectors = _read(Path(path))
    kind = type(model).__name__
    modules = modules_of(model)
    # Module name in their file -> our module's name and side.
    sites = {}
    for target in paper_targets(model):
        parent, _, last = target.name.rpartition(".")
        theirs = f"{parent}.wi_1" if (target.side, last) == ("input", "wo") else target.name
        if last not in ("k", "v", "wo") or theirs not in modules:
            raise IA3Error(
                f"{path} is for a T5 with gated feed-forward layers (k, v, wi_1 and wo, as T5 v1.1 "
                f"and T0 have), which {kind} is not: it has {target.name!r}"
            )
        sites[theirs] = target
    for name in sorted(vectors.keys() - sites.keys()):
        raise IA3Error(
            f"{path}: tensor {shown(name + SUFFIX)} has no site in {kind}, which has "
            f"{len(sites)} where the file has {len(vectors)}{did_you_mean(name, sites)}"
        )
    converted = {}
    for theirs, target in sites.items():
        activation = activation_of(modules[target.name], target.side)
        assert activation is not None
        expected = [activation.dim, 1]
        if theirs not in vectors:
            raise IA3Error(
                f"{path}: tensor {theirs + SUFFIX!r} {expected} is missing: {kind} has "
                f"{len(sites)} sites, the file has {len(vectors)}"
            )
        found = list(vectors[theirs].shape)
        if found != expected:
            raise IA3Error(
                f"{path}: tensor {theirs + SUFFIX!r} is {found}, expected {expected} in {kind}: is "
                "this the model it was trained on?"
            )
        converted[target.name] = vectors[theirs].reshape(activation.shape).float()
    outputs = [target.name for target in sites.values() if target.side == "output"]
    inputs = [target.name for target in sites.values() if target.side == "input"]
    feedforward = names_or_suffixes(model, inputs, apart_from=outputs)
    config = IA3Config(
        task_type="SEQ_2_SEQ_LM",
        target_modules=[*names_or_suffixes(model, outputs), *feedforward],
        feedforward_modules=feedforward,
    )
    return config, converted


def structure_of(name: str | Path) -> nn.Module:
    """An encoder-decoder on the meta device, from its config alone; an `IA3Error` if it is none."""
    from transformers import AutoModelForSeq2SeqLM

    config = read_model_config(str(name), str(name))
    if not config.is_encoder_decoder:
        raise IA3Error(
            f"the model {str(name)!r} is a {config.model_type}, expected a T5 with gated "
            "feed-forward layers, such as T0"
        )
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForSeq2SeqLM.from_config(config, trust_remote_code=False)
            return model
    except Exception as error:  # numbers that do not go together fail anywhere
        raise IA3Error(
            f"the config of {str(name)!r} describes no model: {first_line(error)}"
        ) from error


def _read(path: Path) -> dict[str, Tensor]:
    """The vectors in the authors' file, without the ending of their names."""
    expected = f"expected vectors named like 'encoder.block.0.layer.0.SelfAttention.k{SUFFIX}'"
    check_archive(path, expected)
    tensors = unpickle_tensors(path.read_bytes(), path, expected)
    if not isinstance(tensors, dict) or not tensors:
        raise BrokenFileError(f"{path} holds {_described(tensors)}, {expected}")
    for key, tensor in tensors.items():
        if not (isinstance(key, str) and key.endswith(SUFFIX)):
            raise BrokenFileError(f"{path}: {shown(key)} is not an (IA)³ vector, {expected}")
        if not (isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.is_floating_point()):
            raise BrokenFileError(
                f"{path}: {shown(key)} is {_described(tensor)}, expected floating-point values "
                "[dim, 1]"
            )
    vectors = {key.removesuffix(SUFFIX): tensor for key, tensor in tensors.items()}
    try:
        check_finite(vectors)
    except IA3Error as error:
        raise BrokenFileError(f"{path}: {error}") from error
    return vectors


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {value.dtype}"
    return "an empty dict" if value == {} else f"a {type(value).__name__}"
