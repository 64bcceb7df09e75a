"""Which modules a config chooses: PEFT's rules, and errors that say what to change."""

import dataclasses
import warnings

import peft
import pytest
import torch
from peft.utils import constants as of_peft
from support.pairs import vectors
from support.snapshots import assert_unchanged, snapshot
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from ia3 import IA3Config, IA3Error, IA3Model
from ia3.targets.architectures import ARCHITECTURES


def ours(model, **config):
    """Module name -> shape of its vector."""
    found = vectors(IA3Model(model, IA3Config(**config)))
    return {name: tuple(vector.shape) for name, vector in found.items()}


def theirs(model, **config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Conv1D and fan_in_fan_out
        peft_model = peft.get_peft_model(model, peft.IA3Config(**config))
    return {name: tuple(vector.shape) for name, vector in vectors(peft_model).items()}


CHOICES = [
    ("llama", {}),
    ("gpt2", {}),
    ("t5", {}),
    # lists: last parts, dotted suffixes, whole names
    ("llama", {"target_modules": ["q_proj", "up_proj"], "feedforward_modules": []}),
    ("llama", {"target_modules": ["mlp.down_proj"], "feedforward_modules": ["mlp.down_proj"]}),
    ("llama", {"target_modules": ["model.layers.1.self_attn.q_proj"], "feedforward_modules": []}),
    ("gpt2", {"target_modules": ["c_proj"], "feedforward_modules": []}),
    ("t5", {"target_modules": ["SelfAttention.q", "o"], "feedforward_modules": []}),
    # the feed-forward modules not given
    ("llama", {"target_modules": ["k_proj"]}),
    ("llama", {"target_modules": ["model.layers.0.mlp.down_proj", "v_proj"]}),
    ("gpt2", {"target_modules": ["c_proj"]}),
    ("t5", {"target_modules": ["DenseReluDense.wo", "wi_1"]}),
    # a feed-forward entry that is the end of other targets' names
    ("t5", {"target_modules": ["o", "wo", "k"], "feedforward_modules": ["o"]}),
    # regular expressions
    ("llama", {"target_modules": r".*\.(k_proj|v_proj)", "feedforward_modules": []}),
    ("llama", {"target_modules": r".*_proj"}),
    ("llama", {"target_modules": r".*layers\.1\..*_proj", "feedforward_modules": r".*down_proj"}),
    ("t5", {"target_modules": r".*decoder.*EncDecAttention\.(k|v)$", "feedforward_modules": []}),
    # every linear layer
    ("llama", {"target_modules": "all-linear"}),
    ("gpt2", {"target_modules": "all-linear"}),
    ("t5", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": "All-Linear", "feedforward_modules": []}),
    # exclusions
    ("llama", {"exclude_modules": ["layers.0.self_attn.k_proj"]}),
    ("t5", {"exclude_modules": r"encoder\..*"}),
    ("gpt2", {"target_modules": "all-linear", "exclude_modules": ["attn.c_proj"]}),
]


@pytest.mark.parametrize(("kind", "config"), CHOICES)
def test_same_modules_and_shapes_as_peft(make_model, kind, config):
    expected = theirs(make_model(kind), **config)
    assert expected
    assert ours(make_model(kind), **config) == expected


def classifier():
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_labels": 3}
    config = BertConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)
    return BertForSequenceClassification(config)


def test_all_linear_leaves_out_a_classifier():
    choice = {"target_modules": "all-linear", "task_type": "SEQ_CLS"}
    found = ours(classifier(), **choice)
    # PEFT trains the classifier itself in full; what it rescales is the same.
    assert found == theirs(classifier(), **choice)
    assert "classifier" not in found


def test_all_linear_of_a_classifier_that_has_a_method_called_score():
    class Scoring(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.classifier = nn.Linear(4, 4), nn.Linear(4, 2)

        def score(self):
            """As scikit-learn's estimators have one."""

    config = {"target_modules": "all-linear", "feedforward_modules": [], "task_type": "SEQ_CLS"}
    assert ours(Scoring(), **config) == {"body": (4, 1)}


def test_modules_are_not_looked_for_in_the_copies_of_another_adapter():
    """Whose names are no module's of the base model."""
    layer, config = "encoder.layer.1", IA3Config(paper_sites=True)
    expected = vectors(IA3Model(classifier(), config)).keys()
    saved = IA3Config(target_modules=["pooler.dense"], modules_to_save=[layer])
    model = IA3Model(classifier(), saved)
    with pytest.raises(IA3Error, match=rf"is part of '.*{layer}', which another adapter on this"):
        model.add_adapter("other", config)
    model.add_adapter("other", dataclasses.replace(config, exclude_modules=rf".*{layer}\..*"))
    assert {name for name in expected if layer not in name} == model.vectors("other").keys()


def test_defaults_are_pefts():
    targets = of_peft.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    feedforward = of_peft.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    assert {kind: list(both[0]) for kind, both in ARCHITECTURES.items()} == targets
    assert {kind: list(both[1]) for kind, both in ARCHITECTURES.items()} == feedforward


def test_defaults_are_written_into_the_adapters_config(tiny_t5):
    config = IA3Config()
    filled = IA3Model(tiny_t5, config).peft_config["default"]
    assert filled.target_modules == {"k", "v", "wo"}
    assert filled.feedforward_modules == {"wo"}
    assert config.target_modules is None  # the caller's own config can be used for other models


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"target_modules": ["k_proj", "vproj"]},
            "module 'vproj' matches nothing in LlamaForCausalLM; did you mean 'v_proj'?",
        ),
        (
            {"target_modules": r".*_proj", "feedforward_modules": ["down_prj"]},
            "feedforward_modules: module 'down_prj' matches nothing in LlamaForCausalLM; did you",
        ),
        ({"exclude_modules": ["lm_haed"]}, "exclude_modules: module 'lm_haed' matches nothing"),
        ({"target_modules": r"k_proj"}, "'k_proj' matches no whole name in LlamaForCausalLM"),
        (
            # The most frequent mistake: in PEFT it rescales the outputs.
            {"target_modules": ["down_proj"], "feedforward_modules": "down_proj"},
            "feedforward_modules: the expression 'down_proj' matches no whole name in "
            "LlamaForCausalLM; did you mean the list ['down_proj']?",
        ),
        ({"exclude_modules": "mlp.up_proj"}, "did you mean the list ['mlp.up_proj']?"),
        (
            {"target_modules": ["dense"]},
            "module 'dense' matches nothing in LlamaForCausalLM; its layers are called q_proj, "
            "k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj",
        ),
        ({"exclude_modules": r".*_proj"}, "no module of LlamaForCausalLM is left"),
        ({"target_modules": ["mlp"]}, "is a LlamaMLP, whose output cannot be rescaled: expected"),
        (
            {"target_modules": ["embed_tokens"], "feedforward_modules": ["embed_tokens"]},
            "is a Embedding, whose input cannot be rescaled",
        ),
        ({"modules_to_save": ["lm_heat"]}, "module 'lm_heat' matches nothing in LlamaForCausalLM"),
        ({"modules_to_save": ["mlp", "gate_proj"]}, "is saved whole"),
    ],
)
def test_errors_say_what_is_wrong_and_leave_the_model_alone(tiny_llama, config, message):
    before = snapshot(tiny_llama)
    with pytest.raises(IA3Error) as error:
        IA3Model(tiny_llama, IA3Config(**config))
    assert message in str(error.value)
    assert_unchanged(tiny_llama, before)


