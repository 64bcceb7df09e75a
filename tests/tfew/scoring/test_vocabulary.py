"""Log-probabilities of chosen tokens, against log_softmax over all logits."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from ia3.errors import IA3Error
from ia3.tfew.scoring.vocabulary import POSITIONS, is_plain, token_log_probs


def made(positions, scores, dtype, *, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(8, 50, bias=bias).to(dtype).requires_grad_(False)
    head.weight.copy_(torch.randn(50, 8, generator=generator))
    if bias:
        head.bias.copy_(torch.randn(50, generator=generator))
    hidden = torch.randn(positions, 8, generator=generator).to(dtype)
    prediction = torch.randint(positions, (scores,), generator=generator)
    token = torch.randint(50, (scores,), generator=generator)
    return head, hidden, prediction, token


def by_log_softmax(head, hidden, prediction, token):
    return head(hidden).log_softmax(-1)[prediction, token]


@settings(max_examples=40, deadline=None)
@given(
    positions=st.integers(1, 2 * POSITIONS + 3),
    scores=st.integers(0, 200),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_values_and_gradients(positions, scores, bias, seed):
    """Also with several tokens of one position, and positions of none."""
    head, hidden, prediction, token = made(positions, scores, torch.float64, bias=bias, seed=seed)
    weights = torch.randn(scores, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for function in (token_log_probs, by_log_softmax):
        given = hidden.clone().requires_grad_()
        values = function(head, given, prediction, token)
        (gradient,) = torch.autograd.grad((values * weights).sum(), given)
        found.append((values.detach(), gradient))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_types_are_as_exact_as_log_softmax(dtype):
    head, hidden, prediction, token = made(300, 500, dtype)
    given = hidden.clone().requires_grad_()
    values = token_log_probs(head, given, prediction, token)
    assert values.dtype == torch.float32
    values.sum().backward()
    assert given.grad.dtype == dtype
    wide = hidden.double().requires_grad_()
    expected = by_log_softmax(head.double(), wide, prediction, token)
    expected.sum().backward()
    eps = torch.finfo(dtype).eps
    assert (values.double() - expected).norm() <= 2 * eps * expected.norm()
    assert (given.grad.double() - wide.grad).norm() <= 4 * eps * wide.grad.norm()


def test_what_is_more_than_a_linear_layer_is_not_plain():
    head = nn.Linear(4, 6)
    assert not is_plain(head)  # it trains
    head.requires_grad_(False)
    assert is_plain(head)
    handle = head.register_forward_hook(lambda module, args, output: None)
    assert not is_plain(head)
    handle.remove()
    assert is_plain(head)
    assert not is_plain(nn.Linear(4, 6, device="meta").requires_grad_(False))

    class Scaled(nn.Linear):
        pass

    assert not is_plain(Scaled(4, 6).requires_grad_(False))


def test_second_derivatives_are_refused():
    """They would need what is not kept; a wrong value would not be noticed."""
    head, hidden, prediction, token = made(3, 4, torch.float64)
    values = token_log_probs(head, hidden.requires_grad_(), prediction, token)
    with pytest.raises(IA3Error, match="no second derivatives"):
        torch.autograd.grad(values.square().sum(), hidden, create_graph=True)
