"""Float32 products by oneDNN: as exact as before, and the setting is nobody else's afterwards."""

import os
import threading

import pytest
import torch

from ia3.base.products import (
    TOLERANCE,
    error_of_products,
    fast_products,
    plain_attention,
    steady_attention,
)

SETTING = torch.backends.mkldnn.matmul


def product():
    """And its relative error."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(150, 576, generator=generator)
    right = torch.randn(576, 192, generator=generator)
    expected = left.double() @ right.double()
    found = left @ right
    return found, float((found - expected).norm() / expected.norm())


def test_products_are_of_float32_within():
    with fast_products():
        found, error = product()
    assert found.dtype == torch.float32
    assert error < 1e-6


def test_what_tells_exact_products_is_far_from_the_bound_in_float32_and_bfloat16():
    # Near it, a processor's way to sum would decide.
    assert error_of_products() < TOLERANCE / 10
    rounded = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    assert (rounded.bfloat16() - rounded).abs().max() / rounded.abs().max() > 10 * TOLERANCE


def test_gradients_too():
    left = torch.randn(64, 96, requires_grad=True)
    right = torch.randn(96, 80)
    with fast_products():
        (left @ right).sum().backward()
    expected = right.double().sum(1).expand(64, 96)
    assert (left.grad - expected).norm() / expected.norm() < 1e-6


def test_the_setting_is_as_it_was_also_after_an_error_and_inside_another():
    before = product()[0]
    with pytest.raises(KeyError), fast_products(), fast_products():
        raise KeyError
    assert SETTING.fp32_precision == "none"
    assert torch.equal(product()[0], before)


@pytest.mark.parametrize("own", ["ieee", "tf32", "bf16"])
def test_what_was_set_stays(own):
    SETTING.fp32_precision = own
    try:
        with fast_products():
            assert SETTING.fp32_precision == own
        assert SETTING.fp32_precision == own
    finally:
        SETTING.fp32_precision = "none"


@pytest.mark.parametrize("own", ["ieee", "tf32"])
def test_what_is_set_within_stays_afterwards(own):
    try:
        with fast_products(), fast_products():
            SETTING.fp32_precision = own
        assert SETTING.fp32_precision == own
    finally:
        SETTING.fp32_precision = "none"


def test_a_thread_that_leaves_changes_nothing_for_one_that_stays():
    inside, leave = threading.Event(), threading.Event()

    def other():
        with fast_products():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    with fast_products():
        first = product()[0]
        leave.set()
        thread.join()
        assert torch.equal(product()[0], first)
    assert SETTING.fp32_precision == "none"


def test_attention_is_plain_and_then_fused_again():
    query, key, value = torch.randn(3, 2, 4, 7, 8, dtype=torch.float64)
    attention = torch.nn.functional.scaled_dot_product_attention
    fused = torch.backends.cuda.flash_sdp_enabled
    expected = (query @ key.transpose(-1, -2) / 8**0.5).softmax(-1) @ value
    with plain_attention():
        with pytest.raises(KeyError), plain_attention():
            raise KeyError
        assert not fused()
        torch.testing.assert_close(attention(query, key, value), expected)
    assert fused()


def test_steady_attention_waits_for_who_holds_it_and_lets_nobody_change_it():
    fused = torch.backends.cuda.flash_sdp_enabled
    entered, leave, begun = (threading.Event() for _ in range(3))
    seen = []

    def hold():
        with plain_attention():
            entered.set()
            leave.wait(60)

    def be_steady():
        begun.set()
        with steady_attention():
            seen.append(fused())
            with plain_attention():
                seen.append(fused())

    threads = [threading.Thread(target=hold), threading.Thread(target=be_steady)]
    threads[0].start()
    assert entered.wait(60)
    threads[1].start()
    assert begun.wait(60)
    assert not fused()
    assert not seen
    leave.set()
    for thread in threads:
        thread.join(60)
    assert seen == [True, True]
    # Within one's own there is nobody to wait for.
    with plain_attention(), steady_attention():
        assert not fused()
    assert fused()
    with plain_attention():
        assert not fused()


def test_who_has_switched_fused_attention_off_has_it_off():
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        with plain_attention():
            pass
        assert not torch.backends.cuda.flash_sdp_enabled()
    finally:
        torch.backends.cuda.enable_flash_sdp(True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_has_the_setting_of_its_own_thread_alone():
    entered, leave = threading.Event(), threading.Event()

    def other():
        with fast_products():
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait(30)
    child = os.fork()
    if child == 0:
        found = SETTING.fp32_precision == "none"
        with fast_products():
            pass
        os._exit(0 if found and SETTING.fp32_precision == "none" else 1)
    leave.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
