"""This library's (IA)³ inside PEFT: as PEFT computes, and better where PEFT falls short."""

import copy
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from accelerate import cpu_offload
from peft.tuners.ia3 import IA3Layer
from peft.tuners.ia3.model import IA3Model as StockModel
from support.architectures import SIZES, build
from support.pairs import randomize, relative, vectors
from support.snapshots import weights
from support.tfew import random_model
from torch import nn
from transformers import LlamaConfig

import ia3
from ia3.compat import peft as integration
from ia3.errors import IA3Error

KINDS = ("llama", "gpt2", "t5")
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")


@pytest.fixture(autouse=True)
def always_uninstalled():
    yield
    integration.uninstall()


@pytest.fixture
def installed():
    integration.install()


def layers(model):
    return [module for module in model.modules() if isinstance(module, IA3Layer)]


def is_ours(model):
    (ours,) = {type(layer).__module__.startswith("ia3.") for layer in layers(model)}
    return ours


def adapt(base, adapters=("default",), **modules):
    """PEFT's model with random vectors, all adapters active."""
    model = peft.get_peft_model(base, peft.IA3Config(**modules), adapters[0])
    for adapter in adapters[1:]:
        model.add_adapter(adapter, peft.IA3Config(**modules))
    for seed, adapter in enumerate(adapters):
        randomize(vectors(model, adapter), seed)
    model.base_model.set_adapter(list(adapters))
    return model


def both(make, **modules):
    """(ours, PEFT's) on equal base models, with equal vectors."""
    integration.install()
    ours = adapt(make(), **modules)
    integration.uninstall()
    return ours, adapt(make(), **modules)


class Small(nn.Module):
    """One module of each kind, in a row; the same bits every time."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embedding = nn.Embedding(12, 6)
            self.conv1d = nn.Conv1d(6, 4, 3, padding=1)
            self.conv2d = nn.Conv2d(4, 8, (3, 1), groups=2)
            self.conv3d = nn.Conv3d(8, 6, 1)
            self.linear = nn.Linear(6, 5)

    def forward(self, ids):
        x = self.conv1d(self.embedding(ids).transpose(1, 2))
        x = self.conv3d(self.conv2d(x[..., None])[..., None])
        return self.linear(x.flatten(2).transpose(1, 2))


IDS = torch.arange(24).reshape(2, 12) % 12


# -- installing --------------------------------------------------------------------------------


def test_without_peft_the_error_names_the_extra():
    code = """if True:
        import sys
        import ia3.compat.peft as integration
        print("peft" in sys.modules)
        sys.modules["peft"] = None
        for verb in (integration.install, integration.uninstall):
            try:
                verb()
            except ImportError as error:
                print(error)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported, *errors = done.stdout.splitlines()
    assert imported == "False"
    assert len(errors) == 2
    assert all("pip install 'ia3[peft]'" in error for error in errors)


def test_round_trip_leaves_peft_as_it_was():
    def exposed():
        mappings = (peft.PEFT_TYPE_TO_TUNER_MAPPING, peft.PEFT_TYPE_TO_MIXED_MODEL_MAPPING)
        modules = (peft, peft.tuners, peft.tuners.ia3)
        return [dict(mapping) for mapping in mappings] + [vars(m)["IA3Model"] for m in modules]

    before = exposed()
    integration.install()
    installed = exposed()
    assert installed != before
    assert issubclass(peft.IA3Model, StockModel)
    assert peft.IA3Model is not StockModel
    integration.install()
    assert exposed() == installed
    for _ in range(2):
        integration.uninstall()
        assert exposed() == before


def test_only_other_versions_of_peft_are_warned_about(installed, monkeypatch, recwarn):
    assert not recwarn.list
    monkeypatch.setattr(peft, "__version__", "0.210.0")
    with pytest.warns(UserWarning, match=r"tested with peft 0\.20 and 0\.21, this is 0\.210\.0"):
        integration.install()


