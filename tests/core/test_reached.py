"""Modules that are never called, because the model passes their weights to a function."""

import copy
import pickle
import threading
import warnings
from contextlib import suppress

import pytest
import torch
import transformers as hf
from support.pairs import adapted, randomize, relative
from support.snapshots import assert_unchanged, hooks_on, snapshot
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import ia3
from ia3 import IA3Config, IA3Error, IA3Model
from ia3.core.reached import NEVER_CALLED

VALUES = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(3, 8)
WARNING = "never called, the model passes their weights to a function"

BLOCK = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SOUND = {"conv_dim": (8, 8), "conv_kernel": (3, 3), "conv_stride": (2, 2)}
SOUND |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
IDS = torch.arange(1, 13).reshape(2, 6)


def wavlm():
    config = hf.WavLMConfig(vocab_size=32, intermediate_size=24, **BLOCK, **SOUND)
    return hf.WavLMModel(config), torch.linspace(-1, 1, 400).reshape(2, 200)


def mobilebert():
    sizes = {"vocab_size": 32, "intermediate_size": 24, "embedding_size": 8}
    config = hf.MobileBertConfig(
        **BLOCK, **sizes, intra_bottleneck_size=16, true_hidden_size=16, tie_word_embeddings=False
    )
    return hf.MobileBertForMaskedLM(config), IDS


def mamba():
    config = hf.MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4)
    return hf.MambaForCausalLM(config), IDS


MODELS = {"WavLMAttention": wavlm, "MobileBertLMPredictionHead": mobilebert, "MambaMixer": mamba}


def new(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base, inputs = MODELS[kind]()
    return base.eval(), inputs


@torch.no_grad()
def answer(model, *inputs, **more):
    found = model(*inputs, **more)
    return found if isinstance(found, torch.Tensor) else found[0]


def called_in(model, *inputs):
    """The names of the modules that one call of a model calls."""
    names = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: names.add(name))
    answer(model, *inputs)
    return names


@pytest.mark.parametrize("kind", NEVER_CALLED)
def test_what_is_known_beforehand_is_what_a_call_shows(kind, capsys):
    base, inputs = new(kind)
    called = called_in(copy.deepcopy(base), inputs)
    parents = {n for n, m in base.named_modules() if type(m).__name__ == kind}
    bypassed = {f"{parent}.{child}" for parent in parents for child in NEVER_CALLED[kind]}
    plain = answer(base, inputs)
    config = IA3Config(target_modules="all-linear")
    with pytest.warns(UserWarning, match=WARNING) as caught:
        model = IA3Model(base, config)
    assert caught[0].filename == __file__
    targets = set(model.vectors("default"))
    assert parents
    assert targets - called == targets & bypassed != set()
    # The vectors there have no effect and get no gradient, which `explain` says without a call.
    randomize({name: v for name, v in model.vectors("default").items() if name in bypassed})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(answer(model, inputs), plain)
        model(inputs)[0].square().mean().backward()
    without = {name for name, vector in model.vectors("default").items() if vector.grad is None}
    assert without == targets & bypassed
    ia3.explain(new(kind)[0], config)
    lines = [line for line in capsys.readouterr().out.splitlines() if "never called" in line]
    ends = {line.split()[0].rpartition(".")[2] for line in lines}
    assert ends == {name.rpartition(".")[2] for name in targets & bypassed}


@pytest.mark.parametrize("called_before", [False, True])
def test_a_model_known_to_read_weights_is_not_merged(called_before):
    base, inputs = new("WavLMAttention")
    modules = {"target_modules": ["k_proj", "v_proj", "output_dense"]}
    with pytest.warns(UserWarning, match=WARNING):
        model = adapted(base, **modules, feedforward_modules=["output_dense"])
    if called_before:
        answer(model, inputs)
    before = snapshot(model)
    with pytest.raises(IA3Error, match=r"layers\.\*\.attention\.k_proj, .*v_proj: never called"):
        model.merge_adapter()
    with pytest.raises(IA3Error, match="never called"):
        model.merge_and_unload()
    assert_unchanged(model, before)


# -- any model -------------------------------------------------------------------------------------


class Reader(nn.Module):
    """Three ways to pass a layer's weight to a function, and one to call it."""

    def __init__(self):
        super().__init__()
        self.key, self.value, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.several = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, values):
        values = functional.linear(values, self.key.weight, self.key.bias)
        values = values @ self.get_parameter("value.weight").T
        values = functional.linear(values, self.several[0].weight)
        return self.out(self.several[1](values).tanh())


class Network(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, values):
        for layer in self.layers:
            values = layer(values)
        return values


def network(*layers):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Network(*[layer() for layer in layers]).double()


READ = ("key", "value", "several.0")


