"""Adapters of the T-Few authors' code: onto the right sites, with the same outputs, or refused."""

import json
import pickle
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.command import Place, assert_refused
from support.paths import SHARED
from torch import Tensor, nn
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from ia3 import IA3Config, IA3Error, IA3Model
from ia3.adapter.convert import convert_tfew_authors, structure_of
from ia3.errors import BrokenFileError
from ia3.targets.structure import paper_targets

T03B = SHARED / "golden" / "t03b_ia3_finish.pt"

KEY = "decoder.block.0.layer.1.EncDecAttention.k.multi_lora_b"
QUERY = KEY.replace(".k.", ".q.")
INNER = "decoder.block.1.layer.2.DenseReluDense.wi_1.multi_lora_b"


def vectors_of(model: nn.Module) -> dict[str, Tensor]:
    """What the authors' code would save for a model: every vector near one, all different."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"{name}.multi_lora_b": 1 + 0.3 * torch.randn(module.out_features, 1, generator=generator)
        for name, module in model.named_modules()
        if name.endswith(("Attention.k", "Attention.v", "DenseReluDense.wi_1"))
    }


@pytest.fixture
def their_file(tiny_t5: PreTrainedModel, tmp_path: Path) -> Path:
    path = tmp_path / "finish.pt"
    torch.save(vectors_of(tiny_t5), path)
    return path


def test_t0_3b(tmp_path):
    if not T03B.is_file():
        pytest.skip(f"the T-Few authors' adapter is not at {T03B}")
    sizes = {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32}
    kind = {"vocab_size": 32128, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    with torch.device("meta"):
        model = T5ForConditionalGeneration(T5Config(**sizes, **kind))
    adapter, vectors = convert_tfew_authors(T03B, model)
    theirs = torch.load(T03B, weights_only=True)
    assert len(vectors) == len(theirs) == 192
    assert sum(vector.numel() for vector in vectors.values()) == 540_672
    assert vectors.keys() == {target.name for target in paper_targets(model)}
    for name, vector in vectors.items():
        if name.endswith(".wo"):
            expected = theirs[f"{name.removesuffix('wo')}wi_1.multi_lora_b"].T
            assert vector.shape == (1, 5120)
        else:
            expected = theirs[f"{name}.multi_lora_b"]
            assert vector.shape == (2048, 1)
        torch.testing.assert_close(vector, expected, rtol=0, atol=0)
        assert (vector.dtype, vector.device.type) == (torch.float32, "cpu")
    assert adapter.task_type == "SEQ_2_SEQ_LM"
    assert adapter.target_modules == {"k", "v", "wo"}
    assert adapter.feedforward_modules == {"wo"}
    IA3Model(model, adapter, vectors=vectors).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == 192
    for name, vector in vectors.items():
        assert torch.equal(saved[f"base_model.model.{name}.ia3_l"], vector)


def test_half_precision_file_gives_float32(tiny_t5: PreTrainedModel, tmp_path: Path) -> None:
    path = tmp_path / "finish.pt"
    torch.save({name: vector.half() for name, vector in vectors_of(tiny_t5).items()}, path)
    _, vectors = convert_tfew_authors(path, tiny_t5)
    assert {vector.dtype for vector in vectors.values()} == {torch.float32}


@pytest.fixture
def place(tiny_t5, their_file):
    """A folder with the authors' file and the model's config, whose weights are elsewhere."""
    tiny_t5.config.save_pretrained(their_file.parent / "only-config")
    return Place(their_file.parent)


def test_a_converted_adapter_computes_what_the_authors_did(place, tiny_t5, make_model, make_inputs):
    options = ("--model", "only-config", "--out", "new/adapter", "--json")
    done = place.run("convert", "finish.pt", *options)
    assert (done.returncode, done.stderr) == (0, "")
    expected, folder = vectors_of(tiny_t5), place.folder / "new/adapter"
    weights = folder / "adapter_model.safetensors"
    assert json.loads(done.stdout) == {
        "adapter": "new/adapter",
        "vectors": len(expected),
        "values": sum(vector.numel() for vector in expected.values()),
        "adapter_bytes": weights.stat().st_size,
    }
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", weights.name}
    config = IA3Config.from_pretrained(folder)
    assert config.base_model_name_or_path == "only-config"
    assert config.inference_mode
    with safe_open(weights, framework="pt") as file:
        # The base model's values are not there to be looked at.
        assert file.metadata().keys() == {"format", "ia3_config", "ia3_sha256"}

    theirs = make_model("t5")
    for name, vector in expected.items():
        module = theirs.get_submodule(name.removesuffix(".multi_lora_b"))
        with torch.no_grad():
            module.weight.mul_(vector)
    inputs = make_inputs("t5")
    for library in (IA3Model, peft.PeftModel):
        adapted = library.from_pretrained(make_model("t5"), folder)
        with torch.no_grad():
            found, scaled = adapted(**inputs).logits, theirs(**inputs).logits
            plain = make_model("t5")(**inputs).logits
        torch.testing.assert_close(found, scaled, rtol=1e-5, atol=1e-5)
        assert (scaled - plain).abs().max() > 1e-2


@pytest.mark.slow
def test_a_folder_is_replaced_only_when_told(place):
    out = place.folder / "adapter"
    out.mkdir()
    (out / "mine").write_bytes(b"")
    command = ("convert", "finish.pt", "--model", "only-config", "--out", "adapter")
    assert_refused(place.run(*command), "adapter exists already")
    assert [path.name for path in out.iterdir()] == ["mine"]
    # What a killed command left is nothing to lose.
    (out / "mine").rename(out / ".ia3-0123456789ab")
    done = place.run(*command)
    # Keys and values of 6 attentions, 32 each, and the inner activations of 4 layers, 48 each.
    assert done.returncode == 0
    assert done.stderr.startswith("16 vectors of 576 values; ")
    assert {path.name for path in out.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert_refused(place.run(*command), "adapter exists already")
    (out / "ia3_task.json").write_text("another adapter's")
    assert place.run(*command, "--force").returncode == 0
    assert not (out / "ia3_task.json").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "no model '.*': it is neither .* nor a folder"),
        ("{", "no model '.*'"),
        ('{"model_type": "no-such-type"}', "no model '.*'"),
        ('{"model_type": "llama"}', "is a llama, expected a T5 with gated feed-forward layers"),
        ('{"model_type": "t5", "num_layers": "two"}', "config.json is broken: .*'num_layers'"),
        ('{"model_type": "t5", "d_model": -1}', "the config of '.*' describes no model"),
    ],
)
def test_configs_of_no_t5(tmp_path: Path, config: str | None, message: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(IA3Error, match=message):
        structure_of(tmp_path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda v: v.pop(KEY), rf"'{KEY}' \[32, 1\] is missing"),
        (lambda v: v.pop(INNER), rf"'{INNER}' \[48, 1\] is missing"),
        (lambda v: v.update({QUERY: v[KEY]}), rf"'{QUERY}' has no site in T5.* did you mean"),
        (lambda v: v.update({KEY: v[KEY][:31]}), rf"'{KEY}' is \[31, 1\], expected \[32, 1\]"),
        (lambda v: v.update({KEY: v[KEY].flatten()}), rf"'{KEY}' is \[32\] .*\[dim, 1\]"),
        (lambda v: v.update({KEY: v[KEY].long()}), rf"'{KEY}' is \[32, 1\] torch.int64, expected"),
        (lambda v: v.update({"a.k.lora_a": v[KEY]}), r"'a.k.lora_a' is not an .* named like"),
        (lambda v: v.clear(), "holds an empty dict, expected vectors named like"),
    ],
)
def test_vectors_that_do_not_fit(tiny_t5, tmp_path, change, expected):
    vectors = vectors_of(tiny_t5)
    change(vectors)
    path = tmp_path / "finish.pt"
    torch.save(vectors, path)
    with pytest.raises(IA3Error, match=f"finish.pt.*{expected}"):
        convert_tfew_authors(path, tiny_t5)


def test_models_without_gates(their_file: Path, tiny_llama: PreTrainedModel) -> None:
    """There `wi`'s output goes through the activation before it reaches `wo`."""
    sizes = {"vocab_size": 48, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2}
    for model in (T5ForConditionalGeneration(T5Config(**sizes, num_heads=4)), tiny_llama):
        message = f"finish.pt is for a T5 with gated .* which {type(model).__name__} is not"
        with pytest.raises(IA3Error, match=message):
            convert_tfew_authors(their_file, model)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_files_that_are_none(their_file, tiny_t5):
    whole = their_file.read_bytes()
    parts = [whole[: int(share * len(whole))] for share in (0, 0.5, 0.999)]
    for content in (*parts, b"not a file of torch's", pickle.dumps({"key": 1})):
        their_file.write_bytes(content)
        with pytest.raises(IA3Error, match=r"finish.pt is not a whole file of tensors alone"):
            convert_tfew_authors(their_file, tiny_t5)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (KEY, lambda v: v.to_sparse(), "sparse"),
        (KEY, lambda v: v.to(torch.complex64), "ComplexFloatStorage"),
        (KEY, lambda v: v.int(), "int32"),
        (
            KEY,
            lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8),
            "qint8|not a whole file",
        ),
        (KEY, lambda v: v.to(torch.float8_e8m0fnu), "_rebuild_tensor_v3"),
        (KEY, lambda v: v.tolist(), "a list"),
        (3, lambda v: v, "3 is not an"),
        (b"a", lambda v: v, "keys that are no names"),
        ("k" * 100_000, lambda v: v, "'kkk.*is not an"),
    ],
)
def test_values_that_are_no_vectors_are_a_broken_file(tiny_t5, tmp_path, key, value, message):
    vectors = vectors_of(tiny_t5)
    torch.save(vectors | {key: value(vectors[KEY])}, tmp_path / "finish.pt")
    with pytest.raises(BrokenFileError, match=f"finish.pt.*({message})") as caught:
        convert_tfew_authors(tmp_path / "finish.pt", tiny_t5)
    assert len(str(caught.value)) < 600


def test_float8_vectors_and_empty_ones(tiny_t5, tmp_path):
    vectors = vectors_of(tiny_t5)
    for value, message in (
        (vectors[KEY].to(torch.float8_e4m3fn), "made by .*expected a plain tensor"),
        (torch.ones(0, 1), r"is \[0, 1\], expected"),
    ):
        torch.save(vectors | {KEY: value}, tmp_path / "finish.pt")
        with pytest.raises(IA3Error, match=f"finish.pt.*{message}"):
            convert_tfew_authors(tmp_path / "finish.pt", tiny_t5)