def test_models_made_before_and_meanwhile_stay_as_they_are(make_model, make_inputs):
    inputs = make_inputs("llama")
    old = adapt(make_model("llama"), task_type="CAUSAL_LM")
    logits = old(**inputs).logits
    integration.install()
    old.add_adapter("second", peft.IA3Config(task_type="CAUSAL_LM"))
    assert not is_ours(old)
    assert torch.equal(old(**inputs).logits, logits)
    pickle.loads(pickle.dumps(old))
    new = adapt(make_model("llama"), task_type="CAUSAL_LM")
    assert is_ours(new)
    assert isinstance(new.base_model, StockModel)
    assert is_ours(peft.IA3Model(make_model("llama"), peft.IA3Config(), "default"))
    integration.uninstall()
    new.add_adapter("second", peft.IA3Config(task_type="CAUSAL_LM"))
    assert is_ours(new)
    assert relative(new(**inputs).logits, logits) < 1e-6
    assert not is_ours(adapt(make_model("llama"), task_type="CAUSAL_LM"))


# -- computing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters", [("default",), ("default", "second")])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_equal_pefts(kind, adapters, make_model, make_inputs):
    ours, pefts = both(lambda: make_model(kind), adapters=adapters)
    assert is_ours(ours)
    assert not is_ours(pefts)
    inputs = make_inputs(kind)
    results = [model(**inputs) for model in (ours, pefts)]
    assert relative(results[0].logits, results[1].logits) < 1e-6
    for result in results:
        result.loss.backward()
    expected = {name: p.grad for name, p in pefts.named_parameters() if p.requires_grad}
    assert len(expected) == len(adapters) * {"llama": 6, "gpt2": 4, "t5": 16}[kind]
    for name, parameter in ours.named_parameters():
        assert parameter.requires_grad == (name in expected)
        if parameter.requires_grad:
            assert relative(parameter.grad, expected[name]) < 1e-6, name


@pytest.mark.parametrize("feedforward", [[], ["linear", "conv2d", "conv3d"]])
def test_every_kind_of_module_equals_peft(feedforward):
    names = ["linear", "conv2d", "conv3d"]
    ours, pefts = both(Small, target_modules=names, feedforward_modules=feedforward)
    assert relative(ours(IDS), pefts(IDS)) < 1e-6
    ours.merge_adapter()
    assert relative(ours(IDS), pefts(IDS)) < 1e-6


def test_modules_that_peft_refuses():
    for refused in (["embedding"], ["conv1d"]):
        with pytest.raises((ValueError, AttributeError)):
            adapt(Small(), target_modules=refused, feedforward_modules=[])
    modules = {"target_modules": ["embedding", "conv1d"], "feedforward_modules": ["conv1d"]}
    integration.install()
    ours = adapt(Small(), **modules)
    small, found = Small(), vectors(ours)
    # Both vectors meet between the two modules, so that the product is the embedding's alone.
    small.embedding.weight.data *= found["embedding"].flatten() * found["conv1d"].flatten()
    assert relative(ours(IDS), small(IDS)) < 1e-6
    ours.merge_adapter()
    assert relative(ours(IDS), small(IDS)) < 1e-6


