"""vLLM in the place of this project's engine, for one language model.

vLLM has the weights, in processes of its own, and computes. What it is asked, token by token, is
what the other engine is asked, and so is what becomes of the tokens. The bank's model here is its
structure alone (`base/structure.py`), against which adapters are checked.
"""

from __future__ import annotations

import asyncio
import copy
import math
import os
import secrets
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import fields
from importlib.metadata import entry_points
from itertools import count
from multiprocessing import active_children, resource_tracker
from threading import Thread
from typing import Any, overload

import torch
from torch import Tensor

from ...bank.bank import AdapterBank
from ...base.loading import BaseModel, device_and_dtype, first_line
from ...base.structure import load_structure, model_folder
from ...classify.mixed import Classified
from ...core.sites import Site
from ...errors import IA3Error, StateError, UnknownNameError, did_you_mean, shown
from ...tfew.prompts.encoding import EncodedExample
from .bases import ServedBase
from .choice_tree import Tokens, mean_logprobs, next_tokens
from .classification import answers
from .interface import Classification, Generation, Load, Piece, check_lengths, no_adapter
from .limits import check_fits, end_tokens, further_options, repetition_penalty
from .rows import RowText, check_generation
from .sampling import LEAST_LOGPROB, Picked
from .text import TokenTexts
from .vllm_adapters import VLLMAdapters
from .vllm_errors import ENDED, as_own

# Texts that are classified at once.
MOST_TEXTS = 64
# Adapters of one batch, unless it is said otherwise: each takes room in every layer.
ADAPTERS_AT_ONCE = 32
# Tokens whose log-probabilities vLLM tells at once, where they are named.
MOST_NAMED = 128
# Options of vLLM's that this server depends on, or has options of its own for.
OWN = {
    *("model", "tokenizer", "served_model_name", "dtype", "generation_config", "runner"),
    *("skip_tokenizer_init", "enable_lora", "max_cpu_loras", "disable_log_stats"),
}
# In seconds: `close` waits so long for what runs to be ended.
LONGEST_END = 10.0

AtEnd = Callable[[str], None]


class Steps:
    """How many steps vLLM has computed, and the rows in them."""

    def __init__(self) -> None:
        self.count = self.rows = 0

    def logger(self) -> Any:
        """What `AsyncLLM` makes its logger with."""
        from vllm.v1.metrics.loggers import StatLoggerBase

        steps = self

        class Logger(StatLoggerBase):
            def __init__(self, *_: Any, **__: Any) -> None: ...

            def record(self, scheduler_stats: Any, *_: Any, **__: Any) -> None:
                if scheduler_stats is not None:
                    steps.count += 1
                    steps.rows += scheduler_stats.num_running_reqs

            def log_engine_initialized(self) -> None: ...

        return Logger


