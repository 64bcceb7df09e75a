"""`AutoPeftModel`: an adapter together with its base model, which the adapter's config names."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from ..arguments import listed
from ..base.loading import load_tokenizer
from ..base.model_folder import TOKENIZER_FILES
from ..errors import IA3Error, StateError
from ..files.hub import CONFIG_NAME, adapter_folder
from ..targets.config import IA3Config, TaskType
from .adapters import check_config
from .ia3_model import MODEL_CLASSES, IA3Model
from .saving import DEFAULT_ADAPTER

# Whose classes an adapter's config may name, unless the user says otherwise.
LIBRARIES = ("transformers", "diffusers")
# What says how to fetch files from the hub, both the adapter's and the base model's.
FOR_BOTH = ("token", "cache_dir", "force_download", "local_files_only")
# What loading either of them takes, and says the same of both.
SHARED = ("key_mapping", "ignore_mismatched_sizes")


class AutoPeftModel:
    """An adapter together with its base model, whose name and class its config says.

    Raises:
        StateError: always: `from_pretrained` makes one.
    """

    task_type: TaskType | None = None

    def __init_subclass__(cls, task: TaskType | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.task_type = task or cls.task_type

    def __init__(self) -> None:
        kind = type(self).__name__
        raise StateError(f"{kind} is made by {kind}.from_pretrained()")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = DEFAULT_ADAPTER,
        is_trainable: bool = False,
        config: IA3Config | None = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] | None = None,
        *,
        subfolder: str | None = None,
        autocast_adapter_dtype: bool = True,
        **base_options: Any,
    ) -> IA3Model:
        """Load an adapter and, before it, its base model.

        Args:
            pretrained_model_name_or_path: the adapter's folder or its id on the hub.
            adapter_name, is_trainable, config, revision, subfolder, autocast_adapter_dtype: of the
                adapter, as `IA3Model.from_pretrained` takes them.
            import_allowlist: the libraries that the adapter's config may choose the base model's
                class from; transformers and diffusers if not given.
            base_options: for the base model's `from_pretrained`, e.g. `dtype`, `device_map`. What
                says how to fetch from the hub (`token`, `cache_dir`, ...) holds for both, and so do
                `key_mapping` and `ignore_mismatched_sizes`.

        Raises:
            InvalidTypeError: an argument is of another type.
            UnknownNameError: it is another kind of adapter.
            MissingFileError: there is no adapter.
            BrokenFileError: a file of the adapter is broken.
            MismatchError: the adapter does not fit its base model.
            IA3Error: its config names no base model, or one of another task; or the base model or
                the tokenizer brings code of its own, and `trust_remote_code` is not given.
            OSError: the base model is not to be had.
        """
        hub: Any = {key: base_options[key] for key in FOR_BOTH if key in base_options}
        hub |= {"revision": revision, "subfolder": subfolder}
        files = ["adapter_*", *TOKENIZER_FILES]
        folder = adapter_folder(pretrained_model_name_or_path, files, **hub)
        if config is None:
            config = IA3Config.from_pretrained(folder)
        check_config(config)
        if config.base_model_name_or_path is None:
            raise IA3Error(
                f"{folder / CONFIG_NAME} names no base model: load it yourself, then "
                "PeftModel.from_pretrained(model, ...)"
            )
        if cls.task_type is not None and config.task_type not in (None, cls.task_type.value):
            raise IA3Error(
                f"{pretrained_model_name_or_path} is an adapter for {config.task_type}, expected "
                f"{cls.task_type.value}: use AutoPeftModel"
            )
        allowed = LIBRARIES
        if import_allowlist is not None:
            allowed = (*listed("import_allowlist", import_allowlist, "a list of libraries"),)
        kind = _base_class(cls.task_type, config, allowed)
        name, trusted = config.base_model_name_or_path, base_options.get("trust_remote_code", False)
        if kind.__module__.startswith("transformers."):
            # Unless it is told, transformers asks at the terminal.
            base_options = {**base_options, "trust_remote_code": trusted}
        try:
            base = kind.from_pretrained(name, revision=config.revision, **base_options)
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise IA3Error(
                f"the base model {name!r}, which the adapter names, brings code of its own: look "
                "at it, and if you trust it, say trust_remote_code=True"
            ) from error
        if (folder / "tokenizer_config.json").is_file():
            tokens = load_tokenizer(folder, trust_remote_code=trusted)
            if len(tokens) > base.get_input_embeddings().weight.shape[0]:
                base.resize_token_embeddings(len(tokens))
        face = MODEL_CLASSES.get(cls.task_type, IA3Model)
        options: Any = {key: base_options[key] for key in SHARED if key in base_options}
        options["autocast_adapter_dtype"] = autocast_adapter_dtype
        return face.from_pretrained(base, folder, adapter_name, is_trainable, config, **options)


class AutoPeftModelForCausalLM(AutoPeftModel, task=TaskType.CAUSAL_LM):
    """An adapter with its decoder-only language model."""


class AutoPeftModelForSeq2SeqLM(AutoPeftModel, task=TaskType.SEQ_2_SEQ_LM):
    """An adapter with its encoder-decoder language model."""


class AutoPeftModelForSequenceClassification(AutoPeftModel, task=TaskType.SEQ_CLS):
    """An adapter with its sequence classifier."""


class AutoPeftModelForTokenClassification(AutoPeftModel, task=TaskType.TOKEN_CLS):
    """An adapter with its token classifier."""


class AutoPeftModelForQuestionAnswering(AutoPeftModel, task=TaskType.QUESTION_ANS):
    """An adapter with its question answerer."""


class AutoPeftModelForFeatureExtraction(AutoPeftModel, task=TaskType.FEATURE_EXTRACTION):
    """An adapter with its model of hidden states."""


def _base_class(task_type: TaskType | None, config: IA3Config, allowed: Sequence[str]) -> Any:
    if task_type is None and config.task_type is not None:
        task_type = TaskType(config.task_type)
    if task_type is not None:
        features = task_type == TaskType.FEATURE_EXTRACTION
        task_class = MODEL_CLASSES[task_type].__name__.replace("Peft", "Auto")
        return getattr(transformers, "AutoModel" if features else task_class)
    mapping = config.auto_mapping or {}
    library, name = mapping.get("parent_library"), mapping.get("base_model_class")
    # An adapter's file must not choose which code is run.
    if not isinstance(library, str) or not any(f"{library}.".startswith(f"{a}.") for a in allowed):
        raise IA3Error(
            f"the adapter's config has no task_type, and its auto_mapping {mapping} names no class "
            f"of {', '.join(allowed)}: load the base model yourself, then "
            "PeftModel.from_pretrained(model, ...), or name the library in import_allowlist, if it "
            "is to be trusted"
        )
    found = getattr(importlib.import_module(library), str(name), None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise IA3Error(f"auto_mapping: {library} has no model class {name!r}")
    return found
