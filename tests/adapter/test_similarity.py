"""Adapters without a model: outlines, log-scales, differences, the nearest among many."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as arrays

import ia3
from ia3.adapter.files import Adapter, adapter_files, read_adapter
from ia3.adapter.fingerprint import Fingerprint
from ia3.adapter.layout import find_adapters, read_outline, read_vectors
from ia3.adapter.similarity import difference, largest_changes, log_scales, search
from ia3.errors import IA3Error
from ia3.files.atomic import write_files
from ia3.report.heatmap import difference_grid, layer_site_grid, mean_grid, site_statistics
from ia3.report.terminal import short_sites

SITES = ("model.layers.0.mlp.down_proj", "model.layers.0.self_attn.k_proj")


def write(folder: Path, values: dict[str, list[float]], model="base", **changes) -> Path:
    """An adapter's folder with these vectors, on outputs."""
    modules = {"target_modules": ["down_proj", "k_proj"], "feedforward_modules": []}
    config = ia3.IA3Config(base_model_name_or_path=model, **modules)
    vectors = {name: torch.tensor(held).reshape(-1, 1) for name, held in values.items()}
    write_files(folder, adapter_files(dataclasses.replace(Adapter(config, vectors), **changes)))
    return folder


def random_values(seed: int, sites: tuple[str, ...] = SITES) -> dict[str, list[float]]:
    generator = np.random.default_rng(seed)
    return {site: (1 + generator.normal(0, 0.2, 6)).tolist() for site in sites}


def test_an_outline_says_what_the_files_say(tmp_path: Path) -> None:
    base = Fingerprint("llama", {"embed": ([2, 2], [1.0, 2.0])})
    modules = {"target_modules": ["k_proj"], "feedforward_modules": []}
    config = ia3.IA3Config(**modules, modules_to_save=["score"])
    # A copy may hold whole numbers; a vector must not.
    copies = {"score.weight": torch.ones(2, 6), "score.count": torch.tensor(3)}
    frozen = {SITES[0]: ((0, 2),)}
    write(tmp_path, random_values(0), copies=copies, base=base, frozen=frozen, config=config)
    outline = read_outline(tmp_path)
    assert outline.shapes == dict.fromkeys(SITES, (6, 1))
    assert (outline.values, set(outline.copies)) == (12, {"score.weight", "score.count"})
    assert (outline.frozen, outline.base) == (frozen, base)
    assert outline.adapter_bytes == (tmp_path / "adapter_model.safetensors").stat().st_size
    expected = {name: np.float32(held)[:, None] for name, held in random_values(0).items()}
    expected[SITES[0]][:2] = 1
    found = read_vectors(outline)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], values) for name, values in expected.items())


def test_a_pickled_adapter_has_the_same_outline(tmp_path: Path) -> None:
    write(tmp_path / "safe", random_values(0))
    write(tmp_path / "pickled", random_values(0))
    stored = read_adapter(tmp_path / "safe")
    keys = {f"base_model.model.{name}.ia3_l": v for name, v in stored.vectors.items()}
    torch.save(keys, tmp_path / "pickled" / "adapter_model.bin")
    (tmp_path / "pickled" / "adapter_model.safetensors").unlink()
    safe, pickled = read_outline(tmp_path / "safe"), read_outline(tmp_path / "pickled")
    assert pickled.shapes == safe.shapes
    expected = read_vectors(safe)
    assert all(np.array_equal(v, expected[name]) for name, v in read_vectors(pickled).items())


def test_adapters_are_found_below_a_folder_but_for_hidden_ones(tmp_path: Path) -> None:
    for name in ("b", "a/default", "a", ".a.0123456789ab", "c/.cache/x"):
        write(tmp_path / name, random_values(0))
    (tmp_path / "empty").mkdir()
    found = [path.relative_to(tmp_path).as_posix() for path in find_adapters(tmp_path)]
    assert found == ["a", "a/default", "b"]
    assert list(find_adapters(tmp_path / "b")) == [tmp_path / "b"]
    with pytest.raises(FileNotFoundError):
        list(find_adapters(tmp_path / "nowhere"))


