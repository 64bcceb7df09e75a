"""OpenAI's shapes: completions and chats, whole or in pieces, and the list of models."""

from __future__ import annotations

import asyncio
import copy
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field, replace
from typing import Any, cast

from ...base.loading import first_line
from ...errors import IA3Error
from ...tfew.prompts.labels import check_text
from ..engine.bases import ServedBase
from ..engine.interface import Engine, Generation, Piece, TokenLogprob
from .refused import RefusedError, encoded
from .schemas import Chat, Completion

# Where a request does not say: of a completion as OpenAI has it, and of a chat.
COMPLETION_TOKENS = 16
CHAT_TOKENS = 512
DONE = b"data: [DONE]\n\n"


class Prompts:
    """A base model's prompts as token ids, by a tokenizer of its own.

    The model's is used by the thread that computes, and takes no second one.
    """

    def __init__(self, served: ServedBase) -> None:
        self.name = served.name
        self._tokenizer: Any = copy.deepcopy(served.base.tokenizer)
        self._size = cast(Any, served.base.model).config.get_text_config().vocab_size

    def of_completion(self, asked: Completion) -> list[tuple[int, ...]]:
        """Each prompt of a completion.

        Raises:
            RefusedError: one is empty, or has a token that the model lacks.
        """
        prompt = asked.prompt
        if isinstance(prompt, str):
            return [self._encoded(prompt, "prompt")]
        if isinstance(prompt[0], int):
            return [self._checked(cast(Any, prompt), "prompt")]
        found = []
        for place, each in enumerate(cast("list[Any]", prompt)):
            read = self._encoded if isinstance(each, str) else self._checked
            found.append(read(each, f"prompt[{place}]"))
        return found

    def of_chat(self, asked: Chat) -> tuple[int, ...]:
        """A chat up to where the assistant's answer begins.

        Raises:
            RefusedError: the model has no template for chats, or that takes no such messages.
        """
        if not self._tokenizer.chat_template:
            raise RefusedError(
                400,
                f"the model {self.name!r} was not made for chats: its tokenizer has no template "
                "for them; ask it with POST /v1/completions",
                param="messages",
            )
        messages = []
        for place, message in enumerate(asked.messages):
            self._check(message.text, f"messages[{place}].content")
            role = "system" if message.role == "developer" else message.role
            messages.append({"role": role, "content": message.text})
        try:
            ids = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )
        except Exception as error:  # a template is a program, which raises what it likes
            said = f"the template of {self.name!r} takes no such messages: {first_line(error)}"
            raise RefusedError(400, said, param="messages") from error
        return tuple(ids)

    def _encoded(self, text: str, param: str) -> tuple[int, ...]:
        self._check(text, param)
        ids = tuple(self._tokenizer(text, truncation=False, padding=False).input_ids)
        if not ids:
            raise RefusedError(
                400, f"{param} is empty: there is nothing to go on from", param=param
            )
        return ids

    def _checked(self, ids: Sequence[int], param: str) -> tuple[int, ...]:
        for token in ids:
            if token >= self._size:
                expected = f"expected tokens below {self._size:,}"
                raise RefusedError(400, f"{param} has the token {token:,}, {expected}", param=param)
        return tuple(ids)

    def _check(self, text: str, param: str) -> None:
        try:
            check_text(text, param)
        except IA3Error as error:
            raise RefusedError(400, str(error), param=param) from error


def generations(
    asked: Completion | Chat, prompts: Sequence[tuple[int, ...]], adapter: str | None
) -> list[Generation]:
    """What the engine is to do: `n` texts to each prompt, with a seed each."""
    if isinstance(asked, Chat):
        most = asked.max_completion_tokens or asked.max_tokens or CHAT_TOKENS
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    else:
        most = asked.max_tokens or COMPLETION_TOKENS
        logprobs = asked.logprobs
    one = Generation(
        prompt=(),
        adapter=adapter,
        max_tokens=most,
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        stop=asked.stops,
        logprobs=logprobs,
    )
    count = asked.n or 1
    return [
        replace(one, prompt=prompt, seed=_seed(asked.seed, index))
        for prompt in prompts
        for index in range(count)
    ]


def _seed(seed: int | None, index: int) -> int | None:
    return None if seed is None else (seed + index) % 2**63


async def pieces(engine: Engine, wanted: Sequence[Generation]) -> AsyncIterator[tuple[int, Piece]]:
    """The pieces of several generations as they come, each with its generation's place."""
    async with AsyncExitStack() as stack:
        streams = []
        for each in wanted:
            stream = cast("Any", engine.submit(each))
            streams.append(await stack.enter_async_context(aclosing(stream)))
        if len(streams) == 1:
            async for piece in streams[0]:
                yield 0, piece
            return
        coming = {asyncio.ensure_future(anext(s)): place for place, s in enumerate(streams)}
        try:
            while coming:
                done, _ = await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
                for task in sorted(done, key=lambda each: coming[each]):
                    place = coming.pop(task)
                    try:
                        piece = task.result()
                    except StopAsyncIteration:
                        continue
                    coming[asyncio.ensure_future(anext(streams[place]))] = place
                    yield place, piece
        finally:
            for task in coming:
                task.cancel()
            await asyncio.gather(*coming, return_exceptions=True)