class VLLMEngine:
    """Serves one language model by vLLM; see `Engine`.

    Args:
        served: its model is a structure (`load_structure`).
        vllm: an `AsyncLLM` that was made for adapters.
        steps: counts what it computes.
        at_end: is called, with what to say, where vLLM's processes have ended by themselves.
    """

    def __init__(self, served: ServedBase, vllm: Any, steps: Steps, at_end: AtEnd) -> None:
        assert isinstance(served.base, BaseModel)
        self.served = served
        self._steps = steps
        self._base: BaseModel = served.base
        self._vllm = vllm
        self._most_rows = vllm.vllm_config.scheduler_config.max_num_seqs
        self._adapters = VLLMAdapters(served, vllm, vllm.vllm_config.lora_config.max_cpu_loras)
        self._ends = end_tokens(self._base)
        self._penalty = repetition_penalty(self._base)
        # Of its own: other threads encode prompts meanwhile.
        self._tokenizer = copy.deepcopy(self._base.tokenizer)
        self._token_texts = TokenTexts(self._tokenizer)
        # Of each text at most one that waits for its scores; the others read adapters.
        self._threads = ThreadPoolExecutor(2 * MOST_TEXTS, "vLLM")
        self._numbers = count()
        # Requests that vLLM has, generations among them, and texts that are classified.
        self._running: set[str] = set()
        self._generations = self._texts = self._waiting_texts = 0
        # Those that wait come in turn: many texts at once never would, beside single ones.
        self._turn, self._freed = asyncio.Lock(), asyncio.Event()
        self._named = _Named()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = self._ended = False
        self._at_end = at_end

    @overload
    def submit(self, request: Generation) -> AsyncIterator[Piece]: ...
    @overload
    def submit(self, request: Classification) -> AsyncIterator[list[Classified | IA3Error]]: ...
    def submit(self, request: Generation | Classification) -> AsyncIterator[Any]:
        if isinstance(request, Generation):
            return self._generate(request)
        return self._classify(request)

    def load(self) -> Load:
        running = min(self._generations, self._most_rows)
        waiting = self._generations - running + self._waiting_texts
        return Load(running + self._texts, waiting, self._steps.count, self._steps.rows)

    def close(self) -> None:
        first, self._closed = not self._closed, True
        if not first:
            return
        if self._loop is not None and self._loop.is_running():
            # Who waits is told so; vLLM itself would leave them waiting.
            ending = asyncio.run_coroutine_threadsafe(self._abort(), self._loop)
            with suppress(Exception):
                ending.result(LONGEST_END)
        self._vllm.shutdown()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._adapters.close()

    async def _abort(self) -> None:
        await self._vllm.abort([*self._running])

    def _check_open(self) -> None:
        if self._closed:
            raise StateError("the server is shutting down")
        self._loop = asyncio.get_running_loop()

    def _look_for_end(self) -> None:
        if not (self._ended or self._closed) and self._vllm.errored:
            self._ended = True
            self._at_end(ENDED)

    # -- generations -------------------------------------------------------------------------------

    async def _generate(self, asked: Generation) -> AsyncIterator[Piece]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        check_generation(asked)
        self._check_open()
        most = check_fits(self.served, asked)
        with as_own():
            params = SamplingParams(
                max_tokens=most,
                temperature=asked.temperature,
                top_p=asked.top_p,
                seed=asked.seed,
                repetition_penalty=self._penalty,
                logprobs=asked.logprobs,
                # The tokens' text, and where it ends, are told as by the other engine.
                detokenize=False,
                ignore_eos=True,
                stop_token_ids=sorted(self._ends),
                output_kind=RequestOutputKind.DELTA,
            )
        text = RowText(self._tokenizer, self._token_texts, asked)
        self._generations += 1
        try:
            async with AsyncExitStack() as stack:
                values = await self._values_of(asked.adapter)
                lora = await stack.enter_async_context(self._adapters.held(values))
                if asked.logprobs:
                    await stack.enter_async_context(self._named.shut_out())
                coming = self._picked(asked.prompt, params, lora)
                await stack.enter_async_context(aclosing(coming))
                left = most
                async for picked in coming:
                    left -= 1
                    piece = text.add(picked, picked.token in self._ends, left == 0)
                    if piece is not None:
                        yield piece
                        if piece.finish is not None:
                            return
        finally:
            self._generations -= 1
            self._look_for_end()

    async def _values_of(self, adapter: str | None) -> Mapping[Site, Tensor]:
        if adapter is None:
            return {}
        try:
            # It may have to be read.
            values: dict[Site, Tensor] = await self._in_thread(
                self.served.bank.gather, [adapter], [0]
            )
        except UnknownNameError as error:
            raise no_adapter(adapter) from error
        return values

    def _in_thread(self, call: Any, *args: Any) -> Any:
        return asyncio.get_running_loop().run_in_executor(self._threads, call, *args)

    async def _picked(
        self, prompt: Sequence[int], params: Any, lora: Any
    ) -> AsyncGenerator[Picked, None]:
        """The tokens of one of vLLM's requests."""
        async with aclosing(self._outputs(prompt, params, lora)) as outputs:
            async for found in outputs:
                for place, token in enumerate(found.token_ids):
                    told = found.logprobs[place] if found.logprobs is not None else None
                    yield _picked(token, told, params.logprobs)

    async def _outputs(
        self, prompt: Sequence[int], params: Any, lora: Any
    ) -> AsyncGenerator[Any, None]:
        from vllm.inputs.engine import tokens_input

        number = str(next(self._numbers))
        self._running.add(number)
        try:
            with as_own():
                outputs = self._vllm.generate(
                    tokens_input([*prompt]), params, number, lora_request=lora
                )
                async with aclosing(outputs):
                    async for output in outputs:
                        (found,) = output.outputs
                        if found.finish_reason == "abort":
                            raise StateError("the server has shut down")
                        yield found
        finally:
            self._running.discard(number)

    # -- classifications ---------------------------------------------------------------------------

    async def _classify(self, asked: Classification) -> AsyncIterator[list[Classified | IA3Error]]:
        check_lengths(asked)
        self._check_open()
        found: list[Classified | IA3Error] = []
        for start in range(0, len(asked.texts), MOST_TEXTS):
            part = slice(start, start + MOST_TEXTS)
            found += await self._answers(asked.texts[part], asked.adapters[part], asked.untuned)
        yield found

    async def _answers(
        self, texts: Sequence[Any], adapters: Sequence[str], untuned: bool
    ) -> list[Classified | IA3Error]:
        size = len(texts)
        self._waiting_texts += size
        try:
            async with self._turn:
                while self._texts + size > MOST_TEXTS:
                    self._freed.clear()
                    await self._freed.wait()
                self._texts += size
        finally:
            self._waiting_texts -= size
        ranking = _Ranking(self)
        try:
            found: list[Classified | IA3Error] = await self._in_thread(
                answers, self.served, texts, adapters, untuned, ranking
            )
            return found
        finally:
            ranking.cancel()
            self._texts -= size
            self._freed.set()
            self._look_for_end()

    async def scores(
        self,
        prompts: Sequence[EncodedExample],
        places: Sequence[int],
        values: Mapping[Site, Tensor],
    ) -> Tensor:
        """As a `Ranking`: the mean log-probabilities of choices, `[prompts, choices]`."""
        found = torch.full((len(prompts), max(len(p.choices) for p in prompts)), -torch.inf)
        async with AsyncExitStack() as stack:
            loras = {}
            for place in sorted({*places}):
                own = {site: rows[place : place + 1] for site, rows in values.items()}
                loras[place] = await stack.enter_async_context(self._adapters.held(own))
            tasks = [
                asyncio.ensure_future(self._scores_of(prompt, loras[place]))
                for prompt, place in zip(prompts, places, strict=True)
            ]
            try:
                for row, scores in enumerate(await asyncio.gather(*tasks)):
                    found[row, : len(scores)] = torch.tensor(scores)
            finally:
                for task in tasks:
                    task.cancel()
        return found

    async def _scores_of(self, example: EncodedExample, lora: Any) -> list[float]:
        tree = next_tokens(example.choices)
        told = await asyncio.gather(
            *(
                self._logprobs((*example.prompt, *begin), tokens, lora)
                for begin, tokens in tree.items()
            )
        )
        return mean_logprobs(example.choices, dict(zip(tree, told, strict=True)))

    async def _logprobs(self, prompt: Tokens, tokens: Sequence[int], lora: Any) -> dict[int, float]:
        """The log-probabilities of tokens behind a prompt."""
        found: dict[int, float] = {}
        for start in range(0, len(tokens), MOST_NAMED):
            part = tokens[start : start + MOST_NAMED]
            with self._named.entered() as may_name:
                if may_name:
                    found |= await self._told(prompt, part, lora, logprob_token_ids=part)
                    continue
            one_by_one = (
                self._told(prompt, [token], lora, logprobs=0, allowed_token_ids=[token])
                for token in part
            )
            for told in await asyncio.gather(*one_by_one):
                found |= told
        return found

    async def _told(
        self, prompt: Tokens, tokens: Sequence[int], lora: Any, **options: Any
    ) -> dict[int, float]:
        """The log-probabilities of tokens that one of vLLM's requests tells."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=1,
            temperature=0,
            detokenize=False,
            ignore_eos=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **options,
        )
        async with aclosing(self._outputs(prompt, params, lora)) as outputs:
            async for output in outputs:
                return {token: output.logprobs[0][token].logprob for token in tokens}
        raise StateError("vLLM gave no answer")


class _Named:
    """Keeps apart what vLLM 0.32 cannot tell in one step.

    Where a row asks for the log-probabilities of tokens that it names, other rows lose those of
    their likeliest tokens. So a generation that wants these waits for such rows to be over, and
    while it runs there are no new ones.
    """

    def __init__(self) -> None:
        self._naming = self._shut_out = 0
        self._over = asyncio.Event()

    @contextmanager
    def entered(self) -> Iterator[bool]:
        """Whether tokens may be named within the context."""
        may = not self._shut_out
        self._naming += may
        try:
            yield may
        finally:
            self._naming -= may
            if not self._naming:
                self._over.set()

    @asynccontextmanager
    async def shut_out(self) -> AsyncIterator[None]:
        """Within the context no row names tokens."""
        self._shut_out += 1
        try:
            while self._naming:
                self._over.clear()
                await self._over.wait()
            yield
        finally:
            self._shut_out -= 1


class _Ranking:
    """A `Ranking` that a thread calls, and the event loop computes."""

    def __init__(self, engine: VLLMEngine) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._scoring: Any = None

    def __call__(
        self,
        prompts: Sequence[EncodedExample],
        places: Sequence[int],
        values: Mapping[Site, Tensor],
    ) -> Tensor:
        if not prompts:
            return torch.empty(0, 0)
        scores = self._engine.scores(prompts, places, values)
        self._scoring = asyncio.run_coroutine_threadsafe(scores, self._loop)
        found: Tensor = self._scoring.result()
        return found

    def cancel(self) -> None:
        """Have nothing computed any more."""
        if self._scoring is not None:
            self._scoring.cancel()


def _picked(token: int, told: Mapping[int, Any] | None, most: int | None) -> Picked:
    """A token of vLLM's with the likeliest ones; `told` has both."""
    if told is None or most is None:
        return Picked(token)
    if math.isnan(told[token].logprob):
        raise StateError("the model's scores are not finite: no token can be chosen")
    logprobs = {each: max(found.logprob, LEAST_LOGPROB) for each, found in told.items()}
    top = sorted(logprobs.items(), key=lambda pair: (-pair[1], pair[0]))[:most]
    return Picked(token, logprobs[token], tuple(top))


