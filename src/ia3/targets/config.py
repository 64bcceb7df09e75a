"""What to rescale: `IA3Config`, with PEFT's names and PEFT's `adapter_config.json`."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from ..arguments import folder_of, path_of
from ..errors import (
    BrokenFileError,
    IA3Error,
    InvalidTypeError,
    MissingFileError,
    UnknownNameError,
    did_you_mean,
    naming,
    shown,
)
from ..files.atomic import write_files
from ..files.foreign import no_adapter, owner_of_config
from ..files.hub import CONFIG_NAME, adapter_folder, hub_options, upload
from ..files.json import check_plain, parse_object
from ..files.saved import SavedFolder
from .matching import LONGEST_NAME, compiled, feedforward_among

Entries = str | list[str] | set[str] | tuple[str, ...]
Modules = Entries | None
T = TypeVar("T")


class TaskType(StrEnum):
    """What a model is for, in PEFT's words."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(StrEnum):
    """The kinds of adapters this library knows, in PEFT's words."""

    IA3 = "IA3"


OTHER_TASK = "; leave it out for another task, whose head modules_to_save can name"

# A config of ten thousand names has a tenth of the first; the second is a path's. Each entry of
# `modules_to_save` is looked for among all modules, and each that is found is copied.
LARGEST = 1 << 24
LONGEST_TEXT = 4096
MOST_SAVED = 1000

# Fields, the type that a file may get wrong, and what is expected; others have their own checks.
_TYPES: list[tuple[str, Any, str]] = [
    ("peft_version base_model_name_or_path revision", str | None, "a string"),
    ("inference_mode fan_in_fan_out init_ia3_weights paper_sites", bool, "True or False"),
    ("auto_mapping", dict | None, "a mapping"),
    ("unknown", dict, "a mapping"),
]


def _naming_unknown_arguments(kind: type[T]) -> type[T]:
    """Have a dataclass say which arguments it has, where it is given another."""
    plain: Callable[..., None] = kind.__init__
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]

    @functools.wraps(plain)
    def init(self: T, *args: Any, **given: Any) -> None:
        for name in given:
            if name not in known:
                hint = did_you_mean(name, known) or f"; it has {', '.join(known)}"
                raise InvalidTypeError(f"{kind.__name__} has no argument {name!r}{hint}")
        plain(self, *args, **given)

    kind.__init__ = init  # type: ignore[method-assign, assignment]
    return kind


