"""Sources of examples: files, folders of the datasets library, names of the hub."""

import sys

import pytest

from ia3.errors import IA3Error, MissingExtraError
from ia3.files.rows import read_rows

ROWS = [{"animal": "cat", "ends": ["purrs"], "label": 1}, {"animal": "dog", "ends": [], "label": 0}]


@pytest.mark.datasets
def test_rows_from_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    rows = read_rows(tmp_path / "a.parquet")
    assert rows == ROWS
    assert rows[1].where.endswith("a.parquet, row 1")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 this is none")
    with pytest.raises(IA3Error, match=r"broken.parquet is not a Parquet file"):
        read_rows(tmp_path / "broken.parquet")
    with pytest.raises(FileNotFoundError):
        read_rows(tmp_path / "absent.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS).slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(IA3Error, match="has no rows"):
        read_rows(tmp_path / "empty.parquet")


@pytest.mark.datasets
def test_rows_from_folders_of_datasets(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    kinds = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    rows = [{"text": "cat", "label": "yes"}]
    data = datasets.Dataset.from_list(rows, features=datasets.Features(kinds))
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "several")
    assert read_rows(tmp_path / "one") == [{"text": "cat", "label": 1}]
    assert read_rows(tmp_path / "several", split="test") == [{"text": "cat", "label": 1}]
    with pytest.raises(IA3Error, match=r"no split 'dev', only train, test"):
        read_rows(tmp_path / "several", split="dev")
    (tmp_path / "other").mkdir()
    with pytest.raises(IA3Error, match="not a folder of the datasets library"):
        read_rows(tmp_path / "other")


@pytest.mark.datasets
def test_a_name_that_is_nowhere_is_an_error():
    pytest.importorskip("datasets", reason="datasets is not installed")
    with pytest.raises(IA3Error, match=r"no data 'nobody/nothing'.*neither a file"):
        read_rows("nobody/nothing")


@pytest.mark.parametrize(
    ("package", "source"), [("datasets", "super_glue"), ("datasets", "."), ("pyarrow", "a.parquet")]
)
def test_a_missing_package_is_named_with_its_extra(package, source, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"'{package}'.*ia3\[datasets\]"):
        read_rows(source)


def test_a_name_that_no_file_can_have_is_named():
    for name in ("9" * 300, "folder/" + "a" * 256, "a/" * 3000):
        with pytest.raises(IA3Error, match="no file has so long a name"):
            read_rows(name)
