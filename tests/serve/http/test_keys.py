"""The file of API keys."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")

from ia3.errors import BrokenFileError
from ia3.serve.http.keys import read_keys

KEY, OTHER = "0123456789abcdef", "fedcba9876543210"


def test_a_key_may_use_what_its_line_says(tmp_path):
    path = tmp_path / "keys.yaml"
    path.write_text(f"'{KEY}': '*'\n'{OTHER}': [tickets, 'no']\n")
    keys = read_keys(path)
    everything, some = keys.access(KEY), keys.access(OTHER)
    assert everything.all
    assert everything.may_use("anything")
    assert not some.all
    assert some.of(["tickets", "mail", "no"]) == ["tickets", "no"]
    assert keys.access(KEY[:-1]) is None
    assert keys.access("") is None
    # What is logged tells keys apart, and is none.
    assert everything.who != some.who
    assert KEY not in repr(everything)
    assert KEY not in str(vars(keys))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "expected a YAML mapping"),
        ("[a]", "expected a YAML mapping"),
        ("short: '*'", "key 1 has 5 characters"),
        (f"'{KEY} 1': '*'", "key 1 has 18 characters"),
        (f"'{KEY}': all", "what key 1 may use is 'all', expected a list of names, or '\\*'"),
        (f"'{KEY}': [[a]]", "expected a list of names"),
        (f"'{KEY}': '*'\n'{KEY}': '*'", "is there twice"),
    ],
)
def test_another_file_is_refused(tmp_path, content, words):
    path = tmp_path / "keys.yaml"
    path.write_text(content)
    with pytest.raises(BrokenFileError, match=words) as raised:
        read_keys(path)
    if "twice" not in words:
        assert KEY not in str(raised.value)
