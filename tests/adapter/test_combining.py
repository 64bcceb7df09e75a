"""Arithmetic on adapters: its properties, PEFT's results, the paper's formulas, and refusals."""

import dataclasses
import re
from typing import Any

import peft
import pytest
import torch
from conftest import MakeModel
from hypothesis import given, settings, strategies as st
from peft.utils.merge_utils import ties as peft_ties
from support.pairs import randomize, vectors
from support.paths import REPOSITORY
from torch import Tensor

import ia3
from ia3.adapter.combining import CombinationType, combine
from ia3.adapter.files import Adapter, adapter_files, read_adapter
from ia3.adapter.fingerprint import Fingerprint
from ia3.errors import IA3Error
from ia3.files.atomic import write_files

OUTPUTS = ("layers.0.k_proj", "layers.1.k_proj")
INPUT = "layers.0.down_proj"
BOTH = {
    "default": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "second": {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []},
}
OWN: tuple[CombinationType, ...] = ("average", "geometric_mean", "task_arithmetic", "ties")


def adapter(values, **changes):
    """An adapter of vectors on outputs of `k_proj` and inputs of `down_proj`."""
    config = ia3.IA3Config(**BOTH["default"])
    shapes = {name: (1, -1) if name == INPUT else (-1, 1) for name in values}
    shaped = {name: torch.tensor(held).reshape(shapes[name]) for name, held in values.items()}
    return dataclasses.replace(Adapter(config, shaped), **changes)


def combined(parts, weights, how, **options) -> dict[str, list[float]]:
    named = [(str(i), part) for i, part in enumerate(parts)]
    result = combine(named, weights, how, **options)
    assert {vector.dtype for vector in result.vectors.values()} <= {torch.float32}
    return {name: vector.reshape(-1).tolist() for name, vector in result.vectors.items()}


positive = st.floats(0.015625, 4, width=32)
VALUES = st.lists(positive, min_size=5, max_size=5)


@st.composite
def adapters(draw: st.DrawFn, values: st.SearchStrategy[list[float]] = VALUES) -> Adapter:
    return adapter({name: draw(values) for name in (*OUTPUTS, INPUT)})


def close(found: dict[str, list[float]], expected: dict[str, Tensor], bound: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        wanted = value.reshape(-1).tolist()
        assert found[name] == pytest.approx(wanted, rel=bound, abs=1e-12), name


EVERY = settings(deadline=None, max_examples=25)


@EVERY
@given(adapters(), st.lists(st.floats(0.1, 5), min_size=1, max_size=4))
@pytest.mark.parametrize("how", ["average", "geometric_mean"])
def test_a_mean_of_equals_is_the_same(how: Any, one: Adapter, weights: list[float]) -> None:
    close(combined([one] * len(weights), weights, how), one.vectors)


@EVERY
@given(adapters())
def test_an_adapter_alone_is_itself_and_with_its_inverse_the_identity(one: Adapter) -> None:
    for how, options in (("task_arithmetic", {}), ("ties", {"density": 1.0}), ("linear", {})):
        close(combined([one], [1.0], how, **options), one.vectors)  # type: ignore[arg-type]
    inverse = Adapter(one.config, {name: 1 / vector for name, vector in one.vectors.items()})
    identity = {name: torch.ones_like(vector) for name, vector in one.vectors.items()}
    close(combined([one, inverse], [1, 1], "geometric_mean"), identity)


@EVERY
@given(adapters(), adapters())
def test_what_was_added_can_be_taken_away_again(one: Adapter, other: Adapter) -> None:
    added = combine([("a", one), ("b", other)], [1, 1], "task_arithmetic")
    found = combined([added, other], [1, -1], "task_arithmetic")
    for name, vector in one.vectors.items():
        assert found[name] == pytest.approx(vector.reshape(-1).tolist(), abs=1e-6)


@EVERY
@given(st.lists(adapters(), min_size=2, max_size=4), st.randoms(use_true_random=False))
@pytest.mark.parametrize("how", OWN)
def test_the_order_of_adapters_does_not_matter(how: Any, parts: list[Adapter], random: Any) -> None:
    order = list(range(len(parts)))
    random.shuffle(order)
    weights = [1.0, 0.5, 0.25, 2.0][: len(parts)]
    expected = combined(parts, weights, how)
    found = combined([parts[i] for i in order], [weights[i] for i in order], how)
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-6, abs=1e-12)


