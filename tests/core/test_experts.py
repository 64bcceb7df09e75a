"""Vectors on mixture-of-experts blocks, against dense references in float64."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from peft import IA3Config, get_peft_model
from support.snapshots import assert_unchanged, snapshot
from torch import Tensor, nn
from torch.func import functional_call
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import ia3
from ia3 import IA3Model
from ia3.core.experts import attach, experts_shape, is_experts, scaled_weights
from ia3.core.patch import Patch
from ia3.errors import IA3Error

HIDDEN, INNER, EXPERTS, CHOSEN, TOKENS = 16, 24, 4, 2, 9
IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]

Routed = tuple[Tensor, Tensor, Tensor]


class Vectors(nn.Module):
    """The vectors of one block, a module of their own on it."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.values = nn.Parameter(0.5 + torch.rand(shape))

    def forward(self) -> Tensor:
        return self.values


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


COMMON = {
    "vocab_size": 40,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": CHOSEN,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
INNER_OF_MANY = {"num_experts": EXPERTS, "moe_intermediate_size": INNER}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(intermediate_size=INNER, num_local_experts=EXPERTS, **COMMON)
    ),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(shared_expert_intermediate_size=20, **INNER_OF_MANY, **COMMON)
    ),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(head_dim=8, **INNER_OF_MANY, **COMMON)),
    "olmoe": lambda: OlmoeForCausalLM(
        OlmoeConfig(intermediate_size=INNER, num_experts=EXPERTS, **COMMON)
    ),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            n_routed_experts=EXPERTS,
            moe_intermediate_size=INNER,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=0,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_nope_head_dim=8,
            qk_rope_head_dim=8,
            v_head_dim=8,
            **COMMON,
        )
    ),
}


def make_model(kind: str, implementation: str = "eager") -> PreTrainedModel:
    model = MODELS[kind]().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "experts." in name:
            nn.init.normal_(parameter, std=0.3)
    model.config._experts_implementation = implementation
    return model


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if is_experts(module)]


def rescaled(block: nn.Module) -> Patch:
    block.add_module("vectors", Vectors(experts_shape(block)))
    return attach(block, block.get_submodule("vectors"))


def values_of(block: nn.Module) -> nn.Parameter:
    return block.get_parameter("vectors.values")


def routed(dtype: torch.dtype = torch.float32) -> Routed:
    """Hidden states, chosen experts and their weights; no token chooses the last expert."""
    states = torch.randn(TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    index = torch.stack([torch.randperm(EXPERTS - 1)[:CHOSEN] for _ in range(TOKENS)])
    weights = torch.rand(TOKENS, CHOSEN, dtype=dtype, requires_grad=True)
    return states, index, weights


def in_float64(inputs: Routed) -> Routed:
    states, index, weights = inputs
    return (
        states.detach().double().requires_grad_(),
        index,
        weights.detach().double().requires_grad_(),
    )


def dense_reference(block: nn.Module, inputs: Routed, vectors: Tensor) -> Tensor:
    """Every token through its experts, one after the other."""
    states, index, weights = inputs
    gate_up, down = (block.get_parameter(f"{n}_proj").double() for n in ("gate_up", "down"))
    rows = []
    for token, state in enumerate(states):
        row = torch.zeros_like(state)
        for place, expert in enumerate(index[token].tolist()):
            if expert < EXPERTS:
                gate, up = (gate_up[expert] @ state).chunk(2)
                inner = nn.functional.silu(gate) * up * vectors[expert]
                row = row + weights[token, place] * (down[expert] @ inner)
        rows.append(row)
    return torch.stack(rows)


def distance(actual: Tensor | None, expected: Tensor | None) -> float:
    assert actual is not None
    assert expected is not None
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def assert_equals_reference(block: nn.Module, inputs: Routed, limit: float = 1e-6) -> None:
    """Outputs and all gradients."""
    exact, vectors = in_float64(inputs), values_of(block).detach().double().requires_grad_()
    expected = dense_reference(block, exact, vectors)
    direction = torch.randn_like(expected)
    expected.backward(direction)
    actual = block(*inputs)
    assert distance(actual, expected) < limit
    actual.backward(direction.to(actual.dtype))
    assert distance(values_of(block).grad, vectors.grad) < limit
    assert distance(inputs[0].grad, exact[0].grad) < limit
    assert distance(inputs[2].grad, exact[2].grad) < limit


# -- equal to the formula --------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", MODELS)
def test_block_equals_dense_reference(kind: str, implementation: str) -> None:
    block = blocks_of(make_model(kind, implementation))[0]
    assert experts_shape(block) == (EXPERTS, INNER)
    rescaled(block)
    assert_equals_reference(block, routed())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.bfloat16, 1e-2)])
