"""`IA3Model`: equal to PEFT's (IA)³ in what it computes, and gone without a trace afterwards."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import MakeInputs, MakeModel
from support.snapshots import hooks_on
from torch import Tensor, nn
from transformers import PreTrainedModel

from ia3 import IA3Config, IA3Error, IA3Model, get_peft_model

KINDS = ["llama", "gpt2", "t5"]
CONFIGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "all-linear": {"target_modules": "all-linear"},
}
EVERY_MODEL = pytest.mark.parametrize("kind", KINDS)
EVERY_CHOICE = pytest.mark.parametrize("choice", CONFIGS)

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")

Inputs = dict[str, Tensor]


def peft_vectors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Module name -> vector of PEFT's adapter "default"."""
    suffix = ".ia3_l.default"
    return {
        name.removeprefix("base_model.model.").removesuffix(suffix): parameter
        for name, parameter in model.named_parameters()
        if name.endswith(suffix)
    }


def randomize(vectors: dict[str, Any], seed: int = 0) -> None:
    """Values around one, by module name, so that two models can be given the same."""
    with torch.no_grad():
        for i, name in enumerate(sorted(vectors)):
            generator = torch.Generator().manual_seed(1000 * seed + i)
            vector = vectors[name]
            vector.copy_(1 + 0.5 * torch.randn(vector.numel(), generator=generator).view_as(vector))


def random_adapter(base: PreTrainedModel, seed: int = 0, **config: Any) -> IA3Model:
    model = IA3Model(base, IA3Config(**config))
    randomize(model.vectors("default"), seed)
    return model


def logits(model: Any, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**inputs).logits
    return result


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return list(found) == list(expected) and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


@pytest.fixture
def pair(make_model: MakeModel) -> Callable[[str, str], tuple[IA3Model, Any]]:
    """(ours, PEFT's) on the same base model, with the same random vectors."""

    def make(kind: str, choice: str) -> tuple[IA3Model, Any]:
        model = random_adapter(make_model(kind), **CONFIGS[choice])
        peft_model = peft.get_peft_model(make_model(kind), peft.IA3Config(**CONFIGS[choice]))
        theirs = peft_vectors(peft_model)
        randomize(theirs)
        assert theirs.keys() == model.vectors("default").keys()
        return model, peft_model

    return make


# -- equal to PEFT ---------------------------------------------------------------------------------


@EVERY_MODEL
@EVERY_CHOICE
def test_untrained_adapter_changes_no_bit(
    make_model: MakeModel, make_inputs: MakeInputs, kind: str, choice: str
) -> None:
    base, inputs = make_model(kind), make_inputs(kind)
    expected = logits(base, inputs)
    model = get_peft_model(base, IA3Config(**CONFIGS[choice]))
    assert torch.equal(logits(model, inputs), expected)
    with torch.enable_grad():  # as in training, where the result is written in place
        assert torch.equal(model(**inputs).logits.detach(), expected)


@EVERY_MODEL
@EVERY_CHOICE
def test_logits_gradients_and_merge_are_pefts(
    pair: Callable[[str, str], tuple[IA3Model, Any]],
    make_inputs: MakeInputs,
    kind: str,
    choice: str,
) -> None:
    (model, peft_model), inputs = pair(kind, choice), make_inputs(kind)
    assert relative(logits(model, inputs), logits(peft_model, inputs)) < 1e-6
    model(**inputs).loss.backward()
    peft_model(**inputs).loss.backward()
    theirs = peft_vectors(peft_model)
    for name, vector in model.vectors("default").items():
        expected = theirs[name].grad
        assert expected is not None
        assert vector.grad is not None
        assert relative(vector.grad, expected) < 2e-6, name
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        f"model.{name}.ia3_l.default" for name in model.vectors("default")
    ]
    merged, peft_merged = model.merge_and_unload(), peft_model.merge_and_unload()
    assert relative(logits(merged, inputs), logits(peft_merged, inputs)) < 1e-6


