"""Fused feed-forward layers: they compute the same, and keep less for the backward pass."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from conftest import MakeInputs, MakeModel
from support.architectures import batch, build, output
from support.memory import saved_bytes
from support.pairs import adapted, randomize, relative, vectors
from support.snapshots import assert_unchanged, snapshot
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from ia3 import IA3Config, IA3Error, IA3Model, load_base_model
from ia3.base.loading import EMBEDDED_MODEL
from ia3.core.mlp import Mlp, up_projection
from ia3.model.fused_mlp import gated_mlp, is_fused

MLP = "model.layers.0.mlp"
GATED = {"llama": 2, "mistral": 2, "qwen2": 2, "qwen3": 2, "gemma": 2, "gemma2": 2, "gemma3": 2}


def loss_and_gradients(
    model: Any, inputs: dict[str, Tensor], adapter: str = "default"
) -> tuple[Tensor, dict[str, Tensor]]:
    trained = vectors(model, adapter)
    for vector in trained.values():
        vector.grad = None
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: vector.grad.clone() for name, vector in trained.items()}  # type: ignore[union-attr]


def assert_same_gradients(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    assert relative(found[0], expected[0]) < tolerance
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        assert relative(found[1][name], grad) < tolerance, name


# -- the same results ------------------------------------------------------------------------------


@pytest.mark.parametrize("sites", [None, "all-linear"])
@pytest.mark.parametrize("kind", GATED)
def test_same_gradients(kind: str, sites: str | None) -> None:
    model = adapted(build(kind), **({"target_modules": sites} if sites else {}))
    inputs = {**batch(kind), "labels": batch(kind)["input_ids"]}
    expected = loss_and_gradients(model, inputs)
    assert model.fuse_mlp() == GATED[kind]
    assert_same_gradients(loss_and_gradients(model, inputs), expected)
    model.unfuse_mlp()
    again = loss_and_gradients(model, inputs)
    assert torch.equal(again[0], expected[0])
    assert all(torch.equal(again[1][name], grad) for name, grad in expected[1].items())


def test_same_gradients_of_t5(tiny_t5: PreTrainedModel, make_inputs: MakeInputs) -> None:
    model, inputs = adapted(tiny_t5), make_inputs("t5")
    expected = loss_and_gradients(model, inputs)
    assert model.fuse_mlp() == 4
    assert_same_gradients(loss_and_gradients(model, inputs), expected)


def test_bfloat16_is_as_near_to_float64(make_model: MakeModel, make_inputs: MakeInputs) -> None:
    inputs = make_inputs("llama")
    exact = adapted(make_model("llama").double())
    half = adapted(make_model("llama").bfloat16())
    half.load_state_dict({k: v.float() for k, v in exact.state_dict().items()}, strict=False)
    want = loss_and_gradients(exact, inputs)[1]
    plain = loss_and_gradients(half, inputs)[1]
    assert half.fuse_mlp() == 2
    fused = loss_and_gradients(half, inputs)[1]

    def error(found: dict[str, Tensor]) -> float:
        return sum(relative(found[name], grad) ** 2 for name, grad in want.items())

    assert error(fused) < 1.3 * error(plain)


def test_zeros_in_the_vector(tiny_llama: PreTrainedModel, make_inputs: MakeInputs) -> None:
    model, inputs = adapted(tiny_llama), make_inputs("llama")
    vector = model.vectors("default")[f"{MLP}.down_proj"]
    with torch.no_grad():
        vector[0, :4] = torch.tensor([0.0, -0.0, 1e-30, -2.0])
    expected = loss_and_gradients(model, inputs)
    model.fuse_mlp()
    found = loss_and_gradients(model, inputs)
    assert_same_gradients(found, expected)
    torch.testing.assert_close(
        found[1][f"{MLP}.down_proj"][0, :4], expected[1][f"{MLP}.down_proj"][0, :4]
    )


def test_a_product_kept_in_float32(tiny_t5: PreTrainedModel, make_inputs: MakeInputs) -> None:
    """Half precision T5 keeps its down projections in float32, and casts to it."""
    base = tiny_t5.bfloat16()
    for name, module in base.named_modules():
        if name.endswith("wo"):
            module.float()
    model, inputs = adapted(base), make_inputs("t5")
    expected = loss_and_gradients(model, inputs)
    assert model.fuse_mlp() == 4
    assert_same_gradients(loss_and_gradients(model, inputs), expected, 3e-2)
    base.float()  # and afterwards there is nothing to cast
    model(**inputs).loss.backward()


def test_active_dropout(tiny_t5: PreTrainedModel, make_inputs: MakeInputs) -> None:
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
def test_gradient_checkpointing(
    tiny_llama: PreTrainedModel, make_inputs: MakeInputs, reentrant: bool
) -> None:
    model, inputs = adapted(tiny_llama).train(), make_inputs("llama")
    model.fuse_mlp()
    expected = loss_and_gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same_gradients(loss_and_gradients(model, inputs), expected, 1e-6)


def test_compiled(tiny_llama: PreTrainedModel, make_inputs: MakeInputs) -> None:
    model, inputs = adapted(tiny_llama), make_inputs("llama")
    expected = loss_and_gradients(model, inputs)
    model.fuse_mlp()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(**inputs, use_cache=False).loss
    grads = torch.autograd.grad(loss, list(vectors(model).values()))
    assert_same_gradients((loss, dict(zip(vectors(model), grads, strict=True))), expected)


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [LlamaConfig, GemmaConfig])
def test_keeps_less_than_the_frozen_model(config: type[PreTrainedConfig]) -> None:
    # Feed-forward layers four times as wide as the model, as they usually are.
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 8}
    base = AutoModelForCausalLM.from_config(
        config(**sizes, vocab_size=64, num_attention_heads=4, num_key_value_heads=2)
    )
    labels = batch("llama")["input_ids"]
    base.requires_grad_(False)
    frozen = saved_bytes(base, labels)
    model = adapted(base)
    assert model.fuse_mlp() == 2
    fused = saved_bytes(model, labels)
    model.unfuse_mlp()
    assert fused < frozen
    assert fused < saved_bytes(model, labels)


def test_smollm2() -> None:
    base = copy.deepcopy(load_base_model(EMBEDDED_MODEL).model)
    labels = torch.randint(3, 4000, (2, 24), generator=torch.Generator().manual_seed(0))
    base.requires_grad_(False)
    frozen = saved_bytes(base, labels)
    model = adapted(base)
    expected = loss_and_gradients(model, {"input_ids": labels, "labels": labels})
    assert model.fuse_mlp() == 30
    found = loss_and_gradients(model, {"input_ids": labels, "labels": labels})
    assert_same_gradients(found, expected, 1e-4)
    assert saved_bytes(model, labels) < frozen


# -- on and off ------------------------------------------------------------------------------------


def test_unload_leaves_no_trace(tiny_llama: PreTrainedModel) -> None:
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


def test_the_signature_stays(tiny_llama: PreTrainedModel) -> None:
    mlp = tiny_llama.get_submodule(MLP)
    before = inspect.signature(mlp.forward)
    adapted(tiny_llama).fuse_mlp()
    assert is_fused(mlp)
    assert inspect.signature(mlp.forward) == before
    values = torch.randn(1, 2, 32)
    assert torch.equal(mlp(x=values), mlp(values))
    # Its structure can still be proven: a merge asks for it.
    assert up_projection(tiny_llama, f"{MLP}.down_proj") == "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_independent(
    tiny_llama: PreTrainedModel, make_inputs: MakeInputs, twin: Callable[[IA3Model], IA3Model]
) -> None:
    inputs, model = make_inputs("llama"), adapted(tiny_llama)
    model.fuse_mlp()
    expected = loss_and_gradients(model, inputs)
    other = twin(model)
    assert is_fused(other.model.get_submodule(MLP))
    assert_same_gradients(loss_and_gradients(other, inputs), expected, 1e-7)
    randomize(vectors(other), 9)
    assert_same_gradients(loss_and_gradients(model, inputs), expected, 1e-7)
    other.unfuse_mlp()
    assert not is_fused(other.model.get_submodule(MLP))
    assert is_fused(model.model.get_submodule(MLP))


def test_adapters_come_and_go(make_model: MakeModel, make_inputs: MakeInputs) -> None:
    """Whatever is done to the adapters of a fused model, it computes what another one does."""
    inputs = make_inputs("llama")

    def prepared() -> IA3Model:
        # The first adapter has no vector within the feed-forward layers.
        return adapted(make_model("llama"), target_modules=["k_proj"], feedforward_modules=[])

    fused, plain = prepared(), prepared()
    fused.fuse_mlp()

    def check() -> None:
        with torch.no_grad():
            found, expected = fused(**inputs).logits, plain(**inputs).logits
        assert relative(found, expected) < 1e-5

    def both(change: Callable[[IA3Model], object]) -> None:
        for model in (fused, plain):
            change(model)
        check()

    def add(model: IA3Model) -> None:
        model.add_adapter("second", IA3Config())
        randomize({k: v for k, v in vectors(model).items() if k.endswith("second")}, 5)

    check()
    both(add)
    both(lambda model: model.set_adapter("second"))
    assert_same_gradients(*[loss_and_gradients(m, inputs, "second") for m in (fused, plain)])
    both(lambda model: model.set_adapter(["default", "second"]))
    both(lambda model: model.merge_adapter())
    both(lambda model: model.unmerge_adapter())
    both(lambda model: model.disable_adapter_layers())
    both(lambda model: model.enable_adapter_layers())
    both(lambda model: model.delete_adapter("default"))
    merged, wanted = fused.merge_and_unload(), plain.merge_and_unload()
    assert not any(is_fused(module) for module in merged.modules())
    for name, value in wanted.state_dict().items():
        assert torch.equal(merged.state_dict()[name], value)


@pytest.mark.parametrize("fused_first", [True, False])
def test_hooks_on_the_activation_are_heeded(
    tiny_llama: PreTrainedModel, make_inputs: MakeInputs, fused_first: bool
) -> None:
    model, inputs = adapted(tiny_llama), make_inputs("llama")
    plain = loss_and_gradients(model, inputs)
    activation = tiny_llama.get_submodule(f"{MLP}.act_fn")
    if fused_first:
        assert model.fuse_mlp() == 2
    hook = activation.register_forward_hook(lambda _module, _args, result: result * 2)
    found = loss_and_gradients(model, inputs)
    model.unfuse_mlp()
    assert_same_gradients(loss_and_gradients(model, inputs), found)
    assert model.fuse_mlp() == 1  # the other layer
    assert_same_gradients(loss_and_gradients(model, inputs), found)
    hook.remove()
    assert_same_gradients(loss_and_gradients(model, inputs), plain)


def test_accelerate(make_model: MakeModel, make_inputs: MakeInputs) -> None:
    inputs = make_inputs("llama")
    plain = adapted(make_model("llama"))
    expected = loss_and_gradients(plain, inputs)

    base = make_model("llama")
    cpu_offload(base, execution_device=torch.device("cpu"))
    model = adapted(base)
    assert model.fuse_mlp() == 2
    assert_same_gradients(loss_and_gradients(model, inputs), expected)
    model.unload()

    base = make_model("llama")
    mlp = base.get_submodule(MLP)
    hook = AlignDevicesHook(execution_device="cpu", io_same_device=True)
    add_hook_to_module(mlp, hook)
    outermost = mlp.__dict__["forward"]
    model = adapted(base)
    assert model.fuse_mlp() == 2
    assert mlp.__dict__["forward"] is outermost
    assert_same_gradients(loss_and_gradients(model, inputs), expected)
    model.unfuse_mlp()
    remove_hook_from_module(mlp)
    # Put on a fused layer.
    model.fuse_mlp()
    add_hook_to_module(mlp, hook)
    assert_same_gradients(loss_and_gradients(model, inputs), expected)
    model.unfuse_mlp()
    assert not is_fused(mlp)
    assert torch.equal(loss_and_gradients(model, inputs)[0], expected[0])


def test_modules_to_save(tiny_llama: PreTrainedModel, make_inputs: MakeInputs) -> None:
    model = adapted(tiny_llama)
    model.fuse_mlp()
    saved = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    saved.modules_to_save = ["layers.0.mlp"]
    with pytest.raises(IA3Error, match="unfuse_mlp"):
        model.add_adapter("other", saved)
    model.unload()

    saved.target_modules, saved.modules_to_save = ["k_proj"], ["layers.0.mlp", "1.mlp.up_proj"]
    model = IA3Model(tiny_llama, saved)
    inputs = make_inputs("llama")
    expected = model(**inputs).loss
    assert model.fuse_mlp() == 1
    found = model(**inputs).loss
    assert relative(found.detach(), expected.detach()) < 1e-5
    found.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# -- what is left alone ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("gpt2", "transformer.h.0.mlp.*linear layers"), ("opt", "linear layers"), ("bert", "linear")],
)
def test_nothing_to_fuse(kind: str, reason: str) -> None:
    model = adapted(build(kind))
    before = output(kind, model)
    with pytest.raises(IA3Error, match=reason):
        model.fuse_mlp()
    assert torch.equal(output(kind, model), before)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return result


class Residual(Gated):
    """Its vector can be carried; it is not the gated form and nothing else."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def test_anything_else_is_left_alone() -> None:
    assert isinstance(gated_mlp(Gated()), Mlp)
    assert "something else than down(act(gate(x)) ⊙ up(x))" in str(gated_mlp(Residual()))
    module = Gated()
    module.forward = lambda x: x  # type: ignore[method-assign]
    assert "forward was replaced" in str(gated_mlp(module))
