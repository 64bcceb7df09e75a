"""Modules within torch's wrappers: they are called, and saved, as without them."""

import contextlib
import io

import peft
import pytest
import torch
from safetensors.torch import load_file
from support import pairs
from support.pairs import randomize, vectors
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import ia3
from ia3 import IA3Config, IA3Error, IA3Model, get_peft_model
from ia3.compat.peft import install, uninstall
from ia3.targets.resolve import linear_in_upper_blocks

FILES = ["adapter_config.json", "adapter_model.safetensors"]
IDS = torch.arange(3, 11)[None]


def compiled(module):
    return torch.compile(module, backend="eager")


def both(module):
    return compiled(checkpoint_wrapper(module))


def around_blocks(model, wrapper):
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = wrapper(layer)
    return model


def around_linear_layers(model, wrapper):
    linear = [name for name, m in model.named_modules() if type(m) is nn.Linear]
    for name in linear:
        model.set_submodule(name, wrapper(model.get_submodule(name)))
    return model


def around_all(model, wrapper):
    return wrapper(model)


def wrapped(*ways):
    return pytest.mark.parametrize(("around", "wrapper"), ways, ids=lambda given: given.__name__)


WAYS = [
    (around_blocks, checkpoint_wrapper),
    (around_blocks, compiled),
    (around_blocks, both),
    (around_linear_layers, checkpoint_wrapper),
    pytest.param(around_all, compiled, marks=pytest.mark.slow),
]
WRAPPED = wrapped(*WAYS)
FIRST = pytest.mark.parametrize("wrapped_first", [True, False], ids=["wrap first", "adapt first"])
# By suffix, by whole names, by an expression; modules saved whole; upper blocks alone.
WHOLE = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj"]
CHOICES = {
    "defaults": {},
    "all linear": {"target_modules": "all-linear"},
    "paper": {"paper_sites": True},
    "names": {"target_modules": WHOLE, "feedforward_modules": WHOLE[:1]},
    "expression": {
        "target_modules": r"model\.layers\.\d\.(self_attn\.k|mlp\.down)_proj",
        "feedforward_modules": r"model\.layers\.\d\.mlp\.down_proj",
    },
    "without one": {"exclude_modules": ["layers.0.mlp.down_proj"]},
    "saved whole": {"modules_to_save": ["layers.1.mlp.up_proj"]},
}
CHOSEN = pytest.mark.parametrize("choice", CHOICES)


def logits(model):
    return pairs.logits(model, input_ids=IDS)


def adapted(base, choice, around=None, wrapper=None, wrapped_first=False):
    """A model with an adapter of random values, within wrappers if there are any."""
    if wrapped_first:
        base = around(base, wrapper)
    model = get_peft_model(base, IA3Config(**CHOICES[choice]))
    if around is around_all and not wrapped_first:
        model.model = wrapper(model.model)
    elif around is not None and not wrapped_first:
        around(base, wrapper)
    randomize(model.vectors("default"))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ia3_l.default." in name:  # a copy of a module
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def files(model, folder):
    model.save_pretrained(folder)
    return {name: (folder / name).read_bytes() for name in FILES}


@WRAPPED
@FIRST
@CHOSEN
def test_what_is_saved_is_what_a_plain_model_saves(
    make_model, tmp_path, around, wrapper, wrapped_first, choice
):
    plain = adapted(make_model("llama"), choice)
    model = adapted(make_model("llama"), choice, around, wrapper, wrapped_first)
    assert list(model.vectors("default")) == list(plain.vectors("default"))
    assert files(model, tmp_path / "wrapped") == files(plain, tmp_path / "plain")
    expected = logits(plain)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    again = IA3Model.from_pretrained(make_model("llama"), tmp_path / "wrapped")
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)