def test_a_difference_by_hand() -> None:
    a = {SITES[0]: np.array([[2.0], [0.5], [1.0]]), SITES[1]: np.array([[0.0]])}
    b = {SITES[0]: np.array([[4.0], [1.0], [-2.0]])}
    whole, (first, second) = difference(a, b)
    assert (first.site, first.values) == (SITES[0], 3)
    # Log-scales: (1, -1, 0) and (2, 0, 1).
    assert first.cosine == pytest.approx(2 / math.sqrt(2 * 5))
    assert first.norm == pytest.approx(math.sqrt(4 + 0.25 + 9))
    assert first.change == pytest.approx(1.0)
    # Nothing there is as ones; 0 counts as 2**-6.
    assert (second.cosine, second.norm, second.change) == (None, 1.0, 6.0)
    assert (whole.values, whole.norm) == (4, pytest.approx(math.sqrt(14.25)))
    assert whole.cosine == pytest.approx(2 / math.sqrt((1 + 1 + 36) * 5))
    changes = largest_changes(a, b, 2)
    assert [(c.site, c.index, c.change) for c in changes] == [(SITES[1], 0, 6.0), (SITES[0], 0, 1)]
    assert (changes[1].first, changes[1].second) == (2.0, 4.0)
    grid = difference_grid([first, second])
    assert grid.sites == ["mlp.down_proj", "self_attn.k_proj"]
    assert grid.values["change"].tolist() == [[pytest.approx(1.0), 6.0]]
    assert grid.values["norm"].tolist() == [[pytest.approx(math.sqrt(13.25)), 1.0]]
    assert np.isnan(grid.values["cosine"]).tolist() == [[False, True]]


def test_vectors_that_share_a_cell_are_pooled() -> None:
    names = [f"model.layers.0.experts.{i}.down_proj" for i in range(2)]
    a = {name: np.ones((1, size)) for name, size in zip(names, (1, 3), strict=True)}
    b = {names[0]: np.array([[2.0]]), names[1]: np.array([[1.0, 1.0, 3.0]])}
    grid = difference_grid(difference(a, b)[1])
    assert grid.values["change"].tolist() == [[pytest.approx((1 + math.log2(3)) / 4)]]
    assert grid.values["norm"].tolist() == [[pytest.approx(math.sqrt(1 + 4))]]


def test_vectors_of_other_shapes_are_not_compared() -> None:
    with pytest.raises(IA3Error, match=r"\[2, 1\] in one adapter and \[3, 1\] in the other"):
        difference({SITES[0]: np.ones((2, 1))}, {SITES[0]: np.ones((3, 1))})
    with pytest.raises(IA3Error, match="no vectors to compare"):
        difference({}, {})


VECTORS = arrays.arrays(np.float32, (7, 1), elements=st.floats(-8, 8, width=32))


@settings(deadline=None, max_examples=40)
@given(VECTORS, VECTORS)
def test_a_difference_turned_round(a: Any, b: Any) -> None:
    there, back = (difference({"k": x}, {"k": y})[0] for x, y in ((a, b), (b, a)))
    assert back.change == pytest.approx(-there.change, abs=1e-12)
    assert (back.norm, back.cosine) == (there.norm, pytest.approx(there.cosine))
    itself = difference({"k": a}, {"k": a})[0]
    assert (itself.norm, itself.change) == (0, 0)
    assert itself.cosine == (pytest.approx(1) if log_scales(a).any() else None)


def test_means_over_adapters_are_over_those_that_have_the_cell() -> None:
    one = {"layers.0.k": np.array([4.0, 1.0]), "layers.10.v": np.array([0.5, 0.5])}
    other = {"layers.0.k": np.array([1.0, 1.0]), "layers.2.k": np.array([2.0])}
    grid = mean_grid([layer_site_grid(one), layer_site_grid(other)])
    assert (grid.layers, grid.sites) == (["0", "2", "10"], ["k", "v"])
    assert np.nan_to_num(grid.values["mean"], nan=9).tolist() == [[0.5, 9], [1, 9], [9, -1]]
    assert np.nan_to_num(grid.values["amplified"], nan=9).tolist() == [[0.25, 9], [1, 9], [9, 0]]
    assert np.nan_to_num(grid.values["inhibited"], nan=9).tolist() == [[0, 9], [0, 9], [9, 1]]


