"""The operation and its gradient, against the definition in float64."""

import pytest
import torch
from support.pairs import relative
from torch import Tensor, nn

from ia3.core.rescale import rescale
from ia3.errors import IA3Error

# Values that are hard to divide out again: an exact zero, both signs, tiny ones.
AWKWARD = [0.0, -0.0, 1.0, -1.5, 1e-3, -1e-25, 1e-25, 3.0]


def seeded(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(activation, vector, weight, *, in_place):
    """(result, gradient of the activation, gradient of the vector) of the loss Σ weight ⊙ y′²."""
    activation = activation.clone().requires_grad_()
    vector = vector.clone().requires_grad_()
    result = rescale(activation.clone(), vector, in_place=in_place)
    (result.square() * weight).sum().backward()
    return result.detach(), activation.grad, vector.grad


FORMS = [{}, {"keep_result": True}, {"in_place": True}]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 8), (5, 8), (2, 2, 3, 8)])
def test_gradient_is_the_derivative(form, shape):
    activation = seeded(*shape).requires_grad_()
    vector = torch.tensor(AWKWARD, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        # The clone is the fresh output of some layer.
        lambda a, v: rescale(a.clone(), v, **form).sin(),
        (activation, vector),
    )
    # The first layer of a frozen model: nothing below the activation requires gradients.
    alone = activation.detach()
    assert torch.autograd.gradcheck(lambda v: rescale(alone.clone(), v, **form).sin(), (vector,))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("factor", [(8,), (3, 1, 8)], ids=str)
def test_the_gradient_can_be_differentiated(form, factor):
    """Whatever the vector's values are: nothing is divided by them twice."""
    activation = seeded(3, 4, 8).requires_grad_()
    vector = torch.tensor(AWKWARD, dtype=torch.float64).expand(factor).clone().requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda a, v: rescale(a.clone(), v, **form).sin(), (activation, vector)
    )
    alone = activation.detach()
    assert torch.autograd.gradgradcheck(
        lambda v: rescale(alone.clone(), v, **form).sin(), (vector,)
    )


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_derivatives_of_a_whole_vector(form):
    """The Hessian, also all its rows at once, and a derivative of what it gives."""
    activation, vector = seeded(5, 8), torch.tensor(AWKWARD, dtype=torch.float64)

    def ours(v):
        return rescale(activation.clone(), v, **form).sin().sum()

    def formula(v):
        return (activation * v).sin().sum()

    hessian = torch.autograd.functional.hessian
    expected = hessian(formula, vector)
    torch.testing.assert_close(hessian(ours, vector), expected, rtol=1e-12, atol=1e-18)
    at_once = hessian(ours, vector, vectorize=True)
    torch.testing.assert_close(at_once, expected, rtol=1e-12, atol=1e-18)
    third = [
        torch.autograd.functional.jvp(
            lambda v, f=f: hessian(f, v, create_graph=True).diagonal(), vector, expected[2]
        )[1]
        for f in (ours, formula)
    ]
    torch.testing.assert_close(*third, rtol=1e-12, atol=1e-18)


def test_float32_gradients_are_as_good_as_the_plain_products():
    activation, weight = seeded(64, 256, 32), seeded(64, 256, 32, seed=1)
    vector = seeded(32, seed=2)
    vector[:8] = torch.tensor(AWKWARD)
    single = [t.float() for t in (activation, vector, weight)]
    wants = gradients(activation, vector, weight, in_place=False)
    plains = gradients(*single, in_place=False)
    for ours, plain, want in zip(gradients(*single, in_place=True), plains, wants, strict=True):
        assert relative(ours, want) < max(2 * relative(plain, want), 2e-7)


def test_bfloat16_is_within_its_rounding():
    activation = seeded(32, 64, 16, dtype=torch.bfloat16)
    weight = seeded(32, 64, 16, dtype=torch.bfloat16, seed=1)
    vector = 1 + 0.3 * seeded(16, dtype=torch.float32, seed=2)
    want = gradients(activation.double(), vector.double(), weight.double(), in_place=False)
    found = gradients(activation, vector, weight, in_place=True)
    assert [t.dtype for t in found] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for ours, expected in zip(found, want, strict=True):
        assert relative(ours, expected) < 2**-8  # one rounding to bfloat16's 8 bits


@pytest.mark.parametrize("trained", [True, False])
def test_in_place_returns_the_same_tensor(trained):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        activation = seeded(3, 4, dtype=dtype)
        expected = activation.clone() * 2
        result = rescale(activation, torch.full((4,), 2.0, requires_grad=trained), in_place=True)
        assert result is activation
        assert torch.equal(result, expected)
        assert result.dtype == dtype