class Encoder(nn.Module):
    """PyTorch's own layers, which in evaluation read the weights of linear1 and linear2."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
            self.alone, self.stack = layer, nn.TransformerEncoder(layer, 2)

    def forward(self, x, padding=None):
        return self.stack(self.alone(x, src_key_padding_mask=padding), src_key_padding_mask=padding)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("feedforward", [[], ["linear1", "linear2"]])
def test_the_fast_path_of_evaluation_has_the_vectors(installed, feedforward, merged, padded):
    model = adapt(
        Encoder(), target_modules=["linear1", "linear2"], feedforward_modules=feedforward
    ).eval()
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    padding = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 5]) if padded else None
    plain, vector_of = Encoder().eval(), vectors(model)
    for name, vector in vector_of.items():
        linear = plain.get_submodule(name)
        if feedforward:
            linear.weight.data *= vector.detach().reshape(1, -1)
        else:
            linear.weight.data *= vector.detach().reshape(-1, 1)
            linear.bias.data *= vector.detach().flatten()
    with torch.no_grad():
        if merged:
            model.merge_adapter()
        assert relative(model(x, padding), plain(x, padding)) < 1e-5


def test_a_hook_on_the_base_module_sees_its_own_output(installed, tiny_llama):
    ids = torch.arange(3, 12)[None]
    plain = tiny_llama.model.layers[0].self_attn.v_proj
    seen = []
    plain.register_forward_hook(lambda module, args, output: seen.append(output))
    tiny_llama(ids)
    expected = seen.pop().clone()
    adapt(tiny_llama, target_modules=["v_proj"], feedforward_modules=[])(ids)
    assert torch.equal(seen[0], expected)


def test_one_module_cannot_be_rescaled_on_both_sides(installed):
    model = adapt(Small(), target_modules=["linear"], feedforward_modules=[])
    config = peft.IA3Config(target_modules=["linear"], feedforward_modules=["linear"])
    with pytest.raises(IA3Error, match=r"'linear': this adapter rescales its input.*its output"):
        model.add_adapter("second", config)
    assert list(model.peft_config) == ["default"]


def test_a_module_that_cannot_be_rescaled_leaves_the_model_unwrapped():
    def make():
        return nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.LayerNorm(2), "c": nn.Linear(2, 2)})

    config = peft.IA3Config(target_modules=["a", "b", "c"], feedforward_modules=[])
    stock, ours = make(), make()
    with pytest.raises(ValueError, match="not supported"):
        peft.get_peft_model(stock, config)
    assert layers(stock)
    integration.install()
    with pytest.raises(IA3Error, match=r"'b' is a LayerNorm, whose output cannot be rescaled"):
        peft.get_peft_model(ours, config)
    assert type(ours["a"]) is nn.Linear


# -- merging -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_unmerging_restores_the_bits_where_peft_does_not(kind, dtype, make_model):
    restored = []
    for model in both(lambda: make_model(kind).to(dtype), adapters=("default", "second")):
        before = weights(model)
        model.merge_adapter()
        assert weights(model) != before
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.unmerge_adapter()
        inaccurate = any("inaccurate" in str(warning.message) for warning in caught)
        restored.append((weights(model) == before, inaccurate))
    assert restored == [(True, False), (False, True)]


@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_unmerged(installed, kind, make_model, make_inputs):
    inputs = make_inputs(kind)
    base = make_model(kind)
    names = dict(base.named_modules())
    model = adapt(base, adapters=("default", "second"))
    with torch.no_grad():
        expected = model(**inputs).logits
        model.merge_adapter(["second"])
        with pytest.warns(UserWarning, match="additionally merging default"):
            model.merge_adapter()
        assert relative(model(**inputs).logits, expected) < 1e-6
        model.unmerge_adapter()
        assert torch.equal(model(**inputs).logits, expected)
        merged = model.merge_and_unload(safe_merge=True)
        assert relative(merged(**inputs).logits, expected) < 1e-6
    assert dict(merged.named_modules()) == names
    assert not any("ia3" in attribute for m in merged.modules() for attribute in vars(m))


@pytest.mark.filterwarnings("ignore:Unmerge result")
def test_disabling_unmerges(make_model, make_inputs):
    inputs = make_inputs("llama")
    base = make_model("llama")(**inputs).logits
    exact = []
    for model in both(lambda: make_model("llama")):
        model.merge_adapter()
        with model.disable_adapter():
            exact.append(torch.equal(model(**inputs).logits, base))
    assert exact == [True, False]


def test_a_layer_alone_is_merged(make_model, make_inputs):
    """As others do that walk over PEFT's layers, such as diffusers where it fuses adapters."""
    inputs = make_inputs("llama")
    for model in both(lambda: make_model("llama"), adapters=("default", "second")):
        before, expected = weights(model), model(**inputs).logits
        chosen = layers(model)[1::2]
        for layer in chosen:
            layer.merge(adapter_names=["default"])
            layer.merge()
            assert layer.merged_adapters == ["default", "second"]
        assert relative(model(**inputs).logits, expected) < 1e-6
        if is_ours(model):
            model.add_adapter("third", peft.IA3Config())
            model.base_model.set_adapter(["default", "second"])
            model.merge_adapter()
            assert relative(model(**inputs).logits, expected) < 1e-6
            with pytest.raises(IA3Error, match="unmerge_adapter"):
                chosen[0].merge(adapter_names=["third"])
            model.unmerge_adapter()
            assert weights(model) == before
            chosen[0].merge()
            with model.disable_adapter():
                assert torch.equal(model(**inputs).logits, make_model("llama")(**inputs).logits)
            chosen[0].merge()
            chosen[0].unmerge()
            assert weights(model) == before


