"""Loading a sentence encoder: the embedded one, a folder, a hub id, or a loaded model.

What sentence-transformers writes beside a transformers model says how its tokens become one vector:
modules.json names the steps, and each step's folder has its settings.
"""

from __future__ import annotations

import copy
import hashlib
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from ..arguments import instance, path_of
from ..errors import BrokenFileError, IA3Error, InvalidTypeError, MissingFileError, shown
from ..files.hub import hub_id, snapshot
from ..files.json import parse_json, parse_object
from .embedded import EMBEDDED_ENCODER, EMBEDDED_MODEL, embedded_encoder_folder
from .loading import (
    BaseModel,
    LoadedModel,
    device_and_dtype,
    first_line,
    load_base_model,
    load_once,
    load_tokenizer,
    loading,
    place,
    read_model_config,
    refuse_own_code,
    tokenizer_of_loaded,
    wrap_once,
)
from .processes import unlaunched
from .progress import working

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Each pooling -> its older name, in the order in which several are joined.
POOLINGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
_ACTIVATIONS = (nn.Identity, nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid)
# Where neither the model nor its tokenizer says how long a text may be.
_MAX_LENGTH = 512
# By what becomes of them, tokenizers are told apart: of another case, or another vocabulary.
# Few, so that they are not cut.
_SOME_WORDS = "The lazy Fox"
# The files that say how a model embeds, on the hub; the weights are fetched by transformers.
_SETTINGS = [
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
    "*/sentence_*_config.json",
    "*/config.json",
]


@dataclass(eq=False)
class SentenceEncoder(LoadedModel):
    """A frozen encoder with its tokenizer, and how a text's tokens become one vector.

    Attributes:
        pooling: how, as 1_Pooling/config.json says it; several are joined with `+`, and so are
            their vectors.
        normalize: whether a vector's length becomes 1.
        max_length: the most tokens of a text, special ones included.
        prompt: is put before each text.
        prompt_tokens: so many tokens, the prompt's, are left out of the pooling.
        dense: is applied to the pooled vector, if there is one.
        dimension: how long a text's vector is.
    """

    pooling: str = "mean"
    normalize: bool = False
    max_length: int = _MAX_LENGTH
    prompt: str = ""
    prompt_tokens: int = 0
    dense: nn.Sequential | None = None
    dimension: int = 0

    def described(self) -> dict[str, Any]:
        """What vectors depend on besides the model's weights, as values of JSON.

        Of `dense`, and of the tokens that a few words become, it has digests.
        """
        names = ("pooling", "normalize", "max_length", "prompt", "prompt_tokens")
        # Cut as every text is: what a tokenizer cuts to is its state.
        tokens = self.tokenizer(_SOME_WORDS, truncation=True, max_length=self.max_length)
        return {
            **{name: getattr(self, name) for name in names},
            "dense": None if self.dense is None else _digest_of_dense(self.dense),
            "tokens": hashlib.sha256(repr(tokens["input_ids"]).encode()).hexdigest(),
        }


def _digest_of_dense(dense: nn.Sequential) -> str:
    digest = hashlib.sha256(repr([type(layer).__name__ for layer in dense.modules()]).encode())
    for name, value in dense.state_dict().items():
        digest.update(name.encode() + value.float().cpu().numpy().tobytes())
    return digest.hexdigest()


@dataclass
class _Settings:
    """What is known of an encoder before its weights are read; `source` is what transformers reads.

    `pooled` is the length of a token's vector that the pooling's config expects.
    """

    source: str
    pooling: str = "mean"
    pooled: int | None = None
    include_prompt: bool = True
    dense: nn.Sequential | None = None
    normalize: bool = False
    max_length: int | None = None
    lower_case: bool = False
    prompt: str = ""
    where: str = ""


