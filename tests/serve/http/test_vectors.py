"""The figures of a heat map."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.encoders import encoder_folder

import ia3
from ia3.errors import IA3Error
from ia3.serve.http.vectors import vector_figures


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitted")
    base = str(encoder_folder(folder / "encoder"))
    texts = ["the fox", "a dog", "the brown fox", "the lazy dog"]
    ia3.FewShotClassifier(base, steps=4).fit(texts, ["fox", "dog"] * 2).save(folder / "adapter")
    return folder / "adapter"


def test_a_cell_is_the_figure_of_the_vector_in_the_file(adapter: Path) -> None:
    found = vector_figures(adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert found["vectors"] == len(tensors)
    assert found["values"] == sum(each.size for each in tensors.values())
    maps = {each["name"]: each for each in found["maps"]}
    assert [*maps] == ["mean", "spread", "inhibited", "amplified"]
    for key, tensor in tensors.items():
        [(row, column)] = [
            (i, j)
            for i, layer in enumerate(found["layers"])
            for j, site in enumerate(found["sites"])
            if f".{layer.rpartition('.')[2]}.{site}." in key
        ]
        values = tensor.astype(np.float64)
        mean = maps["mean"]["values"][row][column]
        assert mean == pytest.approx(np.log2(np.abs(values)).mean(), abs=1e-5)
        assert maps["mean"]["shown"][row][column] == f"{mean:+.3f} octaves"
        assert maps["spread"]["values"][row][column] == pytest.approx(values.std(), abs=1e-5)
        share = maps["inhibited"]["values"][row][column]
        assert share == pytest.approx(np.mean(np.abs(values) < 0.99), abs=1e-5)
    strongest = max(abs(v) for row in maps["mean"]["values"] for v in row if v is not None)
    assert maps["mean"]["most"] >= strongest


def test_values_that_are_not_finite_are_refused_by_name(adapter: Path, tmp_path: Path) -> None:
    for path in adapter.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).reshape(-1)[0] = np.nan
    save_file(tensors, path)
    with pytest.raises(IA3Error, match="not finite"):
        vector_figures(tmp_path)