def test_weights_that_a_model_reads_are_found_in_its_first_call(capsys):
    base = network(Reader, Reader)
    config = IA3Config(target_modules=[*READ, "several.1", "out"], feedforward_modules=["out"])
    model = IA3Model(base, config)
    randomize({n: v for n, v in model.vectors("default").items() if n.endswith(READ)})
    with pytest.warns(UserWarning, match=WARNING) as caught:
        found = answer(model, VALUES)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert torch.equal(found, network(Reader, Reader)(VALUES))
    ia3.explain(base, config)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "never" in line]
    assert sum(int(line[2]) for line in lines) == 6
    before = snapshot(model)
    with pytest.raises(IA3Error, match=r"layers\.\*\.key, layers\.\*\.value.*exclude_modules"):
        model.merge_adapter()
    assert_unchanged(model, before)

    # Without them merged equals adapted.
    called = {"target_modules": ["several.1", "out"], "feedforward_modules": ["out"]}
    model.add_adapter("called", IA3Config(**called))
    model.set_adapter("called")
    randomize(model.vectors("called"))
    expected = answer(model, VALUES)
    assert relative(expected, found) > 0.1
    model.merge_adapter()
    assert relative(answer(model, VALUES), expected) < 1e-12


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_find_them_for_themselves(twin):
    model = adapted(network(Reader), target_modules=["key", "out"], feedforward_modules=[])
    other = twin(model)
    with pytest.warns(UserWarning, match=WARNING):
        answer(other, VALUES)
    with pytest.raises(IA3Error, match="never called"):
        other.merge_adapter()
    model.merge_adapter()  # it has not run


def test_a_model_that_has_not_run_is_merged():
    model = adapted(network(Reader), target_modules=["key"], feedforward_modules=[])
    key = copy.deepcopy(model.model.layers[0].key)
    model.merge_adapter()
    vector = model.vectors("default")["layers.0.key"].detach()
    expected = (key.weight.detach() * vector).float()
    torch.testing.assert_close(model.model.layers[0].key.weight.detach().float(), expected)
    with pytest.warns(UserWarning, match=WARNING):
        answer(model, VALUES)
    model.unmerge_adapter()
    with pytest.raises(IA3Error, match="never called"):
        model.merge_adapter()


def test_nothing_is_left_on_a_model_that_was_called_or_unloaded():
    base = network(Reader, Reader)
    before = snapshot(base)
    model = IA3Model(base, IA3Config(target_modules=[*READ, "out"], feedforward_modules=[]))
    model.unload()
    assert_unchanged(base, before)

    model = IA3Model(base, IA3Config(target_modules=["out"], feedforward_modules=[]))
    answer(model, VALUES)
    assert {n for n, m in base.named_modules() if hooks_on(m)} == {"layers.0.out", "layers.1.out"}
    model.add_adapter("second", IA3Config(target_modules=["several.1"], feedforward_modules=[]))
    model.delete_adapter("second")
    assert {n for n, m in base.named_modules() if hooks_on(m)} == {"layers.0.out", "layers.1.out"}
    assert {type(module._parameters) for module in base.modules()} == {dict}


@pytest.mark.filterwarnings("error::UserWarning")
def test_nothing_is_left_on_a_model_where_warnings_are_errors():
    base, _ = wavlm()
    before = snapshot(base)
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    with pytest.raises(UserWarning, match=WARNING):
        IA3Model(base, config)
    assert_unchanged(base, before)


def test_nothing_is_left_on_a_model_whose_first_call_was_interrupted():
    base = network(Reader, Reader)
    before = snapshot(base)
    model = IA3Model(base, IA3Config(target_modules=["out"], feedforward_modules=[]))

    def interrupt(*call):
        raise KeyboardInterrupt

    handle = base.get_submodule("layers.1.out").register_forward_pre_hook(interrupt, prepend=True)
    with pytest.raises(KeyboardInterrupt):
        answer(model, VALUES)
    handle.remove()
    model.unload()
    assert_unchanged(base, before)
    assert {type(module._parameters) for module in base.modules()} == {dict}


# -- what is none of this --------------------------------------------------------------------------


class Typed(nn.Module):
    """Reads the weight of a layer that it calls too, as T5 does, and of others never."""

    def __init__(self):
        super().__init__()
        self.inner, self.unused, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, values, with_head=False, fails=False):
        values = values.to(self.inner.weight.dtype)
        if fails:
            raise RuntimeError("out of memory")
        values = self.experts[0](self.inner(values))
        return self.head(values) if with_head else values


TYPED = {"target_modules": ["inner", "unused", "head", "0", "1"], "feedforward_modules": []}
TYPED |= {"exclude_modules": r"layers\.\d"}


class Checkpointed(Typed):
    def forward(self, values, **flags):
        return checkpoint(super().forward, values, use_reentrant=False, **flags)


def calls(model):
    answer(model, VALUES)