@EVERY_MODEL
def test_five_steps_of_training_are_pefts(
    pair: Callable[[str, str], tuple[IA3Model, Any]], make_inputs: MakeInputs, kind: str
) -> None:
    inputs = make_inputs(kind)

    def train(model: Any, vectors: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        start = {name: vector.detach().clone() for name, vector in vectors.items()}
        # Plain descent with momentum: Adam's first steps blow up rounding where gradients are tiny.
        optimizer = torch.optim.SGD(vectors.values(), lr=0.1, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            model(**inputs).loss.backward()
            optimizer.step()
        assert all(not torch.equal(vectors[name], start[name]) for name in start)
        return {name: vector.detach() for name, vector in vectors.items()}

    model, peft_model = pair(kind, "defaults")
    found = train(model, model.vectors("default"))  # type: ignore[arg-type]
    expected = train(peft_model, peft_vectors(peft_model))
    for name in expected:
        assert relative(found[name], expected[name]) < 1e-5, name
    assert relative(logits(model, inputs), logits(peft_model, inputs)) < 1e-5


@EVERY_MODEL
@EVERY_CHOICE
def test_peft_reads_our_files(
    make_model: MakeModel, make_inputs: MakeInputs, tmp_path: Path, kind: str, choice: str
) -> None:
    model, inputs = random_adapter(make_model(kind), **CONFIGS[choice]), make_inputs(kind)
    model.save_pretrained(tmp_path)
    config = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(config, peft.IA3Config)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys")
        peft_model = peft.PeftModel.from_pretrained(make_model(kind), str(tmp_path))
    theirs = peft_vectors(peft_model)
    ours = model.vectors("default")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert relative(logits(peft_model, inputs), logits(model, inputs)) < 1e-6


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        *((kind, config) for kind in KINDS for config in CONFIGS.values()),
        # PEFT records its default feed-forward modules beside these, though none is a target.
        ("llama", {"target_modules": ["k_proj"]}),
        ("llama", {"target_modules": ["mlp.down_proj", "k_proj"]}),
        ("gpt2", {"target_modules": ["c_proj"]}),
        ("t5", {"target_modules": r".*\.(k|v|wo)"}),
    ],
)
def test_we_read_pefts_files(
    make_model: MakeModel,
    make_inputs: MakeInputs,
    tmp_path: Path,
    kind: str,
    config: dict[str, Any],
) -> None:
    inputs = make_inputs(kind)
    peft_model = peft.get_peft_model(make_model(kind), peft.IA3Config(**config))
    randomize(peft_vectors(peft_model))
    peft_model.save_pretrained(str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = IA3Model.from_pretrained(make_model(kind), tmp_path)
    expected = logits(peft_model, inputs)
    assert relative(logits(model, inputs), expected) < 1e-6
    model.save_pretrained(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(make_model(kind), str(tmp_path / "again"))
    assert relative(logits(again, inputs), expected) < 1e-6


@pytest.mark.parametrize(
    ("kind", "targets"),
    [("llama", ["mlp.down_proj", "k_proj"]), ("gpt2", ["c_proj"]), ("llama", ["k_proj"])],
)
def test_peft_reads_our_files_where_the_feedforward_modules_were_found_by_default(
    make_model: MakeModel, make_inputs: MakeInputs, tmp_path: Path, kind: str, targets: list[str]
) -> None:
    """PEFT refuses feed-forward modules that are not among the targets."""
    model, inputs = random_adapter(make_model(kind), target_modules=targets), make_inputs(kind)
    model.save_pretrained(tmp_path)
    peft_model = peft.PeftModel.from_pretrained(make_model(kind), str(tmp_path))
    assert relative(logits(peft_model, inputs), logits(model, inputs)) < 1e-6


def test_saved_config_is_for_inference_and_the_model_trains_on(
    tiny_llama: PreTrainedModel, tmp_path: Path
) -> None:
    model = IA3Model(tiny_llama, IA3Config(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["inference_mode"] is True
    assert saved["peft_type"] == "IA3"
    assert saved["task_type"] == "CAUSAL_LM"
    assert model.peft_config["default"].inference_mode is False
    assert all(vector.requires_grad for vector in model.vectors("default").values())


# -- without a trace -------------------------------------------------------------------------------


@EVERY_MODEL
@EVERY_CHOICE
def test_unload_gives_back_the_model(
    make_model: MakeModel, make_inputs: MakeInputs, kind: str, choice: str
) -> None:
    base, inputs = make_model(kind), make_inputs(kind)
    next(base.parameters()).requires_grad_(False)
    trained = [parameter.requires_grad for parameter in base.parameters()]
    modules = list(base.named_modules())
    parameters = dict(base.named_parameters())
    before, expected = bits(base), logits(base, inputs)

    model = random_adapter(base, **CONFIGS[choice])
    attached = dict(model.model.named_modules())
    assert all(attached[name] is module for name, module in modules)
    now = dict(base.named_parameters())
    assert all(now[name] is parameter for name, parameter in parameters.items())
    assert not any(parameter.requires_grad for parameter in parameters.values())
    assert all(torch.equal(base.state_dict()[name], tensor) for name, tensor in before.items())
    assert not torch.equal(logits(model, inputs), expected)
    model(**inputs).loss.backward()
    model.merge_adapter()

    assert model.unload() is base
    found = list(base.named_modules())
    assert [name for name, _ in found] == [name for name, _ in modules]
    assert all(a is b for (_, a), (_, b) in zip(found, modules, strict=True))
    assert same_bits(bits(base), before)
    assert [parameter.requires_grad for parameter in base.parameters()] == trained
    assert all(parameter.grad is None for parameter in base.parameters())
    assert not any(map(hooks_on, base.modules()))
    assert torch.equal(logits(base, inputs), expected)
    IA3Model(base, IA3Config())  # and it can be adapted again


@EVERY_MODEL
@EVERY_CHOICE
def test_merge_and_unmerge(
    make_model: MakeModel, make_inputs: MakeInputs, kind: str, choice: str
) -> None:
    base, inputs = make_model(kind), make_inputs(kind)
    model = random_adapter(base, **CONFIGS[choice])
    before, expected = bits(base), logits(model, inputs)
    model.merge_adapter(safe_merge=True)
    assert not same_bits(bits(base), before)
    assert relative(logits(model, inputs), expected) < 1e-6
    with pytest.warns(UserWarning, match="merged already"):
        model.merge_adapter()
    assert relative(logits(model, inputs), expected) < 1e-6
    with pytest.raises(IA3Error, match="is merged"):
        model.delete_adapter("default")
    model.unmerge_adapter()
    assert same_bits(bits(base), before)
    assert torch.equal(logits(model, inputs), expected)


def test_unmerge_of_half_precision_weights_is_exact(
    tiny_llama: PreTrainedModel, make_inputs: MakeInputs
) -> None:
    base = tiny_llama.to(torch.bfloat16)
    before = bits(base)
    model = random_adapter(base)
    model.merge_adapter()
    assert base.get_parameter("model.layers.0.self_attn.k_proj.weight").dtype == torch.bfloat16
    model.unmerge_adapter()
    assert all(torch.equal(base.state_dict()[name], tensor) for name, tensor in before.items())
    assert logits(model, make_inputs("llama")).dtype == torch.bfloat16


def test_unmerge_follows_a_model_that_was_cast(
    tiny_llama: PreTrainedModel, make_inputs: MakeInputs
) -> None:
    model, inputs = random_adapter(tiny_llama), make_inputs("llama")
    expected = logits(model, inputs)
    model.merge_adapter()
    model.to(torch.float64)
    model.unmerge_adapter()
    assert {p.dtype for p in tiny_llama.parameters()} == {torch.float64}
    torch.testing.assert_close(logits(model, inputs), expected.double(), rtol=1e-4, atol=1e-5)


def test_merge_and_unload_keeps_the_merged_weights(
    tiny_llama: PreTrainedModel, make_inputs: MakeInputs
) -> None:
    keys, inputs = list(tiny_llama.state_dict()), make_inputs("llama")
    model = random_adapter(tiny_llama)
    expected = logits(model, inputs)
    assert model.merge_and_unload() is tiny_llama
    assert relative(logits(tiny_llama, inputs), expected) < 1e-6
    assert list(tiny_llama.state_dict()) == keys
    assert not any(map(hooks_on, tiny_llama.modules()))


def test_merging_on_top_of_a_merge(tiny_llama: PreTrainedModel, make_inputs: MakeInputs) -> None:
    model, inputs = random_adapter(tiny_llama), make_inputs("llama")
    model.add_adapter("b", IA3Config(target_modules=["q_proj", "v_proj"]))
    randomize(model.vectors("b"), seed=7)
    model.set_adapter(["default", "b"])
    before = bits(tiny_llama)
    expected = logits(model, inputs)
    model.merge_adapter(["default"])
    assert relative(logits(model, inputs), expected) < 1e-6  # b still multiplies
    model.merge_adapter(["b"])
    assert relative(logits(model, inputs), expected) < 1e-6
    assert not any(map(hooks_on, tiny_llama.modules()))
    model.unmerge_adapter()
    assert same_bits(bits(tiny_llama), before)
    assert torch.equal(logits(model, inputs), expected)


def test_merge_and_unload_of_a_named_adapter(
    tiny_llama: PreTrainedModel, make_inputs: MakeInputs
) -> None:
    model, inputs = random_adapter(tiny_llama), make_inputs("llama")
    model.add_adapter("b", IA3Config())
    randomize(model.vectors("b"), seed=7)
    model.set_adapter("b")
    expected = logits(model, inputs)
    merged = model.merge_and_unload(adapter_names=["b"])
    assert relative(logits(merged, inputs), expected) < 1e-6


@pytest.mark.parametrize("safe", [True, False])
def test_merge_that_is_not_finite(tiny_llama: PreTrainedModel, safe: bool) -> None:
    model = random_adapter(tiny_llama)
    with torch.no_grad():
        model.vectors("default")["model.layers.1.mlp.down_proj"][0, 3] = torch.inf
    before = bits(tiny_llama)
    if safe:
        with pytest.raises(IA3Error, match=r"model\.layers\.1\.mlp\.down_proj\.weight.*not finite"):
            model.merge_adapter(safe_merge=True)
        assert same_bits(bits(tiny_llama), before)
    else:
        model.merge_adapter()
        assert not same_bits(bits(tiny_llama), before)


def test_merge_into_a_shared_weight() -> None:
    """Folding a vector into a tied weight would change its other user too."""
    base = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    base["b"].weight = base["a"].weight
    model = IA3Model(base, IA3Config(target_modules=["a"], feedforward_modules=[]))
    randomize(model.vectors("default"))
    before = bits(base)
    with pytest.raises(IA3Error, match="'b' shares it"):
        model.merge_adapter()
    assert same_bits(bits(base), before)


# -- several adapters ------------------------------------------------------------------------------


@pytest.mark.parametrize("merged", [True, False])
def test_disabled_adapters_compute_as_the_base_model(
    tiny_llama: PreTrainedModel, make_inputs: MakeInputs, merged: bool
) -> None:
    inputs = make_inputs("llama")
    base_logits = logits(tiny_llama, inputs)
    model = random_adapter(tiny_llama)
    expected = logits(model, inputs)
    if merged:
        model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), base_logits)
    assert torch.equal(logits(model, inputs), expected)
    with pytest.raises(RuntimeError, match="inside"), model.disable_adapter():
        raise RuntimeError("inside")
    assert torch.equal(logits(model, inputs), expected)
    model.disable_adapter_layers()
    model.set_adapter("default")
    with model.disable_adapter():
        pass
    assert torch.equal(logits(model, inputs), base_logits)
    model.enable_adapter_layers()
    assert torch.equal(logits(model, inputs), expected)


@EVERY_MODEL
def test_active_adapters_multiply(
    make_model: MakeModel, make_inputs: MakeInputs, kind: str
) -> None:
    inputs = make_inputs(kind)
    model = random_adapter(make_model(kind))
    model.add_adapter("b", IA3Config())
    randomize(model.vectors("b"), seed=5)
    product = {
        name: vector.detach() * model.vectors("b")[name].detach()
        for name, vector in model.vectors("default").items()
    }
    model.add_adapter("product", IA3Config(), product)
    model.set_adapter(["default", "b"])
    assert model.active_adapters == ["default", "b"]
    both = logits(model, inputs)
    model(**inputs).loss.backward()
    assert all(
        v.grad is not None for name in ("default", "b") for v in model.vectors(name).values()
    )
    model.merge_adapter()
    merged = logits(model, inputs)
    model.unmerge_adapter()
    model.set_adapter("product")
    assert relative(both, logits(model, inputs)) < 1e-6
    assert relative(merged, logits(model, inputs)) < 1e-6


def test_only_active_adapters_are_trained(tiny_llama: PreTrainedModel) -> None:
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


def test_load_and_delete(
    tiny_llama: PreTrainedModel, make_model: MakeModel, make_inputs: MakeInputs, tmp_path: Path
) -> None:
    inputs = make_inputs("llama")
    other = random_adapter(make_model("llama"), seed=3, target_modules=["q_proj"])
    other.save_pretrained(tmp_path)
    base_logits = logits(tiny_llama, inputs)
    model = random_adapter(tiny_llama)
    expected = logits(model, inputs)
    model.load_adapter(tmp_path, "other")
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model, inputs), expected)
    model.set_adapter("other")
    assert relative(logits(model, inputs), logits(other, inputs)) < 1e-6
    model.set_adapter("other", inference_mode=True)
    assert model.get_nb_trainable_parameters()[0] == 0
    with pytest.warns(UserWarning, match="'default' is active now"):
        model.delete_adapter("other")
    assert model.active_adapters == ["default"]
    assert list(model.peft_config) == ["default"]
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), base_logits)
    assert not hasattr(tiny_llama.get_submodule("model.layers.0.self_attn.q_proj"), "ia3_l")
    assert torch.equal(logits(model, inputs), expected)


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
def test_misspelt_adapter(tiny_llama: PreTrainedModel, use: Callable[[IA3Model], None]) -> None:
    model = IA3Model(tiny_llama, IA3Config())
    with pytest.raises(IA3Error, match=r"no adapter 'defualt'.*did you mean 'default'"):
        use(model)
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize("name", ["forward", "banked", "training", "merged"])
def test_adapter_names_that_torch_could_not_tell_apart(
    tiny_llama: PreTrainedModel, name: str
) -> None:
    model = IA3Model(tiny_llama, IA3Config())
    keys = list(model.state_dict())
    with pytest.raises(IA3Error, match=f"adapter name '{name}' is also an attribute"):
        model.add_adapter(name, IA3Config())
    assert list(model.state_dict()) == keys
    assert list(model.peft_config) == ["default"]