# -- by hand ---------------------------------------------------------------------------------------


def test_the_formulas_on_a_few_values() -> None:
    one = adapter({OUTPUTS[0]: [2.0, 0.5, 1.0]})
    other = adapter({OUTPUTS[0]: [0.5, 0.5, 4.0]})

    def values(how: Any, *weights: float) -> list[float]:
        return combined([one, other], weights, how)[OUTPUTS[0]]

    assert values("linear", 2, -1) == pytest.approx([3.5, 0.5, -2.0])
    assert values("average", 1, 3) == pytest.approx([0.875, 0.5, 3.25])
    assert values("geometric_mean", 1, 1) == pytest.approx([1.0, 0.5, 2.0])
    assert values("geometric_mean", 3, -1) == pytest.approx([4.0, 0.5, 0.5])
    assert values("task_arithmetic", 2, -1) == pytest.approx([3.5, 0.5, -2.0])
    assert values("task_arithmetic", 1, 1) == pytest.approx([1.5, 0.0, 4.0])


def test_the_sign_of_a_geometric_mean_is_the_heavier_one() -> None:
    parts = [adapter({INPUT: v}) for v in ([-4.0, -4.0, 0.0], [-1.0, 1.0, 2.0], [2.0, 2.0, 2.0])]
    mean = combined(parts[:2], [1, 1], "geometric_mean")[INPUT]
    assert mean == pytest.approx([-2.0, 0.0, 0.0])  # neither sign is heavier at the second value
    mean = combined(parts, [1, 1, 2], "geometric_mean")[INPUT]
    assert mean[:2] == pytest.approx([0.0, 2.0])
    # A weight of 0 leaves an adapter out, with its zeros.
    mean = combined(parts, [0, 1, 1], "geometric_mean")[INPUT]
    assert mean == pytest.approx([0.0, 2**0.5, 2.0])
    with pytest.raises(IA3Error, match=r"is 0 in an adapter whose weight is negative"):
        combined(parts, [-1, 1, 1], "geometric_mean")


# -- TIES ------------------------------------------------------------------------------------------


