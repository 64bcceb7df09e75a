"""What a config would rescale, and the paper's sites from the first step to PEFT's outputs."""

import json
import math
import re
import warnings

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.architectures import build, output
from support.pairs import randomize, relative, vectors
from support.snapshots import assert_unchanged, snapshot
from torch import nn

import ia3
from ia3 import IA3Config, IA3Error, IA3Model, get_peft_model_state_dict

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")


@pytest.fixture
def explained(capsys):
    """What is printed: the title, a row for each kind of module, and the sum."""

    def explain(model, config=None):
        ia3.explain(model, config)
        printed = capsys.readouterr().out.splitlines()
        title, head, *lines, total = (line for line in printed if not line.startswith("note: "))
        columns = head.split()
        assert columns == ["module", "side", "times", "values", "why"]
        rows = [dict(zip(columns, line.split(maxsplit=4), strict=True)) for line in lines]
        return title, rows, total

    return explain


# -- explain ---------------------------------------------------------------------------------------

CONFIGS = {
    "defaults": None,
    "paper's sites": IA3Config(paper_sites=True),
    "all linear layers": IA3Config(target_modules="all-linear"),
    "an expression": IA3Config(target_modules=r".*(k_proj|c_attn|query_key_value|Attention\.k)"),
}


@pytest.mark.parametrize("choice", CONFIGS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "t5", "mixtral"])
def test_what_is_printed_is_what_is_rescaled(kind, choice, explained):
    config = CONFIGS[choice]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "PEFT's default .'w2'. for 'mixtral'")
        model = build(kind)
        before = snapshot(model)
        title, rows, total = explained(model, config)
        assert_unchanged(model, before)
        found = IA3Model(model, config or IA3Config()).vectors("default")
    assert title == f"{type(model).__name__} ({kind})"
    assert sum(int(row["times"]) for row in rows) == len(found)
    shapes = {name: tuple(vector.shape) for name, vector in found.items()}
    for row in rows:
        # The asterisk stands for the number of a layer.
        pattern = re.escape(row["module"]).replace(r"\*", r"\d+")
        names = [name for name in shapes if re.fullmatch(pattern, name)]
        assert len(names) == int(row["times"])
        for name in names:
            shape = shapes.pop(name)
            assert math.prod(shape) == int(row["values"])
            side = "output" if shape[-1] == 1 else "input" if shape[0] == 1 else "inner"
            assert side == row["side"]
    assert not shapes
    size = sum(vector.numel() for vector in found.values())
    assert total.startswith(f"{len(found)} modules, {size:,} values, {4 * size:,} bytes")
    assert ("stay one" in total) == (choice == "paper's sites" and kind in ("gpt2", "bloom"))


@pytest.mark.parametrize(
    ("kind", "config", "reasons"),
    [
        ("llama", None, ["PEFT's default 'k_proj'", "PEFT's default 'down_proj'"]),
        ("llama", IA3Config(paper_sites=True), ["keys", "values", "feed-forward inner activation"]),
        ("gpt2", IA3Config(paper_sites=True), ["fused q-k-v: queries stay one"]),
        ("llama", IA3Config(target_modules="all-linear"), ["linear layer"]),
        ("llama", IA3Config(target_modules=r".*k_proj"), ["matches '.*k_proj'"]),
        ("llama", IA3Config(target_modules=["mlp.down_proj"]), ["named by 'mlp.down_proj'"]),
    ],
)
def test_reasons(kind, config, reasons, explained):
    _, rows, _ = explained(build(kind), config)
    assert {row["why"] for row in rows} >= set(reasons)