def test_no_attribute_of_what_holds_adapters_is_an_adapters_name(
    tiny_llama: PreTrainedModel,
) -> None:
    config = IA3Config(
        target_modules=["v_proj"], feedforward_modules=[], modules_to_save=["lm_head"]
    )
    model = IA3Model(tiny_llama, config)
    holders = [part for part in model.modules() if type(part).__name__ in ("Site", "SavedModule")]
    assert {type(part).__name__ for part in holders} == {"Site", "SavedModule"}
    for name in {name for part in holders for name in vars(part)}:
        with pytest.raises(IA3Error, match=f"adapter name '{name}' is also an attribute"):
            model.add_adapter(name, config)
    assert list(model.peft_config) == ["default"]


def test_adapter_names_that_are_words(tiny_llama: PreTrainedModel, make_inputs: MakeInputs) -> None:
    model, inputs = random_adapter(tiny_llama), make_inputs("llama")
    expected = logits(model, inputs)
    vectors = model.vectors("default")
    for name in ("product", "place", "vectors", "remove", "carrier", "routed", "kundin-7", "größe"):
        model.add_adapter(name, IA3Config(), vectors)
        model.set_adapter(name)
        model.train().eval().to(torch.float32)
        assert torch.equal(logits(model, inputs), expected)
        assert f"model.model.layers.0.mlp.down_proj.ia3_l.{name}" in model.state_dict()
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(logits(twin, inputs), expected)
    assert model.unload() is tiny_llama


