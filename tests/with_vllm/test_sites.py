"""The product of a site where steps are compiled: a graph that is made once, for all batches."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="make test-vllm runs this in an environment with vLLM")

import torch
from torch import nn

from ia3.vllm.sites import Rows, Site

pytestmark = pytest.mark.vllm

SLOTS, TOKENS, WIDE = 3, 32, 6


class Pair(nn.Module):
    """A layer that gives a pair, as vLLM's do, between two sites."""

    def __init__(self, before=None, after=None) -> None:
        super().__init__()
        self.inner = nn.Linear(4, WIDE)
        self.before, self.after = before, after

    def forward(self, x):
        output = self.inner(self.before.multiplied(x) if self.before else x)
        if self.after:
            self.after.multiply_(output)
        return output, None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_graph_follows_the_rows_and_the_slots(dtype):
    torch._dynamo.reset()
    torch.manual_seed(0)
    rows = Rows(SLOTS, TOKENS, torch.device("cpu"), eager=False)
    before, after = Site(4, rows), Site(WIDE, rows)
    layer = Pair(before, after).to(dtype).requires_grad_(False)
    plain = layer.inner
    # As vLLM does, which makes a graph once and checks nothing of what it was made with.
    unguarded = {"guard_filter_fn": lambda guards: [False for _ in guards]}
    compiled = torch.compile(lambda x: layer(x)[0], fullgraph=True, dynamic=True, options=unguarded)
    inner, outer = torch.rand(SLOTS + 1, 4), torch.rand(SLOTS + 1, WIDE)
    inner[SLOTS] = outer[SLOTS] = 1
    for count in (5, 9):  # tokens
        x = torch.randn(count, 4).to(dtype)
        torch.testing.assert_close(compiled(x), plain(x), atol=0.02, rtol=0.02)
        chosen = [n % (SLOTS + 1) for n in range(count)]
        for slot in range(SLOTS):
            before.set(slot, inner[slot])
            after.set(slot, outer[slot])
        rows.set(chosen)
        multiplied = (plain((x * inner[chosen]).to(dtype)) * outer[chosen]).to(dtype)
        # A compiled graph rounds less often.
        near = {} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.02}
        torch.testing.assert_close(compiled(x), multiplied, **near)
        for slot in range(SLOTS):
            before.set(slot, None)
            after.set(slot, None)


@pytest.mark.parametrize("eager", [True, False])
def test_rows_of_the_base_keep_their_bits(eager):
    rows = Rows(SLOTS, TOKENS, torch.device("cpu"), eager)
    site = Site(WIDE, rows)
    layer = Pair(after=site).requires_grad_(False)
    x = torch.randn(4, 4)
    expected = layer.inner(x)
    site.set(0, torch.rand(WIDE))
    rows.set([SLOTS, 0, SLOTS, 1])
    found = layer(x)[0]
    assert torch.equal(found[[0, 2, 3]], expected[[0, 2, 3]])
    assert not torch.equal(found[1], expected[1])


def test_an_input_that_others_hold_is_not_written_over():
    rows = Rows(SLOTS, TOKENS, torch.device("cpu"), eager=True)
    site = Site(4, rows)
    layer = Pair(before=site).requires_grad_(False)
    site.set(1, torch.rand(4))
    rows.set([1, 1])
    x = torch.randn(2, 4)
    held = x.clone()
    layer(x)
    assert torch.equal(x, held)


@pytest.mark.parametrize("eager", [True, False])
def test_what_is_put_in_a_slot_counts_at_the_next_step_of_the_same_rows(eager):
    rows = Rows(SLOTS, TOKENS, torch.device("cpu"), eager)
    site = Site(WIDE, rows)
    vectors = torch.rand(2, WIDE)
    site.set(1, vectors[0])
    rows.set([1, SLOTS])
    for _ in range(2):
        assert torch.equal(site.multiplied(torch.ones(2, WIDE))[0], vectors[0])
    # Fewer tokens of the same batch.
    assert torch.equal(site.multiplied(torch.ones(1, WIDE))[0], vectors[0])
    site.set(1, vectors[1])
    assert torch.equal(site.multiplied(torch.ones(2, WIDE))[0], vectors[1])
    rows.set([SLOTS, 1])
    assert torch.equal(site.multiplied(torch.ones(2, WIDE))[1], vectors[1])
    site.reset()
    assert torch.equal(site.multiplied(torch.ones(2, WIDE))[1], torch.ones(WIDE))
