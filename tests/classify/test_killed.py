"""Killed between any two calls that change files, a folder holds the old state or the new one."""

import itertools
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from classify.test_fit_many import BILLS, MODEL, MOODS, TOKENIZER, moods, tiny_classifier
from safetensors.torch import load_file, save_file
from support import heads
from support.kills import ended, killed_before, started
from support.tfew import tiny_llama

from ia3 import FewShotClassifier, IA3Config, IA3Model
from ia3.adapter.files import Adapter, read_adapter

pytestmark = pytest.mark.slow


def classifier(make: Callable[..., FewShotClassifier], data: Any, seed: int) -> FewShotClassifier:
    """Labels, words, settings and vectors of its own."""
    fitted = make(steps=0, seed=seed).fit(*data)
    generator = torch.Generator().manual_seed(seed)
    for vector in fitted.adapter_.vectors.values():
        vector.copy_(torch.rand(vector.shape, generator=generator) + 0.5)
    return fitted


def in_adapter(adapter: Adapter) -> Any:
    values = {name: vector.flatten().tolist() for name, vector in adapter.vectors.items()}
    return adapter.config.to_json(), values


def in_classifier(folder: Path) -> Any:
    """All that predictions depend on; `None` where there is no classifier."""
    try:
        loaded = FewShotClassifier.load(folder, model=MODEL, tokenizer=TOKENIZER)
    except FileNotFoundError:
        return None
    said = loaded.classes_.tolist(), loaded.choices_, loaded.templates_, loaded.fields_
    return said, loaded.settings_, in_adapter(loaded.adapter_)


def state(folder: Path) -> Any:
    return in_classifier(folder), in_adapter(read_adapter(folder))


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def check_all_gaps(
    folder: Path,
    before: Callable[[Path], object],
    save: Callable[[Path], object],
    state: Callable[[Path], object] = state,
) -> None:
    """After each kill the old or the new state; the next save leaves nothing else behind."""
    above = folder.parent
    before(folder)
    old = state(folder)
    save(folder)
    new, clean = state(folder), names(above)
    assert old != new
    seen = [old]
    for call in itertools.count(1):
        shutil.rmtree(folder)
        before(folder)
        if not killed_before(call, partial(save, folder)):
            break
        seen.append(state(folder))
        assert seen[-1] in (old, new), f"before call {call}"
        save(folder)
        assert state(folder) == new
        assert names(above) == clean
    # Old up to a moment, and new from then on.
    kept = seen.count(old)
    assert 1 < kept < len(seen)
    assert seen == [old] * kept + [new] * (len(seen) - kept)


def test_saving_over_another_classifier(tmp_path):
    old, new = classifier(tiny_classifier, BILLS, 1), classifier(moods, MOODS, 2)
    check_all_gaps(tmp_path / "folder", old.save, new.save)


def test_saving_an_adapter_of_other_sites_over_a_classifier(tmp_path):
    old = classifier(tiny_classifier, BILLS, 1)
    model = IA3Model(tiny_llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    check_all_gaps(tmp_path / "folder", old.save, model.save_pretrained)


def of_any_engine(folder: Path) -> Any:
    """The state of a classifier, and of its adapter."""
    try:
        return heads.state(folder), in_adapter(read_adapter(folder))
    except FileNotFoundError:
        return None, in_adapter(read_adapter(folder))


def encoder(number: int) -> Callable[[Path], None]:
    return lambda folder: heads.save_encoder(folder, number)


def test_saving_an_encoders_classifier_over_another(tmp_path):
    check_all_gaps(tmp_path / "folder", encoder(1), encoder(2), of_any_engine)


@pytest.mark.parametrize("to_encoder", [True, False])
def test_saving_over_a_classifier_of_the_other_engine(tmp_path, to_encoder):
    both = [encoder(2), classifier(tiny_classifier, BILLS, 1).save]
    old, new = both[::-1] if to_encoder else both
    check_all_gaps(tmp_path / "folder", old, new, of_any_engine)
    assert (heads.HEAD_NAME in names(tmp_path / "folder")) == to_encoder


def test_saving_an_adapter_over_an_encoders_classifier_without_copies(tmp_path):
    """As another program writes the vectors again, without the metadata."""
    model = IA3Model(tiny_llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))

    def before(folder: Path) -> None:
        heads.save_encoder(folder, 1)
        path = folder / "adapter_model.safetensors"
        save_file(load_file(path), path, {"format": "pt"})

    check_all_gaps(tmp_path / "folder", before, model.save_pretrained, of_any_engine)
    assert heads.HEAD_NAME not in names(tmp_path / "folder")


def test_a_reader_beside_a_writer_of_both_engines(tmp_path):
    each = [encoder(1), classifier(tiny_classifier, BILLS, 1).save, encoder(2), encoder(3)]
    whole = []
    for save in each:
        save(tmp_path)
        whole.append(of_any_engine(tmp_path))

    def write() -> None:
        while True:
            for save in each:
                save(tmp_path)

    writer = started(write)
    try:
        for _ in range(200):
            assert of_any_engine(tmp_path)[0] in [both[0] for both in whole]
    finally:
        os.kill(writer, signal.SIGKILL)
        assert ended(writer) == -signal.SIGKILL


def test_a_reader_beside_a_writer_loads_whole_classifiers(tmp_path):
    both = [classifier(tiny_classifier, BILLS, 1), classifier(moods, MOODS, 2)]
    whole = []
    for each in both:
        each.save(tmp_path)
        whole.append(in_classifier(tmp_path))

    def write() -> None:
        while True:
            for each in both:
                each.save(tmp_path)

    writer = started(write)
    try:
        for _ in range(100):
            assert in_classifier(tmp_path) in whole
    finally:
        os.kill(writer, signal.SIGKILL)
        assert ended(writer) == -signal.SIGKILL


def test_of_several_writers_one_wins_whole(tmp_path):
    each = [
        classifier(moods if n % 2 else tiny_classifier, MOODS if n % 2 else BILLS, n)
        for n in range(3)
    ]
    whole = []
    for number, one in enumerate(each):
        one.save(tmp_path / f"{number}")
        whole.append(state(tmp_path / f"{number}"))

    def write(one: FewShotClassifier) -> None:
        for _ in range(8):
            one.save(tmp_path / "above" / "folder")

    assert [ended(w) for w in [started(partial(write, one)) for one in each]] == [0, 0, 0]
    assert state(tmp_path / "above" / "folder") in whole
    assert names(tmp_path / "above" / "folder") == names(tmp_path / "0")
    assert names(tmp_path / "above") == ["folder", *(f"folder/{n}" for n in names(tmp_path / "0"))]