def test_block_in_other_dtypes(dtype: torch.dtype, limit: float, implementation: str) -> None:
    if (dtype, implementation) == (torch.float64, "grouped_mm"):
        pytest.skip("grouped_mm has no float64")
    block = blocks_of(make_model("mixtral", implementation).to(dtype))[0]
    rescaled(block)
    if dtype == torch.float64:
        block.double()
    assert_equals_reference(block, routed(dtype), limit)


def test_implementation_can_change_while_attached() -> None:
    model = make_model("qwen3_moe")
    block = blocks_of(model)[0]
    rescaled(block)
    for implementation in (*IMPLEMENTATIONS, "eager"):
        model.config._experts_implementation = implementation
        values_of(block).grad = None
        assert_equals_reference(block, routed())


@pytest.fixture
def foreign_implementation() -> Iterator[str]:
    """A kernel of another library, which takes the weights as they are."""

    def forward(self: nn.Module, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        gate_up, down = self.gate_up_proj, self.down_proj
        assert isinstance(gate_up, Tensor)
        assert isinstance(down, Tensor)
        gate, up = torch.einsum("th,eih->tei", states, gate_up).chunk(2, dim=-1)
        every = torch.einsum("tei,ehi->teh", nn.functional.silu(gate) * up, down)
        chosen = every.gather(1, index[..., None].expand(-1, -1, every.shape[-1]))
        return (chosen * weights[..., None]).sum(1)

    ALL_EXPERTS_FUNCTIONS["foreign"] = forward
    yield "foreign"
    del ALL_EXPERTS_FUNCTIONS["foreign"]


def test_unknown_implementation_gets_a_multiplied_weight(foreign_implementation: str) -> None:
    block = blocks_of(make_model("mixtral", foreign_implementation))[0]
    rescaled(block)
    assert_equals_reference(block, routed())


class UnusualExperts(nn.Module):
    """Takes its weights in ways no matrix product stands for."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, HIDDEN))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER))

    def forward(self, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        result = torch.zeros_like(states)
        for expert, matrix in enumerate(self.down_proj.permute(0, 2, 1).contiguous()):
            gate, up = (states @ self.gate_up_proj[expert].mT).chunk(2, dim=-1)
            part = torch.einsum("ti,ih->th", nn.functional.silu(gate) * up, matrix)
            result = result + part * (weights * (index == expert)).sum(1, keepdim=True)
        return result * self.down_proj[:1, 0].isfinite().all()


def test_unknown_operations_get_a_multiplied_weight() -> None:
    block = UnusualExperts().requires_grad_(False)
    rescaled(block)
    assert_equals_reference(block, routed())


def _block(kind: type[nn.Module], implementation: str) -> nn.Module:
    """A block alone, from the few settings that its class reads."""
    config = SimpleNamespace(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        moe_intermediate_size=INNER,
        expert_ffn_hidden_size=INNER,
        num_local_experts=EXPERTS,
        n_routed_experts=EXPERTS,
        moe_num_experts=EXPERTS,
        zero_expert_num=1,
        moe_latent_size=None,
        hidden_act="silu",
        mlp_hidden_act="relu2",
        swiglu_alpha=1.7,
        swiglu_limit=1.0,
        _experts_implementation=implementation,
    )
    block = kind(config).requires_grad_(False)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    return block


# Class -> whether its down_proj is [experts, inner, hidden].
UNCOMMON = {
    GptOssExperts: True,  # biases, a gate that clamps and adds one
    AriaExperts: True,
    DeepseekV4Experts: False,  # a gate that clamps
    NemotronHExperts: False,  # no gate
    LongcatFlashExperts: False,  # experts that do nothing, implemented in one way
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", UNCOMMON)
def test_uncommon_block_equals_a_merged_one(kind: type[nn.Module], implementation: str) -> None:
    block, inputs = _block(kind, implementation), routed()
    assert experts_shape(block) == (EXPERTS, INNER)
    exact, exact_inputs = copy.deepcopy(block).double(), in_float64(inputs)
    exact.__dict__["config"] = SimpleNamespace(_experts_implementation="eager")
    rescaled(block)
    vectors = values_of(block).detach().double().requires_grad_()
    factors = vectors[:, :, None] if UNCOMMON[kind] else vectors[:, None, :]
    merged = {"down_proj": exact.get_parameter("down_proj") * factors}
    expected = functional_call(exact, merged, exact_inputs)
    direction = torch.randn_like(expected)
    expected.backward(direction)
    actual = block(*inputs)
    actual.backward(direction.float())
    assert distance(actual, expected) < 1e-6
    assert distance(values_of(block).grad, vectors.grad) < 1e-6
    assert distance(inputs[0].grad, exact_inputs[0].grad) < 1e-6


def test_block_with_sorted_inputs_equals_its_formula() -> None:
    block = _block(Llama4TextExperts, "eager")
    rescaled(block)
    states = torch.randn(EXPERTS * 3, HIDDEN, requires_grad=True)
    vectors = values_of(block).detach().double().requires_grad_()
    by_expert = []
    for expert, rows in enumerate(states.detach().double().split(3)):
        gate, up = (rows @ block.get_parameter("gate_up_proj")[expert].double()).chunk(2, -1)
        inner = nn.functional.silu(gate) * up * vectors[expert]
        by_expert.append(inner @ block.get_parameter("down_proj")[expert].double())
    expected = torch.cat(by_expert)
    expected.square().sum().backward()
    actual = block(states)
    actual.square().sum().backward()
    assert distance(actual, expected) < 1e-6
    assert distance(values_of(block).grad, vectors.grad) < 1e-6


@pytest.fixture
def _nan_in_new_memory() -> Iterator[None]:
    """What an operation leaves uninitialized is not a number."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_nan_in_new_memory")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_slots_of_other_devices_experts_add_nothing(implementation: str) -> None:
    """Under expert parallelism, an index beyond the experts marks a slot computed elsewhere."""
    block = blocks_of(make_model("mixtral", implementation))[0]
    block._is_expert_parallel = True
    rescaled(block)
    states, index, weights = routed()
    index[:, 1] = EXPERTS
    index[3, 0] = EXPERTS
    with torch.no_grad():
        weights[index == EXPERTS] = 0
    exact, vectors = in_float64((states, index, weights)), values_of(block).detach().double()
    vectors.requires_grad_()
    expected = dense_reference(block, exact, vectors)
    expected.square().sum().backward()
    actual = block(states, index, weights)
    actual.square().sum().backward()
    assert distance(actual, expected) < 1e-6
    assert distance(values_of(block).grad, vectors.grad) < 1e-6
    assert distance(states.grad, exact[0].grad) < 1e-6


