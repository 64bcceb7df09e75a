"""Vectors on layers whose weights, hooks or forwards other code changes too."""

import copy
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from support import pairs
from support.snapshots import assert_unchanged, hooks_on, snapshot
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from ia3 import IA3Config, IA3Model

VALUES = torch.linspace(-1.0, 2.0, 12, dtype=torch.float64).reshape(3, 4)
LAYERS = ["key", "mlp.up", "mlp.down"]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, values):
        return self.down(silu(self.gate(values)) * self.up(values))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.key, self.mlp = nn.Linear(4, 4), Mlp()

    def forward(self, values):
        return self.mlp(self.key(values))


def network() -> Network:
    torch.manual_seed(0)
    return Network().eval()


def adapted(base, *targets):
    """With vectors on the outputs of these, and on the down projection's input."""
    modules = [*(targets or ("key",)), "down"]
    model = pairs.adapted(base, target_modules=modules, feedforward_modules=["down"])
    return model.double().eval()


def flat(model: IA3Model) -> dict[str, Tensor]:
    """Layer -> its vector, `[dim]`."""
    return {name: vector.detach().flatten() for name, vector in model.vectors("default").items()}


def by_hand(base, vectors):
    """What the network with these vectors gives; from its weights as they are."""

    def layer(module, values):
        return linear(values, module.weight, module.bias)

    with torch.no_grad():
        key = layer(base.key, VALUES) * vectors.get("key", 1.0)
        up = layer(base.mlp.up, key) * vectors.get("mlp.up", 1.0)
        inner = silu(layer(base.mlp.gate, key)) * up * vectors.get("mlp.down", 1.0)
        return layer(base.mlp.down, inner)


def check(model: IA3Model) -> None:
    """The model is its weights and vectors: with and without gradients, switched off, and again."""
    vectors = flat(model)
    expected = by_hand(model.model, vectors)
    for _ in range(2):
        torch.testing.assert_close(model(VALUES).detach(), expected)
        with torch.no_grad():
            torch.testing.assert_close(model(VALUES), expected)
            with model.disable_adapter():
                torch.testing.assert_close(model(VALUES), by_hand(model.model, {}))


@pytest.mark.parametrize("layer", LAYERS)
def test_weights_changed_under_an_active_adapter(layer):
    model = adapted(network())
    check(model)
    before = model(VALUES)
    torch.nn.utils.parametrizations.spectral_norm(model.model.get_submodule(layer))
    assert not torch.allclose(model(VALUES), before)
    check(model)