def test_unknown_model_type_gets_the_papers_sites(tiny_llama):
    tiny_llama.config.model_type = "camel"
    config = IA3Model(tiny_llama, IA3Config()).peft_config["default"]
    assert config.target_modules == {"k_proj", "v_proj", "down_proj"}
    assert config.feedforward_modules == {"down_proj"}


def test_model_without_a_config():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(IA3Error, match="no default target_modules"):
        IA3Model(model, IA3Config())
    found = ours(model, target_modules=["0", "2"], feedforward_modules=["2"])
    assert found == {"0": (4, 1), "2": (1, 4)}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": ["k"], "feedforward_modules": ["wo"]}, r"\['wo'\] are not among"),
        ({"target_modules": 5}, "target_modules is 5"),
        ({"exclude_modules": ["a", 1]}, "exclude_modules is"),
        ({"peft_type": "LORA"}, "peft_type is 'LORA', expected 'IA3'"),
        ({"target_modules": r".*(k_proj"}, r"not a regular expression: missing \), unterm"),
        ({"feedforward_modules": "*"}, r"feedforward_modules '\*' is not a regular expression"),
        ({"task_type": "AUDIO_CLASSIFICATION"}, "leave it out for another task, whose head modul"),
        ({"task_type": "SEQ_CLASS"}, "did you mean 'SEQ_CLS'"),
    ],
)
def test_configs_that_make_no_sense(config, message):
    with pytest.raises(IA3Error, match=message):
        IA3Config(**config)


