"""Learning a task beside the server: the process, its end, and what is refused."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

pytest.importorskip("fastapi")

import numpy as np
from support.encoders import encoder_folder

import ia3
from ia3.errors import BrokenFileError, IA3Error, StateError, UnknownNameError
from ia3.serve.engine.bases import ServedBase, serve_base
from ia3.serve.http.learning import MOST_CHARACTERS, MOST_ROWS, Fit, Learning, LearnRequest

TEXTS = ["the quick fox", "a brown fox", "the fox jumps", "the lazy dog", "a dog", "over the dog"]
LABELS = ["fox"] * 3 + ["dog"] * 3
CSV = "text,label\n" + "".join(f"{t},{la}\n" for t, la in zip(TEXTS, LABELS, strict=True))


@dataclass
class Adopted:
    """Stands in for the registry."""

    files: dict[str, Mapping[str, bytes]] = field(default_factory=dict)

    async def adopt(self, name: str, files: Mapping[str, bytes]) -> None:
        self.files[name] = files

    def refuse(self, name: str) -> None:
        if name in self.files:
            raise StateError(f"there is an adapter {name!r}")


@dataclass(frozen=True)
class NamedBase:
    """A base of which only the name is asked."""

    name: str
    kind: str = "encoder"
    device: str = "cpu"

    @property
    def bank(self) -> NamedBase:
        return self


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedBase:
    return serve_base(str(encoder_folder(tmp_path_factory.mktemp("base") / "encoder")), 4)


def request(**changes: Any) -> LearnRequest:
    return LearnRequest(**({"name": "animals", "csv": CSV} | changes))


def children() -> set[int]:
    of = Path(f"/proc/{os.getpid()}/task")
    found = set[int]()
    for task in of.iterdir():
        with suppress(FileNotFoundError):  # a thread that has ended meanwhile
            found |= set(map(int, (task / "children").read_text().split()))
    return found


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_task_is_learned_as_a_fit_here_would_learn_it(served: ServedBase, tmp_path: Path) -> None:
    registry, seen = Adopted(), []

    async def learn() -> Fit:
        learning = Learning([served], registry.adopt, registry.refuse)
        fit = await learning.begin(request())
        async for now in learning.changes(fit.id):
            seen.append((now.state, len(now.loss), now.served))
        return fit

    fit = asyncio.run(learn())
    assert (fit.state, fit.error, fit.engine) == ("done", None, "encoder")
    assert (fit.texts, fit.labels) == (6, {"fox": 3, "dog": 3})
    states = [state for state, *_ in seen]
    assert [*dict.fromkeys(states)] == ["training", "measuring", "done"]
    losses = [count for _, count, _ in seen]
    assert losses == sorted(losses)
    # The adapter answers before it is measured.
    assert all(is_served for state, _, is_served in seen if state == "measuring")
    assert fit.measured is not None
    assert fit.measured["texts"] == 6
    here = ia3.FewShotClassifier(served.name).fit(TEXTS, LABELS)
    np.testing.assert_allclose(fit.loss, [step.loss for step in here.history_], atol=1e-4)
    for name, content in registry.files["animals"].items():
        (tmp_path / name).write_bytes(content)
    there = ia3.FewShotClassifier.load(tmp_path)
    np.testing.assert_allclose(there.predict_proba(TEXTS), here.predict_proba(TEXTS), atol=1e-4)


def test_a_fit_that_is_cancelled_leaves_no_process(served: ServedBase) -> None:
    async def learn() -> tuple[Fit, set[int]]:
        before = children()
        learning = Learning([served], Adopted().adopt, Adopted().refuse)
        fit = await learning.begin(request())
        with pytest.raises(StateError, match="another task"):
            await learning.begin(request(name="other"))
        async for now in learning.changes(fit.id):
            if now.doing != "starting":
                break
        started = children() - before
        return await learning.cancel(fit.id), started

    fit, started = asyncio.run(learn())
    assert (fit.state, fit.served) == ("cancelled", False)
    assert started
    assert all(map(gone, started))


def test_a_fault_ends_its_fit(served: ServedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    async def learn() -> Fit:
        learning = Learning([served], Adopted().adopt, Adopted().refuse)
        monkeypatch.setattr(learning, "_follow", Mock(side_effect=RuntimeError("a secret")))
        fit = await learning.begin(request())
        async with asyncio.timeout(30):
            return [now async for now in learning.changes(fit.id)][-1]

    fit = asyncio.run(learn())
    assert (fit.state, fit.error) == ("failed", "this is a fault of the server: its log has more")


def test_a_process_that_is_killed_is_the_error_of_its_fit(served: ServedBase) -> None:
    async def learn() -> Fit:
        before = children()
        learning = Learning([served], Adopted().adopt, Adopted().refuse)
        fit = await learning.begin(request())
        async for now in learning.changes(fit.id):
            if now.doing == "loading the model":
                for pid in children() - before:
                    os.kill(pid, signal.SIGKILL)
        return fit

    fit = asyncio.run(learn())
    assert (fit.state, fit.served) == ("failed", False)
    assert fit.error is not None
    assert "killed" in fit.error


def test_a_fit_that_takes_too_long_is_ended(served: ServedBase) -> None:
    async def learn() -> Fit:
        learning = Learning([served], Adopted().adopt, Adopted().refuse, seconds=0.3)
        fit = await learning.begin(request())
        async for _ in learning.changes(fit.id):
            pass
        return fit

    before = children()
    fit = asyncio.run(learn())
    assert fit.state == "failed"
    assert fit.error is not None
    assert "fewer texts" in fit.error
    assert all(map(gone, children() - before))


def test_the_process_ends_with_the_one_that_started_it(served: ServedBase) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "ia3.serve.fitting"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    task = {"texts": TEXTS, "labels": LABELS, "model": served.name, "device": "cpu"}
    process.stdin.write(json.dumps(task).encode() + b"\n")
    process.stdin.flush()
    assert json.loads(process.stdout.readline()) == {"doing": "loading the model"}
    began = time.monotonic()
    process.stdin.close()
    assert process.wait(60) == 1
    assert time.monotonic() - began < 60
    process.stdout.close()


def test_what_the_training_raises_is_the_error_of_the_fit(tmp_path: Path) -> None:
    async def learn() -> Fit:
        base: Any = NamedBase(str(tmp_path / "nowhere"))
        learning = Learning([base], Adopted().adopt, Adopted().refuse)
        fit = await learning.begin(request())
        async for _ in learning.changes(fit.id):
            pass
        # Another may be learned now.
        again = await learning.begin(request(name="again"))
        await learning.close()
        assert again.state == "cancelled"
        return fit

    fit = asyncio.run(learn())
    assert fit.state == "failed"
    assert fit.error is not None
    assert "nowhere" in fit.error


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"csv": ""}, BrokenFileError, "the CSV is empty"),
        ({"csv": "text,label\n"}, BrokenFileError, "has no rows"),
        ({"csv": 'text,label\n"open,a\n'}, BrokenFileError, "line 2.*double quote"),
        ({"csv": "text,label\na,b,c\n"}, BrokenFileError, "line 2: 3 values, expected 2"),
        ({"csv": "text,label\na\0,b\n"}, BrokenFileError, "line 2: a NUL byte"),
        ({"csv": "text,label\na,x\ud800\nb,y\n"}, IA3Error, "half of a surrogate pair"),
        ({"csv": "text,label\na,x\nb,\n"}, BrokenFileError, "line 3: the label 'label' is empty"),
        ({"csv": "text,label\na,x\nb,x\n"}, IA3Error, "1 different labels, expected 2"),
        ({"text_column": "words"}, IA3Error, "no column 'words'"),
        ({"label_column": "text"}, IA3Error, "the text and the label at once"),
        ({"csv": "x" * (MOST_CHARACTERS + 1)}, IA3Error, "1,048,577 characters"),
        ({"csv": "text,label\n" + "a,x\nb,y\n" * MOST_ROWS}, IA3Error, "4,000 rows"),
        (
            {"csv": "text,label\n" + "".join(f"a,{n}\n" for n in range(101))},
            IA3Error,
            "101 different labels",
        ),
        ({"base": "minilm"}, UnknownNameError, "expected one of all-minilm"),
        ({"name": "taken"}, StateError, "there is an adapter 'taken'"),
    ],
)
def test_what_cannot_be_learned_is_refused_before_a_process_begins(
    changes: dict[str, Any], kind: type[Exception], said: str
) -> None:
    base: Any = NamedBase("all-minilm")

    async def learn() -> None:
        registry = Adopted({"taken": {}})
        await Learning([base], registry.adopt, registry.refuse).begin(request(**changes))

    before = children()
    with pytest.raises(kind, match=said):
        asyncio.run(learn())
    assert children() == before


def test_what_is_wrong_with_the_texts_is_remarked() -> None:
    base: Any = NamedBase("all-minilm")

    async def learn() -> Fit:
        learning = Learning([base], Adopted().adopt, Adopted().refuse)
        fit = await learning.begin(request(csv=f"{CSV}the quick fox,dog\n"))
        await learning.close()
        return fit

    assert any("the quick fox" in remark for remark in asyncio.run(learn()).remarks)


def test_both_kinds_of_base_models_are_chosen_between() -> None:
    bases: Any = [NamedBase("smol", "language-model"), NamedBase("minilm")]
    learning = Learning(bases, Adopted().adopt, Adopted().refuse)
    _, task = learning._checked(request())
    assert (task.model, task.encoder, task.language_model) == ("auto", "minilm", "smol")
    _, task = learning._checked(request(base="smol"))
    assert (task.model, task.encoder, task.language_model) == ("smol", None, None)
