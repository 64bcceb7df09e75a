"""Data files: what is read, what is refused and how, what is written."""

import csv
import io
import json
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from ia3.errors import BrokenFileError, IA3Error
from ia3.files.rows import read_rows
from ia3.files.tables import Row, fields_of, read_csv_text, read_table, write_table


@pytest.fixture
def written(tmp_path):
    """Writes a file of a name, and gives its path."""

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def values(rows: list[Row]) -> list[list[Any]]:
    return [list(row.values()) for row in rows]


def test_quoted_fields_keep_delimiters_quotes_and_line_ends(written: Any) -> None:
    path = written("a.csv", 'text,label\n"one, ""two""\r\nthree",x\nfour,y\n')
    assert values(read_table(path)) == [['one, "two"\r\nthree', "x"], ["four", "y"]]
    assert values(read_table(written("a.TSV", "text\tlabel\none, two\tx\n"))) == [["one, two", "x"]]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_and_byte_order_mark(written: Any, end: str) -> None:
    path = written("a.csv", "\ufeff" + end.join(["text,label", "one,x", "", "two,y"]))
    rows = read_rows(path, text=["text"], label="label")
    assert rows == [{"text": "one", "label": "x"}, {"text": "two", "label": "y"}]
    assert [row.where for row in rows] == [f"{path}, line 2", f"{path}, line 4"]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_unicode_line_separators_are_text(written: Any, character: str) -> None:
    text = f"one{character}two"
    assert values(read_table(written("a.csv", f"text,label\n{text},x\n"))) == [[text, "x"]]
    line = json.dumps({"text": text}, ensure_ascii=False)
    assert values(read_table(written("a.jsonl", f"{line}\n"))) == [[text]]


def test_json_lines_keep_types(written: Any) -> None:
    path = written("a.ndjson", '\ufeff{"text": "é", "label": 3, "more": [1]}\r\n\r\n{"text": ""}\n')
    rows = read_table(path)
    assert rows == [{"text": "é", "label": 3, "more": [1]}, {"text": ""}]
    assert rows[1].where == f"{path}, line 3"


def test_very_large_fields(written: Any) -> None:
    limit = csv.field_size_limit()
    text = "word " * 100_000
    assert values(read_table(written("a.csv", f"text,label\n{text},x\n"))) == [[text, "x"]]
    assert csv.field_size_limit() == limit


def test_fields_of_one_and_of_several_columns() -> None:
    rows = [{"subject": "a", "stars": 5, "label": "x"}]
    assert fields_of(rows, ["subject"]) == [{"text": "a"}]
    assert fields_of(rows, ["subject", "stars"]) == [{"subject": "a", "stars": "5"}]


def test_empty_texts_bring_one_warning(written):
    path = written("a.csv", "title,text,label\n,one,x\n, ,y\n,,z\n")
    with pytest.warns(UserWarning, match=r"a\.csv, line 3: the text is empty \(and 1 more\)$"):
        read_rows(path, text=["title", "text"], label="label")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_rows(written("b.csv", "title,text\n,one\n"), text=["title", "text"])


