"""Vectors on mixture-of-experts blocks, against dense references in float64."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from peft import IA3Config, get_peft_model
from support.pairs import logits, relative
from support.snapshots import assert_unchanged, snapshot
from support.versions import since
from torch import Tensor, nn
from torch.func import functional_call
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import ia3
from ia3 import IA3Error, IA3Model
from ia3.core.experts import attach, experts_shape, is_experts, scaled_weights
from ia3.core.patch import Patch

HIDDEN, INNER, EXPERTS, CHOSEN, TOKENS = 16, 24, 4, 2, 9
IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]
IDS = torch.arange(3, 17).reshape(2, 7)

Routed = tuple[Tensor, Tensor, Tensor]


class Vectors(nn.Module):
    """The vectors of one block, a module of their own on it."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.values = nn.Parameter(0.5 + torch.rand(shape))

    def forward(self) -> Tensor:
        return self.values


@pytest.fixture(autouse=True)
def _seed():
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
MODELS = {
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(intermediate_size=INNER, num_local_experts=EXPERTS, **COMMON)
    ),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(head_dim=8, num_experts=EXPERTS, moe_intermediate_size=INNER, **COMMON)
    ),
    "deepseek_v3": lambda: hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(
            n_routed_experts=EXPERTS,
            moe_intermediate_size=INNER,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=0,
            **dict.fromkeys(["q_lora_rank", "kv_lora_rank"], 8),
            **dict.fromkeys(["qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"], 8),
            **COMMON,
        )
    ),
}


def make_model(kind: str, implementation: str = "eager") -> hf.PreTrainedModel:
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
    return tuple(
        t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for t in inputs
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


def assert_equals_reference(block, inputs, reference=dense_reference, limit=1e-6):
    """Outputs and all gradients."""
    exact, vectors = in_float64(inputs), values_of(block).detach().double().requires_grad_()
    expected = reference(block, exact, vectors)
    direction = torch.randn_like(expected)
    expected.backward(direction)
    actual = block(*inputs)
    actual.backward(direction.to(actual.dtype))
    assert relative(actual, expected) < limit
    assert relative(values_of(block).grad, vectors.grad) < limit
    for given, wanted in zip(inputs, exact, strict=True):
        if given.requires_grad:
            assert relative(given.grad, wanted.grad) < limit


# -- equal to the formula --------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", MODELS)
def test_block_equals_dense_reference(kind, implementation):
    model = make_model(kind)
    block = blocks_of(model)[0]
    assert experts_shape(block) == (EXPERTS, INNER)
    rescaled(block)
    # It can be changed while they are attached.
    model.config._experts_implementation = implementation
    assert_equals_reference(block, routed())


@pytest.mark.parametrize(
    ("dtype", "limit", "implementation"),
    [
        # grouped_mm has no float64.
        *((torch.float64, 1e-13, each) for each in IMPLEMENTATIONS if each != "grouped_mm"),
        *((torch.bfloat16, 1e-2, each) for each in IMPLEMENTATIONS),
    ],
)
def test_block_in_other_dtypes(dtype, limit, implementation):
    block = blocks_of(make_model("mixtral", implementation).to(dtype))[0]
    rescaled(block)
    if dtype == torch.float64:
        block.double()
    assert_equals_reference(block, routed(dtype), limit=limit)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_second_derivatives_equal_the_dense_references(implementation):
    block = blocks_of(make_model("mixtral", implementation).double())[0]
    rescaled(block)
    block.double()
    inputs, vectors = routed(torch.float64), values_of(block)
    found = []
    for forward in (lambda: block(*inputs), lambda: dense_reference(block, inputs, vectors)):
        wanted = [vectors, inputs[0]]
        first = torch.autograd.grad(forward().square().sum(), wanted, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), wanted))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_unknown_implementation_gets_a_multiplied_weight(monkeypatch):
    """A kernel of another library, which takes the weights as they are."""

    def forward(self, states, index, weights):
        gate_up, down = self.gate_up_proj, self.down_proj
        assert isinstance(gate_up, Tensor)
        assert isinstance(down, Tensor)
        gate, up = torch.einsum("th,eih->tei", states, gate_up).chunk(2, dim=-1)
        every = torch.einsum("tei,ehi->teh", nn.functional.silu(gate) * up, down)
        chosen = every.gather(1, index[..., None].expand(-1, -1, every.shape[-1]))
        return (chosen * weights[..., None]).sum(1)

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "foreign", forward)
    block = blocks_of(make_model("mixtral", "foreign"))[0]
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


def test_unknown_operations_get_a_multiplied_weight():
    block = UnusualExperts().requires_grad_(False)
    rescaled(block)
    assert_equals_reference(block, routed())


