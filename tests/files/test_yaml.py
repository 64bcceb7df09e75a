"""YAML files as plain data: strict where YAML is not."""

from pathlib import Path
from typing import Any

import pytest

from ia3.errors import IA3Error
from ia3.files.yaml import read_yaml


def read(folder: Path, text: str, **options: Any) -> Any:
    (folder / "a.yaml").write_text(text, "utf-8")
    return read_yaml(folder / "a.yaml", "a file of things", **options)


def test_scalars_are_typed_or_the_text_that_is_written(tmp_path):
    text = "a: no\nb: [01, 1.5, ~]\nc: &x {d: e}\nf: *x\n"
    expected = {"a": False, "b": [1, 1.5, None], "c": {"d": "e"}, "f": {"d": "e"}}
    assert read(tmp_path, text) == expected
    expected |= {"a": "no", "b": ["01", "1.5", "~"]}
    assert read(tmp_path, text, as_text=True) == expected


def test_tags_are_named(tmp_path: Path) -> None:
    assert read(tmp_path, "a: !Own {b: !Own {c: 1}}", tags=["!Own"]) == {"a": {"b": {"c": 1}}}
    with pytest.raises(IA3Error, match=r"is not YAML: .*!Own"):
        read(tmp_path, "a: !Own {b: 1}")


def test_a_mapping_may_replace_what_it_merges(tmp_path: Path) -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n"
    assert read(tmp_path, text)["b"] == {"x": 1, "y": 3}


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {b: 1, c: 2, b: 3}", "the key 'b' is there twice"),
        ("a: '", "is not YAML"),
        ("a: {{ text }}", "needs quotes around it"),
        ("#" * ((1 << 20) + 1), "is larger than 1048576 bytes, expected a file of things"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, message: str, as_text: bool) -> None:
    with pytest.raises(IA3Error, match=message) as caught:
        read(tmp_path, text, as_text=as_text)
    assert str(tmp_path / "a.yaml") in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist, expected a file of things"):
        read_yaml(tmp_path / "b.yaml", "a file of things")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        read_yaml(tmp_path, "a file of things")
    (tmp_path / "latin.yaml").write_bytes("a: é".encode("latin-1"))
    with pytest.raises(IA3Error, match="is not YAML"):
        read_yaml(tmp_path / "latin.yaml", "a file of things")
