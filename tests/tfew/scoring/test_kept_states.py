"""Training from what enters the lowest trained block: the same vectors, or not used at all."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tfew import VOCABULARY, child_environment, random_base, tiny_t5, word_tokenizer
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
)

import ia3.tfew.training.trainer
from ia3 import IA3Config, IA3Model
from ia3.base.loading import BaseModel
from ia3.errors import IA3Error
from ia3.targets.structure import block_lists
from ia3.tfew import TFewConfig, TrainingExample, TrainingStep, train
from ia3.tfew.prompts.encoding import EncodedExample
from ia3.tfew.scoring.choices import token_scores
from ia3.tfew.scoring.kept_states import kept_states
from ia3.tfew.temporary_adapter import all_linear
from ia3.tfew.training.losses import token_loss

SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "initializer_range": 0.2}
NO_DROPOUT: dict[str, Any] = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
GPT2 = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 512, **SIZES}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    **SIZES,
}
# Blocks that return a tensor, and blocks that return a tuple.
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**LLAMA),
    "gpt2": GPT2Config(**GPT2, **NO_DROPOUT),
    "neox": GPTNeoXConfig(**LLAMA),
    "falcon": FalconConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, alibi=False, **SIZES
    ),
}
RECIPE = TFewConfig(steps=8, batch_size=4, learning_rate=3e-2)
Trained = tuple[dict[str, Tensor], list[TrainingStep]]


def ids(generator: random.Random, count: int) -> tuple[int, ...]:
    return tuple(generator.randrange(3, VOCABULARY) for _ in range(count))


def training_set(longest: int = 9) -> list[TrainingExample]:
    """Of two templates each, that begin alike, and with unlike numbers of choices and tokens."""
    generator = random.Random(0)
    examples = []
    for i in range(6):
        lengths = [generator.randint(1, 4) for _ in range(2 + i % 3)]
        templates = tuple(
            EncodedExample(
                (5, 6, *ids(generator, generator.randint(3, longest))),
                tuple(ids(generator, length) for length in lengths),
            )
            for _ in range(2)
        )
        examples.append(TrainingExample(templates, i % 2))
    return examples


def encoded(examples: list[TrainingExample]) -> list[EncodedExample]:
    return [e for example in examples for e in example.encoded]


def upper(base: BaseModel, blocks: int = 2) -> IA3Model:
    return IA3Model(base.model, all_linear(base, blocks))


def blocks_of(base: BaseModel) -> nn.ModuleList:
    (blocks,) = block_lists(base.model).values()
    return blocks


def values(model: IA3Model) -> dict[str, Tensor]:
    return {name: vector.detach().clone() for name, vector in model.vectors("default").items()}


def trained(base: BaseModel, recipe: TFewConfig = RECIPE, **settings: Any) -> Trained:
    """The vectors of the upper two blocks after training, and the steps."""
    model = upper(base)
    history = train(base, model, training_set(), recipe, **settings)
    return values(model), history


@contextmanager
def calls(block: nn.Module) -> Iterator[list[int]]:
    """How many positions each computation in a block had."""
    seen: list[int] = []
    part = next(m for m in block.modules() if isinstance(m, nn.LayerNorm) or "Norm" in str(type(m)))
    handle = part.register_forward_hook(
        lambda _, args, out: seen.append(out.shape[0] * out.shape[1])
    )
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(ia3.tfew.training.trainer, "kept_states", lambda *_: None)
        yield


# -- the same vectors ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *((kind, {}) for kind in CONFIGS),
        ("llama", {"gradient_accumulation_steps": 2}),
        ("gpt2", {"max_tokens": 30}),
        ("llama", {"max_tokens": 12}),
    ],
)
def test_the_vectors_are_those_without(
    kind: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dict(settings)
    recipe = TFewConfig(
        steps=8, batch_size=4, learning_rate=3e-2, max_tokens=settings.pop("max_tokens", 4096)
    )
    with nothing_kept(monkeypatch):
        base = random_base(CONFIGS[kind])
        with calls(blocks_of(base)[1]) as whole:
            expected = trained(base, recipe, **settings)
    base = random_base(CONFIGS[kind])
    with calls(blocks_of(base)[1]) as seen:
        found = trained(base, recipe, **settings)
    if recipe.max_tokens > 12:  # below, choices of one example are apart, and not kept so
        assert sum(seen) < sum(whole)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert [s.loss for s in found[1]] == pytest.approx([s.loss for s in expected[1]], rel=1e-5)
    assert any((vector != 1).any() for vector in found[0].values())
    assert not any("forward" in vars(block) for block in blocks_of(base))


def test_lower_blocks_are_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty steps cost the lower blocks no more than eight."""
    seen = []
    for steps in (8, 40):
        base = random_base(CONFIGS["llama"])
        with calls(blocks_of(base)[0]) as positions:
            trained(base, TFewConfig(steps=steps, batch_size=4))
        seen.append(sum(positions))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("longest", [9, 150])
