"""One thread changes the adapters while others call the model, or change them too."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.tfew import tiny_llama
from support.two_adapters import NARROW, WIDE, output, wide_and_narrow
from torch import nn
from torch.nn import functional

from ia3 import IA3Error, IA3Model
from ia3.core.route import LOCK
from ia3.core.sites import Site


@pytest.fixture
def hasty():
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def meanwhile(action, times, beside):
    """Do one thing so many times while another thread does another all the time."""
    done = threading.Event()

    def again():
        while not done.is_set():
            beside()

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(again)
        try:
            for _ in range(times):
                action()
        finally:
            done.set()
        other.result()


def test_a_call_while_an_adapter_is_added():
    """Whether an up projection can carry a vector is tried out, which no call may see."""
    base = tiny_llama()
    model = IA3Model(base, NARROW).eval()
    seen: list[torch.Tensor] = []

    class Activation(nn.Module):
        called = False

        def forward(self, gate):
            if trying and not Activation.called:
                Activation.called = True
                with ThreadPoolExecutor(1) as pool:
                    seen.append(pool.submit(output, model).result())
            return functional.silu(gate)

    trying = False
    for layer in base.model.layers:
        layer.mlp.act_fn = Activation()
    expected = output(model)
    trying = True
    model.add_adapter("wide", WIDE)
    (found,) = seen
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("hasty")
def test_adapters_that_come_and_go_are_found_whole():
    model = wide_and_narrow()
    count = len(model.vectors("wide"))

    def come_and_go():
        model.add_adapter("third", WIDE)
        assert len(model.vectors("third")) == count
        model.delete_adapter("third")

    # Where nobody else has vectors.
    model.set_adapter("narrow")
    model.delete_adapter("wide")
    meanwhile(come_and_go, 200, lambda: (model.set_adapter("narrow"), model.vectors("narrow")))
    assert not [name for name, _ in model.unload().named_parameters() if ".ia3_l." in name]


@pytest.mark.filterwarnings("ignore:adapter 'wide' was active")
def test_a_call_while_the_active_adapter_is_deleted(monkeypatch):
    model = wide_and_narrow()
    model.set_adapter("narrow")
    expected = output(model)
    model.set_adapter("wide")
    remove, seen = Site.remove, []

    def then_call(site, adapter):
        remove(site, adapter)
        with ThreadPoolExecutor(1) as pool:
            seen.append(pool.submit(output, model).result())

    monkeypatch.setattr(Site, "remove", then_call)
    model.delete_adapter("wide")
    assert len(seen) > 1
    assert all(torch.equal(found, expected) for found in seen)


@pytest.mark.parametrize("fuses_meanwhile", [True, False])
def test_a_switch_while_another_thread_fuses(monkeypatch, fuses_meanwhile):
    """Or takes that back; each waits until the other is done."""
    model = wide_and_narrow()
    model.set_adapter("narrow")
    change, target, names = model.fuse_mlp, model.set_adapter, ("wide",)
    if not fuses_meanwhile:
        model.fuse_mlp()
        change, target, names = lambda: model.set_adapter("wide"), model.unfuse_mlp, ()
    other = threading.Thread(target=target, args=names)
    activate = Site.activate

    def late(site, *given, **options):
        activate(site, *given, **options)
        if other.ident is None:
            other.start()
            other.join(0.5)

    monkeypatch.setattr(Site, "activate", late)
    change()
    other.join()
    found = output(model)
    model.unfuse_mlp()
    assert model.active_adapters == ["wide"]
    torch.testing.assert_close(found, output(wide_and_narrow()))


def test_a_switch_to_an_adapter_that_is_deleted_meanwhile():
    model = wide_and_narrow()
    with ThreadPoolExecutor(1) as pool:
        with LOCK:
            switch = pool.submit(model.set_adapter, "narrow")
            threading.Event().wait(0.2)
            model.delete_adapter("narrow")
        with pytest.raises(IA3Error, match="no adapter 'narrow'"):
            switch.result()
    assert model.active_adapters == ["wide"]
