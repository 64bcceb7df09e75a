"""Results that are kept as they come."""

import json
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from ia3.errors import IA3Error
from ia3.files.records import append_record, read_records


def read(path):
    return read_records(path, lambda record: "a" in record, "a test")


def test_records_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    assert read(path) == []
    records = [{"a": 1}, {"a": "ü\ud800"}, {"a": [None]}]
    for record in records:
        append_record(path, record)
    assert [json.loads(line) for line in path.read_text().splitlines()] == records
    assert read(path) == records


@given(st.integers(1, 60))
def test_whatever_a_kill_leaves_of_the_last_line(tmp_path_factory, cut: int) -> None:
    path = tmp_path_factory.mktemp("records") / "results.jsonl"
    append_record(path, {"a": 1})
    append_record(path, {"a": "x" * 60})
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    # Without the end of the line alone, the record is whole.
    kept = [{"a": 1}, {"a": "x" * 60}][: 2 if cut == 1 else 1]
    assert read(path) == kept
    assert path.read_bytes() == whole[:-cut]
    append_record(path, {"a": 3})
    assert read(path) == [*kept, {"a": 3}]


@pytest.mark.parametrize("content", ['{"b": 1}', '{"b": 1}\n{"b": 2', "no json\n", "[]\n", "\n"])
def test_a_file_of_something_else_is_refused_and_stays(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(content)
    with pytest.raises(IA3Error, match="line 1: not a test"):
        read(path)
    assert path.read_text() == content