def _block(kind: type[nn.Module], implementation: str) -> nn.Module:
    """A block alone, from the few settings that its class reads."""
    inner = ["intermediate_size", "moe_intermediate_size", "expert_ffn_hidden_size"]
    experts = ["num_local_experts", "n_routed_experts", "moe_num_experts"]
    config = SimpleNamespace(
        hidden_size=HIDDEN,
        **dict.fromkeys(inner, INNER),
        **dict.fromkeys(experts, EXPERTS),
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
@since("transformers", "5.23", "Aria's experts are layers, not parameters")
@pytest.mark.parametrize("kind", UNCOMMON)
def test_uncommon_block_equals_a_merged_one(kind, implementation):
    block = _block(kind, implementation)
    assert experts_shape(block) == (EXPERTS, INNER)
    exact = copy.deepcopy(block).double()
    exact.__dict__["config"] = SimpleNamespace(_experts_implementation="eager")

    def merged(_block, inputs, vectors):
        factors = vectors[:, :, None] if UNCOMMON[kind] else vectors[:, None, :]
        return functional_call(exact, {"down_proj": exact.down_proj * factors}, inputs)

    rescaled(block)
    assert_equals_reference(block, routed(), merged)


def test_block_with_sorted_inputs_equals_its_formula():
    block = _block(Llama4TextExperts, "eager")
    rescaled(block)

    def formula(block, inputs, vectors):
        by_expert = []
        for expert, rows in enumerate(inputs[0].split(3)):
            gate, up = (rows @ block.gate_up_proj[expert].double()).chunk(2, -1)
            inner = nn.functional.silu(gate) * up * vectors[expert]
            by_expert.append(inner @ block.down_proj[expert].double())
        return torch.cat(by_expert)

    states = torch.randn(EXPERTS * 3, HIDDEN, requires_grad=True)
    assert_equals_reference(block, (states,), formula)


@pytest.fixture
def _nan_in_new_memory():
    """What an operation leaves uninitialized is not a number."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@since("transformers", "5.23", "it has no such slots in eager experts")
@pytest.mark.usefixtures("_nan_in_new_memory")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_slots_of_other_devices_experts_add_nothing(implementation):
    """Under expert parallelism, an index beyond the experts marks a slot computed elsewhere."""
    block = blocks_of(make_model("mixtral", implementation))[0]
    block._is_expert_parallel = True
    rescaled(block)
    states, index, weights = routed()
    index[:, 1] = EXPERTS
    index[3, 0] = EXPERTS
    weights = weights.detach().masked_fill(index == EXPERTS, 0)
    assert_equals_reference(block, (states, index, weights))


# -- in whole models -------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", MODELS)
def test_merged_equals_unmerged_and_removed_is_the_base(kind, implementation):
    model = make_model(kind, implementation)
    before, base = snapshot(model), logits(model, input_ids=IDS)
    handles = [rescaled(block) for block in blocks_of(model)]
    unmerged = logits(model, input_ids=IDS)
    assert relative(unmerged, base) > 1e-3
    for handle in handles:
        handle.remove()
        handle.remove()
    scaled = [scaled_weights(block, values_of(block)) for block in blocks_of(model)]
    for block in blocks_of(model):
        del block._modules["vectors"]
    assert_unchanged(model, before)
    assert torch.equal(logits(model, input_ids=IDS), base)
    for block, parameters in zip(blocks_of(model), scaled, strict=True):
        assert parameters.keys() == {"down_proj"}
        block.get_parameter("down_proj").data = parameters["down_proj"]
    assert relative(logits(model, input_ids=IDS), unmerged) < 1e-6


@pytest.mark.parametrize(("kind", "axis"), [(DeepseekV4Experts, 1), (GptOssExperts, 2)])
def test_merging_rounds_once_and_changes_nothing(kind, axis):
    block = _block(kind, "eager").bfloat16()
    down, vectors = block.get_parameter("down_proj"), 0.5 + torch.rand(EXPERTS, INNER)
    before = down.clone()
    scaled = scaled_weights(block, vectors)["down_proj"]
    assert torch.equal(down, before)
    exact = down.double() * vectors.double().unsqueeze(axis)
    # Half a unit in the last of bfloat16's 8 places, and float32's own rounding before it.
    assert scaled.dtype == torch.bfloat16
    assert ((scaled.double() - exact).abs() <= exact.abs() * (2**-9 + 2**-23) * 2).all()
    assert torch.equal(scaled_weights(block, torch.ones_like(vectors))["down_proj"], before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    model = make_model("mixtral", "grouped_mm")
    for block in blocks_of(model):
        rescaled(block)
    model.get_input_embeddings().requires_grad_(True)

    def gradients():
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        return [values_of(block).grad.clone() for block in blocks_of(model)]

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    assert model.is_gradient_checkpointing
    for own, expected in zip(gradients(), plain, strict=True):
        assert relative(own, expected) < 1e-6


def test_autocast_is_near_the_float32_model():
    model = make_model("mixtral", "eager")
    handles = [rescaled(block) for block in blocks_of(model)]
    exact = model(IDS).logits
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(IDS, labels=IDS)
    mixed.loss.backward()
    assert relative(mixed.logits, exact) < 2e-2
    assert all(values_of(handle.module).grad.isfinite().all() for handle in handles)


# -- the module ------------------------------------------------------------------------------------


def test_saved_for_backward_is_one_activation_more():
    block = blocks_of(make_model("mixtral", "grouped_mm"))[0]
    inputs = routed()
    frozen = {p.untyped_storage().data_ptr() for p in block.parameters()}

    def saved():
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
        ):
            block(*inputs)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
        return sum(size for address, size in storages.items() if address not in frozen)

    alone = saved()
    rescaled(block)
    rows, vectors = TOKENS * CHOSEN, values_of(block)
    # The input of down_proj, the vectors, and the number of each row's expert.
    assert alone < saved() <= alone + rows * INNER * 4 + vectors.nbytes + rows * 8


@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_models_of_their_own(twin):
    model = make_model("mixtral")
    base = logits(model, input_ids=IDS)
    model.handles = [rescaled(block) for block in blocks_of(model)]
    expected = logits(model, input_ids=IDS)
    copied = twin(model)
    assert torch.equal(logits(copied, input_ids=IDS), expected)
    for block in blocks_of(copied):
        values_of(block).data.fill_(1)
    assert relative(logits(copied, input_ids=IDS), base) < 1e-6
    for handle in copied.handles:
        handle.remove()
    assert torch.equal(logits(copied, input_ids=IDS), base)
    assert torch.equal(logits(model, input_ids=IDS), expected)


@since("transformers", "5.23", "grouped products of matrices cannot be compiled")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compiled_model_equals_eager(implementation):
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
    assert relative(values_of(block).grad, expected) < 1e-6
    assert relative(compiled(*inputs), block(*inputs)) < 1e-6
    handle.remove()
    assert torch.equal(compiled(*inputs), base)


@pytest.mark.usefixtures("_nan_in_new_memory")
@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_transforms_of_torch_func(implementation):
    block = blocks_of(make_model("mixtral", implementation))[0]
    block._is_expert_parallel = True
    rescaled(block)
    inputs = routed()
    inputs[1][:, 1] = EXPERTS

    def loss(vectors):
        return functional_call(block, {"vectors.values": vectors}, inputs).square().sum()

    gradient = torch.func.grad(loss)(values_of(block).detach())
    block(*inputs).square().sum().backward()
    assert relative(gradient, values_of(block).grad) < 1e-6


# -- mistakes --------------------------------------------------------------------------------------


def test_packed_and_misfit_weights_are_refused():
    block = blocks_of(make_model("mixtral"))[0]
    packed = copy.deepcopy(block)
    packed.down_proj = nn.Parameter(packed.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(IA3Error, match="float8_e4m3fn"):
        experts_shape(packed)
    block.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER + 2))
    with pytest.raises(IA3Error, match="do not fit each other"):
        experts_shape(block)


def test_a_model_whose_forward_cannot_be_copied_is_left_unchanged():
    model = make_model("mixtral")
    blocks_of(model)[1].forward = print
    before = snapshot(model)
    with pytest.raises(IA3Error, match="was replaced by"):
        IA3Model(model, ia3.IA3Config(target_modules=["experts"], feedforward_modules=["experts"]))
    assert_unchanged(model, before)


def test_a_forward_replaced_while_no_adapter_multiplies_changes_nothing():
    model = IA3Model(make_model("mixtral"), ia3.IA3Config(paper_sites=True))
    model.add_adapter("other", ia3.IA3Config(paper_sites=True))
    with torch.no_grad():
        for name in model.peft_config:
            for vector in model.vectors(name).values():
                vector.normal_()
    with model.disable_adapter():
        expected = model(IDS).logits
        block = blocks_of(model)[1]
        block.forward = lambda *args: MixtralExperts.forward(block, *args)
        with pytest.raises(IA3Error, match="was replaced by"):
            model.enable_adapter_layers()
        assert not model.has_active_enabled_adapter
        assert torch.equal(model(IDS).logits, expected)
        del block.forward
    model.set_adapter([])
    block.forward = lambda *args: MixtralExperts.forward(block, *args)
    with pytest.raises(IA3Error, match="was replaced by"):
        model.set_adapter("other")
    assert model.active_adapters == []
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(IDS).logits, expected)


class TransposedExperts(nn.Module):
    """No gate and no word on the layout: its shapes fit both."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN))

    def forward(self, states: Tensor) -> Tensor:
        return (states @ self.up_proj[0]).relu() @ self.down_proj[0]


def test_a_layout_taken_wrongly_is_noticed():
    block, states = TransposedExperts(), torch.randn(3, HIDDEN)
    handle = attach(block, Vectors(experts_shape(block)))
    with pytest.raises(IA3Error, match="is_transposed"):
        block(states)
    handle.remove()
    block.is_transposed = True
    assert experts_shape(block) == (EXPERTS, INNER)
    rescaled(block)
    inner = (states @ block.up_proj[0]).relu() * values_of(block)[0]
    assert relative(block(states), inner @ block.down_proj[0]) < 1e-6


def test_peft_refuses_experts():
    config = IA3Config(target_modules=["experts"], feedforward_modules=["experts"])
    with pytest.raises(ValueError, match="MixtralExperts"):
        get_peft_model(make_model("mixtral"), config)