@pytest.mark.parametrize(
    ("shape", "dtype", "vector_dtype", "in_place"),
    [
        ((3, 4), torch.float32, torch.float32, False),
        # float16 cannot hold the stand-in for zero.
        ((3, 4), torch.float16, torch.float32, True),
        ((3, 4), torch.float32, torch.float16, True),
        ((4,), torch.float32, torch.float32, True),
    ],
)
def test_what_cannot_be_exact_in_place_is_left_alone(shape, dtype, vector_dtype, in_place):
    activation = seeded(*shape, dtype=dtype)
    before = activation.clone()
    vector = torch.tensor([0.0, 1.0, -1.0, 2.0], dtype=vector_dtype, requires_grad=True)
    result = rescale(activation, vector, in_place=in_place)
    assert torch.equal(activation, before)
    assert torch.equal(result, (before * vector).to(dtype))
    result.sum().backward()
    expected = activation if activation.dim() == 1 else activation.sum(0)
    torch.testing.assert_close(vector.grad, expected.to(vector_dtype), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "activation", [seeded(2, 12).view(2, 3, 4), seeded(3, 8)[:, :4]], ids=["view", "slice"]
)
def test_a_view_is_not_written_over_in_training(activation):
    before = activation.clone()
    vector = torch.tensor(AWKWARD[:4], dtype=torch.float64)
    result = rescale(activation, vector.clone().requires_grad_(), keep_result=True, in_place=True)
    assert torch.equal(activation, before)
    torch.testing.assert_close(result, before * vector, rtol=0, atol=1e-15)
    assert torch.autograd.gradcheck(
        lambda v: rescale(activation, v, keep_result=True, in_place=True).sin(),
        (vector.requires_grad_(),),
    )


def test_functional_transforms():
    activation, vector = seeded(5, 4), seeded(4, seed=1)
    found = torch.func.grad(lambda v: rescale(activation.clone(), v, in_place=True).sum())(vector)
    torch.testing.assert_close(found, activation.sum(0))


def test_compiled_graph_leaves_its_input_alone():
    activation = seeded(3, 4, dtype=torch.float32)
    before = activation.clone()
    vector = torch.tensor([0.0, 1.0, -1.0, 2.0], requires_grad=True)
    compiled = torch.compile(
        lambda a, v: rescale(a, v, in_place=True), fullgraph=True, backend="aot_eager"
    )
    result = compiled(activation, vector)
    assert torch.equal(activation, before)
    result.sum().backward()
    torch.testing.assert_close(vector.grad, before.sum(0))


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("keeper", [torch.exp, torch.relu, torch.tanh])
def test_overwriting_what_another_operation_saved_raises(keeper, trained):
    """A caller who is wrong about freshness gets an error, never a wrong gradient."""
    kept = keeper(seeded(3, 4).requires_grad_())
    result = rescale(kept, seeded(4, seed=1).requires_grad_(trained), in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def test_output_changed_afterwards_raises():
    """The gradient comes from y′, so that a later write to it must not pass unnoticed."""
    result = rescale(seeded(3, 4), seeded(4, seed=1).requires_grad_(), in_place=True)
    with torch.no_grad():
        result.add_(1)
    with pytest.raises(IA3Error, match=r"use_plain_product\(\).*modified by an inplace operation"):
        result.sum().backward()


def test_a_second_backward_pass_is_said_to_be_one():
    result = rescale(seeded(3, 4), seeded(4, seed=1).requires_grad_(), in_place=True).sum()
    result.backward()
    with pytest.raises(RuntimeError, match=r"^Trying to backward through the graph"):
        result.backward()


@pytest.mark.parametrize("form", [{"keep_result": True}, {"in_place": True}], ids=str)
def test_keeping_the_result_saves_no_second_copy(form):
    """A linear layer reading y′ keeps it anyway: with the operation itself, one tensor in all."""
    reader = nn.Linear(16, 16, bias=False, dtype=torch.float64)

    def saved_bytes(**form):
        storages = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        activation = seeded(100, 16).requires_grad_()
        vector = torch.ones(16, dtype=torch.float64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = reader(rescale(activation.clone(), vector, **form)).sum()
        loss.backward()
        return sum(storages.values())

    activation_bytes = 100 * 16 * 8
    assert saved_bytes(**form) + activation_bytes <= saved_bytes() + 16 * 8


# -- a factor of each row --------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(
    ("activation", "factor"),
    [
        ((3, 4, 8), (3, 1, 8)),
        ((3, 2, 4, 8), (3, 1, 1, 8)),
        ((3, 4, 8), (3, 4, 8)),
        ((3, 8), (3, 8)),
        ((6, 8), (3, 1, 8)),
        ((6, 4, 8), (3, 1, 1, 8)),
    ],
    ids=str,
)
def test_gradient_of_a_factor_for_each_row(form, activation, factor):
    values = seeded(*activation).requires_grad_()
    factors = seeded(*factor, seed=1)
    for row in factors:
        row.view(-1)[:8] = torch.tensor(AWKWARD).roll(int(row.view(-1)[0] * 8))
    assert torch.autograd.gradcheck(
        lambda a, f: rescale(a.clone(), f, **form).sin(), (values, factors.requires_grad_())
    )


@pytest.mark.parametrize("form", [{}, {"in_place": True}], ids=str)
def test_rows_that_became_several_have_the_factor_of_theirs(form):
    activation, factors = seeded(6, 4, 8), seeded(3, 1, 1, 8, seed=1)
    expected = torch.stack([activation[i] * factors[i // 2, 0] for i in range(6)])
    assert torch.equal(rescale(activation, factors, **form), expected)


def test_a_factor_that_is_larger_than_the_activation_widens_it():
    activation = seeded(1, 4, 8).requires_grad_()
    factors = seeded(3, 1, 8, seed=1).requires_grad_()
    assert rescale(activation, factors, keep_result=True).shape == (3, 4, 8)
    assert torch.autograd.gradcheck(
        lambda a, f: rescale(a, f, keep_result=True).sin(), (activation, factors)
    )
