"""Generations that run together: each as it would alone."""

import asyncio
import copy
import random
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from support.pairs import vectors
from support.serving import (
    LLAMA,
    VOCABULARY,
    adapted,
    adapter,
    all_pieces,
    engine_of,
    generated_alone,
    greedy,
    prompts,
    served_base,
    tokens_of,
)
from transformers import (
    BartConfig,
    BloomConfig,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    T5Config,
)

import ia3
from ia3 import load_base_model
from ia3.errors import IA3Error, StateError
from ia3.serve.engine.bases import ServedBase
from ia3.serve.engine.generation import PROMPT_TOKENS, RunningBatch
from ia3.serve.engine.rows import Row

COUNT = 12
# Of the model's 2 layers, 2 heads of 4 numbers, keys and values.
NUMBERS_OF_A_TOKEN = 2 * 2 * 4 * 2
PROMPT = prompts(3)[2]
TEXT = tuple(range(3, 33)) * 3


def without_end(tokens):
    return [token for token in tokens if token > 2]


def row_of(asked):
    """A row whose pieces nobody reads; it is left by its `left`."""
    row = Row(asked, lambda *_: None, lambda: row.left)
    row.left = False
    return row


def new_tokens(row):
    return row.ids[len(row.asked.prompt) :]


@pytest.fixture(scope="module")
def served():
    return served_base()


def test_rows_with_any_adapters_get_the_tokens_that_they_get_alone(served):
    asked = [
        greedy(prompt, None if i % 5 == 4 else f"a{i % 5}", COUNT + i)
        for i, prompt in enumerate(prompts(20))
    ]
    with engine_of(served) as engine:
        found = asyncio.run(all_pieces(engine, asked))
    for i, (pieces, each) in enumerate(zip(found, asked, strict=True)):
        seed = None if i % 5 == 4 else i % 5
        expected = generated_alone(LLAMA, seed, each.prompt, each.max_tokens)
        assert tokens_of(pieces) == without_end(expected), i
        assert sum(piece.tokens for piece in pieces) == len(expected)
        assert pieces[-1].finish == ("stop" if expected[-1] == 1 else "length")
        assert all(piece.finish is None for piece in pieces[:-1])


def test_rows_run_together_and_not_one_after_the_other(served):
    batch = RunningBatch(served)
    rows = [row_of(greedy(prompt, f"a{i}", 3)) for i, prompt in enumerate(prompts(4))]
    for row in rows:
        assert batch.has_room(row.asked)
        batch.join(row)
    assert batch.step() == []
    # Prompts of 1 to 30 tokens are one pass, and each has its second token too.
    assert [len(row.ids) - len(row.asked.prompt) for row in rows] == [2] * 4


def test_a_long_prompt_is_computed_in_parts_between_the_others_tokens(served):
    asked = [greedy(PROMPT, "a1", 30), greedy((5, 6, 7) * 100, "a2", 12), greedy(PROMPT, "a3", 12)]
    batch = RunningBatch(served)
    rows = [row_of(each) for each in asked]
    batch.join(rows[0])
    batch.step()
    batch.join(rows[1])
    batch.join(rows[2])
    new = len(rows[0].ids)
    for step in range(1, 3):
        batch.step()
        assert len(rows[0].ids) == new + step
        assert rows[1].cached == step * PROMPT_TOKENS < 300
    while batch.rows:
        batch.step()
    assert [new_tokens(row) for row in rows] == [
        generated_alone(LLAMA, seed, each.prompt, each.max_tokens)
        for seed, each in zip((1, 2, 3), asked, strict=True)
    ]


