"""Fused feed-forward layers: they compute the same, and keep less for the backward pass."""

import copy
import pickle

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from support.architectures import batch, build, output
from support.memory import saved_bytes
from support.pairs import adapted, logits, randomize, relative, vectors
from support.snapshots import assert_unchanged, snapshot, weights
from torch import nn
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from ia3 import IA3Config, IA3Error, IA3Model, load_base_model
from ia3.base.loading import EMBEDDED_MODEL
from ia3.core.mlp import Mlp, read_mlp
from ia3.model.fused_mlp import gated_mlp, is_fused

MLP = "model.layers.0.mlp"
GATED = {"llama": 2, "mistral": 2, "qwen2": 2, "qwen3": 2, "gemma": 2, "gemma2": 2, "gemma3": 2}


def loss_and_gradients(model, inputs, adapter="default", run=None):
    """The loss, and the gradients of the vectors by name."""
    trained = vectors(model, adapter)
    for vector in trained.values():
        vector.grad = None
    loss = (model if run is None else run)(**inputs).loss
    loss.backward()
    return loss.detach(), {name: vector.grad for name, vector in trained.items()}


def assert_same_gradients(found, expected, tolerance=1e-5):
    assert relative(found[0], expected[0]) < tolerance
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        assert relative(found[1][name], grad) < tolerance, name


def assert_fusing_changes_nothing(model, inputs, count, tolerance=1e-5):
    expected = loss_and_gradients(model, inputs)
    assert model.fuse_mlp() == count
    assert_same_gradients(loss_and_gradients(model, inputs), expected, tolerance)
    return expected


@pytest.fixture
def model(tiny_llama):
    return adapted(tiny_llama)


@pytest.fixture
def inputs(make_inputs):
    return make_inputs("llama")


@pytest.mark.parametrize("sites", [None, "all-linear"])
@pytest.mark.parametrize("kind", GATED)
def test_same_gradients(kind, sites):
    model = adapted(build(kind), target_modules=sites)
    inputs = {**batch(kind), "labels": batch(kind)["input_ids"]}
    expected = assert_fusing_changes_nothing(model, inputs, GATED[kind])
    model.unfuse_mlp()
    assert_same_gradients(loss_and_gradients(model, inputs), expected, 1e-9)


def test_a_product_kept_in_float32(tiny_t5, make_inputs):
    """Half precision T5 keeps its down projections in float32, and casts to it."""
    base, inputs = tiny_t5.bfloat16(), make_inputs("t5")
    for name, module in base.named_modules():
        if name.endswith("wo"):
            module.float()
    model = adapted(base)
    assert_fusing_changes_nothing(model, inputs, 4, 3e-2)
    base.float()  # and afterwards there is nothing to cast
    model(**inputs).loss.backward()


def test_active_dropout(tiny_t5, make_inputs):
    model, inputs = adapted(tiny_t5), make_inputs("t5")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model.train()
    torch.manual_seed(3)
    expected = loss_and_gradients(model, inputs)
    assert model.fuse_mlp() == 4
    torch.manual_seed(3)
    found = loss_and_gradients(model, inputs)
    assert_same_gradients(found, expected)
    assert relative(loss_and_gradients(model, inputs)[0], expected[0]) > 1e-3  # it drops


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(model, inputs, reentrant):
    model.train().fuse_mlp()
    expected = loss_and_gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same_gradients(loss_and_gradients(model, inputs), expected, 1e-6)


@pytest.mark.slow
def test_compiled(model, inputs):
    expected = loss_and_gradients(model, inputs)
    model.fuse_mlp()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = {**inputs, "use_cache": False}
    assert_same_gradients(loss_and_gradients(model, inputs, run=compiled), expected)


@pytest.mark.parametrize("config", [LlamaConfig, GemmaConfig])
def test_keeps_less_than_the_frozen_model(config):
    # Feed-forward layers four times as wide as the model, as they usually are.
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 8}
    base = AutoModelForCausalLM.from_config(
        config(**sizes, vocab_size=64, num_attention_heads=4, num_key_value_heads=2)
    )
    labels = batch("llama")["input_ids"]
    base.requires_grad_(False)
    frozen, model = saved_bytes(base, labels), adapted(base)
    plain = saved_bytes(model, labels)
    assert model.fuse_mlp() == 2
    assert saved_bytes(model, labels) < min(frozen, plain)


def test_smollm2():
    base = copy.deepcopy(load_base_model(EMBEDDED_MODEL).model).requires_grad_(False)
    ids = torch.randint(3, 4000, (2, 24), generator=torch.Generator().manual_seed(0))
    frozen = saved_bytes(base, ids)
    model = adapted(base)
    assert_fusing_changes_nothing(model, {"input_ids": ids, "labels": ids}, 30, 1e-4)
    assert saved_bytes(model, ids) < frozen


def test_unload_leaves_no_trace(tiny_llama):
    before = snapshot(tiny_llama)
    attributes = {name: set(vars(module)) for name, module in tiny_llama.named_modules()}
    model = adapted(tiny_llama)
    model.fuse_mlp()
    assert model.unload() is tiny_llama
    assert_unchanged(tiny_llama, before)
    assert {n: set(vars(m)) for n, m in tiny_llama.named_modules()} == attributes
    model.unfuse_mlp()
    with pytest.raises(IA3Error, match="unloaded"):
        model.fuse_mlp()


