"""Killed at any instant: what is found afterwards is the old state or the new one, whole.

Children of a process that has everything loaded are killed while they save, train or convert: half
of them at a random moment, half in a chosen gap between two calls that change files. Then what is
there is read and compared, bit for bit; the next save has to succeed and to leave nothing else
behind. Beside that, writers work next to readers and next to each other.

    python soak/kills.py --seconds 60 --seed 1
    python soak/kills.py --only save --rounds 1000
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
# ruff: noqa: E402

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_safetensors
from support import heads
from support.kills import calls_of, ended, killed_after, killed_before, result_of, started
from support.tfew import tiny_llama, word_tokenizer
from transformers import T5Config

from ia3 import AdapterBank, FewShotClassifier, IA3Config, IA3Model, fit_many
from ia3.adapter.convert import structure_of
from ia3.adapter.files import Adapter, adapter_files, read_adapter
from ia3.cli import app
from ia3.errors import IA3Error
from ia3.files.atomic import write_file, write_files
from ia3.files.records import append_record, read_records
from ia3.tfew import TFewConfig, TrainingExample, train
from ia3.tfew.prompts.encoding import EncodedExample
from ia3.tfew.training import trainer

WORDS = ("it is so good bad fine charged twice lost parcel", "x y happy angry calm : Category")
MODEL, TOKENIZER = tiny_llama(), word_tokenizer(" ".join(WORDS).split())
BILLS = (["charged twice", "parcel lost", "so bad", "bad parcel"], ["x", "y", "y", "x"])
MOODS = (["so good", "so bad", "it is fine"], ["happy", "angry", "calm"])
# As other programs know them.
WEIGHTS_NAME, CONFIG_NAME = "adapter_model.safetensors", "adapter_config.json"
TASK_NAME = "ia3_task.json"
# A run is broken off so often before it may end.
BREAKS = 4


# -- what is there ---------------------------------------------------------------------------------


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """Name -> values, as bytes."""
    return {name: tensors[name].contiguous().numpy().tobytes() for name in sorted(tensors)}


def in_adapter(folder: Path) -> Any:
    """An adapter's config and values; `None` where there is none."""
    try:
        adapter = read_adapter(folder)
    except FileNotFoundError:
        return None
    return json.loads(adapter.config.to_json()), bits({**adapter.vectors, **adapter.copies})


def in_classifier(folder: Path) -> Any:
    """All that predictions depend on; `None` where there is no classifier."""
    try:
        loaded = FewShotClassifier.load(folder, model=MODEL, tokenizer=TOKENIZER)
    except FileNotFoundError:
        return None
    said = [loaded.classes_.tolist(), loaded.choices_, loaded.templates_, loaded.fields_]
    config = json.loads(loaded.adapter_.config.to_json())
    return said, loaded.settings_, config, bits(loaded.adapter_.vectors)


def of_any_engine(folder: Path) -> Any:
    """As `in_classifier`, of what is in the files; an encoder's has a head."""
    try:
        return heads.state(folder)
    except FileNotFoundError:
        return None


def for_others(folder: Path) -> Any:
    """What the files say to a program that knows nothing of this library; those that are there."""
    found: dict[str, Any] = {}
    for name in (WEIGHTS_NAME, heads.HEAD_NAME):
        if (folder / name).exists():
            found[name] = bits(read_safetensors((folder / name).read_bytes()))
    for name in (CONFIG_NAME, TASK_NAME):
        if (folder / name).exists():
            found[name] = json.loads((folder / name).read_text())
    return found


