"""Which vectors are in which of vLLM's slots: as adapters come, go, and come again."""

from __future__ import annotations

import shutil

import pytest

pytest.importorskip("vllm", reason="make test-vllm runs this in an environment with vLLM")

import torch
from support.vllm_engine import (
    engine,
    greedy,
    load,
    prompts,
    scores,
    write_base,
    write_ia3,
    write_lora,
)
from vllm.lora.layers import LoRAMapping
from vllm.lora.request import LoRARequest

import ia3

pytestmark = pytest.mark.vllm

SLOTS = 2
PROMPT = prompts(1)[0]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base("llama", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """Five of (IA)³, with the vectors of PEFT's default sites, and two of LoRA."""
    root = tmp_path_factory.mktemp("adapters")
    ia3s = {f"ia3-{n}": write_ia3(base, root / f"ia3-{n}", n) for n in range(5)}
    return ia3s | {f"lora-{n}": write_lora(base, root / f"lora-{n}", n) for n in range(2)}


@pytest.fixture(scope="module")
def running(base):
    with engine(base, max_loras=SLOTS, max_cpu_loras=3) as running:
        yield running


@pytest.fixture(scope="module")
def expected(base, adapters):
    """Name -> the tokens after `PROMPT`."""
    return {name: greedy(base, folder, PROMPT) for name, folder in adapters.items()} | {
        "base": greedy(base, None, PROMPT)
    }


def tokens(running, adapters, names):
    folders = [adapters.get(name) for name in names]
    return running.greedy(folders, [PROMPT] * len(names))


def test_more_adapters_than_slots_take_turns(running, adapters, expected):
    names = ["ia3-0", "ia3-1", "ia3-2", "base", "ia3-3", "ia3-4", "ia3-0", "ia3-2"]
    assert tokens(running, adapters, names) == [expected[name] for name in names]


@pytest.mark.parametrize("first", ["ia3", "lora"])
def test_a_slot_of_the_other_kind_is_taken_over_whole(running, adapters, expected, first):
    second = "lora" if first == "ia3" else "ia3"
    for kind in (first, second):
        names = [f"{kind}-0", f"{kind}-1", "base"]
        assert tokens(running, adapters, names) == [expected[name] for name in names]


def test_rows_of_the_base_stay_its_own_where_lora_fills_every_slot(running, adapters, expected):
    names = ["base", "lora-0", "lora-1", "base"]
    assert tokens(running, adapters, names) == [expected[name] for name in names]


def test_an_adapter_is_removed_and_loaded_again_with_new_values(running, base, adapters, tmp_path):
    folder = tmp_path / "changing"
    for name in ("ia3-0", "ia3-1"):
        shutil.copytree(adapters[name], folder, dirs_exist_ok=True)
        # vLLM's cache of prompts tells adapters by name and folder.
        running.llm.reset_prefix_cache()
        running.add(folder)
        assert running.greedy([folder], [PROMPT]) == [greedy(base, adapters[name], PROMPT)]
        running.llm.llm_engine.remove_lora(running.numbers[str(folder)])


def test_a_running_batch_follows_an_adapter_that_is_replaced_by_one_of_the_other_kind(
    running, adapters
):
    manager = running.model_runner().lora_manager
    mapping = LoRAMapping((99,), (99,), is_prefill=True)
    found = []
    for name in ("lora-0", "ia3-0", "lora-1"):
        request = LoRARequest("replaced", 99, str(adapters[name]), load_inplace=True)
        manager.add_adapter(request)
        manager.set_active_adapters(set(), mapping)
        rows = manager._adapter_manager.rows
        found.append(rows.of_tokens[0] != rows.base)
    manager.remove_adapter(99)
    assert found == [False, True, False]


def test_after_the_memory_of_the_weights_was_given_back(running, adapters, expected):
    runner = running.model_runner()
    names = ["ia3-0", "base", "ia3-1"]
    tokens(running, adapters, names)
    manager = runner.lora_manager._adapter_manager
    for layer in manager.layers.values():
        for site in (layer.input, layer.output):
            if site.table is not None:
                site.table.fill_(torch.nan)
    runner.reset_lora_state()
    assert tokens(running, adapters, names) == [expected[name] for name in names]


def test_scores_of_a_prompt_are_transformers(running, base, adapters):
    found, plain = running.scores([adapters["ia3-3"], None], PROMPT)
    expected = scores(base, adapters["ia3-3"], PROMPT)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(plain, scores(base, None, PROMPT), atol=1e-4, rtol=1e-4)


def test_a_range_that_stays_one_is_not_multiplied(running, base, tmp_path):
    model = ia3.get_peft_model(load(base), ia3.IA3Config(task_type="CAUSAL_LM"))
    vectors = model.vectors("default")
    with torch.no_grad():
        for vector in vectors.values():
            vector.uniform_(0.25, 1.75)
    model.save_pretrained(tmp_path / "all")
    with torch.no_grad():
        for name, vector in vectors.items():
            if name.endswith("v_proj"):
                vector.view(-1)[:16] = 1
    model.save_pretrained(tmp_path / "part")
    adapter = ia3.adapter.files.read_adapter(tmp_path / "all")
    adapter.frozen = {name: ((0, 16),) for name in adapter.vectors if name.endswith("v_proj")}
    ia3.adapter.files.write_saved(tmp_path / "frozen", ia3.adapter.files.adapter_files(adapter))
    found = running.greedy([tmp_path / "frozen"], [PROMPT])
    assert found == [greedy(base, tmp_path / "part", PROMPT)]
    assert found != [greedy(base, tmp_path / "all", PROMPT)]
