"""Prompts computed once below the blocks that adapters touch, against one text after the other."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support.scoring import ALL, ENCODER_DECODER, SHARING, plain_scores, random_examples
from support.tfew import hook_count, random_base, random_model, tiny_llama, word_tokenizer
from torch import Tensor, nn
from transformers import Gemma2Config, LlamaConfig

from ia3.base.loading import BaseModel
from ia3.targets.structure import block_lists
from ia3.tfew.prompts.encoding import EncodedExample
from ia3.tfew.scoring.branching import branches, saves
from ia3.tfew.scoring.choices import choice_scores

DECODERS = {name: config for name, config in ALL.items() if name not in ENCODER_DECODER}


def deeper(config: Any, layers: int = 4) -> Any:
    """The same architecture with more blocks."""
    settings = config.to_dict()
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        if name in settings:
            settings[name] = layers
    if settings.pop("layer_types", None) and settings.get("sliding_window"):
        settings["layer_types"] = ["sliding_attention", "full_attention"] * (layers // 2)
    if settings.get("attention_types"):
        settings["attention_types"] = [[["global", "local"], layers // 2]]
        settings.pop("attention_layers", None)
    return type(config)(**{k: v for k, v in settings.items() if k != "model_type"})


def blocks_of(base: BaseModel) -> list[nn.Module]:
    return [*nn.ModuleList(*block_lists(base.model).values())]


def asked(copies: int = 3) -> list[EncodedExample]:
    """Few prompts, each with several lists of choices, as of several adapters."""
    first = random_examples([(12, (1, 3, 2)), (7, (2, 2)), (90, (2, 5))], shared=5)
    other = random_examples([(12, (2, 1)), (7, (3, 1, 1)), (90, (1, 4))], seed=1)
    alike = [EncodedExample(a.prompt, b.choices) for a, b in zip(first, other, strict=True)]
    return [*first, *alike, *first][: 3 * copies]


def rows_seen(blocks: list[nn.Module], work: Any) -> list[int]:
    """How many tokens each block computes."""
    seen = [0] * len(blocks)

    def count(place: int, output: Any) -> None:
        hidden: Tensor = output if isinstance(output, Tensor) else output[0]
        seen[place] += hidden.shape[0] * hidden.shape[1]

    handles = [
        block.register_forward_hook(lambda _, __, output, place=place: count(place, output))
        for place, block in enumerate(blocks)
    ]
    try:
        work()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def assert_plain(base: BaseModel, examples: list[EncodedExample], touched: list[nn.Module]) -> None:
    hooks = hook_count(base.model)
    found = choice_scores(
        base, examples, routing=lambda _: nullcontext(), touched=touched, max_tokens=300
    )
    assert hook_count(base.model) == hooks
    for row, example in zip(found, examples, strict=True):
        expected = plain_scores(base, example)
        torch.testing.assert_close(row[: len(expected)], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", DECODERS)
def test_scores_are_the_plain_ones_wherever_a_model_branches(kind: str) -> None:
    base = random_base(deeper(DECODERS[kind]))
    blocks = blocks_of(base) if block_lists(base.model) else []
    examples = asked()
    assert saves(examples)
    for lowest in range(1, len(blocks)):
        touched = blocks[lowest:]
        assert_plain(base, examples, touched)
        # GPT-2 shapes what its last block puts out as its input was.
        if kind in {*SHARING} - {"gpt2"}:
            assert branches(base, touched)
            seen = rows_seen(
                blocks,
                lambda touched=touched: choice_scores(
                    base, examples, routing=lambda _: nullcontext(), touched=touched
                ),
            )
            assert len({*seen[:lowest]}) == len({*seen[lowest:]}) == 1
            assert seen[0] < 0.6 * seen[-1]


def test_masks_and_positions_of_several_kinds_are_moved() -> None:
    """Gemma 2 has a mask for each kind of block."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8}
    config = Gemma2Config(
        vocab_size=97, num_hidden_layers=4, num_key_value_heads=2, sliding_window=512, **sizes
    )
    base = random_base(config)
    for lowest in (1, 2, 3):
        assert branches(base, blocks_of(base)[lowest:])
        assert_plain(base, asked(), blocks_of(base)[lowest:])


def test_texts_that_begin_alike_share_the_beginning_below() -> None:
    base = random_base(deeper(SHARING["llama"]))
    blocks = blocks_of(base)
    examples = random_examples([(9, (1, 2))] * 6, shared=150)
    assert len({example.prompt for example in examples}) == 6
    assert_plain(base, examples, blocks[3:])
    seen = rows_seen(
        blocks,
        lambda: choice_scores(base, examples, routing=lambda _: nullcontext(), touched=blocks[3:]),
    )
    assert seen[0] < 0.4 * seen[-1]


def test_rows_below_stay_short_where_choices_differ() -> None:
    """Attention costs the square of a row's length: many lists of choices get several rows."""
    base = random_base(deeper(SHARING["llama"]))
    blocks = blocks_of(base)
    (prompt,) = random_examples([(80, (1,))])
    several = random_examples([(1, (3,) * 40)] * 8)
    examples = [EncodedExample(prompt.prompt, each.choices) for each in several]
    assert_plain(base, examples, blocks[2:])
    lengths: list[int] = []
    blocks[0].register_forward_hook(lambda _, __, output: lengths.append(output.shape[1]))
    seen = rows_seen(
        blocks,
        lambda: choice_scores(base, examples, routing=lambda _: nullcontext(), touched=blocks[2:]),
    )
    assert seen[0] < 0.8 * seen[-1]
    assert max(lengths) <= 384


def test_where_nothing_is_shared_nothing_is_tried() -> None:
    base = random_base(deeper(SHARING["llama"]))
    blocks = blocks_of(base)
    examples = random_examples([(12, (1, 3, 2)), (7, (2, 2))])
    assert not saves(examples)
    seen = rows_seen(blocks, lambda: assert_plain(base, examples, blocks[2:]))
    assert len({*seen}) == 1


def test_each_place_to_branch_at_is_tried_out_for_itself() -> None:
    """The third block reads, besides its argument, what the second one put out."""
    base = BaseModel(tiny_llama(num_hidden_layers=4), word_tokenizer(), "reads below")
    layers: Any = base.model.model.layers  # type: ignore[union-attr]
    held: list[Tensor] = []
    layers[1].register_forward_hook(lambda _, __, output: held.append(output))
    layers[2].register_forward_hook(lambda _, __, output: output + held[-1])
    assert branches(base, [*layers[1:]])
    assert not branches(base, [*layers[2:]])
    assert branches(base, [*layers[3:]])
    for lowest in (1, 2, 3):
        assert_plain(base, asked(), [*layers[lowest:]])


def test_a_models_blocks_are_not_kept_by_what_was_tried() -> None:
    import gc
    import weakref

    base = BaseModel(
        random_model(LlamaConfig(**deeper(SHARING["llama"]).to_diff_dict())),
        word_tokenizer(),
        "gone",
    )
    blocks = blocks_of(base)
    assert branches(base, blocks[2:])
    gone = [weakref.ref(base.model), weakref.ref(blocks[3])]
    del base, blocks
    gc.collect()
    assert [each() for each in gone] == [None, None]
