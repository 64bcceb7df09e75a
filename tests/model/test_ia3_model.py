"""`IA3Model`: equal to PEFT's (IA)³ in what it computes, and gone without a trace afterwards."""

import copy
import json
import warnings

import peft
import pytest
import torch
from support.memory import saved_bytes
from support.pairs import adapted, logits, randomize, relative, vectors
from support.snapshots import assert_unchanged, snapshot, weights
from torch import nn

import ia3
from ia3 import IA3Config, IA3Error, IA3Model

KINDS = ["llama", "gpt2", "t5"]
CONFIGS = {"defaults": {}, "all-linear": {"target_modules": "all-linear"}}
EVERY_MODEL = pytest.mark.parametrize("kind", KINDS)
EVERY_CHOICE = pytest.mark.parametrize("choice", CONFIGS)

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")


@pytest.fixture
def pair(make_model):
    """(ours, PEFT's) on the same base model, with the same random vectors."""

    def make(kind, choice):
        model = adapted(make_model(kind), **CONFIGS[choice])
        peft_model = peft.get_peft_model(make_model(kind), peft.IA3Config(**CONFIGS[choice]))
        theirs = vectors(peft_model)
        randomize(theirs)
        assert theirs.keys() == model.vectors("default").keys()
        return model, peft_model

    return make


# -- equal to PEFT ---------------------------------------------------------------------------------