BAD_CSV = {
    "": "a.csv is empty",
    "text,label\n": "a.csv has no rows",
    "txt,label\na,b\n": "a.csv: no column 'text' among ['txt', 'label']; did you mean 'txt'?",
    "text;label\na;b\n": "looks separated by ';', expected ','",
    "text,label,text\na,b,c\n": "line 1: the column 'text' is there more than once",
    'text,label\n"a\nb",x\none, two,y\n': "line 4: 3 values, expected 2 as in the header; "
    "a text that holds ',' needs double quotes",
    "text,label\na,x\nb\n": "line 3: 1 value, expected 2",
    'text,label\na,x\n"b,y\nc,x\n': "line 3: a double quote opens a value and none closes it",
    'text,label\n"a"b,x\n': "line 2: ',' expected after '\"'",
    b"text,label\na,x\ncaf\xe9,y\n": "line 3: byte 0xe9 is not UTF-8; save the file as",
    b"\xef\xbb\xbftext,label\ncaf\xe9,y\n": "line 2: byte 0xe9",
    "text,label\na,x\n".encode("utf-16"): "is UTF-16: save it as UTF-8",
    "text,label\na,x\nb\0c,y\n": "line 3: a NUL byte",
    "text,label\na,x\nb, \n": "line 3: the label 'label' is empty",
}
WITH_LABELS = '{"text": "a", "label": 1}\n{"text": "b", "label": %s}\n'
BAD_JSONL = {
    "\n\n": "a.jsonl is empty",
    '{"text": "a", "label": "b"}\n\n{"txt": "a", "label": "b"}\n': "line 3: no column 'text' among "
    "['txt', 'label']; did you mean 'txt'?",
    '{"text": "\0", "label": 1}\n': "line 1: a NUL byte",
    '{"text": "a", "label": 1e999}\n': "line 1: 1e999 is larger",
    '{"text": "a"}\n{"text": }\n': "line 2 is not JSON: Expecting value",
    '{"text": "a", "label": NaN}\n': "line 1: NaN is not JSON",
    '[{"text": "a"}]\n': 'line 1: [{"text": "a"}], expected one object a line',
    "[" * 100_000 + "\n": "line 1: ",
    '{"label": ' + "1" * 5000 + "}\n": "line 1: ",
    '{"text": "\\ud83d", "label": 1}\n': "line 1: half a surrogate pair",
    '{"text": null, "label": 1}\n': "line 1: the text 'text' is null, expected a string",
    '{"text": ["a"], "label": 1}\n': "line 1: the text 'text' is [\"a\"], expected a string",
    WITH_LABELS % "null": "line 2: the label 'label' is null, expected a string or an integer",
    WITH_LABELS % "0.5": "line 2: the label 'label' is 0.5, expected a string or an integer",
    WITH_LABELS % '"1"': 'line 2: the label "1" is of another type',
    WITH_LABELS % "true": "line 2: the label true is of another type",
}
BAD_FILES = [
    *(("a.csv", content, message) for content, message in BAD_CSV.items()),
    *(("a.jsonl", content, message) for content, message in BAD_JSONL.items()),
    ("a.xlsx", "PK", "ends in '.xlsx', expected one of .csv, .tsv, .jsonl, .ndjson"),
    ("a", "text,label\na,b\n", "has no suffix"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES, ids=lambda value: None)
def test_bad_files(written, name, content, message):
    path = written(name, content)
    with pytest.raises(IA3Error) as raised:
        read_rows(path, text=["text"], label="label")
    assert message in str(raised.value)
    assert str(raised.value).startswith((str(path), f"data file {path}"))
    assert "\n" not in str(raised.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.csv does not exist"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        read_table(tmp_path)


ROWS: list[dict[str, Any]] = [
    {"text": 'one, "two"\nthree', "label": 1, "note": None},
    {"text": "é\u2028", "seen": True, "tags": ["a"], "probability": 0.25},
]


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t")])
def test_csv_holds_all_columns(tmp_path: Path, suffix: str, delimiter: str) -> None:
    path = tmp_path / f"a{suffix}"
    write_table(ROWS, path, as_json=False)
    columns = ["text", "label", "note", "seen", "tags", "probability"]
    assert path.read_text().partition("\n")[0].split(delimiter) == columns
    assert values(read_table(path)) == [
        ['one, "two"\nthree', "1", "", "", "", ""],
        ["é\u2028", "", "", "true", '["a"]', "0.25"],
    ]


def test_json_lines_round_trip(tmp_path):
    write_table(ROWS, tmp_path / "a.jsonl", as_json=False)
    assert read_table(tmp_path / "a.jsonl") == ROWS


def test_standard_output(capfdbinary: Any) -> None:
    write_table(ROWS[1:], None, as_json=True)
    out = capfdbinary.readouterr().out
    assert json.loads(out) == ROWS[1]
    assert "é".encode() in out
    write_table([{"text": "a"}], None, as_json=False)
    assert capfdbinary.readouterr().out == b"text\na\n"


def test_unknown_suffix_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(IA3Error, match=r"ends in '\.txt'"):
        write_table(ROWS, tmp_path / "a.txt", as_json=False)
    assert not list(tmp_path.iterdir())


def test_a_hundred_thousand_columns_and_fields_of_megabytes(written: Any) -> None:
    """Each column was looked for among all of them."""
    columns = [f"c{number}" for number in range(100_000)]
    content = ",".join(columns) + "\n" + ",".join(["a"] * len(columns)) + "\n"
    start = time.process_time()
    (row,) = read_table(written("a.csv", content))
    assert len(row) == len(columns)
    with pytest.raises(BrokenFileError, match="the column 'c5' is there more than once"):
        read_table(written("b.csv", f"c5,{content}"))
    with pytest.raises(IA3Error, match="no column 'd' among") as caught:
        read_rows(written("a.csv", content), text=["d"])
    assert len(str(caught.value)) < 600
    large = "x" * 3_000_000
    assert values(read_table(written("a.csv", f"text\n{large}\n"))) == [[large]]
    with pytest.raises(BrokenFileError) as caught:
        read_rows(written("a.jsonl", json.dumps({"text": [large]})), text=["text"])
    assert len(str(caught.value)) < 400
    assert time.process_time() - start < 20


def test_threads_that_read_long_fields_at_once(written: Any) -> None:
    """The csv module's limit for fields is one for the whole process."""
    limit, failed = csv.field_size_limit(), []
    long = written("long.csv", "text\n" + "word " * 40_000 + "\n")
    short = written("short.csv", "text\na\n")

    def read(path: Path, times: int) -> None:
        try:
            for _ in range(times):
                read_table(path)
        except IA3Error as error:
            failed.append(error)

    threads = [threading.Thread(target=read, args=each) for each in [(long, 30), (short, 300)] * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert csv.field_size_limit() == limit


PIECES = [
    b"text",
    b"label",
    b",",
    b"\t",
    b'"',
    b"\n",
    b"\r",
    b"\0",
    b"\xff",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
]
PIECES += [
    b"{",
    b"}",
    b"[",
    b":",
    b'"text": "a"',
    b"1",
    b"1e999",
    b"NaN",
    b"\\ud800",
    b"null",
    b" ",
    b"\\",
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
@given(content=st.lists(st.sampled_from(PIECES) | st.binary(max_size=2), max_size=25).map(b"".join))
@settings(
    deadline=None,
    max_examples=150,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_bytes_are_rows_or_an_error_of_ours(written: Any, name: str, content: bytes) -> None:
    path = written(name, content)
    try:
        for row in read_rows(path, text=["text"], label="label"):
            assert json.dumps(row).encode()
    except IA3Error as error:
        assert str(error).startswith((str(path), f"data file {path}"))  # noqa: PT017


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_a_pasted_table_is_separated_by_what_its_first_line_has_most_of(mark: str) -> None:
    quoted = f'"one{mark} two"'
    rows = read_csv_text(f"\ufeffa text{mark}label\r\n{quoted}{mark}x\r\n\r\nthree{mark}y", "it")
    assert rows == [{"a text": f"one{mark} two", "label": "x"}, {"a text": "three", "label": "y"}]
    assert [row.where for row in rows] == ["it, line 2", "it, line 4"]


def test_a_pasted_table_of_one_column_is_read_too() -> None:
    assert read_csv_text("\n\ntext\na\n", "it") == [{"text": "a"}]


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
            st.sampled_from("ab"),
        ),
        min_size=1,
    )
)
def test_a_pasted_table_is_what_the_csv_module_wrote(rows: list[tuple[str, str]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerows([("text", "label"), *rows])
    read = read_csv_text(text.getvalue(), "it")
    assert [(row["text"], row["label"]) for row in read] == rows
