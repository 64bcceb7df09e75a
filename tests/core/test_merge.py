"""Merging: exact, reversible to the bit, all or nothing, and where PEFT's is not."""

import copy
import pickle
import sys
import warnings
from itertools import count, pairwise
from typing import Any
from unittest.mock import Mock

import peft
import pytest
import torch
from conftest import VOCABULARY
from hypothesis import given, settings, strategies as st
from support.pairs import adapted, logits, randomize, relative, vectors
from support.snapshots import assert_unchanged, hooks_on, snapshot, weights
from support.versions import since
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ia3 import IA3Config, IA3Error, IA3Model
from ia3.compat import peft as integration
from ia3.core import weights as writing

Adapted = Any  # an `IA3Model` or a `peft.PeftModel`: they share their names

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unmerge result can be inaccurate"),
]


# -- any small network -----------------------------------------------------------------------------


class Net(nn.Module):
    """Layers one after the other, each told how to bring the values into its shape and back."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, ids: Tensor) -> Tensor:
        """`[batch, 6]` ids to `[batch, 6, dim]`."""
        values = self.layers[0](ids)
        for layer in list(self.layers)[1:]:
            values = values.tanh()
            if isinstance(layer, nn.Conv1d | nn.Conv2d):
                trailing = [1] * (layer.weight.dim() - 3)
                channels = layer(values.mT.reshape(*values.mT.shape, *trailing))
                values = channels.flatten(2).mT.contiguous()
            else:
                values = layer(values)
        return values


KINDS = {
    "linear": lambda i, o, groups, bias: nn.Linear(i, o, bias=bias),
    "Conv1D": lambda i, o, groups, bias: Conv1D(o, i),
    "conv1d": lambda i, o, groups, bias: nn.Conv1d(i, o, 3, padding=1, groups=groups, bias=bias),
    "conv2d": lambda i, o, groups, bias: nn.Conv2d(
        i, o, (3, 1), padding=(1, 0), groups=groups, bias=bias, padding_mode="circular"
    ),
}
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@st.composite
def nets(draw: st.DrawFn) -> tuple[Net, list[str]]:
    """A network, and those of its layers whose inputs are to be rescaled."""
    seed, groups = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from([1, 2, 3]))
    dims = [groups * draw(st.integers(1, 4)) for _ in range(draw(st.integers(2, 4)))]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Embedding(5, dims[0])]
        for wide, out in pairwise(dims):
            kind = draw(st.sampled_from(sorted(KINDS)))
            layers.append(KINDS[kind](wide, out, groups, draw(st.booleans())))
    inputs = [f"layers.{i}" for i in range(1, len(layers)) if draw(st.booleans())]
    return Net(layers).to(draw(st.sampled_from(list(TOLERANCES)))), inputs


def draw_vectors(model: IA3Model, adapters: list[str], seed: int) -> None:
    """Values of both signs, zeros, and some too small to be divided by."""
    generator = torch.Generator().manual_seed(seed)
    for vector in (v for adapter in adapters for v in model.vectors(adapter).values()):
        values = 1 + torch.randn(vector.shape, generator=generator)
        values[torch.rand(vector.shape, generator=generator) < 0.1] = 0.0
        values[torch.rand(vector.shape, generator=generator) < 0.1] = 1e-30
        vector.copy_(values)


@given(nets(), st.integers(1, 3), st.integers(0, 2**31), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
@torch.no_grad()
def test_merging_is_the_product_and_unmerging_its_undoing(net, count, seed, order):
    base, inputs = net
    dtype = base.layers[0].weight.dtype
    ids = torch.tensor([[0, 1, 2, 3, 4, 0], [4, 4, 1, 0, 2, 3]])
    plain, before = base(ids), weights(base)
    adapters = [f"adapter{i}" for i in range(count)]
    config = IA3Config(
        target_modules=[f"layers.{i}" for i in range(len(base.layers))], feedforward_modules=inputs
    )
    model = IA3Model(base, config, adapters[0])
    for adapter in adapters[1:]:
        model.add_adapter(adapter, config)
    if dtype == torch.float64:
        model.double()
    draw_vectors(model, adapters, seed)
    model.set_adapter(adapters)
    expected = model(ids)

    # One by one in any order, or at once.
    bound = TOLERANCES[dtype] * max(1.0, float(expected.double().norm()))
    steps = [adapters] if order.random() < 0.5 else [[a] for a in order.sample(adapters, count)]
    for step in steps:
        model.merge_adapter(step, safe_merge=True)
        assert float((model(ids).double() - expected.double()).norm()) < bound
    assert not any(hooks_on(module) for module in base.modules() if module is not base)
    with model.disable_adapter():
        assert torch.equal(model(ids), plain)
    model.merge_adapter()
    model.unmerge_adapter()
    assert weights(base) == before
    assert torch.equal(model(ids), expected)
    assert model.unload() is base
    assert torch.equal(base(ids), plain)


# -- where PEFT loses something --------------------------------------------------------------------

LAYERS = {
    "linear": lambda: nn.Linear(64, 48),
    "Conv1D": lambda: Conv1D(48, 64),
    "conv2d": lambda: nn.Conv2d(64, 48, 3, groups=4),
}


def both(make, targets=("layer",), adapters=("default",)):
    """Ours and PEFT's, on one module called `layer`, all adapters active."""

    def base():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = make()
            for parameter in module.parameters():
                nn.init.normal_(parameter)
            return nn.ModuleDict({"layer": module})

    modules = {"target_modules": list(targets), "feedforward_modules": []}
    ours = IA3Model(base(), IA3Config(**modules), adapters[0])
    theirs = peft.get_peft_model(base(), peft.IA3Config(**modules), adapters[0])
    for model, config in ((ours, IA3Config), (theirs, peft.IA3Config)):
        for adapter in adapters[1:]:
            model.add_adapter(adapter, config(**modules))
        for seed, adapter in enumerate(adapters):
            randomize(vectors(model, adapter), seed)
        tuner = model if model is ours else model.base_model
        tuner.set_adapter(list(adapters))
    return [ours, theirs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("values", ["random", "tiny", "zero"])
def test_unmerging_restores_the_bits_where_peft_does_not(kind, dtype, values):
    restored = []
    for model in both(lambda: LAYERS[kind]().to(dtype)):
        if values != "random":
            with torch.no_grad():
                vector = vectors(model)["layer"].flatten()
                vector[::7] = 1e-9 if values == "tiny" else 0.0
        before = list(weights(model).values())
        model.merge_adapter()
        model.unmerge_adapter()
        restored.append(list(weights(model).values()) == before)
    assert restored == [True, False]


def tensors(model: Adapted) -> list[Tensor]:
    """The layer's weight and bias."""
    return [p.detach().clone() for name, p in model.named_parameters() if "ia3_l" not in name]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("vector_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("safe", [False, True])
def test_merging_rounds_once_where_peft_rounds_for_each_adapter(kind, vector_dtype, safe):
    """Three adapters over a bfloat16 base, against the products in float64."""
    adapters = ("one", "two", "three")
    models = both(lambda: LAYERS[kind]().bfloat16(), adapters=adapters)
    if vector_dtype == torch.bfloat16:
        models[1].to(torch.bfloat16)  # takes PEFT's vectors along
    factor = torch.ones(48, dtype=torch.float64)
    for adapter in adapters:
        ours, theirs = (vectors(model, adapter)["layer"] for model in models)
        assert theirs.dtype == vector_dtype
        ours.data.copy_(theirs.data)  # rounded where PEFT's is
        factor *= theirs.detach().double().flatten()
    plain = tensors(models[0])
    shapes = [[1, -1] if kind == "Conv1D" else [-1, *[1] * (plain[0].dim() - 1)], [-1]]
    exact = [t.double() * factor.reshape(shape) for t, shape in zip(plain, shapes, strict=True)]
    off, distances = [], []
    for model in models:
        model.merge_adapter(safe_merge=safe)
        pairs = list(zip(tensors(model), exact, strict=True))
        wrong = torch.cat([(found != wanted.bfloat16()).flatten() for found, wanted in pairs])
        off.append(wrong.double().mean().item())
        distances.append([relative(found, wanted) for found, wanted in pairs])
    # Rounding float64 and float32 products to bfloat16 is the same but for a few ties.
    assert off[0] < 1e-3
    assert off[1] > 0.2
    assert all(ours < theirs / 1.3 for ours, theirs in zip(*distances, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "where",
    ["vector", "weight", pytest.param("bias", marks=since("peft", "0.21", "it looks at no bias"))],
)
def test_safe_merge_is_all_or_nothing_where_peft_stops_halfway(value, where):
    """The bad value is in the last of three layers."""
    changed = []
    for model in both(lambda: nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)]), ["0", "1", "2"]):
        ending = {"vector": ".default"}.get(where, f".{where}")
        names = {n: p for n, p in model.named_parameters() if ".2." in n and n.endswith(ending)}
        next(iter(names.values())).data.view(-1)[1] = value
        before = snapshot(model)
        with pytest.raises(ValueError, match="default") as error:
            model.merge_adapter(safe_merge=True)
        changed.append(snapshot(model)["bits"] != before["bits"])
        if isinstance(model, IA3Model):
            part = "bias" if where == "bias" else "weight"
            assert f"merging ['default'] into layer.2.{part} gives values that are not" in str(
                error.value
            )
            with pytest.raises(IA3Error, match="not finite"):
                model.merge_and_unload(safe_merge=True)
            assert_unchanged(model, before)
            assert model.active_adapters == ["default"]
    assert changed == [False, True]


