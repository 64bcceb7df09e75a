"""Every kind of module that can be rescaled, against products and gradients written out by hand."""

import copy
import warnings

import peft
import pytest
import torch
import transformers as hf
from support.pairs import adapted, vectors
from support.snapshots import assert_unchanged, hooks_on, snapshot
from torch import nn
from transformers.pytorch_utils import Conv1D

from ia3 import IA3Config, IA3Error, IA3Model

# -- one layer -------------------------------------------------------------------------------------

# A layer, the shape of its input, and how many axes come after the channels.
LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (2, 3, 6), 0),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), (5, 6), 0),
    "linear of one vector": (lambda: nn.Linear(6, 4), (6,), 0),
    "linear of no row": (lambda: nn.Linear(6, 4), (0, 6), 0),
    "linear of one column": (lambda: nn.Linear(1, 1), (3, 1), 0),
    "Conv1D": (lambda: Conv1D(4, 6), (2, 3, 6), 0),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, padding=2), (2, 6, 7), 1),
    "conv1d unbatched": (lambda: nn.Conv1d(6, 4, 3, groups=2, bias=False), (6, 7), 1),
    "conv2d": (lambda: nn.Conv2d(6, 4, (3, 2), stride=2, dilation=(1, 2)), (2, 6, 7, 8), 2),
    "conv2d in groups": (lambda: nn.Conv2d(6, 12, 3, groups=3), (2, 6, 5, 5), 2),
    "conv2d by depth": (lambda: nn.Conv2d(6, 6, 3, groups=6), (2, 6, 5, 5), 2),
    "conv2d unbatched": (lambda: nn.Conv2d(6, 4, 3), (6, 5, 6), 2),
    "conv3d": (lambda: nn.Conv3d(6, 4, (1, 2, 3), groups=2), (2, 6, 3, 4, 5), 3),
    "conv3d unbatched": (lambda: nn.Conv3d(6, 4, 2), (6, 3, 4, 3), 3),
    "conv2d padded": (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), (6, 7, 8), 2),
}


def with_vector(layer, side):
    """The layer alone in a model in float64, with a random vector on one side of it."""
    inputs = ["layer"] if side == "input" else []
    base = nn.ModuleDict({"layer": layer})
    model = adapted(base, target_modules=["layer"], feedforward_modules=inputs).double()
    return base["layer"], model.vectors("default")["layer"]


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("kind", LAYERS)
def test_product_and_gradients_by_hand(kind, side):
    make, shape, trailing = LAYERS[kind]
    torch.manual_seed(0)
    plain = make().double()
    rescaled, vector = with_vector(copy.deepcopy(plain), side)
    values = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    found = rescaled(values)
    factor = vector.detach().clone().requires_grad_()
    shaped = factor.reshape(-1, *[1] * trailing)
    expected = plain(values) * shaped if side == "output" else plain(values * shaped)
    torch.testing.assert_close(found, expected)

    weighting = torch.randn(expected.shape, dtype=torch.float64)
    ours = torch.autograd.grad((found * weighting).sum(), [vector, values])
    by_hand = torch.autograd.grad((expected * weighting).sum(), [factor, values])
    for ours_, by_hand_ in zip(ours, by_hand, strict=True):
        torch.testing.assert_close(ours_, by_hand_)


@pytest.mark.parametrize(
    "options",
    [{}, {"padding_idx": 0}, {"scale_grad_by_freq": True}, {"max_norm": 1.0}],
    ids=["plain", "padding", "scaled gradients", "max_norm"],
)
def test_embedding_by_hand(options):
    torch.manual_seed(0)
    plain = nn.Embedding(7, 5, **options).double()
    rescaled, vector = with_vector(copy.deepcopy(plain), "output")
    assert vector.shape == (5, 1)
    ids = torch.tensor([[0, 3, 3], [6, 0, 1]])
    found = rescaled(ids)
    expected = plain(ids).detach() * vector.detach().flatten()
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), [vector])
    torch.testing.assert_close(gradient, plain(ids).detach().sum((0, 1))[:, None])


@pytest.mark.parametrize("side", ["output", "input"])
def test_layers_called_by_keyword(side):
    torch.manual_seed(0)
    values = torch.randn(5, 4, dtype=torch.float64)
    for layer, name in ((nn.Linear(4, 3), "input"), (Conv1D(3, 4), "x")):
        rescaled, _ = with_vector(layer, side)
        assert torch.equal(rescaled(**{name: values}), rescaled(values))


# -- what is chosen, and what cannot be ------------------------------------------------------------

TINY = {"vocab_size": 32, "num_labels": 3, "pad_token_id": 0}
BERT = {
    **TINY,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
CLASSIFIERS = {
    "llama": lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**BERT)),
    "llama of tokens": lambda: hf.LlamaForTokenClassification(hf.LlamaConfig(**BERT)),
    "gpt2": lambda: hf.GPT2ForSequenceClassification(
        hf.GPT2Config(**TINY, n_embd=16, n_layer=1, n_head=2)
    ),
    "bert of tokens": lambda: hf.BertForTokenClassification(hf.BertConfig(**BERT)),
    "roberta": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**BERT)),
}