def names_in(folder: Path) -> list[str]:
    """All that is in a folder and below it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# -- what is done ----------------------------------------------------------------------------------


@dataclass
class Kind:
    """An operation that replaces an old state by a new one.

    `look` gives parts of a state, each of which has to be the old or the new one as a whole. What
    is said to others than this library may be missing, but not contradict itself.
    """

    prepare: Callable[[Path], object]
    work: Callable[[Path], object]
    look: Callable[[Path], dict[str, Any]]
    old: dict[str, Any] = field(default_factory=dict)
    new: dict[str, Any] = field(default_factory=dict)
    clean: list[str] = field(default_factory=list)
    seconds: float = 0.0
    calls: int = 0

    def measure(self, place: Path) -> None:
        """Find both states, and how long the work takes."""
        self.prepare(place)
        self.old = self.look(place)
        self.calls = calls_of(partial(self.work, place))
        times = []
        for _ in range(3):
            clear(place)
            self.prepare(place)
            times.append(result_of(partial(timed, self.work, place))[1])
        self.new, self.clean, self.seconds = self.look(place), names_in(place), min(times)
        assert self.old != self.new

    def once(self, place: Path, draw: random.Random, counts: Counter[str]) -> None:
        """One kill; an `AssertionError` says what was seen after it."""
        clear(place)
        self.prepare(place)
        if draw.random() < 0.5:
            call = draw.randint(1, self.calls)
            moment, killed = f"before call {call}", killed_before(call, partial(self.work, place))
        else:
            seconds = draw.uniform(0, self.seconds)
            moment, killed = (
                f"after {seconds:.5f} s",
                killed_after(seconds, partial(self.work, place)),
            )
        counts["kills" if killed else "not killed in time"] += 1
        counts["strays of killed"] += len({*names_in(place)} - {*self.clean})
        try:
            found = self.look(place)
        except (IA3Error, SafetensorError, json.JSONDecodeError) as error:
            raise AssertionError(f"killed {moment}: {type(error).__name__}: {error}") from error
        for part, value in found.items():
            whole = [self.old[part], self.new[part]]
            if part.startswith("for others"):
                whole = [{n: of[n] for n in value if n in of} for of in whole]
            assert value in whole, f"killed {moment}: {part} is neither old nor new"
        own = {part: value for part, value in found.items() if not part.startswith("for others")}
        counts["new" if all(own[part] == self.new[part] for part in own) else "old"] += 1
        counts["files missing for others"] += any(
            value not in (self.old[part], self.new[part]) for part, value in found.items()
        )
        self.work(place)
        assert self.look(place) == self.new, f"killed {moment}: the next save is not whole"
        left = {*names_in(place)} ^ {*self.clean}
        assert not left, f"killed {moment}: after the next save there is, or lacks, {sorted(left)}"


@dataclass
class Run:
    """Work that goes on where it was broken off, again and again, and ends with the same bits."""

    work: Callable[[Path], Any]
    # Raises where what is there cannot be used.
    look: Callable[[Path], object] = lambda place: None
    expected: Any = None
    clean: list[str] = field(default_factory=list)
    seconds: float = 0.0
    calls: int = 0
    broken: int = 0

    def measure(self, place: Path) -> None:
        """Find out how it ends without a break, and how long it takes."""
        self.calls = calls_of(partial(self.work, place))
        clear(place)
        self.expected, self.seconds = result_of(partial(timed, self.work, place))
        self.clean = names_in(place)
        clear(place)

    def once(self, place: Path, draw: random.Random, counts: Counter[str]) -> None:
        """One kill, and after some of them a run to its end."""
        if draw.random() < 0.5:
            call = draw.randint(1, self.calls)
            moment, killed = f"before call {call}", killed_before(call, partial(self.work, place))
        else:
            seconds = draw.uniform(0, self.seconds)
            moment, killed = (
                f"after {seconds:.4f} s",
                killed_after(seconds, partial(self.work, place)),
            )
        counts["kills" if killed else "not killed in time"] += 1
        try:
            self.look(place)
            self.broken += 1
            if killed and self.broken % BREAKS:
                return
            # One that was not killed is at its end already, and takes no step.
            counts["ended"] += 1
            result = result_of(partial(self.work, place))
            assert result == self.expected, f"the last kill {moment}: it ended with other bits"
            left = {*names_in(place)} ^ {*self.clean}
            assert not left, (
                f"the last kill {moment}: at its end there is, or lacks, {sorted(left)}"
            )
        except BaseException:
            clear(place)
            raise
        clear(place)


def timed(work: Callable[[Path], Any], place: Path) -> tuple[Any, float]:
    """What the work returns, and its seconds."""
    began = time.perf_counter()
    result = work(place)
    return result, time.perf_counter() - began


def clear(place: Path) -> None:
    """An empty folder."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)


