"""What a change of the adapters is to calls of other threads, to Ctrl-C and to a forked process."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import pytest
import torch
from support.snapshots import hooks_on
from support.tfew import tiny_llama
from support.two_adapters import NARROW, WIDE, output, wide_and_narrow

from ia3 import AdapterBank, IA3Config, IA3Error, IA3Model
from ia3.adapter.files import Adapter
from ia3.core import reached
from ia3.core.hooks import OutputHook
from ia3.core.route import changing
from ia3.core.sites import Site
from ia3.errors import StateError


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


def other_values(model, name):
    """The adapter as it is, but for its values."""
    adapter = model.adapter(name)
    vectors = {module: 3 - vector.detach() for module, vector in adapter.vectors.items()}
    return Adapter(adapter.config, vectors)


# -- calls go on with what they began with ---------------------------------------------------------


@pytest.mark.filterwarnings("ignore:adapter 'wide' was active")
@pytest.mark.parametrize("called", ["forward", "generate"])
def test_a_call_goes_on_with_an_adapter_that_is_deleted(called):
    model, ids = wide_and_narrow(), torch.arange(5)[None]

    def call():
        if called == "forward":
            return output(model)
        return model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)

    expected = call()
    in_the_middle(model, lambda: elsewhere(lambda: model.delete_adapter("wide")))
    assert torch.equal(call(), expected)
    assert model.active_adapters == ["narrow"]
    again = wide_and_narrow()
    again.set_adapter("narrow")
    assert torch.equal(output(model), output(again))


@pytest.mark.parametrize("trains", [True, False])
def test_a_call_goes_on_with_the_values_that_are_written_over(trains):
    model = wide_and_narrow()
    model.set_requires_grad("wide", trains)
    expected, new = output(model), other_values(model, "wide")
    held = dict(model.vectors("wide"))
    in_the_middle(model, lambda: elsewhere(lambda: model._adapters.load_into("wide", new)))
    assert torch.equal(output(model), expected)
    assert all(model.vectors("wide")[name] is vector for name, vector in held.items())
    after = output(model)
    assert not torch.equal(after, expected)
    again = wide_and_narrow()
    again._adapters.load_into("wide", new)
    assert torch.equal(after, output(again))


def test_a_routed_call_goes_on_with_the_values_that_are_written_over():
    """Also where vectors require gradients, whose values are looked up at each site."""
    model = wide_and_narrow()
    names = {"adapter_names": ["wide"]}
    expected, new = output(model, **names), other_values(model, "wide")
    in_the_middle(model, lambda: elsewhere(lambda: model._adapters.load_into("wide", new)))
    assert torch.equal(output(model, **names), expected)
    assert not torch.equal(output(model, **names), expected)


def test_a_call_goes_on_with_a_copy_of_a_module_that_is_deleted_or_written_over():
    config = IA3Config(**vars(NARROW) | {"modules_to_save": ["lm_head"]})
    for change in ("delete", "load"):
        model = IA3Model(tiny_llama(), NARROW, "plain").eval()
        model.add_adapter("copied", config)
        model.set_adapter("copied")
        new = model.adapter("copied")
        new.copies = {name: value * 3 for name, value in new.copies.items()}
        expected = output(model)
        changes = {
            "delete": lambda model=model: model.delete_adapter("copied"),
            "load": lambda model=model, new=new: model._adapters.load_into("copied", new),
        }
        in_the_middle(model, lambda act=changes[change]: elsewhere(act))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ia3.model.adapters.warn_caller", lambda *_: None)
            assert torch.equal(output(model), expected)


def test_a_step_of_training_is_told_that_its_vectors_were_written_over():
    model = wide_and_narrow()
    new = other_values(model, "wide")
    in_the_middle(model, lambda: elsewhere(lambda: model._adapters.load_into("wide", new)))
    with pytest.raises(StateError, match="in the middle of a call that trains it"):
        model(torch.arange(5)[None])


@pytest.mark.filterwarnings("error:adapter 'wide' was active")
def test_an_adapter_whose_deletion_failed_is_kept_by_no_call():
    model = wide_and_narrow()
    with pytest.raises(UserWarning, match="'narrow' is active now"):
        model.delete_adapter("wide")
    assert not model._adapters.calls.now.kept
    assert not model._adapters.calls.disturbed


def test_other_values_may_be_loaded_in_inference_mode():
    model = wide_and_narrow()
    model.set_requires_grad("wide", False)
    new, expected = other_values(model, "wide"), output(model)
    model.get_input_embeddings().requires_grad_(True)

    def load():
        with torch.inference_mode():
            model._adapters.load_into("wide", new)

    in_the_middle(model, lambda: elsewhere(load))
    # It saves what it multiplies by for a backward pass.
    assert torch.equal(model(torch.arange(5)[None]).logits, expected)


def test_values_on_a_gpu_get_memory_of_their_own_too(monkeypatch):
    model = wide_and_narrow()
    site = next(module for module in model.modules() if isinstance(module, Site))
    # As torch has it of any tensor that is there.
    monkeypatch.setattr(torch.Tensor, "is_shared", lambda _: True)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False, raising=False)
    memory = site.vector("wide").detach()
    before = memory.clone()
    site.write("wide", before + 1, in_place=False)
    assert torch.equal(memory, before)
    assert torch.equal(site.vector("wide"), before + 1)


def begin_a_call(model):
    """Open a call as another task would; returns what ends it."""
    context, call = copy_context(), model._adapters.calls.opened(model.model)
    context.run(call.__enter__)
    return lambda: context.run(call.__exit__, None, None, None)


def test_hooks_go_with_the_calls_that_need_them_though_others_have_begun():
    model = IA3Model(tiny_llama(), NARROW, "one")

    def hooks():
        registered = [hook for m in model.modules() for hook in m._forward_hooks.values()]
        return sum(isinstance(hook, OutputHook) for hook in registered)

    before, end = hooks(), begin_a_call(model)
    for _ in range(3):
        model.delete_adapter("one")
        model.add_adapter("one", NARROW)
        model.set_adapter("one")
        assert hooks() == 2 * before
        next_end = begin_a_call(model)
        end()
        end = next_end
        assert hooks() == before
    end()
    assert not model._adapters.calls.disturbed


CHANGES = {
    "merge_adapter": lambda model: model.merge_adapter("wide"),
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "fuse_mlp": lambda model: model.fuse_mlp(),
    "use_plain_product": lambda model: model.use_plain_product(),
    "unload": lambda model: model.unload(),
}
BACK = {
    "unmerge_adapter": (CHANGES["merge_adapter"], lambda model: model.unmerge_adapter()),
    "set_adapter": (CHANGES["merge_adapter"], lambda model: model.set_adapter("narrow")),
    "disable": (CHANGES["merge_adapter"], lambda model: model.disable_adapter_layers()),
    "unfuse_mlp": (CHANGES["fuse_mlp"], lambda model: model.unfuse_mlp()),
}


@pytest.mark.filterwarnings("ignore:adapters are merged")
@pytest.mark.parametrize("change", [*CHANGES, *BACK])
def test_what_no_call_could_go_on_with_is_refused_while_one_is_running(change):
    model = wide_and_narrow()
    before, act = BACK.get(change, (lambda model: None, CHANGES.get(change)))
    before(model)
    expected = output(model)

    def refused():
        with pytest.raises(StateError, match="another thread or task is calling this model"):
            act(model)

    in_the_middle(model, lambda: elsewhere(refused))
    assert torch.equal(output(model), expected)
    assert torch.equal(output(model), expected)
    act(model)


def test_a_call_that_begins_while_adapters_are_merged_waits_for_them(monkeypatch):
    model = wide_and_narrow()
    expected = output(model)
    write, called = model._adapters.merge._write, []
    other = threading.Thread(target=lambda: called.append(output(model)))

    def begin_a_call(values):
        if values and other.ident is None:
            other.start()
            other.join(0.3)
            assert not called
        write(values)

    monkeypatch.setattr(model._adapters.merge, "_write", begin_a_call)
    model.merge_adapter("wide")
    other.join()
    torch.testing.assert_close(called[0], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(called[0], output(model)), "it was computed with merged weights"


def test_adapters_are_enabled_again_when_the_last_thread_has_left_disable_adapter():
    model = wide_and_narrow()
    inside, leave = threading.Event(), threading.Event()
    second = threading.Event()

    def first():
        with model.disable_adapter():
            inside.set()
            assert second.wait(5)

    with ThreadPoolExecutor(1) as pool:
        entered = pool.submit(first)
        assert inside.wait(5)
        with model.disable_adapter():
            second.set()
            entered.result()
            leave.set()
            assert not model.has_active_enabled_adapter
    assert model.has_active_enabled_adapter


def test_a_name_is_never_both_on_the_model_and_in_its_bank(monkeypatch):
    model = wide_and_narrow()
    bank, adapter = AdapterBank(model), model.adapter("narrow")
    read = AdapterBank._read

    def meanwhile(self, *args):
        found = read(self, *args)
        model.add_adapter("new", NARROW)
        return found

    monkeypatch.setattr(AdapterBank, "_read", meanwhile)
    with pytest.raises(IA3Error, match="adapter 'new' exists already"):
        bank.add("new", adapter)
    assert "new" not in bank
    assert len(bank._free) == bank.capacity


def test_two_calls_that_both_take_a_hook_off(monkeypatch):
    """The first calls of a new adapter look whether its modules are reached, and take that off."""
    model = wide_and_narrow()
    (hook, *_) = [
        hook
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, reached._Called)
    ]
    remove = hook.remove

    def late():
        remove()
        remove()  # as where another thread was as far, and had found the hook there

    class Dict(dict):
        def __contains__(self, key):
            return True

    handle = remove.__self__
    hooks = Dict({handle.id: hook})
    handle.hooks_dict_ref = lambda: hooks
    handle.extra_dict_ref = ()
    hook.remove = late
    output(model)


# -- a signal --------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(monkeypatch):
    """Ctrl-C at the second site that a method is called of."""

    def at(method):
        own, count = getattr(Site, method), []

        def interrupt(self, *args, **kwargs):
            count.append(1)
            if len(count) == 2:
                signal.raise_signal(signal.SIGINT)
            return own(self, *args, **kwargs)

        monkeypatch.setattr(Site, method, interrupt)

    return at


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("remove", lambda model: model.delete_adapter("narrow")),
        ("activate", lambda model: model.set_adapter("narrow")),
        ("write", lambda model: model._adapters.load_into("wide", other_values(model, "wide"))),
        ("add", lambda model: model.add_adapter("new", WIDE)),
    ],
)
def test_an_interrupt_comes_after_a_change(interrupted, method, change):
    expected = wide_and_narrow()
    change(expected)
    model = wide_and_narrow()
    interrupted(method)
    with pytest.raises(KeyboardInterrupt):
        change(model)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert torch.equal(output(model), output(expected))
    assert [*model.peft_config] == [*expected.peft_config]
    assert hooks_of(model) == hooks_of(expected)


def hooks_of(model):
    return sum(map(hooks_on, model.modules()))


def test_an_interrupt_while_a_first_adapter_is_put_on_leaves_a_base_model_that_takes_one(
    interrupted,
):
    base = tiny_llama()
    interrupted("activate")
    with pytest.raises(KeyboardInterrupt):
        IA3Model(base, WIDE)
    # Nobody has the model that was made.
    assert all(p.requires_grad for p in base.parameters())
    IA3Model(base, WIDE)


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("activate", lambda model: model.set_adapter("narrow")),
        ("activate", lambda model: model(torch.arange(5)[None], adapter_names=["wide"])),
        ("add", lambda model: model.add_adapter("new", WIDE)),
    ],
)
def test_a_handler_may_wait_for_a_thread_that_changes_adapters(interrupted, method, change):
    model, done = wide_and_narrow(), []

    def stop(*_):
        other = threading.Thread(target=lambda: model.set_requires_grad("wide"))
        other.start()
        other.join(5)
        done.append(not other.is_alive())

    before = signal.signal(signal.SIGINT, stop)
    interrupted(method)
    try:
        change(model)
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == [True]


def test_a_route_is_left_while_another_thread_changes_adapters():
    model, left = wide_and_narrow(), threading.Event()

    def call():
        with model.route(["wide"]):
            in_it.set()
            holds.wait(10)
        left.set()

    in_it, holds = threading.Event(), threading.Event()
    other = threading.Thread(target=call)
    other.start()
    assert in_it.wait(10)
    with changing():
        holds.set()
        assert left.wait(10)
    other.join()
    model.delete_adapter("narrow")


def test_where_python_is_embedded_no_thread_may_put_a_signal_off(monkeypatch):
    def refused(*_):
        raise ValueError("signal only works in main thread of the main interpreter")

    monkeypatch.setattr(signal, "signal", refused)
    model = wide_and_narrow()
    model.delete_adapter("narrow")
    assert [*model.peft_config] == ["wide"]


@pytest.mark.parametrize("at", ["entered", "in it"])
def test_an_interrupt_of_a_route_leaves_none_on(at, monkeypatch):
    model = wide_and_narrow()
    if at == "entered":
        opened = model._adapters.route_opened

        def interrupt(*args):
            opened(*args)
            raise KeyboardInterrupt

        monkeypatch.setattr(model._adapters, "route_opened", interrupt)

    def fail():
        raise KeyboardInterrupt

    in_the_middle(model, fail)
    with pytest.raises(KeyboardInterrupt):
        output(model, adapter_names=["narrow"])
    model.delete_adapter("narrow")


# -- a forked process ------------------------------------------------------------------------------


def in_a_fork(action):
    """Whether it goes without an error in a process that is forked off now."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(20)
            action()
            code = 0
        finally:
            # Nothing of the tests may run on here.
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("called", ["active", "routed"])
def test_a_process_that_is_forked_off_while_a_thread_calls_the_model(called):
    """There no call and no route of that thread is on."""
    model = wide_and_narrow()
    given = {"adapter_names": ["narrow"]} if called == "routed" else {}
    inside, done = threading.Event(), threading.Event()
    in_the_middle(model, lambda: (inside.set(), done.wait(20)))

    def in_the_child():
        model.merge_adapter("wide")
        model.unmerge_adapter()
        output(model, adapter_names=["narrow"])
        model.delete_adapter("narrow")
        model.unload()

    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(output, model, **given)
        assert inside.wait(5)
        try:
            assert in_a_fork(in_the_child)
        finally:
            done.set()
        call.result()
