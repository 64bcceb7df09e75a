"""Tasks, forked processes, classifiers and memory: the further parts of `threads.py`."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import multiprocessing
import os
import random
import signal
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import numpy as np
import served
import torch
from joblib import parallel_config
from one_model import OneModel
from served import PATIENCE, PROMPTS, Hasty, Watch
from sklearn.model_selection import cross_val_score
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ia3 import FewShotClassifier, IA3Error, load_base_model
from ia3.core import calls

# -- tasks -----------------------------------------------------------------------------------------


def tasks(watch: Watch, seconds: float) -> None:
    """Hundreds of tasks that enter routes around awaits, are cancelled there, and change things."""
    with tempfile.TemporaryDirectory() as folder:
        one = OneModel("llama", watch, Path(folder))
        end = monotonic() + seconds
        with Hasty():
            while monotonic() < end:
                asyncio.run(asyncio.wait_for(_gathered(one, watch), 4 * PATIENCE))
        if one.model._adapters._open_routes or calls._CURRENT.get() is not None:
            watch.fail("a route or a call is on after all tasks have ended")
        one.end()


async def _gathered(one: OneModel, watch: Watch) -> None:
    chance = random.Random(watch.counts["tasks: gathered"] + 1000 * watch.seed)
    watch.count("tasks: gathered")
    running = [asyncio.ensure_future(_task(one, watch, chance)) for _ in range(200)]
    for task in chance.sample(running, 60):
        asyncio.get_running_loop().call_later(chance.random() * 0.5, task.cancel)
    for found in await asyncio.gather(*running, return_exceptions=True):
        if isinstance(found, asyncio.CancelledError):
            watch.count("tasks: cancelled")
        elif isinstance(found, Exception):
            watch.fail(f"a task: {type(found).__name__}: {found}")


async def _task(one: OneModel, watch: Watch, chance: random.Random) -> None:
    what = chance.choice(["route", "route", "thread", "executor", "change", "call"])
    rows = chance.randint(1, 3)
    names = chance.choices(["resident", "other", "another-narrow", served.BASE, "third"], k=rows)
    prompts = chance.choices(range(len(PROMPTS)), k=rows)

    def compute() -> None:
        with torch.no_grad():
            one.check(names, prompts, one.model(**one.served.inputs(prompts)).logits)

    def routed() -> None:
        one.routed("forward", names, prompts)

    try:
        if what in ("route", "thread"):
            with one.model.route(names):
                for _ in range(3):
                    await asyncio.sleep(0)
                    if what == "route":
                        compute()
                    else:
                        # It takes the task's context, and so its route, along.
                        await asyncio.to_thread(compute)
            watch.count("rows", 3 * rows)
        elif what == "executor":
            await asyncio.get_running_loop().run_in_executor(None, routed)
        elif what == "call":
            await asyncio.sleep(0)
            one.active("forward", prompts)
        else:
            await asyncio.sleep(0)
            role = chance.choice([one.switch, one.come_and_go, one.keep, one.read])
            watch.doing(*role(chance))
        watch.count(f"tasks: {what}")
    except IA3Error as error:
        watch.count(f"tasks: {what}: {type(error).__name__}")


# -- forked processes ------------------------------------------------------------------------------


def forks(watch: Watch, seconds: float) -> None:
    """Processes that are forked off while threads compute, change, predict and hold locks."""
    with tempfile.TemporaryDirectory() as folder:
        one, ranked = OneModel("llama", watch, Path(folder)), Classifiers(watch)

        def fork(chance: random.Random) -> tuple[str, Any]:
            return "fork", lambda: _fork(one, ranked, watch, chance.random())

        def pool(chance: random.Random) -> tuple[str, Any]:
            return "fork: a pool's workers", lambda: _pool(one)

        roles = {
            "route": one.route,
            "call": one.call,
            "switch": one.switch,
            "come and go": one.come_and_go,
            "write": one.write,
            "keep": one.keep,
            "predict": ranked.predict,
            "fork": fork,
            "pool": pool,
        }
        watch.run(seconds, roles)
        one.end()
        ranked.end()


# A lock of native code that another thread has at the fork stays locked in the new process. So one
# that gives no answer is counted, and tried again: a lock of this project, which no thread in the
# new process would free, is met each time.
TRIES = 3
SILENT = PATIENCE / (TRIES + 1)


def _fork(one: OneModel, ranked: Classifiers, watch: Watch, chance: float) -> None:
    for _ in range(TRIES):
        sleep(chance * 0.05)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                signal.alarm(int(SILENT))
                code = 0 if _in_the_child(one, ranked) else 2
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code != -signal.SIGALRM:
            break
        watch.count("fork: no answer, tried again")
    if code != 0:
        watch.fail(f"a forked process ended with {code}")


def _in_the_child(one: OneModel, ranked: Classifiers) -> bool:
    """All that the other threads did goes on here, without them."""
    watch = one.watch
    watch.failures.clear()
    model, adapter = one.model, one.served.adapters["third", 0]
    model.enable_adapter_layers()
    model.unmerge_adapter()
    one.bank.close()
    for name in [name for name in model.peft_config if name not in ("resident", "other")]:
        model.delete_adapter(name)
    model.add_adapter("third", adapter.config, vectors=adapter.vectors)
    one.routed("forward", ["third", "resident", served.BASE], [0, 1, 2])
    one.routed("generate", ["other", "third"], [0, 1])
    model.set_adapter("third")
    model.delete_adapter("third")
    model.merge_adapter("resident")
    model.unload()
    found = served.changed(one.served.base, one.served.before)
    ranked.check(0)
    ranked.fit_one()
    for failure in [*watch.failures, *found[:3]]:
        print("in a forked process:", failure, flush=True)
    return not watch.failures and not found


def _pool(one: OneModel) -> None:
    """Workers as a DataLoader has them: forked, each with a copy of the model."""
    for tries_left in reversed(range(TRIES)):
        try:
            _work(one)
            return
        except RuntimeError as error:
            if "timed out" not in str(error) or not tries_left:
                raise
            one.watch.count("fork: a pool without an answer, tried again")


def _work(one: OneModel) -> None:
    # No tensors come back: for these the workers' own threads would be asked, without a time limit.
    loader = torch.utils.data.DataLoader(
        _Rows(one),
        batch_size=2,
        num_workers=2,
        multiprocessing_context="fork",
        timeout=SILENT,
        collate_fn=list,
    )
    for batch in loader:
        for name, row in batch:
            one.watch.count("rows")
            if not one.served.is_row(torch.from_numpy(row), 0, one.served.of(name)):
                one.watch.fail(f"a worker's row of {name!r} is another's")


class _Rows(torch.utils.data.Dataset[Any]):
    def __init__(self, one: OneModel) -> None:
        self.one = one

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[str, Any]:
        name = ["resident", "other", served.BASE, "another-narrow"][index]
        with torch.no_grad():
            self.one.model.enable_adapter_layers()
            self.one.model.unmerge_adapter()
            inputs = self.one.served.inputs([0])
            return name, self.one.model(**inputs, adapter_names=[name]).logits[0].numpy()


# -- classifiers -----------------------------------------------------------------------------------

WORDS = ["Category", ":", "bill", "parcel", "late", "charged", "twice", "rain", "broken", "door"]
WORDS += ["good", "bad", "again", "never"]
TEXTS = ["bill charged twice", "parcel late again", "bill bad", "parcel broken rain"] * 3
LABELS = ["bill", "parcel"] * 6
ASKED = ["door charged", "late late parcel", "never good"]


class Classifiers:
    """Several classifiers of one base, and what each predicts alone."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        torch.manual_seed(watch.seed)
        self.base = served.tiny_llama()
        words = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
        self.before = {name: value.clone() for name, value in self.base.state_dict().items()}
        self.kept = load_base_model(self.base, tokenizer=self.tokenizer)
        self.fitted = [self.new(seed).fit(TEXTS, LABELS) for seed in range(3)]
        self.expected = [each.predict_proba(ASKED) for each in self.fitted]
        apart = [np.abs(self.expected[0] - other).max() for other in self.expected[1:]]
        assert min(apart) > 1e-3, apart

    def new(self, seed: int) -> FewShotClassifier:
        settings: dict[str, Any] = {"steps": 3, "learning_rate": 0.3, "device": "cpu"}
        return FewShotClassifier(self.base, tokenizer=self.tokenizer, seed=seed, **settings)

    def check(self, which: int) -> None:
        found = self.fitted[which].predict_proba(ASKED)
        self.watch.count("rows", len(ASKED))
        if np.abs(found - self.expected[which]).max() > 1e-5:
            self.watch.fail(f"classifier {which} predicts {found}, alone {self.expected[which]}")

    def fit_one(self) -> None:
        """A new classifier, and one that others predict with meanwhile, fit what they had."""
        found = self.new(1).fit(TEXTS, LABELS).predict_proba(ASKED)
        if np.abs(found - self.expected[1]).max() > 1e-5:
            self.watch.fail(f"a classifier was fitted to predict {found}, not {self.expected[1]}")

    def predict(self, chance: random.Random) -> tuple[str, Any]:
        which = chance.randrange(len(self.fitted))
        return "classifier: predict", lambda: self.check(which)

    def fit(self, chance: random.Random) -> tuple[str, Any]:
        if chance.random() < 0.5:
            return "classifier: fit", self.fit_one
        return "classifier: fit again", lambda: self.fitted[2].fit(TEXTS, LABELS)

    def validate(self, chance: random.Random) -> tuple[str, Any]:
        return "cross_val_score, threads", lambda: self._validated("threading")

    def _validated(self, backend: str) -> None:
        with parallel_config(backend, n_jobs=2):
            scores = cross_val_score(self.new(0), TEXTS, LABELS, cv=2)
        if not np.isfinite(scores).all():
            self.watch.fail(f"cross_val_score with {backend} gave {scores}")

    def end(self) -> None:
        if found := served.changed(self.base, self.before):
            self.watch.fail(f"the classifiers' base is not what it was: {found[:5]}")