def test_safe_merge_notices_what_half_precision_cannot_hold():
    base = nn.Sequential(nn.Linear(2, 2, bias=False)).half()
    nn.init.constant_(base[0].weight, 40000.0)
    model = IA3Model(base, IA3Config(target_modules=["0"], feedforward_modules=[]))
    nn.init.constant_(model.vectors("default")["0"], 2.0)
    before = weights(base)
    with pytest.raises(IA3Error, match="not finite"):
        model.merge_adapter(safe_merge=True)
    assert weights(base) == before


# -- weights that cannot take a vector -------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "other"), [(["lm_head"], "transformer.wte"), (["wte"], "lm_head")]
)
def test_a_tied_weight_is_not_merged_into(tiny_gpt2, make_inputs, targets, other):
    inputs = make_inputs("gpt2")
    config = IA3Config(target_modules=[*targets, "c_attn"], feedforward_modules=[])
    model = IA3Model(tiny_gpt2, config)
    randomize(vectors(model))
    expected, before = logits(model, **inputs), snapshot(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(IA3Error, match=rf"{targets[0]}\.weight: '{other}' shares it and would"):
            merge()
        assert_unchanged(model, before)
    assert torch.equal(logits(model, **inputs), expected)


def test_untied_weights_are_merged_into(make_model, make_inputs):
    """Where PEFT merges into the tied weight, both layers change."""
    inputs = make_inputs("gpt2")
    modules = {"target_modules": ["lm_head"], "feedforward_modules": []}
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        theirs = peft.get_peft_model(make_model("gpt2"), peft.IA3Config(**modules))
    randomize(vectors(theirs))
    expected = logits(theirs, **inputs)
    assert relative(logits(theirs.merge_and_unload(), **inputs), expected) > 0.1
    base = make_model("gpt2")
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone())
    ours = adapted(base, **modules)
    assert relative(logits(ours, **inputs), expected) < 1e-6
    assert relative(logits(ours.merge_and_unload(), **inputs), expected) < 1e-6


