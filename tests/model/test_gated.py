"""act(gate) ⊙ up ⊙ vector in one operation, against the definition in float64."""

import itertools

import pytest
import torch
from support.pairs import relative
from torch import Tensor
from torch.nn import functional

from ia3.core.mlp import FUNCTIONS
from ia3.model.fused_mlp import gated_product

# An exact zero, both signs, tiny ones: what a division by the vector would stumble over.
AWKWARD = [0.0, -0.0, 1.0, -1.5, 1e-3, -1e-25, 1e-25, 3.0]

REFERENCE = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "gelu_tanh": lambda x: x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "relu": lambda x: torch.where(x > 0, x, 0.0),
}

EVERY_FUNCTION = pytest.mark.parametrize("function", REFERENCE)


def seeded(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def definition(gate: Tensor, up: Tensor, vector: Tensor | None, function: str) -> Tensor:
    product = REFERENCE[function](gate) * up
    return product if vector is None else product * vector


def plain(gate: Tensor, up: Tensor, vector: Tensor, function: str) -> Tensor:
    """As a layer's forward and a hook on its down projection's input compute it."""
    return ((FUNCTIONS[function](gate) * up) * vector).to(gate.dtype)


def results(operation: object, inputs: list[Tensor], weight: Tensor, function: str) -> list[Tensor]:
    """The result, and the gradients of gate, up and vector of Σ weight ⊙ result²."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    result = operation(*leaves, function)
    loss = (result.square() * weight.to(result.dtype)).sum()
    return [result.detach(), *torch.autograd.grad(loss, leaves)]


@EVERY_FUNCTION
@pytest.mark.parametrize("shape", [(2, 5, 8), (4, 8), (8,)])
def test_gradient_is_the_derivative(function, shape):
    gate, up, vector = seeded(*shape), seeded(*shape, seed=1), torch.tensor(AWKWARD).double()
    for needed in filter(any, itertools.product([True, False], repeat=3)):
        leaves = [t.requires_grad_(n) for t, n in zip((gate, up, vector), needed, strict=True)]
        assert torch.autograd.gradcheck(lambda *t: gated_product(*t, function).sin(), leaves)
    leaves = gate.requires_grad_(), up.requires_grad_(), None
    assert torch.autograd.gradcheck(lambda *t: gated_product(*t, function).sin(), leaves)


@EVERY_FUNCTION
def test_the_gradient_can_be_differentiated(function):
    gate, up, vector = seeded(3, 8), seeded(3, 8, seed=1), torch.tensor(AWKWARD).double()
    for needed in filter(any, itertools.product([True, False], repeat=3)):
        leaves = [t.requires_grad_(n) for t, n in zip((gate, up, vector), needed, strict=True)]
        assert torch.autograd.gradgradcheck(lambda *t: gated_product(*t, function).sin(), leaves)
    leaves = gate.requires_grad_(), up.requires_grad_(), None
    assert torch.autograd.gradgradcheck(lambda *t: gated_product(*t, function).sin(), leaves)


COMPILED = torch.compile(gated_product, fullgraph=True, backend="aot_eager")


@EVERY_FUNCTION
@pytest.mark.parametrize("operation", [gated_product, COMPILED], ids=["eager", "compiled"])
def test_is_the_definition(operation, function):
    inputs = [4 * seeded(3, 5, 8), seeded(3, 5, 8, seed=1), torch.tensor(AWKWARD).double()]
    weight = seeded(3, 5, 8, seed=2)
    found = results(operation, inputs, weight, function)
    for ours, expected in zip(found, results(definition, inputs, weight, function), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)


@EVERY_FUNCTION
def test_float32_is_as_near_as_separate_operations(function):
    vector = seeded(96, seed=2)
    vector[:8] = torch.tensor(AWKWARD)
    inputs = [2 * seeded(2000, 96), seeded(2000, 96, seed=1), vector]
    weight = seeded(2000, 96, seed=3)
    # The same numbers in both precisions.
    inputs, weight = [t.float().double() for t in inputs], weight.float().double()
    want = results(definition, inputs, weight, function)
    single = [t.float() for t in inputs]
    ours = results(gated_product, single, weight, function)
    theirs = results(plain, single, weight, function)
    for mine, their, expected in zip(ours, theirs, want, strict=True):
        assert relative(mine, expected) < max(1.5 * relative(their, expected), 2e-7)


@EVERY_FUNCTION
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(function, dtype):
    gate, up = seeded(40, 64, dtype=dtype), seeded(40, 64, dtype=dtype, seed=1)
    vector = 1 + 0.3 * seeded(64, dtype=torch.float32, seed=2)
    weight = seeded(40, 64, dtype=dtype, seed=3)
    leaves = [t.clone().requires_grad_() for t in (gate, up, vector)]
    result = gated_product(*leaves, function)
    found = torch.autograd.grad((result * weight).sum(), leaves)
    wide = [t.double().requires_grad_() for t in (gate, up, vector)]
    exact = definition(*wide, function)
    expected = torch.autograd.grad((exact * weight.double()).sum(), wide)
    assert [t.dtype for t in (result, *found)] == [dtype, dtype, dtype, torch.float32]
    # Half a unit in the last place, of normal numbers; separate operations round three times.
    unit = torch.finfo(dtype).eps / 2
    for ours, want in ((result, exact), (found[0], expected[0]), (found[1], expected[1])):
        limit = unit * want.abs() * 1.01 + torch.finfo(dtype).tiny + 1e-6 * want.abs().max()
        assert bool(((ours.double() - want).abs() <= limit).all())
    assert relative(found[2], expected[2]) < 1e-6


def saved_by(*inputs):
    """What the operation keeps for the backward pass."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        gated_product(*inputs)
    return saved


@EVERY_FUNCTION
def test_saves_gate_up_and_the_vector(function):
    leaves = [seeded(*s).requires_grad_() for s in ((3, 8), (3, 8), (8,))]
    saved = saved_by(*leaves, function)
    assert {t.untyped_storage().data_ptr() for t in saved} == {t.data_ptr() for t in leaves}


def test_with_the_vector_alone_to_train_no_more_than_the_product_is_saved():
    gate, up = seeded(3, 8), seeded(3, 8, seed=1)
    saved = saved_by(gate, up, torch.ones(8, requires_grad=True).double(), "silu")
    assert sum(tensor.numel() for tensor in saved) < gate.numel() + up.numel()


@EVERY_FUNCTION
def test_functional_transforms(function):
    inputs = (seeded(3, 8), seeded(3, 8, seed=1), torch.tensor(AWKWARD).double())

    def loss(gate, up, vector):
        return gated_product(gate, up, vector, function).square().sum()

    found = torch.func.grad(loss, argnums=(0, 1, 2))(*inputs)
    leaves = [t.clone().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(definition(*leaves, function).square().sum(), leaves)
    for ours, want in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, want)
    mapped = torch.vmap(gated_product, in_dims=(0, 0, None, None))(*inputs, function)
    torch.testing.assert_close(mapped, definition(*inputs, function))


def test_autocast():
    values = seeded(3, 8, dtype=torch.float32)
    weights = [seeded(12, 8, dtype=torch.float32, seed=s).requires_grad_() for s in (1, 2)]
    vector = (1 + seeded(12, dtype=torch.float32, seed=3)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        gate, up = (functional.linear(values, weight) for weight in weights)
        result = gated_product(gate, up, vector, "silu")
    assert result.dtype == torch.bfloat16
    result.float().square().sum().backward()
    expected = definition(gate.double(), up.double(), vector.double(), "silu")
    assert relative(result.detach(), expected.detach()) < 2**-8
    assert all(leaf.grad is not None for leaf in (vector, *weights))