def test_an_mlp_is_called_and_read_as_before(tiny_llama):
    mlp = tiny_llama.get_submodule(MLP)
    adapted(tiny_llama).fuse_mlp()
    assert is_fused(mlp)
    values = torch.randn(1, 2, 32)
    assert torch.equal(mlp(x=values), mlp(values))
    # Its structure can still be proven: a merge asks for it.
    assert isinstance(read_mlp(mlp, "down_proj"), Mlp)


@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_independent(model, inputs, twin):
    model.fuse_mlp()
    expected = loss_and_gradients(model, inputs)
    other = twin(model)
    assert_same_gradients(loss_and_gradients(other, inputs), expected, 1e-7)
    randomize(vectors(other), 9)
    assert_same_gradients(loss_and_gradients(model, inputs), expected, 1e-7)
    assert is_fused(other.model.get_submodule(MLP))
    other.unfuse_mlp()
    assert not is_fused(other.model.get_submodule(MLP))
    assert is_fused(model.model.get_submodule(MLP))


def test_adapters_come_and_go(make_model, inputs):
    """Whatever is done to the adapters of a fused model, it computes what another one does."""
    # The first adapter has no vector within the feed-forward layers.
    narrow = {"target_modules": ["k_proj"], "feedforward_modules": []}
    fused, plain = (adapted(make_model("llama"), **narrow) for _ in range(2))
    fused.fuse_mlp()

    given = adapted(make_model("llama"), 5).vectors("default")
    for change, *names in (
        (IA3Model.add_adapter, "second", IA3Config(), given),
        (IA3Model.set_adapter, "second"),
        (IA3Model.set_adapter, ["default", "second"]),
        (IA3Model.merge_adapter,),
        (IA3Model.unmerge_adapter,),
        (IA3Model.disable_adapter_layers,),
        (IA3Model.enable_adapter_layers,),
        (IA3Model.delete_adapter, "default"),
    ):
        change(fused, *names)
        change(plain, *names)
        assert relative(logits(fused, **inputs), logits(plain, **inputs)) < 1e-5
    assert_same_gradients(*[loss_and_gradients(m, inputs, "second") for m in (fused, plain)])
    merged, wanted = fused.merge_and_unload(), plain.merge_and_unload()
    assert not any(is_fused(module) for module in merged.modules())
    assert weights(merged) == weights(wanted)


@pytest.mark.parametrize("fused_first", [True, False])
def test_hooks_on_the_activation_are_heeded(model, inputs, fused_first):
    plain = loss_and_gradients(model, inputs)
    if fused_first:
        assert model.fuse_mlp() == 2
    activation = model.model.get_submodule(f"{MLP}.act_fn")
    hook = activation.register_forward_hook(lambda _module, _args, result: result * 2)
    found = loss_and_gradients(model, inputs)
    model.unfuse_mlp()
    # The other layer alone can be fused now.
    assert_same_gradients(assert_fusing_changes_nothing(model, inputs, 1), found)
    hook.remove()
    assert_same_gradients(loss_and_gradients(model, inputs), plain)


def test_offloaded(tiny_llama, inputs):
    cpu_offload(tiny_llama, execution_device=torch.device("cpu"))
    assert_fusing_changes_nothing(adapted(tiny_llama), inputs, 2)


@pytest.mark.parametrize("fused_first", [False, True])
def test_hooks_of_accelerate(model, inputs, fused_first):
    mlp = model.model.get_submodule(MLP)
    expected = loss_and_gradients(model, inputs)
    if fused_first:
        model.fuse_mlp()
    add_hook_to_module(mlp, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    assert model.fuse_mlp() == 2
    assert_same_gradients(loss_and_gradients(model, inputs), expected)
    model.unfuse_mlp()
    assert not is_fused(mlp)
    assert torch.equal(loss_and_gradients(model, inputs)[0], expected[0])


def test_modules_to_save(tiny_llama, inputs):
    model = adapted(tiny_llama)
    model.fuse_mlp()
    saved = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    saved.modules_to_save = ["layers.0.mlp"]
    with pytest.raises(IA3Error, match="unfuse_mlp"):
        model.add_adapter("other", saved)
    saved.modules_to_save = ["layers.0.mlp", "1.mlp.up_proj"]
    model = IA3Model(model.unload(), saved)
    assert_fusing_changes_nothing(model, inputs, 1)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("gpt2", "transformer.h.0.mlp.*linear layers"), ("opt", "linear layers"), ("bert", "linear")],
)
def test_nothing_to_fuse(kind, reason):
    model = adapted(build(kind))
    before = output(kind, model)
    with pytest.raises(IA3Error, match=reason):
        model.fuse_mlp()
    assert torch.equal(output(kind, model), before)


class Residual(LlamaMLP):
    """Its vector can be carried; it is not the gated form and nothing else."""

    def forward(self, x):
        return x + super().forward(x)


def test_anything_else_is_left_alone():
    config = LlamaConfig(hidden_size=32, intermediate_size=48)
    assert isinstance(gated_mlp(LlamaMLP(config)), Mlp)
    assert "something else than down(act(gate(x)) ⊙ up(x))" in str(gated_mlp(Residual(config)))
    module = LlamaMLP(config)
    module.forward = lambda x: x
    assert "forward was replaced" in str(gated_mlp(module))