def test_other_adapters_are_set_and_layers_disabled_while_merged(make_model, make_inputs):
    """PEFT unmerges layer by layer then."""
    inputs = make_inputs("llama")
    integration.install()
    model = adapt(make_model("llama"), adapters=("default", "second"))
    model.set_adapter("second")
    expected, base = model(**inputs).logits, make_model("llama")(**inputs).logits
    before = weights(model)
    model.set_adapter("default")
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("second")
    assert torch.equal(model(**inputs).logits, expected)
    assert weights(model) == before
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.merge_adapter()
        for layer in layers(twin):
            layer.enable_adapters(False)
        assert torch.equal(twin(**inputs).logits, base)
        assert weights(twin) == before
    merged = adapt(make_model("llama"))
    merged.merge_adapter()
    twin, before = copy.deepcopy(merged), weights(merged)
    layers(twin)[0].unmerge()
    assert not any(layer.merged for layer in layers(twin))
    assert weights(merged) == before != weights(twin)


def test_what_is_merged_alone_stays_so_where_merging_the_model_fails(installed, tiny_llama):
    model = adapt(tiny_llama)
    layers(model)[0].merge()
    before = weights(model)
    layers(model)[-1].ia3_l["default"].data[0] = float("nan")
    with pytest.raises(IA3Error, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert weights(model) == before
    assert [layer.merged for layer in layers(model)] == [True] + [False] * 5


@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_errors_of_safe_merge_have_pefts_words(value):
    """People match on them."""
    said = []
    for model in both(Small, target_modules=["linear"], feedforward_modules=[]):
        layer = layers(model)[0]
        before = weights(model)
        layer.ia3_l["default"].data.fill_(value if value != value else 2)
        if value == value:
            layer.get_base_layer().bias.data.fill_(value)
            before = weights(model)
        with pytest.raises(ValueError, match="NaNs detected in the merged") as raised:
            layer.merge(safe_merge=True)
        said.append(str(raised.value).split(":")[0])
        assert layer.merged_adapters == []
        assert weights(model) == before
    assert said[0] == said[1]


def test_what_is_active_on_layers_alone_is_merged(make_model, make_inputs):
    """Other libraries' `set_adapter` go to the layers, and PEFT's model does not hear of it."""
    inputs = make_inputs("llama")
    for model in both(lambda: make_model("llama"), adapters=("default", "second")):
        model.set_adapter("default")
        for layer in layers(model)[::2]:
            layer.set_adapter(["default", "second"])
        expected = model(**inputs).logits
        model.merge_adapter()
        assert relative(model(**inputs).logits, expected) < 1e-6
        assert layers(model)[0].merged_adapters == ["default", "second"]
        assert layers(model)[1].merged_adapters == ["default"]


@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_merge_changes_nothing_where_peft_merges_half(value, verb, make_model):
    changed = []
    for model in both(lambda: make_model("llama")):
        model.base_model.model.model.layers[1].mlp.down_proj.ia3_l["default"].data[0, 3] = value
        before = weights(model)
        merge = getattr(model, verb)
        with pytest.raises(ValueError, match=r"NaNs detected|\['default'\].*are not finite"):
            merge(safe_merge=True)
        changed.append(weights(model) != before)
        if not changed[-1]:
            assert not any(layer.merged for layer in layers(model))
    assert changed == [False, True]


def test_a_weight_that_another_module_shares_is_not_merged_into(make_model):
    base = make_model("gpt2")
    assert base.lm_head.weight is base.transformer.wte.weight
    integration.install()
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = adapt(base, target_modules=["lm_head", "c_attn"], feedforward_modules=[])
    before = weights(model)
    with pytest.raises(IA3Error, match=r"lm_head.*'transformer\.wte' shares"):
        model.merge_and_unload()
    assert weights(model) == before


def test_weights_under_another_kind_of_adapter_are_not_merged_into(installed, tiny_llama):
    lora = peft.get_peft_model(tiny_llama, peft.LoraConfig(target_modules=["k_proj"]))
    with pytest.raises(IA3Error, match=r"k_proj'.* another kind of adapter is between"):
        adapt(lora, target_modules=["k_proj"], feedforward_modules=[]).merge_adapter()


def test_weights_that_accelerate_offloads(make_model, make_inputs):
    inputs = make_inputs("llama")
    base = make_model("llama")(**inputs).logits
    integration.install()
    expected = adapt(make_model("llama"))(**inputs).logits
    offloaded = cpu_offload(make_model("llama"), execution_device=torch.device("cpu"))
    assert offloaded.model.layers[0].self_attn.k_proj.weight.is_meta
    model = adapt(offloaded)
    assert relative(model(**inputs).logits, expected) < 1e-6
    model.merge_adapter()
    assert relative(model(**inputs).logits, expected) < 1e-6
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, base)
    merged = model.merge_and_unload()
    assert relative(merged(**inputs).logits, expected) < 1e-6