def test_no_token_at_all() -> None:
    block = blocks_of(make_model("mixtral", "batched_mm"))[0]
    rescaled(block)
    states, index, weights = routed()
    assert block(states[:0], index[:0], weights[:0]).shape == (0, HIDDEN)


# -- in whole models -------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", MODELS)
def test_merged_equals_unmerged_and_removed_is_the_base(kind: str, implementation: str) -> None:
    model = make_model(kind, implementation)
    ids = torch.randint(3, 40, (2, 7))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = list(model.state_dict())
    attributes = [set(block.__dict__) for block in blocks_of(model)]
    with torch.no_grad():
        base = model(ids).logits
        handles = [rescaled(block) for block in blocks_of(model)]
        unmerged = model(ids).logits
        assert distance(unmerged, base) > 1e-3
        for handle in handles:
            handle.remove()
            handle.remove()
        scaled = [scaled_weights(block, values_of(block)) for block in blocks_of(model)]
        for block in blocks_of(model):
            del block._modules["vectors"]
        assert torch.equal(model(ids).logits, base)
        assert [set(block.__dict__) for block in blocks_of(model)] == attributes
        assert list(model.state_dict()) == names
        assert all(torch.equal(model.state_dict()[name], before[name]) for name in names)
        for block, parameters in zip(blocks_of(model), scaled, strict=True):
            assert parameters.keys() == {"down_proj"}
            block.get_parameter("down_proj").data = parameters["down_proj"]
        assert distance(model(ids).logits, unmerged) < 1e-6


