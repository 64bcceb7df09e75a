"""The number of threads of a step: told what steps took, and on one real step."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ia3.base.threads import LAST_STEPS, SLOWER, Threads
from ia3.errors import IA3Error, InvalidTypeError


@pytest.fixture
def four():
    """The machine has four threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def counts_of(threads, seconds, steps):
    """The number of threads of each step; `seconds` is what a step takes with a number."""
    counts = []
    for _ in range(steps):
        counts.append(threads.count)
        threads.took(seconds[threads.count])
    return counts


def test_all_are_taken_where_they_are_faster(four):
    assert counts_of(Threads(), {1: 1.0, 4: 0.4}, 6) == [1, 1, 4, 4, 4, 4]


def test_one_is_taken_where_the_others_wait(four):
    assert counts_of(Threads(), {1: 1.0, 4: 15.0}, 6) == [1, 1, 4, 1, 1, 1]


def test_the_first_step_which_warms_up_counts_for_nothing(four):
    threads = Threads()
    threads.took(100.0)
    assert counts_of(threads, {1: 1.0, 4: 2.0}, 4) == [1, 4, 1, 1]


def test_a_step_of_three_times_the_last_ones_has_both_timed_again(four):
    threads = Threads()
    counts_of(threads, {1: 1.0, 4: 0.4}, 10)
    assert counts_of(threads, {1: 1.2, 4: 0.4 * SLOWER}, 3) == [4, 4, 4]
    assert counts_of(threads, {1: 1.2, 4: 15.0}, 5) == [4, 1, 4, 1, 1]
    # And back, when the machine is free again: one is faster now, all may be.
    threads.took(1.2 * SLOWER * 2)
    assert counts_of(threads, {1: 1.0, 4: 0.4}, 3) == [1, 4, 4]


def test_both_are_timed_again_after_some_time(four, monkeypatch):
    """The other one may be faster by now, and no step has taken longer for it."""
    now = [0.0]
    monkeypatch.setattr("ia3.base.threads.time.monotonic", lambda: now[0])
    threads = Threads(anew=30.0)
    assert counts_of(threads, {1: 1.0, 4: 1.5}, 5) == [1, 1, 4, 1, 1]
    now[0] = 31.0
    assert counts_of(threads, {1: 1.0, 4: 0.6}, 6) == [1, 1, 4, 4, 4, 4]


def test_steps_are_compared_by_the_last_few(four):
    threads = Threads()
    counts_of(threads, {1: 1.0, 4: 0.4}, 3)
    for seconds in (0.4, 0.6, 0.9, 1.3, 1.7, *[1.9] * LAST_STEPS, 5.6):
        threads.took(seconds)
        assert threads.count == 4  # it climbs, but never at once


def test_a_fixed_number_stays(four):
    assert counts_of(Threads(3), {3: 1.0}, 2) == [3, 3]
    threads = Threads(3)
    threads.keep(1)
    assert threads.count == 3


def test_a_run_that_goes_on_keeps_its_number_untimed(four):
    for kept in (1, 4):
        threads = Threads()
        threads.keep(kept)
        assert counts_of(threads, {1: 1.0, 4: 1.0}, 5) == [kept] * 5


def test_a_number_of_another_machine_is_not_kept(four):
    threads = Threads()
    threads.keep(16)
    assert counts_of(threads, {1: 1.0, 4: 0.4}, 4) == [1, 1, 4, 4]


def test_with_one_there_is_nothing_to_time():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert counts_of(Threads(), {1: 1.0}, 5) == [1] * 5
    finally:
        torch.set_num_threads(before)


def test_real_steps_have_the_number_and_it_is_restored_whatever_happens(four):
    seen = []

    def steps():
        with Threads() as threads:
            for _ in range(4):
                threads.step(lambda: seen.append(torch.get_num_threads()))
            threads.step(lambda: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        steps()
    assert seen[:3] == [1, 1, 4]
    assert seen[3] in (1, 4)
    assert torch.get_num_threads() == 4


def in_a_new_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_threads_that_begin_meanwhile_or_later_have_the_number_they_would_have(four):
    with Threads(1) as threads:
        assert threads.step(torch.get_num_threads) == 1
        assert threads.step(lambda: in_a_new_thread(torch.get_num_threads)) == 4
    assert torch.get_num_threads() == in_a_new_thread(torch.get_num_threads) == 4


def test_a_thread_that_begins_and_ends_its_steps_amid_anothers(four):
    def steps():
        with Threads(2) as threads:
            return threads.step(torch.get_num_threads), threads._most, torch.get_num_threads()

    with Threads(1) as threads:
        found = threads.step(lambda: in_a_new_thread(steps))
        assert found == (2, 4, 2)
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == in_a_new_thread(torch.get_num_threads) == 4


def test_a_number_that_only_this_thread_has_is_put_back_for_it_alone(four):
    def steps():
        torch.get_num_threads()  # until it is asked for, torch takes the last that was set
        torch.set_num_threads(3)
        in_a_new_thread(lambda: torch.set_num_threads(4))  # what new threads have
        with Threads(1) as threads:
            threads.step(lambda: None)
        return torch.get_num_threads()

    assert in_a_new_thread(steps) == 3
    assert in_a_new_thread(torch.get_num_threads) == 4


def test_steps_of_unlike_sizes_are_compared_by_their_tokens(four, monkeypatch):
    clock = iter([0, 1, 1, 2, 2, 5])
    monkeypatch.setattr("ia3.base.threads.time.perf_counter", lambda: next(clock))
    threads = Threads()
    for size in (10, 10, 100):  # 0.1, 0.1 and 0.03 a token
        threads.step(lambda: None, size)
    assert threads.count == 4


@pytest.mark.parametrize("wrong", [0, -1])
def test_a_number_below_1_is_refused(wrong):
    with pytest.raises(IA3Error, match=f"threads is {wrong}, expected at least 1"):
        Threads(wrong)


@pytest.mark.parametrize("wrong", [1.5, True, "2"])
def test_what_is_no_number_is_refused(wrong):
    with pytest.raises(InvalidTypeError, match="threads is"):
        Threads(wrong)
