"""An adapter merged into a folder of its own, as transformers and others read it."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.disks import full_disk
from support.encoders import encoder_folder, t5
from support.hub import Hub
from support.pairs import randomize, vectors
from support.sentences import LABELS, TEXTS, bert, tokenizer
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
)

import ia3
from ia3.base.encoders import load_encoder
from ia3.model.merged import on_its_base, write_merged
from ia3.sentences.embedding import embeddings, tokenized
from ia3.tfew.temporary_adapter import temporary_adapter

AUTO = {
    "llama": AutoModelForCausalLM,
    "gpt2": AutoModelForCausalLM,
    "t5": AutoModelForSeq2SeqLM,
}


def saved_adapter(base: Path, folder: Path, kind=AutoModelForCausalLM, **config) -> Path:
    """An adapter of random vectors, which names its base model's folder."""
    model = ia3.get_peft_model(kind.from_pretrained(base), ia3.IA3Config(**config))
    randomize(vectors(model), 0)
    model.save_pretrained(folder)
    return folder


def merged(adapter: Path, out: Path) -> Path:
    write_merged(on_its_base(adapter), out)
    return out


def outputs(model, inputs):
    given = {key: value for key, value in inputs.items() if key != "labels"}
    if getattr(model.config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = inputs["labels"]
    with torch.no_grad():
        found = model(**given)
    return (found.logits if "logits" in found else found.last_hidden_state).float()


def in_peft(base: Path, adapter: Path, kind, **options):
    """PEFT's model with the same adapter, merged by PEFT."""
    model = peft.PeftModel.from_pretrained(kind.from_pretrained(base, **options), adapter)
    return model.merge_and_unload().eval()


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("llama", torch.float32), ("llama", torch.bfloat16)]
    + [(kind, torch.float32) for kind in ("gpt2", "t5")],
)
def test_transformers_reads_a_merged_folder_and_computes_as_peft_merged(
    make_model, make_inputs, tmp_path, kind, dtype
):
    make_model(kind).to(dtype).save_pretrained(tmp_path / "base")
    task = "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
    adapter = saved_adapter(tmp_path / "base", tmp_path / "adapter", AUTO[kind], task_type=task)
    folder = merged(adapter, tmp_path / "merged")
    found = AUTO[kind].from_pretrained(folder)
    assert found.dtype == dtype
    oracle = in_peft(tmp_path / "base", adapter, AUTO[kind], dtype=torch.float32)
    inputs = make_inputs(kind)
    expected = outputs(oracle, inputs)
    plain = AUTO[kind].from_pretrained(tmp_path / "base", dtype=torch.float32)
    moved = (outputs(plain, inputs) - expected).norm()
    error = (outputs(found, inputs) - expected).norm()
    assert error < (1e-4 if dtype == torch.float32 else 0.2) * moved
    # Nothing is left of the adapter, and other weights are the very bits.
    before = load_file(tmp_path / "base" / "model.safetensors")
    after = load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {key for key in after if not torch.equal(before[key], after[key])}
    # The biases of a new GPT-2 are zeros.
    assert changed == {
        f"{name}.weight" for name in on_its_base(adapter).model.targeted_module_names
    }


