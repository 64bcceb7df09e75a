"""YAML files as plain data: strict where YAML is not."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from ia3.errors import BrokenFileError, IA3Error
from ia3.files.yaml import read_yaml

# Each line repeats the one before three times.
REPEATED = "a0: &a0 [x, x, x]\n" + "".join(
    f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 20)
)
MERGED = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}, *a{i - 1}, *a{i - 1}], k{i}: 1}}\n"
    for i in range(1, 14)
)


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
        ("#" * ((1 << 19) + 1), "is larger than 524288 bytes, expected a file of things"),
        ("[" * 60 + "]" * 60, "nested deeper than 50 times"),
        ("- " * 60 + "a", "nested deeper than 50 times"),
        ("[" * 250_000, "nested deeper than 50 times"),
        ("&a [*a]", "nested too deeply, or holds itself"),
        ("a: &a {b: *a}", "nested too deeply, or holds itself"),
        (REPEATED, "its references repeat more than 1000000 values"),
        ("a: [*a]", "undefined alias"),
        ("a: '\\0'".replace("'", '"'), "a NUL character"),
        ('a: "\\ud800"', "half a surrogate pair"),
        ('a: "\\U00110000"', "is not YAML"),
        ("a: 1\n---\nb: 2", "expected a single document"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, message: str, as_text: bool) -> None:
    with pytest.raises(BrokenFileError, match=message) as caught:
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


@pytest.mark.parametrize(
    "text",
    [
        "9" * 5000,
        "0x" + "9" * 400_000,
        "1" + ":59" * 2000,
        "2001-99-99",
        "2001-01-01 25:61:61",
        "2001-01-01 05:01:01 +99:99",
        "!!int x",
        "!!int ''",
        "!!float x",
        "!!bool x",
        "!!timestamp x",
        "!!binary é",
        "!!python/object/apply:os.getcwd []",
        "{<<: 3}",
        MERGED,
    ],
)
def test_values_that_are_not_what_they_say_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(BrokenFileError, match="is not YAML"):
        read(tmp_path, f"{text}\n" if text is MERGED else f"a: {text}")


def test_references_may_repeat_what_is_not_too_large(tmp_path: Path) -> None:
    text = "a: &a {x: [1, 2]}\nb: [*a, *a]\nc: {<<: [*a, *a], y: 3}\n"
    expected = {"x": [1, 2]}
    assert read(tmp_path, text) == {
        "a": expected,
        "b": [expected, expected],
        "c": {"x": [1, 2], "y": 3},
    }
    assert read(tmp_path, "") is None


PIECES = st.sampled_from(
    [
        *"[]{}:,-?&*!|>'\"%@#\n ",
        "a",
        "1",
        ": ",
        "- ",
        "&a ",
        "*a ",
        "!!int ",
        "<<: ",
        "\\x",
        "---\n",
    ]
)


@pytest.mark.parametrize("as_text", [False, True])
@given(text=st.lists(PIECES | st.text(max_size=3), max_size=30).map("".join))
@settings(
    deadline=None,
    max_examples=200,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_text_is_data_or_an_error_of_ours(tmp_path: Path, text: str, as_text: bool) -> None:
    (tmp_path / "a.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    with suppress(BrokenFileError):
        read_yaml(tmp_path / "a.yaml", "a file of things", as_text=as_text)