# -- with the rest of the world --------------------------------------------------------------------


@EVERY_MODEL
def test_generate(make_model: MakeModel, make_inputs: MakeInputs, kind: str) -> None:
    """Cached and step by step, as the merged model does without any hook."""
    inputs = {k: v for k, v in make_inputs(kind).items() if k != "labels"}
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    model = random_adapter(make_model(kind))
    found = model.generate(**inputs, **options)
    uncached = model.generate(**inputs, **options, use_cache=False)
    merged = model.merge_and_unload()
    expected = merged.generate(**inputs, **options)  # type: ignore[operator]
    assert torch.equal(found, expected)
    assert torch.equal(uncached, expected)


def test_deepcopy_is_independent(tiny_llama: PreTrainedModel, make_inputs: MakeInputs) -> None:
    inputs = make_inputs("llama")
    base_logits = logits(tiny_llama, inputs)
    model = random_adapter(tiny_llama)
    expected = logits(model, inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, inputs), expected)
    randomize(twin.vectors("default"), seed=9)
    changed = logits(twin, inputs)
    assert not torch.equal(changed, expected)
    assert torch.equal(logits(model, inputs), expected)
    assert model.unload() is tiny_llama
    assert torch.equal(logits(tiny_llama, inputs), base_logits)
    assert torch.equal(logits(twin, inputs), changed)
    twin.merge_adapter()
    unloaded = copy.deepcopy(twin).unload()
    assert torch.equal(logits(unloaded, inputs), base_logits)
    assert not any(map(hooks_on, unloaded.modules()))


