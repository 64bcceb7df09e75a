"""Equal to PEFT in numbers and files, on every architecture PEFT has defaults for and on others."""

import warnings
from collections import OrderedDict
from contextlib import nullcontext
from functools import partial
from itertools import product

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.architectures import ARCHITECTURES, build, output
from support.pairs import adapted_pair, assert_equal_to_peft, relative, vectors
from support.versions import since
from torch import nn
from torch.nn import Conv2d, Conv3d
from transformers.pytorch_utils import Conv1D

import ia3

EVERY_ARCHITECTURE = pytest.mark.parametrize("kind", ARCHITECTURES)
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)

pytestmark = [  # PEFT's
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning"),
]


def pair(kind, dtype, adapters=("default",)):
    return adapted_pair(
        lambda dtype: build(kind, dtype), ARCHITECTURES[kind].modules, dtype, adapters
    )


def outputs(kind):
    def measure(model):
        with torch.no_grad():
            return {"logits": output(kind, model)}

    return measure


def loss(result):
    """The distance to random targets."""
    targets = torch.randn(result.shape, generator=torch.Generator().manual_seed(2))
    return (result.float() - targets).square().mean()


def gradients(kind, *adapters):
    def measure(model):
        loss(output(kind, model)).backward()
        return {
            f"{name} {adapter}": vector.grad
            for adapter in adapters or ("default",)
            for name, vector in vectors(model, adapter).items()
        }

    return measure


@EVERY_ARCHITECTURE
@EVERY_DTYPE
def test_untrained_adapter_changes_no_bit(kind, dtype):
    base = build(kind, dtype)
    with torch.no_grad():
        expected = output(kind, base)
    modules = ARCHITECTURES[kind].modules
    theirs = peft.get_peft_model(build(kind, dtype), peft.IA3Config(**modules))
    ours = ia3.get_peft_model(base, ia3.IA3Config(**modules))
    shapes = {name: vector.shape for name, vector in vectors(theirs).items()}
    assert {name: vector.shape for name, vector in vectors(ours).items()} == shapes
    for model in (ours, theirs):
        assert torch.equal(output(kind, model), expected)  # as in training
        with torch.no_grad():
            assert torch.equal(output(kind, model), expected)


@EVERY_ARCHITECTURE
@EVERY_DTYPE
def test_logits_gradients_and_merged_logits(kind, dtype):
    models = pair(kind, dtype)
    assert_equal_to_peft(outputs(kind), models)
    assert_equal_to_peft(gradients(kind), models)
    assert_equal_to_peft(outputs(kind), [model.merge_and_unload() for model in models])