def classifiers(watch: Watch, seconds: float) -> None:
    """Classifiers of one base that predict and fit from threads, and under scikit-learn."""
    ranked, start = Classifiers(watch), monotonic()
    if seconds >= 30:
        watch.doing("cross_val_score, processes", lambda: ranked._validated("loky"))
    roles = {
        "predict": ranked.predict,
        "predict too": ranked.predict,
        "fit": ranked.fit,
        "validate": ranked.validate,
    }
    watch.run(max(1.0, seconds - (monotonic() - start)), roles)
    ranked.end()


# -- memory ----------------------------------------------------------------------------------------

CYCLES = 200


def leaks(watch: Watch, seconds: float) -> None:
    """What one thread does again and again leaves no object, hook or memory behind."""
    with tempfile.TemporaryDirectory() as folder:
        one, ranked = OneModel("llama", watch, Path(folder)), Classifiers(watch)
        end, done, first = monotonic() + seconds, 0, {}
        while monotonic() < end or done < 2 * CYCLES:
            for _ in range(CYCLES):
                _cycle(one, ranked, done)
                done += 1
            now = _held(one)
            # The first ones fill caches.
            first = first or now
        for what, count in now.items():
            grown = count - first[what]
            watch.count(f"leaks: {what} grown by", grown)
            # What a thousand cycles may add to the interpreter's own tables.
            allowed = {"objects": 200, "kilobytes": 6_000}.get(what, 0)
            if grown > allowed:
                watch.fail(f"in {done} cycles {what} have grown by {grown}")
        watch.count("leaks: cycles", done)
        one.end()
        ranked.end()