# -- quantized weights -------------------------------------------------------------------------


def quantized_llama(bits):
    """Loaded in 4 or 8 bits, as transformers marks it."""
    bnb = pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2}
    model = random_model(LlamaConfig(**{**SIZES, **sizes}))
    kind, own = {
        4: (bnb.nn.Linear4bit, {"compute_dtype": torch.float32}),
        8: (bnb.nn.Linear8bitLt, {"has_fp16_weights": False}),
    }[bits]
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            packed = kind(module.in_features, module.out_features, bias=False, **own)
            packed.load_state_dict(module.state_dict())
            model.model.layers.set_submodule(name, packed.to("cpu"))
    setattr(model, f"is_loaded_in_{bits}bit", True)
    return model


# up_proj takes its own vector and the one of down_proj's input.
UP_AND_DOWN = {"target_modules": ["up_proj", "down_proj"], "feedforward_modules": ["down_proj"]}


@pytest.mark.quantized
@pytest.mark.parametrize("modules", [{}, UP_AND_DOWN], ids=["defaults", "both"])
@pytest.mark.parametrize("bits", [4, 8])
def test_merging_into_quantized_weights(bits, modules):
    ours, pefts = both(lambda: quantized_llama(bits), **modules)
    with pytest.raises(ValueError, match=f"{bits}-bit"):
        pefts.merge_and_unload()
    ids = torch.arange(3, 15).reshape(2, 6)
    # With gradients: without them, bitsandbytes rounds 4-bit constants to bfloat16 on a CPU.
    expected = ours(ids).logits
    ours.merge_adapter(safe_merge=True)
    assert all(layer.merged for layer in layers(ours))
    assert relative(ours(ids).logits, expected) < 1e-6
    ours.unmerge_adapter()
    assert torch.equal(ours(ids).logits, expected)
    merged = ours.merge_and_unload()
    assert relative(merged(ids).logits, expected) < 1e-6
    assert type(merged.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes.")


@pytest.mark.quantized
def test_an_input_vector_that_quantized_weights_cannot_take(installed):
    modules = {"target_modules": ["o_proj"], "feedforward_modules": ["o_proj"]}
    model = adapt(quantized_llama(4), **modules)
    with pytest.raises(IA3Error, match=r"o_proj.*columns.*no layer before it .* instead$"):
        model.merge_adapter()
    assert not any(layer.merged for layer in layers(model))


# -- which modules -----------------------------------------------------------------------------


def test_a_default_that_matches_nothing_is_replaced(tmp_path):
    stock = adapt(build("mixtral"))
    assert not any("experts" in name for name in vectors(stock))
    integration.install()
    with pytest.warns(UserWarning, match=r"\['w2'\].*matches nothing.*experts"):
        model = adapt(build("mixtral"))
    shapes = [tuple(v.shape) for name, v in vectors(model).items() if "experts" in name]
    assert shapes == [(4, 48), (4, 48)]
    ids = torch.arange(3, 15).reshape(2, 6)
    result = model(ids, labels=ids)
    result.loss.backward()
    assert all(vector.grad.norm() > 0 for vector in vectors(model).values())
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build("mixtral"), tmp_path)
    assert torch.equal(again(ids).logits, result.logits)
    own = ia3.IA3Model.from_pretrained(build("mixtral"), tmp_path)
    assert relative(own(ids).logits, result.logits) < 1e-6
    model.merge_adapter()
    assert relative(model(ids).logits, result.logits) < 1e-6
    model.unmerge_adapter()
    assert torch.equal(model(ids).logits, result.logits)
    assert relative(model.merge_and_unload()(ids).logits, result.logits) < 1e-6


