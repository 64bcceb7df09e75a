"""JSON from anywhere gives plain data or one kind of error."""

import pytest

from ia3.errors import BrokenFileError
from ia3.files.json import parse_json, parse_object


def test_data_is_what_the_file_says():
    content = b'{"a": [1, -2.5e3, null, true, "\\ud83d\\ude00"], "\xc3\xa9": {}}'
    assert parse_object(content, "x") == {"a": [1, -2500.0, None, True, "😀"], "é": {}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON: Expecting value .line 1, column 1"),
        (b'{"a": 1}}', "not JSON: Extra data"),
        (b"\xff", "not JSON: .*utf-8"),
        (b"[NaN]", "NaN is not JSON"),
        (b"-Infinity", "Infinity is not JSON"),
        (b"1e999", "1e999 is larger"),
        (b"9" * 5000, "digits"),
        (b"[" * 200 + b"]" * 200, "nested deeper than 100"),
        (b"[" * 200_000, "nested deeper than 100"),
        (b'["\\ud800"]', "surrogate"),
        (b'{"\\udfff": 1}', "surrogate"),
    ],
)
def test_what_is_no_data_is_refused(content, message):
    with pytest.raises(BrokenFileError, match=f"^somewhere.*{message}"):
        parse_json(content, "somewhere")


@pytest.mark.parametrize("content", ["[]", "null", '"a"', "3"])
def test_what_is_no_object_is_refused(content):
    with pytest.raises(BrokenFileError, match="expected a JSON object"):
        parse_object(content, "somewhere")
