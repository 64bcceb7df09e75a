"""Which adapters vLLM is told to have, and to have no more; a record stands in its place."""

from __future__ import annotations

import asyncio
import sys
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from ia3.errors import StateError
from ia3.serve.engine.vllm_adapters import VLLMAdapters


@dataclass
class Request:
    lora_name: str
    lora_int_id: int
    lora_path: str


class Recorded:
    """Has the adapters of `numbers`; a removal takes until `may_remove` is set."""

    def __init__(self) -> None:
        self.numbers: set[int] = set()
        self.may_remove = asyncio.Event()
        self.error: Exception | None = None

    async def add_lora(self, request: Request) -> None:
        if self.error is not None:
            raise self.error
        assert (Path(request.lora_path) / "adapter_config.json").is_file()
        self.numbers.add(request.lora_int_id)

    async def remove_lora(self, number: int) -> None:
        if self.error is not None:
            raise self.error
        await self.may_remove.wait()
        self.numbers.discard(number)


@pytest.fixture
def site(monkeypatch):
    kinds = {
        "vllm.lora.request": {"LoRARequest": Request},
        "vllm.exceptions": {"VLLMClientError": type("VLLMClientError", (Exception,), {})},
        "vllm.v1.engine.exceptions": {
            name: type(name, (Exception,), {})
            for name in ("EngineDeadError", "EngineGenerateError")
        },
    }
    for name, values in kinds.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    return object.__new__(type("Site", (), {"activation": SimpleNamespace(shape=(4, 1))}))


def adapters_of(site: Any, vllm: Recorded, most: int) -> VLLMAdapters:
    routes = SimpleNamespace(sites=lambda: {"layer": site})
    served: Any = SimpleNamespace(bank=SimpleNamespace(model=SimpleNamespace(routes=routes)))
    return VLLMAdapters(served, vllm, most)


def values(site: Any, number: int) -> dict[Any, torch.Tensor]:
    return {site: torch.full((1, 4), 2.0 + number)}


def test_an_adapter_that_is_asked_for_while_others_make_room_stays(site):
    async def work() -> None:
        vllm = Recorded()
        adapters = adapters_of(site, vllm, most=1)
        async with AsyncExitStack() as at_once:
            for number in range(3):
                await at_once.enter_async_context(adapters.held(values(site, number)))

        async def asked(number: int) -> None:
            async with adapters.held(values(site, number)) as request:
                entered.append(number)
                await asyncio.sleep(0.1)
                assert request.lora_int_id in vllm.numbers
                assert Path(request.lora_path).is_dir()

        entered: list[int] = []
        more = [asyncio.ensure_future(asked(3)), asyncio.ensure_future(asked(4))]
        await asyncio.sleep(0.05)  # one is being removed
        more.append(asyncio.ensure_future(asked(1)))
        await asyncio.sleep(0.05)
        vllm.may_remove.set()
        await asyncio.gather(*more)
        assert sorted(entered) == [1, 3, 4]
        async with adapters.held(values(site, 5)):
            assert len(vllm.numbers) <= 2
        adapters.close()

    asyncio.run(work())


def test_where_vllm_has_ended_that_is_said_and_not_that_a_folder_is_missing(site):
    async def work() -> None:
        vllm = Recorded()
        adapters = adapters_of(site, vllm, most=1)
        async with adapters.held(values(site, 0)):
            pass
        vllm.error = RuntimeError("the engine is dead")
        for number in (1, 1, 2):
            with pytest.raises(StateError, match="the engine is dead"):
                async with adapters.held(values(site, number)):
                    pass
        adapters.close()

    asyncio.run(work())
