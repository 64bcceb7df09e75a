"""Answers in OpenAI's shape, read by the classes of OpenAI's client."""

from __future__ import annotations

import asyncio
import json
import math

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

from openai.types import Completion as TheirCompletion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import ValidationError

from ia3.serve.engine.interface import Generation, Piece, TokenLogprob
from ia3.serve.http.openai import Answer, generations, pieces
from ia3.serve.http.schemas import Chat, Completion

PROMPT = (4, 5, 6)
TOP = (("a", -0.1), ("é", -2.0))
PIECES = [
    Piece("a", 1, (TokenLogprob("a", -0.1, TOP),)),
    Piece("é ", 2, (TokenLogprob("é", -2.0, TOP), TokenLogprob(" ", -0.5, TOP))),
    Piece("", 1, (), finish="stop"),
]


def completion(**more) -> Completion:
    return Completion(model="m", prompt="x", **more)


def chat(**more) -> Chat:
    return Chat(model="m", messages=[{"role": "user", "content": "x"}], **more)


def answer(asked) -> Answer:
    return Answer(asked, generations(asked, [PROMPT], "m"))


def test_an_answer_may_be_sent_back_with_all_that_it_lacks():
    made = answer(chat())
    made.add(0, PIECES[0])
    said = ChatCompletion.model_validate(made.whole()).choices[0].message
    for message in (said.model_dump(), said.model_dump(exclude_unset=True)):
        assert "refusal" in message
        asked = Chat.model_validate({"model": "m", "messages": [message], "tools": None})
        assert [(each.role, each.text) for each in asked.messages] == [("assistant", "a")]


def streamed(asked) -> list:
    made = answer(asked)
    events = [*made.begin()]
    for piece in PIECES:
        events += made.piece(0, piece)
    *events, last = [*events, *made.end()]
    assert last == b"data: [DONE]\n\n"
    assert all(event.startswith(b"data: {") and event.endswith(b"}\n\n") for event in events)
    return [json.loads(event.removeprefix(b"data: ")) for event in events]


def test_a_client_may_say_that_there_are_no_tools():
    said = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    Chat.model_validate({**said, "tools": [], "tool_choice": "none"})
    with pytest.raises(ValidationError, match="tools"):
        Chat.model_validate({**said, "tools": [{"type": "function"}]})


def test_a_completion_has_the_logprobs_of_each_token():
    made = answer(completion(logprobs=2))
    for piece in PIECES:
        made.add(0, piece)
    said = TheirCompletion.model_validate(made.whole(), strict=True)
    (choice,) = said.choices
    assert (choice.text, choice.finish_reason) == ("aé ", "stop")
    assert choice.logprobs.tokens == ["a", "é", " "]
    assert choice.logprobs.token_logprobs == [-0.1, -2.0, -0.5]
    assert choice.logprobs.top_logprobs == [dict(TOP)] * 3
    assert choice.logprobs.text_offset == [0, 1, 2]
    assert said.usage.completion_tokens == 4
    assert said.usage.prompt_tokens == 3


def test_a_stream_of_a_completion_has_the_same_logprobs_in_parts():
    choices = [each["choices"][0] for each in streamed(completion(logprobs=2))]
    assert [offset for each in choices for offset in each["logprobs"]["text_offset"]] == [0, 1, 2]
    assert [token for each in choices for token in each["logprobs"]["tokens"]] == ["a", "é", " "]
    assert [each["finish_reason"] for each in choices] == [None, None, "stop"]


def test_a_chat_has_the_logprobs_and_the_bytes_of_each_token():
    made = answer(chat(logprobs=True, top_logprobs=2))
    for piece in PIECES:
        made.add(0, piece)
    said = ChatCompletion.model_validate(made.whole())
    content = said.choices[0].logprobs.content
    assert [bytes(each.bytes).decode() for each in content] == ["a", "é", " "]
    assert [top.token for top in content[1].top_logprobs] == ["a", "é"]
    assert math.exp(content[0].logprob) == pytest.approx(0.9048, abs=1e-4)


def test_a_stream_of_a_chat_begins_with_who_speaks_and_ends_with_why():
    asked = chat(logprobs=True, stream_options={"include_usage": True})
    first, *middle, last, usage = [
        ChatCompletionChunk.model_validate(each) for each in streamed(asked)
    ]
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert "".join(event.choices[0].delta.content for event in middle) == "aé "
    assert sum(len(event.choices[0].logprobs.content) for event in middle) == 3
    assert (last.choices[0].delta.content, last.choices[0].finish_reason) == (None, "stop")
    assert usage.choices == []
    assert usage.usage.total_tokens == 7


def test_each_text_of_several_has_a_seed_of_its_own():
    asked = completion(n=3, seed=7, temperature=0.5, top_p=0.9, stop=["a", "b"], max_tokens=9)
    first, second, third = generations(asked, [PROMPT], "m")
    expected = Generation(PROMPT, "m", 9, 0.5, 0.9, seed=7, stop=("a", "b"))
    assert first == expected
    assert [second.seed, third.seed] == [8, 9]
    assert generations(completion(seed=2**63 - 1, n=2), [PROMPT], None)[1].seed == 0
    usual = generations(completion(), [PROMPT], None)[0]
    assert usual == Generation(PROMPT, None, 16)
    assert generations(chat(), [PROMPT], None)[0].max_tokens == 512
    assert generations(chat(max_tokens=4), [PROMPT], None)[0].max_tokens == 4


class _Counting:
    """An engine whose generations give as many pieces as they may have tokens."""

    def __init__(self) -> None:
        self.open = 0

    async def submit(self, request):
        self.open += 1
        try:
            for number in range(request.max_tokens):
                if number == 3:
                    raise RuntimeError("a fault")
                yield Piece(str(number), 1)
                await asyncio.sleep(0)
        finally:
            self.open -= 1


def test_pieces_of_several_come_with_their_places():
    async def gather():
        wanted = [Generation(PROMPT, None, count) for count in (2, 1, 3)]
        return [each async for each in pieces(_Counting(), wanted)]

    found = asyncio.run(gather())
    for place, count in enumerate((2, 1, 3)):
        assert [p.text for at, p in found if at == place] == [str(n) for n in range(count)]


def test_a_fault_of_one_ends_the_others():
    engine = _Counting()

    async def gather():
        wanted = [Generation(PROMPT, None, count) for count in (4, 3, 3)]
        async for _ in pieces(engine, wanted):
            pass

    with pytest.raises(RuntimeError):
        asyncio.run(gather())
    assert engine.open == 0


def test_a_stream_that_is_left_ends_all_of_its_generations():
    engine = _Counting()

    async def leave():
        stream = pieces(engine, [Generation(PROMPT, None, 3)] * 3)
        await anext(stream)
        assert engine.open == 3
        await stream.aclose()
        assert engine.open == 0

    asyncio.run(leave())
