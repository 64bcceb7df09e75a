"""How far long work is, where there is a terminal and where there is none."""

from __future__ import annotations

import contextlib
import io
import re
import time

import pytest
from rich.console import Console

from ia3.base.progress import shown_by, working
from ia3.report import console
from ia3.report.console import counting_bar, passing_bar, training_bar, training_bar_of_many
from ia3.tfew.training.trainer import TrainingStep


@pytest.fixture
def every_time(monkeypatch):
    monkeypatch.setattr(console, "SECONDS_A_LINE", 0.0)


def _step(step: int, steps: int) -> TrainingStep:
    return TrainingStep(step, steps, loss=1.5, lm=1.0, length_norm=0.25, unlikelihood=0.25)


def test_a_log_gets_lines_of_training(every_time, capsys):
    with training_bar(20) as on_step:
        on_step(_step(7, 20))
        on_step(_step(20, 20))
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("training  7/20 loss 1.500 ")
    assert re.search(r" \d:\d\d:\d\d( \d:\d\d:\d\d left)?$", first)
    assert second.startswith("training 20/20 loss 1.500 ")


def test_a_training_that_ends_early_fills_its_bar(every_time, capsys):
    with training_bar(20) as on_step:
        on_step(_step(7, 20))
        on_step(_step(12, 12))
    assert capsys.readouterr().err.splitlines()[-1].startswith("training 12/12 loss 1.500 ")


def test_many_tasks_that_end_early_fill_their_bar(every_time, capsys):
    with training_bar_of_many({"a": 2, "b": 20}) as on_step:
        for number in (1, 2):
            on_step("a", _step(number, 2))
        on_step("b", _step(1, 20))
        on_step("b", _step(2, 2))
    assert "4/4 steps, 2 of 2 tasks done" in capsys.readouterr().err


def test_a_log_gets_lines_of_many_tasks(every_time, capsys):
    with training_bar_of_many({"a": 1, "b": 2}) as on_step:
        on_step("a", _step(1, 1))
    assert "1/3 steps, 1 of 2 tasks done" in capsys.readouterr().err


def test_a_training_that_ends_early_is_whole(every_time, capsys):
    with training_bar(20) as on_step:
        on_step(_step(7, 20))
    _, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"training 7/7 loss 1.500 \(ended before 20\) \d:\d\d:\d\d", last)


def test_a_training_that_fails_is_not_called_whole(every_time, capsys):
    def diverge():
        with training_bar(20) as on_step:
            on_step(_step(7, 20))
            raise ValueError("diverged")

    with pytest.raises(ValueError, match="diverged"):
        diverge()
    assert "ended" not in capsys.readouterr().err


def test_tasks_that_end_early_or_are_there_already_count_as_done(every_time, capsys):
    with training_bar_of_many({"early": 4, "there": 5, "whole": 2, "last": 8}) as on_step:
        on_step("early", _step(1, 4))
        on_step("whole", _step(1, 2))
        on_step("whole", _step(2, 2))
    lines = capsys.readouterr().err.splitlines()
    shown = [re.sub(r"^training +| \d:\d\d:\d\d.*", "", line) for line in lines]
    assert shown == [
        "1/19 steps, 0 of 4 tasks done",
        "2/11 steps, 2 of 4 tasks done",
        "3/11 steps, 3 of 4 tasks done",
        "3/3 steps, 4 of 4 tasks done",
    ]


def test_a_log_gets_lines_of_counted_examples(every_time, capsys):
    with counting_bar("predicting", 200) as advance:
        advance(32)
    assert capsys.readouterr().err.startswith("predicting  32/200 ")


def test_short_work_says_nothing_in_a_log(capsys):
    with counting_bar("predicting", 200) as advance:
        advance(200)
    assert capsys.readouterr().err == ""


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of 80 columns; what it was shown."""
    shown = io.StringIO()
    screen = Console(file=shown, force_terminal=True, width=80, emoji=False)
    monkeypatch.setattr(console, "screen", screen)
    return shown


def words(shown: io.StringIO) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue())


def test_a_terminal_sees_how_much_time_is_left_in_80_columns(terminal):
    with training_bar(100) as on_step:
        for number in range(1, 4):
            on_step(_step(number, 100))
            time.sleep(0.05)
        console._display.refresh()
    assert re.search(r"training [━╸╺]+ +3/100 loss 1.500 0:00:0\d 0:00:\d\d left", words(terminal))
    assert "…" not in words(terminal)


def test_a_bar_within_another_shares_its_display_and_goes(terminal):
    with training_bar(2) as on_step:
        with passing_bar("loading a-model", None):
            console._display.refresh()
            before = words(terminal)
        on_step(_step(2, 2))
    assert "loading a-model" in before
    assert "training" not in before
    last = words(terminal).splitlines()[-1]
    assert "training" in last
    assert "loading" not in last


def test_what_is_being_done_is_shown_where_somebody_shows_it(capsys):
    told = []

    @contextlib.contextmanager
    def show(what, parts):
        told.append((what, parts))
        yield told.append

    with working("silence", 3) as count:
        count(1)
    with shown_by(show), working("reading", 3) as count:
        count(2)
    with working("silence", 3) as count:
        count(1)
    assert told == [("reading", 3), 2]
    assert capsys.readouterr().err == ""


def test_a_log_gets_a_line_of_what_takes_long_and_counts_nothing(monkeypatch, capsys):
    monkeypatch.setattr(console, "SECONDS_A_LINE", 0.01)
    with passing_bar("loading a-model", None):
        while not (said := capsys.readouterr().err):
            time.sleep(0.01)
    assert re.fullmatch(r"loading a-model \d:\d\d:\d\d\n", said)