@EVERY_MODEL
@EVERY_CHOICE
def test_logits_gradients_and_merge_are_pefts(pair, make_inputs, kind, choice):
    (model, peft_model), inputs = pair(kind, choice), make_inputs(kind)
    assert relative(logits(model, **inputs), logits(peft_model, **inputs)) < 1e-6
    model(**inputs).loss.backward()
    peft_model(**inputs).loss.backward()
    theirs = vectors(peft_model)
    for name, vector in model.vectors("default").items():
        assert relative(vector.grad, theirs[name].grad) < 2e-6, name
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        f"model.{name}.ia3_l.default" for name in model.vectors("default")
    ]
    merged, peft_merged = model.merge_and_unload(), peft_model.merge_and_unload()
    assert relative(logits(merged, **inputs), logits(peft_merged, **inputs)) < 1e-6


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", {"target_modules": "all-linear"}),
        # PEFT records its default feed-forward modules beside these, though none is a target.
        ("llama", {"target_modules": ["k_proj"]}),
        ("llama", {"target_modules": ["mlp.down_proj", "k_proj"]}),
        ("gpt2", {"target_modules": ["c_proj"]}),
        ("t5", {"target_modules": r".*\.(k|v|wo)"}),
    ],
)
def test_files_are_read_in_both_directions(make_model, make_inputs, tmp_path, kind, config):
    inputs = make_inputs(kind)
    peft_model = peft.get_peft_model(make_model(kind), peft.IA3Config(**config))
    randomize(vectors(peft_model))
    peft_model.save_pretrained(str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = IA3Model.from_pretrained(make_model(kind), tmp_path)
    expected = logits(peft_model, **inputs)
    assert relative(logits(model, **inputs), expected) < 1e-6
    # PEFT refuses feed-forward modules that are not among the targets.
    for number, ours in enumerate((model, adapted(make_model(kind), **config))):
        ours.save_pretrained(tmp_path / str(number))
        again = peft.PeftModel.from_pretrained(make_model(kind), str(tmp_path / str(number)))
        assert relative(logits(again, **inputs), logits(ours, **inputs)) < 1e-6


def test_saved_config_is_for_inference_and_the_model_trains_on(tiny_llama, tmp_path):
    model = IA3Model(tiny_llama, IA3Config(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["inference_mode"] is True
    assert saved["peft_type"] == "IA3"
    assert saved["task_type"] == "CAUSAL_LM"
    assert model.peft_config["default"].inference_mode is False
    assert all(vector.requires_grad for vector in model.vectors("default").values())


@EVERY_MODEL
@EVERY_CHOICE
def test_unload_gives_back_the_model(make_model, make_inputs, kind, choice):
    base, inputs = make_model(kind), make_inputs(kind)
    next(base.parameters()).requires_grad_(False)
    before, expected, trained = snapshot(base), logits(base, **inputs), weights(base)
    parameters = dict(base.named_parameters())

    model = adapted(base, **CONFIGS[choice])
    now = dict(base.named_parameters())
    assert all(now[name] is parameter for name, parameter in parameters.items())
    assert not any(parameter.requires_grad for parameter in parameters.values())
    assert weights(base) == trained
    assert not torch.equal(logits(model, **inputs), expected)
    model(**inputs).loss.backward()
    model.merge_adapter()
    with pytest.warns(UserWarning, match="merged already"):
        model.merge_adapter()

    assert model.unload() is base
    assert_unchanged(base, before)
    assert torch.equal(logits(base, **inputs), expected)
    IA3Model(base, IA3Config())  # and it can be adapted again


# -- several adapters ------------------------------------------------------------------------------


@pytest.mark.parametrize("merged", [True, False])
def test_disabled_adapters_compute_as_the_base_model(tiny_llama, make_inputs, merged):
    inputs = make_inputs("llama")
    base_logits = logits(tiny_llama, **inputs)
    model = adapted(tiny_llama)
    expected = logits(model, **inputs)
    if merged:
        model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, **inputs), base_logits)
    assert torch.equal(logits(model, **inputs), expected)
    with pytest.raises(RuntimeError, match="inside"), model.disable_adapter():
        raise RuntimeError("inside")
    assert torch.equal(logits(model, **inputs), expected)
    model.disable_adapter_layers()
    model.set_adapter("default")
    with model.disable_adapter():
        pass
    assert torch.equal(logits(model, **inputs), base_logits)
    model.enable_adapter_layers()
    assert torch.equal(logits(model, **inputs), expected)


def test_only_active_adapters_are_trained(tiny_llama):
    model = IA3Model(tiny_llama, IA3Config())
    size = sum(vector.numel() for vector in model.vectors("default").values())
    assert size == 2 * (16 + 16 + 48)  # two layers of k, v and the inner activation
    model.add_adapter("b", IA3Config())
    assert model.get_nb_trainable_parameters()[0] == size
    model.set_adapter("b")
    assert all(vector.requires_grad for vector in model.vectors("b").values())
    assert not any(vector.requires_grad for vector in model.vectors("default").values())
    model.set_adapter(["default", "b"])
    assert model.get_nb_trainable_parameters()[0] == 2 * size


def test_load_and_delete(tiny_llama, make_model, make_inputs, tmp_path):
    inputs = make_inputs("llama")
    other = adapted(make_model("llama"), seed=3, target_modules=["q_proj"])
    other.save_pretrained(tmp_path)
    model = adapted(tiny_llama)
    expected = logits(model, **inputs)
    model.load_adapter(tmp_path, "other")
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model, **inputs), expected)
    model.set_adapter("other")
    assert relative(logits(model, **inputs), logits(other, **inputs)) < 1e-6
    model.set_adapter("other", inference_mode=True)
    assert model.get_nb_trainable_parameters()[0] == 0
    with pytest.warns(UserWarning, match="'default' is active now"):
        model.delete_adapter("other")
    assert model.active_adapters == ["default"]
    assert list(model.peft_config) == ["default"]
    assert not hasattr(tiny_llama.get_submodule("model.layers.0.self_attn.q_proj"), "ia3_l")
    assert torch.equal(logits(model, **inputs), expected)


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model.set_adapter("defualt"),
        lambda model: model.set_adapter(["default", "defualt"]),
        lambda model: model.delete_adapter("defualt"),
        lambda model: model.merge_adapter(["defualt"]),
        lambda model: model.save_pretrained("never", adapter_name="defualt"),
    ],
)
def test_misspelt_adapter(tiny_llama, use):
    model = IA3Model(tiny_llama, IA3Config())
    with pytest.raises(IA3Error, match=r"no adapter 'defualt'.*did you mean 'default'"):
        use(model)
    assert model.active_adapters == ["default"]


