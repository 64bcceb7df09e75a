"""Folders of each form that was ever written load with the same bits and the same predictions.

`saved-0.1.0` is from before the header held copies of the files beside it, `saved-with-copies` from
before there were classifiers on sentence encoders: adapters are as they were since.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pairs import relative
from support.paths import TESTS
from support.saved import WORDS, formula_gpt2, formula_llama, formula_vector
from support.tfew import word_tokenizer
from torch import Tensor, nn

from ia3 import FewShotClassifier, IA3Model
from ia3.adapter.files import (
    Adapter,
    adapter_files,
    read_adapter,
    unread_adapter,
    write_saved,
)
from ia3.classify.head_file import head_bytes, read_head
from ia3.classify.task_file import TaskFile
from ia3.files.saved import SavedFolder

FORMS = ("saved-0.1.0", "saved-with-copies", "saved-with-heads")
OLDEST, ADAPTERS, NEWEST = [TESTS / "fixtures" / form for form in FORMS]
ALL = pytest.mark.parametrize("saved", [OLDEST, ADAPTERS], ids=lambda folder: folder.name)
CLASSIFIERS = pytest.mark.parametrize(
    "saved", [OLDEST, ADAPTERS, NEWEST], ids=lambda folder: folder.name
)
IDS = torch.arange(24).reshape(2, 12)
BLOCK = ("mlp.down_proj", "self_attn.k_proj", "self_attn.v_proj")
LLAMA = [f"model.layers.{i}.{name}" for i in range(2) for name in BLOCK]
GPT2 = [f"transformer.h.{i}.{name}" for i in range(2) for name in ("attn.c_attn", "mlp.c_proj")]
BERT = [f"encoder.layer.{i}.attention.self.{name}" for i in range(2) for name in ("key", "value")]
SIZES = {
    "key": 16,
    "value": 16,
    "down_proj": 24,
    "k_proj": 16,
    "v_proj": 16,
    "c_attn": 48,
    "c_proj": 64,
}


def vectors_of(names: list[str], first: int) -> dict[str, Tensor]:
    """Module name -> its formula, numbered in this order from `first` on."""
    return {
        name: formula_vector(site, SIZES[name.rpartition(".")[2]])
        for site, name in enumerate(names, first)
    }


def scale_weights(model: nn.Module, vectors: Mapping[str, Tensor]) -> nn.Module:
    """The model with vectors multiplied into its weights by hand."""
    with torch.no_grad():
        for name, vector in vectors.items():
            module = model.get_submodule(name)
            if name.endswith("c_attn"):  # [in, out], with a bias
                module.weight.mul_(vector)
                module.bias.mul_(vector)
            elif name.endswith("down_proj"):  # [out, in], rescaled input
                module.weight.mul_(vector)
            else:
                module.weight.mul_(vector[:, None])
    return model


def assert_vectors(adapter: Adapter, expected: Mapping[str, Tensor]) -> None:
    assert adapter.vectors.keys() == expected.keys()
    for name, vector in expected.items():
        assert torch.equal(adapter.vectors[name].flatten(), vector)


@ALL
@torch.no_grad()
def test_an_adapter_with_a_copy_of_a_module(saved: Path) -> None:
    vectors, head = vectors_of(LLAMA, 1), formula_vector(0, 64 * 16).reshape(64, 16) / 2
    model = IA3Model.from_pretrained(formula_llama(), saved / "llama").eval()
    adapter = model.adapter("default")
    assert_vectors(adapter, vectors)
    assert adapter.copies.keys() == {"lm_head.weight"}
    assert torch.equal(adapter.copies["lm_head.weight"], head)
    expected = scale_weights(formula_llama(), vectors)
    expected.lm_head.weight.copy_(head)
    assert relative(model(IDS).logits, expected(IDS).logits) < 1e-5


@ALL
@torch.no_grad()
def test_an_adapter_with_values_that_stay_one(saved: Path) -> None:
    """The 16 values of the queries in the fused projection."""
    vectors = vectors_of(GPT2, 0)
    for name in GPT2[::2]:
        vectors[name][:16] = 1
    model = IA3Model.from_pretrained(formula_gpt2(), saved / "gpt2").eval()
    adapter = model.adapter("default")
    assert_vectors(adapter, vectors)
    assert adapter.frozen == dict.fromkeys(GPT2[::2], ((0, 16),))
    expected = scale_weights(formula_gpt2(), vectors)
    assert relative(model(IDS).logits, expected(IDS).logits) < 1e-5


@CLASSIFIERS
@torch.no_grad()
def test_a_classifier(saved: Path) -> None:
    tokenizer = word_tokenizer(WORDS)
    classifier = FewShotClassifier.load(
        saved / "classifier", model=formula_llama(), tokenizer=tokenizer
    )
    assert_vectors(classifier.adapter_, vectors_of(LLAMA, 0))
    base = scale_weights(formula_llama(), vectors_of(LLAMA, 0))
    texts = ["it is a good day", "so cold", "warm day"]
    ranked = tokenizer.convert_tokens_to_ids(["awful", "great"])
    expected = torch.zeros(len(texts), 2, dtype=torch.float64)
    for row, text in enumerate(texts):
        for prompt in (f"{text} so what", f"a {text}"):
            logits = base(torch.tensor([tokenizer(prompt).input_ids])).logits[0, -1]
            expected[row] += logits[ranked].double().softmax(-1) / 2
    assert classifier.classes_.tolist() == ["neg", "pos"]
    assert torch.from_numpy(classifier.predict_proba(texts)).allclose(expected, atol=1e-5)
    assert classifier.predict(["so cold", "warm day"]).tolist() == [
        ["neg", "pos"][p] for p in expected[1:].argmax(-1)
    ]


@pytest.mark.parametrize("name", ["llama", "gpt2", "classifier"])
def test_writing_it_again_gives_the_same_bytes_under_a_header_that_says_more(name: str) -> None:
    files = adapter_files(read_adapter(OLDEST / name))
    assert files["adapter_config.json"] == (OLDEST / name / "adapter_config.json").read_bytes()
    before = (OLDEST / name / "adapter_model.safetensors").read_bytes()
    (old, old_values), (new, values) = map(parts, (before, files["adapter_model.safetensors"]))
    assert values == old_values
    said = new["__metadata__"]
    assert said.pop("ia3_sha256") == hashlib.sha256(values).hexdigest()
    assert said.pop("ia3_config").encode() == files["adapter_config.json"]
    assert (new, list(new)) == (old, list(old))
    assert adapter_files(read_adapter(OLDEST / name)) == files


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_last_form_of_an_adapter_is_written_again_byte_for_byte(
    name: str, tmp_path: Path
) -> None:
    write_saved(tmp_path, adapter_files(read_adapter(ADAPTERS / name)))
    assert files_in(tmp_path) == files_in(ADAPTERS / name)


@pytest.mark.parametrize("form", [ADAPTERS, NEWEST], ids=lambda folder: folder.name)
def test_a_classifier_is_written_in_the_last_form_byte_for_byte(form: Path, tmp_path: Path) -> None:
    model = formula_llama()
    model.config._name_or_path = "tiny-llama"
    options = {"model": model, "tokenizer": word_tokenizer(WORDS)}
    FewShotClassifier.load(form / "classifier", **options).save(tmp_path)
    assert files_in(tmp_path) == files_in(NEWEST / "classifier")


def test_an_encoders_adapter_and_head(tmp_path: Path) -> None:
    folder = NEWEST / "encoder"
    with SavedFolder(folder) as saved:
        task = TaskFile.from_json(saved.text("ia3_task.json"), "the task")
        assert_vectors(unread_adapter(saved).whole(), vectors_of(BERT, 2))
        head = read_head(saved, 3, task.head)
        assert task.vectors == saved.digest
    assert torch.equal(head.weight, formula_vector(5, 3 * 16).reshape(3, 16))
    assert torch.equal(head.bias, formula_vector(6, 3))
    assert task.labels == ["cold", "good", "warm"]
    assert (task.engine, task.temperature, task.threads) == ("encoder", 0.75, 1)
    assert [each.accuracy for each in task.selection] == [0.75, 0.5]

    def beside(digest: str) -> dict[str, str | bytes]:
        said = task.model_copy(update={"vectors": digest}).to_json()
        return {"ia3_task.json": said, "ia3_head.safetensors": head_bytes(head.weight, head.bias)}

    write_saved(tmp_path, adapter_files(read_adapter(folder), beside))
    assert files_in(tmp_path) == files_in(folder)


def parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header, and its values."""
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]
