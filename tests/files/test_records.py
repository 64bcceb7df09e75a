"""Results that are kept as they come."""

import json
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from support.disks import full_disk
from support.kills import calls_of, ended, killed_before, started

from ia3.errors import BrokenFileError, IA3Error
from ia3.files.records import append_record, read_records


def read(path):
    return read_records(path, lambda record: "a" in record, "a test")


def test_records_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    assert read(path) == []
    records = [{"a": 1}, {"a": "ü😀"}, {"a": [None]}, {"a": "x" * 200_000}, {"a": 2}]
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


def test_killed_between_any_two_calls(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    cut_off = '{"a": 1}\n{"a": 2, '
    path.write_text(cut_off)
    add = partial(append_record, path, {"a": 3})
    calls = calls_of(add)
    for call in range(1, calls + 1):
        path.write_text(cut_off)
        killed_before(call, add)
        assert read(path) in ([{"a": 1}], [{"a": 1}, {"a": 3}])
        append_record(path, {"a": 4})
        assert read(path)[-1] == {"a": 4}
    assert calls > 3


def test_nothing_is_lost_of_what_several_processes_append(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"

    def append(writer: int) -> None:
        for number in range(20):
            append_record(path, {"a": [writer, number], "more": "x" * 2000 * number})

    processes = [started(partial(append, writer)) for writer in range(3)]
    assert [ended(process) for process in processes] == [0, 0, 0]
    found = [record["a"] for record in read(path)]
    assert sorted(found) == [[writer, number] for writer in range(3) for number in range(20)]


def test_full_disk_leaves_the_records_before(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append_record(path, {"a": 1})
    with full_disk(), pytest.raises(OSError) as raised:
        append_record(path, {"a": "x" * 2000})
    assert raised.value.filename == str(path)
    assert path.read_text() == '{"a": 1}\n'


@pytest.mark.parametrize("content", ['{"b": 1}', '{"b": 1}\n{"b": 2', "no json\n", "[]\n", "\n"])
def test_a_file_of_something_else_is_refused_and_stays(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(content)
    with pytest.raises(BrokenFileError, match="line 1: not a test"):
        read(path)
    assert path.read_text() == content


NO_JSON = {
    "long number": '{"a": 1' + "0" * 5000 + "}",
    "deep": '{"a": ' + "[" * 3000 + "]" * 3000 + "}",
    "nan": '{"a": NaN}',
    "infinity": '{"a": 1e999}',
    "half a pair": '{"a": "\\ud800"}',
    "no JSON": "{'a': 1}",
}


@pytest.mark.parametrize("line", NO_JSON.values(), ids=NO_JSON)
def test_what_json_does_not_have_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n{{"a": 3}}\n')
    with pytest.raises(BrokenFileError, match=r"line 2: not a test \(.*remove the line"):
        read(path)


UNSPEAKABLE = {
    "nan": float("nan"),
    "infinity": float("inf"),
    "long number": 10**5000,
    "half a pair": "\ud800",
    "set": {1, 2},
    "bytes": {"b": b""},
}


@pytest.mark.parametrize("value", UNSPEAKABLE.values(), ids=UNSPEAKABLE)
def test_what_could_not_be_read_again_is_not_written(tmp_path: Path, value: object) -> None:
    path = tmp_path / "new" / "results.jsonl"
    with pytest.raises(IA3Error, match="a record cannot be kept as JSON"):
        append_record(path, {"a": value})
    assert not path.parent.exists()