def packed(linear):
    """As a library leaves a layer that it unpacks in the first call."""
    weight = linear._parameters.pop("weight")
    linear.weight_packed = nn.Parameter(weight.detach().to(torch.int32), requires_grad=False)
    return linear


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(4, 4).to(torch.float8_e4m3fn), "a Linear with torch.float8_e4m3fn"),
        (lambda: nn.Linear(4, 4, dtype=torch.complex64), "a Linear with torch.complex64 weights"),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            r"a ParametrizedLinear whose weight is no parameter but made from \['bias', 'parametri",
        ),
        (
            lambda: packed(nn.Linear(4, 4)),
            r"\['bias', 'weight_packed'\].*call the model once",
        ),
        (lambda: nn.Linear(4, 4, device="meta"), "its weights are not there"),
        (lambda: nn.Embedding(4, 4, max_norm=1.0), "max_norm would undo the vector"),
    ],
    ids=["float8", "complex", "parametrized", "packed", "meta", "max_norm"],
)
def test_weights_that_cannot_take_a_vector(make, message):
    base = nn.ModuleDict({"before": nn.Linear(4, 4), "layer": make()})
    config = IA3Config(target_modules=["before", "layer"], feedforward_modules=[])
    model = IA3Model(base, config)
    randomize({"before": model.vectors("default")["before"]})
    before = snapshot(model)
    with pytest.raises(IA3Error, match=f"cannot merge into 'layer'.*{message}"):
        model.merge_adapter()
    assert_unchanged(model, before)


