"""Merging into quantized weights: against the values they stand for, and where PEFT refuses."""

import copy
import io
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import peft
import pytest
import torch
import transformers as hf
from conftest import VOCABULARY
from support.pairs import adapted, logits, relative
from support.snapshots import hooks_on
from torch import Tensor, nn

from ia3 import IA3Error
from ia3.core.quantized import dequantised, is_quantized, scaled_rows
from ia3.core.weights import read, write

BESIDE = "lies beside the environment: see `test` in the Makefile"
pytestmark = pytest.mark.quantized

bnb = pytest.importorskip("bitsandbytes", reason=f"bitsandbytes {BESIDE}")
ao = pytest.importorskip("torchao.quantization", reason=f"torchao {BESIDE}")

IN, OUT = 128, 96
FOUR_BIT = {
    "nf4": {"quant_type": "nf4", "compress_statistics": False},
    "nf4-nested": {"quant_type": "nf4", "compress_statistics": True},
    "nf4-bf16-storage": {"quant_type": "nf4", "quant_storage": torch.bfloat16},
    "fp4": {"quant_type": "fp4", "compress_statistics": False},
}
EIGHT_BIT = {"int8": 0.0, "int8-outliers": 3.0}
TORCHAO = {
    "ao-int8": ao.Int8WeightOnlyConfig(),
    "ao-int8-groups": ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(32)),
    "ao-int4-groups": ao.IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=ao.PerGroup(32), mapping_type=ao.MappingType.ASYMMETRIC
    ),
    "ao-int8-dynamic": ao.Int8DynamicActivationInt8WeightConfig(),
    "ao-int4-dynamic": ao.Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=ao.PerGroup(32)
    ),
    "ao-float8": ao.Float8WeightOnlyConfig(),
}
KINDS = [*FOUR_BIT, *EIGHT_BIT, *TORCHAO]


def quantized(kind: str, columns: int = IN, rows: int = OUT) -> Any:
    """A layer of that kind, in training mode: evaluating, some kernels quantize their input too."""
    torch.manual_seed(0)
    plain = nn.Linear(columns, rows)
    if kind in TORCHAO:
        ao.quantize_(plain, TORCHAO[kind])
        return plain.requires_grad_(False)
    layer: Any
    if kind in FOUR_BIT:
        layer = bnb.nn.Linear4bit(columns, rows, compute_dtype=torch.float32, **FOUR_BIT[kind])
    else:
        layer = bnb.nn.Linear8bitLt(
            columns, rows, has_fp16_weights=False, threshold=EIGHT_BIT[kind]
        )
    layer.load_state_dict(plain.state_dict())
    return layer.to("cpu").requires_grad_(False)


def inputs(columns: int = IN) -> Tensor:
    return torch.randn(2, 5, columns, generator=torch.Generator().manual_seed(1))


def scale() -> Tensor:
    """Positive, negative, one and zero."""
    values = torch.randn(OUT, generator=torch.Generator().manual_seed(2))
    values[:3] = torch.tensor([0.0, 1.0, -1.0])
    return values


def put(module: nn.Module, values: dict[str, Any]) -> dict[str, Any]:
    """Write slots; what stood there before."""
    before = {slot: read(module, slot) for slot in values}
    for slot, value in values.items():
        write(module, slot, value)
    return before


def bits(module: nn.Module) -> list[bytes]:
    """Everything that makes up its values: integers, constants, bias."""
    weight = module.weight
    if isinstance(module, bnb.nn.Linear4bit):
        state = weight.quant_state
        parts = [weight.data, state.absmax, state.code]
        parts += [state.offset, state.state2.absmax] if state.nested else []
    elif isinstance(module, bnb.nn.Linear8bitLt):
        parts = [weight.data, module.state.SCB if weight.SCB is None else weight.SCB]
    else:
        parts = [weight.qdata, weight.scale]
    parts += [] if module.bias is None else [module.bias]
    return [p.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() for p in parts]