@wrapped(*WAYS, (around_linear_layers, compiled))
@CHOSEN
def test_what_a_plain_model_saved_is_loaded_onto_a_wrapped_one(
    make_model, tmp_path, recwarn, around, wrapper, choice
):
    plain = adapted(make_model("llama"), choice)
    plain.save_pretrained(tmp_path)
    wrapped = around(make_model("llama"), wrapper)
    model = IA3Model.from_pretrained(wrapped, tmp_path)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)
    # In place, into an adapter that is there; its base model is known for the same.
    randomize(model.vectors("default"), seed=1)
    model.load_adapter(tmp_path, "default")
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)
    assert not [w for w in recwarn if "wrong base model" in str(w.message)]


@WRAPPED
def test_another_base_model_is_noticed_within_wrappers(make_model, tmp_path, around, wrapper):
    adapted(make_model("llama"), "defaults").save_pretrained(tmp_path)
    other = make_model("llama")
    nn.init.normal_(other.model.embed_tokens.weight)
    with pytest.warns(UserWarning, match=r"'model\.embed_tokens\.weight'"):
        IA3Model.from_pretrained(around(other, wrapper), tmp_path)


@WRAPPED
def test_explained_as_a_plain_model(make_model, around, wrapper):
    said = []
    for model in (make_model("llama"), around(make_model("llama"), wrapper)):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            ia3.explain(model, IA3Config(target_modules=["k_proj", "down_proj"]))
        said.append(out.getvalue())
    assert said[0] == said[1]


@WRAPPED
def test_entries_may_be_the_names_of_a_wrapped_models_modules(make_model, around, wrapper):
    wrapped = around(make_model("llama"), wrapper)
    names = {n for n, m in wrapped.named_modules() if type(m) is nn.Linear and "lm_head" not in n}
    down = {name for name in names if ".down_proj" in name}
    (saved,) = (name for name in names if ".1." in name and ".up_proj" in name)
    config = IA3Config(
        target_modules=names,
        feedforward_modules=down,
        exclude_modules=[name for name in names if "q_proj" in name],
        modules_to_save=[saved],
    )
    model = get_peft_model(wrapped, config)
    linear = [n for n, m in make_model("llama").named_modules() if type(m) is nn.Linear]
    left_out = ("lm_head", "q_proj", "1.mlp.up_proj")
    assert list(model.vectors("default")) == [n for n in linear if not n.endswith(left_out)]
    assert list(model.adapter("default").copies) == ["model.layers.1.mlp.up_proj.weight"]


@WRAPPED
@FIRST
def test_a_gathered_state_dict_is_read(make_model, around, wrapper, wrapped_first, tmp_path):
    model = adapted(make_model("llama"), "saved whole", around, wrapper, wrapped_first)
    gathered = {name: value + 1 for name, value in model.state_dict().items()}
    own = ia3.get_peft_model_state_dict(model)
    found = ia3.get_peft_model_state_dict(model, state_dict=gathered)
    model.save_pretrained(tmp_path, state_dict=gathered)
    saved = load_file(tmp_path / FILES[1])
    assert own.keys() == found.keys() == saved.keys()
    for name, value in own.items():
        assert torch.equal(found[name], value + 1)
        assert torch.equal(saved[name], value + 1)
    result = ia3.set_peft_model_state_dict(model, saved)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(
        ia3.get_peft_model_state_dict(model)["base_model.model.model.layers.0.mlp.down_proj.ia3_l"],
        saved["base_model.model.model.layers.0.mlp.down_proj.ia3_l"],
    )


@WRAPPED
@FIRST
def test_merged_and_unloaded_as_a_plain_model(make_model, around, wrapper, wrapped_first):
    plain = adapted(make_model("llama"), "saved whole").merge_and_unload()
    model = adapted(make_model("llama"), "saved whole", around, wrapper, wrapped_first)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(plain), rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in merged.parameters())


