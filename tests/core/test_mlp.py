"""What an MLP computes, and which layer can take its vector: on real MLPs and misleading ones."""

import copy
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
import transformers as hf
from accelerate import cpu_offload
from conftest import VOCABULARY
from support.architectures import build
from support.memory import saved_bytes
from support.pairs import adapted, logits, relative
from support.snapshots import assert_unchanged, snapshot
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import gelu, silu

from ia3.core.mlp import Mlp, read_mlp

LLAMA_MLP = "model.layers.0.mlp"
T5_MLP = "encoder.block.0.layer.1.DenseReluDense"


def t5(projection: str) -> hf.PreTrainedModel:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    config = hf.T5Config(vocab_size=VOCABULARY, feed_forward_proj=projection, **sizes)
    return hf.T5ForConditionalGeneration(config)


def phi3() -> hf.PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    return hf.Phi3ForCausalLM(
        hf.Phi3Config(vocab_size=VOCABULARY, num_attention_heads=4, pad_token_id=0, **sizes)
    )


def up_of(model: nn.Module, mlp: str, down: str = "down_proj") -> str | None:
    found = read_mlp(model.get_submodule(mlp), down, with_gate=False)
    return found.up if isinstance(found, Mlp) else None


# The model, its MLP, and there the down and the up projection.
GATED = {
    "qwen2": (lambda: build("qwen2"), LLAMA_MLP, "down_proj", "up_proj"),
    "gemma3": (lambda: build("gemma3"), LLAMA_MLP, "down_proj", "up_proj"),
    "t5": (lambda: t5("gated-gelu"), T5_MLP, "wo", "wi_1"),
    # A ReLU lets positive factors through, so that its gate would do for them.
    "relu": (lambda: t5("gated-relu"), T5_MLP, "wo", "wi_1"),
}

NOT_GATED = {
    "t5": (lambda: build("t5"), T5_MLP, "wo"),
    "falcon": (lambda: build("falcon"), "transformer.h.0.mlp", "dense_4h_to_h"),
    "gpt2": (lambda: build("gpt2"), "transformer.h.0.mlp", "c_proj"),
    # fc1 and fc2 stand in the decoder layer itself.
    "opt": (lambda: build("opt"), "model.decoder.layers.0", "fc2"),
    # Half of gate_up_proj's rows would do, but no module has them as its output.
    "phi3": (phi3, LLAMA_MLP, "down_proj"),
    "mixtral": (lambda: build("mixtral"), LLAMA_MLP, "experts"),
    "attention": (lambda: build("qwen2"), "model.layers.0.self_attn", "o_proj"),
    "gate": (lambda: build("llama"), LLAMA_MLP, "gate_proj"),
    "activation": (lambda: build("llama"), LLAMA_MLP, "act_fn"),
}


