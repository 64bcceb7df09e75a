"""Models that have something done to them first: compiled layers, LoRA, layers without sizes."""

import copy

import peft
import pytest
import torch
from support.pairs import adapted, logits, randomize, relative
from support.snapshots import assert_unchanged, snapshot
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

import ia3
from ia3 import IA3Config, IA3Error, IA3Model
from ia3.targets.resolve import linear_in_upper_blocks
from ia3.targets.structure import paper_targets

CHOICES = [IA3Config(), IA3Config(target_modules="all-linear"), IA3Config(paper_sites=True)]


def clean(names):
    return {name.replace("._orig_mod", "") for name in names}


# -- compiled --------------------------------------------------------------------------------------


def classifier():
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "pad_token_id": 0}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForSequenceClassification(LlamaConfig(**sizes, **layers)).eval()


def compile_parts(model, parts):
    for name in parts:
        part = model.get_submodule(name)
        model.set_submodule(name, torch.compile(part, backend="eager"))
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
@pytest.mark.parametrize("choice", range(len(CHOICES)))
@pytest.mark.parametrize(
    "parts", [["model.layers.0", "model.layers.1"], ["score"], ["model.layers.0.mlp", "score"]]
)
def test_a_model_with_compiled_parts_gets_the_same_vectors(task, choice, parts):
    torch.compiler.reset()
    config = copy.deepcopy(CHOICES[choice])
    config.task_type = task
    plain = IA3Model(classifier(), copy.deepcopy(config))
    model = IA3Model(compile_parts(classifier(), parts), config)
    assert clean(model.vectors("default")) == plain.vectors("default").keys()
    for name, vector in model.vectors("default").items():
        with torch.no_grad():
            vector.copy_(torch.linspace(0.5, 2, vector.numel()).reshape(vector.shape))
            plain.vectors("default")[name.replace("._orig_mod", "")].copy_(vector)
    inputs = {"input_ids": torch.arange(2, 14).reshape(2, 6)}
    expected = logits(plain, **inputs)
    assert relative(logits(model, **inputs), expected) < 1e-6
    model.merge_adapter()
    assert relative(logits(model, **inputs), expected) < 1e-5


# -- LoRA ------------------------------------------------------------------------------------------

LORA = {"q_proj", "v_proj", "up_proj", "down_proj"}


def with_lora(base, targets=LORA):
    return peft.get_peft_model(
        base, peft.LoraConfig(target_modules=targets, init_lora_weights=False, r=4)
    ).eval()


@pytest.mark.parametrize("choice", range(len(CHOICES)))
def test_a_layer_with_lora_is_one_target_whose_whole_output_is_rescaled(
    make_model, make_inputs, choice
):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        lora = with_lora(make_model("llama"))
    merged = copy.deepcopy(lora).merge_and_unload()
    model = IA3Model(lora.get_base_model(), CHOICES[choice])
    expected = IA3Model(merged, CHOICES[choice])
    assert model.vectors("default").keys() == expected.vectors("default").keys()
    for one in (model, expected):
        randomize(one.vectors("default"))
    inputs = make_inputs("llama")
    found = logits(model, **inputs)
    assert relative(found, logits(expected, **inputs)) < 1e-5

    before = snapshot(model)
    message = r"another adapter is between .*lora\.layer\.Linear.*merge that first"
    with pytest.raises(IA3Error, match=message):
        model.merge_adapter()
    assert_unchanged(model, before)
    assert torch.equal(logits(model, **inputs), found)


def test_upper_blocks_and_feed_forward_layers_with_lora(make_model):
    plain, lora = make_model("llama"), with_lora(make_model("llama")).get_base_model()
    assert linear_in_upper_blocks(lora, 1) == linear_in_upper_blocks(plain, 1)

    def block():
        attention = {name: nn.Linear(8, 8) for name in ("q_proj", "k_proj", "v_proj")}
        mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        return nn.ModuleDict({"attention": nn.ModuleDict(attention), "mlp": mlp})

    def base():
        return nn.ModuleDict({"blocks": nn.ModuleList([block(), block()]), "head": nn.Linear(8, 2)})

    # Here the down projection is told by its sizes alone.
    targets = r".*(k_proj|mlp\.\d)"
    config = peft.LoraConfig(
        target_modules=targets, exclude_modules=r".*1", modules_to_save=["head"]
    )
    lora = peft.get_peft_model(base(), config).base_model.model
    found = paper_targets(lora)
    assert [(t.name, t.side) for t in found] == [(t.name, t.side) for t in paper_targets(base())]
    # The copy of the head that is in training is PEFT's.
    names = list(IA3Model(lora, IA3Config(target_modules="all-linear")).vectors("default"))
    plain = IA3Model(base(), IA3Config(target_modules="all-linear")).vectors("default")
    assert names == [name for name in plain if name != "head"]


# -- lazy ------------------------------------------------------------------------------------------


def lazy():
    return nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 4))


@pytest.mark.parametrize("targets", ["all-linear", ["0"], ["2"]])
def test_a_model_whose_sizes_are_not_known_is_refused_until_its_first_call(targets):
    base, values = lazy(), torch.linspace(-1, 1, 6).reshape(2, 3)
    config = IA3Config(target_modules=targets, feedforward_modules=[])
    hooks = [len(module._forward_pre_hooks) for module in base.modules()]
    for refused in (IA3Model, ia3.explain):
        with pytest.raises(IA3Error, match=r"'0' is a LazyLinear.* call the model once"):
            refused(base, config)
    assert not any("ia3_l" in name for name, _ in base.named_modules())
    assert hooks == [len(module._forward_pre_hooks) for module in base.modules()]
    base(values)
    model = adapted(base, target_modules=targets, feedforward_modules=[])
    with torch.no_grad():
        expected = model(values)
        model.merge_adapter()
        assert relative(model(values), expected) < 1e-6