@dataclass
class _Choice:
    """One text of an answer, as far as it has come."""

    text: str = ""
    finish: str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)


class Answer:
    """An answer in OpenAI's shape, from the pieces of its texts.

    Attributes:
        generated: how many tokens there are by now.
        prompt_tokens: how many the prompts have.
    """

    def __init__(self, asked: Completion | Chat, wanted: Sequence[Generation]) -> None:
        self.asked = asked
        self.generated = 0
        self._wanted = wanted
        self._choices = [_Choice() for _ in wanted]
        self._is_chat = isinstance(asked, Chat)
        self._id = f"{'chatcmpl' if self._is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        # All texts of one prompt are counted as one.
        self.prompt_tokens = sum(len(each.prompt) for each in wanted[:: asked.n or 1])

    def add(self, place: int, piece: Piece) -> None:
        choice = self._choices[place]
        choice.text += piece.text
        choice.logprobs += piece.logprobs
        choice.finish = piece.finish or choice.finish
        self.generated += piece.tokens

    def whole(self) -> dict[str, Any]:
        """The answer in one."""
        choices = []
        for place, choice in enumerate(self._choices):
            said: dict[str, Any]
            if self._is_chat:
                said = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
            else:
                said = {"text": choice.text}
            logprobs = self._logprobs(place, choice.logprobs, 0)
            more = {"logprobs": logprobs, "finish_reason": choice.finish or "stop"}
            choices.append({"index": place, **said, **more})
        name = "chat.completion" if self._is_chat else "text_completion"
        return {**self._head(name), "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        prompt, generated = self.prompt_tokens, self.generated
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
        }

    def begin(self) -> list[bytes]:
        """What a stream begins with: of a chat, who speaks."""
        if not self._is_chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._event([self._part(n, delta, None)]) for n in range(len(self._choices))]

    def piece(self, place: int, piece: Piece) -> list[bytes]:
        """A piece as events of a stream."""
        offset = len(self._choices[place].text)
        self.add(place, piece)
        logprobs = self._logprobs(place, piece.logprobs, offset)
        if not self._is_chat:
            choice = {"index": place, "text": piece.text, "logprobs": logprobs}
            return [self._event([{**choice, "finish_reason": piece.finish}])]
        events = []
        if piece.text or piece.logprobs:
            part = self._part(place, {"content": piece.text}, None)
            events.append(self._event([{**part, "logprobs": logprobs}]))
        if piece.finish is not None:
            events.append(self._event([self._part(place, {}, piece.finish)]))
        return events

    def end(self) -> list[bytes]:
        """What a stream ends with."""
        options = self.asked.stream_options
        if options is None or not options.include_usage:
            return [DONE]
        return [self._event([], usage=self.usage()), DONE]

    def _part(self, place: int, delta: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {"index": place, "delta": delta, "logprobs": None, "finish_reason": finish}

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        name = "chat.completion.chunk" if self._is_chat else "text_completion"
        return event({**self._head(name), "choices": choices, **more})

    def _head(self, name: str) -> dict[str, Any]:
        head = {"id": self._id, "object": name, "created": self._created}
        return {**head, "model": self.asked.model}

    def _logprobs(
        self, place: int, found: Sequence[TokenLogprob], offset: int
    ) -> dict[str, Any] | None:
        if self._wanted[place].logprobs is None:
            return None
        if self._is_chat:
            content = [
                {
                    **_spelt(each.token, each.logprob),
                    "top_logprobs": [_spelt(token, logprob) for token, logprob in each.top],
                }
                for each in found
            ]
            return {"content": content, "refusal": None}
        offsets = []
        for each in found:
            offsets.append(offset)
            offset += len(each.token)
        return {
            "tokens": [each.token for each in found],
            "token_logprobs": [each.logprob for each in found],
            "top_logprobs": [dict(each.top) for each in found],
            "text_offset": offsets,
        }


def _spelt(token: str, logprob: float) -> dict[str, Any]:
    spelt = [*token.encode(errors="replace")]
    return {"token": token, "logprob": logprob, "bytes": spelt}


def event(value: dict[str, Any]) -> bytes:
    """An event of a stream (SSE) that holds JSON."""
    return b"data: " + encoded(value) + b"\n\n"


def failed(refused: RefusedError) -> bytes:
    """The last event of a stream that cannot go on."""
    return event(refused.body())


def model_entry(name: str, base: str, kind: str, created: int) -> dict[str, Any]:
    """A model of `/v1/models`."""
    return {"id": name, "object": "model", "created": created, "owned_by": base, "kind": kind}