def paper_ties(tasks, density, scale, *, frequency=False):
    """Yadav et al. 2023, algorithm 1, a value at a time, on task vectors that are flat lists."""
    kept = []
    for task in tasks:
        largest = sorted(range(len(task)), key=lambda p: -abs(task[p]))[: int(density * len(task))]
        kept.append([value if p in largest else 0.0 for p, value in enumerate(task)])

    def sgn(value: float) -> int:
        return (value > 0) - (value < 0)

    merged = []
    for column in zip(*kept, strict=True):
        gamma = sgn(sum(sgn(v) if frequency else v for v in column))
        agreeing = [v for v in column if sgn(v) == gamma and gamma]
        merged.append(scale * sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return merged


def distinct(count: int, seed: int) -> Tensor:
    """Values around one, no two of the same distance to it."""
    generator = torch.Generator().manual_seed(seed)
    return 1 + torch.randn(count, generator=generator) * 0.3


@pytest.mark.parametrize("density", [0.1, 0.2, 0.55, 1.0])
@pytest.mark.parametrize("scale", [1.0, 0.4])
@pytest.mark.parametrize("method", ["total", "frequency"])
def test_ties_is_the_papers_over_the_whole_adapter(density, scale, method):
    sizes = {OUTPUTS[0]: 12, OUTPUTS[1]: 12, INPUT: 40}
    parts, flat = [], []
    for seed in range(4):
        whole = distinct(64, seed)
        # So that trimming each site by itself would keep other values.
        whole[:24] = 1 + (whole[:24] - 1) * 3
        split = whole.split(list(sizes.values()))
        parts.append(adapter({n: held.tolist() for n, held in zip(sizes, split, strict=True)}))
        flat.append((whole.double() - 1).tolist())
    found = combined(parts, [scale] * 4, "ties", density=density, majority_sign_method=method)
    expected = paper_ties(flat, density, scale, frequency=method == "frequency")
    got = [value for name in sizes for value in found[name]]
    assert got == pytest.approx([1 + value for value in expected], abs=1e-6)
    assert len({round(value, 6) for value in got}) > 3


@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.25, 0.5])
def test_ties_on_one_site_is_pefts(method, density):
    tasks = [distinct(64, seed) for seed in range(3)]
    weights = [0.9, 0.5, 1.2]
    parts = [adapter({OUTPUTS[0]: task.tolist()}) for task in tasks]
    options = {"density": density, "majority_sign_method": method}
    found = torch.tensor(combined(parts, weights, "ties", **options)[OUTPUTS[0]])
    changes = [task - 1 for task in tasks]
    expected = 1 + peft_ties(changes, torch.tensor(weights), density, method)
    kept = [change.abs() >= change.abs().topk(int(64 * density)).values[-1] for change in changes]
    signs = torch.stack([change.sign() * keep for change, keep in zip(changes, kept, strict=True)])
    # Where as many values speak for one sign as for the other, PEFT takes the positive one.
    decided = signs.sum(0) != 0 if method == "frequency" else torch.ones(64, dtype=torch.bool)
    assert decided.sum() > 32
    torch.testing.assert_close(found[decided], expected[decided], rtol=0, atol=1e-6)


def test_ties_where_no_sign_wins_leaves_one():
    parts = [adapter({INPUT: [1.5, 1.5]}), adapter({INPUT: [0.5, 1.25]})]
    assert combined(parts, [1, 1], "ties", density=1.0)[INPUT] == [1.0, 1.375]


def test_values_that_stay_one_are_not_among_those_that_ties_may_keep() -> None:
    held = {OUTPUTS[0]: [9.0] * 6 + [1.1, 1.2, 1.3, 1.4]}
    part = adapter(held, frozen={OUTPUTS[0]: ((0, 6),)})
    kept = combined([part], [1], "ties", density=0.5)[OUTPUTS[0]]
    assert kept == pytest.approx([1.0] * 8 + [1.3, 1.4])


# -- what the adapters lack, and what stays one ----------------------------------------------------


@pytest.mark.parametrize("how", OWN)
def test_a_site_that_an_adapter_lacks_counts_as_ones(how: Any) -> None:
    one = adapter({OUTPUTS[0]: [2.0, 0.5], INPUT: [0.25, 3.0, 1.0]})
    other = adapter({OUTPUTS[0]: [1.5, 4.0]})
    filled = adapter({OUTPUTS[0]: [1.5, 4.0], INPUT: [1.0, 1.0, 1.0]})
    options = {"density": 1.0} if how == "ties" else {}
    for order in (1, -1):
        found = combined([one, other][::order], [1, 2][::order], how, **options)
        expected = combined([one, filled][::order], [1, 2][::order], how, **options)
        assert found == expected
    # It adds nothing to a weighted sum.
    assert combined([other, one], [2, 0.5], "linear")[INPUT] == [0.125, 1.5, 0.5]