def test_no_attribute_of_what_holds_adapters_is_an_adapters_name(tiny_llama):
    config = IA3Config(target_modules=["v_proj"], feedforward_modules=[])
    config.modules_to_save = ["lm_head"]
    model = IA3Model(tiny_llama, config)
    holders = [part for part in model.modules() if type(part).__name__ in ("Site", "SavedModule")]
    assert {type(part).__name__ for part in holders} == {"Site", "SavedModule"}
    keys = list(model.state_dict())
    for name in {"forward", *(name for part in holders for name in vars(part))}:
        with pytest.raises(IA3Error, match=f"adapter name '{name}' is also an attribute"):
            model.add_adapter(name, config)
    assert list(model.state_dict()) == keys
    assert list(model.peft_config) == ["default"]


def test_adapter_names_that_are_words(tiny_llama, make_inputs):
    model, inputs = adapted(tiny_llama), make_inputs("llama")
    expected = logits(model, **inputs)
    given = model.vectors("default")
    for name in ("product", "place", "vectors", "remove", "default-2", "kundin-7", "größe"):
        model.add_adapter(name, IA3Config(), vectors=given)
        model.set_adapter(name)
        model.train().eval().to(torch.float32)
        assert torch.equal(logits(model, **inputs), expected)
        assert f"model.model.layers.0.mlp.down_proj.ia3_l.{name}" in model.state_dict()
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(logits(twin, **inputs), expected)
    assert model.unload() is tiny_llama


@pytest.mark.parametrize("name", [5, None, 1.5, b"one", ["one"], ("one",), {}], ids=repr)
def test_adapter_names_that_are_no_strings_are_refused_wherever_one_is_taken(
    tiny_llama, make_model, tmp_path, name
):
    model = IA3Model(tiny_llama, IA3Config(), "one")
    model.save_pretrained(tmp_path / "saved", adapter_name="one")
    given = [name]
    taken = {
        "first": lambda: ia3.get_peft_model(make_model("llama"), IA3Config(), name),
        "inject": lambda: ia3.inject_adapter_in_model(IA3Config(), make_model("llama"), name),
        "read": lambda: IA3Model.from_pretrained(make_model("llama"), tmp_path / "saved", name),
        "add": lambda: model.add_adapter(name, IA3Config()),
        "load": lambda: model.load_adapter(tmp_path / "saved", name),
        "delete": lambda: model.delete_adapter(name),
        "vectors": lambda: model.vectors(name),
        "activate": lambda: model.set_adapter(given),
        "train": lambda: model.set_requires_grad(given),
        "merge": lambda: model.merge_adapter(given),
        "merge for good": lambda: model.merge_and_unload(adapter_names=given),
        "save": lambda: model.save_pretrained(tmp_path / "new", selected_adapters=given),
        "combine": lambda: model.add_weighted_adapter(given, [1.0], "both"),
        "combined": lambda: model.add_weighted_adapter(["one"], [1.0], name),
        "get": lambda: ia3.get_peft_model_state_dict(model, adapter_name=name),
        "set": lambda: ia3.set_peft_model_state_dict(model, {}, name),
    }
    if name is not None:
        taken["save one"] = lambda: model.save_pretrained(tmp_path / "new", adapter_name=name)
    for take in taken.values():
        with pytest.raises(IA3Error, match="expected a string"):
            take()
    if not isinstance(name, list | tuple | dict | bytes):
        for take in (model.set_adapter, model.set_requires_grad):
            with pytest.raises(IA3Error, match="expected a list of names"):
                take(name)
    assert list(model.peft_config) == model.active_adapters == ["one"]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "config", [None, {"peft_type": "IA3"}, peft.LoraConfig(), peft.IA3Config()]
)
def test_a_config_of_another_library_is_refused_by_its_name(make_model, tmp_path, config):
    kind = f"{type(config).__module__}.{type(config).__name__}"
    model = IA3Model(make_model("llama"), IA3Config(), "one")
    model.save_pretrained(tmp_path, adapter_name="one")
    for take in (
        lambda: ia3.get_peft_model(make_model("llama"), config),
        lambda: IA3Model(make_model("llama"), {"default": config}),
        lambda: model.add_adapter("two", config),
        lambda: ia3.inject_adapter_in_model(config, make_model("llama")),
        lambda: IA3Model.from_pretrained(make_model("llama"), tmp_path, config=config or 5),
    ):
        with pytest.raises(IA3Error, match=f"the config is a ({kind}|builtins.int), expected an"):
            take()
    assert list(model.peft_config) == ["one"]