# -- the start -------------------------------------------------------------------------------------


def start_vllm(
    model: str,
    capacity: int,
    dtype: str = "auto",
    options: Mapping[str, Any] | None = None,
    at_end: AtEnd = lambda why: None,
) -> VLLMEngine:
    """Have vLLM load a language model, of which it keeps up to `capacity` adapters in memory.

    Args:
        dtype: `"auto"` (float32 on CPUs, else the checkpoint's own), or torch's name of one.
        options: of vLLM's own `AsyncEngineArgs`, before those that are chosen here.
        at_end: is called, with what to say, where vLLM's processes have ended by themselves.

    Raises:
        StateError: this version of vLLM has not been tried.
        IA3Error: there is no such option; or the model cannot be loaded, is no decoder-only
            language model, or has a generation config that vLLM would not follow.
    """
    _set_environment()
    from vllm import AsyncEngineArgs
    from vllm.platforms import current_platform

    from ...vllm.versions import check_version

    check_version()
    given = dict(options or {})
    known = [each.name for each in fields(AsyncEngineArgs)]
    for name in given:
        if name not in known:
            raise IA3Error(f"vLLM has no option {shown(name)}{did_you_mean(name, known)}")
        if name in OWN:
            raise IA3Error(f"the option {name!r} of vLLM is this server's own: leave it out")
    _, torch_dtype = device_and_dtype("cpu" if current_platform.is_cpu() else "auto", dtype)
    folder = model_folder(model)
    base = load_structure(model, folder)
    if further := further_options(base):
        raise IA3Error(
            f"the generation config of {model!r} has {', '.join(sorted(further))}, which vLLM does "
            "not follow: serve it without --engine vllm, or take that out of the file"
        )
    chosen = {
        "model": folder,
        "served_model_name": model,
        "dtype": torch_dtype,
        "seed": secrets.randbits(31),
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "enable_prefix_caching": True,
        "enable_lora": True,
        "max_lora_rank": 1,
        "max_loras": min(capacity, ADAPTERS_AT_ONCE),
        "max_cpu_loras": max(capacity, int(given.get("max_loras", 1))),
        "max_logprobs": MOST_NAMED,
        "use_tqdm_on_load": False,
        "disable_log_stats": True,
    }
    steps = Steps()
    vllm = _started(AsyncEngineArgs, {**chosen, **given}, steps)
    # What is said of the context, of texts to classify too, is what vLLM has room for.
    context = vllm.model_config.max_model_len
    config: Any = base.model.config
    config.get_text_config().max_position_embeddings = context
    bank = AdapterBank(base.model, capacity=capacity, device="cpu")
    return VLLMEngine(ServedBase(model, base, bank), vllm, steps, at_end)


