"""Merging into a quantised base model's folder: the constants that are saved have the vectors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from support.pairs import randomize, vectors

import ia3
from ia3.model.merged import on_its_base, write_merged

pytestmark = pytest.mark.quantized

BESIDE = "lies beside the environment: see `test` in the Makefile"
pytest.importorskip("bitsandbytes", reason=f"bitsandbytes {BESIDE}")
ao = pytest.importorskip("torchao.quantization", reason=f"torchao {BESIDE}")

KINDS = {
    "fp4, constants of constants": hf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_use_double_quant=True
    ),
    "int8": hf.BitsAndBytesConfig(load_in_8bit=True),
    "torchao": hf.TorchAoConfig(ao.Int8WeightOnlyConfig()),
}
IDS = torch.randint(3, 48, (3, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A LLaMA whose rows are whole blocks."""
    folder = tmp_path_factory.mktemp("llama")
    sizes = {"vocab_size": 48, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **heads)).save_pretrained(folder)
    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def quantized_base(plain: Path, folder: Path, kind: str) -> Path:
    """A folder whose weights are quantised, as the hub has them."""
    config = KINDS[kind]
    model = hf.AutoModelForCausalLM.from_pretrained(plain, quantization_config=config)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_quantised_base_stays_quantised_and_computes_as_with_the_adapter(plain, tmp_path, kind):
    base = quantized_base(plain, tmp_path / "base", kind)
    model = hf.AutoModelForCausalLM.from_pretrained(base)
    before = logits(model)
    adapter = ia3.get_peft_model(model, ia3.IA3Config(task_type="CAUSAL_LM"))
    randomize(vectors(adapter), 0)
    expected = logits(adapter)
    adapter.save_pretrained(tmp_path / "adapter")
    write_merged(on_its_base(tmp_path / "adapter"), tmp_path / "merged")
    found = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    # Where constants are bfloat16, or the input is quantised, the last bits differ.
    assert (logits(found) - expected).norm() < 0.02 * (before - expected).norm()
    size = (tmp_path / "merged" / "model.safetensors").stat().st_size
    assert size < 1.3 * (base / "model.safetensors").stat().st_size
    asked = json.loads((tmp_path / "merged" / "config.json").read_text())["quantization_config"]
    assert asked["quant_method"] in {"bitsandbytes", "torchao"}


def test_what_no_constant_can_take_is_said_with_the_way_out(plain, tmp_path):
    base = quantized_base(plain, tmp_path / "base", next(iter(KINDS)))
    model = hf.AutoModelForCausalLM.from_pretrained(base)
    config = {"target_modules": ["o_proj"], "feedforward_modules": ["o_proj"]}
    adapter = ia3.get_peft_model(model, ia3.IA3Config(task_type="CAUSAL_LM", **config))
    randomize(vectors(adapter), 0)
    adapter.save_pretrained(tmp_path / "adapter")
    loaded = on_its_base(tmp_path / "adapter")
    with pytest.raises(ia3.IA3Error, match="share constants, and no layer before it"):
        write_merged(loaded, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    # The model that it was quantised from takes any.
    write_merged(on_its_base(tmp_path / "adapter", str(plain)), tmp_path / "merged")
