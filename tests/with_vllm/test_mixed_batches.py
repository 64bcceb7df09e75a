"""Rows of the base model, of (IA)³ adapters and of LoRA adapters in one batch of vLLM."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="make test-vllm runs this in an environment with vLLM")

from support.vllm_engine import (
    CONFIGS,
    engine,
    greedy,
    prompts,
    write_base,
    write_ia3,
    write_lora,
)

pytestmark = pytest.mark.vllm

# Which sites an adapter has, by the kind of model: the paper's, and every linear layer's output.
PAPER = {
    "llama": ["k_proj", "v_proj", "down_proj"],
    "qwen2": ["k_proj", "v_proj", "down_proj"],
    "phi3": ["qkv_proj", "down_proj"],
    "opt": ["k_proj", "v_proj", "fc2"],
}
FEEDFORWARD = {"opt": ["fc2"]}


@pytest.fixture(scope="module", params=CONFIGS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folders(kind, tmp_path_factory):
    """Name -> an adapter's folder, of one model; `"base"` is the model's own."""
    root = tmp_path_factory.mktemp(kind)
    base = write_base(kind, root / "base")
    sites = {"target_modules": PAPER[kind], "feedforward_modules": FEEDFORWARD.get(kind)}
    sites["feedforward_modules"] = sites["feedforward_modules"] or ["down_proj"]
    return {
        "base": base,
        "paper-1": write_ia3(base, root / "paper-1", 1, **sites),
        "paper-2": write_ia3(base, root / "paper-2", 2, **sites),
        "outputs": write_ia3(
            base, root / "outputs", 3, target_modules="all-linear", feedforward_modules=[]
        ),
        "lora-1": write_lora(base, root / "lora-1", 1),
        "lora-2": write_lora(base, root / "lora-2", 2),
    }


@pytest.fixture(scope="module")
def running(folders):
    with engine(folders["base"], max_loras=5) as running:
        yield running


def test_each_row_has_the_tokens_that_transformers_and_peft_generate(folders, running):
    rows = [None, "paper-1", "lora-1", None, "outputs", "lora-2", "paper-2", None]
    adapters = [folders[row] if row else None for row in rows]
    batch = prompts(len(rows))
    found = running.greedy(adapters, batch)
    expected = [
        greedy(folders["base"], adapter, prompt)
        for adapter, prompt in zip(adapters, batch, strict=True)
    ]
    assert found == expected
    assert len({tuple(tokens) for tokens in expected}) == len(rows)