@pytest.mark.parametrize(
    ("kind", "task_type"),
    [(k, t) for k in CLASSIFIERS for t in (None, "SEQ_CLS") if not t or "tokens" not in k],
)
def test_all_linear_layers_of_a_classifier_are_pefts(kind, task_type):
    choice = {"target_modules": "all-linear", "feedforward_modules": [], "task_type": task_type}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Conv1D and fan_in_fan_out
        theirs = peft.get_peft_model(CLASSIFIERS[kind](), peft.IA3Config(**choice))
    expected = {name: vector.shape for name, vector in vectors(theirs).items()}
    assert len(expected) > 3
    ours = IA3Model(CLASSIFIERS[kind](), IA3Config(**choice)).vectors("default")
    assert {name: vector.shape for name, vector in ours.items()} == expected


OTHERS = {
    "LayerNorm": lambda: nn.LayerNorm(4),
    "BatchNorm1d": lambda: nn.BatchNorm1d(4),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(4, 4, 2),
    "Bilinear": lambda: nn.Bilinear(4, 4, 4),
    "LSTM": lambda: nn.LSTM(4, 4),
    "GELU": lambda: nn.GELU(),
    "EmbeddingBag": lambda: nn.EmbeddingBag(4, 4),
    "MultiheadAttention": lambda: nn.MultiheadAttention(4, 2),
    "ModuleList": lambda: nn.ModuleList([nn.Linear(4, 4)]),
}


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("kind", OTHERS)
def test_modules_that_cannot_be_rescaled_are_named(kind, side):
    base = nn.ModuleDict({"first": nn.Linear(4, 4), "other": OTHERS[kind]()})
    before = [hooks_on(module) for module in base.modules()]
    inputs = ["other"] if side == "input" else []
    message = f"'other' is a {kind}, whose {side} cannot be rescaled.*expected Linear, Conv1D"
    with pytest.raises(IA3Error, match=message):
        IA3Model(base, IA3Config(target_modules=["first", "other"], feedforward_modules=inputs))
    assert [hooks_on(module) for module in base.modules()] == before
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert not any("ia3_l" in name for name, _ in base.named_modules())


def test_attention_that_reads_a_weight_without_calling_its_layer():
    """A hook on `out_proj` would never run, a vector on it never train."""
    base = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "linear": nn.Linear(4, 4)})
    before = snapshot(base)
    with pytest.raises(IA3Error, match=r"'attention\.out_proj'.*MultiheadAttention reads its wei"):
        IA3Model(base, IA3Config(target_modules=["out_proj"], feedforward_modules=[]))
    assert_unchanged(base, before)
    # So that every linear layer is every one but that.
    vectors = IA3Model(base, IA3Config(target_modules="all-linear")).vectors("default")
    assert list(vectors) == ["linear"]


def test_fused_transformer_layers_are_rescaled_where_pefts_are_not():
    """In evaluation torch's encoder layer hands its weights to one kernel, past its submodules."""
    torch.manual_seed(0)
    base = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    modules = {"target_modules": ["linear1", "linear2"], "feedforward_modules": ["linear2"]}
    ours = IA3Model(copy.deepcopy(base), IA3Config(**modules)).eval()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.IA3Config(**modules)).eval()
    for model in (ours, theirs):
        for name, parameter in model.named_parameters():
            if "ia3_l" in name:
                nn.init.constant_(parameter, 0.5)
    values = torch.randn(2, 3, 8)
    with torch.no_grad():
        normed = base.norm1(values + base._sa_block(values, None, None))
        inner = (0.5 * base.linear1(normed)).relu() * 0.5
        expected = base.norm2(normed + base.linear2(inner))
        torch.testing.assert_close(ours(values), expected)
        torch.testing.assert_close(theirs(values), base(values))
        ours.merge_adapter()
        torch.testing.assert_close(ours(values), expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
def test_encoder_layers_that_leave_out_padding():
    """In evaluation torch's encoder hands nested tensors to its layers where there is padding."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    base = nn.TransformerEncoder(layer, 2).eval()
    targets = ["linear1", "linear2"]
    model = adapted(base, target_modules=targets, feedforward_modules=["linear2"]).eval()
    padding = torch.tensor([[False, False, True], [False, False, False]])
    values = torch.randn(2, 3, 8)
    with torch.no_grad():
        found = model(values, src_key_padding_mask=padding)
        alone = model(values[:1, :2])
        model.merge_adapter()
        torch.testing.assert_close(found, model(values, src_key_padding_mask=padding))
    torch.testing.assert_close(found[0, :2], alone[0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
def test_jagged_tensors_stay_jagged():
    parts = [torch.randn(2, 4), torch.randn(3, 4)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = adapted(base, target_modules=["0", "1"], feedforward_modules=["1"])
    summed = nested + model(nested)  # the same ragged shape
    torch.testing.assert_close(summed.values(), torch.cat([part + model(part) for part in parts]))


def test_attached_on_the_meta_device(make_model, make_inputs):
    """Weights may come after the adapter."""
    real = make_model("llama")
    values = IA3Model(make_model("llama"), IA3Config(init_ia3_weights=False)).vectors("default")
    with torch.device("meta"):
        empty = make_model("llama")
    model = IA3Model(empty, IA3Config())
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    with pytest.raises(IA3Error, match="its weights are not there"):
        model.merge_adapter()
    weights = {f"model.{name}": tensor for name, tensor in real.state_dict().items()}
    weights |= {f"model.{name}.ia3_l.default": vector for name, vector in values.items()}
    model.load_state_dict(weights, assign=True, strict=True)
    model.model.model.rotary_emb = real.model.rotary_emb
    expected = IA3Model(make_model("llama"), IA3Config(), vectors=values)
    inputs = make_inputs("llama")
    torch.testing.assert_close(model(**inputs).logits, expected(**inputs).logits)
