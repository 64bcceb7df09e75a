"""A new task, learned while the server answers: one fit at a time, in a process of its own."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Response
from fastapi.responses import StreamingResponse
from pydantic import Field

from ...classify.engine import ENCODER, LANGUAGE_MODEL
from ...classify.estimator import AUTO
from ...errors import IA3Error, StateError, UnknownNameError, did_you_mean
from ...files.labelled_data import check_examples
from ...files.tables import check_rows, read_csv_text
from ...tfew.prompts.labels import check_text
from ..engine.bases import ServedBase
from ..fitting import Task
from .schemas import Body

MOST_ROWS = 2000
MOST_CHARACTERS = 2**20
MOST_LABELS = 100
MOST_SECONDS = 900.0
# Of fits that have ended, so many can still be asked about.
_KEPT = 20
_SOURCE = "the CSV"
# A line of the process may hold all its mistakes.
_LONGEST_LINE = 2**24

_log = logging.getLogger("ia3.serve")

State = Literal["training", "measuring", "done", "failed", "cancelled"]
Adopt = Callable[[str, Mapping[str, bytes]], Awaitable[None]]


class LearnRequest(Body):
    """Labelled texts in CSV, and what the adapter learned from them is to be called."""

    name: str = Field(description="the new adapter's name")
    csv: str = Field(description="a header, then a text and a label in each row")
    text_column: str = "text"
    label_column: str = "label"
    base: str | None = Field(None, description="a base model; by default whichever promises more")


@dataclass
class Fit:
    """A task that is being learned, or was.

    Attributes:
        id: by which it is asked about.
        name: of the adapter.
        base: the model's name, or `"auto"` until one is chosen.
        texts: how many there are.
        labels: label -> how many texts have it.
        remarks: what is wrong with the texts, in words.
        state: `"training"`, then `"measuring"` once the adapter is served; `"done"`, `"failed"` or
            `"cancelled"`.
        doing: what the process does, in words.
        done, of: how many parts of that; 0 where it has none.
        step, steps: of the training.
        loss: of each step.
        served: whether the adapter answers.
        engine: `"encoder"` or `"language-model"`, once the adapter is served.
        bytes: how many its vectors take.
        candidates: what was seen of each model before training, in words.
        measured: answers to texts held out of further trainings, as `ia3 fit --json` has them.
        error: why there is no adapter, or no measure of it.
        seconds: since it began.
    """

    id: str
    name: str
    base: str
    texts: int
    labels: dict[str, int]
    remarks: list[str]
    state: State = "training"
    doing: str = "starting"
    done: float = 0
    of: int = 0
    step: int = 0
    steps: int = 0
    loss: list[float] = field(default_factory=list)
    served: bool = False
    engine: str | None = None
    bytes: int = 0
    candidates: list[str] = field(default_factory=list)
    measured: dict[str, Any] | None = None
    error: str | None = None
    seconds: float = 0.0

    @property
    def ended(self) -> bool:
        return self.state in ("done", "failed", "cancelled")


class Learning:
    """Fits of a server, one at a time.

    Args:
        bases: the models to learn on.
        adopt: serves an adapter, from its files by name.
        refuse: raises now what `adopt` would raise of a name.
        seconds: a fit that takes longer is killed; what it has saved is served nevertheless.
    """

    def __init__(
        self,
        bases: Sequence[ServedBase],
        adopt: Adopt,
        refuse: Callable[[str], None],
        *,
        seconds: float = MOST_SECONDS,
    ) -> None:
        self._bases = bases
        self._adopt, self._refuse, self._seconds = adopt, refuse, seconds
        self._fits: dict[str, Fit] = {}
        self._changed = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    async def begin(self, asked: LearnRequest) -> Fit:
        """Begin to learn a task.

        Raises:
            StateError: another is being learned, or the name is taken.
            BrokenFileError: the CSV is damaged.
            UnknownNameError: there is no such base model.
            IA3Error: the name, the columns or the texts are unusable, or there are too many.
        """
        self._refuse(asked.name)
        fit, task = await asyncio.to_thread(self._checked, asked)
        if self._running is not None and not self._running.done():
            raise StateError("another task is being learned: wait for its end, or cancel it")
        self._fits[fit.id] = fit
        for old in [*self._fits][:-_KEPT]:
            del self._fits[old]
        self._running = asyncio.create_task(self._run(fit, task))
        await asyncio.sleep(0)  # a task that is cancelled before it begins does nothing at all
        return fit

    @property
    def fits(self) -> list[Fit]:
        """The last ones, the newest first."""
        return [*reversed(self._fits.values())]

    def fit(self, id: str) -> Fit:
        """One that was begun; raises `UnknownNameError` where there is none."""
        if id not in self._fits:
            raise UnknownNameError(f"nothing is being learned under the id {id!r}")
        return self._fits[id]

    async def changes(self, id: str) -> AsyncIterator[Fit]:
        """A fit as it is now, and each time that it changes, until it ends."""
        fit, seen = self.fit(id), None
        while True:
            while self._state(fit) == seen:
                await self._changed.wait()
            seen = self._state(fit)
            yield fit
            if fit.ended:
                return

    async def cancel(self, id: str) -> Fit:
        """End a fit now; an adapter that is served already stays."""
        fit = self.fit(id)
        if not fit.ended:
            await self.close()
        return fit

    async def close(self) -> None:
        """End the fit that runs, if one does."""
        if self._running is not None and not self._running.done():
            self._running.cancel()
            await asyncio.wait([self._running])

    def _checked(self, asked: LearnRequest) -> tuple[Fit, Task]:
        if len(asked.csv) > MOST_CHARACTERS:
            raise IA3Error(
                f"{_SOURCE} has {len(asked.csv):,} characters, expected at most "
                f"{MOST_CHARACTERS:,}: `ia3 fit` takes any number"
            )
        check_text(asked.csv, _SOURCE)
        text, label = asked.text_column, asked.label_column
        if text == label:
            raise IA3Error(f"column {text!r} is the text and the label at once")
        rows = read_csv_text(asked.csv, _SOURCE)
        if len(rows) > MOST_ROWS:
            raise IA3Error(
                f"{_SOURCE} has {len(rows):,} rows, expected at most {MOST_ROWS:,}: `ia3 fit` "
                "takes any number"
            )
        check_rows(_SOURCE, rows, [text], label)
        texts, labels = [row[text] for row in rows], [row[label] for row in rows]
        counts = dict(Counter(labels).most_common())
        if not 2 <= len(counts) <= MOST_LABELS:
            raise IA3Error(
                f"column {label!r} has {len(counts):,} different labels, expected 2 to "
                f"{MOST_LABELS}"
            )
        found = check_examples(
            [{text: each} for each in texts], labels, where=[row.where for row in rows]
        )
        remarks = [each.message for each in found]
        task = self._task(texts, labels, asked.base)
        fit = Fit(secrets.token_urlsafe(12), asked.name, task.model, len(texts), counts, remarks)
        return fit, task

    def _task(self, texts: list[str], labels: list[str], named: str | None) -> Task:
        kinds = {base.kind: base for base in reversed(self._bases)}
        names = {base.name: base for base in self._bases}
        if named is None and len(kinds) == 1:
            named = self._bases[0].name
        if named is not None and named not in names:
            raise UnknownNameError(
                f"no base model {named!r} is served, expected one of "
                f"{', '.join(names)}{did_you_mean(named, names)}"
            )
        # The bank's: where another engine computes, the base model here is nowhere.
        device = str((kinds[ENCODER] if named is None else names[named]).bank.device)
        if named is not None:
            return Task(texts, labels, named, device)
        both = kinds[ENCODER].name, kinds[LANGUAGE_MODEL].name
        return Task(texts, labels, AUTO, device, *both)

    async def _run(self, fit: Fit, task: Task) -> None:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="ia3-learn-") as folder:
            out = Path(folder) / "adapter"
            try:
                async with asyncio.timeout(self._seconds):
                    await self._follow(fit, replace(task, out=str(out)), began)
                if not fit.ended:
                    fit.state = "done"
            except asyncio.CancelledError:
                fit.state = "cancelled"
            except TimeoutError:
                late = f"it took more than {self._seconds:,.0f} s"
                fit.error = late if fit.served else f"{late}: give fewer texts"
                fit.state = "done" if fit.served else "failed"
            except Exception as error:
                fit.error = str(error)
                if not isinstance(error, IA3Error | OSError):
                    _log.error("a fault", exc_info=error, extra={"fit": fit.id})
                    fit.error = "this is a fault of the server: its log has more"
                fit.state = "done" if fit.served else "failed"
            finally:
                fit.seconds = time.monotonic() - began
                self._tell()

    async def _follow(self, fit: Fit, task: Task, began: float) -> None:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "ia3.serve.fitting"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_LONGEST_LINE,
            start_new_session=True,  # to be killed with what it has started
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(f"{json.dumps(asdict(task))}\n".encode())
            with suppress(ConnectionError):
                await process.stdin.drain()
            async for line in process.stdout:
                await self._take(fit, json.loads(line), Path(task.out))
                fit.seconds = time.monotonic() - began
                self._tell()
            if code := await process.wait():
                how = "was killed: was there too little memory?"
                if code != -signal.SIGKILL:
                    how = f"ended with exit code {code}: the log says more"
                raise IA3Error(f"the training's process {how}")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()

    async def _take(self, fit: Fit, event: dict[str, Any], out: Path) -> None:
        if (error := event.get("error")) is not None:
            raise IA3Error(error)
        if "step" in event:
            fit.step, fit.steps, fit.doing = event["step"], event["steps"], "training"
            fit.loss.append(event["loss"])
            fit.done = fit.of = 0
        elif "doing" in event:
            fit.doing, fit.done = event["doing"], event.get("done", 0)
            fit.of = event.get("of") or 0
        elif "saved" in event:
            files = {each.name: each.read_bytes() for each in out.iterdir() if each.is_file()}
            await self._adopt(fit.name, files)
            fit.served, fit.state = True, "measuring"
            fit.engine, fit.base, fit.bytes = event["engine"], event["model"], event["bytes"]
            fit.candidates = event["candidates"]
        else:
            fit.measured = event["measured"]

    def _tell(self) -> None:
        """Wake all who follow a fit; nothing is waited for, so that no cancelling is in between."""
        self._changed.set()
        self._changed = asyncio.Event()

    @staticmethod
    def _state(fit: Fit) -> tuple[object, ...]:
        return fit.state, fit.doing, fit.done, fit.of, fit.step, fit.served, fit.measured is None


def learning_router(learning: Learning) -> APIRouter:
    """The routes of `/v1/learn`."""
    router = APIRouter(prefix="/v1/learn", tags=["learning"])

    @router.post("", status_code=202)
    async def begin(asked: LearnRequest) -> dict[str, Any]:
        """Begin to learn a task from labelled texts."""
        return asdict(await learning.begin(asked))

    @router.get("")
    async def fits() -> dict[str, Any]:
        """The last fits, the newest first."""
        return {"fits": [asdict(fit) for fit in learning.fits]}

    @router.get("/{id}")
    async def status(id: str) -> dict[str, Any]:
        """How far a fit has come."""
        return asdict(learning.fit(id))

    @router.get("/{id}/events")
    async def events(id: str) -> Response:
        """Server-sent events, each the whole status, until the fit ends."""
        learning.fit(id)

        async def stream() -> AsyncIterator[str]:
            async for fit in learning.changes(id):
                yield f"data: {json.dumps(asdict(fit))}\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream")

    @router.delete("/{id}")
    async def cancel(id: str) -> dict[str, Any]:
        """End a fit; an adapter that is served already stays."""
        return asdict(await learning.cancel(id))

    return router