@_naming_unknown_arguments
@dataclass
class IA3Config:
    """Which activations of a model get a learned vector, in the fields of PEFT's `IA3Config`.

    Every field has a default; what is `None` is filled in for the model, in a copy of the config
    (`model.peft_config[name]`). Three fields choose modules, each in one of these forms:

    - a list of names: `"k"` names every module called `k` or `….k`, `"attn.k"` those in an `attn`;
    - a string: a regular expression that must match a module's whole name;
    - `None`: see the field.

    Args:
        task_type: a `TaskType` or its name, e.g. `"CAUSAL_LM"`: which class `get_peft_model`
            returns. For sequence and token classification the classifier is trained and saved too.
        peft_type: always `"IA3"`.
        auto_mapping: PEFT's hint for finding the base model's class.
        peft_version: of the PEFT that wrote the adapter; `None` where this library did.
        base_model_name_or_path: the base model's name or folder; filled in from the model.
        revision: the base model's revision on the hub.
        inference_mode: the adapter's vectors do not require gradients.
        target_modules: the modules to rescale. `"all-linear"` is every linear layer but the output
            layer. `None` is PEFT's default for the architectures that PEFT knows and `paper_sites`
            for the others.
        exclude_modules: those of the targets to leave out; none if `None`.
        feedforward_modules: those of the targets whose *input* is rescaled (in a feed-forward
            layer's down projection: the inner activation of the paper) and not their output.
            `None` is the down projections among the targets.
        fan_in_fan_out: the weight is stored `[in, out]`; recorded for PEFT, found from the module.
        modules_to_save: further modules to train and save in full, by the ends of their names.
        init_ia3_weights: start from ones, which change nothing; else from a normal distribution.
        paper_sites: choose the activations of the paper (section 3.3) on any architecture: keys,
            values and the feed-forward inner activation. PEFT's defaults rescale the queries of
            several architectures, and all of a fused q-k-v projection, whose query part stays one
            here.
        unknown: keys of a file that are none of these fields; kept and written back.

    Raises:
        InvalidTypeError: a field has a value of another type, or there is no such field.
        IA3Error: a value is none of the known ones, an expression is malformed,
            `feedforward_modules` names modules that are not among `target_modules`, or
            `paper_sites` comes with modules. Names that match no module are an error when the
            config meets a model.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from ia3 import IA3Config, get_peft_model
        >>> sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32}
        >>> layers = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
        >>> base = LlamaForCausalLM(LlamaConfig(**sizes, **layers))
        >>> config = IA3Config(target_modules=["v_proj", "down_proj"], task_type="CAUSAL_LM")
        >>> model = get_peft_model(base, config)
        >>> model.peft_config["default"].feedforward_modules
        {'down_proj'}
        >>> {name: tuple(vector.shape) for name, vector in model.vectors("default").items()}
        {'model.layers.0.self_attn.v_proj': (8, 1), 'model.layers.0.mlp.down_proj': (1, 32)}
    """

    # In PEFT's order, and then this library's own.
    task_type: str | None = None
    peft_type: str = "IA3"
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    target_modules: Modules = None
    exclude_modules: Modules = None
    feedforward_modules: Modules = None
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    init_ia3_weights: bool = True
    paper_sites: bool = False
    unknown: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for names, kinds, expected in _TYPES:
            for name in names.split():
                value = getattr(self, name)
                if not isinstance(value, kinds):
                    raise InvalidTypeError(f"{name} is {shown(value)}, expected {expected}")
                if isinstance(value, str):
                    _check_text(value, name, LONGEST_TEXT)
        for name in ("auto_mapping", "unknown"):
            check_plain(getattr(self, name), name)
        if self.peft_type != "IA3":
            raise IA3Error(f"peft_type is {shown(self.peft_type)}, expected 'IA3'")
        self.peft_type = PeftType.IA3
        if self.task_type is not None:
            known, given = list(TaskType), self.task_type
            if given not in known:
                hint = did_you_mean(given, known) or OTHER_TASK
                message = f"task_type is {shown(given)}, expected one of {', '.join(known)}{hint}"
                raise IA3Error(message)
            self.task_type = TaskType(given)
        saved = self.modules_to_save
        if saved is not None:
            listed = isinstance(saved, list | tuple | set)
            if not listed or not all(isinstance(name, str) and name for name in saved):
                is_given = f"modules_to_save is {shown(saved)}"
                raise InvalidTypeError(f"{is_given}, expected a list of names")
            for name in saved:
                _check_text(name, "modules_to_save: a name", LONGEST_NAME)
            if len(saved) > MOST_SAVED:
                raise IA3Error(f"modules_to_save has {len(saved)} names, at most {MOST_SAVED}")
            self.modules_to_save = sorted(saved) if isinstance(saved, set) else list(saved)
        for name in ("target_modules", "exclude_modules", "feedforward_modules"):
            setattr(self, name, _as_set(getattr(self, name), name))
        targets, feedforward = self.target_modules, self.feedforward_modules
        if self.paper_sites and (targets is not None or feedforward is not None):
            both = "target_modules and feedforward_modules"
            raise IA3Error(f"paper_sites=True chooses {both} itself: leave them out")
        if isinstance(targets, set) and isinstance(feedforward, set) and not feedforward <= targets:
            raise IA3Error(
                f"feedforward_modules {shown(sorted(feedforward - targets))} are not among "
                f"target_modules {shown(sorted(targets))}: add them there too"
            )

    # The Trainer asks every config of PEFT's.
    is_prompt_learning = False
    is_adaption_prompt = False

    def to_dict(self) -> dict[str, Any]:
        """The fields as they stand in `adapter_config.json`, sets as sorted lists.

        `paper_sites` is among them only while it has not been resolved into modules, and
        `peft_version` only where it is known.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "unknown"}
        values |= self.unknown
        if not self.paper_sites:
            del values["paper_sites"]
        if self.peft_version is None:
            del values["peft_version"]
        return {
            key: sorted(value) if isinstance(value, set) else value
            for key, value in sorted(values.items())
        }

    def to_json(self) -> str:
        """The text of `adapter_config.json`."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "config") -> IA3Config:
        """Build from the keys of an `adapter_config.json`; unknown keys are kept and named.

        Raises:
            InvalidTypeError: it is no mapping of names to values, or a value is of another type.
            UnknownNameError: it is the config of another kind of adapter.
            IA3Error: a value makes no sense.
        """
        if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
            expected = "expected a mapping of the fields' names to values"
            raise InvalidTypeError(f"{source} is {shown(values)}, {expected}")
        peft_type = values.get("peft_type", "IA3")
        if not isinstance(peft_type, str):
            raise InvalidTypeError(f"{source}: peft_type is {shown(peft_type)}, expected 'IA3'")
        if peft_type != "IA3":  # its own keys are not worth a warning
            raise UnknownNameError(
                f"{source}: peft_type is {shown(peft_type)}, expected 'IA3': it is another kind of "
                "adapter, which peft loads"
            )
        known = {f.name for f in fields(cls)} - {"unknown"}
        unknown = {key: value for key, value in values.items() if key not in known}
        if unknown:
            warnings.warn(
                f"{source}: unknown keys {shown(sorted(unknown))} are kept and not used",
                stacklevel=2,
            )
        values = {key: value for key, value in values.items() if key in known}
        both = ("target_modules", "feedforward_modules")
        with naming(source):
            targets, feedforward = (_as_set(values.get(name), name) for name in both)
            if isinstance(targets, set) and isinstance(feedforward, set):
                values |= zip(both, feedforward_among(targets, feedforward), strict=True)
            return cls(**values, unknown=unknown)

    @classmethod
    def from_json(cls, path: str | Path) -> IA3Config:
        """Read an `adapter_config.json`.

        Raises:
            InvalidTypeError: the path, or a value in the file, is of another type.
            UnknownNameError: it is the config of another kind of adapter.
            MissingFileError: it is not there.
            BrokenFileError: the file is not a JSON object, or no config of PEFT's; the message says
                whose it is, where that can be told.
            IA3Error: a value makes no sense.
            OSError: it cannot be read.
        """
        path = path_of("path", path)
        return config_from_text(_content(path), str(path))

    @classmethod
    def from_json_file(cls, path_json_file: str | Path, **ignored: Any) -> dict[str, Any]:
        """What an `adapter_config.json` holds, as plain data; `from_json` makes a config of it.

        Raises:
            InvalidTypeError: an argument is of another type.
            MissingFileError: there is no such file.
            BrokenFileError: the file is not a JSON object, or of more than 16 MiB.
            IA3Error: the path is malformed.
            OSError: it cannot be read.
        """
        path = path_of("path_json_file", path_json_file)
        return parse_object(_content(path), str(path))

    @classmethod
    def from_peft_type(cls, **values: Any) -> IA3Config:
        """`from_dict` with keywords: PEFT's way to choose a class by `peft_type`.

        Raises:
            InvalidTypeError: a value is of another type.
            UnknownNameError: `peft_type` is another kind of adapter.
            IA3Error: a value makes no sense.
        """
        return cls.from_dict(values)

    def save_pretrained(
        self,
        save_directory: str | Path,
        auto_mapping_dict: dict[str, Any] | None = None,
        **ignored: Any,
    ) -> None:
        """Write `adapter_config.json` into a folder, with another `auto_mapping` if given.

        What else PEFT's takes is for its `push_to_hub`, and ignored.

        Raises:
            InvalidTypeError: an argument is of another type.
            NotAFolderError: there is a file of that name.
            IA3Error: the folder's name is malformed.
            OSError: the disk is full or may not be written.
        """
        mapping = self.auto_mapping if auto_mapping_dict is None else auto_mapping_dict
        text = replace(self, auto_mapping=mapping).to_json()
        folder = folder_of("save_directory", save_directory)
        write_files(folder, {CONFIG_NAME: text.encode()})

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        subfolder: str | None = None,
        **further: Any,
    ) -> IA3Config:
        """Read an adapter's config from its folder or from the hub.

        Args:
            pretrained_model_name_or_path: the adapter's folder, or its id on the hub.
            subfolder: where in it the adapter lies.
            further: `revision`, `token`, `cache_dir`, ...; others are ignored with a warning, as
                no field of the config can be set here.

        Raises:
            InvalidTypeError: an argument is of another type.
            UnknownNameError: it is the config of another kind of adapter.
            MissingFileError: there is none.
            BrokenFileError: the file is not a JSON object.
            IA3Error: a value makes no sense.
        """
        hub = hub_options({**further, "subfolder": subfolder})
        folder = adapter_folder(pretrained_model_name_or_path, [CONFIG_NAME], **hub)
        with suppress(FileNotFoundError):
            if (folder / CONFIG_NAME).is_file():
                return cls.from_json(folder / CONFIG_NAME)
        try:
            with SavedFolder(folder) as saved:
                return config_from_text(*saved.config_text())
        except FileNotFoundError:
            raise no_adapter(folder) from None

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = None,
        tags: Sequence[str] | None = None,
    ) -> str:
        """Upload `adapter_config.json` and return the address; as `IA3Model.push_to_hub`.

        `max_shard_size` and `tags` are ignored: the one file is small, and has no card.

        Raises:
            InvalidTypeError: an argument is of another type.
            IA3Error: the hub has no such names.
            OSError: the hub cannot be reached, or refuses it.
        """
        return upload(
            repo_id,
            {CONFIG_NAME: self.to_json().encode()},
            "Upload (IA)³ config",
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            commit_description=commit_description,
        )