def test_a_sites_statistics_are_of_its_values_in_all_layers() -> None:
    vectors = {"h.0.k": np.array([2.0, 1.0]), "h.1.k": np.array([0.5]), "h.1.v": np.array([1.0])}
    k, v = site_statistics(vectors)
    assert (k["site"], k["vectors"], k["values"]) == ("k", 2, 3)
    assert k["mean"] == pytest.approx(0)
    assert k["spread"] == pytest.approx(np.std([2, 1, 0.5]))
    assert (k["inhibited"], k["amplified"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    nothing = dict.fromkeys(("mean", "spread", "inhibited", "amplified"), 0)
    assert v == {"site": "v", "vectors": 1, "values": 1} | nothing


def test_sites_are_shortened_as_long_as_they_differ() -> None:
    long = ["layer.DenseReluDense.wo", "layer.EncDecAttention.k", "layer.SelfAttention.k", "k"]
    assert short_sites(long) == ["wo", "EncDecAttention.k", "SelfAttention.k", "k"]


def brute_force(folders: list[Path], like: Path) -> dict[Path, float]:
    """The cosines one by one, in float64, over all sites of both."""

    def scales(folder: Path) -> dict[str, Any]:
        vectors = read_adapter(folder).vectors.items()
        return {n: v.double().abs().clamp(min=2**-6).log2().flatten().numpy() for n, v in vectors}

    def dot(a, b):
        return sum(float(a[name] @ b[name]) for name in a.keys() & b.keys())

    wanted = scales(like)
    cosines = {}
    for folder in folders:
        own = scales(folder)
        size = math.sqrt(dot(own, own) * dot(wanted, wanted))
        cosines[folder] = dot(own, wanted) / size if size else 0.0
    return cosines


def test_the_nearest_are_those_of_brute_force(tmp_path):
    further = "model.layers.1.mlp.down_proj"
    folders = [write(tmp_path / f"{i:02}", random_values(i)) for i in range(9)]
    folders.append(write(tmp_path / "few", random_values(20, SITES[1:])))
    folders.append(write(tmp_path / "more", random_values(21, (*SITES, further))))
    folders.append(write(tmp_path / "moved", dict(reversed(random_values(3).items()))))
    folders.append(write(tmp_path / "identity", dict.fromkeys(SITES, [1.0] * 6)))
    folders.append(write(tmp_path / "off", {SITES[0]: [0.0, -1.0, 1, 1, 1, 1]}))
    like = folders[3]
    expected = brute_force([folder for folder in folders if folder != like], like)
    seen: list[int] = []
    found = search(read_outline(like), folders, 5, seen.append)
    order = sorted(expected, key=lambda folder: -expected[folder])
    assert [n.adapter for n in found.nearest] == order[:5]
    assert found.nearest[0].adapter == tmp_path / "moved"
    for neighbour in found.nearest:
        assert neighbour.cosine == pytest.approx(expected[neighbour.adapter], abs=1e-6)
    assert (found.compared, found.other_base, found.broken) == (len(folders) - 1, 0, {})
    assert sum(seen) == len(folders)
    every = search(read_outline(like), folders, 100)
    assert {n.adapter: pytest.approx(n.cosine, abs=1e-6) for n in every.nearest} == expected


def test_adapters_of_another_base_and_broken_ones_are_counted(tmp_path: Path) -> None:
    like = write(tmp_path / "like", random_values(0), "one")
    same_name = write(tmp_path / "same-name", random_values(1), "one")
    nameless = write(tmp_path / "nameless", random_values(2), None)
    write(tmp_path / "other-name", random_values(3), "two")
    wide = {site: [2.0] * 7 for site in SITES}
    write(tmp_path / "other-shape", wide, "one")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    found = search(read_outline(like), list(find_adapters(tmp_path)), 9)
    assert {n.adapter for n in found.nearest} == {same_name, nameless}
    assert (found.compared, found.other_base) == (2, 2)
    assert list(found.broken) == [tmp_path / "broken"]
    assert "adapter_model.safetensors is not there" in found.broken[tmp_path / "broken"]


def test_fingerprints_say_more_than_names(tmp_path):
    def save(name: str, kind: str, value: float) -> Path:
        base = Fingerprint(kind, {"embed": ([4, 4], [value] * 8)})
        return write(tmp_path / name, random_values(0), name, base=base)

    like, moved = save("like", "llama", 1), save("moved", "llama", 1.001)
    others = [save("tuned", "llama", 2), save("gpt", "gpt2", 1)]
    found = search(read_outline(like), [like, moved, *others], 9)
    assert [n.adapter for n in found.nearest] == [moved]
    assert found.other_base == 2


def test_nothing_is_like_the_identity(tmp_path: Path) -> None:
    like = write(tmp_path, {SITES[0]: [1.0, 1.0]})
    with pytest.raises(IA3Error, match="all of its values are one"):
        search(read_outline(like), [], 3)