class HQQLinear(nn.Module):
    """As HQQ's: a packed weight, a bias that is no parameter, and the weight on demand."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.W_q = nn.Parameter(linear.weight.detach().mul(16).to(torch.int8), requires_grad=False)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def dequantize(self):
        return self.W_q / 16

    def forward(self, values):
        return nn.functional.linear(values, self.dequantize(), self.bias)


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_that_can_only_be_dequantised_is_offered_that_and_takes_it(monkeypatch, bias):
    """torchao may be there too, and look for a weight."""
    monkeypatch.setitem(sys.modules, "hqq.core.quantize", Mock(HQQLinear=HQQLinear))
    base = Net([nn.Embedding(5, 4), nn.Linear(4, 4, bias=bias), nn.Linear(4, 4, bias=bias)])
    base.layers[1], base.layers[2] = HQQLinear(base.layers[1]), HQQLinear(base.layers[2])
    modules = {"target_modules": ["layers.1", "layers.2"], "feedforward_modules": ["layers.2"]}
    model = adapted(base, **modules)
    ids = torch.tensor([[0, 1, 2, 3, 4, 0]])
    expected, before = model(ids).detach(), snapshot(model)
    with pytest.raises(IA3Error, match=r"cannot merge into 'layers\.[12]'.*dequantise=True"):
        model.merge_adapter()
    assert_unchanged(model, before)
    merged = model.merge_and_unload(dequantise=True)
    assert [type(layer) for layer in merged.layers] == [nn.Embedding, nn.Linear, nn.Linear]
    assert relative(merged(ids), expected) < 1e-6


# -- several adapters, and what happens to a merged model ------------------------------------------


@pytest.fixture
def three(tiny_llama):
    """Adapters "a" and "b" on the same modules, "c" on some of them and on another; "a" active."""
    model = IA3Model(tiny_llama, IA3Config(), "a")
    model.add_adapter("b", IA3Config())
    model.add_adapter("c", IA3Config(target_modules=["q_proj", "v_proj"]))
    for seed, adapter in enumerate("abc"):
        randomize(vectors(model, adapter), seed)
    return model


@pytest.fixture
def inputs(make_inputs):
    return make_inputs("llama")


def unmerged(model: IA3Model, adapters: list[str], inputs: dict[str, Tensor]) -> Tensor:
    """The logits with these adapters, none merged."""
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    if not adapters:
        with twin.disable_adapter():
            return logits(twin, **inputs)
    twin.set_adapter(adapters)
    return logits(twin, **inputs)


@pytest.mark.parametrize("steps", [["a", "b", "c"], ["c", "a", "b"], ["abc"], ["bc", "a"], ["b"]])
def test_adapters_are_merged_in_any_order_or_in_part(three, inputs, steps):
    """A merge changes what the base's parameters hold, never which they are."""
    before = weights(three.model)
    parameters = list(map(id, three.parameters()))
    three.set_adapter(["a", "b", "c"])
    expected = logits(three, **inputs)
    for step in steps:
        three.merge_adapter(list(step))
        assert relative(logits(three, **inputs), expected) < 1e-6
        assert list(map(id, three.parameters())) == parameters
    three.unmerge_adapter()
    assert weights(three.model) == before
    assert torch.equal(logits(three, **inputs), expected)