@pytest.mark.parametrize("leaving", [0, 1, 2, 3, 4])
def test_whichever_row_leaves_the_others_go_on(served, leaving):
    """Rows 0 to 2 go on token by token, row 3 is in the midst of its prompt, and row 4 waits."""
    asked = [greedy(prompt, f"a{i}", 9 + i) for i, prompt in enumerate(prompts(3))]
    asked += [greedy((5, 6, 7) * 100, "a3", 9), greedy((8, 9) * 60, "a4", 9)]
    batch = RunningBatch(served)
    rows = [row_of(each) for each in asked]
    for row in rows[:3]:
        batch.join(row)
    batch.step()
    for row in rows[3:]:
        batch.join(row)
    batch.step()
    assert rows[3].cached
    assert not rows[4].cached
    rows[leaving].left = True
    while batch.rows:
        assert batch.step() == []
    for i in {*range(5)} - {leaving}:
        expected = generated_alone(LLAMA, i, asked[i].prompt, asked[i].max_tokens)
        assert new_tokens(rows[i]) == expected, i


def test_values_that_are_not_finite_reach_no_row_that_comes_to_their_place():
    served = served_base(adapters=2)
    overflowing = adapter(LLAMA, 2)
    huge = {name: torch.full_like(each, 3e38) for name, each in overflowing.vectors.items()}
    served.bank.add("huge", replace(overflowing, vectors=huge))
    long, short, failing = (greedy(p, f"a{i}", COUNT) for i, p in enumerate((TEXT, (5, 6), TEXT)))
    failing = replace(failing, adapter="huge", prompt=TEXT[:60])
    rows = [row_of(each) for each in (failing, short, long)]
    batch = RunningBatch(served)
    batch._ends = frozenset()
    for row in rows:
        batch.join(row)
    # The short one comes to its place, and the long one makes the pass as long as it was.
    ((failed, error),) = batch.step()
    assert failed is rows[0]
    assert "not finite" in str(error)
    while batch.rows:
        assert batch.step() == []
    for row in rows[1:]:
        alone = row_of(row.asked)
        batch.join(alone)
        while batch.rows:
            batch.step()
        assert row.ids == alone.ids


@pytest.mark.parametrize("seed", range(3))
def test_rows_that_come_and_go_in_any_order_get_what_they_get_alone(served, seed):
    draw = random.Random(seed)
    kinds = [(i, prompt) for i, prompt in enumerate([*prompts(6), (5, 6) * 70, (7,) * 150])]
    most = 25
    expected = [generated_alone(LLAMA, i, prompt, most) for i, prompt in kinds]
    batch, started, running = RunningBatch(served), [], []
    while len(started) < 40 or batch.rows:
        for _ in range(draw.choice([0, 0, 1, 1, 2, 5])):
            if len(started) < 40:
                i, prompt = draw.choice(kinds)
                row = row_of(greedy(prompt, f"a{i}", draw.randrange(1, most + 1)))
                batch.join(row)
                started.append((i, row))
                running.append(row)
        if running and draw.random() < 0.1:
            draw.choice(running).left = True
        assert batch.step() == []
    for i, row in started:
        new = new_tokens(row)
        assert new == expected[i][: len(new)]
        assert row.left or row.finished


def test_memory_is_given_back_when_no_row_is_left(served):
    batch = RunningBatch(served)
    batch.join(row_of(greedy(PROMPT, "a1", 5)))
    batch.step()
    assert batch._cached.bytes_of_token() > 0
    while batch.rows:
        batch.step()
    assert batch._cached.bytes_of_token() == 0


def test_rows_join_up_to_what_their_keys_and_values_may_take(served, monkeypatch):
    batch = RunningBatch(served)
    asked = greedy(PROMPT, "a1", 100 - len(PROMPT))
    batch.join(row_of(asked))
    assert batch._token == 4 * NUMBERS_OF_A_TOKEN
    monkeypatch.setattr("ia3.serve.engine.generation.MOST_BYTES", 3 * 100 * batch._token)
    for _ in range(2):
        assert batch.has_room(asked)
        batch.join(row_of(asked))
    assert not batch.has_room(asked)
    batch.forget()
    assert batch.has_room(replace(asked, max_tokens=10**6))


