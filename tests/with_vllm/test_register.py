"""What the plugin changes in vLLM, and when."""

from __future__ import annotations

import logging
from importlib.metadata import entry_points

import pytest

pytest.importorskip("vllm", reason="make test-vllm runs this in an environment with vLLM")

import vllm
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.v1.worker import lora_model_runner_mixin

from ia3 import StateError
from ia3.vllm import register
from ia3.vllm.manager import WorkerManager

pytestmark = pytest.mark.vllm

NAME = "LRUCacheWorkerLoRAManager"


@pytest.fixture(autouse=True)
def vllms_own(monkeypatch):
    monkeypatch.setattr(lora_model_runner_mixin, NAME, LRUCacheWorkerLoRAManager)


@pytest.fixture
def logged(caplog):
    logger = logging.getLogger("vllm")
    before = logger.level
    logger.setLevel("INFO")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.setLevel(before)


def in_use():
    return getattr(lora_model_runner_mixin, NAME)


def test_vllm_finds_it_by_its_entry_point():
    (found,) = entry_points(group="vllm.general_plugins", name="ia3")
    assert found.load() is register


@pytest.mark.parametrize("plugins", ["ia3", "lora_filesystem_resolver,ia3"])
def test_it_is_active_where_the_variable_names_it_and_twice_is_once(monkeypatch, plugins):
    monkeypatch.setenv("VLLM_PLUGINS", plugins)
    register()
    register()
    assert in_use() is WorkerManager


def test_it_changes_nothing_where_the_variable_is_not_set_and_says_so(monkeypatch, logged):
    monkeypatch.delenv("VLLM_PLUGINS")
    register()
    assert in_use() is LRUCacheWorkerLoRAManager
    assert "ia3 is installed and not active: with VLLM_PLUGINS=ia3" in logged.text


def test_a_version_that_was_not_tried_is_refused_before_anything_is_changed(monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.99.1")
    with pytest.raises(StateError, match=r"vLLM 0\.99\.1 has not been tried.*vllm==0\.32\.0"):
        register()
    assert in_use() is LRUCacheWorkerLoRAManager


def test_the_version_of_a_build_for_some_device_is_the_version(monkeypatch):
    monkeypatch.setattr(vllm, "__version__", f"{vllm.__version__}+cpu")
    register()
    assert in_use() is WorkerManager
