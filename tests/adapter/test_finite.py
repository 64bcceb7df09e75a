"""Vectors that are not finite: refused wherever they come in or go out, with what is broken named.

They would turn every row of a batch into NaN, far from where they came from.
"""

import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.pairs import adapted
from support.snapshots import assert_unchanged, snapshot
from support.tfew import tiny_llama, word_tokenizer

import ia3
from ia3 import AdapterBank, FewShotClassifier, IA3Config, IA3Error, IA3Model
from ia3.adapter.combining import combine
from ia3.adapter.convert import convert_tfew_authors
from ia3.adapter.files import adapter_files, read_adapter
from ia3.adapter.layout import read_outline, read_vectors

WEIGHTS = "adapter_model.safetensors"
MODULE = "model.layers.1.self_attn.v_proj"
KEY = f"base_model.model.{MODULE}.ia3_l"
SAID = re.escape(f"the vector of {MODULE!r} is not finite")
BROKEN = pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])


@pytest.fixture
def folder(tmp_path):
    """A good adapter for the tiny LLaMA."""
    adapted(tiny_llama()).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def spoil(folder, value, dtype=torch.float32, pickled=False):
    """Write one value of one vector, in its safetensors file or in a pickled one."""
    tensors = load_file(folder / WEIGHTS)
    tensors[KEY] = tensors[KEY].to(dtype)
    tensors[KEY][3] = value
    if pickled:
        (folder / WEIGHTS).unlink()
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / WEIGHTS)


@BROKEN
@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "pickled"])
def test_a_file_is_refused_by_all_that_read_it(folder, value, pickled):
    spoil(folder, value, pickled=pickled)
    said = f"{re.escape(str(folder))}/adapter_model.*{SAID}"
    base = tiny_llama()
    before = snapshot(base)
    with pytest.raises(IA3Error, match=rf"{said} \(1 of its 16 values, the first is {value}\)"):
        IA3Model.from_pretrained(base, folder)
    assert_unchanged(base, before)
    model = adapted(base)
    before = snapshot(model)
    for name in ("new", "default"):
        with pytest.raises(IA3Error, match=said):
            model.load_adapter(folder, name)
    assert_unchanged(model, before)
    with pytest.raises(IA3Error, match=said):
        read_vectors(read_outline(folder))
    bank = AdapterBank(tiny_llama())
    with pytest.raises(IA3Error, match=said):
        bank.add("broken", folder)
    assert len(bank) == 0
    classifier = FewShotClassifier(
        tiny_llama(), tokenizer=word_tokenizer(["good", "bad"]), steps=0, init_from=folder
    )
    with pytest.raises(IA3Error, match=said):
        classifier.fit(["good", "bad"], ["good", "bad"])


def test_a_number_that_only_a_wider_file_holds_is_refused(folder):
    spoil(folder, 1e300, torch.float64)
    with pytest.raises(IA3Error, match=SAID):
        IA3Model.from_pretrained(tiny_llama(), folder)


def test_a_file_of_the_t_few_authors_is_refused(tiny_t5, tmp_path):
    names = [n for n, _ in tiny_t5.named_modules() if n.endswith(("Attention.k", "Attention.v"))]
    vectors = {f"{name}.multi_lora_b": torch.ones(32, 1) for name in names}
    vectors[f"{names[1]}.multi_lora_b"][0] = torch.nan
    torch.save(vectors, tmp_path / "finish.pt")
    with pytest.raises(IA3Error, match=rf"finish\.pt: the vector of '{names[1]}' is not finite"):
        convert_tfew_authors(tmp_path / "finish.pt", tiny_t5)