def config_from_text(text: str | bytes, where: str) -> IA3Config:
    """A config from the text of an `adapter_config.json`; `where` it is from begins messages.

    Raises:
        UnknownNameError: it is the config of another kind of adapter.
        BrokenFileError: it is not a JSON object, no config of PEFT's, or a value makes no sense.
    """
    values = parse_object(text, where)
    if "peft_type" not in values:  # PEFT always writes it
        whose = owner_of_config(values)
        raise BrokenFileError(
            f"{where} has no peft_type, expected 'IA3': "
            + (f"it is {whose}" if whose else "it is no config of PEFT's")
        )
    try:
        return IA3Config.from_dict(values, source=where)
    except UnknownNameError:
        raise
    except IA3Error as error:
        raise BrokenFileError(str(error)) from error


# PEFT's way to find a config's class; there is one kind of adapter here.
PEFT_TYPE_TO_CONFIG_MAPPING = {PeftType.IA3: IA3Config}


def get_peft_config(config_dict: dict[str, Any]) -> IA3Config:
    """A config from a dictionary of its fields.

    Raises:
        InvalidTypeError: it is no mapping, or a value is of another type.
        UnknownNameError: `peft_type` is another kind of adapter.
        IA3Error: a value makes no sense.
    """
    return IA3Config.from_dict(config_dict)


