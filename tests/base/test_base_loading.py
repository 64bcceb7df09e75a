"""The embedded model's conversion, and loading from folders."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from sentencepiece import SentencePieceTrainer
from support import sentences
from support.sentences import bert
from support.tfew import tiny_llama
from torch import nn
from transformers import AutoTokenizer
from transformers.utils import is_protobuf_available

from ia3 import AutoPeftModel, FewShotClassifier, IA3Config, IA3Error, get_peft_model
from ia3.base.encoders import load_encoder
from ia3.base.loading import EMBEDDED_MODEL, embedded_model_folder, load_base_model
from ia3.errors import InvalidTypeError

PREPARE = [sys.executable, "-m", "ia3", "prepare"]


@pytest.mark.slow
def test_a_conversion_cut_off_leaves_nothing_and_the_next_is_whole(tmp_path: Path) -> None:
    home = tmp_path / "home"
    environment = {**os.environ, "IA3_HOME": str(home)}
    models = home / "models"
    for _ in range(3):
        with subprocess.Popen(
            PREPARE,
            env=environment,
            stderr=subprocess.PIPE,
            # What runs in a shell's background ignores it, and its children do.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        ) as process:
            while process.poll() is None and not (models.exists() and list(models.iterdir())):
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
        if process.returncode != 0:
            break
        # It was done before it was looked at again: the machine is busy.
        shutil.rmtree(models)
    assert process.returncode == 130
    assert list(models.iterdir()) == []

    subprocess.run(PREPARE, env=environment, check=True, capture_output=True)
    assert [folder.name for folder in models.iterdir()] == [EMBEDDED_MODEL]
    config = json.loads((models / EMBEDDED_MODEL / "config.json").read_text())
    assert "quantization_config" not in config
    with safe_open(models / EMBEDDED_MODEL / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"F32"}  # noqa: SIM118


def test_the_embedded_model_speaks_english() -> None:
    base = load_base_model(EMBEDDED_MODEL)
    ids = base.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        following = base.model(input_ids=ids).logits[0, -1].argmax()
    assert base.tokenizer.decode(following).strip() == "Paris"


def test_one_model_is_loaded_once_whatever_asks_for_it() -> None:
    assert load_base_model(EMBEDDED_MODEL) is load_base_model(EMBEDDED_MODEL)
    assert load_base_model(EMBEDDED_MODEL, device="cpu", dtype="float32") is load_base_model(
        EMBEDDED_MODEL
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"model": "no/such-model"}, "no model 'no/such-model'"),
        ({"model": "no-such-folder"}, "no model 'no-such-folder'"),
        ({"model": EMBEDDED_MODEL, "device": "toaster"}, "device 'toaster'"),
        ({"model": EMBEDDED_MODEL, "device": "meta"}, "device 'meta'"),
        ({"model": EMBEDDED_MODEL, "dtype": "int8"}, "dtype 'int8'"),
        ({"model": EMBEDDED_MODEL, "dtype": "nonsense"}, "dtype 'nonsense'"),
    ],
)
def test_what_cannot_be_loaded_is_named(arguments: dict[str, str], says: str) -> None:
    with pytest.raises(IA3Error, match=says):
        load_base_model(**arguments)


def test_a_truncated_checkpoint_and_a_missing_tokenizer_are_named(
    tmp_path: Path, tiny_llama: torch.nn.Module
) -> None:
    folder = tmp_path / "tiny"
    tiny_llama.save_pretrained(folder)
    with pytest.raises(IA3Error, match="cannot be loaded"):
        load_base_model(folder)
    AutoTokenizer.from_pretrained(embedded_model_folder()).save_pretrained(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(IA3Error, match="cannot be loaded"):
        load_base_model(folder)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("hidden_size", "many", "hidden_size.*expected int.*many"),
        ("num_attention_heads", 7, "not a multiple of the number of attention heads .7."),
    ],
)
def test_a_config_with_a_wrong_value_is_named_with_its_field(
    tmp_path: Path, tiny_llama: torch.nn.Module, field: str, value: object, says: str
) -> None:
    tiny_llama.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(IA3Error, match=f"{path} is broken: .*{says}"):
        load_base_model(tmp_path)


@pytest.mark.skipif(is_protobuf_available(), reason="protobuf is installed, and reads them")
@pytest.mark.parametrize("given", ["a folder", "a loaded model", "an adapter"])
def test_a_missing_package_of_a_tokenizer_is_named(tmp_path, given):
    """transformers says tiktoken, which does not help."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"the cat {i} sat on the mat {i * 7}\n" for i in range(300)))
    made = SentencePieceTrainer.train
    made(input=str(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=60, minloglevel=2)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    load, of = load_base_model, {"a folder": tmp_path, "a loaded model": again}.get(given, tmp_path)
    if given == "an adapter":
        get_peft_model(again, IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
        load = AutoPeftModel.from_pretrained
    with pytest.raises(IA3Error, match=f"tokenizer of '{tmp_path}'.* pip install protobuf$"):
        load(of)


@pytest.mark.parametrize(
    ("large", "small"),
    [(bert, lambda: bert(vocab_size=8)), (tiny_llama, lambda: tiny_llama(vocabulary=8))],
)
def test_a_token_that_the_model_has_no_embedding_of_is_named(large, small):
    says = r"the tokenizer gives the token \d+, and the model '.*' has 8: they are of two models"
    classifier = FewShotClassifier(small(), tokenizer=sentences.tokenizer(), steps=1)
    with pytest.raises(IA3Error, match=says):
        classifier.fit(sentences.TEXTS, sentences.LABELS)
    fitted = classifier.set_params(model=large()).fit(sentences.TEXTS, sentences.LABELS)
    fitted.model = small()
    with pytest.raises(IA3Error, match=says):
        fitted.predict(sentences.TEXTS)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(tiny_llama())])
def test_a_module_that_is_no_model_of_transformers_is_named(model):
    says = f"model is a {type(model).__name__}, expected a language model or a sentence encoder"
    with pytest.raises(InvalidTypeError, match=says):
        FewShotClassifier(model).fit(["a", "b"], ["x", "y"])
    with pytest.raises(InvalidTypeError, match=says):
        load_base_model(model)


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("config.json", {"hidden_size": 0}, "the model '.*' cannot be loaded: ZeroDivisionError: "),
        ("config.json", {"hidden_act": "x"}, "the model '.*' cannot be loaded: KeyError: 'x'"),
        ("config.json", {"model_type": []}, "config.json is broken: TypeError: unhashable"),
        ("config.json", {"auto_map": 3}, "config.json is broken: TypeError: "),
        ("config.json", None, "config.json is broken: TypeError: "),
        ("tokenizer_config.json", {"extra_special_tokens": 3}, "cannot be loaded: TypeError: "),
        ("tokenizer_config.json", None, "cannot be loaded: (AttributeError|TypeError): "),
        ("tokenizer.json", None, "cannot be loaded: (AttributeError|TypeError): "),
    ],
)
def test_whatever_a_wrong_value_raises_the_model_is_named(tmp_path, file, change, says):
    bert().save_pretrained(tmp_path)
    sentences.tokenizer().save_pretrained(tmp_path)
    path = tmp_path / file
    content = None if change is None else {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps(content))
    with pytest.raises(IA3Error, match=says):
        load_encoder(tmp_path)
