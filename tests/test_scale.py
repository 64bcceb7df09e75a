"""docs/scale.md: its tables are those that the program computes, from counts that are right."""

from __future__ import annotations

import sys

import pytest
from support.paths import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import scale


@pytest.fixture(scope="module")
def shapes():
    return {name: scale.shape_of(config) for name, config in scale.SHAPES.items()}


def test_an_adapter_has_the_values_of_its_places(shapes):
    for name, config in scale.SHAPES.items():
        wide, inner = config.hidden_size, config.intermediate_size
        keys = config.num_key_value_heads * (wide // config.num_attention_heads)
        paper = config.num_hidden_layers * (2 * keys + inner)
        # Queries and the attention's output, gate and up besides.
        whole = paper + config.num_hidden_layers * (2 * wide + 2 * inner)
        assert shapes[name].values == {"the paper's": paper, "all-linear": whole}
        factors = 2 * (wide + keys) + inner + wide
        assert shapes[name].lora == 8 * config.num_hidden_layers * factors


def test_the_models_have_the_sizes_that_they_are_called_by(shapes):
    sizes = {name: shape.parameters / 1e9 for name, shape in shapes.items()}
    assert sizes == pytest.approx({"7B": 6.74, "70B": 69.0, "405B": 405.9}, rel=0.005)


def test_the_document_has_the_tables_that_are_computed(monkeypatch, shapes):
    monkeypatch.setattr(scale, "shape_of", lambda config: next(found))
    found = iter(shapes.values())
    document = (REPOSITORY / "docs" / "scale.md").read_text("utf-8")
    for title, content in scale.tables().items():
        assert content in document, title


def test_sizes_and_times_have_three_digits_and_a_unit():
    sizes = {0: "0 B", 999: "999 B", 2_457_600: "2.46 MB", 999_700: "1 MB", 98.1e12: "98.1 TB"}
    assert {count: scale.size(count) for count in sizes} == sizes
    times = {2.35e-5: "23.5 µs", 0.0014: "1.4 ms", 90.0: "90 s"}
    assert {seconds: scale.duration(seconds) for seconds in times} == times