# -- states ----------------------------------------------------------------------------------------


def classifier(data: Any, seed: int, **settings: Any) -> FewShotClassifier:
    """A classifier with vectors of its own, without a training."""
    fitted = FewShotClassifier(MODEL, tokenizer=TOKENIZER, steps=0, seed=seed, **settings).fit(
        *data
    )
    generator = torch.Generator().manual_seed(seed)
    vectors = fitted.adapter_.vectors
    for name, vector in vectors.items():
        vectors[name] = torch.rand(vector.shape, generator=generator) + 0.5
    return fitted


def adapter(seed: int, modules: tuple[str, ...] = ("k_proj", "v_proj", "down_proj")) -> Adapter:
    """An adapter with values of its own."""
    feedforward = [name for name in modules if name == "down_proj"]
    config = IA3Config(target_modules=[*modules], feedforward_modules=feedforward)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = IA3Model(tiny_llama(), config)
        with torch.no_grad():
            for vector in model.vectors("default").values():
                vector.uniform_(0.5, 1.5)
        stored = model.adapter("default")
    stored.vectors = {name: vector.detach().clone() for name, vector in stored.vectors.items()}
    return stored


def adapted(*adapters: Adapter) -> IA3Model:
    """A model with these adapters: `default`, `a1`, `a2`, ..."""
    model = IA3Model.without_adapters(tiny_llama())
    for number, stored in enumerate(adapters):
        name = f"a{number}" if number else "default"
        model.add_adapter(name, stored.config)
        with torch.no_grad():
            for module, vector in model.vectors(name).items():
                vector.copy_(stored.vectors[module])
    return model


def command(*arguments: object) -> None:
    """The `ia3` command, in this process."""
    with warnings.catch_warnings(action="ignore"), redirect_stderr(io.StringIO()):
        app([str(argument) for argument in arguments], standalone_mode=False)


# -- the kinds -------------------------------------------------------------------------------------


