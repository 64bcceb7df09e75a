"""Configs from anywhere: every field of every kind, and files of any content."""

import json
import time
from dataclasses import fields

import pytest
from hypothesis import given, settings, strategies as st
from torch import nn

import ia3
from ia3 import IA3Config, IA3Error, get_peft_config
from ia3.errors import BrokenFileError, InvalidTypeError, MissingFileError, UnknownNameError
from ia3.targets.resolve import resolve

FIELDS = [field.name for field in fields(IA3Config) if field.name != "unknown"]
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    # Words and expressions that get further.
    | st.sampled_from(
        ["IA3", "CAUSAL_LM", "k_proj", ".*", "(", "a{3}", "all-linear", "\ud800", "\0"]
    ),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from([*FIELDS, "unknown", "more"]), ANYTHING, max_size=4))
@settings(deadline=None, max_examples=400, derandomize=True)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_any_fields_make_a_config_that_reads_itself_again_or_an_error(values):
    try:
        config = get_peft_config(values)
    except IA3Error:
        return
    again = IA3Config.from_dict(json.loads(config.to_json()))
    assert again.to_json() == config.to_json()


DEEP: dict = {}
for _ in range(5000):
    DEEP = {"a": DEEP}
WRONG = {
    "task_type": ([], ["CAUSAL_LM"], {"a": 1}, 3, "causal"),
    "peft_type": ({"IA3": 1}, ["IA3"], None, 1, "LORA"),
    "auto_mapping": ("a", [], 1, {"a": {1, 2}}, {"a": float("nan")}, {"a": "\ud800"}, DEEP),
    "peft_version": (1, [], "\0", "\ud800", "1" * 100_000),
    "base_model_name_or_path": (1, {}, "a\0b", "\udfff", "a" * 100_000),
    "revision": (1, True, "a\0"),
    "inference_mode": (None, 1, "true", []),
    "fan_in_fan_out": (0, {}),
    "init_ia3_weights": ("no", None),
    "paper_sites": (1, "yes"),
    "target_modules": (1, True, {}, ["k", 1], [["k"]], [{}], "(", ["a\0"], "a\0", ["\ud800"]),
    "exclude_modules": (1.5, {"k": 1}, [None], "[", ["a" * 100_000], "\ud800"),
    "feedforward_modules": (object(), [b"k"], "*", ["a" * 100_000]),
    "modules_to_save": (
        "head",
        1,
        [""],
        [1],
        [{}],
        ["a\0"],
        ["a" * 100_000],
        [*map(str, range(2000))],
    ),
    "unknown": (1, [], {"a": object()}),
}


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_value_is_named_with_its_field_and_cut(field):
    for value in WRONG[field]:
        with pytest.raises(IA3Error, match=field) as caught:
            IA3Config(**{field: value})
        assert len(str(caught.value)) < 500


def test_kinds_of_errors(tmp_path):
    for values in ([], None, "IA3", 3, {1: 2}):
        for read in (IA3Config.from_dict, get_peft_config):
            with pytest.raises(InvalidTypeError, match="expected a mapping"):
                read(values)
    with pytest.raises(InvalidTypeError, match="revision is 3, expected a string"):
        IA3Config.from_peft_type(peft_type="IA3", revision=3)
    with pytest.raises(MissingFileError, match="does not exist"):
        IA3Config.from_json(tmp_path / "adapter_config.json")
    with pytest.raises(MissingFileError, match="is not a file"):
        IA3Config.from_json(tmp_path)
    path = tmp_path / "adapter_config.json"
    for content in (b"[]", b"{", b"\xff", b"{}", b'{"peft_type": []}'):
        path.write_bytes(content)
        with pytest.raises(BrokenFileError, match="adapter_config"):
            IA3Config.from_json(path)
    path.write_bytes(b'{"peft_type": "LORA"}')
    with pytest.raises(UnknownNameError, match="adapter_config"):
        IA3Config.from_json(path)
    path.write_bytes(b'{"peft_type": "IA3", "target_modules": "("}')
    with pytest.raises(BrokenFileError, match=r"adapter_config\.json: target_modules '\('"):
        IA3Config.from_pretrained(tmp_path)
    path.write_bytes(b" " * (1 << 24) + b"{}")
    with pytest.raises(BrokenFileError, match="larger than 16777216 bytes"):
        IA3Config.from_json(path)


def wide() -> nn.Module:
    """Two hundred blocks of fifty linear layers, on no device."""
    blocks = nn.Sequential()
    for i in range(200):
        block = nn.Module()
        for j in range(50):
            block.add_module(f"part{j}", nn.Linear(2, 2, device="meta"))
        blocks.add_module(f"b{i}", block)
    return blocks


def test_ten_thousand_names_in_all_lists_are_resolved_in_time(capsys):
    """They took 28 seconds and 7 GB."""
    model = wide()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    values = {
        "peft_type": "IA3",
        "target_modules": names,
        "exclude_modules": [f"{n}.x" for n in names],
    }
    values["feedforward_modules"] = names[::2]
    start = time.process_time()
    config = IA3Config.from_dict(values)
    _, targets = resolve(model, config, frozen={})
    assert [target.side for target in targets] == ["input", "output"] * 5000
    with pytest.raises(ia3.NoMatchingPeftModuleError, match=r"'b0\.part0\.x' matches nothing"):
        resolve(model, config)
    config.exclude_modules = None
    ia3.explain(model, config)
    assert "10000 modules" in capsys.readouterr().out
    assert time.process_time() - start < 60


def test_an_expression_that_takes_too_long_leaves_the_model_as_it_was():
    model = nn.Sequential()
    model.add_module("a" * 60 + "bb", nn.Linear(2, 2))
    for field in ("exclude_modules", "feedforward_modules"):
        modules = {"target_modules": "a+bb", "feedforward_modules": []}
        modules |= {field: r"(a|aa|a?a)+[^b]"}
        with pytest.raises(
            IA3Error, match=f"{field}: the expression .* takes longer than 1 second"
        ):
            ia3.get_peft_model(model, IA3Config(**modules))
        assert list(dict(model.named_modules())) == ["", "a" * 60 + "bb"]