def calls_that_fail(model):
    layer = model.model.layers[0]
    with suppress(RuntimeError):
        layer(VALUES, fails=True)
    assert {type(module._parameters) for module in layer.modules()} == {dict}
    answer(model, VALUES)


def parts_alone(model):
    answer(model.model.layers[0], VALUES)


@pytest.mark.filterwarnings("error:.*never called")
@pytest.mark.parametrize("kind", [Typed, Checkpointed])
@pytest.mark.parametrize("use", [calls, calls_that_fail, parts_alone])
def test_a_module_behind_a_flag_or_of_no_token_is_merged(kind, use):
    model = adapted(network(kind, Typed), **TYPED)
    first = model.model.layers[0]
    use(model)
    expected = answer(model, VALUES)
    with_head = answer(first, VALUES, with_head=True)
    model.merge_adapter()
    assert relative(answer(model, VALUES), expected) < 1e-12
    assert relative(answer(first, VALUES, with_head=True), with_head) < 1e-12


@pytest.mark.filterwarnings("error:.*never called")
def test_longformers_global_attention_is_merged_though_no_token_had_it():
    sizes = {"vocab_size": 32, "intermediate_size": 24, "max_position_embeddings": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = hf.LongformerModel(hf.LongformerConfig(**BLOCK, **sizes, attention_window=4)).eval()
    model = adapted(base.double(), target_modules=["key", "value", "key_global", "value_global"])
    flags = torch.tensor([[1, 0, 0, 0, 0, 0]] * 2)
    expected = answer(model, IDS)
    twin = copy.deepcopy(model)
    with_flags = answer(twin, IDS, global_attention_mask=flags)
    assert relative(with_flags, expected) > 1e-3
    model.merge_adapter()
    assert relative(answer(model, IDS), expected) < 1e-6
    assert relative(answer(model, IDS, global_attention_mask=flags), with_flags) < 1e-6


class PartlyCompiled(nn.Module):
    """A layer that is compiled, one that is called in a compiled function, and one in neither."""

    def __init__(self):
        super().__init__()
        self.whole = torch.compile(nn.Linear(8, 8), backend="eager")
        self.inner, self.method, self.plain = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.method.compile(backend="eager")
        self.function = torch.compile(self.called, backend="eager")

    def called(self, values):
        return self.inner(values).tanh()

    def forward(self, values):
        return self.plain(self.method(self.function(self.whole(values))))


@pytest.mark.filterwarnings("error:.*never called")
@pytest.mark.parametrize("forward", ["plain", "compiled"])
def test_what_is_called_in_compiled_code_is_not_taken_for_what_is_not(forward):
    torch.compiler.reset()
    base = network(PartlyCompiled)
    if forward == "compiled":
        base.layers[0].forward = torch.compile(base.layers[0].forward, backend="eager")
    model = adapted(base, target_modules="all-linear", feedforward_modules=[])
    expected = answer(model, VALUES)
    assert torch.equal(answer(model, VALUES), expected)
    assert {type(module._parameters) for module in model.modules()} == {dict}
    assert len(model.vectors("default")) == 4
    model.merge_adapter()
    assert relative(answer(model, VALUES), expected) < 1e-12


class ReadsOrCalls(nn.Module):
    def __init__(self):
        super().__init__()
        self.key = nn.Linear(8, 8)

    def forward(self, values, call=False):
        if call:
            return self.key(values)
        return functional.linear(values, self.key.weight, self.key.bias)


def test_a_module_that_was_reached_once_is_reached():
    model = adapted(ReadsOrCalls().double(), target_modules=["key"], feedforward_modules=[])
    with pytest.warns(UserWarning, match=WARNING):
        answer(model, VALUES)
    expected = answer(model, VALUES, call=True)
    assert hooks_on(model.model.key) == 1
    model.merge_adapter()
    assert relative(answer(model, VALUES, call=True), expected) < 1e-12


def test_a_module_that_another_one_calls_too_is_reached():
    base = network(ReadsOrCalls, Typed)
    base.layers[1].inner = base.layers[0].key
    model = adapted(base, target_modules=["key"], feedforward_modules=[])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer(model, VALUES)
    assert model.model.layers[0].key.ia3_l.reached


@pytest.mark.filterwarnings("error:.*never called")
def test_vectors_that_come_while_another_thread_is_in_the_forward():
    """It was past the layer when they came, and has read its weight."""
    within, may_go = threading.Event(), threading.Event()

    class Slow(Typed):
        def forward(self, values):
            values = super().forward(values)
            within.set()
            assert may_go.wait(60)
            return values

    base = network(Slow)
    base.layers[0].register_forward_hook(lambda *_: None)
    thread = threading.Thread(target=base, args=(VALUES,))
    thread.start()
    assert within.wait(60)
    model = adapted(base, **TYPED)
    may_go.set()
    thread.join()
    assert base.layers[0].inner.ia3_l.reached is None
    model.merge_adapter()