@pytest.mark.parametrize("kind", GATED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated(kind, dtype):
    torch.manual_seed(0)
    make, mlp_name, down, up = GATED[kind]
    model = make().to(dtype).eval()
    assert up_of(model, mlp_name, down) == up
    mlp = model.get_submodule(mlp_name)
    vector, x = torch.randn(48, dtype=dtype), torch.randn(2, 5, 32, dtype=dtype)
    with torch.no_grad():
        handle = mlp.get_submodule(down).register_forward_pre_hook(lambda _, args: args[0] * vector)
        wanted = mlp(x)
        handle.remove()
        mlp.get_submodule(up).register_forward_hook(lambda _, args, output: output * vector)
        assert relative(mlp(x), wanted) < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_near_functions_are_told_apart_in_half_precision(dtype):
    """T5 casts the product to the dtype of `wo`, in which both gelus of it are the same."""
    mlp = t5("gated-gelu").to(dtype).get_submodule(T5_MLP)
    found = read_mlp(mlp, "wo")
    assert isinstance(found, Mlp)
    assert (found.gate, found.function, found.casts) == ("wi_0", "gelu_tanh", True)


@pytest.mark.parametrize("kind", NOT_GATED)
def test_not_gated(kind):
    make, mlp, down = NOT_GATED[kind]
    assert up_of(make(), mlp, down) is None


FORWARDS = {
    "compiled": lambda mlp: {"act_fn": torch.compile(mlp.act_fn, backend="eager")},
    "scripted": lambda mlp: {"act_fn": torch.jit.script(nn.SiLU())},
    "bound": lambda mlp: {"forward": MethodType(type(mlp).forward, mlp)},
    "bound with more": lambda mlp: {"forward": partial(mlp.forward)},
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", FORWARDS)
@pytest.mark.parametrize("training", [False, True])
def test_forwards_that_are_still_the_mlps(tiny_llama, kind, training):
    mlp = tiny_llama.train(training).get_submodule(LLAMA_MLP)
    for name, value in FORWARDS[kind](mlp).items():
        setattr(mlp, name, value)
    assert up_of(tiny_llama, LLAMA_MLP) == "up_proj"


def test_a_layer_that_is_reached_from_elsewhere(tiny_llama):
    mlp = tiny_llama.get_submodule(LLAMA_MLP)
    # Not one of its modules: the vector would go into the sum as well.
    mlp.skip = [mlp.up_proj]

    def forward(self, x):
        inner = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(inner) + self.skip[0](x).mean(-1, keepdim=True)

    mlp.forward = MethodType(forward, mlp)
    assert up_of(tiny_llama, LLAMA_MLP) is None


def test_meta_device():
    mlp = build("llama").to("meta").get_submodule(LLAMA_MLP)
    expected = Mlp("down_proj", "up_proj", "gate_proj", "silu", "act_fn")
    assert read_mlp(mlp, "down_proj") == expected


def test_offloaded(tiny_llama):
    model = cpu_offload(tiny_llama, torch.device("cpu"))
    assert next(model.parameters()).device.type == "meta"
    assert up_of(model, LLAMA_MLP) == "up_proj"
    model(torch.tensor([[3, 4]]))  # the forwards accelerate put there are there again


# -- MLPs made to mislead --------------------------------------------------------------------------


class Layers(nn.Module):
    """Three linear layers whose names say nothing; `forward` is one of the functions below."""

    def __init__(self, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        for name, part in parts.items():
            setattr(self, name, part)


def inner(m: Any, x: Tensor) -> Tensor:
    return silu(m.a(x)) * m.b(x)


def activation(name: str, formula: Callable[[Tensor], Tensor]) -> nn.Module:
    return type(name, (nn.Module,), {"forward": lambda _self, x: formula(x)})()


def by_act(m: Any, x: Tensor) -> Tensor:
    return m.c(m.act(m.a(x)) * m.b(x))


CLAMPED = activation("SiLU", lambda x: x.clamp(min=0))
QUICK_GELU = activation("GELU", lambda x: x * (1.702 * x).sigmoid())
GAIN = nn.Parameter(torch.zeros(12))


def form(forward, up=None, function=None, **parts):
    """An MLP, and what is to be found: which layer is `up`, and the function of the gate."""
    return type("Form", (Layers,), {"forward": forward})(**parts), up, function


FORMS = {
    "function": form(lambda m, x: m.c(inner(m, x)), "b", "silu"),
    "the other way": form(lambda m, x: m.c(m.a(x) * gelu(m.b(x))), "a", "gelu"),
    "tanh": form(lambda m, x: m.c(gelu(m.a(x), approximate="tanh") * m.b(x)), "b", "gelu_tanh"),
    "module": form(by_act, "b", "silu", act=nn.SiLU()),
    "misnamed": form(by_act, "b", "relu", act=CLAMPED),
    "dropout": form(lambda m, x: m.c(m.d(inner(m, x))), "b", "silu", d=nn.Dropout(0.5)),
    # The vector can be carried, but the MLP computes something else beside the gated form.
    "learned": form(by_act, "b", act=nn.PReLU()),
    "quick gelu": form(by_act, "b", act=QUICK_GELU),
    "dropped": form(lambda m, x: m.c(functional.dropout(inner(m, x), 0.5, m.training)), "b"),
    "dropped before": form(lambda m, x: m.c(inner(m, m.d(x))), "b", d=nn.Dropout(0.5)),
    "normed before": form(lambda m, x: m.c(inner(m, functional.rms_norm(x, (8,)))), "b"),
    "gate clamped": form(lambda m, x: m.c(silu(m.a(x).clamp(max=7)) * m.b(x)), "b"),
    "residual": form(lambda m, x: x + m.c(inner(m, x)), "b"),
    # Nothing is proven.
    "up clamped": form(lambda m, x: m.c(silu(m.a(x)) * m.b(x).clamp(-1, 1))),
    "normed": form(lambda m, x: m.c(m.norm(inner(m, x))), norm=nn.RMSNorm(12)),
    "leaks": form(lambda m, x: m.c(silu(m.a(x)) * (value := m.b(x))) + value.mean()),
    "shifted": form(lambda m, x: m.c(silu(m.a(x)) * (m.b(x) + 1))),
    "twice": form(lambda m, x: m.c(inner(m, m.c(inner(m, x))))),
    "two tensors": form(lambda m, x, residual: m.c(inner(m, x)) + residual),
    "an option": form(lambda m, x, shift=0.0: m.c(silu(m.a(x)) * (m.b(x) + shift))),
    "zero at first": form(lambda m, x: m.c(inner(m, x) * m.gain), gain=GAIN),
    "absolute": form(lambda m, x: m.c(m.b(x).abs())),
    "written over": form(lambda m, x: m.c(m.b(x).mul_(silu(m.a(x))))),
    "weight": form(lambda m, x: m.c(silu(m.a(x)) * functional.linear(x, m.b.weight, m.b.bias))),
    "broken": form(lambda m, x: m.c(inner(m, x)) / m.missing),
}


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_found_by_trying(kind, dtype):
    form, up, function = FORMS[kind]
    mlp = copy.deepcopy(form).to(dtype).train()
    before, random_state = snapshot(mlp), torch.get_rng_state()
    attributes = [(part, {**part.__dict__}) for part in mlp.modules()]
    found = read_mlp(mlp, "c")
    assert isinstance(found, Mlp) == (up is not None)
    if isinstance(found, Mlp):
        assert (found.down, found.up, found.function) == ("c", up, function)
        assert found.gate == (None if function is None else "ab".replace(str(up), ""))
    assert_unchanged(mlp, before)
    assert [(part, {**part.__dict__}) for part in mlp.modules()] == attributes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.is_grad_enabled()


# -- rescaled there --------------------------------------------------------------------------------

IDS = torch.arange(1, 13).reshape(2, 6)


def result(model: nn.Module) -> Tensor:
    return logits(model, input_ids=IDS)


def test_no_feed_forward_activation_is_kept():
    base = build("llama")
    frozen = saved_bytes(base, IDS)
    model = adapted(base)
    least = saved_bytes(model, IDS)
    model.use_plain_product()
    plain = saved_bytes(model, IDS)
    feed_forward = 2 * IDS.numel() * 48 * 4
    keys_and_values = 2 * 2 * IDS.numel() * 16 * 4
    divisors = 2 * (48 + 2 * 16) * 4
    assert plain - least >= feed_forward - divisors
    assert least - frozen <= keys_and_values + divisors


@pytest.mark.parametrize("modules", [{}, {"target_modules": "all-linear"}], ids=str)
def test_gradients_are_the_plain_products(modules):
    model = adapted(build("llama").double(), **modules)
    gradients = []
    for plain in (True, False):
        model.use_plain_product(plain)
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({n: v.grad.clone() for n, v in model.vectors("default").items()})
    for name, expected in gradients[0].items():
        # Not nearer: LLaMA's norms compute in float32.
        assert relative(gradients[1][name], expected) < 1e-6, name


@pytest.mark.parametrize("shared", ["up_proj", "down_proj"])
def test_layers_of_two_mlps_carry_nothing(shared):
    base = build("llama")
    first, second = (base.get_submodule(f"model.layers.{i}.mlp") for i in range(2))
    setattr(second, shared, getattr(first, shared))
    model = adapted(base)
    found = result(model)
    model.use_plain_product()
    torch.testing.assert_close(found, result(model))