def test_folding_rounds_once_and_changes_nothing() -> None:
    for kind, axis in ((DeepseekV4Experts, 1), (GptOssExperts, 2)):
        block = _block(kind, "eager").bfloat16()
        down, scale = block.get_parameter("down_proj"), 0.5 + torch.rand(EXPERTS, INNER)
        before = down.clone()
        (scaled,) = scaled_weights(block, scale).values()
        assert scaled.dtype == torch.bfloat16
        assert torch.equal(down, before)
        exact = down.double() * scale.double().unsqueeze(axis)
        # Half a unit in the last of bfloat16's 8 places, and float32's own rounding before it.
        assert ((scaled.double() - exact).abs() <= exact.abs() * (2**-9 + 2**-23) * 2).all()
        assert torch.equal(scaled_weights(block, torch.ones_like(scale))["down_proj"], before)
        assert not torch.equal(scaled, before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    model = make_model("olmoe", "grouped_mm")
    for block in blocks_of(model):
        rescaled(block)
    model.get_input_embeddings().requires_grad_(True)
    ids = torch.randint(3, 40, (2, 7))

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [values_of(block).grad.clone() for block in blocks_of(model)]

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    assert model.is_gradient_checkpointing
    for own, expected in zip(gradients(), plain, strict=True):
        assert distance(own, expected) < 1e-6


def test_autocast_is_near_the_float32_model() -> None:
    model = make_model("mixtral", "eager")
    ids = torch.randint(3, 40, (2, 7))
    handles = [rescaled(block) for block in blocks_of(model)]
    exact = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(ids, labels=ids)
    mixed.loss.backward()
    assert distance(mixed.logits, exact) < 2e-2
    assert all(values_of(handle.module).grad.isfinite().all() for handle in handles)


# -- the module ------------------------------------------------------------------------------------


def test_saved_for_backward_is_one_activation_more() -> None:
    block = blocks_of(make_model("mixtral", "grouped_mm"))[0]
    states, index, weights = routed()

    def saved() -> int:
        kept: dict[int, int] = {}
        frozen = {p.untyped_storage().data_ptr() for p in block.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in frozen:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            block(states, index, weights).sum()
        return sum(kept.values())

    alone = saved()
    rescaled(block)
    rows, vectors = TOKENS * CHOSEN, values_of(block)
    # The input of down_proj, the vectors, and the number of each row's expert.
    assert alone < saved() <= alone + rows * INNER * 4 + vectors.nbytes + rows * 8


def test_copies_and_pickles_are_models_of_their_own() -> None:
    model = make_model("mixtral")
    ids = torch.randint(3, 40, (2, 7))
    base = model(ids).logits
    handles = [rescaled(block) for block in blocks_of(model)]
    model.handles = handles
    expected = model(ids).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(copied(ids).logits, expected)
        with torch.no_grad():
            for block in blocks_of(copied):
                values_of(block).fill_(1)
        assert distance(copied(ids).logits, base) < 1e-6
        assert torch.equal(model(ids).logits, expected)
        for handle in copied.handles:
            handle.remove()
        assert all("forward" not in block.__dict__ for block in blocks_of(copied))
        assert torch.equal(copied(ids).logits, base)
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compiled_model_equals_eager(implementation: str) -> None:
    torch._dynamo.reset()
    block = blocks_of(make_model("mixtral", implementation))[0]
    # The loop over the experts that were hit depends on data: it cannot be one graph.
    whole = implementation != "eager"
    compiled = torch.compile(block, backend="aot_eager", fullgraph=whole)
    inputs = routed()
    base = compiled(*inputs)
    handle = rescaled(block)
    block(*inputs).square().sum().backward()
    expected = values_of(block).grad.clone()
    values_of(block).grad = None
    compiled(*inputs).square().sum().backward()
    assert distance(values_of(block).grad, expected) < 1e-6
    assert distance(compiled(*inputs), block(*inputs)) < 1e-6
    handle.remove()
    assert torch.equal(compiled(*inputs), base)


@pytest.mark.usefixtures("_nan_in_new_memory")
@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_transforms_of_torch_func(implementation: str) -> None:
    block = blocks_of(make_model("mixtral", implementation))[0]
    block._is_expert_parallel = True
    rescaled(block)
    inputs = routed()
    inputs[1][:, 1] = EXPERTS

    def loss(vectors: Tensor) -> Tensor:
        return functional_call(block, {"vectors.values": vectors}, inputs).square().sum()

    gradient = torch.func.grad(loss)(values_of(block).detach())
    block(*inputs).square().sum().backward()
    assert distance(gradient, values_of(block).grad) < 1e-6


@pytest.mark.parametrize("offloaded_first", [False, True])
def test_offloaded_weights(offloaded_first: bool) -> None:
    model = make_model("mixtral", "grouped_mm")
    block = blocks_of(model)[0]
    inputs = routed()
    base = block(*inputs)
    vectors = Vectors(experts_shape(block))
    expected = dense_reference(block, in_float64(inputs), vectors.values.double())
    if offloaded_first:
        cpu_offload(block, execution_device=torch.device("cpu"))
    handle = attach(block, vectors)
    if not offloaded_first:
        cpu_offload(block, execution_device=torch.device("cpu"))
    assert block.get_parameter("down_proj").device.type == "meta"
    assert distance(block(*inputs), expected) < 1e-6
    handle.remove()
    assert torch.equal(block(*inputs), base)
    remove_hook_from_submodules(block)
    assert torch.equal(block(*inputs), base)


# -- mistakes --------------------------------------------------------------------------------------


def test_linear_layers_are_no_experts() -> None:
    model = make_model("mixtral")
    found = {type(module).__name__ for module in model.modules() if is_experts(module)}
    assert found == {"MixtralExperts"}
    assert not is_experts(nn.Linear(2, 2))


def test_a_second_attachment_is_refused() -> None:
    block = blocks_of(make_model("mixtral"))[0]
    inputs = routed()
    handle = rescaled(block)
    expected = block(*inputs)
    with pytest.raises(IA3Error, match="attached already"):
        attach(block, Vectors(experts_shape(block)))
    assert torch.equal(block(*inputs), expected)
    handle.remove()
    attach(block, block.get_submodule("vectors"))
    assert torch.equal(block(*inputs), expected)


def test_vectors_of_another_shape_are_refused() -> None:
    block = blocks_of(make_model("mixtral"))[0]
    with pytest.raises(IA3Error, match=r"\[4, 25\].*expected \[4, 24\]"):
        attach(block, Vectors((EXPERTS, INNER + 1)))
    with pytest.raises(IA3Error, match=r"\[24\].*expected \[4, 24\]"):
        scaled_weights(block, torch.ones(INNER))
    assert "forward" not in block.__dict__


def test_packed_and_misfit_weights_are_refused() -> None:
    block = blocks_of(make_model("mixtral"))[0]
    packed = copy.deepcopy(block)
    packed.down_proj = nn.Parameter(packed.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(IA3Error, match="float8_e4m3fn"):
        attach(packed, Vectors((EXPERTS, INNER)))
    block.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER + 2))
    with pytest.raises(IA3Error, match="do not fit each other"):
        attach(block, Vectors((EXPERTS, INNER)))


def test_a_forward_that_cannot_be_copied_is_refused() -> None:
    block = blocks_of(make_model("mixtral"))[0]
    own = block.forward
    block.forward = lambda *args: own(*args)
    with pytest.raises(IA3Error, match="was replaced by"):
        attach(block, Vectors((EXPERTS, INNER)))


def test_a_model_with_such_a_forward_is_left_unchanged() -> None:
    model = make_model("mixtral")
    blocks_of(model)[1].forward = print
    before = snapshot(model)
    with pytest.raises(IA3Error, match="was replaced by"):
        IA3Model(model, ia3.IA3Config(target_modules=["experts"], feedforward_modules=["experts"]))
    assert_unchanged(model, before)


class TransposedExperts(nn.Module):
    """No gate and no word on the layout: its shapes fit both."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN))

    def forward(self, states: Tensor) -> Tensor:
        return (states @ self.up_proj[0]).relu() @ self.down_proj[0]


def test_a_layout_taken_wrongly_is_noticed() -> None:
    block, states = TransposedExperts(), torch.randn(3, HIDDEN)
    handle = attach(block, Vectors(experts_shape(block)))
    with pytest.raises(IA3Error, match="is_transposed"):
        block(states)
    handle.remove()
    block.is_transposed = True
    assert experts_shape(block) == (EXPERTS, INNER)
    rescaled(block)
    inner = (states @ block.up_proj[0]).relu() * values_of(block)[0]
    assert distance(block(states), inner @ block.down_proj[0]) < 1e-6


def test_peft_refuses_experts() -> None:
    config = IA3Config(target_modules=["experts"], feedforward_modules=["experts"])
    with pytest.raises(ValueError, match="MixtralExperts"):
        get_peft_model(make_model("mixtral"), config)