@pytest.mark.parametrize(
    ("active", "merged", "names", "result"),
    [
        ("a", "", ["b"], "b"),
        ("a", "", ["b", "c"], "bc"),
        ("a", "", ["c"], "c"),
        ("a", "", ["a", "b", "c"], "abc"),
        ("a", "", [], ""),
        ("a", "b", None, "b"),
        ("ab", "a", None, "ab"),
    ],
)
def test_unloading(three, inputs, active, merged, names, result):
    expected = unmerged(three, list(result), inputs)
    three.set_adapter(list(active))
    if merged:
        three.merge_adapter(list(merged))
    base = three.merge_and_unload(adapter_names=names)
    assert relative(logits(base, **inputs), expected) < 1e-6
    assert not any("ia3" in key for key in base.state_dict())


@pytest.mark.parametrize("active", ["a", "ab", "c"])
@pytest.mark.parametrize("merged", ["b", "c", "bc"])
def test_what_is_merged_takes_the_place_of_what_is_active_at_every_module(
    three, inputs, active, merged
):
    """Also where what is merged has no vector."""
    three.set_adapter(list(active))
    among = set(merged) <= set(active)
    expected = unmerged(three, list(active if among else merged), inputs)
    three.merge_adapter(list(merged))
    assert relative(logits(three, **inputs), expected) < 1e-6
    assert relative(logits(three.merge_and_unload(), **inputs), expected) < 1e-6


def test_one_name_is_no_list_of_letters(tiny_llama, inputs):
    model = IA3Model(tiny_llama, IA3Config(), "first")
    model.add_adapter("second", IA3Config())
    randomize(vectors(model, "second"))
    expected = unmerged(model, ["second"], inputs)
    model.merge_adapter("second")
    assert relative(logits(model, **inputs), expected) < 1e-6
    model.unmerge_adapter()
    merged = model.merge_and_unload(adapter_names="second")
    assert relative(logits(merged, **inputs), expected) < 1e-6


def test_choosing_an_adapter_unmerges_first(three, inputs):
    before = weights(three.model)
    expected = unmerged(three, ["b"], inputs)
    three.merge_adapter()
    with pytest.warns(UserWarning, match="merged; they are unmerged first"):
        three.set_adapter("b")
    assert weights(three.model) == before
    assert torch.equal(logits(three, **inputs), expected)


def test_other_adapters_come_and_go_while_one_is_merged(three, inputs, tmp_path):
    before = weights(three.model)
    expected = logits(three, **inputs)
    three.save_pretrained(tmp_path, adapter_name="b")
    three.merge_adapter()
    merged = logits(three, **inputs)
    three.delete_adapter("b")
    three.delete_adapter("c")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the base model is still the one it was saved for
        three.load_adapter(tmp_path, "again")
    three.add_adapter("new", IA3Config(target_modules="all-linear"))
    assert torch.equal(logits(three, **inputs), merged)
    with pytest.raises(IA3Error, match="'a' is merged: unmerge_adapter"):
        three.delete_adapter("a")
    three.unmerge_adapter()
    assert weights(three.model) == before
    assert torch.equal(logits(three, **inputs), expected)


def test_a_merge_that_fails_leaves_the_earlier_one(three, inputs):
    three.set_adapter(["a", "c"])
    before, expected = weights(three.model), logits(three, **inputs)
    three.merge_adapter(["a"])
    three.vectors("c")["model.layers.1.self_attn.q_proj"].data[3] = torch.nan
    merged = snapshot(three)
    with pytest.raises(IA3Error, match=r"layers\.1\.self_attn\.q_proj\.weight.*not finite"):
        three.merge_adapter(["c"], safe_merge=True)
    assert_unchanged(three, merged)
    randomize(vectors(three, "c"), seed=2)
    assert relative(logits(three, **inputs), expected) < 1e-6
    three.merge_adapter(["c"], safe_merge=True)
    assert relative(logits(three, **inputs), expected) < 1e-6
    three.unmerge_adapter()
    assert weights(three.model) == before