def test_arguments_that_a_config_does_not_have():
    with pytest.raises(TypeError, match=r"no argument 'bias'; it has task_type, .*target_modules"):
        IA3Config(bias="none")
    with pytest.raises(TypeError, match="'target_module'; did you mean 'target_modules'"):
        IA3Config(target_module=["k_proj"], fusion_strategy="svd")


def test_a_second_adapter_that_does_not_fit_changes_nothing(tiny_llama):
    model = IA3Model(tiny_llama, IA3Config())
    before = snapshot(tiny_llama)
    with pytest.raises(IA3Error, match=r"rescales its output.*its input"):
        model.add_adapter("b", IA3Config(target_modules=["down_proj"], feedforward_modules=[]))
    with pytest.raises(IA3Error, match="exists already"):
        model.add_adapter("default", IA3Config())
    for name in ("", "a.b", "a/b", "a b"):
        with pytest.raises(IA3Error, match="adapter name"):
            model.add_adapter(name, IA3Config())
    with pytest.raises(IA3Error, match="has no vector for"):
        model.add_adapter(
            "b", IA3Config(), vectors={"model.layers.0.self_attn.k_proj": torch.ones(3)}
        )
    assert_unchanged(tiny_llama, before)
    assert list(model.peft_config) == ["default"]


def test_vectors_on_the_model_are_never_targets(tiny_llama):
    """An expression that also matches the names of the first adapter's own modules."""
    config = IA3Config(target_modules=r".*self_attn\.k_proj.*", feedforward_modules=[])
    model = IA3Model(tiny_llama, config)
    first = model.vectors("default").keys()
    model.add_adapter("second", config)
    assert model.vectors("second").keys() == first
    model.add_adapter("third", IA3Config(target_modules="all-linear"))
    with pytest.raises(IA3Error, match="did you mean 'k_proj'"):
        model.add_adapter("fourth", IA3Config(target_modules=["k_prj"]))


def test_two_sets_of_adapters_on_one_model(tiny_llama):
    IA3Model(tiny_llama, IA3Config())
    before = snapshot(tiny_llama)
    with pytest.raises(IA3Error, match=r"has adapters already.*add_adapter"):
        IA3Model(tiny_llama, IA3Config())
    assert_unchanged(tiny_llama, before)


@pytest.mark.parametrize("targets", ["", []])
def test_feedforward_modules_without_any_target_are_an_error(tiny_llama, targets):
    config = IA3Config(target_modules=targets, feedforward_modules=".*down_proj")
    with pytest.raises(IA3Error, match="match none of the targets: they must be among"):
        IA3Model(tiny_llama, config)
