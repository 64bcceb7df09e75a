"""What `ia3 merge` and `ia3 export` write, in vLLM as any other model and any other LoRA."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="make test-vllm runs this in an environment with vLLM")

from support.vllm_engine import engine, greedy, prompts, write_base, write_ia3

from ia3.model.lora import nearest_lora
from ia3.model.merged import on_its_base, write_merged

pytestmark = pytest.mark.vllm

# No weight that is rescaled has a smaller side that is longer.
FULL = 128


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base model, an adapter, the merged model, and a LoRA of a rank that loses nothing."""
    root = tmp_path_factory.mktemp("exported")
    base = write_base("llama", root / "base")
    sites = {"target_modules": ["k_proj", "v_proj", "down_proj"]}
    adapter = write_ia3(base, root / "ia3", 1, **sites, feedforward_modules=["down_proj"])
    nearest_lora(on_its_base(adapter).model, FULL).save_pretrained(root / "lora")
    write_merged(on_its_base(adapter), root / "merged")
    return {"base": base, "ia3": adapter, "merged": root / "merged", "lora": root / "lora"}


@pytest.fixture(scope="module")
def expected(folders):
    """What the base model and the adapter generate, in transformers and PEFT."""
    tokens = {
        row: [greedy(folders["base"], adapter, prompt) for prompt in prompts(3)]
        for row, adapter in {"base": None, "ia3": folders["ia3"]}.items()
    }
    assert tokens["base"] != tokens["ia3"]
    return tokens


def test_a_merged_folder_generates_what_the_adapter_does(folders, expected):
    with engine(folders["merged"], enable_lora=False) as running:
        assert running.greedy([None] * 3, prompts(3)) == expected["ia3"]


def test_a_lora_beside_the_base_generates_what_the_adapter_does(folders, expected):
    with engine(folders["base"], max_lora_rank=FULL) as running:
        rows = [None, folders["lora"]] * 3
        batch = [prompt for prompt in prompts(3) for _ in range(2)]
        found = running.greedy(rows, batch)
    assert (found[::2], found[1::2]) == (expected["base"], expected["ia3"])
