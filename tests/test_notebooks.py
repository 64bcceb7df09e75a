"""The notebooks, each run from its first cell to its last in a kernel of its own."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from support.paths import REPOSITORY

nbformat = pytest.importorskip("nbformat")  # the oldest versions are tested without it
nbclient = pytest.importorskip("nbclient")

NOTEBOOKS = REPOSITORY / "examples" / "notebooks"


def printed(name: str, folder: Path) -> list[str]:
    """What the cells of a notebook print, line by line, run beside a copy of the examples."""
    for each in ("notebooks", "support-tickets"):
        shutil.copytree(REPOSITORY / "examples" / each, folder / each)
    place = folder / "notebooks"
    notebook = nbformat.read(place / f"{name}.ipynb", as_version=4)
    where = {"metadata": {"path": str(place)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    texts = [
        output["text"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output["output_type"] == "stream" and output["name"] == "stdout"
    ]
    return "".join(texts).splitlines()


def number_after(begin: str, lines: list[str]) -> float:
    (line,) = (line for line in lines if line.startswith(begin))
    return float(line.removeprefix(begin).split()[0].replace(",", ""))


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_is_stored_as_written_and_not_as_run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)


@pytest.mark.slow
@pytest.mark.datasets  # for pandas
def test_a_csv_is_checked_learned_measured_and_labelled(tmp_path: Path) -> None:
    lines = printed("classify_your_csv", tmp_path)
    assert lines[0] == "32 to learn from, 100 to measure on, 100 new"
    # Nothing is wrong with the file, and both mistakes of the spoilt one are found.
    assert lines[1] == "nothing found"
    found = [line for line in lines if line.startswith("- ")]
    assert ["two labels" in found[0], "'Gate' (1)" in found[1], len(found)] == [True, True, 2]
    # Both models were asked, and what is trained is better than what was seen of it before.
    seen = [re.match(r"(encoder|language-model) (\d+) ± ", line) for line in lines]
    before = {each[1]: int(each[2]) / 100 for each in seen if each is not None}
    assert sorted(before) == ["encoder", "language-model"]
    assert "chosen: encoder all-minilm-l6-v2" in lines
    assert number_after("guessing: ", lines) == 0.25
    assert min(number_after(f"{name}: ", lines) for name in ("frozen", "trained")) > 0.7
    assert number_after("trained: ", lines) > before["encoder"] > before["language-model"]
    assert lines[-1] == "True to 100 rows"
    labelled = (tmp_path / "notebooks" / "labelled.csv").read_text("utf-8").splitlines()
    assert labelled[0] == "text,label,probability"
    assert len(labelled) > 100
    assert (tmp_path / "notebooks" / "tickets" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.datasets  # for pandas
def test_a_thousand_adapters_answer_in_one_batch(tmp_path: Path) -> None:
    lines = printed("a_thousand_customers", tmp_path)
    assert lines[0] == "['bank', 'hotel', 'shop'] {}"
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["shop", "billing"],
        ["shop", "delivery"],
        ["hotel", "praise"],
        ["bank", "card"],
    ]
    assert "1000 of 1000 as their classifiers alone: billing praise card" in lines
    shared, each = (number_after(name, lines) for name in ("the model, once:", "a customer:"))
    assert 300 * each < shared
    assert lines[-1] == "1002 in the bank"
