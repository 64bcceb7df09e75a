"""Adapters as vLLM has them: each version of one's values is a number of its own."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from ...adapter.files import Adapter, adapter_files
from ...core.sites import Site
from ...errors import IA3Error, StateError
from ...files.atomic import remove_folder
from ...targets.config import IA3Config
from .bases import ServedBase
from .vllm_errors import as_own, said_by


@dataclass(eq=False)
class _Loaded:
    request: Any
    ready: asyncio.Future[None]
    users: int = 0


class VLLMAdapters:
    """The values that vLLM has, or gets when they are asked for first.

    They are known by what they are, not by a name: an adapter that is replaced is another one, and
    what runs goes on with the old one. vLLM reads each from a folder of ours, also once more where
    it had no room for it meanwhile; so the folder stays as long as it may be asked for.

    Args:
        most: how many are kept that nothing runs with.
    """

    def __init__(self, served: ServedBase, vllm: Any, most: int) -> None:
        self._routes = served.bank.model.routes
        self._vllm = vllm
        self._most = most
        self._folder = TemporaryDirectory(prefix="ia3-vllm-")
        # The least recently used first.
        self._loaded: OrderedDict[bytes, _Loaded] = OrderedDict()
        self._count = 0

    @asynccontextmanager
    async def held(self, values: Mapping[Site, Tensor]) -> AsyncIterator[Any]:
        """Within the context vLLM has these values, site -> `[1, dim]`; yields its `LoRARequest`.

        `None` where they change nothing.

        Raises:
            StateError: vLLM cannot serve them.
        """
        vectors = {
            name: values[site].reshape(site.activation.shape)
            for name, site in self._routes.sites().items()
            if site in values and bool((values[site] != 1).any())
        }
        if not vectors:
            yield None
            return
        key = _digest(vectors)
        loaded = self._loaded.get(key)
        if loaded is None:
            loaded = self._loaded[key] = self._begin(vectors)
        self._loaded.move_to_end(key)
        loaded.users += 1
        try:
            # Another one may wait for it too.
            await asyncio.shield(loaded.ready)
            yield loaded.request
        finally:
            loaded.users -= 1
            ready = loaded.ready
            failed = ready.done() and (ready.cancelled() or ready.exception() is not None)
            if failed and self._loaded.get(key) is loaded:
                del self._loaded[key]

    def close(self) -> None:
        self._folder.cleanup()

    def _begin(self, vectors: Mapping[str, Tensor]) -> _Loaded:
        from vllm.lora.request import LoRARequest

        self._count += 1
        # By the name vLLM knows the states that it keeps of prompts.
        folder = Path(self._folder.name, str(self._count))
        request = LoRARequest(str(self._count), self._count, str(folder))
        return _Loaded(request, asyncio.ensure_future(self._load(request, vectors)))

    async def _load(self, request: Any, vectors: Mapping[str, Tensor]) -> None:
        try:
            await self._make_room()
            await asyncio.to_thread(_write, Path(request.lora_path), vectors)
            # What fails here would end vLLM if it failed amid a batch.
            with as_own():
                await self._vllm.add_lora(request)
        except Exception as error:  # whatever was raised in the other process, it comes as this
            # It may not have been made.
            shutil.rmtree(request.lora_path, ignore_errors=True)
            if isinstance(error, IA3Error):
                raise
            said = said_by(error).removeprefix(f"{request.lora_path}: ")
            raise StateError(f"vLLM cannot serve this adapter: {said}") from error

    async def _make_room(self) -> None:
        idle = [key for key, each in self._loaded.items() if each.ready.done() and not each.users]
        # All at once: while vLLM removes one, another may be asked for, or removed.
        gone = [self._loaded.pop(key) for key in idle[: max(0, len(self._loaded) - self._most)]]
        for request in (each.request for each in gone):
            await self._vllm.remove_lora(request.lora_int_id)
            await asyncio.to_thread(remove_folder, Path(request.lora_path))


def _write(folder: Path, vectors: Mapping[str, Tensor]) -> None:
    inputs = {name for name, vector in vectors.items() if len(vector) == 1}
    config = IA3Config(target_modules={*vectors}, feedforward_modules=inputs)
    folder.mkdir()
    for name, content in adapter_files(Adapter(config, dict(vectors))).items():
        (folder / name).write_bytes(content)


def _digest(vectors: Mapping[str, Tensor]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name, vector in vectors.items():
        digest.update(name.encode())
        digest.update(vector.detach().cpu().contiguous().numpy().tobytes())
    return digest.digest()