def test_the_embedded_model_chats_as_it_does_alone():
    base = load_base_model("smollm2-135m-instruct")
    said = ["Name a colour.", "Wie heißt die Hauptstadt von Österreich?", "1, 2, 3,"]
    asked = []
    for i, text in enumerate(said):
        chat = [{"role": "user", "content": text}]
        ids = base.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=False
        )
        asked.append(greedy(ids, None if i == 2 else f"a{i}", 8))
    model = ia3.get_peft_model(base.model, ia3.IA3Config())
    expected, adapters = [], []
    for seed, each in enumerate(asked):
        generator = torch.Generator().manual_seed(seed)
        for vector in vectors(model).values():
            vector.data = 1 + 0.1 * torch.randn(vector.shape, generator=generator)
        adapters.append(copy.deepcopy(model.adapter("default")))
        ids = torch.tensor([each.prompt])
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 8}
        with model.disable_adapter() if each.adapter is None else nullcontext():
            new = model.generate(input_ids=ids, **options)[0, len(each.prompt) :]
        expected.append(base.tokenizer.decode(new, skip_special_tokens=True))
    served = ServedBase("smollm2", base, ia3.AdapterBank(model.unload()))
    for i, one in enumerate(adapters):
        served.bank.add(f"a{i}", one)
    try:
        with engine_of(served) as engine:
            found = asyncio.run(all_pieces(engine, asked))
        assert engine.engines[0]._worker.batch._token == 46_080  # together, that is
    finally:
        served.bank.close()
    assert ["".join(piece.text for piece in pieces) for pieces in found] == expected
    assert len({*expected}) == 3


# -- sampling, stop texts and log-probabilities ----------------------------------------------------


def test_a_seed_gives_the_same_tokens_whoever_else_is_in_the_batch(served):
    asked = replace(greedy(PROMPT, "a1", 25), temperature=1.3, top_p=0.95, seed=11)
    others = [replace(asked, adapter=f"a{i}", prompt=p, seed=i) for i, p in enumerate(prompts(8))]
    with engine_of(served) as engine:
        (alone,) = asyncio.run(all_pieces(engine, [asked]))
        among = asyncio.run(all_pieces(engine, [*others[:5], asked, *others[5:], asked]))
        (other,) = asyncio.run(all_pieces(engine, [replace(asked, seed=12)]))
    assert tokens_of(alone) == tokens_of(among[5]) == tokens_of(among[-1]) != tokens_of(other)


def test_a_text_ends_before_its_stop_text(served):
    whole = generated_alone(LLAMA, 1, PROMPT, 20)
    text = "".join(f" w{token}" for token in whole if token > 2)
    # From within one word to within another.
    middle = text.index(" ", 20)
    stop = text[middle - 1 : middle + 2]
    asked = greedy(PROMPT, "a1", 20, stop=("never", stop), logprobs=0)
    with engine_of(served) as engine:
        (pieces,) = asyncio.run(all_pieces(engine, [asked]))
    assert "".join(piece.text for piece in pieces) == text[: text.index(stop)]
    assert pieces[-1].finish == "stop"
    named = "".join(each.token for piece in pieces for each in piece.logprobs)
    assert named.startswith(text[: text.index(stop)])
    assert len(named) - text.index(stop) < 4  # its last word, whole


def test_log_probabilities_are_those_of_the_adapter_alone(served):
    asked = [greedy(p, f"a{i}", 8, logprobs=i) for i, p in enumerate(prompts(4))]
    with engine_of(served) as engine:
        found = asyncio.run(all_pieces(engine, asked))
    for i, (pieces, each) in enumerate(zip(found, asked, strict=True)):
        new = generated_alone(LLAMA, i, each.prompt, 8)
        ids = torch.tensor([[*each.prompt, *new]])
        with torch.no_grad():
            scores = adapted(LLAMA, i).double()(input_ids=ids).logits[0].log_softmax(-1)
        told = [logprob for piece in pieces for logprob in piece.logprobs]
        kept = [token for token in new if token != 1]
        assert len(told) == len(kept)
        for place, (one, token) in enumerate(zip(told, kept, strict=True)):
            row = scores[len(each.prompt) - 1 + place]
            assert one.logprob == pytest.approx(float(row[token]), abs=1e-4)
            values, ids = row.topk(i)
            assert [logprob for _, logprob in one.top] == pytest.approx(values.tolist(), abs=1e-4)
            assert all(name in one.token or name for name, _ in one.top)
            assert len(one.top) == i


