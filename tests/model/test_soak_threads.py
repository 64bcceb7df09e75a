"""A short share of what `soak/threads.py` runs for minutes."""

import sys

import pytest
import torch
from support.paths import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "soak"))

import threads


@pytest.mark.parametrize(
    ("part", "seconds", "what"),
    [
        ("threads", 2, {"rows", "route: forward", "route: generate", "load_adapter", "deepcopy"}),
        ("tasks", 0.1, {"rows", "tasks: route", "tasks: cancelled"}),
    ],
)
def test_no_wrong_row_no_deadlock_and_no_error_but_our_own(part, seconds, what):
    number = torch.get_num_threads()
    try:
        found = threads.run(seconds, 1, [part])
    finally:
        torch.set_num_threads(number)
    assert found["failures"] == []
    assert what <= found.keys()
