"""An adapter with its base model, and merged into it as a plain folder for any other program."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel

from ..adapter.files import Adapter, unread_adapter
from ..adapter.layout import open_folder
from ..base.encoders import read_transformer
from ..base.loading import first_line, loading, read_model_config
from ..base.model_folder import (
    TOKENIZER_FILES,
    base_folder,
    copy_beside,
    copy_tokenizer,
    is_here,
    transformer_in,
)
from ..errors import BrokenFileError, IA3Error, counted, shown
from ..files.atomic import new_folder_beside
from ..files.hub import CONFIG_NAME, adapter_folder
from ..files.saved import HEAD_NAME
from ..targets.config import TaskType
from .auto import AutoPeftModel
from .heads import HEADS, fresh_modules
from .ia3_model import DEFAULT_ADAPTER, IA3Model

GENERATION = "generation_config.json"
# What a config says of the program that wrote it, and not of the model.
_OF_WRITERS = ("_name_or_path", "architectures", "dtype", "transformers_version")


@dataclass(frozen=True)
class OnBase:
    """An adapter on a base model of its own.

    Attributes:
        model: the base has its checkpoint's dtype.
        base: the base model's name.
        source: the base model's folder; of one on the hub, with all but its weights.
        inside: where in it transformers' model lies; of most, in itself: `""`.
        adapter: the adapter's folder.
    """

    model: IA3Model
    base: str
    source: Path
    inside: str
    adapter: Path


def on_its_base(adapter: str | Path, base: str | None = None) -> OnBase:
    """An adapter on the base model that its config names, or on another copy of it.

    Args:
        adapter: its folder or its id on the hub.
        base: where its base model lies, if not where its config says.

    Raises:
        MissingFileError: there is no adapter, or no base model.
        BrokenFileError: one of the adapter's files is broken, or the base model lacks weights.
        MismatchError: the adapter does not fit its base model.
        MissingExtraError: the embedded base model's package is not installed.
        IA3Error: the adapter names no base model, or that cannot be loaded, or brings code of its
            own: none is run.
    """
    folder = adapter_folder(adapter, ["adapter_*", *TOKENIZER_FILES])
    with open_folder(folder) as saved:
        stored = unread_adapter(saved)
    name = base or stored.config.base_model_name_or_path
    if not name:
        raise IA3Error(f"{folder / CONFIG_NAME} names no base model: say which, by --model")
    source = base_folder(name, stored.config.revision)
    inside = transformer_in(source)
    options: dict[str, Any] = {"dtype": "auto"}
    # Of most models on the hub, what was fetched lacks the weights.
    place = str(source / inside) if inside or is_here(name) else name
    labels = _labels_of(stored)
    if labels not in (None, read_model_config(str(source / inside), name).num_labels):
        options["num_labels"] = labels
    config = replace(stored.config, base_model_name_or_path=place)
    is_sentences = (source / "modules.json").is_file() or (folder / HEAD_NAME).is_file()
    if is_sentences and config.task_type == TaskType.FEATURE_EXTRACTION:
        with loading(name):
            of_base = read_model_config(str(source / inside), name)
            options["revision"] = config.revision
            transformer = read_transformer(place, of_base, name, **options)
        model = IA3Model.from_pretrained(transformer, folder, config=config)
    else:
        kind: Any = AutoPeftModel
        try:
            model = kind.from_pretrained(folder, config=config, **options)
        except IA3Error:
            raise
        except Exception:
            with loading(name):  # it says what a user can mend
                raise
    copied = {value.rpartition(".")[0] for value in stored.copies}
    random = [each for each in fresh_modules(model.model) or () if each not in copied]
    if random == ["pooler.dense"] and random[0] not in model.targeted_module_names:
        # transformers makes one for any checkpoint of an encoder.
        cast("Any", model.model).pooler = None
    elif random:
        raise BrokenFileError(
            f"{name!r} has no weights for {counted(len(random), 'module')}, {shown(random[0])} the "
            "first, and the adapter brings none: they would be random"
        )
    model.peft_config[DEFAULT_ADAPTER].base_model_name_or_path = name
    return OnBase(model, name, source, inside, folder)


def _labels_of(adapter: Adapter) -> int | None:
    """How many labels a classification head has that comes with an adapter; `None` without one."""
    heads = HEADS.get(adapter.config.task_type, ())
    rows = [
        value.shape[0]
        for name, value in adapter.copies.items()
        if value.dim() == 2 and any(part in heads for part in name.split("."))
    ]
    # Before its last layer, a head has as many values as the model.
    return min(rows, default=None)


def write_merged(loaded: OnBase, out: Path) -> PreTrainedModel:
    """Merge an adapter for good, and write the model with its tokenizer: a folder as any other.

    It is written beside `out`, and takes its place when it is whole. What the base model's folder
    has that no vector changes is copied as it is, `config.json` too where all of it still holds:
    so it stays in words that older versions and other programs read.

    Raises:
        IA3Error: a weight cannot take a vector exactly, a result is not finite, or transformers
            cannot save the model's kind of quantization.
        OSError: the disk is full or may not be written.
    """
    merged: Any = loaded.model.merge_and_unload(safe_merge=True)
    if not isinstance(merged, PreTrainedModel):
        raise IA3Error(f"a {type(merged).__name__} cannot be written: it is none of transformers'")
    out = out.resolve()  # a link to a folder stays one
    out.parent.mkdir(parents=True, exist_ok=True)
    with new_folder_beside(out) as staging:
        folder = staging / "model"
        place = folder / loaded.inside
        place.mkdir(parents=True)
        _save(merged, place, loaded.source / loaded.inside)
        own_tokenizer = (loaded.adapter / "tokenizer_config.json").is_file()
        copy_beside(loaded.source, folder, tokenizer=not own_tokenizer)
        if own_tokenizer:
            copy_tokenizer(loaded.adapter, place)
        _settle(folder, (place / "config.json").stat().st_mode)
        if out.exists():
            os.rename(out, staging / "before")
        os.rename(folder, out)
    return merged


def _save(model: Any, folder: Path, source: Path) -> None:
    """Write weights and config, both as the base model in `source` has them if they may."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_serializable():
        method = quantizer.quantization_config.quant_method
        raise IA3Error(
            f"transformers cannot save a model quantized by {getattr(method, 'value', method)}: "
            "merge the adapter into the model that it was quantized from, which --model names"
        )
    if model.can_generate():
        # The base model's own is copied, and is often one that transformers reads but not writes.
        model.generation_config = GenerationConfig()
    try:
        # transformers cannot undo how it has read weights that were quantized; they need it not.
        model.save_pretrained(folder, save_original_format=quantizer is None)
    except SafetensorError as error:
        # What it says of a disk; files are all that it is given.
        raise OSError(errno.EIO, first_line(error), str(folder)) from error
    (folder / GENERATION).unlink(missing_ok=True)
    before = source / "config.json"
    was = read_model_config(str(source), str(source))
    if was.architectures == model.config.architectures and _said(was) == _said(model.config):
        shutil.copyfile(before, folder / "config.json")


def _settle(folder: Path, mode: int) -> None:
    """Have all files on the disk, and readable by whom the usual permissions let read."""
    for path in folder.rglob("*"):
        if path.is_file():
            # The safetensors package makes files for their owner alone.
            path.chmod(mode)
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _said(config: Any) -> dict[str, Any]:
    return {key: v for key, v in config.to_dict().items() if key not in _OF_WRITERS}