def _content(path: Path) -> bytes:
    if not path.is_file():
        kind = "is not a file" if path.exists() else "does not exist"
        raise MissingFileError(f"{path} {kind}, expected an {CONFIG_NAME}")
    if path.stat().st_size > LARGEST:
        raise BrokenFileError(f"{path} is larger than {LARGEST} bytes, expected a config")
    return path.read_bytes()


def _as_set(modules: Modules, field_name: str) -> str | set[str] | None:
    if isinstance(modules, str):
        if modules:
            _check_text(modules, field_name, len(modules))
            compiled(field_name, modules)
        return modules
    if modules is None:
        return None
    if isinstance(modules, list | tuple | set) and all(isinstance(m, str) for m in modules):
        for name in modules:
            _check_text(name, f"{field_name}: a name", LONGEST_NAME)
        return set(modules)
    expected = "expected a list of names or a regular expression"
    raise InvalidTypeError(f"{field_name} is {shown(modules)}, {expected}")


def _check_text(text: str, what: str, longest: int) -> None:
    """Raise `IA3Error` for what names nothing, and what a file would not give back."""
    if len(text) > longest:
        raise IA3Error(f"{what} has {len(text):,} characters, expected {longest:,} at most")
    if "\0" in text:
        raise IA3Error(f"{what} is {shown(text)}, which has a NUL character in it")
    check_plain(text, what)