def test_what_lies_beside_the_weights_is_copied_as_it_is(tiny_model, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    # As transformers before version 5 wrote it, and older programs read it.
    config = json.loads((base / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": None}
    config["torch_dtype"] = config.pop("dtype")
    files = {
        "config.json": json.dumps(config, indent=1),
        # Many models have such a file, which transformers reads and refuses to write.
        "generation_config.json": json.dumps({"temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}),
        "chat_template.jinja": "{{ messages }}",
        "tokenizer.model": "SentencePiece",
        "preprocessor_config.json": "{}",
        "LICENSE": "as you like",
    }
    for name, content in files.items():
        (base / name).write_text(content)
    others = ["README.md", "pytorch_model.bin", "modeling_own.py", "trainer_state.json"]
    for name in others:
        (base / name).write_text("no part of the model")
    folder = merged(
        saved_adapter(base, tmp_path / "adapter", task_type="CAUSAL_LM"), tmp_path / "m"
    )
    for name, content in files.items():
        assert (folder / name).read_text() == content
    assert not {*others} & {*os.listdir(folder)}
    text = "A short text: 12, naïve"
    before, after = (AutoTokenizer.from_pretrained(place) for place in (tiny_model, folder))
    assert after(text).input_ids == before(text).input_ids
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.top_p == 0.9


def test_a_config_that_no_longer_holds_is_written_anew(make_inputs, tmp_path):
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    BertModel(BertConfig(**sizes, num_attention_heads=4)).save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    model = ia3.get_peft_model(base, ia3.IA3Config(task_type="SEQ_CLS"))
    randomize(vectors(model), 0)
    model.eval().save_pretrained(tmp_path / "adapter")
    folder = merged(tmp_path / "adapter", tmp_path / "merged")
    found = AutoModelForSequenceClassification.from_pretrained(folder)
    assert found.config.num_labels == 5
    inputs = make_inputs("llama")
    expected = outputs(model, inputs)
    assert expected.shape == (3, 5)
    assert (outputs(found, inputs) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("inside", ["", "0_Transformer"])
def test_an_encoder_stays_a_folder_of_sentence_transformers(tmp_path, inside):
    dense = [{"in_features": 16, "out_features": 8, "activation_function": "torch.nn.Tanh"}]
    base = encoder_folder(tmp_path / "base", dense=dense, normalize=True, settings={})
    if inside:
        # Older versions put the model into a folder of its own.
        (base / inside).mkdir()
        for path in [*base.glob("*token*"), base / "config.json", base / "model.safetensors"]:
            path.rename(base / inside / path.name)
        (base / "sentence_bert_config.json").rename(base / inside / "sentence_bert_config.json")
        modules = json.loads((base / "modules.json").read_text())
        modules[0]["path"] = inside
        (base / "modules.json").write_text(json.dumps(modules))
    encoder = load_encoder(base)
    model = ia3.get_peft_model(
        encoder.model, ia3.IA3Config(task_type="FEATURE_EXTRACTION", target_modules="all-linear")
    )
    randomize(vectors(model), 0)
    texts = ["the quick brown fox", "a lazy dog jumps"]
    expected = embeddings(encoder, tokenized(encoder, texts), model=model)
    model.save_pretrained(tmp_path / "adapter")
    model.unload()
    folder = merged(tmp_path / "adapter", tmp_path / "merged")
    names = {p.relative_to(base) for p in base.rglob("*")}
    assert {p.relative_to(folder) for p in folder.rglob("*")} == names
    found = load_encoder(folder)
    assert found.described() == encoder.described()
    vectors_found = embeddings(found, tokenized(found, texts))
    assert (vectors_found - expected).abs().max() < 1e-5
    assert (embeddings(encoder, tokenized(encoder, texts)) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["without a pooler", "half of T5"])
def test_an_encoders_classifier_is_merged_into_what_it_was_trained_on(tmp_path, kind):
    # A BERT of which the pooler was never saved; a T5 whose config speaks of a decoder too.
    if kind == "half of T5":
        encoder_folder(tmp_path / "base", t5())
    else:
        bert().save_pretrained(tmp_path / "base")
        tokenizer().save_pretrained(tmp_path / "base")
    classifier = ia3.FewShotClassifier(str(tmp_path / "base"), steps=5, learning_rate=0.1)
    classifier.fit(TEXTS, LABELS).save(tmp_path / "adapter")
    folder = merged(tmp_path / "adapter", tmp_path / "merged")
    assert load_file(folder / "model.safetensors").keys() == (
        load_file(tmp_path / "base" / "model.safetensors").keys()
    )
    with temporary_adapter(classifier.base, classifier.adapter_) as model:
        expected = embeddings(classifier.base, tokenized(classifier.base, TEXTS), model=model)
    found = load_encoder(folder)
    assert (embeddings(found, tokenized(found, TEXTS)) - expected).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore:.*in no checkpoint")
@pytest.mark.parametrize("on_pooler", [False, True])
def test_a_pooler_that_was_never_saved_is_left_out_unless_it_is_rescaled(tmp_path, on_pooler):
    bert().save_pretrained(tmp_path / "base")
    base = AutoModel.from_pretrained(tmp_path / "base")
    targets = "all-linear" if on_pooler else ["key", "value"]
    config = ia3.IA3Config(task_type="FEATURE_EXTRACTION", target_modules=targets)
    model = ia3.get_peft_model(base, config)
    randomize(vectors(model), 0)
    model.save_pretrained(tmp_path / "adapter")
    if on_pooler:
        with pytest.raises(ia3.BrokenFileError, match=r"pooler.*would be random"):
            on_its_base(tmp_path / "adapter")
        return
    folder = merged(tmp_path / "adapter", tmp_path / "merged")
    before = load_file(tmp_path / "base" / "model.safetensors")
    assert load_file(folder / "model.safetensors").keys() == before.keys()
    ids = torch.arange(3, 9)[None]
    expected = model.eval()(input_ids=ids).last_hidden_state
    found = AutoModel.from_pretrained(folder)(input_ids=ids).last_hidden_state
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:.*in no checkpoint")
def test_a_base_model_that_lacks_weights_is_not_merged_with_random_ones(tiny_model, tmp_path):
    adapter = saved_adapter(tiny_model, tmp_path / "adapter", task_type="CAUSAL_LM")
    shutil.copytree(tiny_model, tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    del weights["model.layers.0.self_attn.k_proj.weight"]
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ia3.BrokenFileError, match=r"k_proj.*would be random"):
        on_its_base(adapter, str(tmp_path / "base"))


def test_a_link_to_a_folder_stays_one(tiny_model, tmp_path):
    adapter = saved_adapter(tiny_model, tmp_path / "adapter", task_type="CAUSAL_LM")
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    for _ in range(2):  # the second replaces the first
        merged(adapter, tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "disk" / "config.json").is_file()
    assert {*os.listdir(tmp_path)} == {"adapter", "disk", "link"}


def test_an_adapters_own_tokenizer_goes_before_the_base_models(tiny_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_tokens(["<new>"])
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model = ia3.get_peft_model(base, ia3.IA3Config(task_type="CAUSAL_LM"))
    randomize(vectors(model), 0)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    folder = merged(tmp_path / "adapter", tmp_path / "merged")
    found = AutoTokenizer.from_pretrained(folder)
    assert found("<new>").input_ids == tokenizer("<new>").input_ids
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert again.config.vocab_size == len(tokenizer)
    ids = {"input_ids": torch.tensor([[5, len(tokenizer) - 1, 7]])}
    assert (outputs(again, ids) - outputs(model.eval(), ids)).abs().max() < 1e-5


def test_whoever_may_read_a_new_file_may_read_the_weights(tiny_model, tmp_path):
    adapter = saved_adapter(tiny_model, tmp_path / "adapter", task_type="CAUSAL_LM")
    before = os.umask(0o027)
    try:
        folder = merged(adapter, tmp_path / "merged")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}


def test_a_full_disk_leaves_what_was_there(tiny_model, tmp_path):
    adapter = saved_adapter(tiny_model, tmp_path / "adapter", task_type="CAUSAL_LM")
    folder = merged(adapter, tmp_path / "merged")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    again = on_its_base(adapter)
    with full_disk(100_000), pytest.raises(OSError):
        write_merged(again, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert {*os.listdir(tmp_path)} == {"adapter", "merged"}


def test_an_adapter_that_names_no_base_model_takes_the_one_that_is_given(tiny_model, tmp_path):
    adapter = saved_adapter(tiny_model, tmp_path / "adapter", task_type="CAUSAL_LM")
    config = ia3.IA3Config.from_pretrained(adapter)
    replace(config, base_model_name_or_path=None).save_pretrained(adapter)
    with pytest.raises(ia3.IA3Error, match="names no base model: say which"):
        on_its_base(adapter)
    assert on_its_base(adapter, str(tiny_model)).model.peft_config["default"] is not None
    with pytest.raises(ia3.MissingFileError, match="no model at 'some/where'"):
        on_its_base(adapter, "some/where")


ON_THE_HUB = """
import sys
from pathlib import Path
from ia3.model.merged import on_its_base, write_merged
write_merged(on_its_base(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("inside", ["", "0_Transformer"])
def test_of_a_base_model_on_the_hub_what_is_needed_is_fetched(tmp_path, inside):
    base = encoder_folder(tmp_path / "base", settings={})
    adapter = saved_adapter(base, tmp_path / "adapter", AutoModel, task_type="FEATURE_EXTRACTION")
    if inside:
        (base / inside).mkdir()
        for path in [*base.glob("*token*"), base / "config.json", base / "model.safetensors"]:
            path.rename(base / inside / path.name)
        modules = json.loads((base / "modules.json").read_text())
        modules[0]["path"] = inside
        (base / "modules.json").write_text(json.dumps(modules))
    config = ia3.IA3Config.from_pretrained(adapter)
    replace(config, base_model_name_or_path="someone/encoder").save_pretrained(adapter)
    hub = Hub()
    for path in base.rglob("*"):
        if path.is_file():
            hub.files[str(path.relative_to(base))] = path.read_bytes()
    hub.files |= {"onnx/model.onnx": b"large", "pytorch_model.bin": b"large", "train.py": b"large"}
    environment = hub.environment(tmp_path / "home")
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        command = [sys.executable, "-c", ON_THE_HUB, str(adapter), str(tmp_path / "merged")]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    finally:
        hub.shutdown()
        hub.server_close()
    assert done.returncode == 0, done.stderr[-3000:]
    assert "large" not in {hub.files[name].decode("utf-8", "replace") for name in hub.downloaded}
    write_merged(on_its_base(adapter, str(base)), tmp_path / "here")
    here, found = tmp_path / "here", tmp_path / "merged"
    names = {p.relative_to(here) for p in here.rglob("*") if p.is_file()}
    assert {p.relative_to(found) for p in found.rglob("*") if p.is_file()} == names
    assert {
        name for name in names if (here / name).read_bytes() != (found / name).read_bytes()
    } == set()
