"""The engine: what joins, leaves, fails or is refused, and what becomes of the others."""

import asyncio
import contextlib
import gc
import threading
import time
from unittest.mock import Mock

import pytest
import torch
from support.serving import (
    LLAMA,
    adapter,
    all_pieces,
    engine_of,
    generated_alone,
    greedy,
    pieces_of,
    prompts,
    served_base,
    tokens_of,
)

from ia3 import IA3Error
from ia3.errors import InvalidTypeError, StateError, UnknownNameError
from ia3.serve.engine.interface import Load
from ia3.serve.engine.worker import LocalEngine

PROMPT = prompts(3)[2]
LONG = 400


@pytest.fixture
def served():
    return served_base()


def run(awaitable):
    return asyncio.run(asyncio.wait_for(awaitable, 60))


async def until(condition):
    while not condition():
        await asyncio.sleep(0.005)


def without_end(tokens):
    return [token for token in tokens if token > 2]


def endless(adapter="a0", prompt=PROMPT, **more):
    """A generation that goes on until it is left."""
    return greedy(prompt, adapter, LONG, stop=("nothing has this",), **more)


@pytest.fixture
def no_end(served):
    """As `served`, with a model that never ends a text by itself, and takes its time."""
    # Without the interpreter: on a busy machine the tests' own thread would wait for it.
    served.base.model.register_forward_pre_hook(lambda *_: time.sleep(0.002))
    served.base.model.generation_config.eos_token_id = None
    served.base.tokenizer.eos_token = None
    return served


def test_a_generation_joins_those_that_run_and_none_has_other_tokens(no_end):
    later = greedy(prompts(5)[4], "a3", 9)

    async def both(engine):
        first = engine.submit(greedy(PROMPT, "a1", 40))
        pieces = [await anext(first), await anext(first)]
        others = await all_pieces(engine, [later, later])
        return pieces + await pieces_of(first), others

    with engine_of(no_end) as engine:
        first, others = run(both(engine))
    options = {"eos_token_id": None}
    assert tokens_of(first) == without_end(generated_alone(LLAMA, 1, PROMPT, 40, **options))
    expected = without_end(generated_alone(LLAMA, 3, later.prompt, 9, **options))
    assert [tokens_of(pieces) for pieces in others] == [expected] * 2


def test_one_that_is_left_runs_no_longer_and_the_others_go_on(no_end):
    async def leave(engine):
        streams = [engine.submit(endless(f"a{i}")) for i in range(3)]
        found = [[await anext(stream)] for stream in streams]
        assert engine.load().running == 3
        await streams[0].aclose()
        await until(lambda: engine.load() == Load(2, 0, *_batches(engine)))
        for i in (1, 2):
            found[i] += [await anext(streams[i]) for _ in range(5)]
            await streams[i].aclose()
        await until(lambda: engine.load().running == 0)
        return found

    with engine_of(no_end) as engine:
        found = run(leave(engine))
    for i in (1, 2):
        expected = generated_alone(LLAMA, i, PROMPT, LONG, eos_token_id=None)
        new = tokens_of(found[i])
        assert new == without_end(expected)[: len(new)]


def _batches(engine):
    load = engine.load()
    return load.batches, load.batched


def test_an_adapter_that_is_deleted_or_replaced_while_it_answers_changes_nothing(no_end):
    async def go_on(engine):
        stream = engine.submit(greedy(PROMPT, "a1", 60))
        pieces = [await anext(stream)]
        no_end.bank.remove("a1")
        no_end.bank.add("a1", adapter(LLAMA, 5))
        after = await pieces_of(engine.submit(greedy(PROMPT, "a1", 60)))
        return pieces + await pieces_of(stream), after

    with engine_of(no_end) as engine:
        before, after = run(go_on(engine))
    options = {"eos_token_id": None}
    assert tokens_of(before) == without_end(generated_alone(LLAMA, 1, PROMPT, 60, **options))
    assert tokens_of(after) == without_end(generated_alone(LLAMA, 5, PROMPT, 60, **options))