@EVERY_ARCHITECTURE
@EVERY_DTYPE
def test_what_takes_least_memory_is_as_exact(kind, dtype):
    """In place, and hoisted onto the up projection: the rounding differs, its size does not."""
    ours, theirs, *_ = pair(kind, dtype)
    ours.use_plain_product(False)
    wider = torch.float64 if dtype == torch.float32 else torch.float32
    modules = ARCHITECTURES[kind].modules
    exact = adapted_pair(lambda _: build(kind, dtype).to(wider), modules)[1]
    if hasattr(exact.get_base_model(), "set_experts_implementation"):
        # The others have no float64.
        exact.get_base_model().set_experts_implementation("eager")
    for measure in (outputs(kind), gradients(kind)):
        errors = [
            [relative(values[name], expected) for name, expected in measure(exact).items()]
            for values in (measure(ours), measure(theirs))
        ]
        mean, peft_mean = (sum(each) / len(each) for each in errors)
        assert mean <= 1.3 * peft_mean + 1e-7
        assert max(errors[0]) <= 2 * max(errors[1]) + 1e-7


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        *product(["llama", "gpt2"], ["in place", "plain", "checkpointed", "routed"]),
        *[
            pytest.param("t5", how, marks=since("transformers", "5.23", "T5's attention has none"))
            for how in ("in place", "plain", "checkpointed", "routed")
        ],
        ("llama", "fused"),
    ],
)
def test_second_derivatives(kind, how):
    """As meta-learning takes them: through a step along the gradients."""
    ours, theirs = (model.double() for model in pair(kind, torch.float32))
    for model in (ours, theirs):
        # The usual attention has no second derivatives on a CPU.
        model.get_base_model().set_attn_implementation("eager")
    ours.use_plain_product(how == "plain")
    if how == "fused":
        ours.fuse_mlp()
    if how == "checkpointed":
        ours.train().gradient_checkpointing_enable({"use_reentrant": False})
        for module in ours.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    rows = len(next(iter(ARCHITECTURES[kind].inputs().values())))
    route = ours.route(["default"] * rows) if how == "routed" else nullcontext()

    def measure(model):
        with route if model is ours else nullcontext():
            wanted = vectors(model)
            values = list(wanted.values())
            first = torch.autograd.grad(loss(output(kind, model)), values, create_graph=True)
            after = sum((v - 0.1 * g).sin().sum() for v, g in zip(values, first, strict=True))
            second = torch.autograd.grad(after, values)
        return dict(zip(wanted, second, strict=True))

    assert_equal_to_peft(measure, [ours, theirs], 1e-9)


@EVERY_ARCHITECTURE
@EVERY_DTYPE
def test_five_steps_of_training(kind, dtype):
    models = pair(kind, dtype)
    for model in models:
        trained = [p for p in model.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in trained]
        optimizer = torch.optim.AdamW(trained, lr=3e-3)
        for _ in range(5):
            optimizer.zero_grad()
            loss(output(kind, model)).backward()
            optimizer.step()
        assert not any(torch.equal(*each) for each in zip(trained, before, strict=True))
    assert_equal_to_peft(vectors, models, 1e-5)
    assert_equal_to_peft(outputs(kind), models, 1e-5)


@EVERY_ARCHITECTURE
@EVERY_DTYPE
def test_files_load_in_both_directions(kind, dtype, tmp_path):
    ours, theirs, *_ = pair(kind, dtype)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    written = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    again = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert again.keys() == written.keys()
    for name, tensor in written.items():
        assert again[name].dtype == tensor.dtype == torch.float32
        assert torch.equal(again[name], tensor)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys")
        read_by_peft = peft.PeftModel.from_pretrained(build(kind, dtype), str(tmp_path / "ours"))
        read_by_us = ia3.IA3Model.from_pretrained(build(kind, dtype), tmp_path / "theirs")
    read_by_us.use_plain_product()
    expected = outputs(kind)(theirs)["logits"]
    assert torch.equal(outputs(kind)(read_by_peft)["logits"], expected)
    assert relative(outputs(kind)(read_by_us)["logits"], expected) < 1e-6
    assert not any(p.requires_grad for p in read_by_us.parameters())


@EVERY_ARCHITECTURE
@EVERY_DTYPE
def test_several_active_adapters(kind, dtype):
    models = pair(kind, dtype, ("default", "second"))
    alone = outputs(kind)(models[0])["logits"]
    for model in models:
        model.base_model.set_adapter(["default", "second"])
    assert relative(outputs(kind)(models[0])["logits"], alone) > 1e-2
    assert_equal_to_peft(outputs(kind), models)
    assert_equal_to_peft(gradients(kind, "default", "second"), models)
    merged = [model.merge_and_unload() for model in models]
    if dtype == torch.float32:
        assert_equal_to_peft(outputs(kind), merged)
        return
    # PEFT rounds after each adapter: the weights differ, and are compared before anything else is
    # rounded.
    ours, theirs, float32 = (model.state_dict() for model in merged)
    assert ours.keys() == theirs.keys()
    nearer = 0
    for name, exact in float32.items():
        found, expected = ((each[name].float() - exact).norm() for each in (ours, theirs))
        assert found <= expected, name
        nearer += int(found < expected)
    assert nearer


