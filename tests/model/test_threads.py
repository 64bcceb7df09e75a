"""One thread changes the adapters while others call the model, or change them too."""

import contextvars
import copy
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support import pairs
from support.architectures import build
from support.snapshots import hooks_on
from support.tfew import tiny_llama
from support.two_adapters import NARROW, WIDE, output, wide_and_narrow
from torch import nn
from torch.nn import functional

from ia3 import AdapterBank, IA3Config, IA3Error, IA3Model, load_base_model
from ia3.compat import peft_tuner
from ia3.core.route import LOCK
from ia3.core.sites import Site
from ia3.report import plotting


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
    seen = []

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


@pytest.mark.usefixtures("hasty")
def test_adapters_that_come_and_go_are_saved_whole_or_not_at_all(tmp_path):
    model = wide_and_narrow()

    def come_and_go():
        model.add_adapter("third", WIDE)
        model.delete_adapter("third")

    def save():
        model.save_pretrained(tmp_path)
        for folder in filter(Path.is_dir, tmp_path.iterdir()):
            IA3Model.from_pretrained(tiny_llama(), folder)

    meanwhile(save, 60, come_and_go)


def elsewhere(action):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(action).result()


def in_the_middle(model, action):
    """Do something once, when the next call has gone through one layer."""
    layer = next(m for name, m in model.named_modules() if name.endswith("layers.1"))

    def once(*_):
        handle.remove()
        action()

    handle = layer.register_forward_pre_hook(once)


def narrow_is_a_copy():
    """The second adapter has a copy of a module, which the first one rescales beside others."""
    model = IA3Model(tiny_llama(), NARROW, "wide").eval()
    model.add_adapter("narrow", IA3Config(**vars(NARROW) | {"modules_to_save": ["lm_head"]}))
    for name in ("wide", "narrow"):
        for vector in model.vectors(name).values():
            vector.data.uniform_(0.2, 2, generator=torch.Generator().manual_seed(len(name)))
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__ == "SavedModule":
                module["narrow"].weight.mul_(2)
    return model


def experts():
    """Both adapters rescale within experts, and one the keys besides."""
    both = {"target_modules": ["k_proj", "experts"], "feedforward_modules": ["experts"]}
    model = IA3Model(build("mixtral"), IA3Config(**both), "wide").eval()
    model.add_adapter("narrow", NARROW)
    for seed, name in enumerate(("wide", "narrow")):
        pairs.randomize(model.vectors(name), seed)
    return model