def test_gradients_of_packed_rows(longest: int) -> None:
    """In one row, and in several with padding; with and without a common beginning."""
    base = random_base(CONFIGS["llama"])
    model = upper(base)
    base.model.train()
    examples = training_set(longest)
    vectors = list(model.vectors("default").values())
    kept = kept_states(base, encoded(examples), 100)
    assert kept is not None
    for which in ([0, 1, 2, 3, 4, 5], [2, 4], [3]):
        batch = [examples[i].encoded[0] for i in which]
        labels = torch.tensor([examples[i].label for i in which])
        gradients = [
            torch.autograd.grad(
                token_loss(token_scores(base, batch, kept=way), labels).total, vectors
            )
            for way in (kept, None)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_autocast_to_bfloat16_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    with nothing_kept(monkeypatch):
        base = random_base(CONFIGS["llama"])
        with calls(blocks_of(base)[0]) as whole:
            expected = trained(base, bf16=True)
    base = random_base(CONFIGS["llama"])
    with calls(blocks_of(base)[0]) as seen:
        found = trained(base, bf16=True)
    assert sum(seen) < sum(whole)
    assert [s.loss for s in found[1]] == pytest.approx([s.loss for s in expected[1]], rel=0.02)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    expected = trained(random_base(CONFIGS["llama"]))
    found = trained(
        random_base(CONFIGS["llama"]),
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
    )
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)


def test_what_adapters_do_below_is_kept_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors in the lower blocks that are active and not trained."""

    def both() -> dict[str, Tensor]:
        base = random_base(CONFIGS["llama"])
        model = IA3Model(base.model, IA3Config(target_modules="all-linear"))
        with torch.no_grad():
            for vector in model.vectors("default").values():
                vector.fill_(1.3)
        lower = ("model.layers.0.", "model.layers.1.")
        for name, vector in model.vectors("default").items():
            vector.requires_grad_(not name.startswith(lower))
        with calls(blocks_of(base)[0]) as seen:
            train(base, model, training_set(), RECIPE)
        positions.append(sum(seen))
        return values(model)

    positions: list[int] = []
    found = both()
    with nothing_kept(monkeypatch):
        torch.testing.assert_close(found, both(), rtol=1e-5, atol=1e-6)
    assert positions[0] < positions[1]


# -- breaks ----------------------------------------------------------------------------------------

CHILD = """
import os, signal, sys
from test_kept_states import CONFIGS, random_base, trained

def on_step(step):
    if step.step == 6:
        os.kill(os.getpid(), signal.SIGKILL)

