"""What is said of modules that were named and may not be meant; the lists are those of real users.

What each note has to name is written down by hand from the models' code.
"""

import re
import warnings

import pytest
import torch
from support.architectures import ARCHITECTURES, build
from support.tfew import tiny_llama, word_tokenizer
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    DistilBertConfig,
    ElectraConfig,
    EsmConfig,
    M2M100Config,
    MBartConfig,
    ModernBertConfig,
    ResNetConfig,
    Wav2Vec2Config,
)

import ia3
from ia3 import FewShotClassifier, IA3Config, IA3Error, IA3Model

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "pad_token_id": 1}
BOTH_SIDES = {"vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
BOTH_SIDES |= {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
BOTH_SIDES |= {f"{side}_ffn_dim": 32 for side in ("encoder", "decoder")}
OTHERS = {
    "esm": EsmConfig(**SIZES),
    "bert alone": BertConfig(**SIZES),
    "electra": ElectraConfig(**SIZES),
    "distilbert": DistilBertConfig(vocab_size=64, dim=16, n_layers=2, n_heads=4, hidden_dim=32),
    "m2m_100": M2M100Config(**BOTH_SIDES),
    "mbart": MBartConfig(**BOTH_SIDES),
    "modernbert": ModernBertConfig(**SIZES),
    "wav2vec2": Wav2Vec2Config(
        **SIZES, conv_dim=[16] * 7, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2
    ),
    "resnet": ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
    "q-former": Blip2QFormerConfig(**SIZES, encoder_hidden_size=16),
}


def make(kind):
    if kind in ARCHITECTURES:
        return build(kind)
    if kind == "q-former":
        return Blip2QFormerModel(OTHERS[kind])
    return AutoModel.from_config(OTHERS[kind])


def explained(capsys, model, config):
    capsys.readouterr()
    ia3.explain(model, config)
    lines = capsys.readouterr().out.splitlines()
    return [line.removeprefix("note: ") for line in lines if line.startswith("note: ")]


def up(name, down, rest="which is rescaled as well"):
    return f"'{name}' in feedforward_modules: an up or gate…input of '{down}'…{rest}"


def both(entry, attention, other):
    return f"'{entry}' names…attention ('{attention}') and…feed-forward layers ('{other}')"


def part(name):
    return f"'{name}' in feedforward_modules: a part of an attention"


LAYER = "encoder.layer.*"
SELF = f"{LAYER}.attention.self"
QKVOGUD = [f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")]
MLP = "model.layers.*.mlp"
ALONE = "name that one"
# A model, target_modules, feedforward_modules -> what the notes name, in order.
CASES = [
    # The sites of the paper, and what says the same.
    ("llama", ["k_proj", "v_proj", "down_proj"], ["down_proj"], []),
    ("llama", ["q_proj", "k_proj", "down_proj"], ["down_proj"], []),
    ("opt", ["k_proj", "v_proj", "fc2"], ["fc2"], []),
    ("clip", ["k_proj", "v_proj", "fc2"], ["fc2"], []),
    ("m2m_100", ["k_proj", "v_proj", "fc2"], ["fc2"], []),
    ("t5", ["q", "k", "v", "wo"], ["wo"], []),
    ("falcon", ["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"], []),
    ("mixtral", ["k_proj", "v_proj", "experts"], ["experts"], []),
    ("modernbert", ["Wqkv", "mlp.Wo"], ["mlp.Wo"], []),
    ("wav2vec2", ["k_proj", "v_proj", "output_dense"], ["output_dense"], []),
    ("phi", ["k_proj", "v_proj", "dense", "fc1", "fc2"], ["fc2"], []),
    ("resnet", ["convolution"], [], []),
    ("resnet", ["convolution"], ["convolution"], []),
    # The input of the up projection.
    (
        "esm",
        ["value", "key", "intermediate.dense"],
        ["intermediate.dense"],
        [up(f"{LAYER}.intermediate.dense", f"{LAYER}.output.dense", ALONE)],
    ),
    (
        "bert alone",
        ["query", "value", "intermediate.dense"],
        ["intermediate.dense"],
        [up(f"{LAYER}.intermediate.dense", f"{LAYER}.output.dense", ALONE)],
    ),
    (
        "distilbert",
        ["k_lin", "v_lin", "ffn.lin1"],
        ["ffn.lin1"],
        [up("transformer.layer.*.ffn.lin1", "transformer.layer.*.ffn.lin2", ALONE)],
    ),
    (
        "gpt2",
        ["c_attn", "mlp.c_fc"],
        ["mlp.c_fc"],
        [up("transformer.h.*.mlp.c_fc", "transformer.h.*.mlp.c_proj", ALONE)],
    ),
    (
        "modernbert",
        ["Wqkv", "mlp.Wi"],
        ["mlp.Wi"],
        [up("layers.*.mlp.Wi", "layers.*.mlp.Wo", ALONE)],
    ),
    (
        "wav2vec2",
        ["k_proj", "v_proj", "intermediate_dense"],
        ["intermediate_dense"],
        [
            up(
                "encoder.layers.*.feed_forward.intermediate_dense",
                "encoder.layers.*.feed_forward.output_dense",
                ALONE,
            )
        ],
    ),
    (
        "whisper",
        ["k_proj", "v_proj", "q_proj", "fc1", "fc2"],
        ["fc1", "fc2"],
        [up(f"model.{s}.layers.*.fc1", f"model.{s}.layers.*.fc2") for s in ("encoder", "decoder")],
    ),
    (
        "mbart",
        ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        ["fc1", "fc2"],
        [up(f"{s}.layers.*.fc1", f"{s}.layers.*.fc2") for s in ("encoder", "decoder")],
    ),
    (
        "llama",
        QKVOGUD,
        ["gate_proj", "up_proj", "down_proj"],
        [up(f"{MLP}.gate_proj', '{MLP}.up_proj", f"{MLP}.down_proj")],
    ),
    # Names that attention and feed-forward layers share.
    (
        "bert alone",
        ["key", "value", "output.dense"],
        ["output.dense"],
        [both("output.dense", f"{LAYER}.attention.output.dense", f"{LAYER}.output.dense")],
    ),
    (
        "electra",
        ["query", "value", "dense"],
        ["dense"],
        [
            up(f"{LAYER}.intermediate.dense", f"{LAYER}.output.dense"),
            both("dense", f"{LAYER}.attention.output.dense", f"{LAYER}.intermediate.dense"),
        ],
    ),
    (
        "gpt2",
        ["c_attn", "c_proj", "mlp.c_proj"],
        ["mlp.c_proj"],
        [both("c_proj", "transformer.h.*.attn.c_proj", "transformer.h.*.mlp.c_proj")],
    ),
    (
        "modernbert",
        ["Wqkv", "Wo"],
        ["Wo"],
        [both("Wo", "layers.*.attn.Wo", "layers.*.mlp.Wo")],
    ),
    # What is in no feed-forward layer.
    (
        "q-former",
        ["key", "value", "output.dense"],
        ["output.dense"],
        [part(f"{LAYER}.attention.output.dense', '{LAYER}.crossattention.output.dense")],
    ),
    (
        "gpt_neox",
        ["query_key_value", "dense"],
        ["dense"],
        [part("gpt_neox.layers.*.attention.dense")],
    ),
    (
        "esm",
        [f"encoder.layer.1.attention.self.{name}" for name in ("key", "value")],
        [f"encoder.layer.1.attention.self.{name}" for name in ("key", "value")],
        [f"'{SELF}.key', '{SELF}.value' in feedforward_modules: a projection to keys or values"],
    ),
    # The same activation twice.
    (
        "llama",
        "all-linear",
        None,
        [f"output of '{MLP}.up_proj'…input of '{MLP}.down_proj'…twice, in 2 layers"],
    ),
    (
        "llama",
        QKVOGUD,
        None,
        [f"output of '{MLP}.up_proj'…input of '{MLP}.down_proj'…twice, in 2 layers"],
    ),
    ("gpt2", "all-linear", None, []),
    ("bert", "all-linear", None, []),
    # Feed-forward modules that are no targets.
    (
        "llama",
        r".*\.(v_proj|down_proj)",
        ["down_proj", "up_proj"],
        ["'up_proj' of feedforward_modules is among none of the targets"],
    ),
]


@pytest.mark.parametrize(("kind", "targets", "feedforward", "expected"), CASES)
def test_each_note_is_right_and_there_is_no_other(capsys, kind, targets, feedforward, expected):
    model = make(kind)
    config = IA3Config(target_modules=targets, feedforward_modules=feedforward)
    found = explained(capsys, model, config)
    assert len(found) == len(expected), found
    for note, pieces in zip(found, expected, strict=True):
        assert re.search(".*".join(map(re.escape, pieces.split("…"))), note), note
    # Attaching says the same, once and at this line.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        IA3Model(model, config)
    told = [each for each in caught if "may surprise" in str(each.message)]
    assert len(told) == bool(expected)
    for each in told:
        assert str(each.message).split("\n- ")[1:] == found
        assert (each.category, each.filename) == (UserWarning, __file__)


@pytest.mark.parametrize("config", [IA3Config(), IA3Config(paper_sites=True)], ids=str)
# A ResNet has no attention, and so neither defaults nor the paper's sites.
@pytest.mark.parametrize("kind", [*ARCHITECTURES, *(kind for kind in OTHERS if kind != "resnet")])
def test_nothing_is_said_of_what_was_not_named(capsys, kind, config):
    model = IA3Model(make(kind), config)
    assert explained(capsys, model.model, config) == []


def test_a_gated_layer_that_is_none_is_not_said_to_be_rescaled_twice(capsys):
    """Another function than a product is between the two."""

    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (
                nn.Linear(*sizes) for sizes in ((16, 32), (16, 32), (32, 16))
            )

        def forward(self, x):
            return self.down_proj(torch.relu(self.gate_proj(x)) + self.up_proj(x))

    model = tiny_llama(hidden_size=16, intermediate_size=32)
    for layer in model.model.layers:
        layer.mlp = Mlp()
    assert explained(capsys, model, IA3Config(target_modules="all-linear")) == []


def test_a_module_that_two_layers_share_and_one_that_is_left_out(capsys):
    model = tiny_llama()
    first, second = (layer.self_attn for layer in model.model.layers)
    second.k_proj = first.k_proj
    config = IA3Config(
        target_modules=["k_proj", "up_proj", "down_proj"],
        feedforward_modules=["up_proj", "down_proj"],
        exclude_modules=["up_proj"],
    )
    assert explained(capsys, model, config) == []


SURPRISING = {"target_modules": ["v_proj", "up_proj"], "feedforward_modules": ["up_proj"]}


def test_every_way_to_choose_modules_warns_at_the_callers_line():
    model = ia3.IA3Model.without_adapters(tiny_llama())
    for attach in (
        lambda: IA3Model(tiny_llama(), IA3Config(**SURPRISING)),
        lambda: ia3.get_peft_model(tiny_llama(), IA3Config(**SURPRISING, task_type="CAUSAL_LM")),
        lambda: ia3.inject_adapter_in_model(IA3Config(**SURPRISING), tiny_llama()),
        lambda: model.add_adapter("first", IA3Config(**SURPRISING)),
        lambda: model.add_adapter("second", IA3Config(**SURPRISING)),
    ):
        with pytest.warns(UserWarning, match=r"(?s)'\w+' rescales.*\n- .*up_proj") as caught:
            attach()
        assert [each.filename for each in caught] == [__file__]
        source = open(__file__, encoding="utf-8").read().splitlines()  # noqa: SIM115
        assert "lambda" in source[caught[0].lineno - 1]


@pytest.mark.filterwarnings("error")
def test_an_adapter_that_was_trained_is_put_on_without_a_word(tmp_path):
    """Its choice was made before."""
    with pytest.warns(UserWarning, match="may surprise"):
        model = IA3Model(tiny_llama(), IA3Config(**SURPRISING))
    model.save_pretrained(tmp_path)
    tensors = ia3.get_peft_model_state_dict(model)
    for trained in (False, True):
        again = IA3Model.from_pretrained(tiny_llama(), tmp_path, is_trainable=trained)
        again.load_adapter(tmp_path, "other", is_trainable=trained)
        again.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")
        again.add_adapter("given", IA3Config(**SURPRISING), vectors=again.vectors("sum"))
        ia3.AdapterBank(again).add("in-bank", tmp_path)
    base = tiny_llama()
    for name in ("default", "other"):
        ia3.inject_adapter_in_model(IA3Config(**SURPRISING), base, name, state_dict=tensors)
    # Nor is the choice of the recipe its caller's.
    words = word_tokenizer(["good", "bad"])
    classifier = FewShotClassifier(tiny_llama(), tokenizer=words, steps=0)
    classifier.fit(["good", "bad"], ["good", "bad"]).predict(["good"])


@pytest.mark.parametrize(
    ("kind", "targets", "feedforward", "message"),
    [
        ("bert", ["key", "value", "output"], ["output"], "container, name .*: output.dense$"),
        (
            "llama",
            ["q_proj", "mlp"],
            ["mlp"],
            "is a LlamaMLP.* container.*: mlp.gate_proj, mlp.up_proj, mlp.down_proj$",
        ),
        ("llama", ["self_attn"], [], "container.*: self_attn.q_proj, self_attn.k_proj"),
        ("t5", ["k", "v", "w0"], ["w0"], "'w0' matches nothing .*; did you mean 'wo'"),
        (
            "llama",
            ["q_proj", "v_proj"],
            ["up_proj"],
            r"\['up_proj'\] are not among target_modules \['q_proj', 'v_proj'\]",
        ),
    ],
)
def test_names_that_cannot_be_rescaled_say_what_to_name(kind, targets, feedforward, message):
    with pytest.raises(IA3Error, match=message):
        ia3.explain(build(kind), IA3Config(target_modules=targets, feedforward_modules=feedforward))


def test_every_warning_of_attaching_points_at_the_callers_line(tmp_path):
    """However deep in the package it comes from."""
    IA3Model(tiny_llama(seed=1), IA3Config()).save_pretrained(tmp_path)
    model = IA3Model(tiny_llama(), IA3Config())
    for attach in (
        lambda: IA3Model.from_pretrained(tiny_llama(), tmp_path),
        lambda: model.load_adapter(tmp_path, "other"),
        lambda: ia3.AdapterBank(tiny_llama()).add("other", tmp_path),
        lambda: ia3.explain(build("mixtral")),
        lambda: IA3Model(build("mixtral"), IA3Config()),
    ):
        with pytest.warns(UserWarning, match="wrong base model|matches nothing") as caught:
            attach()
        assert [each.filename for each in caught] == [__file__]
