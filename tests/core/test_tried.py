"""Subclasses with a forward of their own: what they give, and what scaling their weights does."""

from functools import partial

import pytest
import torch
import transformers as hf
from support.pairs import adapted, randomize, relative, vectors
from support.snapshots import assert_unchanged, snapshot
from torch import nn
from torch.nn import functional
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.gemma4.modeling_gemma4 import Gemma4AudioCausalConv1d
from transformers.models.ibert.quant_modules import QuantLinear
from transformers.models.idefics.modeling_idefics import IdeficsDecoupledLinear
from transformers.models.llama4.modeling_llama4 import Llama4Router

from ia3 import IA3Config, IA3Error, IA3Model
from ia3.core.tried import gives_channels


class Normalised(nn.Linear):
    def forward(self, x):
        return functional.linear(x, functional.normalize(self.weight), self.bias)


class Rectified(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


class Dropping(nn.Linear):
    def forward(self, x):
        return super().forward(functional.dropout(x, 0.5, self.training))


class Pooling(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).mean((2, 3))


class WithBias(nn.Linear):
    """What is added is not scaled."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.added = nn.Parameter(torch.ones(sizes[1]))

    def forward(self, x):
        return super().forward(x) + self.added


class WithArgument(nn.Linear):
    def forward(self, x, by):
        return super().forward(x * by)


class NormedEmbedding(nn.Embedding):
    """As Inkling's."""

    def forward(self, ids):
        return functional.rms_norm(super().forward(ids), (self.embedding_dim,))


def router():
    return Llama4Router(hf.Llama4TextConfig(hidden_size=6, num_local_experts=4))


# A layer from 6 to 4, whether its output can be rescaled, and the sides that a merge takes.
LAYERS = {
    "plain": (lambda: nn.Linear(6, 4), True, "output input"),
    "another product": (lambda: FalconLinear(6, 4), True, "output input"),
    "causal convolution": (lambda: Gemma4AudioCausalConv1d(6, 4, 3), True, "output input"),
    "scaled embedding": (lambda: Gemma3TextScaledWordEmbedding(6, 4, 0, 3.0), True, "output"),
    "normed embedding": (lambda: NormedEmbedding(6, 4), True, ""),
    "standardised weight": (lambda: WeightStandardizedConv2d(6, 4, 3), True, ""),
    "normalised weight": (lambda: Normalised(6, 4), True, ""),
    "a bias of its own": (lambda: WithBias(6, 4), True, "input"),
    "not linear": (lambda: Rectified(6, 4), True, "output input"),  # the vectors are positive
    "with dropout": (lambda: Dropping(6, 4), True, "output input"),
    "pooled": (lambda: Pooling(6, 4, 3), False, ""),
    "more outputs": (lambda: IdeficsDecoupledLinear(6, 4, 2), False, ""),
    "a router's pair": (router, False, ""),
    "output and scale": (lambda: QuantLinear(6, 4), False, ""),
    "in groups": (lambda: DeepseekV4GroupedLinear(6, 4, n_groups=2), False, ""),
    "not to be tried": (lambda: WithArgument(6, 4), True, "output input"),
}


def made(kind, dtype=torch.float32):
    torch.manual_seed(0)
    layer = LAYERS[kind][0]()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return nn.ModuleDict({"layer": layer, "other": nn.Linear(6, 4)}).to(dtype)


@pytest.mark.parametrize("kind", LAYERS)
def test_what_gives_no_channels_is_refused_and_no_linear_layer_among_all(kind):
    _, gives, _ = LAYERS[kind]
    base = made(kind)
    assert gives_channels(base["layer"], 4) == gives
    config = IA3Config(target_modules=["layer"], feedforward_modules=[])
    if gives:
        assert vectors(IA3Model(base, config)).keys() == {"layer"}
        return
    before = snapshot(base)
    with pytest.raises(IA3Error, match="whose output cannot be rescaled: it is not one tensor of"):
        IA3Model(base, config)
    assert_unchanged(base, before)
    everything = IA3Config(target_modules="all-linear", feedforward_modules=[])
    assert vectors(IA3Model(base, everything)).keys() - {"layer.additional_fc"} == {"other"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("kind", [kind for kind, (_, gives, _) in LAYERS.items() if gives])
def test_merged_is_adapted_or_refused(kind, side, dtype):
    if "embedding" in kind and side == "input":
        return
    inputs = ["layer"] if side == "input" else []
    model = adapted(made(kind, dtype), target_modules=["layer"], feedforward_modules=inputs)
    with torch.no_grad():
        for vector in vectors(model).values():
            vector.abs_().clamp_(0.1)
    layer = model.model["layer"]
    if side not in LAYERS[kind][2]:
        before = snapshot(model.model)
        with pytest.raises(IA3Error, match=f"a scaled weight does not scale its {side}"):
            model.merge_adapter()
        assert_unchanged(model.model, before)
        return
    given = torch.tensor([[0, 2, 5]]) if "embedding" in kind else torch.randn(2, 6, 6).to(dtype)
    run = partial(layer, given, 1) if isinstance(layer, WithArgument) else partial(layer, given)
    model.merge_adapter()  # in training mode
    model.unmerge_adapter()
    layer.eval()
    expected = run()
    model.merge_adapter()
    assert relative(run(), expected) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_a_negative_vector_is_no_factor_of_a_rectified_output():
    model = adapted(made("not linear"), target_modules=["layer"], feedforward_modules=[])
    with torch.no_grad():
        vectors(model)["layer"][1] = -0.5
    with pytest.raises(IA3Error, match="a scaled weight does not scale its output"):
        model.merge_adapter()


def test_trying_changes_nothing():
    class Counting(nn.Linear):
        """Its buffer, and that of its part, change with each call."""

        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.calls = nn.Buffer(torch.zeros(()))
            self.norm = nn.BatchNorm1d(48, affine=False)

        def forward(self, x):
            self.calls += 1
            self.norm(x)
            return super().forward(x)

    base = nn.ModuleDict({"layer": Counting(6, 4)})
    model = adapted(base, target_modules="all-linear", feedforward_modules=[])
    model.merge_adapter()
    assert base["layer"].calls == base["layer"].norm.num_batches_tracked == 0
    model.unmerge_adapter()


def test_a_convolutional_network_with_standardised_weights():
    """Its vectors would vanish in a merge, whatever the size of the network."""
    config = hf.BitConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_groups=2)
    model = IA3Model(hf.BitModel(config), IA3Config(target_modules=["conv1"]))
    randomize(vectors(model))
    before = snapshot(model.model)
    with pytest.raises(IA3Error, match=r"encoder.*conv1'.*keep the adapter on the model"):
        model.merge_and_unload()
    assert_unchanged(model.model, before)
