"""The engine of this project: a thread for each base model, which batches what waits for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import torch

from ..core.route import BASE
from ..errors import StateError, UnknownNameError
from .bases import ServedBase
from .classification import answers
from .engine import Classification, Generation, Load, Piece


class LocalEngine:
    """Serves base models of this process; see `Engine`."""

    def __init__(self, bases: Sequence[ServedBase]) -> None:
        self._workers = [_Worker(base) for base in bases]

    async def submit(self, request: Generation | Classification) -> AsyncIterator[Any]:
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()
        cancelled = threading.Event()

        def tell(event: object) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, event)

        names = request.adapters if isinstance(request, Classification) else [request.adapter]
        self._worker(names).add(request, tell, cancelled)
        try:
            while (event := await queue.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            cancelled.set()

    def load(self) -> Load:
        return Load(0, sum(len(worker.waiting) for worker in self._workers))

    def close(self) -> None:
        for worker in self._workers:
            worker.close()

    def _worker(self, names: Sequence[str | None]) -> _Worker:
        for worker in self._workers:
            if all(name is None or name in worker.served.bank for name in names):
                return worker
        raise UnknownNameError(f"no model has the adapters {[*names]!r}")


class _Worker:
    def __init__(self, served: ServedBase) -> None:
        self.served = served
        self.waiting: list[tuple[Any, Callable[[object], None], threading.Event]] = []
        self._changed = threading.Condition()
        self._closed = False
        threading.Thread(target=self._run, name=f"engine of {served.name}", daemon=True).start()

    def add(self, request: Any, tell: Callable[[object], None], cancelled: threading.Event) -> None:
        with self._changed:
            if self._closed:
                raise StateError("the server is shutting down")
            self.waiting.append((request, tell, cancelled))
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.waiting or self._closed)
                if self._closed:
                    return
                request, tell, cancelled = self.waiting.pop(0)
            try:
                if isinstance(request, Classification):
                    tell(answers(self.served, request.texts, request.adapters))
                else:
                    self._generate(request, tell, cancelled)
            except Exception as error:
                tell(error)
            else:
                tell(None)

    def _generate(self, asked: Generation, tell: Any, cancelled: threading.Event) -> None:
        base, bank = self.served.base, self.served.bank
        ids = torch.tensor([asked.prompt], device=base.device)
        name = BASE if asked.adapter is None else asked.adapter
        options = {"do_sample": False, "max_new_tokens": asked.max_tokens}
        found: Any = bank.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=[name], **options
        )
        new = found[0, ids.shape[1] :].tolist()
        finish = "length" if len(new) >= asked.max_tokens else "stop"
        text = base.tokenizer.decode(new, skip_special_tokens=True)
        tell(Piece(text, len(new), finish=finish))  # type: ignore[arg-type]