def kinds(inputs: Path) -> dict[str, Kind | Run]:
    """All of them; `inputs` is a folder for what they read."""
    old, new = classifier(BILLS, 1), classifier(MOODS, 2, template="{{ text }} it is :")
    other = classifier(BILLS, 3)

    def folder(place: Path) -> Path:
        return place / "folder"

    def saved(place: Path) -> dict[str, Any]:
        both = {"classifier": in_classifier(folder(place)), "adapter": in_adapter(folder(place))}
        return {"all": both, "for others": for_others(folder(place))}

    def one(place: Path) -> dict[str, Any]:
        return {"all": in_adapter(folder(place)), "for others": for_others(folder(place))}

    found: dict[str, Kind | Run] = {}
    found["save"] = Kind(lambda p: old.save(folder(p)), lambda p: new.save(folder(p)), saved)
    found["save, same sites"] = Kind(
        lambda p: old.save(folder(p)), lambda p: other.save(folder(p)), saved
    )
    found["save, new folder"] = Kind(
        lambda p: None, lambda p: new.save(p / "above" / "folder"), lambda p: saved(p / "above")
    )

    def of_encoder(number: int) -> Callable[[Path], None]:
        return lambda place: heads.save_encoder(folder(place), number)

    def any_saved(place: Path) -> dict[str, Any]:
        both = {"classifier": of_any_engine(folder(place)), "adapter": in_adapter(folder(place))}
        return {"all": both, "for others": for_others(folder(place))}

    found["save, encoder"] = Kind(of_encoder(1), of_encoder(2), any_saved)
    found["save, encoder, same sites"] = Kind(of_encoder(1), of_encoder(3), any_saved)
    found["save, encoder over language model"] = Kind(
        lambda p: old.save(folder(p)), of_encoder(1), any_saved
    )
    found["save, language model over encoder"] = Kind(
        of_encoder(1), lambda p: old.save(folder(p)), any_saved
    )

    first, second = adapter(1), adapter(2, ("q_proj", "down_proj"))
    models = adapted(first), adapted(second)
    found["save_pretrained"] = Kind(
        lambda p: models[0].save_pretrained(folder(p)),
        lambda p: models[1].save_pretrained(folder(p)),
        one,
    )

    three = adapted(first, second, adapter(3)), adapted(second, adapter(4), adapter(5, ("v_proj",)))

    def several(place: Path) -> dict[str, Any]:
        folders = {"": folder(place), **{n: folder(place) / n for n in ("a1", "a2")}}
        seen = {f"adapter {name}": in_adapter(path) for name, path in folders.items()}
        return seen | {f"for others, {name}": for_others(path) for name, path in folders.items()}

    found["save_pretrained, three"] = Kind(
        lambda p: three[0].save_pretrained(folder(p)),
        lambda p: three[1].save_pretrained(folder(p)),
        several,
    )
    found["save_pretrained, classifier's folder"] = Kind(
        lambda p: old.save(folder(p)), lambda p: models[1].save_pretrained(folder(p)), saved
    )
    found["save_pretrained, encoder classifier's folder"] = Kind(
        of_encoder(1), lambda p: models[1].save_pretrained(folder(p)), any_saved
    )

    sizes = {"vocab_size": 48, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2}
    T5Config(**sizes, num_heads=2, feed_forward_proj="gated-gelu").save_pretrained(inputs / "t5")
    theirs = {
        f"{name}.multi_lora_b": torch.rand(module.out_features, 1) + 0.5
        for name, module in structure_of(inputs / "t5").named_modules()
        if name.endswith(("Attention.k", "Attention.v", "DenseReluDense.wi_1"))
    }
    torch.save(theirs, inputs / "finish.pt")
    found["convert"] = Kind(
        lambda p: old.save(folder(p)),
        lambda p: command(
            *("convert", inputs / "finish.pt", "--model", inputs / "t5"),
            *("--out", folder(p), "--force"),
        ),
        saved,
    )
    for number in (6, 7):
        write_files(inputs / f"{number}", adapter_files(adapter(number)))
    found["combine"] = Kind(
        of_encoder(2),
        lambda p: command("combine", inputs / "6", inputs / "7", "--out", folder(p), "--force"),
        any_saved,
    )

    bank = AdapterBank(tiny_llama(), capacity=2)

    def in_bank(place: Path) -> dict[str, Any]:
        if "one" not in bank:
            bank.add("one", folder(place))
        refreshed = bank.refresh()
        assert not refreshed.failed, refreshed.failed
        rows = bank.gather(["one"], [0])
        return {"row": [row.numpy().tobytes() for row in rows.values()]}

    replaced = adapted(adapter(8))
    found["bank"] = Kind(
        lambda p: models[0].save_pretrained(folder(p)),
        lambda p: replaced.save_pretrained(folder(p)),
        in_bank,
    )

    def two_records(place: Path) -> None:
        for number in range(2):
            append_record(place / "records.jsonl", {"a": number})

    def add(place: Path) -> None:
        if len(read_records(place / "records.jsonl", lambda record: True, "a record")) < 3:
            append_record(place / "records.jsonl", {"a": "x" * 100_000})

    found["append_record"] = Kind(
        two_records,
        add,
        lambda p: {"all": read_records(p / "records.jsonl", lambda record: "a" in record, "one")},
    )
    found["write_file"] = Kind(
        lambda p: write_file(p / "file", b"old" * 10_000),
        lambda p: write_file(p / "file", b"new" * 20_000),
        lambda p: {"all": (p / "file").read_bytes()},
    )

    def fit(place: Path) -> Any:
        trainer.CHECKPOINT_STEPS = 2
        settings = {"steps": 5, "learning_rate": 0.03, "seed": 1}
        fitted = FewShotClassifier(MODEL, tokenizer=TOKENIZER, **settings)
        fitted.fit(*BILLS, checkpoints=place / "checkpoints")
        return bits(fitted.adapter_.vectors), fitted.history_

    found["fit"] = Run(fit)

    draw = random.Random(0)
    ids = [[tuple(draw.randrange(3, 15) for _ in range(4)) for _ in range(3)] for _ in range(4)]
    examples = [
        TrainingExample((EncodedExample(prompt, (a, b)),), n % 2)
        for n, (prompt, a, b) in enumerate(ids)
    ]

    def checkpoints(place: Path) -> Any:
        model = fit_model()
        recipe = TFewConfig(steps=6, batch_size=2, seed=3)
        settings = {"save_steps": 1, "save_total_limit": 2}
        base = FewShotClassifier(MODEL, tokenizer=TOKENIZER).base
        base = type(base)(model.model, TOKENIZER, "tiny")
        history = train(
            base, model, examples, recipe, checkpoints=place / "checkpoints", **settings
        )
        return bits({n: v.detach().clone() for n, v in model.vectors("default").items()}), history

    def fit_model() -> IA3Model:
        return IA3Model(
            tiny_llama(), IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[])
        )

    found["checkpoints"] = Run(checkpoints)

    tasks = {"bills": BILLS, "moods": MOODS, "again": (BILLS[0], BILLS[1][::-1])}

    def many(place: Path) -> Any:
        settings = FewShotClassifier(MODEL, tokenizer=TOKENIZER, steps=2, learning_rate=0.03)
        fitted = fit_many(tasks, settings, out=place / "out")
        assert not fitted.failures, fitted.failures
        results = {n: (bits(c.adapter_.vectors), c.history_) for n, c in fitted.classifiers.items()}
        for name in tasks:
            saved_bits = in_classifier(place / "out" / name)[-1]
            assert saved_bits == results[name][0], f"{name}: saved is not what was fitted"
        return results

    found["fit-many"] = Run(many, lambda p: [in_classifier(p / "out" / name) for name in tasks])
    return found