def test_adapters_that_make_room_for_others_go_on():
    served = served_base(adapters=6, capacity=2)
    asked = [greedy(PROMPT, f"a{i}", 20) for i in range(6)]
    with engine_of(served) as engine:
        found = run(all_pieces(engine, asked))
    for i, pieces in enumerate(found):
        assert tokens_of(pieces) == without_end(generated_alone(LLAMA, i, PROMPT, 20)), i


@pytest.mark.parametrize(
    ("asked", "kind", "words"),
    [
        (greedy(PROMPT, "b1", 5), UnknownNameError, "no adapter 'b1' here"),
        (greedy((), "a1", 5), IA3Error, "prompt is empty"),
        (greedy((5, 64), "a1", 5), IA3Error, "token 64"),
        (greedy((5, -1), "a1", 5), IA3Error, "prompt is -1"),
        (greedy((5, "x"), "a1", 5), InvalidTypeError, "prompt is 'x'"),
        (greedy((5,) * 512, "a1", 5), IA3Error, "512 tokens, and the context of 'llama' is 512"),
        (greedy((5,) * 5000, "a1", 5), IA3Error, "5,000 tokens, and the context of 'llama' is 512"),
        (greedy(PROMPT, "a1", 0), IA3Error, "max_tokens is 0"),
        (greedy(PROMPT, "a1", 5, temperature=-1.0), IA3Error, "temperature is -1.0"),
        (greedy(PROMPT, "a1", 5, temperature=torch.nan), IA3Error, "temperature is nan"),
        (greedy(PROMPT, "a1", 5, top_p=0.0), IA3Error, "top_p is 0.0"),
        (greedy(PROMPT, "a1", 5, top_p=1.1), IA3Error, "top_p is 1.1"),
        (greedy(PROMPT, "a1", 5, stop=("",)), IA3Error, "stop has an empty text"),
        (greedy(PROMPT, "a1", 5, logprobs=-1), IA3Error, "logprobs is -1"),
    ],
)
def test_what_cannot_be_generated_is_refused_and_the_others_go_on(served, asked, kind, words):
    good = greedy(PROMPT, "a2", 10)

    async def both(engine):
        return await asyncio.gather(
            pieces_of(engine.submit(good)), pieces_of(engine.submit(asked)), return_exceptions=True
        )

    with engine_of(served) as engine:
        pieces, error = run(both(engine))
        assert engine.load().running == engine.load().waiting == 0
    assert type(error) is kind
    assert words in str(error)
    assert tokens_of(pieces) == without_end(generated_alone(LLAMA, 2, PROMPT, 10))


def test_a_text_ends_where_the_context_does(no_end):
    with engine_of(no_end) as engine:
        (pieces,) = run(all_pieces(engine, [greedy((5,) * 500, "a1", 1000)]))
    assert sum(piece.tokens for piece in pieces) == 12
    assert pieces[-1].finish == "length"


def test_a_row_whose_scores_are_not_finite_fails_alone(no_end):
    """And the next row in its place, which is shorter, has nothing of it."""
    good = greedy(PROMPT, "a2", 10)
    broken = adapter(LLAMA, 0)
    for vector in broken.vectors.values():
        vector.data.fill_(3e38)
    no_end.bank.add("broken", broken)

    async def both(engine):
        beside = engine.submit(endless("a1", (5, 6) * 40))
        await anext(beside)
        with pytest.raises(StateError, match="not finite"):
            await pieces_of(engine.submit(greedy((7, 8) * 30, "broken", 10)))
        pieces = await pieces_of(engine.submit(good))
        assert (await anext(beside)).tokens
        await beside.aclose()
        return pieces

    with engine_of(no_end) as engine:
        pieces = run(both(engine))
    expected = generated_alone(LLAMA, 2, PROMPT, 10, eos_token_id=None)
    assert tokens_of(pieces) == without_end(expected)


