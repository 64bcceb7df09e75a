"""Folders of small random sentence encoders, as sentence-transformers writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    MPNetConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

HIDDEN = 16
SMALL = {"vocab_size": 60, "hidden_size": HIDDEN, "intermediate_size": 24}
SMALL |= {"num_hidden_layers": 2, "num_attention_heads": 2}
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "query", ":"]
WORDS += ["passage", "The", "Fox", "what"]
STEPS = {
    "Transformer": "sentence_transformers.models.Transformer",
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "Dense": "sentence_transformers.models.Dense",
    "Normalize": "sentence_transformers.models.Normalize",
}


def bert(**changes: Any) -> BertConfig:
    sizes = SMALL | {"max_position_embeddings": 32, "pad_token_id": 0}
    return BertConfig(**(sizes | changes))


def mpnet() -> MPNetConfig:
    return MPNetConfig(**SMALL, max_position_embeddings=14, pad_token_id=1)


def t5() -> T5Config:
    sizes = {"d_model": HIDDEN, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return T5Config(vocab_size=60, **sizes, decoder_start_token_id=0)


def vocabulary(pad: int = 0) -> dict[str, int]:
    special = ["<s>", "<pad>", *SPECIAL[2:]] if pad == 1 else SPECIAL
    return {word: number for number, word in enumerate([*special, *WORDS])}


def tokenizer(pad: int = 0, *, ends: bool = True) -> PreTrainedTokenizerFast:
    """One token a word, between `<s>` and `</s>` if `ends`."""
    known = vocabulary(pad)
    backend = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends:
        special = [(word, known[word]) for word in ("<s>", "</s>")]
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=special
        )
    names = {"pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def random_encoder(config: PreTrainedConfig) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind = T5EncoderModel if config.model_type == "t5" else AutoModel
        make = kind if kind is T5EncoderModel else AutoModel.from_config
        model = make(config).eval()
        # Large enough that positions, case and padding make a difference.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.3)
        return model


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), "utf-8")


def encoder_folder(
    folder: Path,
    config: PreTrainedConfig | None = None,
    *,
    pooling: dict[str, Any] | None = None,
    dense: list[dict[str, Any]] | None = None,
    normalize: bool = False,
    settings: dict[str, Any] | None = None,
    prompts: dict[str, Any] | None = None,
    ends: bool = True,
) -> Path:
    """A model, its tokenizer, and the files of the steps that are given.

    `dense` has a config for each Dense module, `settings` is sentence_bert_config.json's content,
    `prompts` config_sentence_transformers.json's.
    """
    config = config or bert()
    random_encoder(config).save_pretrained(folder)
    tokenizer(config.pad_token_id, ends=ends).save_pretrained(folder)
    steps = [("Transformer", ""), ("Pooling", "1_Pooling")]
    default = {"word_embedding_dimension": HIDDEN, "pooling_mode_mean_tokens": True}
    write(folder / "1_Pooling/config.json", default if pooling is None else pooling)
    for number, module in enumerate(dense or [], start=2):
        steps.append(("Dense", f"{number}_Dense"))
        where = folder / f"{number}_Dense"
        write(where / "config.json", module)
        generator = torch.Generator().manual_seed(number)
        shape = (module["out_features"], module["in_features"])
        tensors = {"linear.weight": torch.randn(shape, generator=generator) / 4}
        if module.get("bias", True):
            tensors["linear.bias"] = torch.randn(shape[0], generator=generator)
        save_file(tensors, where / "model.safetensors")
    if normalize:
        steps.append(("Normalize", f"{len(steps)}_Normalize"))
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": STEPS[kind]}
        for number, (kind, path) in enumerate(steps)
    ]
    write(folder / "modules.json", modules)
    if settings is not None:
        write(folder / "sentence_bert_config.json", settings)
    if prompts is not None:
        write(folder / "config_sentence_transformers.json", prompts)
    return folder


def change(path: Path, **values: Any) -> None:
    """Set values of a JSON object in a file; `None` removes one."""
    content = json.loads(path.read_text("utf-8")) | values
    write(path, {key: value for key, value in content.items() if value is not None})