# -- beside each other -----------------------------------------------------------------------------


def reader_beside_writer(place: Path, loads: int, counts: Counter[str]) -> None:
    """Every load is one of the two classifiers that another process saves by turns."""
    both = [classifier(BILLS, 1).save, classifier(MOODS, 2).save]
    _beside_saves(place / "folder", both, in_classifier, loads, counts)


def reader_beside_writer_of_encoders(place: Path, loads: int, counts: Counter[str]) -> None:
    """The same, of classifiers on a sentence encoder."""
    both = [partial(heads.save_encoder, number=number) for number in (1, 2)]
    _beside_saves(place / "folder", both, of_any_engine, loads, counts)


def _beside_saves(
    folder: Path,
    saves: list[Callable[[Path], object]],
    look: Callable[[Path], Any],
    loads: int,
    counts: Counter[str],
) -> None:
    def write() -> None:
        while True:
            for save in saves:
                save(folder)

    whole = []
    for save in saves:
        save(folder)
        whole.append(look(folder))
    _beside(write, lambda: look(folder), whole, loads, counts, "loads")


def others_beside_writer(place: Path, loads: int, counts: Counter[str]) -> None:
    """PEFT's reader, while vectors are replaced under a config that stays."""
    from peft import PeftConfig
    from peft.utils import load_peft_weights

    both = [adapted(adapter(number)) for number in (1, 2)]
    folder = place / "folder"

    def write() -> None:
        while True:
            for each in both:
                each.save_pretrained(folder)

    def look() -> Any:
        assert PeftConfig.from_pretrained(str(folder)).peft_type == "IA3"
        return bits(load_peft_weights(str(folder), device="cpu"))

    whole = []
    for each in both:
        each.save_pretrained(folder)
        whole.append(look())
    _beside(write, look, whole, loads, counts, "loads by PEFT")


