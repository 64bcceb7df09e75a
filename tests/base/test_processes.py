"""The processes of one job: what each gets, and what the others hear of one that fails."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from support.kills import result_of
from support.processes import in_forks, results_of
from torch import distributed

from ia3 import FewShotClassifier, fit_many
from ia3.base.processes import (
    Processes,
    _backend,
    _take_one_gpu,
    alone,
    is_launched,
    others_named,
    processes,
    unlaunched,
)
from ia3.base.threads import most_threads
from ia3.classify import estimator
from ia3.errors import IA3Error, MissingExtraError, StateError
from ia3.tfew import DivergedError


def test_one_process_is_alone_and_asks_nothing_of_anybody():
    job = processes()
    assert (job.rank, job.count, job.is_first) == (0, 1, True)
    value = torch.ones(2)
    job.add([value])
    assert value.tolist() == [1, 1]
    assert job.gather("it") == ["it"]
    assert job.from_first(lambda: "made") == "made"
    assert list(job.own([1, 2, 3])) == [1, 2, 3]


@pytest.mark.parametrize(("items", "count"), [(0, 3), (2, 3), (3, 3), (10, 4), (7, 1)])
def test_shares_are_the_whole_in_order_and_differ_by_one_at_most(items, count):
    shares = [Processes(rank, count).own(range(items)) for rank in range(count)]
    assert [item for share in shares for item in share] == list(range(items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_sums_are_the_same_bits_on_all_whatever_their_shapes_and_dtypes(tmp_path):
    def work():
        job = processes()
        generator = torch.Generator().manual_seed(job.rank)
        values = [
            torch.rand(3, 2, generator=generator),
            torch.rand((), generator=generator),
            torch.rand(5, generator=generator).bfloat16(),
        ]
        before = [value.clone() for value in values]
        job.add(values)
        trained = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
        if job.rank == 1:
            trained[0].grad = torch.full((2,), 3.0)
        job.add_gradients(trained, counted := torch.tensor([1.0]))
        return before, values, [value.grad for value in trained], counted

    found = results_of(work, tmp_path, 3)
    for place in range(3):
        added = sum(before[place].double() for before, *_ in found)
        for _, values, *_ in found:
            assert torch.equal(values[place], found[0][1][place])
            assert values[place].dtype == found[0][0][place].dtype
            near = {torch.bfloat16: 2e-2}.get(values[place].dtype, 1e-6)
            torch.testing.assert_close(values[place].double(), added, rtol=near, atol=near)
    for *_, gradients, counted in found:
        assert [gradient.tolist() for gradient in gradients] == [[3, 3], [0, 0]]
        assert counted.tolist() == [3]


@pytest.mark.parametrize(
    "error",
    [
        IA3Error("no such row"),
        MissingExtraError("accelerate", "tfew", "training"),
        DivergedError(3, "the loss is nan"),
        FileNotFoundError(2, "No such file or directory", "x.csv"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_the_first_process_raises_is_raised_on_all(tmp_path, error):
    def fail():
        raise error

    for found in in_forks(lambda: processes().from_first(fail), tmp_path):
        assert type(found) is type(error)
        assert str(found) == str(error)
        assert vars(found).keys() - {"__notes__"} == vars(error).keys()


def test_an_error_that_cannot_be_sent_is_told_in_words(tmp_path):
    class OwnError(Exception):
        """Of no module that another process could import it from."""

    def fail():
        raise OwnError("this went wrong")

    def work():
        with pytest.raises((OwnError, IA3Error), match="this went wrong") as raised:
            processes().from_first(fail)
        return type(raised.value).__name__

    assert results_of(work, tmp_path) == ["OwnError", "IA3Error"]


def test_what_was_given_differently_is_named_on_all(tmp_path):
    def work():
        rank = processes().rank
        processes().check_same({"texts": "abc", "model": {"steps": 3}})
        processes().check_same({"texts": "abc", "model": {"steps": rank, "seed": 0}, "labels": 1})

    found = in_forks(work, tmp_path, 3)
    assert len(found) == 3
    for error in found:
        assert type(error) is IA3Error
        assert "steps of process 1 are not those of process 0" in str(error)


@pytest.mark.parametrize("call", ["add", "gather", "from_first"])
def test_a_process_that_is_killed_ends_the_others_with_an_error_at_once(tmp_path, call):
    calls = {
        "add": lambda job: job.add([torch.ones(2)]),
        "gather": lambda job: job.gather(1),
        "from_first": lambda job: job.from_first(lambda: 1),
    }

    def work():
        job = processes()
        for turn in range(100):
            if (job.rank, turn) == (1, 3):
                os.kill(os.getpid(), signal.SIGKILL)
            calls[call](job)

    began = time.monotonic()
    first, killed, third = in_forks(work, tmp_path, 3)
    assert time.monotonic() - began < 60  # torch's own bound is half an hour
    assert killed == -signal.SIGKILL
    for error in (first, third):
        assert type(error) is StateError
        assert "another process of this job has ended" in str(error)


def test_what_is_wrong_here_is_no_other_processs_end():
    for error in (RuntimeError("out of memory"), StateError("of gloo, this is said already")):
        with pytest.raises(RuntimeError) as raised, others_named():
            raise error
        assert raised.value is error
    with pytest.raises(StateError, match="has ended or does not answer"), others_named():
        raise RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer")


def test_none_goes_on_before_all_have_joined(tmp_path, monkeypatch):
    """Else one that fails at once has ended before the others could hear that it said why."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    make = distributed.init_process_group

    def slowly_made(*args):
        make(*args)
        time.sleep(float(os.environ["RANK"]))

    def work():
        distributed.destroy_process_group()
        monkeypatch.setattr(distributed, "init_process_group", slowly_made)
        began = time.monotonic()
        assert processes().count == 2
        return time.monotonic() - began

    assert min(results_of(work, tmp_path)) > 0.9