@BROKEN
def test_vectors_in_memory_are_refused(value):
    model = adapted(tiny_llama())
    vectors = {name: vector.detach().clone() for name, vector in model.vectors("default").items()}
    vectors[MODULE][3] = value
    before = snapshot(model)
    with pytest.raises(IA3Error, match=SAID):
        model.add_adapter("new", IA3Config(), vectors=vectors)
    tensors = {f"base_model.model.{name}.ia3_l": vector for name, vector in vectors.items()}
    with pytest.raises(IA3Error, match=SAID):
        ia3.set_peft_model_state_dict(model, tensors)
    assert_unchanged(model, before)
    with pytest.raises(IA3Error, match=SAID):
        IA3Model(tiny_llama(), IA3Config(), vectors=vectors)
    adapter = model.adapter("default")
    adapter.vectors = vectors
    with pytest.raises(IA3Error, match=f"elsewhere: {SAID}"):
        IA3Model.from_adapter(tiny_llama(), adapter, source="elsewhere")
    with pytest.raises(IA3Error, match=f"adapter 'new': {SAID}"):
        AdapterBank(tiny_llama()).add("new", adapter)
    classifier = FewShotClassifier(
        tiny_llama(), tokenizer=word_tokenizer(["good", "bad"]), steps=0, init_from=adapter
    )
    with pytest.raises(IA3Error, match=f"init_from: {SAID}"):
        classifier.fit(["good", "bad"], ["good", "bad"])


def test_a_bank_of_half_precision_refuses_what_it_cannot_hold():
    model = adapted(tiny_llama())
    model.vectors("default")[MODULE].data[3] = 1e6
    bank = AdapterBank(tiny_llama(), dtype=torch.float16)
    with pytest.raises(IA3Error, match=r"'large': it has values beyond torch\.float16"):
        bank.add("large", model.adapter("default"))
    assert len(bank) == 0


@BROKEN
def test_a_training_that_diverged_is_not_saved(folder, value):
    model = IA3Model.from_pretrained(tiny_llama(), folder, is_trainable=True)
    saved = (folder / WEIGHTS).read_bytes()
    model.add_adapter("good", IA3Config())
    model.vectors("default")[MODULE].data[3] = value
    with pytest.raises(IA3Error, match=f"adapter 'default': {SAID}.*lower learning rate"):
        model.save_pretrained(folder)
    # Neither is written, and what was there stays.
    assert (folder / WEIGHTS).read_bytes() == saved
    assert not (folder / "good").exists()
    model.save_pretrained(folder, selected_adapters=["good"])
    assert read_adapter(folder / "good").vectors.keys() == model.vectors("good").keys()
    with pytest.raises(IA3Error, match=SAID):
        adapter_files(model.adapter("default"))


@pytest.mark.parametrize("how", ["linear", "average", "geometric_mean", "task_arithmetic", "ties"])
@BROKEN
def test_what_is_combined_must_be_finite(how, value):
    good = adapted(tiny_llama()).adapter("default")
    broken = adapted(tiny_llama()).adapter("default")
    broken.vectors[MODULE][3] = value
    # A weight of 0 leaves nothing out: 0 times infinity is NaN.
    for weights in ([1, 1], [1, 0]):
        with pytest.raises(IA3Error, match=f"second: {SAID}"):
            combine([("first", good), ("second", broken)], weights, how)


@pytest.mark.parametrize("how", ["linear", "task_arithmetic"])
def test_a_combination_that_overflows_is_refused(how):
    model = adapted(tiny_llama())
    model.add_adapter("other", IA3Config())
    large = float(np.finfo(np.float32).max)
    model.vectors("default")[MODULE].data[3] = large / 2
    before = snapshot(model)
    with pytest.raises(IA3Error, match=rf"{how} of \['default', 'other'\].*{MODULE}.* float32"):
        model.add_weighted_adapter(["default", "other"], [3, 1], "new", how)
    assert_unchanged(model, before)


def test_a_bank_passes_over_a_file_that_was_replaced_by_a_broken_one(folder):
    bank = AdapterBank(tiny_llama())
    bank.add("a", folder)
    before = bank.values.clone()
    spoil(folder, torch.nan)
    refreshed = bank.refresh()
    assert refreshed.changed == []
    assert re.search(SAID, refreshed.failed["a"])
    assert torch.equal(bank.values[:2], before[:2])
    with pytest.raises(IA3Error, match=f"'a' cannot be used: .*{SAID}"):
        bank.pin("a")