def _beside(
    write: Callable[[], object],
    look: Callable[[], Any],
    whole: list[Any],
    loads: int,
    counts: Counter[str],
    what: str,
) -> None:
    assert whole[0] != whole[1]
    pid = started(write)
    seen: Counter[int] = Counter()
    wrong: Counter[str] = Counter()
    try:
        for _ in range(loads):
            try:
                found = look()
            except (IA3Error, SafetensorError, OSError, ValueError) as error:
                wrong[f"{type(error).__name__}: {error}"[:200]] += 1
                continue
            if found in whole:
                seen[whole.index(found)] += 1
            else:
                wrong["neither the one nor the other"] += 1
    finally:
        os.kill(pid, signal.SIGKILL)
        code = ended(pid)
    counts[what] += loads
    assert not wrong, f"of {loads} {what}: {dict(wrong)}"
    assert code == -signal.SIGKILL, f"the writer ended with code {code}"
    counts[f"{what}, of each"] += min(seen.values()) if len(seen) == 2 else 0


def several_writers(place: Path, writers: int, counts: Counter[str]) -> None:
    """All save into one folder, which is new; one of them wins whole, and none fails."""
    each = [classifier(BILLS if n % 2 else MOODS, n) for n in range(writers)]
    whole = []
    for number, one in enumerate(each):
        one.save(place / f"{number}")
        whole.append(in_classifier(place / f"{number}"))
    clean = names_in(place / "0")

    def write(one: FewShotClassifier) -> None:
        for _ in range(10):
            one.save(place / "above" / "folder")

    pids = [started(partial(write, one)) for one in each]
    codes = [ended(pid) for pid in pids]
    counts[f"saves of {writers} processes"] += 10 * writers
    assert not any(codes), f"{writers} processes saved to one folder; they ended with {codes}"
    assert in_classifier(place / "above" / "folder") in whole, f"{writers} writers left a mixture"
    left = names_in(place / "above")
    assert left == sorted(["folder", *(f"folder/{name}" for name in clean)]), f"left: {left}"


def several_fit_many(place: Path, run: Run, counts: Counter[str]) -> None:
    """Two processes fit the same tasks into one folder."""
    pids = [started(partial(run.work, place)) for _ in range(2)]
    codes = [ended(pid) for pid in pids]
    counts["fit_many beside another"] += 2
    assert codes == [0, 0], f"two processes fitted the same tasks; they ended with {codes}"
    assert result_of(partial(run.work, place)) == run.expected, "two processes: other bits"
    assert names_in(place) == run.clean, f"two processes left {names_in(place)}"


def several_appenders(place: Path, counts: Counter[str]) -> None:
    """Nothing of what four processes append is lost."""
    path = place / "records.jsonl"

    def write(writer: int) -> None:
        for number in range(25):
            append_record(path, {"a": [writer, number], "more": "x" * 300 * number})

    pids = [started(partial(write, writer)) for writer in range(4)]
    assert [ended(pid) for pid in pids] == [0] * 4, "a process that appended records failed"
    counts["records of 4 processes"] += 100
    records = read_records(path, lambda record: "a" in record, "one")
    found = sorted(record["a"] for record in records)
    assert found == [[w, n] for w in range(4) for n in range(25)], f"{len(found)} records of 100"


# -- running them ----------------------------------------------------------------------------------