def _cycle(one: OneModel, ranked: Classifiers, number: int) -> None:
    model, folder = one.model, one.folder
    model.load_adapter(folder / "coming", "coming")
    one.bank.add("third", folder / "third")
    one.routed("forward", ["third", "coming", served.BASE], [0, 1, 2])
    with contextvars.copy_context().run(model.disable_adapter):
        one.active("forward", [0])
    model.load_adapter(folder / "coming", "coming")
    model.set_adapter("coming")
    one.active("forward", [1])
    model.merge_adapter("coming")
    model.unmerge_adapter()
    model.set_adapter("resident")
    one.bank.remove("third")
    model.delete_adapter("coming")
    worker = threading.Thread(target=one.routed, args=("forward", ["other"], [0]))
    worker.start()
    worker.join()
    if number % 20 == 0:
        ranked.check(number % 3)
        one.copied(number % len(PROMPTS))


def _held(one: OneModel) -> dict[str, int]:
    for _ in range(3):
        gc.collect()
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_load_state_dict_pre_hooks")
    modules = list(one.served.base.modules())
    return {
        "objects": len(gc.get_objects()),
        "kilobytes": int(Path("/proc/self/statm").read_text().split()[1]) * 4,
        "hooks": sum(len(module.__dict__[slot]) for module in modules for slot in hooks),
        "context variables": len(contextvars.copy_context()),
        "threads": threading.active_count(),
        "processes": len(multiprocessing.active_children()),
        "open calls": sum(len(each._open) + len(each._later) for each in list(calls._all)),
    }


PARTS: dict[str, tuple[float, Callable[[Watch, float], None]]] = {
    "tasks": (0.1, tasks),
    "forks": (0.15, forks),
    "classifiers": (0.15, classifiers),
    "leaks": (0.1, leaks),
}