@EVERY_ARCHITECTURE
@EVERY_DTYPE
def test_weighted_adapters(kind, dtype):
    models = pair(kind, dtype, ("default", "second"))
    for model in models:
        model.base_model.add_weighted_adapter(["default", "second"], [0.7, -0.4], "sum")
        model.base_model.set_adapter("sum")
    ours, theirs, float32 = (vectors(models[i], "sum") for i in (0, 1, -1))
    for name, expected in float32.items():
        assert torch.equal(ours[name], expected), name
        # Over a bfloat16 base PEFT rounds the sum to bfloat16.
        theirs[name].data = expected.detach().clone()
    assert_equal_to_peft(outputs(kind), models)
    assert_equal_to_peft(outputs(kind), [model.merge_and_unload() for model in models])


# A first layer and a second one.
PLAIN = {
    "linear": lambda: (nn.Linear(6, 8), nn.Linear(8, 5)),
    "Conv1D": lambda: (Conv1D(8, 6), Conv1D(5, 8)),
    "conv2d": lambda: (Conv2d(6, 8, 3, stride=2, padding=1), Conv2d(8, 5, 2, bias=False)),
    "conv2d in groups": lambda: (
        Conv2d(6, 8, 3, groups=2),
        Conv2d(8, 4, (2, 1), dilation=2, groups=4),
    ),
    "conv3d": lambda: (Conv3d(6, 8, 3, padding="same"), Conv3d(8, 5, (1, 2, 3), bias=False)),
    "conv3d in groups": lambda: (Conv3d(6, 8, 3, groups=2), Conv3d(8, 4, (1, 2, 3), groups=4)),
}
INPUTS = {"linear": (4, 6), "Conv1D": (2, 3, 6), "conv2d": (2, 6, 7, 9), "conv3d": (2, 6, 4, 5, 6)}
SIDES = {
    "outputs": {"target_modules": ["first", "second"], "feedforward_modules": []},
    "inputs": {"target_modules": ["first", "second"], "feedforward_modules": ["first", "second"]},
    "both": {"target_modules": r"first|second", "feedforward_modules": r"second"},
}


def plain(kind, dtype):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = PLAIN[kind]()
        layers = OrderedDict(first=first, between=nn.Tanh(), second=second)
        for layer in (first, second):
            if getattr(layer, "bias", None) is not None:
                nn.init.normal_(layer.bias)
    return nn.Sequential(layers).to(dtype)


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("sides", SIDES)
@EVERY_DTYPE
def test_plain_modules(kind, sides, dtype, tmp_path):
    inputs = torch.randn(INPUTS[kind.split()[0]], generator=torch.Generator().manual_seed(1))
    make = partial(plain, kind)

    def measure(model):
        dtype = next(p.dtype for name, p in model.named_parameters() if "ia3_l" not in name)
        result = model(inputs.bfloat16().to(dtype))
        if not result.requires_grad:
            return {"result": result}
        loss(result).backward()
        return {"result": result, **{name: v.grad for name, v in vectors(model).items()}}

    models = adapted_pair(make, SIDES[sides], dtype)
    ours, theirs, *_ = models
    assert measure(ours).keys() == {"result", "first", "second"}
    for model in models:
        model.zero_grad()
    assert_equal_to_peft(measure, models)

    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    read_by_peft = peft.PeftModel.from_pretrained(make(dtype), str(tmp_path / "ours"))
    read_by_us = ia3.IA3Model.from_pretrained(make(dtype), tmp_path / "theirs")
    expected = vectors(theirs)
    for read in (vectors(read_by_peft), vectors(read_by_us)):
        assert read.keys() == expected.keys()
        assert all(torch.equal(read[name], expected[name]) for name in expected)

    assert_equal_to_peft(measure, [model.merge_and_unload() for model in models])