trained(random_base(CONFIGS["llama"]), on_step=on_step, checkpoints=sys.argv[1], save_steps=2)
"""


def test_killed_and_resumed_ends_with_the_same_bits(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], env=child_environment())
    assert done.returncode == -signal.SIGKILL
    after: list[int] = []
    base = random_base(CONFIGS["llama"])
    with calls(blocks_of(base)[0]) as seen:
        found = trained(
            base, checkpoints=tmp_path, save_steps=2, on_step=lambda s: after.append(s.step)
        )
    assert after[0] in (5, 7)
    whole = random_base(CONFIGS["llama"])
    with calls(blocks_of(whole)[0]) as seen_whole:
        expected = trained(whole)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
    assert found[1] == expected[1]
    # Both went without the lower blocks.
    assert sum(seen) == sum(seen_whole)


# -- not used --------------------------------------------------------------------------------------


def kept_for(base: BaseModel, model: IA3Model, draws: int = 100) -> Any:
    base.model.train()
    return kept_states(base, encoded(training_set()), draws)


def test_used_where_all_is_well() -> None:
    base = random_base(CONFIGS["llama"])
    assert kept_for(base, upper(base)) is not None
    # One draw an example saves nothing.
    assert kept_for(base, upper(random_base(CONFIGS["llama"])), draws=12) is None


@pytest.mark.parametrize("rate", ["attn_pdrop", "embd_pdrop", "resid_pdrop"])
def test_not_with_dropout(rate: str) -> None:
    base = random_base(GPT2Config(**GPT2, **{**NO_DROPOUT, rate: 0.1}))
    assert kept_for(base, upper(base)) is None


def test_not_with_dropout_that_is_no_module() -> None:
    base = random_base(LlamaConfig(**LLAMA, attention_dropout=0.1))
    assert kept_for(base, upper(base)) is None


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules="all-linear"),
        IA3Config(target_modules=["model.layers.3.mlp.up_proj"], modules_to_save=["lm_head"]),
        IA3Config(target_modules=["model.layers.3.mlp.up_proj", "lm_head"]),
    ],
    ids=["first block", "copy of the head", "site on the head"],
)
def test_not_where_something_else_is_trained(config: IA3Config) -> None:
    base = random_base(CONFIGS["llama"])
    assert kept_for(base, IA3Model(base.model, config)) is None


def test_not_where_upper_blocks_read_more_than_hidden_states(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the reason: it is tried out."""

    def leaping() -> BaseModel:
        base = random_base(CONFIGS["llama"])
        lowest, *_, uppermost = blocks_of(base)
        held: list[Tensor] = []

        def hold(module: nn.Module, args: Any, output: Tensor) -> None:
            held[:] = [output]

        def add(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            return (args[0] + held[0],)

        lowest.mlp.register_forward_hook(hold)
        uppermost.mlp.register_forward_pre_hook(add)
        return base

    base = leaping()
    assert kept_for(base, upper(base)) is None
    assert not any("forward" in vars(block) for block in blocks_of(base))
    with nothing_kept(monkeypatch):
        expected = trained(leaping())
    torch.testing.assert_close(trained(leaping())[0], expected[0], rtol=0, atol=0)


def test_not_where_prompts_are_not_shared() -> None:
    base = random_base(BloomConfig(n_layer=4, hidden_size=32, n_head=4, **SIZES))
    assert kept_for(base, upper(base)) is None


def test_not_in_an_encoder_decoder() -> None:
    base = BaseModel(tiny_t5(), word_tokenizer(), "t5")
    config = IA3Config(target_modules=r"decoder\.block\.1\..*\.(k|v|wo)", feedforward_modules=[])
    assert kept_for(base, IA3Model(base.model, config)) is None


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit is not kept, and trains all the same."""
    generator = random.Random(1)
    examples = [
        TrainingExample((EncodedExample(ids(generator, 50), ((3, 4), (5,))),), i % 2)
        for i in range(60)
    ]
    base = random_base(CONFIGS["llama"])
    weights = sum(p.numel() * p.element_size() for p in base.model.parameters())
    model = upper(base)
    base.model.train()
    states = kept_states(base, encoded(examples), 100)
    assert states is not None
    kept = [e in states for e in encoded(examples)]
    assert kept == sorted(kept, reverse=True)
    assert 0 < sum(kept) < 60
    assert weights / 2 < states.bytes <= weights * 1.1
    recipe = TFewConfig(steps=16, batch_size=4, learning_rate=3e-2)
    train(base, model, examples, recipe)
    with nothing_kept(monkeypatch):
        base = random_base(CONFIGS["llama"])
        expected = upper(base)
        train(base, expected, examples, recipe)
    torch.testing.assert_close(values(model), values(expected), rtol=1e-5, atol=1e-6)


# -- upper blocks only -----------------------------------------------------------------------------

TWELVE = LlamaConfig(**{**LLAMA, "num_hidden_layers": 12})


@pytest.mark.parametrize("count", [2, 11, 12])
def test_peft_reads_the_same_model(tmp_path: Path, count: int) -> None:
    """Block 1's name is the end of block 11's in part: neither takes the other along."""
    peft = pytest.importorskip("peft")
    base = random_base(TWELVE)
    model = upper(base, count)
    assert {name.split(".")[2] for name in model.vectors("default")} == {
        str(i) for i in range(12 - count, 12)
    }
    assert len(model.vectors("default")) == 7 * count
    with torch.no_grad():
        for vector in model.vectors("default").values():
            vector.uniform_(0.5, 1.5)
    model.save_pretrained(tmp_path)
    inputs = torch.tensor([ids(random.Random(0), 12)])
    theirs = peft.PeftModel.from_pretrained(random_base(TWELVE).model, tmp_path)
    with torch.no_grad():
        expected = model(input_ids=inputs).logits
        torch.testing.assert_close(theirs(input_ids=inputs).logits, expected)
        again = IA3Model.from_pretrained(random_base(TWELVE).model, tmp_path)
        torch.testing.assert_close(again(input_ids=inputs).logits, expected)
        assert not torch.allclose(random_base(TWELVE).model(input_ids=inputs).logits, expected)


def test_all_of_the_blocks_are_all_linear_layers() -> None:
    base = random_base(CONFIGS["gpt2"])
    every = IA3Model(base.model, all_linear(base))
    shapes = {name: v.shape for name, v in values(every).items()}
    every.unload()
    assert {name: v.shape for name, v in values(upper(base, 4)).items()} == shapes


@pytest.mark.parametrize("count", [0, -1, 5])
def test_a_number_of_blocks_that_the_model_has_not(count: int) -> None:
    base = random_base(CONFIGS["llama"])
    with pytest.raises(IA3Error, match=f"upper_blocks is {count}, expected 1 to 4: .* 4 blocks"):
        all_linear(base, count)


def test_upper_blocks_of_an_encoder_decoder() -> None:
    base = BaseModel(tiny_t5(), word_tokenizer(), "t5")
    with pytest.raises(IA3Error, match=r"blocks in encoder\.block, decoder\.block, expected one"):
        all_linear(base, 1)