@pytest.mark.filterwarnings("ignore:.*matches nothing:UserWarning")
def test_several_threads_call_experts(make_inputs):
    integration.install()
    model = adapt(build("mixtral")).eval()
    randomize(vectors(model))
    inputs = make_inputs("mixtral")

    def call(_: int) -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs).logits  # type: ignore[no-any-return]

    expected = call(0)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, expected) for found in pool.map(call, range(20)))


def test_a_config_of_defaults_can_be_read_again(make_model, tmp_path):
    # The feed-forward default (wo) is not among the targets.
    ours, pefts = both(lambda: make_model("t5"), target_modules=["k", "v"])
    pefts.save_pretrained(tmp_path / "peft")
    with pytest.raises(ValueError, match="subset"):
        peft.PeftConfig.from_pretrained(tmp_path / "peft")
    ours.save_pretrained(tmp_path / "ours")
    config = peft.PeftConfig.from_pretrained(tmp_path / "ours")
    assert config.target_modules == {"k", "v"}
    assert not config.feedforward_modules


def test_an_architecture_that_peft_does_not_know(tiny_llama):
    class NewcomerConfig(LlamaConfig):
        model_type = "newcomer"

    tiny_llama.config = NewcomerConfig(**tiny_llama.config.to_dict())
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        peft.get_peft_model(tiny_llama, peft.IA3Config())
    integration.install()
    model = peft.get_peft_model(tiny_llama, peft.IA3Config())
    assert model.peft_config["default"].target_modules == {"k_proj", "v_proj", "down_proj"}
    assert model.peft_config["default"].feedforward_modules == {"down_proj"}


def test_choices_that_are_left_to_the_caller(installed, tiny_gpt2):
    with pytest.raises(IA3Error, match=r"no default target_modules.*\(Small\).*no attention"):
        peft.get_peft_model(Small(), peft.IA3Config())
    tiny_gpt2.config.model_type = "newcomer"
    with pytest.raises(IA3Error, match=r"c_attn' holds queries .*target_modules"):
        peft.get_peft_model(tiny_gpt2, peft.IA3Config())


# -- files and other libraries -----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_files_move_both_ways(kind, make_model, make_inputs, tmp_path):
    inputs = make_inputs(kind)
    ours, pefts = both(lambda: make_model(kind))
    expected = pefts(**inputs).logits
    folders = tmp_path / "ours", tmp_path / "peft"
    ours.save_pretrained(folders[0])
    pefts.save_pretrained(folders[1])
    pefts_own, own = peft.PeftModel.from_pretrained, ia3.IA3Model.from_pretrained
    for folder in folders:
        read = [pefts_own(make_model(kind), folder), own(make_model(kind), folder)]
        integration.install()
        read.append(pefts_own(make_model(kind), folder))
        integration.uninstall()
        for model in read:
            assert relative(model(**inputs).logits, expected) < 1e-6
    configs = [peft.PeftConfig.from_pretrained(folder).to_dict() for folder in folders]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("name", ["mlp", "layers", "k_proj", "ia3_l", "model"])