# -- one layer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_scaled_rows_and_the_original_bits(kind):
    layer, x, vector = quantized(kind), inputs(), scale()
    plain, before, output = dequantised(layer).double(), bits(layer), layer(x)
    values = scaled_rows(layer, vector)
    assert bits(layer) == before  # nothing has changed yet
    originals = put(layer, values)
    assert relative(layer(x), output * vector) < 1e-6
    assert not layer(x)[..., 0].any()
    scaled = dequantised(layer)
    assert relative(scaled.weight, plain.weight * vector[:, None]) < 1e-6
    assert relative(scaled.bias, plain.bias * vector) < 1e-6
    # The integers are those of before.
    assert bits(layer)[0] == before[0]
    assert bits(layer) != before
    put(layer, scaled_rows(layer, vector))
    assert relative(layer(x), output * vector * vector) < 1e-6
    layer = layer.to("cpu")
    put(layer, originals)
    assert bits(layer) == before
    assert torch.equal(layer(x), output)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["nf4", "int8", "ao-int8"])
def test_half_precision(kind, dtype):
    layer, vector = quantized(kind), scale().to(dtype)
    layer.bias.data = layer.bias.data.to(dtype)
    bias = layer.bias.clone()
    plain = dequantised(layer, torch.float32)
    values = scaled_rows(layer, vector)
    assert values["bias"].dtype == dtype
    assert torch.equal(values["bias"], (bias.float() * vector.float()).to(dtype))
    put(layer, values)
    expected = plain.weight * vector.float()[:, None]
    assert relative(dequantised(layer, torch.float32).weight, expected) < 1e-6


def pickled(layer: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


# torchao's quantize_ leaves a method on the layer that cannot be pickled.
@pytest.mark.parametrize(
    ("copied", "kind"),
    [(copy.deepcopy, kind) for kind in KINDS] + [(pickled, k) for k in [*FOUR_BIT, *EIGHT_BIT]],
)
def test_copies_of_a_scaled_layer(kind, copied):
    layer, x = quantized(kind), inputs()
    original = layer(x)
    before = put(layer, scaled_rows(layer, scale()))
    scaled = layer(x)
    twin = copied(layer)
    put(layer, before)
    assert torch.equal(twin(x), scaled)  # shares nothing that is written
    assert torch.equal(copied(layer)(x), original)


@pytest.mark.parametrize("forward_first", [False, True])
def test_eight_bit_constants_before_and_after_the_first_forward(forward_first):
    # The first forward moves them from the weight into the layer's state.
    layer, x, vector = quantized("int8").eval(), inputs(), scale()
    expected = copy.deepcopy(layer)(x) * vector
    if forward_first:
        layer(x)
    original = read(layer, "weight.SCB")
    before = put(layer, scaled_rows(layer, vector))
    # Exact while it quantizes its input, too.
    assert relative(layer(x), expected) < 1e-6
    assert torch.equal(layer.state_dict()["SCB"], read(layer, "weight.SCB"))
    put(layer, before)
    assert torch.equal(layer.state_dict()["SCB"], original)


def test_nested_constants_become_float32():
    layer = quantized("nf4-nested")
    assert layer.weight.quant_state.nested
    before = put(layer, scaled_rows(layer, scale()))
    state = layer.weight.quant_state
    assert not state.nested
    assert state.absmax.dtype == torch.float32
    assert layer.quant_state is state
    put(layer, before)
    assert layer.weight.quant_state.nested
    assert layer.quant_state is layer.weight.quant_state


def repack(layer: Any) -> None:
    """What its forward does on CPUs with bfloat16 instructions, when it evaluates."""
    layer.weight.data, layer.weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )


@pytest.mark.parametrize("kind", FOUR_BIT)
def test_repacked_for_the_cpu(kind):
    layer, vector = quantized(kind), scale()
    repack(layer)
    before, plain = bits(layer), dequantised(layer)
    assert relative(plain.weight, dequantised(quantized(kind)).weight) < 2**-8
    originals = put(layer, scaled_rows(layer, vector))
    assert relative(dequantised(layer).weight, plain.weight * vector[:, None]) < 1e-6
    assert relative(layer(inputs()), plain(inputs()) * vector) < 1e-6
    put(layer, originals)
    assert bits(layer) == before
    assert layer.weight.quant_state.packing_format_for_cpu