def test_the_generation_config_s_repetition_penalty_counts():
    options = {"repetition_penalty": 1.8}
    served = served_base()
    served.base.model.generation_config.repetition_penalty = 1.8
    asked = [greedy(p, f"a{i}", COUNT) for i, p in enumerate(prompts(5))]
    with engine_of(served) as engine:
        found = asyncio.run(all_pieces(engine, asked))
        assert engine.load().batched > engine.load().batches
    without = [generated_alone(LLAMA, i, each.prompt, COUNT) for i, each in enumerate(asked)]
    assert [tokens_of(pieces) for pieces in found] != [without_end(each) for each in without]
    for i, (pieces, each) in enumerate(zip(found, asked, strict=True)):
        expected = generated_alone(LLAMA, i, each.prompt, COUNT, **options)
        assert tokens_of(pieces) == without_end(expected), i


# -- models that take no rows together ------------------------------------------------------------

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "initializer_range": 0.6, "pad_token_id": 0}
SIZES |= {"bos_token_id": None, "eos_token_id": 1}
INNER = {"intermediate_size": 32, "num_key_value_heads": 2}
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
TOGETHER = {
    "gpt2": GPT2Config(**SIZES, n_positions=64),
    "qwen2": Qwen2Config(**SIZES, **INNER),
    "gemma": GemmaConfig(**SIZES, **INNER, head_dim=8),
    "neox": GPTNeoXConfig(**SIZES, intermediate_size=32),
    "opt": OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=16, init_std=0.6),
    "sliding": MistralConfig(**SIZES, **INNER, sliding_window=8),
    "sliding and not": Gemma3TextConfig(**SIZES, **INNER, head_dim=8, sliding_window=8, **MIXED),
    "eager": LlamaConfig(**SIZES, **INNER, attn_implementation="eager"),
}
TEXT_TO_TEXT = {"vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
TEXT_TO_TEXT |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "init_std": 0.6}
TEXT_TO_TEXT |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "dropout": 0.0, "pad_token_id": 0}
TEXT_TO_TEXT |= {"decoder_start_token_id": 2, "bos_token_id": None, "eos_token_id": 1}
ALONE = {
    "wide": MistralConfig(**SIZES, **INNER, sliding_window=4096),
    "alibi": BloomConfig(**{**SIZES, "n_head": 4}),
    "t5": T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=4,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        initializer_factor=8.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        dropout_rate=0.0,
        is_encoder_decoder=True,
    ),
}


@pytest.mark.parametrize("kind", [*TOGETHER, *ALONE])
def test_models_that_take_rows_and_those_that_do_not_give_what_they_give_alone(kind):
    config = (TOGETHER | ALONE)[kind]
    served = served_base(config, adapters=4)
    asked = [greedy(p, f"a{i % 4}", COUNT + i, logprobs=1) for i, p in enumerate(prompts(6))]
    with engine_of(served) as engine:
        found = asyncio.run(all_pieces(engine, asked))
    for i, (pieces, each) in enumerate(zip(found, asked, strict=True)):
        expected = generated_alone(config, i % 4, each.prompt, each.max_tokens)
        assert tokens_of(pieces) == without_end(expected), i
        assert pieces[-1].finish == ("stop" if expected[-1] == 1 else "length")
    batch = RunningBatch(served)
    batch.join(row_of(asked[0]))
    assert batch.has_room(asked[1]) == (kind in TOGETHER)