def test_an_adapter_with_the_name_of_a_module_costs_no_vector(name, make_model, tmp_path):
    config = {"task_type": "CAUSAL_LM", "modules_to_save": ["lm_head"]}
    models = []
    for library in (peft, ia3):
        integration.install()
        model = library.get_peft_model(make_model("llama"), library.IA3Config(**config))
        model.add_adapter(name, library.IA3Config(**config))
        for seed, adapter in enumerate(("default", name)):
            randomize(vectors(model, adapter), seed)
        models.append(model)
        expected = {adapter: vectors(model, adapter) for adapter in ("default", name)}
        for adapter, theirs in expected.items():
            found = peft.get_peft_model_state_dict(model, adapter_name=adapter)
            keys = {f"base_model.model.{module}.ia3_l": module for module in theirs}
            assert {key for key in found if key.endswith("ia3_l")} == set(keys)
            assert all(torch.equal(found[key], theirs[module]) for key, module in keys.items())
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / str(number))
        for library in (peft, ia3):
            again = library.PeftModel.from_pretrained(make_model("llama"), tmp_path / str(number))
            again.load_adapter(tmp_path / str(number) / name, name)
            for adapter, theirs in expected.items():
                found = vectors(again, adapter)
                assert all(torch.equal(found[module], v) for module, v in theirs.items())


def test_transformers_own_adapters(make_model, make_inputs, tmp_path):
    inputs = make_inputs("llama")
    base = make_model("llama")(**inputs).logits
    expected = adapt(make_model("llama"))(**inputs).logits
    integration.install()
    model = make_model("llama")
    model.add_adapter(peft.IA3Config())
    assert is_ours(model)
    randomize(vectors(model))
    assert relative(model(**inputs).logits, expected) < 1e-6
    model.disable_adapters()
    assert torch.equal(model(**inputs).logits, base)
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    loaded = make_model("llama")
    loaded.load_adapter(str(tmp_path))
    loaded.load_adapter(str(tmp_path), adapter_name="second")
    assert is_ours(loaded)
    loaded.set_adapter(["default", "second"])
    assert relative(loaded(**inputs).logits, expected) > 1e-3
    loaded.delete_adapter("default")
    loaded.set_adapter("second")
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_copies_and_pickles(installed, make_model, make_inputs):
    inputs = make_inputs("t5")
    model = adapt(make_model("t5"))
    expected = model(**inputs).logits
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    model.merge_adapter()
    twins += [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in twins:
        assert is_ours(twin)
        assert relative(twin(**inputs).logits, expected) < 1e-6
        twin.unmerge_adapter()
        assert torch.equal(twin(**inputs).logits, expected)
    assert all(layer.merged for layer in layers(model))


def test_compiled_without_a_break(installed, make_model, make_inputs):
    inputs = {k: v for k, v in make_inputs("llama").items() if k != "labels"}
    model = adapt(make_model("llama"))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert relative(compiled(**inputs).logits, model(**inputs).logits) < 1e-6


class Attention(nn.Module):
    """Attention whose output projection torch reads without calling it."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(self.attention(x, x, x)[0])


@pytest.mark.parametrize("targets", ["all-linear", ["out_proj", "fc"]])
def test_vectors_that_never_had_an_effect_are_left_out(targets, tmp_path):
    modules = {"target_modules": targets, "feedforward_modules": []}
    theirs = adapt(Attention(), **modules)
    theirs.save_pretrained(tmp_path)
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    integration.install()
    loaded = peft.PeftModel.from_pretrained(Attention(), tmp_path)
    torch.testing.assert_close(loaded(x), theirs(x), rtol=1e-5, atol=1e-6)
    assert [name for name in vectors(loaded, "default") if "out_proj" in name] == []
    new = adapt(Attention(), **modules)
    merged = copy.deepcopy(new).merge_and_unload()
    torch.testing.assert_close(merged(x), new(x), rtol=1e-5, atol=1e-6)


def test_an_expression_that_takes_res_matcher_forever_takes_a_moment(installed, make_model):
    """PEFT asks Python's `re` again for each module that this library has matched."""
    slow = r"(?:[\w.]+)+!"
    modules = {"target_modules": ["k_proj"], "feedforward_modules": slow, "exclude_modules": slow}
    model = peft.get_peft_model(make_model("llama"), peft.IA3Config(**modules))
    assert len(layers(model)) == 2
    longer = modules | {"exclude_modules": r"(?:[\w.]|[\w.][\w.]|[\w.]{3})+[^\w.]"}
    base = make_model("llama")
    with pytest.raises(IA3Error, match=r"exclude_modules: the expression .* takes longer"):
        peft.get_peft_model(base, peft.IA3Config(**longer))