@pytest.mark.parametrize("kind", FOUR_BIT)
def test_what_was_read_outlives_repacking(kind):
    layer, x = quantized(kind), inputs()
    before, output = bits(layer), layer(x)
    original = read(layer, "weight.quant_state")
    for _ in range(2):  # repacking what was written must not spoil it either
        repack(layer)
        write(layer, "weight.quant_state", original)
        assert bits(layer) == before
        assert torch.equal(layer(x), output)


def test_evaluating_and_saving_a_scaled_layer():
    layer, x, vector = quantized("nf4-nested").eval(), inputs(), scale()
    layer.bias = None
    expected = dequantised(layer)(x) * vector
    put(layer, scaled_rows(layer, vector))
    with torch.no_grad():
        assert relative(layer(x), expected) < 1e-6
    state = layer.state_dict()
    weight = state.pop("weight")
    stored = {name.removeprefix("weight."): value for name, value in state.items()}
    again = bnb.nn.Linear4bit(IN, OUT, bias=False, compute_dtype=torch.float32)
    again.weight = bnb.nn.Params4bit.from_prequantized(weight, stored, device="cpu", module=again)
    assert relative(again(x), expected) < 1e-6


@pytest.mark.parametrize("kind", [*FOUR_BIT])
def test_a_block_that_spans_rows(kind):
    layer = quantized(kind, columns=96)
    with pytest.raises(IA3Error, match=r"rows of 96 values in blocks of 64.* spans two rows"):
        scaled_rows(layer, scale())
    assert relative(dequantised(layer)(inputs(96)), layer(inputs(96))) < 1e-6


def test_torchao_weights_that_cannot_be_scaled():
    layer = nn.Linear(IN, OUT)
    ao.quantize_(layer, ao.Int8WeightOnlyConfig(granularity=ao.PerTensor()))
    with pytest.raises(IA3Error, match=r"blocks of \[96, 128\].* spans several rows"):
        scaled_rows(layer, scale())
    layer.weight.__class__ = type("Unheard", (type(layer.weight),), {})
    assert is_quantized(layer)
    with pytest.raises(IA3Error, match="Unheard keeps its constants"):
        scaled_rows(layer, scale())


@pytest.mark.parametrize("kind", KINDS)
def test_dequantised(kind):
    layer, x = quantized(kind).eval(), inputs()
    before = bits(layer)
    plain = dequantised(layer)
    assert type(plain) is nn.Linear
    assert not is_quantized(plain)
    assert plain.weight.dtype == torch.float32
    assert not plain.weight.requires_grad
    assert not plain.training
    assert bits(layer) == before
    # Dynamic kinds quantize their input too.
    assert relative(plain(x), layer.train()(x)) < (2e-2 if "dynamic" in kind else 1e-6)
    assert dequantised(layer, torch.bfloat16).bias.dtype == torch.bfloat16


def test_what_is_quantized():
    assert all(is_quantized(quantized(kind)) for kind in KINDS)
    not_yet = bnb.nn.Linear4bit(IN, OUT)
    fake = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=True)
    assert not any(is_quantized(m) for m in (nn.Linear(IN, OUT), not_yet, fake, nn.ReLU()))


def test_bitsandbytes_is_not_imported():
    program = (
        "import sys; from torch import nn; from ia3.core.quantized import is_quantized\n"
        "assert not is_quantized(nn.Linear(2, 2)); assert 'bitsandbytes' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# -- a model --------------------------------------------------------------------------------------

IDS = torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(3))
INPUTS = {"input_ids": IDS}

MODELS = {
    "nf4": hf.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ),
    "int8": hf.BitsAndBytesConfig(load_in_8bit=True),
    "torchao": hf.TorchAoConfig(ao.Int8WeightOnlyConfig()),
}


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A LLaMA whose rows are whole blocks."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"intermediate_size": 128, "num_hidden_layers": 2, "num_key_value_heads": 2}
    hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, **sizes, pad_token_id=0)).save_pretrained(folder)
    return folder