def test_a_model_without_weights_and_one_with_adapters(make_model, explained):
    plain = explained(make_model("llama"))
    with torch.device("meta"):
        empty = make_model("llama")
    assert explained(empty) == plain
    model = IA3Model(make_model("llama"), IA3Config(target_modules="all-linear"))
    model.add_adapter("b", IA3Config(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert explained(model.model) == plain


def test_modules_that_are_alone_keep_their_names(explained):
    model = nn.Sequential(nn.Linear(3, 4), nn.ModuleDict({"7": nn.Linear(4, 4)}))
    title, rows, total = explained(model, IA3Config(target_modules=["7"]))
    assert title == "Sequential"
    assert [list(row.values()) for row in rows] == [["1.7", "output", "1", "4", "named by '7'"]]
    assert total == "1 module, 4 values, 16 bytes"


def test_what_cannot_be_explained(capsys):
    with pytest.raises(IA3Error, match="no default target_modules"):
        ia3.explain(nn.Sequential(nn.Linear(3, 4)))
    assert capsys.readouterr().out == ""


def test_mixtral_has_no_module_of_pefts_default(explained):
    """Its experts' `w2` are one 3-D parameter now."""
    message = r"\['w2'\] for 'mixtral' matches nothing.*\['experts'\] .* is rescaled instead"
    with pytest.raises(ValueError, match="w2"):
        peft.get_peft_model(build("mixtral"), peft.IA3Config(target_modules=["w2"]))
    with pytest.warns(UserWarning, match=message):
        _, rows, _ = explained(build("mixtral"))
    (experts,) = [row for row in rows if row["side"] == "inner"]
    assert experts["module"] == "model.layers.*.mlp.experts"
    with pytest.warns(UserWarning, match=message):
        model = IA3Model(build("mixtral"), IA3Config())
    shape = model.vectors("default")["model.layers.0.mlp.experts"].shape
    assert shape == (model.config.num_local_experts, model.config.intermediate_size)


# -- the paper's sites, end to end -----------------------------------------------------------------


# Of the tiny models' fused projections, 32 wide with 4 heads, which values are queries.
FIRST = list(range(32))
BY_HEADS = [24 * head + value for head in range(4) for value in range(8)]
QUERIES = {"gpt2": FIRST, "bloom": BY_HEADS, "gpt_neox": BY_HEADS, "falcon": FIRST}
FUSED = ("c_attn", "query_key_value")


def fused_names(model):
    names = [name for name in model.vectors("default") if name.endswith(FUSED)]
    assert len(names) == 2
    return names


def trained(kind):
    """Trained with a weight decay that would shrink every value."""
    model = IA3Model(build(kind), IA3Config(paper_sites=True, task_type="CAUSAL_LM"))
    parameters = model.vectors("default").values()
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.5)
    target = torch.randn(output(kind, model).shape, generator=torch.Generator().manual_seed(2))
    for _ in range(5):
        optimizer.zero_grad()
        (output(kind, model) - target).square().mean().backward()
        optimizer.step()
    return model


@torch.no_grad()
def answer(kind, model):
    return output(kind, model)


def projected(kind, model, name):
    """What a fused projection of the first layer gives for the batch."""
    seen = []
    module = model.get_submodule(name)
    handle = module.register_forward_hook(lambda *call: seen.append(call[-1].clone()))
    answer(kind, model)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("kind", QUERIES)
def test_queries_are_never_rescaled(kind, tmp_path):
    model = trained(kind)
    first = fused_names(model)[0]
    queries = QUERIES[kind]
    others = sorted(set(range(model.vectors("default")[first].numel())) - set(queries))
    assert others

    def check(adapted):
        plain = projected(kind, build(kind), first)
        found = projected(kind, adapted.model, first)
        assert torch.equal(found[..., queries], plain[..., queries])
        assert ((found - plain)[..., others].abs().amax(dim=(0, 1)) > 0).all()

    check(model)
    expected = answer(kind, model)

    # However the vectors leave the model.
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.{}.ia3_l"
    for state, form in (
        (stored, key),
        (get_peft_model_state_dict(model), key),
        (model.state_dict(), "model.{}.ia3_l.default"),
    ):
        for name in fused_names(model):
            vector = state[form.format(name)].flatten()
            assert (vector[queries] == 1).all()
            assert (vector[others] != 1).all()

    loaded = IA3Model.from_pretrained(build(kind), tmp_path, is_trainable=True)
    assert torch.equal(answer(kind, loaded), expected)
    randomize(vectors(loaded))  # the queries' values too
    check(loaded)
    loaded.merge_adapter()
    check(loaded)
    assert (loaded.adapter("default").vectors[first].flatten()[queries] == 1).all()

    theirs = peft.PeftModel.from_pretrained(build(kind), str(tmp_path))
    assert relative(answer(kind, theirs), expected) < 1e-6


@pytest.mark.parametrize("kind", QUERIES)
def test_the_header_says_what_stays_one(kind, tmp_path):
    IA3Model(build(kind), IA3Config(paper_sites=True)).save_pretrained(tmp_path / "first")
    model = IA3Model.from_pretrained(build(kind), tmp_path / "first")
    model.save_pretrained(tmp_path / "again")
    for folder in (tmp_path / "first", tmp_path / "again"):
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            stored = json.loads(file.metadata()["ia3_frozen"])
        assert sorted(stored) == sorted(fused_names(model))
        for ranges in stored.values():
            places = [place for start, end in ranges for place in range(start, end)]
            assert places == QUERIES[kind]
        # The config itself says nothing that PEFT would not understand.
        assert "paper_sites" not in json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("kind", ["gpt2", "bloom"])
def test_sums_and_further_adapters_keep_the_queries(kind):
    model = IA3Model(build(kind), IA3Config(paper_sites=True))
    model.add_adapter("second", IA3Config(paper_sites=True))
    model.add_adapter("whole", IA3Config())  # PEFT's default: queries as well
    for seed, adapter in enumerate(("default", "second", "whole")):
        randomize(vectors(model, adapter), seed)
    first, queries = fused_names(model)[0], QUERIES[kind]
    plain = projected(kind, build(kind), first)[..., queries]
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "sum")
    for active in (["default", "second"], ["sum"]):
        model.set_adapter(active)
        assert torch.equal(projected(kind, model.model, first)[..., queries], plain)
    model.set_adapter("whole")
    assert not torch.equal(projected(kind, model.model, first)[..., queries], plain)


def test_values_of_queries_are_not_loaded_where_they_stay_one(tmp_path):
    """They would be taken for ones without a word."""
    whole = IA3Model(build("gpt2"), IA3Config())
    randomize(vectors(whole))
    whole.save_pretrained(tmp_path)
    model = IA3Model(build("gpt2"), IA3Config(paper_sites=True))
    before = snapshot(model)
    with pytest.raises(IA3Error, match=r"values of its vectors stay one: of .*c_attn"):
        model.load_adapter(tmp_path, "default")
    assert_unchanged(model, before)
    model.load_adapter(tmp_path, "whole")
    model.set_adapter("whole")
    assert torch.equal(answer("gpt2", model), answer("gpt2", whole))
