"""Pages beside an adapter's values are of the same save, whenever a save is killed."""

import os

import pytest
from support.kills import moments

from ia3.adapter.files import write_report, write_saved
from ia3.files.saved import EVALUATION_NAME, FIT_REPORT_NAME, WEIGHTS_NAME, weights_file

OLD = {WEIGHTS_NAME: b"old values", FIT_REPORT_NAME: b"of the old", EVALUATION_NAME: b"of the old"}


@pytest.mark.parametrize("with_page", [False, True])
def test_no_page_lies_beside_other_values_whenever_a_save_is_killed(tmp_path, with_page):
    new = {WEIGHTS_NAME: b"new values", **({FIT_REPORT_NAME: b"of the new"} if with_page else {})}
    seen = set()
    write_saved(tmp_path, OLD)
    for _ in moments(lambda: write_saved(tmp_path, new)):
        values = (tmp_path / WEIGHTS_NAME).read_bytes()
        for name in (FIT_REPORT_NAME, EVALUATION_NAME):
            if (tmp_path / name).exists():
                assert (tmp_path / name).read_bytes().split()[-1] == values.split()[0]
        seen.add(values)
        write_saved(tmp_path, OLD)
    assert seen == {b"old values", b"new values"}
    write_saved(tmp_path, new)
    assert {path.name for path in tmp_path.iterdir()} == {*new}


def test_a_page_is_written_only_beside_the_values_that_it_is_of(tmp_path):
    write_saved(tmp_path, OLD)
    seen = weights_file(tmp_path).stat()
    assert write_report(tmp_path, EVALUATION_NAME, "first", seen)
    assert (tmp_path / EVALUATION_NAME).read_text() == "first"
    write_saved(tmp_path, {**OLD, WEIGHTS_NAME: b"new values"})
    assert not write_report(tmp_path, EVALUATION_NAME, "second", seen)
    assert (tmp_path / EVALUATION_NAME).read_bytes() == b"of the old"
    # Other programs write into a file.
    seen = weights_file(tmp_path).stat()
    os.utime(tmp_path / WEIGHTS_NAME, ns=(1, 1))
    assert not write_report(tmp_path, EVALUATION_NAME, "third", seen)