def test_compiled_without_a_graph_break(
    tiny_llama: PreTrainedModel, make_inputs: MakeInputs
) -> None:
    inputs = make_inputs("llama")
    model = random_adapter(tiny_llama)
    model(**inputs, use_cache=False).loss.backward()
    vectors = model.vectors("default")
    expected = {name: vector.grad.clone() for name, vector in vectors.items()}  # type: ignore[union-attr]
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(**inputs, use_cache=False).loss.backward()
    for name, vector in vectors.items():
        assert vector.grad is not None
        assert relative(vector.grad, expected[name]) < 1e-5, name


@EVERY_MODEL
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_gradient_checkpointing(
    make_model: MakeModel, make_inputs: MakeInputs, kind: str, reentrant: bool
) -> None:
    inputs = make_inputs(kind)

    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        # In float64, as the order of sums may differ. Only done by transformers in training mode.
        model = random_adapter(make_model(kind)).double().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**inputs, use_cache=False).loss.backward()
        return {name: vector.grad for name, vector in model.vectors("default").items()}  # type: ignore[misc]

    expected, found = gradients(False), gradients(True)
    for name in expected:
        assert relative(found[name], expected[name]) < 1e-12, name


def saved_bytes(model: Any, inputs: Inputs) -> int:
    """What the backward pass needs: bytes in distinct storages, the model's own left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    storages: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs)
    return sum(storages.values())


def test_less_is_saved_for_the_backward_pass_than_by_peft(
    pair: Callable[[str, str], tuple[IA3Model, Any]], make_inputs: MakeInputs
) -> None:
    """The activation function and the gated product keep their operands, PEFT a copy besides."""
    inputs = make_inputs("llama")
    ours, theirs = pair("llama", "all-linear")
    activation = inputs["input_ids"].numel() * 48 * 4  # bytes, of the gate's or the up projection's
    layers = 2
    less = layers * 2 * activation
    assert saved_bytes(ours, inputs) <= saved_bytes(theirs, inputs) - less


@EVERY_MODEL
@EVERY_CHOICE
def test_never_more_is_saved_for_the_backward_pass_than_by_peft(
    pair: Callable[[str, str], tuple[IA3Model, Any]],
    make_inputs: MakeInputs,
    kind: str,
    choice: str,
) -> None:
    ours, theirs = pair(kind, choice)
    assert saved_bytes(ours, make_inputs(kind)) <= saved_bytes(theirs, make_inputs(kind))


@pytest.fixture
def recorded() -> list[Tensor]:
    """What a hook of the user's own saw."""
    return []