@WRAPPED
@FIRST
def test_trained_and_routed_as_a_plain_model(make_model, around, wrapper, wrapped_first):
    # Compiled functions of one source share a limit.
    torch._dynamo.reset()
    plain = adapted(make_model("llama"), "defaults")
    model = adapted(make_model("llama"), "defaults", around, wrapper, wrapped_first)
    for each in (plain, model):
        each.train()
        each(input_ids=IDS, labels=IDS).loss.backward()
    for name, vector in plain.vectors("default").items():
        found = model.vectors("default")[name].grad
        torch.testing.assert_close(found, vector.grad, rtol=1e-4, atol=1e-6)
    for each in (plain, model):
        each.eval()
        each.add_adapter("other", IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
        randomize(each.vectors("other"), seed=1)
    rows = IDS.repeat(3, 1)
    names = ["default", "__base__", "other"]
    with torch.no_grad():
        expected = plain(input_ids=rows, adapter_names=names).logits
        found = model(input_ids=rows, adapter_names=names).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrapper", [checkpoint_wrapper, compiled])
def test_a_saved_module_takes_its_copys_values_within_wrappers(wrapper):
    """Of the module and its copy, only the former was wrapped since."""
    head = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    base = nn.ModuleDict({"layer": nn.Linear(8, 8), "head": head})
    config = IA3Config(target_modules=["layer"], feedforward_modules=[], modules_to_save=["head"])
    model = IA3Model(base, config)
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.normal_()
    values = torch.randn(2, 8)
    expected = head(values)
    head[0] = wrapper(head[0])
    model.merge_and_unload()
    assert torch.equal(head(values), expected)


def test_what_peft_saved_of_a_wrapped_model_is_loaded(make_model, tmp_path):
    theirs = peft.get_peft_model(around_blocks(make_model("llama"), compiled), peft.IA3Config())
    randomize(vectors(theirs))
    expected = logits(theirs)
    theirs.save_pretrained(tmp_path)
    # PEFT writes the names as they are.
    assert all("_orig_mod" in key for key in load_file(tmp_path / FILES[1]))
    for base in (make_model("llama"), around_blocks(make_model("llama"), compiled)):
        ours = IA3Model.from_pretrained(base, tmp_path)
        torch.testing.assert_close(logits(ours), expected, rtol=1e-5, atol=1e-5)


def test_messages_name_modules_as_without_wrappers(make_model, tmp_path):
    wrapped = around_blocks(make_model("llama"), checkpoint_wrapper)
    model = get_peft_model(wrapped, IA3Config(modules_to_save=["layers.1.mlp.up_proj"]))
    with pytest.raises(IA3Error, match=r"'model\.layers\.1\.mlp\.up_proj'"):
        model(input_ids=IDS, adapter_names=["default"])
    with pytest.raises(IA3Error, match=r"has adapters already \(at 'model\.layers\.0\."):
        get_peft_model(wrapped, IA3Config())
    compiled_model = get_peft_model(compiled(make_model("gpt2")), IA3Config())
    compiled_model.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(IA3Error, match="LlamaForCausalLM"):
        IA3Model.from_pretrained(compiled(make_model("llama")), tmp_path / "gpt2")


def test_upper_blocks_within_wrappers(make_model):
    wrapped = around_blocks(make_model("llama"), both)
    assert linear_in_upper_blocks(wrapped, 1) == linear_in_upper_blocks(make_model("llama"), 1)


def test_fused_within_wrappers(make_model):
    plain, wrapped = adapted(make_model("llama"), "defaults"), make_model("llama")
    model = adapted(wrapped, "defaults", around_blocks, checkpoint_wrapper)
    assert model.fuse_mlp() == plain.fuse_mlp() == 2
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)


def test_wrapped_inside_peft(make_model, request):
    install()
    request.addfinalizer(uninstall)
    outputs = []
    for base in (make_model("llama"), around_blocks(make_model("llama"), checkpoint_wrapper)):
        model = peft.get_peft_model(base, peft.IA3Config(**CHOICES["names"]))
        for name, parameter in model.named_parameters():
            if "ia3_l" in name:
                nn.init.constant_(parameter, 1.4 if "mlp" in name else 1.3)
        outputs.append(logits(model))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