def run(
    seconds: float, seed: int, only: str | None = None, rounds: int | None = None
) -> dict[str, object]:
    """Kill and look for so long, or for so many `rounds` of the kinds that begin as `only`.

    Returns:
        Counts by what was done, and `failures`: sentences that say how to see one again.
    """
    torch.set_num_threads(1)
    draw = random.Random(seed)
    counts: dict[str, Counter[str]] = {}
    failures: list[str] = []

    def attempt(name: str, work: Callable[[Counter[str]], object]) -> None:
        count = counts.setdefault(name, Counter())
        try:
            work(count)
        except Exception as error:
            count["failures"] += 1
            how = f"soak/kills.py --seed {seed}" + (f" --only {name!r}" if only else "")
            # Of one kind the first few are enough to read.
            if count["failures"] <= 5:
                failures.append(f"{name} ({how}): {error or type(error).__name__}"[:1500])

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        (root / "inputs").mkdir()
        work = kinds(root / "inputs")
        beside: dict[str, Callable[[Path, Counter[str]], object]] = {
            "reader": lambda p, c: reader_beside_writer(p, 1000 if rounds else 100, c),
            "reader, encoders": lambda p, c: reader_beside_writer_of_encoders(
                p, 1000 if rounds else 100, c
            ),
            "reader, PEFT": lambda p, c: others_beside_writer(p, 1000 if rounds else 100, c),
            "two writers": lambda p, c: several_writers(p, 2, c),
            "four writers": lambda p, c: several_writers(p, 4, c),
            "two fit-many": lambda p, c: several_fit_many(p, many, c),
            "four appenders": several_appenders,
        }
        every = [*work, *beside]
        chosen = [only] if only in every else [n for n in every if n.startswith(only or "")]
        many = work["fit-many"]
        assert isinstance(many, Run)
        if {"fit-many", "two fit-many"} & {*chosen}:
            many.measure(_place(root, "fit-many"))
        for name in chosen:
            if name in work and name != "fit-many":
                work[name].measure(_place(root, name))
                one = work[name]
                print(f"{name}: {one.seconds:.4f} s, {one.calls} calls", flush=True)
        # What is never looked at again need not be copied for each child.
        gc.collect()
        gc.freeze()
        # What was measured above takes longer than the share of a short run.
        end = time.monotonic() + seconds
        done = 0
        spent = dict.fromkeys(chosen, 0.0)
        rounds_of: Counter[str] = Counter()
        said = time.monotonic()
        while time.monotonic() < end or rounds:
            # Each kind gets the same share of the time, or its kills.
            of = {
                n: counts.get(n, {}).get("kills", 0) if n in work else rounds_of[n] for n in chosen
            }
            chosen = [n for n in chosen if not rounds or of[n] < rounds]
            if not chosen:
                break
            name = min(chosen, key=lambda n: spent[n])
            rounds_of[name] += 1
            began = time.monotonic()
            place = _place(root, name)
            if name in work:
                one = work[name]
                attempt(name, lambda count, one=one, place=place: one.once(place, draw, count))
            else:
                clear(place)
                attempt(name, lambda count, name=name, place=place: beside[name](place, count))
            done += 1
            spent[name] += time.monotonic() - began
            if time.monotonic() - said > 10:
                said = time.monotonic()
                kills = sum(count["kills"] for count in counts.values())
                print(f"{done} rounds, {kills} kills, {len(failures)} failures", flush=True)
    kills = sum(count["kills"] for count in counts.values())
    return {
        "kills": kills,
        **{
            f"{name}: {what}": n for name, count in counts.items() for what, n in count.items() if n
        },
        "failures": failures,
    }


def _place(root: Path, name: str) -> Path:
    place = root / "places" / name
    place.mkdir(parents=True, exist_ok=True)
    return place


def main() -> None:
    """Print the counts; exit with 1 where there are failures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="this kind, or those whose name begins so")
    parser.add_argument(
        "--rounds", type=int, help="so many kills of each kind, instead of --seconds"
    )
    given = parser.parse_args()
    found = run(given.seconds, given.seed, given.only, given.rounds)
    print(json.dumps(found, indent=1))
    sys.exit(bool(found["failures"]))


if __name__ == "__main__":
    main()