def load_encoder(
    model: str | Path | nn.Module,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> SentenceEncoder:
    """The sentence encoder with its tokenizer, in evaluation mode on its device.

    It is loaded once and shared, as `load_base_model` does. A folder without modules.json is a
    plain encoder: the mean of its tokens' vectors, not normalised.

    The prompt before each text is the model's own for classification; else its default one, which
    sentence-transformers' `encode` uses; else that for queries of a model that has another for
    passages: it has seen no text without either, and its authors (E5's) use this one for features.

    >>> from ia3.base.encoders import load_encoder
    >>> encoder = load_encoder("all-minilm-l6-v2")
    >>> encoder.pooling, encoder.normalize, encoder.max_length, encoder.dimension
    ('mean', True, 256, 384)

    Args:
        model: `"all-minilm-l6-v2"`, a folder or hub id of sentence-transformers or of a
            transformers encoder, a loaded encoder, or a loaded `SentenceTransformer`.
        tokenizer: needed with a loaded model whose config does not say where it came from. It is
            used as it is.
        device: `"auto"` (a GPU if there is one), or torch's name of one.
        dtype: `"auto"` (the checkpoint's own on a GPU, float32 on a CPU), or torch's name of one.

    Raises:
        InvalidTypeError: an argument is of another type.
        StateError: there is no such device.
        MissingFileError: the model, or a file that it needs, is not there.
        BrokenFileError: a file's content is damaged, or contradicts another's.
        IA3Error: the name or dtype means nothing, the model cannot be loaded or is a language
            model, it needs what is not supported, or it brings code of its own: none is run.
    """
    from transformers import PreTrainedTokenizerBase

    if tokenizer is not None:
        instance("tokenizer", tokenizer, PreTrainedTokenizerBase, "a tokenizer of transformers")
    if isinstance(model, nn.Module):
        return _wrap_loaded(getattr(model, "_orig_mod", model), tokenizer)
    name = _name(model)
    torch_device, torch_dtype = device_and_dtype(device, dtype)
    folder = embedded_encoder_folder() if name == EMBEDDED_ENCODER else name

    def load() -> SentenceEncoder:
        with working(f"loading {name}"):
            return _load(name, tokenizer, torch_device, torch_dtype)

    return load_once(SentenceEncoder, (folder, torch_device, torch_dtype), tokenizer, load)


def load_base(
    model: str | Path | nn.Module,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> SentenceEncoder | BaseModel:
    """A sentence encoder (`load_encoder`) or a language model (`load_base_model`), whichever it is.

    Raises:
        As these.
    """
    load = load_encoder if is_sentence_encoder(model) else load_base_model
    return load(model, tokenizer=tokenizer, device=device, dtype=dtype)


def is_sentence_encoder(model: str | Path | nn.Module) -> bool:
    """Whether `load_encoder` is for it, rather than `load_base_model`. No weights are read.

    It is a folder or hub id with modules.json, or a model of an architecture that reads a text in
    both directions and writes none: BERT, MPNet, ModernBERT, T5's encoder, ...

    Raises:
        InvalidTypeError: the model is of another type.
        BrokenFileError: the model's config.json is damaged.
        IA3Error: there is no such model, or it brings code of its own.
    """
    if isinstance(model, nn.Module):
        model = getattr(model, "_orig_mod", model)
        config = getattr(model, "config", None)
        return _is_pipeline(model) or _is_encoder(config, type(model).__name__)
    name = _name(model)
    if name in (EMBEDDED_ENCODER, EMBEDDED_MODEL):
        return name == EMBEDDED_ENCODER
    try:
        if (_settings_folder(name) / "modules.json").is_file():
            return True
    except MissingFileError:
        pass  # what follows says what a model's name may be
    return _is_encoder(read_model_config(name, name))


def _name(model: object) -> str:
    if not isinstance(model, str | os.PathLike):
        expected = "an encoder's name, folder or hub id, or a loaded encoder"
        raise InvalidTypeError(f"model is {shown(model)}, expected {expected}")
    path_of("model", model)
    return str(model)


def _is_encoder(config: Any, architecture: str | None = None) -> bool:
    """Whether a transformers config, or a class by its name, is of an encoder without decoder."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    names = [architecture] if architecture else getattr(config, "architectures", None) or []
    if any(name.endswith("EncoderModel") for name in names):
        return True
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False):
        return False
    writes = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    # Models trained to fill gaps read in both directions.
    bidirectional = getattr(config, "model_type", None) in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return bidirectional and not any(name.endswith(writes) for name in names)


def _is_pipeline(model: nn.Module) -> bool:
    """Whether it is a `SentenceTransformer`, told without importing its package."""
    return any(kind.__name__ == "SentenceTransformer" for kind in type(model).__mro__)


def _load(name: str, tokenizer: Any, device: Any, dtype: Any) -> SentenceEncoder:
    settings = _read_settings(name)
    config = read_model_config(settings.source, name)
    if not settings.where and not _is_encoder(config):
        raise IA3Error(
            f"the model {name!r} is {_article(config.model_type)}, which is no sentence encoder: "
            "it has no modules.json, and reads in one direction or has a decoder"
        )
    with loading(name), unlaunched():  # as with a language model
        model = read_transformer(settings.source, config, name, dtype=dtype)
        used = load_tokenizer(settings.source) if tokenizer is None else tokenizer
    if tokenizer is None and settings.lower_case:
        _lower_case(used, name)
    place(model, name, device)
    return _encoder(model, used, name, settings)


def read_transformer(source: str, config: Any, name: str, **options: Any) -> Any:
    """transformers' model of a sentence encoder, of which its tokens' vectors are used.

    Of T5 and its kin it is the encoder alone, whatever the config says of a decoder. A pooler that
    has no weights is left out.

    Args:
        source: its folder, or its id on the hub.
        config: its config.
        name: what messages call it.
        options: for `from_pretrained`.

    Raises:
        BrokenFileError: other weights are missing.
    """
    from transformers import AutoModel, AutoModelForTextEncoding
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES

    alone = MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.get(config.model_type, "")
    kind = AutoModelForTextEncoding if alone.endswith("EncoderModel") else AutoModel
    model, info = kind.from_pretrained(
        source, trust_remote_code=False, output_loading_info=True, **options
    )
    missing = [key for key in info["missing_keys"] if not key.startswith("pooler.")]
    if missing:
        raise BrokenFileError(
            f"the weights of {name!r} lack {shown(sorted(missing)[0])} and {len(missing) - 1} "
            "more, which would be random: get the model again"
        )
    if info["missing_keys"]:
        model.pooler = None
    return model


def _encoder(model: Any, tokenizer: Any, name: str, settings: _Settings) -> SentenceEncoder:
    hidden, where = _hidden_size(model, tokenizer, name), settings.where
    if settings.pooled not in (None, hidden):
        raise BrokenFileError(
            f"{where}: the pooling is for vectors of {settings.pooled} values, but the model's "
            f"have {hidden}: the files are of two models"
        )
    dimension = hidden * len(settings.pooling.split("+"))
    for linear in settings.dense or []:
        if isinstance(linear, nn.Sequential):
            linear = linear[0]
        if isinstance(linear, nn.Linear):
            if linear.in_features != dimension:
                raise BrokenFileError(
                    f"{where}: a Dense module takes {linear.in_features} values, but gets "
                    f"{dimension}: the files are of two models"
                )
            dimension = linear.out_features
    _check_segments(tokenizer, name)
    most, special = _capacity(model, tokenizer), tokenizer.num_special_tokens_to_add()
    max_length = min(settings.max_length or most, most)
    if max_length <= special:
        raise BrokenFileError(
            f"{where or name or type(model).__name__}: texts are cut to {max_length} tokens, of "
            f"which {special} are special: correct max_seq_length in sentence_bert_config.json"
        )
    if settings.dense is not None:
        # It is applied to float32 vectors. A loaded one is the caller's, and stays as it is.
        settings.dense = copy.deepcopy(settings.dense).float().requires_grad_(False)
        settings.dense.to(next(model.parameters()).device)
    prompt_tokens = _length(tokenizer, settings.prompt)
    # What a tokenizer cuts to is its state: set now, it is not changed under another thread's call.
    tokenizer("", truncation=True, max_length=max_length)
    return SentenceEncoder(
        model,
        tokenizer,
        name,
        pooling=settings.pooling,
        normalize=settings.normalize,
        max_length=max_length,
        prompt=settings.prompt,
        prompt_tokens=0 if settings.include_prompt else prompt_tokens,
        dense=settings.dense,
        dimension=dimension,
    )


def _length(tokenizer: Any, prompt: str) -> int:
    """The tokens at the beginning of a text that are there for its prompt."""
    if not prompt:
        return 0
    ids = tokenizer(prompt)["input_ids"]
    return len(ids) - (ids[-1] in tokenizer.all_special_ids)


def _hidden_size(model: Any, tokenizer: Any, name: str) -> int:
    """How long a token's vector is: the model is tried out, since configs have many names for it.

    Once, as another thread may have an adapter on it the next time.

    Raises:
        IA3Error: the model does not embed a text's tokens.
    """
    if model in _hidden_sizes:
        return _hidden_sizes[model]
    ids = torch.tensor([tokenizer("a")["input_ids"] or [0]], device=next(model.parameters()).device)
    try:
        with torch.no_grad():
            hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    except Exception as error:  # of a model of any kind
        raise IA3Error(
            f"the model {name or type(model).__name__!r} and its tokenizer embed no text: "
            f"{first_line(error)}"
        ) from error
    _hidden_sizes[model] = int(hidden.shape[-1])
    return _hidden_sizes[model]


_hidden_sizes: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


def _capacity(model: Any, tokenizer: Any) -> int:
    """The most tokens that the model has positions for, and its tokenizer is made for."""
    known = []
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa's and MPNet's positions begin after that of padding.
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            known.append(module.num_embeddings - first)
    if not known and (most := getattr(model.config, "max_position_embeddings", None) or 0) > 0:
        known.append(most)
    if tokenizer.model_max_length < 10**9:  # more stands for none
        known.append(tokenizer.model_max_length)
    return min(known, default=_MAX_LENGTH)


def _check_segments(tokenizer: Any, name: str) -> None:
    if any(tokenizer("a").get("token_type_ids", [])):
        raise IA3Error(
            f"the tokenizer of {name!r} numbers the parts of a text (token_type_ids), which is not "
            "supported: use another encoder"
        )


def _lower_case(tokenizer: Any, name: str) -> None:
    """Have the tokenizer lower a text's case first, as `do_lower_case` says."""
    from tokenizers.normalizers import Lowercase, Sequence

    if not tokenizer.is_fast:
        raise IA3Error(
            f"the tokenizer of {name!r} is written in Python, so that do_lower_case in "
            "sentence_bert_config.json cannot be followed: give tokenizer= with one that does so"
        )
    backend = tokenizer.backend_tokenizer
    normalizer = backend.normalizer
    backend.normalizer = Sequence([Lowercase(), *([normalizer] if normalizer else [])])


def _article(kind: str) -> str:
    return f"{'an' if kind[:1] in 'aeiou' else 'a'} {kind} model"


# From files


def _settings_folder(name: str) -> Path:
    """The folder with modules.json, of a model that has one; of one on the hub, in the cache."""
    if name == EMBEDDED_ENCODER:
        return embedded_encoder_folder()
    return Path(name) if _is_folder(name) else snapshot("encoder", name, _SETTINGS)


def _is_folder(name: str) -> bool:
    # No name at all would be the folder that the process is in.
    return bool(name) and Path(name).is_dir()


def _read_settings(name: str) -> _Settings:
    folder = _settings_folder(name)
    is_local = name == EMBEDDED_ENCODER or _is_folder(name)
    modules = folder / "modules.json"
    if not modules.is_file():
        return _Settings(str(folder) if is_local else name)
    steps = read_steps(modules)
    _check_order([kind for kind, _ in steps], str(modules))
    settings = _Settings(str(folder) if is_local else name, where=str(modules))
    for number, (kind, path) in enumerate(steps):
        if number == 0 and path:
            # The model lies in a folder of its own.
            root = folder if is_local else snapshot("encoder", name, [f"{path}/*"])
            settings.source = str(root / path)
        where = folder / path
        if kind == "Transformer":
            _read_lengths(where, settings)
        elif kind == "Pooling":
            config = where / "config.json"
            _set_pooling(_read_object(config), str(config), settings)
        elif kind == "Dense":
            if not is_local:
                where = snapshot("encoder", name, [f"{path}/*"]) / path
            dense = _read_dense(where)
            settings.dense = nn.Sequential(*(settings.dense or []), *dense)
        else:
            settings.normalize = True
            if (where / "config.json").is_file():
                config = where / "config.json"
                _check_names(_read_object(config), str(config), "Normalize")
    config = folder / "config_sentence_transformers.json"
    if config.is_file():
        settings.prompt = _prompt(_read_object(config), str(config))
    return settings


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MissingFileError(f"{path} is not there, but modules.json names its folder")
    return parse_object(path.read_bytes(), str(path))


def read_steps(path: Path) -> list[tuple[str, str]]:
    """The kind and folder, within that of the file, of each step of modules.json.

    Raises:
        BrokenFileError: the file is damaged, or a folder is outside.
        IA3Error: a step brings code of its own.
    """
    entries = parse_json(path.read_bytes(), str(path))
    if not isinstance(entries, list) or not entries:
        raise BrokenFileError(f"{path}: holds {shown(entries)}, expected a list of modules")
    steps = []
    for entry in entries:
        kind, folder = (
            (entry.get("type"), entry.get("path")) if isinstance(entry, dict) else (None, None)
        )
        if not isinstance(kind, str) or not isinstance(folder, str):
            raise BrokenFileError(
                f"{path}: has {shown(entry)}, expected a module with 'type' and 'path'"
            )
        inside = PurePosixPath(folder)
        if inside.is_absolute() or ".." in inside.parts or "\\" in folder or "\0" in folder:
            raise BrokenFileError(f"{path}: path is {shown(folder)}, expected a folder beside it")
        package, _, kind_name = kind.rpartition(".")
        if package.split(".")[0] != "sentence_transformers":
            refuse_own_code(ValueError("trust_remote_code"), f"{path} ({shown(kind)})")
        steps.append((kind_name, folder))
    return steps


def _check_order(kinds: list[str], where: str) -> None:
    known = ("Transformer", "Pooling", "Dense", "Normalize")
    for kind in kinds:
        if kind not in known:
            raise IA3Error(
                f"{where}: the module {shown(kind)} is not supported, only {', '.join(known)}: use "
                "another encoder"
            )
    dense = kinds.count("Dense")
    for end in ([], ["Normalize"]):
        if kinds == ["Transformer", "Pooling", *["Dense"] * dense, *end]:
            return
    raise BrokenFileError(
        f"{where}: the modules are {', '.join(kinds)}; expected Transformer, Pooling, perhaps "
        "Dense, perhaps Normalize, in this order"
    )


def _read_lengths(folder: Path, settings: _Settings) -> None:
    """The longest text and its case, from sentence_bert_config.json or an older name of it."""
    found = folder.glob("sentence_*_config.json")
    path = min((path for path in found if path.is_file()), default=None)
    if path is None:
        return
    config, where = parse_object(path.read_bytes(), str(path)), str(path)
    _check_names(config, where, "Transformer")
    settings.max_length = _whole(config, "max_seq_length", where)
    settings.lower_case = _flag(config, "do_lower_case", False, where)


def _check_names(config: Mapping[str, Any], where: str, kind: str) -> None:
    """Raise where a module works on other things than a sentence's embedding goes through."""
    token, sentence = ("token_embeddings",), ("sentence_embedding", None)
    expected: dict[str, tuple[Any, ...]] = {
        "transformer_task": ("feature-extraction",),
        "module_output_name": token if kind == "Transformer" else sentence,
        "module_input_name": sentence,
        "use_residual": (False,),
        "query_expansion": (None,),
    }
    for key, values in expected.items():
        if config.get(key, values[0]) not in values:
            raise IA3Error(
                f"{where}: {key} is {shown(config[key])}, of which only {shown(values[0])} is "
                "supported: use another encoder"
            )


def _set_pooling(config: Mapping[str, Any], where: str, settings: _Settings) -> None:
    modes = config.get("pooling_mode")
    if modes is None:
        old = [mode for mode, key in POOLINGS.items() if _flag(config, key, False, where)]
        modes = old or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    is_list = isinstance(modes, list | tuple) and all(isinstance(mode, str) for mode in modes)
    if not is_list or not modes or not POOLINGS.keys() >= {*modes}:
        raise BrokenFileError(
            f"{where}: pooling_mode is {shown(modes)}, expected some of {', '.join(POOLINGS)}"
        )
    settings.pooling = "+".join(modes)
    old_name = "word_embedding_dimension"
    name = "embedding_dimension" if "embedding_dimension" in config else old_name
    settings.pooled = _whole(config, name, where)
    settings.include_prompt = _flag(config, "include_prompt", True, where)


def _read_dense(folder: Path) -> nn.Sequential:
    """A Dense module's linear layer and activation, in float32."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    where, weights = folder / "config.json", folder / "model.safetensors"
    config = _read_object(where)
    _check_names(config, str(where), "Dense")
    sizes = [_whole(config, key, str(where)) for key in ("out_features", "in_features")]
    if None in sizes:
        raise BrokenFileError(f"{where}: lacks in_features or out_features")
    asked = config.get("activation_function", "torch.nn.Tanh")
    package, _, kind = asked.rpartition(".") if isinstance(asked, str) else ("", "", "")
    known = {activation.__name__: activation for activation in _ACTIVATIONS}
    if kind not in known or not f"{package}.".startswith("torch.nn."):
        raise IA3Error(
            f"{where}: activation_function is {shown(asked)}, of which only torch.nn's "
            f"{', '.join(known)} are supported: use another encoder"
        )
    if not weights.is_file():
        if (folder / "pytorch_model.bin").is_file():
            raise IA3Error(
                f"{folder / 'pytorch_model.bin'} is a pickle, which is not read: have "
                "sentence-transformers write the model again, as safetensors, with save()"
            )
        raise MissingFileError(f"{weights} is not there, but modules.json names its folder")
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise BrokenFileError(f"{weights} cannot be read: {error}") from error
    bias = _flag(config, "bias", True, str(where))
    expected = {"linear.weight": sizes, **({"linear.bias": sizes[:1]} if bias else {})}
    found = {key: list(tensor.shape) for key, tensor in tensors.items()}
    if found != expected:
        raise BrokenFileError(f"{weights}: holds {shown(found)}, expected {shown(expected)}")
    # Without memory of its own: it has the tensors of the file.
    linear = nn.Linear(cast(int, sizes[1]), cast(int, sizes[0]), bias=bias, device="meta")
    state = {key.removeprefix("linear."): tensor.float() for key, tensor in tensors.items()}
    linear.load_state_dict(state, assign=True)
    return nn.Sequential(linear, known[kind]()).requires_grad_(False)


def _prompt(config: Mapping[str, Any], where: str) -> str:
    """What is put before each text: see `load_encoder`."""
    kind = config.get("model_type", "SentenceTransformer")
    if kind != "SentenceTransformer" or config.get("truncate_dim") is not None:
        key = "truncate_dim" if kind == "SentenceTransformer" else "model_type"
        raise IA3Error(f"{where}: {key} {shown(config[key])} is not supported: use another encoder")
    prompts, default = config.get("prompts") or {}, config.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(
        isinstance(prompt, str | None) for prompt in prompts.values()
    ):
        raise BrokenFileError(f"{where}: prompts is {shown(prompts)}, expected texts by name")
    if default is not None and (not isinstance(default, str) or default not in prompts):
        raise BrokenFileError(
            f"{where}: default_prompt_name is {shown(default)}, expected one of {shown([*prompts])}"
        )
    # Names of tasks are written with a capital in some models.
    by_name = {name.lower(): prompt or "" for name, prompt in prompts.items()}
    if "classification" in by_name:
        return by_name["classification"]
    if default is not None:
        return prompts[default] or ""
    passages = ("document", "passage", "corpus")
    return by_name.get("query", "") if any(by_name.get(name) for name in passages) else ""


def _flag(config: Mapping[str, Any], key: str, default: bool, where: str) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise BrokenFileError(f"{where}: {key} is {shown(value)}, expected true or false")
    return value


def _whole(config: Mapping[str, Any], key: str, where: str) -> int | None:
    value = config.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise BrokenFileError(f"{where}: {key} is {shown(value)}, expected a whole number above 0")
    return value


# From what is loaded


def _wrap_loaded(model: nn.Module, tokenizer: Any) -> SentenceEncoder:
    if _is_pipeline(model):
        return _unpack(model, tokenizer)
    if not hasattr(model, "config"):
        expected = "a transformers encoder or a SentenceTransformer"
        raise InvalidTypeError(f"model is a {type(model).__name__}, expected {expected}")
    kind = type(model).__name__
    # Without a head for a task of its own.
    inner = cast(nn.Module, getattr(model, "base_model", model))

    def wrap() -> SentenceEncoder:
        name = getattr(inner.config, "_name_or_path", "") or ""
        settings = _settings_of_loaded(name)
        if not settings.where and not _is_encoder(inner.config, kind):
            raise IA3Error(f"a {kind} is no sentence encoder: it reads in one direction or writes")
        used = tokenizer
        if used is None:
            used = tokenizer_of_loaded(inner, settings.source)
            if settings.lower_case:
                _lower_case(used, name)
        return _encoder(inner, used, name, settings)

    return wrap_once(SentenceEncoder, inner, tokenizer, wrap)


def _settings_of_loaded(name: str) -> _Settings:
    """What is known of a loaded model by the folder or hub id that it came from.

    A model that is made of a config came from nowhere, and is taken as a plain one.
    """
    if name == EMBEDDED_ENCODER or _is_folder(name) or hub_id(name):
        return _read_settings(name)
    return _Settings(name)


def _unpack(pipeline: Any, tokenizer: Any) -> SentenceEncoder:
    """The encoder in a loaded `SentenceTransformer`."""
    modules = list(pipeline.children())
    where = f"the loaded {type(pipeline).__name__}"
    _check_order([type(module).__name__ for module in modules], where)
    model, name = modules[0].auto_model, modules[0].auto_model.config._name_or_path or ""
    settings = _Settings(name, where=where, max_length=modules[0].max_seq_length)
    for module in modules[1:]:
        kind, config = type(module).__name__, module.get_config_dict()
        if kind == "Pooling":
            _set_pooling(config, where, settings)
        elif kind == "Dense":
            _check_names(config, where, kind)
            layers = (module.linear, module.activation_function)
            settings.dense = nn.Sequential(*(settings.dense or []), *layers)
        else:
            _check_names(config, where, kind)
            settings.normalize = True
    prompts = {"prompts": pipeline.prompts, "default_prompt_name": pipeline.default_prompt_name}
    settings.prompt = _prompt(prompts, where)
    used = modules[0].tokenizer if tokenizer is None else tokenizer
    return _encoder(model, used, name, settings)