@pytest.mark.parametrize("first", [True, False])
def test_hooks_of_others_keep_what_they_saw(
    tiny_llama: PreTrainedModel, make_inputs: MakeInputs, recorded: list[Tensor], first: bool
) -> None:
    """An output that someone recorded is never written over."""
    layer = tiny_llama.get_submodule("model.layers.0.self_attn.k_proj")
    inputs = make_inputs("llama")

    def record(module: nn.Module, args: Any, output: Tensor) -> None:
        recorded.extend([output, output.detach().clone()])

    if first:
        handle = layer.register_forward_hook(record)
        model = random_adapter(tiny_llama)
    else:
        model = random_adapter(tiny_llama)
        handle = layer.register_forward_hook(record, prepend=True)
    model(**inputs).loss.backward()
    seen, then = recorded
    assert torch.equal(seen, then)
    model.unload()
    assert list(layer._forward_hooks) == [handle.id]


def test_linear_layers_whose_output_is_saved_by_what_they_compute() -> None:
    """A subclass may end in an operation that needs its own result again."""

    class Exponential(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).exp()

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4), Exponential(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model = IA3Model(
        base, IA3Config(target_modules=["0", "1", "3"], feedforward_modules=["3"])
    ).double()
    randomize(model.vectors("default"))
    inputs = torch.randn(3, 4, dtype=torch.float64)
    vectors = tuple(model.vectors("default").values())

    def by_definition(first: Tensor, second: Tensor, third: Tensor) -> Tensor:
        hidden = nn.functional.linear(inputs, base[0].weight, base[0].bias) * first.flatten()
        hidden = nn.functional.linear(hidden, base[1].weight, base[1].bias).exp() * second.flatten()
        return nn.functional.linear(hidden.relu() * third.flatten(), base[3].weight, base[3].bias)

    expected = torch.autograd.grad(by_definition(*vectors).square().sum(), vectors)
    found = torch.autograd.grad(model(inputs).square().sum(), vectors)
    for ours, want in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, want)


def test_attributes_come_from_the_base_model(tiny_llama: PreTrainedModel) -> None:
    model = IA3Model(tiny_llama, IA3Config())
    assert model.config is tiny_llama.config
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing


def test_print_trainable_parameters(
    tiny_llama: PreTrainedModel, make_model: MakeModel, capsys: pytest.CaptureFixture[str]
) -> None:
    IA3Model(tiny_llama, IA3Config()).print_trainable_parameters()
    ours = capsys.readouterr().out
    peft.get_peft_model(make_model("llama"), peft.IA3Config()).print_trainable_parameters()
    assert ours == capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:adapter 'first' was active")
def test_an_adapter_deleted_before_the_backward_pass_gets_its_gradients(
    tiny_llama: PreTrainedModel,
) -> None:
    """As PEFT's do."""
    model = IA3Model(tiny_llama.train(), IA3Config(), "first")
    model.add_adapter("second", IA3Config())
    vectors = model.vectors("first").values()
    ids = torch.arange(6).reshape(2, 3)
    loss = model(input_ids=ids, labels=ids).loss
    model.delete_adapter("first")
    loss.backward()
    assert all(vector.grad is not None for vector in vectors)