def test_an_error_of_the_model_ends_what_runs_and_the_next_is_served(no_end):
    failing = threading.Event()

    def fail(*_):
        if failing.is_set():
            raise RuntimeError("out of memory")

    no_end.base.model.model.layers[1].register_forward_pre_hook(fail)

    async def both(engine):
        stream = engine.submit(endless())
        await anext(stream)
        failing.set()
        with pytest.raises(RuntimeError, match="out of memory"):
            await pieces_of(stream)
        failing.clear()
        return await pieces_of(engine.submit(greedy(PROMPT, "a2", 10)))

    with engine_of(no_end) as engine:
        pieces = run(both(engine))
        assert engine.load().running == 0
    assert sum(piece.tokens for piece in pieces) == 10


def test_a_device_that_fails_at_everything_ends_what_runs_and_not_the_engine(no_end, monkeypatch):
    async def fail(engine):
        streams = [engine.submit(greedy(PROMPT, "a1", 400)) for _ in range(3)]
        await asyncio.gather(*map(anext, streams))
        with monkeypatch.context() as broken:
            for name in ("update", "move", "wipe"):
                lost = Mock(side_effect=RuntimeError("the device is lost"))
                broken.setattr(f"ia3.serve.engine.cached_rows._RowCache.{name}", lost)
            for stream in streams:
                with pytest.raises(RuntimeError, match="the device is lost"):
                    await pieces_of(stream)
        return await pieces_of(engine.submit(greedy(PROMPT, "a1", 5)))

    with engine_of(no_end) as engine:
        pieces = run(fail(engine))
    expected = generated_alone(LLAMA, 1, PROMPT, 5, eos_token_id=None)
    assert tokens_of(pieces) == without_end(expected)


def test_the_load_says_what_runs_and_what_waits(no_end):
    # Alone, one takes all the memory that there is.
    async def count(engine):
        streams = [engine.submit(endless(f"a{i % 8}")) for i in range(70)]
        tasks = [asyncio.ensure_future(anext(stream)) for stream in streams]
        await until(lambda: sum(task.done() for task in tasks) == 64)
        assert (engine.load().running, engine.load().waiting) == (64, 6)
        for task in tasks[64:67]:
            task.cancel()
        await asyncio.gather(*tasks[64:67], return_exceptions=True)
        assert (engine.load().running, engine.load().waiting) == (64, 3)
        await asyncio.gather(*(stream.aclose() for stream in streams[:64]))
        await asyncio.gather(*tasks[67:])
        assert (engine.load().running, engine.load().waiting) == (3, 0)
        await asyncio.gather(*(stream.aclose() for stream in streams[67:]))
        await until(lambda: engine.load().running == 0)

    with engine_of(no_end) as engine:
        run(count(engine))


def test_a_stream_that_nobody_reads_any_more_is_computed_no_further(no_end):
    async def leave(engine):
        stream = engine.submit(endless())
        await anext(stream)
        del stream
        gc.collect()
        await until(lambda: engine.load().running == 0)

    with engine_of(no_end) as engine:
        run(leave(engine))


def test_one_that_closes_ends_what_runs_and_what_waits(no_end):
    async def close(engine):
        streams = [engine.submit(endless()) for _ in range(66)]
        await asyncio.gather(*(anext(stream) for stream in streams[:64]))
        waiting = [asyncio.ensure_future(anext(stream)) for stream in streams[64:]]
        await until(lambda: engine.load().waiting == 2)
        engine.close()
        for error in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(error, StateError)
        with pytest.raises(StateError, match="shut down"):
            await pieces_of(streams[0])
        with pytest.raises(StateError, match="shutting down"):
            await pieces_of(engine.submit(greedy(PROMPT, None, 5)))
        assert (engine.load().running, engine.load().waiting) == (0, 0)

    before = threading.active_count()
    run(close(LocalEngine(no_end)))
    assert threading.active_count() <= before


def test_a_client_whose_loop_has_gone_stops_no_other(no_end):
    engine = LocalEngine(no_end)

    async def abandon():
        stream = engine.submit(endless())
        await anext(stream)
        return stream

    loop = asyncio.new_event_loop()
    with contextlib.closing(loop):
        stream = loop.run_until_complete(abandon())
    with contextlib.closing(engine):
        pieces = run(pieces_of(engine.submit(greedy(PROMPT, "a2", 10))))
    assert sum(piece.tokens for piece in pieces) == 10
    del stream