CHANGES = {
    "another": lambda model: model.set_adapter("narrow"),
    "both": lambda model: model.set_adapter(["wide", "narrow"]),
    "none": lambda model: model.disable_adapter_layers(),
    "another of less": lambda model: model.delete_adapter("unused"),
    "a new one": lambda model: (model.add_adapter("new", WIDE), model.set_adapter("new")),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("first", ["wide", "narrow"])
@pytest.mark.parametrize("entry", ["model", "base", "fused"])
def test_a_call_sees_the_adapters_from_before_a_change(entry, first, change):
    model = wide_and_narrow()
    model.add_adapter("unused", NARROW)
    model.set_adapter(first)
    if entry == "fused":
        model.fuse_mlp()
    called = model.get_base_model() if entry == "base" else model
    before = output(called)
    in_the_middle(model, lambda: elsewhere(lambda: CHANGES[change](model)))
    assert torch.equal(output(called), before)
    after = output(called)
    again = wide_and_narrow()
    again.add_adapter("unused", NARROW)
    again.set_adapter(first)
    CHANGES[change](again)
    if entry == "fused":
        again.fuse_mlp()
    assert torch.equal(after, output(again))
    hooks = [sum(map(hooks_on, each.modules())) for each in (model, again)]
    assert hooks[0] == hooks[1], "what the call needed is gone"


@pytest.mark.parametrize("make", [narrow_is_a_copy, experts])
@pytest.mark.parametrize("names", [("wide", "narrow"), ("narrow", "wide")])
def test_whatever_an_adapter_has_a_call_sees_it_whole(make, names):
    model = make()
    expected = []
    for name in names:
        model.set_adapter(name)
        expected.append(output(model))
    assert not torch.equal(*expected)
    model.set_adapter(names[0])
    in_the_middle(model, lambda: elsewhere(lambda: model.set_adapter(names[1])))
    assert torch.equal(output(model), expected[0])
    assert torch.equal(output(model), expected[1])


@pytest.mark.usefixtures("hasty")
def test_calls_while_adapters_are_switched_all_the_time():
    model = wide_and_narrow()
    allowed = []
    for name in ("wide", "narrow"):
        model.set_adapter(name)
        allowed.append(output(model))

    def switch():
        model.set_adapter("wide")
        model.set_adapter("narrow")

    found = []
    meanwhile(lambda: found.append(output(model)), 100, switch)
    assert all(any(torch.equal(each, whole) for whole in allowed) for each in found)


def test_all_that_is_generated_is_of_one_adapter():
    model = wide_and_narrow()
    ids, options = torch.arange(5)[None], {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, **options, min_new_tokens=8)
    model.set_adapter("narrow")
    assert not torch.equal(model.generate(ids, **options, min_new_tokens=8), expected)
    model.set_adapter("wide")
    in_the_middle(model, lambda: elsewhere(lambda: model.set_adapter("narrow")))
    assert torch.equal(model.generate(ids, **options, min_new_tokens=8), expected)
    assert model.active_adapters == ["narrow"]


def test_what_a_call_changes_itself_holds_for_the_rest_of_it():
    """As where a step of a generation compares with the base model's."""
    model = wide_and_narrow()
    with model.disable_adapter():
        expected = output(model)
    seen = []

    def compare(ids, scores):
        with model.disable_adapter():
            seen.append(output(model))
        return scores

    ids = torch.arange(5)[None]
    plain = model.generate(ids, max_new_tokens=3, do_sample=False)
    found = model.generate(ids, max_new_tokens=3, do_sample=False, logits_processor=[compare])
    assert all(torch.equal(each, expected) for each in seen)
    assert torch.equal(found, plain)


def test_a_call_that_fails_is_over():
    model = wide_and_narrow()

    def fail():
        raise KeyboardInterrupt

    in_the_middle(model, fail)
    with pytest.raises(KeyboardInterrupt):
        output(model)
    model.set_adapter("narrow")
    again = wide_and_narrow()
    again.set_adapter("narrow")
    assert torch.equal(output(model), output(again))


def test_a_task_that_was_started_in_a_call_is_not_a_part_of_it():
    model, kept = wide_and_narrow(), []
    in_the_middle(model, lambda: kept.append(contextvars.copy_context()))
    output(model)
    model.set_adapter("narrow")
    assert torch.equal(kept[0].run(output, model), output(model))


@pytest.mark.parametrize("copied", ["the model", "a copy of a copy"])
def test_a_copy_has_one_state(copied):
    model = wide_and_narrow()
    if copied == "a copy of a copy":
        model = copy.deepcopy(model)
    other = threading.Thread(target=model.set_adapter, args=("narrow",))

    class Late(nn.Module):
        def __deepcopy__(self, memo):
            if other.ident is None:
                other.start()
                other.join(0.3)
            return Late()

    model.get_base_model().model.layers[0].late = Late()
    expected = output(model)
    twin = copy.deepcopy(model)
    other.join()
    assert torch.equal(output(twin), expected)
    assert (twin.active_adapters, model.active_adapters) == (["wide"], ["narrow"])
    in_the_middle(twin, lambda: elsewhere(lambda: twin.set_adapter("narrow")))
    assert torch.equal(output(twin), expected)
    assert torch.equal(output(twin), output(model))


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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("which", ["adapters", "a bank", "a base model", "pictures", "peft"])
def test_a_process_that_is_forked_off_does_not_wait_for_threads_that_it_has_not(which):
    model = wide_and_narrow()
    if which == "a bank":
        bank = AdapterBank(model)
    if which == "a base model":
        base = load_base_model(tiny_llama(), tokenizer=object())
    lock = {
        "adapters": lambda: LOCK,
        "a bank": lambda: bank._lock,
        "a base model": lambda: base.lock,
        "pictures": lambda: plotting._LOCK,
        "peft": lambda: peft_tuner.ATTACHING,
    }[which]
    held, done = threading.Event(), threading.Event()

    def hold():
        with lock():
            held.set()
            done.wait(0.5)

    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    child = os.fork()
    if child == 0:
        # Nothing of the tests may run on here.
        os._exit(0 if lock().acquire(timeout=2) else 1)
    done.set()
    other.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert lock().acquire(timeout=2)
    lock().release()