@pytest.mark.parametrize("how", ["linear", *OWN])
@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        (((0, 4),), ((2, 6),), ((2, 4),)),
        (((0, 1), (2, 4), (5, 6)), ((0, 3), (5, 6)), ((0, 1), (2, 3), (5, 6))),
        (((0, 2), (2, 4)), ((0, 4),), ((0, 4),)),
        (((0, 2),), ((2, 4),), ()),
    ],
)
def test_values_stay_one_that_do_in_all(how, one, other, both):
    parts = [
        adapter({OUTPUTS[0]: [7.0, 8.0, 2.0, 3.0, 5.0, 6.0]}, frozen={OUTPUTS[0]: one}),
        adapter({OUTPUTS[0]: [5.0, 6.0, 4.0, 0.5, 9.0, 3.0]}, frozen={OUTPUTS[0]: other}),
        # One without the vector has no say.
        adapter({INPUT: [2.0]}),
    ]
    options = {"density": 1.0} if how == "ties" else {}
    result = combine([(str(i), part) for i, part in enumerate(parts)], [1, 1, 1], how, **options)
    assert result.frozen == ({OUTPUTS[0]: both} if both else {})
    stay = [any(start <= i < end for start, end in both) for i in range(6)]
    held = result.vectors[OUTPUTS[0]].reshape(-1).tolist()
    assert [value == 1 for value in held] == stay


def test_values_that_another_adapter_has_trained_are_ones_among_others():
    one = adapter({INPUT: [7.0, 8.0, 2.0]}, frozen={INPUT: ((0, 2),)})
    other = adapter({INPUT: [5.0, 6.0, 4.0]})
    assert combined([one, other], [1, 1], "average")[INPUT] == [3.0, 3.5, 3.0]


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "weights", "options", "message"),
    [
        ("tie", [1, 1], {}, "did you mean 'ties'"),
        ("average", [1], {}, "1 weight for 2 adapters"),
        ("average", [1, -1], {}, "add up to 0"),
        ("geometric_mean", [1, -2], {}, "add up to -1"),
        ("task_arithmetic", [1, float("nan")], {}, "expected finite numbers"),
        ("ties", [1, 1], {"density": 0.0}, "density is 0.0, expected a share above 0"),
        ("ties", [1, 1], {"density": "0.3"}, "density is '0.3'"),
        ("linear", None, {}, "the weights are None, expected a list of finite numbers"),
        ("average", [1, 1], {"density": 0.5}, "density belongs to 'ties'"),
        ("linear", [1, 1], {"majority_sign_method": "frequency"}, "majority_sign_method belongs"),
        ("ties", [1, 1], {"majority_sign_method": "mass"}, "expected one of total, frequency"),
    ],
)
def test_arguments_that_make_no_sense(how: Any, weights: Any, options: Any, message: str) -> None:
    one = adapter({INPUT: [2.0]})
    with pytest.raises(IA3Error, match=message):
        combined([one, one], weights, how, **options)


def test_adapters_that_do_not_go_together() -> None:
    one = adapter({INPUT: [2.0, 3.0]})
    longer = adapter({INPUT: [2.0, 3.0, 4.0]})
    with pytest.raises(IA3Error, match=r"\[1, 2\] on the input in one and \[1, 3\] on the input"):
        combined([one, longer], [1, 1], "average")

    outputs = ia3.IA3Config(target_modules=["down_proj"], feedforward_modules=[])
    on_output = Adapter(outputs, {INPUT: torch.ones(2, 1)})
    with pytest.raises(IA3Error, match=r"\[2, 1\] on the output in the other"):
        combined([one, on_output], [1, 1], "average")

    def of_base(model_type: str, value: float) -> Adapter:
        base = Fingerprint(model_type, {"embed.weight": ([4, 4], [value] * 8)})
        return dataclasses.replace(one, base=base)

    same = combine([("a", of_base("llama", 1)), ("b", one)], [1, 1], "average")
    assert same.base == of_base("llama", 1).base
    for other in (of_base("gpt2", 1), of_base("llama", 2)):
        with pytest.raises(IA3Error, match="0 and 1 are adapters of different base models"):
            combined([of_base("llama", 1), other], [1, 1], "average")

    head = {"head.weight": torch.ones(2, 2)}
    config = dataclasses.replace(one.config, modules_to_save=["head"])
    having = dataclasses.replace(one, config=config, copies=head)
    with pytest.raises(IA3Error, match=r"'head.weight' is in the modules_to_save of two"):
        combined([having, having], [1, 1], "average")
    once = combine([("a", one), ("b", having)], [1, 1], "average")
    assert once.copies == head
    assert once.config.modules_to_save == ["head"]

    inside = dataclasses.replace(one.config, modules_to_save=["layers"])
    with pytest.raises(IA3Error, match="part of 'layers' in the modules_to_save of another"):
        combined([one, Adapter(inside, {})], [1, 1], "average")