@pytest.mark.parametrize("targets", [("key",), ("up",), ("key", "up")], ids=" ".join)
def test_vectors_changed_under_an_active_adapter(targets):
    model = adapted(network(), *targets)
    check(model)
    for vector in model.vectors("default").values():
        vector.data.mul_(1.5)
        check(model)
        vector.data = vector.detach() + 0.25
        check(model)
    state = {name: tensor + 0.125 for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    check(model)
    model.double().half().double()
    check(model)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_a_hook_that_changes_the_output(layer, first):
    """One that was there before the adapter adds to what is rescaled, a later one to the result."""
    base = network()

    def add(module, args, output):
        return output + 1

    twin, target = network().double(), base.get_submodule(layer)
    if first:
        target.register_forward_hook(add)
        # The same without a hook.
        twin.get_submodule(layer).bias.data.add_(1)
    model = adapted(base)
    vectors = flat(model)
    if not first:
        target.register_forward_hook(add)
        # The vector of the down projection's input stands on the up projection's output.
        vector = {"key": vectors["key"], "mlp.up": vectors["mlp.down"]}.get(layer, 1.0)
        twin.get_submodule(layer).bias.data.add_(1 / vector)
    expected = by_hand(twin, vectors)
    torch.testing.assert_close(model(VALUES).detach(), expected)
    with torch.no_grad():
        torch.testing.assert_close(model(VALUES), expected)


@pytest.mark.parametrize("targets", [("key",), ("up",), ("key", "up")], ids=" ".join)
def test_accelerates_hooks_come_and_go_while_adapters_do(targets):
    base = network()
    model = adapted(base, *targets)
    switches = {True: model.enable_adapter_layers, False: model.disable_adapter_layers}
    for active_before, active_after in itertools.product(switches, switches):
        switches[active_before]()
        for layer in LAYERS:
            add_hook_to_module(base.get_submodule(layer), ModelHook())
        switches[active_after]()
        expected = by_hand(base, flat(model) if active_after else {})
        torch.testing.assert_close(model(VALUES).detach(), expected)
        remove_hook_from_module(base, recurse=True)
        torch.testing.assert_close(model(VALUES).detach(), expected)
        model.enable_adapter_layers()
        check(model)
    model.unload()
    torch.testing.assert_close(base(VALUES), by_hand(base, {}))


@pytest.mark.parametrize("layer", LAYERS)
def test_a_copy_of_one_layer_is_its_own(layer):
    """It computes from its own weights, and a down projection rescales its input itself."""
    model = adapted(network())
    vectors = flat(model)
    twin = copy.deepcopy(model.model.get_submodule(layer))
    model.model.get_submodule(layer).weight.data.zero_()
    values = torch.ones(2, twin.in_features, dtype=torch.float64)
    # The up projection's own has no vector: it carried another layer's.
    before, after = (vectors[layer] if layer == one else 1.0 for one in ("mlp.down", "key"))
    expected = linear(values * before, twin.weight, twin.bias) * after
    torch.testing.assert_close(twin(values), expected)


@pytest.mark.parametrize(("layer", "sizes"), [("up", (4, 6)), ("down", (6, 4))])
def test_a_layer_replaced_later(layer, sizes):
    """Without its carrier, the down projection's input is rescaled; its vector goes with it."""
    base = network()
    model = adapted(base)
    assert base.mlp.down.ia3_l._carrier is not None
    setattr(base.mlp, layer, nn.Linear(*sizes).double().requires_grad_(False))
    check(model)
    # What is left of the adapter comes off.
    model.unload()
    torch.testing.assert_close(base(VALUES), by_hand(base, {}))


def test_other_vectors_by_functional_call():
    model = adapted(network(), "key", "up")
    doubled = {name: 2 * p for name, p in model.named_parameters() if "ia3_l" in name}
    expected = by_hand(model.model, {name: 2 * vector for name, vector in flat(model).items()})
    torch.testing.assert_close(torch.func.functional_call(model, doubled, VALUES), expected)
    check(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_code_follows_what_is_active():
    torch.compiler.reset()
    model = adapted(network(), "key", "up")
    compiled = torch.compile(model.model, backend="eager", fullgraph=True)
    expected = by_hand(model.model, flat(model))
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(VALUES), expected)
            with model.disable_adapter():
                torch.testing.assert_close(compiled(VALUES), by_hand(model.model, {}))


@pytest.mark.parametrize("first", ["vectors", "copy"])
def test_a_copy_of_a_layer_that_carries(first):
    """`modules_to_save` has the up projection, and another adapter a vector on the down's."""
    base = network().double()
    before = snapshot(base)
    down = IA3Config(target_modules=["down"], feedforward_modules=["down"])
    saved = IA3Config(target_modules=["key"], feedforward_modules=[], modules_to_save=["up"])
    configs = {"vectors": down, "copy": saved}
    second = "copy" if first == "vectors" else "vectors"
    model = IA3Model(base, configs[first], first).eval()
    model.add_adapter(second, configs[second])
    model.set_adapter(["vectors", "copy"])
    vector = model.vectors("vectors")["mlp.down"]
    vector.data = vector + 0.5
    assert base.mlp.down.ia3_l._carrier is not None
    expected = by_hand(base, {"mlp.down": vector.detach().flatten()})
    torch.testing.assert_close(model(VALUES).detach(), expected)
    with model.disable_adapter():
        torch.testing.assert_close(model(VALUES).detach(), by_hand(base, {}))
    assert [name for name, _ in base.mlp.up.ia3_l["copy"].named_modules()] == [""]
    assert hooks_on(base.mlp.up.ia3_l["copy"]) == 0
    model.unload()
    assert_unchanged(base, before)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_forward_wrapped_by_others(layer):
    """Switched off and on under a wrapper, or after it has gone, vectors multiply once."""
    base = network()
    model = adapted(base)
    target = base.get_submodule(layer)
    before = target.forward
    target.forward = lambda input: before(input)
    check(model)
    del target.forward
    check(model)
    with model.disable_adapter():
        assert not any(hooks_on(module) for module in base.modules() if module is not base)
    check(model)
    model.unload()
    torch.testing.assert_close(base(VALUES), by_hand(base, {}))
    assert not any(map(hooks_on, base.modules()))


def test_a_call_sees_one_state_of_a_model_that_is_switched_meanwhile():
    model = adapted(network())
    model.add_adapter("other", model.peft_config["default"])
    for vector in model.vectors("other").values():
        vector.data = vector * 3
    stop = threading.Event()

    def compute():
        with torch.no_grad():
            while not stop.is_set():
                model(VALUES)

    with ThreadPoolExecutor(2) as pool:
        computing = [pool.submit(compute) for _ in range(2)]
        for _ in range(100):
            for names in ("default", "other"):
                model.set_adapter(names, inference_mode=True)
            with model.disable_adapter():
                pass
        stop.set()
        assert [each.result() for each in computing] == [None, None]
    model.set_adapter("default", inference_mode=True)
    check(model)