# -- with the rest of the world --------------------------------------------------------------------


@EVERY_MODEL
@EVERY_CHOICE
def test_no_more_is_saved_for_the_backward_pass_than_by_peft(pair, make_inputs, kind, choice):
    inputs = make_inputs(kind)
    ours, theirs = pair(kind, choice)
    ids = inputs["input_ids"]
    # Per layer, the gated product and the activation function keep their operands, PEFT a copy
    # besides: bytes of the gate's and of the up projection's output.
    less = 2 * 2 * ids.numel() * 48 * 4 if (kind, choice) == ("llama", "all-linear") else 0
    assert saved_bytes(ours, ids) <= saved_bytes(theirs, ids) - less


@pytest.mark.parametrize("first", [True, False])
def test_hooks_of_others_keep_what_they_saw(tiny_llama, make_inputs, first):
    """An output that the user's hook recorded is never written over."""
    layer = tiny_llama.get_submodule("model.layers.0.self_attn.k_proj")
    recorded = []

    def record(module, args, output):
        recorded.extend([output, output.detach().clone()])

    handle = layer.register_forward_hook(record) if first else None
    model = adapted(tiny_llama)
    handle = handle or layer.register_forward_hook(record, prepend=True)
    model(**make_inputs("llama")).loss.backward()
    seen, then = recorded
    assert torch.equal(seen, then)
    model.unload()
    assert list(layer._forward_hooks) == [handle.id]


def test_linear_layers_whose_output_is_saved_by_what_they_compute():
    """A subclass may end in an operation that needs its own result again."""

    class Exponential(nn.Linear):
        def forward(self, input):
            return super().forward(input).exp()

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4), Exponential(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model = adapted(base, target_modules=["0", "1", "3"], feedforward_modules=["3"]).double()
    inputs = torch.randn(3, 4, dtype=torch.float64)
    vectors = tuple(model.vectors("default").values())

    def by_definition(first, second, third):
        hidden = nn.functional.linear(inputs, base[0].weight, base[0].bias) * first.flatten()
        hidden = nn.functional.linear(hidden, base[1].weight, base[1].bias).exp() * second.flatten()
        return nn.functional.linear(hidden.relu() * third.flatten(), base[3].weight, base[3].bias)

    expected = torch.autograd.grad(by_definition(*vectors).square().sum(), vectors)
    found = torch.autograd.grad(model(inputs).square().sum(), vectors)
    for ours, want in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, want)


def test_attributes_come_from_the_base_model(tiny_llama):
    model = IA3Model(tiny_llama, IA3Config())
    assert model.config is tiny_llama.config
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing


def test_print_trainable_parameters(tiny_llama, make_model, capsys):
    IA3Model(tiny_llama, IA3Config()).print_trainable_parameters()
    ours = capsys.readouterr().out
    peft.get_peft_model(make_model("llama"), peft.IA3Config()).print_trainable_parameters()
    assert ours == capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:adapter 'first' was active")
def test_an_adapter_deleted_before_the_backward_pass_gets_its_gradients(tiny_llama):
    model = IA3Model(tiny_llama.train(), IA3Config(), "first")
    model.add_adapter("second", IA3Config())
    vectors = model.vectors("first").values()
    ids = torch.arange(6).reshape(2, 3)
    loss = model(input_ids=ids, labels=ids).loss
    model.delete_adapter("first")
    loss.backward()
    assert all(vector.grad is not None for vector in vectors)


# -- messages --------------------------------------------------------------------------------------