def _set_environment() -> None:
    """What vLLM reads of the environment, in the processes that it starts too."""
    found = os.environ.get("VLLM_PLUGINS")
    if found is None:  # which means all there are
        groups = entry_points()
        found = ",".join(
            p.name for group in groups.groups if "vllm" in group for p in groups.select(group=group)
        )
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*filter(None, found.split(",")), "ia3"]))
    # Standard output is this program's, and the log has a line a request already.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # It would tell its makers what is served.
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def _started(kind: Any, options: Mapping[str, Any], steps: Steps) -> Any:
    """An `AsyncLLM`."""
    from vllm.utils.system_utils import kill_process_tree
    from vllm.v1.engine.async_llm import AsyncLLM

    found = Future[Any]()

    def start() -> None:
        # Its processes keep this mask: Ctrl-C, which all of a terminal get, is for the server
        # alone, which lets what runs finish.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            args = kind(**options)
            found.set_result(AsyncLLM.from_engine_args(args, stat_loggers=[steps.logger()]))
        except BaseException as error:
            found.set_exception(error)

    # Of multiprocessing; its start would undo the mask.
    resource_tracker.ensure_running()
    # A thread, so that Ctrl-C is heard meanwhile: a large model takes minutes.
    Thread(target=start, daemon=True, name="start of vLLM").start()
    try:
        return found.result()
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise IA3Error(
            f"vLLM cannot serve {options['served_model_name']!r}: {_in_words(error)}"
        ) from error
    except KeyboardInterrupt:
        for process in active_children():
            kill_process_tree(process.pid)
        raise


def _in_words(error: Exception) -> str:
    """What is wrong; of values, which ones: pydantic's first line only counts them."""
    faults: list[Any] = getattr(error, "errors", list)()
    said = (
        f"{'.'.join(map(str, each['loc']))} is {shown(each['input'])}: {each['msg']}"
        if each["loc"]
        else each["msg"]
        for each in faults
    )
    return "; ".join(dict.fromkeys(said)) or first_line(error)