def test_disabled_adapters_are_not_merged(three, inputs):
    """The model is to compute as the base model does until they are enabled."""
    with three.disable_adapter():
        expected = logits(three, **inputs)
        with pytest.raises(IA3Error, match="adapters are disabled"):
            three.merge_adapter()
        assert torch.equal(logits(three, **inputs), expected)
    adapted = logits(three, **inputs)
    three.disable_adapter_layers()
    assert relative(logits(three.merge_and_unload(), **inputs), adapted) < 1e-6


@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_of_a_merged_model_unmerge_by_themselves(three, inputs, twin):
    before, expected = weights(three.model), logits(three, **inputs)
    three.merge_adapter()
    merged = logits(three, **inputs)
    copied = twin(three)
    assert torch.equal(logits(copied, **inputs), merged)
    copied.unmerge_adapter()
    assert weights(copied.model) == before
    assert torch.equal(logits(copied, **inputs), expected)
    assert torch.equal(logits(three, **inputs), merged)
    randomize(vectors(copied, "a"), seed=9)
    three.unmerge_adapter()
    assert torch.equal(logits(three, **inputs), expected)
    copied.merge_and_unload()
    assert weights(three.model) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_cast_while_merged_unmerges_to_the_cast_base(three, make_model, inputs, dtype):
    three.merge_adapter()
    three.to(dtype)
    three.unmerge_adapter()
    assert weights(three.model) == weights(make_model("llama").to(dtype))
    with three.disable_adapter():
        assert torch.equal(logits(three, **inputs), logits(make_model("llama").to(dtype), **inputs))
    # Merged again, it is rounded once from the weights that there are now.
    three.merge_adapter()
    name = "model.layers.0.self_attn.k_proj"
    plain = make_model("llama").to(dtype).get_submodule(name).weight.detach()
    product = plain.double() * three.vectors("a")[name].detach().double()
    assert torch.equal(three.model.get_submodule(name).weight.detach(), product.to(dtype))


def part_of(state, name):
    """The part of a state dict that is a module's."""
    prefix = f"{name}." if name else ""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    "name", ["", "model", "model.layers", "model.layers.1.mlp", "model.layers.0.self_attn.k_proj"]
)
def test_other_base_weights_are_not_loaded_into_merged_ones(
    three, make_model, inputs, name, assign
):
    """Unmerging would bring some of the former weights back: a mixture of two models."""
    state = {key: 2 * value for key, value in make_model("llama").state_dict().items()}
    three.merge_adapter()
    merged, before = logits(three, **inputs), snapshot(three)
    holder = three.model.get_submodule(name)
    for strict in (True, False):
        with pytest.raises(IA3Error, match=r"cannot load .* unmerge_adapter"):
            holder.load_state_dict(part_of(state, name), strict=strict, assign=assign)
    with pytest.raises(IA3Error, match=r"cannot load 'model\.model\.layers.*unmerge_adapter"):
        three.load_state_dict({f"model.{key}": value for key, value in state.items()})
    assert_unchanged(three, before)
    assert torch.equal(logits(three, **inputs), merged)

    # What is not merged is loaded, unmerged all is.
    three.model.lm_head.load_state_dict(part_of(state, "lm_head"), assign=assign)
    three.model.load_state_dict({"lm_head.weight": state["lm_head.weight"]}, strict=False)
    three.unmerge_adapter()
    holder.load_state_dict(part_of(state, name), assign=assign)
    other = make_model("llama")
    other.lm_head.load_state_dict(part_of(state, "lm_head"))
    other.get_submodule(name).load_state_dict(part_of(state, name))
    assert weights(three.model) == weights(other)
    with three.disable_adapter():
        assert torch.equal(logits(three, **inputs), logits(other, **inputs))


def test_weights_under_pefts_wrappers_are_not_loaded_into_merged_ones_either(make_model):
    integration.install()
    try:
        model = peft.get_peft_model(make_model("llama"), peft.IA3Config())
    finally:
        integration.uninstall()
    state = copy.deepcopy(model.state_dict())
    model.merge_adapter()
    before = snapshot(model)
    with pytest.raises(IA3Error, match=r"cannot load 'base_model\..*base_layer\.weight'"):
        model.load_state_dict(state)
    assert_unchanged(model, before)
    model.unmerge_adapter()
    model.load_state_dict(state)


