"""An HTTP client that costs next to nothing, and a tiny base model that goes on without end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
# Of the tiny model.
CONTEXT = 8192


@dataclass(frozen=True)
class Answer:
    """What came back: its status, its headers in lower case, and its body."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """One connection, which is opened when it is needed and kept.

    Of HTTP it knows what uvicorn sends: a length, or chunks. A thousand requests a second of it are
    a few percent of a core, so that it takes nothing from a server on the same machine.
    """

    def __init__(self, port: int, host: str = HOST) -> None:
        self._address = host, port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def call(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Send a request and read all of its answer; `body` is bytes, or sent as JSON."""
        status, found = await self.begin(method, path, body, headers)
        content = b"".join([part async for part in self.parts(found)])
        return Answer(status, found, content)

    async def events(self, path: str, body: Any) -> AsyncIterator[Any]:
        """The events of a stream, each read from JSON, up to `[DONE]`."""
        status, found = await self.begin("POST", path, body)
        rest = b""
        async for part in self.parts(found):
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                if line.startswith(b"data: ") and line != b"data: [DONE]":
                    yield json.loads(line[6:])
        if status != 200:
            raise AssertionError(f"status {status}: {rest.decode(errors='replace')}")

    async def begin(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, dict[str, str]]:
        """Send a request and read the answer's status and headers."""
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body)
        encoded = content.encode() if isinstance(content, str) else content
        said = {"Host": self._address[0], "Content-Length": str(len(encoded))}
        if body is not None and not isinstance(body, bytes):
            said["Content-Type"] = "application/json"
        said |= headers or {}
        lines = "".join(f"{name}: {value}\r\n" for name, value in said.items())
        request = f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode() + encoded
        kept = self._streams is not None
        try:
            return await self._send(request)
        except (ConnectionError, asyncio.IncompleteReadError):
            # The server closes connections that were idle.
            self.close()
            if not kept:
                raise
            return await self._send(request)

    async def _send(self, request: bytes) -> tuple[int, dict[str, str]]:
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._address)
        reader, writer = self._streams
        writer.write(request)
        await writer.drain()
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.split("\r\n")
        pairs = (line.split(":", 1) for line in lines if line)
        return int(first.split()[1]), {name.lower(): value.strip() for name, value in pairs}

    async def parts(self, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
        """The body of the answer whose headers these are, as it comes."""
        assert self._streams is not None
        reader, _ = self._streams
        if headers.get("transfer-encoding") == "chunked":
            while length := int(await reader.readline(), 16):
                yield await reader.readexactly(length)
                await reader.readexactly(2)
            await reader.readexactly(2)
        elif length := int(headers.get("content-length", 0)):
            yield await reader.readexactly(length)
        if headers.get("connection") == "close":
            self.close()

    def close(self) -> None:
        """Close the connection, also in the midst of an answer."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


def call(
    port: int,
    method: str,
    path: str,
    body: Any = None,
    headers: Mapping[str, str] | None = None,
    patience: float = 60.0,
) -> Answer:
    """One request on a connection of its own."""

    async def once() -> Answer:
        client = Client(port)
        try:
            return await asyncio.wait_for(client.call(method, path, body, headers), patience)
        finally:
            client.close()

    return asyncio.run(once())


def save_tiny_base(folder: Path) -> Path:
    """A random language model with the embedded model's tokenizer, which ends no text by itself."""
    from transformers import AutoTokenizer, LlamaConfig

    from ia3.base.loading import embedded_model_folder
    from support.tfew import random_model

    tokenizer = AutoTokenizer.from_pretrained(embedded_model_folder())
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(
        **sizes, **heads, **tokens, eos_token_id=None, max_position_embeddings=CONTEXT
    )
    model = random_model(config)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
