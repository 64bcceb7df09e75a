"""The report: the grid's numbers, and an HTML page that is whole, safe and the same every time."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from support.page import Page

from ia3.report.heatmap import layer_site_grid
from ia3.report.training_report import training_report
from ia3.sentences.checkpoint import EncoderStep
from ia3.tfew.training.trainer import TrainingStep


def history(steps: int) -> list[TrainingStep]:
    return [
        TrainingStep(i + 1, steps, 3 / (i + 1) + 0.3, 2 / (i + 1), 1 / (i + 1), 0.3)
        for i in range(steps)
    ]


def llama_vectors(layers: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"model.layers.{i}.{site}": 1 + 0.1 * torch.randn(16, generator=generator)
        for i in range(layers)
        for site in ("self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
    }


def report(**changes: Any) -> str:
    arguments: dict[str, Any] = {
        "title": "Support tickets",
        "facts": [("accuracy before", "50.0%"), ("accuracy after", "87.5%")],
        "history": history(30),
        "classes": ["billing", "bug", "other"],
        "confusion_before": [[3, 1, 0], [2, 2, 0], [0, 4, 0]],
        "confusion_after": [[4, 0, 0], [0, 4, 0], [0, 1, 3]],
        "vectors": llama_vectors(4),
    }
    return training_report(**(arguments | changes))


# -- the grid -------------------------------------------------------------------------------------


def test_the_grid_of_hand_computed_vectors():
    grid = layer_site_grid(
        {
            "model.layers.0.mlp.down_proj": torch.tensor([2.0, 0.5, 1.0, 4.0]),
            "model.layers.0.self_attn.k_proj": torch.tensor([-1.0, 1.005, 0.995, -0.25]),
            "model.layers.1.mlp.down_proj": torch.tensor([0.0, 1.0]),
        }
    )
    assert grid.layers == ["0", "1"]
    assert grid.sites == ["mlp.down_proj", "self_attn.k_proj"]
    octaves_of_k = (np.log2(1.005) + np.log2(0.995) - 2) / 4
    assert_allclose(grid.values["mean"], [[0.5, octaves_of_k], [-3.0, np.nan]], atol=1e-6)
    std_of_k = np.std([-1.0, 1.005, 0.995, -0.25])
    assert_allclose(
        grid.values["spread"], [[np.std([2, 0.5, 1, 4]), std_of_k], [0.5, np.nan]], rtol=1e-6
    )
    assert_array_equal(grid.values["inhibited"], [[0.25, 0.25], [0.5, np.nan]])
    assert_array_equal(grid.values["amplified"], [[0.5, 0.0], [0.0, np.nan]])


def test_the_identity_is_zero_everywhere():
    vectors = {f"model.layers.{i}.mlp.down_proj": torch.ones(8) for i in range(2)}
    grid = layer_site_grid(vectors)
    for values in grid.values.values():
        assert_array_equal(values, np.zeros((2, 1)))
    Page(report(vectors=vectors))


@pytest.mark.parametrize(
    ("names", "layers", "sites"),
    [
        ([f"h.{i}.mlp.wo" for i in (10, 9, 0, 11, 2)], ["0", "2", "9", "10", "11"], ["mlp.wo"]),
        (["lm_head", "layers.0.wo"], ["0", "other"], ["lm_head", "wo"]),
    ],
)
def test_layers_are_sorted_by_number_and_what_is_outside_comes_last(names, layers, sites):
    grid = layer_site_grid({name: torch.ones(2) for name in names})
    assert (grid.layers, grid.sites) == (layers, sites)


def test_t5_has_its_encoder_first_and_no_cross_attention_there():
    names = (
        "decoder.block.0.layer.0.SelfAttention.k",
        "decoder.block.0.layer.1.EncDecAttention.k",
        "encoder.block.10.layer.0.SelfAttention.k",
        "encoder.block.2.layer.1.DenseReluDense.wo",
    )
    grid = layer_site_grid({name: torch.ones(2) for name in names})
    assert grid.layers == ["encoder.2", "encoder.10", "decoder.0"]
    sites = ("DenseReluDense.wo", "EncDecAttention.k", "SelfAttention.k")
    assert grid.sites == [f"layer.{site}" for site in sites]
    assert_array_equal(np.isnan(grid.values["mean"]), [[0, 1, 1], [1, 1, 0], [1, 0, 0]])


def test_the_experts_of_a_layer_share_a_cell():
    values = ([2.0, 2.0, 2.0], [0.5])
    names = [f"model.layers.0.mlp.experts.{i}.down_proj" for i in range(2)]
    grid = layer_site_grid({n: torch.tensor(v) for n, v in zip(names, values, strict=True)})
    assert grid.sites == ["mlp.experts.down_proj"]
    assert_allclose(grid.values["mean"], [[0.5]])
    assert_allclose(grid.values["inhibited"], [[0.25]])


def test_trained_half_precision_parameters_are_read():
    vector = torch.nn.Parameter(torch.full((4,), 0.5, dtype=torch.bfloat16))
    assert_array_equal(layer_site_grid({"h.0.wo": vector}).values["mean"], [[-1.0]])


# -- the page -------------------------------------------------------------------------------------


def test_the_page_is_whole_and_shows_what_it_was_given():
    page = Page(report())
    assert page.texts["h1"] == page.texts["title"][:1] == ["Support tickets"]
    assert page.texts["dd"] == ["50.0%", "87.5%"]
    # The curve, two matrices, three maps.
    assert page.count("svg") == page.count("figcaption") + 1 == 6
    assert page.texts["small"] == ["41.7% right, 5 of 12", "91.7% right, 11 of 12"]
    tooltips = page.texts["title"]
    assert "true bug, predicted billing: 2" in tooltips
    assert "true other, predicted other: 3" in tooltips
    assert {"training step", "loss", "true label", "predicted label", "layer"} <= set(
        page.texts["text"]
    )


def test_an_encoders_training_has_its_loss_alone():
    ranking, contrastive = (
        Page(report(history=steps))
        for steps in (history(30), [EncoderStep(i + 1, 30, 3 / (i + 1)) for i in range(30)])
    )
    assert ranking.texts["b"] == ["total", "lm", "length norm", "unlikelihood"]
    assert contrastive.texts["b"] == ["total"]
    curve = next(a for tag, a in contrastive.elements if tag == "svg")
    assert curve
    assert contrastive.count("svg") == ranking.count("svg")


def test_the_maps_show_the_grids_numbers():
    page = Page(report(vectors={"h.0.wo": torch.tensor([2.0, 0.5, 1.0, 4.0])}))
    for shown in ("+0.500 octaves", "25% inhibited", "50% amplified"):
        assert f"layer 0, wo: {shown}" in page.texts["title"]


def test_nothing_is_fetched():
    source = report()
    assert "http" not in re.sub("http-equiv", "", source)
    for tag, attributes in Page(source).elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "img", "image", "base")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href"):
                assert value is not None
                assert value.startswith("#")
    assert not re.search(r"url\((?!#)|@import", source)


def test_references_inside_the_page_are_unique_and_resolve():
    elements = Page(report()).elements
    identifiers = [a["id"] for _, a in elements if "id" in a]
    assert len(identifiers) == len(set(identifiers))
    values = [v or "" for _, attributes in elements for v in attributes.values()]
    targets = {t for v in values for t in re.findall(r"url\(#([^)]+)\)|^#(.+)$", v) for t in t if t}
    assert targets
    assert targets <= set(identifiers)


def test_every_colour_follows_the_theme():
    source = report()
    drawn = "".join(re.findall(r"<svg.*?</svg>", source, re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawn)) == set()
    named = set(re.findall(r"var\(--([\w-]+)\)", source))
    defined = set(re.findall(r"--([\w-]+):", source))
    assert named == defined


def test_names_are_text_whatever_they_contain():
    evil = "</text></svg><script>alert('1')</script>"
    classes = [evil, '" onload="alert(1)', "a & b"]
    counts = np.ones((3, 3))
    source = report(
        title=evil,
        facts=[(evil, evil)],
        classes=classes,
        confusion_before=counts,
        confusion_after=counts,
        vectors={f"h.0.{evil.replace('.', '')}": torch.ones(2)},
    )
    page = Page(source)
    assert page.count("script") == 0
    assert "onload" not in {name for _, attributes in page.elements for name in attributes}
    assert page.texts["h1"] == [evil]
    assert f"true {evil}, predicted a & b: 1" in page.texts["title"]


def test_names_with_formulas_other_scripts_and_control_characters_are_drawn():
    source = report(title="\ud800", classes=["$5 or $10^$", "卡丢了", "a\x00b\x1b\ud800\nc"])
    assert source.encode()
    page = Page(source)
    labels = page.texts["text"]
    assert {"$5 or $10^$", "卡丢了", "a\ufffdb\ufffd\ufffd c"} <= set(labels)


def test_the_same_input_gives_the_same_bytes():
    assert report() == report()


def test_the_users_own_settings_neither_matter_nor_change():
    import matplotlib

    plain = report()
    with matplotlib.rc_context({"svg.fonttype": "path", "font.size": 30, "axes.grid": True}):
        assert report() == plain
        assert matplotlib.rcParams["font.size"] == 30


def test_a_layer_that_lacks_a_site_is_marked():
    vectors = {
        "encoder.block.0.layer.0.SelfAttention.k": torch.full((2,), 0.5),
        "decoder.block.0.layer.0.SelfAttention.k": torch.full((2,), 2.0),
        "decoder.block.0.layer.1.EncDecAttention.k": torch.ones(2),
    }
    source = report(vectors=vectors)
    page = Page(source)
    assert page.texts["title"].count("layer encoder.0, layer.EncDecAttention.k: no vector") == 3
    assert page.texts["text"].count("×") == 3
    assert {"encoder", "decoder"} <= set(page.texts["text"])
    assert "nan" not in source.lower()


def test_without_matplotlib_the_extra_is_named():
    code = 'import sys; sys.modules["matplotlib"] = None; import ia3.report.figures'
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "MissingExtraError: drawing pictures needs the package 'matplotlib'" in done.stderr
    assert "pip install 'ia3[report]'" in done.stderr