def test_prompts_for_an_encoder_have_its_whole_context():
    config = BartConfig(**TEXT_TO_TEXT, max_position_embeddings=20)
    served = served_base(config, adapters=1)
    prompt = tuple(range(3, 23))
    with engine_of(served) as engine:
        (pieces,) = asyncio.run(all_pieces(engine, [greedy(prompt, "a0", 10**6)]))
        with pytest.raises(IA3Error, match="21 tokens, and the context of 'bart' is 20"):
            asyncio.run(all_pieces(engine, [greedy((*prompt, 5), "a0", 5)]))
    expected = generated_alone(config, 0, prompt, 19)
    assert tokens_of(pieces) == without_end(expected)


def test_one_that_runs_alone_is_left_sampled_and_stopped_too():
    served = served_base(ALONE["wide"], adapters=2)
    served.base.model.generation_config.eos_token_id = None
    served.base.tokenizer.eos_token = None
    asked = replace(greedy(PROMPT, "a1", 25), temperature=1.3, seed=11)

    async def all_of_it(engine):
        left = engine.submit(greedy(PROMPT, "a0", 10**6))
        await anext(left)
        await left.aclose()
        return await all_pieces(engine, [asked, asked, replace(asked, stop=("w3",))])

    with engine_of(served) as engine:
        first, second, stopped = asyncio.run(asyncio.wait_for(all_of_it(engine), 60))
    assert tokens_of(first) == tokens_of(second)
    assert len(tokens_of(first)) > 15
    text = "".join(piece.text for piece in first)
    assert "".join(piece.text for piece in stopped) == text[: text.find("w3")]


def test_options_of_the_generation_config_that_only_generate_knows_are_left_to_it(served):
    served = served_base(adapters=2)
    served.base.model.generation_config.no_repeat_ngram_size = 2
    asked = [greedy(p, f"a{i}", COUNT) for i, p in enumerate(prompts(2))]
    with engine_of(served) as engine:
        found = asyncio.run(all_pieces(engine, asked))
    for i, (pieces, each) in enumerate(zip(found, asked, strict=True)):
        expected = generated_alone(LLAMA, i, each.prompt, COUNT, no_repeat_ngram_size=2)
        assert tokens_of(pieces) == without_end(expected), i


def test_a_text_that_the_generation_config_ends_is_an_error_and_hangs_nothing():
    served = served_base(adapters=1)
    served.base.model.generation_config.max_time = 1e-9
    asked = greedy(PROMPT, "a0", 300)
    with engine_of(served) as engine, pytest.raises(StateError, match="generation config"):
        asyncio.run(asyncio.wait_for(all_pieces(engine, [asked]), 60))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_run_together_too(dtype):
    served = served_base(adapters=2)
    served.base.model.to(dtype)
    batch = RunningBatch(served)
    batch.join(row_of(greedy(PROMPT, "a1", 5)))
    assert batch.has_room(greedy(PROMPT, None, 5))
    batch.join(row_of(greedy(PROMPT, None, 5)))
    while batch.rows:
        assert batch.step() == []


def test_the_cache_has_room_for_the_rows_that_there_are():
    served = served_base(adapters=0)
    served.base.model.generation_config.eos_token_id = None
    served.base.tokenizer.eos_token = None
    batch = RunningBatch(served)
    for _ in range(33):
        batch.join(row_of(greedy((5,), None, 3)))
    batch.step()
    assert cached_numbers(batch) == 64 * 256 * NUMBERS_OF_A_TOKEN
    batch.join(row_of(greedy((5,) * 250, None, 20)))
    while len(batch.rows) > 1 or batch.rows[0].cached < 257:
        batch.step()
    assert cached_numbers(batch) == 512 * NUMBERS_OF_A_TOKEN


def cached_numbers(batch):
    return sum(tensor.numel() for layer in batch._cached._cache.tensors for tensor in layer)