def test_alone_a_process_is_one_whatever_the_others_do(tmp_path):
    def work():
        rank = processes().rank
        with alone():
            assert processes().count == 1
            assert processes().gather(rank) == [rank]
        return processes().gather(rank)

    assert results_of(work, tmp_path) == [[0, 1], [0, 1]]


def test_a_child_of_one_of_them_is_none_of_them(tmp_path):
    """It would read from its parent's connections, or take its parent's place."""
    asks = "from ia3.base.processes import processes; print(processes().count)"

    def work():
        before = processes().gather(0)
        forked = result_of(lambda: (processes().count, is_launched()))
        begun = subprocess.run(
            [sys.executable, "-c", asks], capture_output=True, text=True, check=True
        )
        return before, forked, begun.stdout, processes().gather(1)

    for found in results_of(work, tmp_path):
        assert found == ([0, 0], (1, False), "1\n", [1, 1])


def test_without_the_launchers_environment_nothing_hears_of_the_others(monkeypatch):
    assert not is_launched()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    before = dict(os.environ)
    assert is_launched()
    with unlaunched():
        assert not is_launched()
        assert processes().count == 1
    assert dict(os.environ) == before


def test_processes_of_one_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert most_threads() == 8
    for count, share in ((2, 4), (3, 2), (4, 2), (16, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(count))
        assert most_threads() == share
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert most_threads() == 1


@pytest.mark.parametrize(
    ("seen", "local", "taken"),
    [(None, 2, "2"), ("5,7,6,4", 1, "7"), (None, 5, "1"), ("GPU-a,GPU-b,GPU-c,GPU-d", 3, "GPU-d")],
)
def test_each_process_of_a_machine_sees_one_gpu(monkeypatch, seen, local, taken):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen or "")
    monkeypatch.setenv("LOCAL_RANK", str(local))
    _take_one_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == taken
    # What has used GPUs already keeps those that it knows.
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    _take_one_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"


@pytest.mark.parametrize("many", [False, True])
def test_a_fit_joins_the_others_before_it_loads_a_model(monkeypatch, many):
    """What has used a GPU keeps it: all would have the first one."""
    done: list[str] = []

    def load(self):
        done.append("loaded")
        raise IA3Error("no model")

    def join():
        done.append("joined")
        return Processes()

    for module in (estimator, importlib.import_module("ia3.classify.fit_many")):
        monkeypatch.setattr(module, "processes", join)
    monkeypatch.setattr(FewShotClassifier, "_bases", load)
    data = ["a", "b"], ["x", "y"]
    with pytest.raises(IA3Error, match="no model"):
        fit_many({"task": data}) if many else FewShotClassifier().fit(*data)
    assert done[0] == "joined"


def test_on_a_machine_with_gpus_values_on_the_cpu_are_added_up_too(monkeypatch):
    assert _backend() == "gloo"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    assert _backend() == "cpu:gloo,cuda:nccl"
