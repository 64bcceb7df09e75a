"""`ia3 merge` and `ia3 export`, as processes, on classifiers of both engines."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from support.command import Place, assert_refused, said
from support.encoders import encoder_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from ia3 import FewShotClassifier
from ia3.base.encoders import load_encoder
from ia3.sentences.embedding import embeddings, tokenized

TEXTS = ["the quick brown fox", "a lazy dog", "what the fox", "dog jumps over", "lazy lazy dog"]
LABELS = ["x", "y", "x", "y", "y"]
TEST = "text,label\n" + "".join(f"{t},{k}\n" for t, k in zip(TEXTS, LABELS, strict=True))
FULL_RANK = ("export", "encoder-adapter", "--lora", 16, "--out", "full-rank", "--lossy", "--bias")
MERGE = ("merge", "encoder-adapter", "--out")
EXPORT = ("export", "encoder-adapter", "--lora", 4, "--out")


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model):
    """A classifier on an encoder, one on a language model, and what the commands said of them."""
    place = Place(tmp_path_factory.mktemp("export"), tiny_model)
    place.write("test.csv", TEST)
    encoder = encoder_folder(place.folder / "encoder")
    for name, options in {
        "encoder-adapter": {"model": encoder, "steps": 8, "learning_rate": 0.1},
        "answers-adapter": {"model": tiny_model, "steps": 3, "learning_rate": 0.1},
    }.items():
        FewShotClassifier(**options).fit(TEXTS, LABELS).save(place.folder / name)
    shutil.copytree(place.folder / "encoder", place.folder / "moved")
    (place.folder / "full").mkdir()
    (place.folder / "full" / "letter.txt").write_text("not to be lost")
    place.done = place.run_all(
        (*MERGE, "merged", "--json"),
        ("merge", "answers-adapter", "--out", "answers"),
        (*MERGE, "merged"),
        (*MERGE, "merged", "--force", "--model", "moved"),
        (*MERGE, "full", "--force"),
        (*MERGE, "encoder-adapter", "--force"),
        (*MERGE, "encoder", "--force"),
        (*FULL_RANK, "--data", "test.csv", "--json"),
        (*EXPORT, "lora", "--lossy", "--data", "test.csv"),
        (*EXPORT, "refused"),
        ("export", "answers-adapter", "--lora", 2, "--out", "answers-lora", "--lossy", "--json"),
        ("merge", "nothing", "--out", "x"),
        (*EXPORT, "encoder-adapter", "--lossy", "--force"),
    )
    return place


def test_an_encoders_head_on_the_merged_models_vectors_gives_the_classifiers_labels(place):
    told = said(place.done[0])
    folder = place.folder / told["model"]
    assert told["bytes"] == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert (told["dtype"], told["base_model"]) == ("float32", str(place.folder / "encoder"))
    assert told["stays_with_adapter"] == ["ia3_task.json", "ia3_head.safetensors"]
    encoder = load_encoder(folder)
    vectors = embeddings(encoder, tokenized(encoder, TEXTS)).double()
    head = load_file(place.folder / "encoder-adapter" / "ia3_head.safetensors")
    scores = vectors @ head["weight"].double().T + head["bias"].double()
    classifier = FewShotClassifier.load(place.folder / "encoder-adapter")
    expected = classifier.predict_proba(TEXTS)
    found = (scores / classifier.temperature_).softmax(-1).numpy()
    assert np.abs(found - expected).max() < 1e-5


def test_a_language_model_is_merged_in_its_own_type(place):
    done = place.done[1]
    assert done.returncode == 0
    stays = r"the classifier's prompts and the labels' words stay in answers-adapter \(ia3_task"
    assert re.match(
        rf"{stays}\.json\)\n\d+ vectors merged into .*, float32; \d+ MiB in answers\n$", done.stderr
    )
    folder = place.folder / "answers"
    ids = AutoTokenizer.from_pretrained(folder)(TEXTS[0], return_tensors="pt")
    base = AutoModelForCausalLM.from_pretrained(place.model)
    oracle = peft.PeftModel.from_pretrained(base, place.folder / "answers-adapter").eval()
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(folder)(**ids).logits
        assert (found - oracle(**ids).logits).abs().max() < 1e-5


def test_what_is_there_is_replaced_only_where_that_is_said_and_it_is_a_model(place):
    assert_refused(place.done[2], "merged exists already: choose another --out, or give --force")
    assert place.done[3].returncode == 0, place.done[3].stderr
    assert_refused(place.done[4], "full holds no config.json, and so nothing that --force could")
    assert (place.folder / "full" / "letter.txt").read_text() == "not to be lost"
    assert_refused(place.done[5], "encoder-adapter holds no config.json")
    assert_refused(place.done[6], "--out encoder holds")
    assert (place.folder / "encoder" / "model.safetensors").is_file()
    assert_refused(place.done[12], "--out encoder-adapter holds encoder-adapter, which is read")
    assert place.done[11].returncode == 1


def test_a_lora_is_refused_until_its_loss_is_taken(place):
    assert_refused(place.done[9], "give --lossy if that will do, or use 'ia3 merge'")
    assert not (place.folder / "refused").exists()


def test_a_lora_of_full_rank_labels_as_the_classifier_does(place):
    told = said(place.done[7])
    assert max(site["change"] for site in told["by_site"]) < 1e-5
    classifier = FewShotClassifier.load(place.folder / "encoder-adapter")
    accuracy = float(np.mean(classifier.predict(TEXTS) == LABELS))
    assert told["accuracy"] == {"adapter": accuracy, "lora": accuracy, "texts": 5}
    base = load_encoder(place.folder / "moved")
    lora = peft.PeftModel.from_pretrained(base.model, place.folder / "full-rank").eval()
    found = embeddings(base, tokenized(base, TEXTS), model=lora)
    merged = load_encoder(place.folder / "merged")
    assert (found - embeddings(merged, tokenized(merged, TEXTS))).abs().max() < 1e-4


def test_a_lora_of_low_rank_says_what_it_loses(place):
    done = place.done[8]
    assert done.returncode == 0, done.stderr
    accuracy = r"accuracy on test\.csv: \d+\.\d% with the adapter, \d+\.\d% with the LoRA \([+-]"
    assert re.search(accuracy, done.stdout.replace("\n", " "))
    assert "encoder.layer.*.attention.self.key" in done.stdout
    assert re.search(r"LoRA of rank 4: \d+ modules; \d+\.\d MiB in lora\n$", done.stderr)
    told = said(place.done[10])
    assert told["accuracy"] is None
    config = json.loads((place.folder / "answers-lora" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (2, str(place.model))
    base = AutoModelForCausalLM.from_pretrained(place.model)
    assert peft.PeftModel.from_pretrained(base, place.folder / "answers-lora").peft_config