def load(folder: Path, kind: str) -> hf.PreTrainedModel:
    model = hf.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=MODELS[kind], device_map="cpu", dtype=torch.float32
    )
    # Without dropout: evaluating, 8-bit kernels quantize their inputs, and 4-bit ones may compute
    # in bfloat16.
    return model.train()


def gradients(model: Any) -> dict[str, Tensor]:
    model(IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_over_a_quantized_model(kind, checkpoint):
    model, plain = load(checkpoint, kind), load(checkpoint, kind)
    for name, module in list(plain.named_modules()):
        if is_quantized(module):
            plain.set_submodule(name, dequantised(module, torch.float32))
    actual = gradients(adapted(model))
    expected = gradients(adapted(plain).double())
    assert len(actual) == 6
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        assert gradient.dtype == torch.float32
        assert relative(gradient, expected[name]) < 1e-5, name


@pytest.mark.parametrize("kind", MODELS)
def test_peft_refuses_to_merge(kind, checkpoint):
    model = peft.get_peft_model(load(checkpoint, kind), peft.IA3Config(task_type="CAUSAL_LM"))
    with pytest.raises((NotImplementedError, ValueError)):
        model.merge_and_unload()


@pytest.mark.parametrize("kind", MODELS)
def test_merging_into_a_quantized_model(kind, checkpoint, tmp_path):
    base = load(checkpoint, kind)
    untouched = logits(base, **INPUTS)
    adapter = adapted(base)
    layers = [module for module in base.modules() if is_quantized(module)]
    before = [bits(layer) for layer in layers]
    expected = logits(adapter, **INPUTS)
    assert relative(expected, untouched) > 1e-2
    adapter.merge_adapter(safe_merge=True)
    assert not any(map(hooks_on, layers))
    assert relative(logits(adapter, **INPUTS), expected) < 2e-6
    adapter.unmerge_adapter()
    assert [bits(layer) for layer in layers] == before
    assert torch.equal(logits(adapter, **INPUTS), expected)
    merged = adapter.merge_and_unload()
    assert merged is base
    assert [module for module in merged.modules() if is_quantized(module)] == layers
    assert relative(logits(merged, **INPUTS), expected) < 2e-6
    if kind != "torchao":
        merged.save_pretrained(tmp_path)
        again = hf.AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu").train()
        assert relative(logits(again, **INPUTS), expected) < 2e-6


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_vector_that_no_row_can_take(kind, tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = hf.OPTConfig(
        **SIZES, word_embed_proj_dim=64, ffn_dim=128, num_hidden_layers=2, dropout=0.0
    )
    hf.OPTForCausalLM(config).save_pretrained(tmp_path)
    adapter = adapted(load(tmp_path, kind))
    expected = logits(adapter, **INPUTS)
    with pytest.raises(IA3Error, match=r"layers\.0\.fc2.*columns.*dequantise=True"):
        adapter.merge_adapter()
    assert torch.equal(logits(adapter, **INPUTS), expected)
    fails = Mock(side_effect=[nn.Identity(), MemoryError])
    monkeypatch.setattr("ia3.core.quantized.dequantised", fails)
    with pytest.raises(MemoryError):
        adapter.merge_and_unload(dequantise=True)
    monkeypatch.undo()
    assert torch.equal(logits(adapter, **INPUTS), expected)
    merged = adapter.merge_and_unload(dequantise=True)
    assert type(merged.get_submodule("model.decoder.layers.0.fc2")) is nn.Linear
    assert is_quantized(merged.get_submodule("model.decoder.layers.0.fc1"))
    assert relative(logits(merged, **INPUTS), expected) < 2e-6


def test_a_merge_that_is_not_finite(checkpoint):
    adapter = adapted(load(checkpoint, "nf4"))
    with torch.no_grad():
        next(p for p in adapter.parameters() if p.requires_grad)[0] = float("nan")
    with pytest.raises(IA3Error, match="not finite"):
        adapter.merge_adapter(safe_merge=True)