# -- on a model, and in files ----------------------------------------------------------------------


def two_adapters(model):
    adapted = ia3.IA3Model(model, ia3.IA3Config(**BOTH["default"]))
    adapted.add_adapter("second", ia3.IA3Config(**BOTH["second"]))
    for seed, name in enumerate(BOTH):
        randomize(vectors(adapted, name), seed)
    return adapted


@pytest.mark.parametrize("how", ["linear", *OWN])
def test_a_model_combines_as_files_do_and_peft_reads_them(how, make_model, tmp_path):
    model = two_adapters(make_model("llama"))
    model.save_pretrained(tmp_path)
    model.add_weighted_adapter(["default", "second"], [0.7, 0.6], "both", how)
    assert model.active_adapters == ["default"]
    stored = [("a", read_adapter(tmp_path)), ("b", read_adapter(tmp_path / "second"))]
    result = combine(stored, [0.7, 0.6], how)
    on_model = vectors(model, "both")
    assert_equal(result.vectors, on_model)

    write_files(tmp_path / "out", adapter_files(result))
    theirs = peft.PeftModel.from_pretrained(make_model("llama"), str(tmp_path / "out"))
    assert_equal(vectors(theirs), on_model)
    ours = ia3.PeftModel.from_pretrained(make_model("llama"), tmp_path / "out")
    model.set_adapter("both")
    ids = torch.arange(3, 14)[None]
    assert torch.equal(ours(input_ids=ids).logits, model(input_ids=ids).logits)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], vector) for name, vector in expected.items())


def test_a_refused_combination_leaves_the_model_as_it_is(make_model):
    model = two_adapters(make_model("llama"))
    before = list(model.state_dict())
    for arguments in [
        (["default", "second"], [1, 1], "new", "cat"),
        (["default", "second"], [1, -1], "new", "average"),
        (["default", "secnd"], [1, 1], "new", "ties"),
        (["default"], [1], "second", "ties"),
    ]:
        with pytest.raises(IA3Error):
            model.add_weighted_adapter(*arguments)
        assert list(model.state_dict()) == before
        assert set(model.peft_config) == {"default", "second"}


def test_a_list_and_an_expression_go_together(make_model: MakeModel) -> None:
    model = two_adapters(make_model("llama"))
    expression = r"model\.layers\.\d\.self_attn\.(q|v)_proj"
    model.add_adapter("third", ia3.IA3Config(target_modules=expression, feedforward_modules=[]))
    model.add_weighted_adapter(["default", "third"], [1, 1], "both", "task_arithmetic")
    expected = vectors(model) | vectors(model, "third")
    assert vectors(model, "both").keys() == expected.keys()
    assert all(torch.allclose(vectors(model, "both")[n], v) for n, v in expected.items())


def test_the_program_in_the_documents(make_model, tmp_path, monkeypatch):
    page = (REPOSITORY / "docs" / "adapters.md").read_text("utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, re.S)
    model = two_adapters(make_model("llama"))
    for name, folder in (("default", "tickets"), ("second", "sentiment")):
        model.save_pretrained(tmp_path / folder, adapter_name=name)
        model.load_adapter(tmp_path / folder, folder)
    monkeypatch.chdir(tmp_path)
    held: dict[str, Any] = {"model": model}
    exec(program, held)
    assert_equal(vectors(model, "both"), held["both"].vectors)