@pytest.mark.parametrize("end", ["unmerge_adapter", "unload", "merge_and_unload"])
def test_weights_are_loaded_when_none_are_merged_any_longer(three, make_model, end):
    three.merge_adapter()
    three.merge_adapter(["a", "b"])
    getattr(three, end)()
    three.model.load_state_dict(make_model("llama").state_dict())
    assert weights(three.model) == weights(make_model("llama"))


def test_values_of_merged_adapters_vectors_are_loaded(three):
    """They are not what was merged into."""
    three.merge_adapter()
    before, name = weights(three.model), "model.model.layers.0.self_attn.k_proj.ia3_l.a"
    three.load_state_dict({name: torch.full_like(three.state_dict()[name], 3)}, strict=False)
    assert (three.vectors("a")["model.layers.0.self_attn.k_proj"] == 3).all()
    assert weights(three.model) == before


@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_of_a_merged_model_load_when_they_are_unmerged(three, make_model, twin):
    three.merge_adapter()
    copied, state = twin(three), make_model("llama").state_dict()
    with pytest.raises(IA3Error, match="cannot load"):
        copied.model.load_state_dict(state)
    copied.unmerge_adapter()
    copied.model.load_state_dict(state)
    with pytest.raises(IA3Error, match="cannot load"):
        three.model.load_state_dict(state)
    # One layer by itself knows nothing of the model.
    assert len(pickle.dumps(three.model.model.layers[0].mlp.down_proj)) < 50_000


@pytest.mark.parametrize("verb", ["unmerge_adapter", "disable_adapter_layers", "merge_more"])
def test_embeddings_that_were_resized_while_merged_stay_merged(make_model, verb):
    base = make_model("llama")
    modules = {"target_modules": ["embed_tokens"], "feedforward_modules": []}
    model = adapted(base, **modules)
    model.add_adapter("more", IA3Config(**modules))
    model.merge_adapter()
    base.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)
    before = snapshot(model)
    act = {"merge_more": lambda: model.merge_adapter("more")}.get(verb) or getattr(model, verb)
    with pytest.raises(IA3Error, match=r"was \[48, 32\] .* is \[50, 32\] now.*merge_and_unload"):
        act()
    assert_unchanged(model, before)
    merged = model.merge_and_unload()
    assert merged.model.embed_tokens.weight.shape == (50, 32)


def failing(function, nth):
    """The function, whose nth call fails."""
    calls = count(1)

    def fail(*args):
        if next(calls) == nth:
            raise MemoryError
        return function(*args)

    return fail


@pytest.mark.parametrize("step", ["_product", "write"])
def test_a_merge_that_runs_out_of_memory_changes_nothing(three, monkeypatch, step):
    three.merge_adapter(["a"])
    before = snapshot(three)
    # The original weights are written first.
    nth = 3 + len(three.vectors("a")) * (step == "write")
    monkeypatch.setattr(writing, step, failing(getattr(writing, step), nth))
    with pytest.raises(MemoryError):
        three.merge_adapter(["b"])
    assert_unchanged(three, before)


def test_an_unload_that_fails_can_be_called_again(three, monkeypatch):
    before = weights(three.get_base_model())
    three.merge_adapter(["a"])
    monkeypatch.setattr(writing, "write", failing(writing.write, 3))
    with pytest.raises(MemoryError):
        three.unload()
    base = three.unload()
    assert weights(base) == before
    assert not any("ia3_l" in name for name, _ in base.named_modules())


def test_unloading_twice_leaves_the_next_adapter_alone(three, inputs):
    base = three.unload()
    after = IA3Model(base, IA3Config(init_ia3_weights=False))
    expected = logits(after, **inputs)
    assert three.unload() is base
    assert torch.equal(logits(after, **inputs), expected)
    with pytest.raises(IA3Error, match="was unloaded"):
        three.add_adapter("more", IA3Config())
