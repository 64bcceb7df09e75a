"""A saved classifier is read whole: labels never beside the vectors of other labels."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.kills import moments
from support.paths import TESTS
from support.saved import WORDS, formula_llama
from support.tfew import word_tokenizer

from ia3 import FewShotClassifier, IA3Model
from ia3.errors import BrokenFileError

TASK = "ia3_task.json"
WEIGHTS = "adapter_model.safetensors"
MODEL, TOKENIZER = formula_llama(), word_tokenizer(WORDS)


def load(folder: Path) -> FewShotClassifier:
    return FewShotClassifier.load(folder, model=MODEL, tokenizer=TOKENIZER)


def numbered(number: int) -> FewShotClassifier:
    """A classifier whose labels and values say the number."""
    classifier = load(TESTS / "fixtures" / "saved-0.1.0" / "classifier")
    classifier.classes_ = np.array([f"{number} neg", f"{number} pos"])
    for vector in classifier.adapter_.vectors.values():
        vector.fill_(number)
    return classifier


def state(folder: Path) -> tuple[str, float]:
    """What the labels say, and the values."""
    read = load(folder)
    (value,) = {v for vector in read.adapter_.vectors.values() for v in vector.flatten().tolist()}
    return str(read.classes_[0]), value


OF_1, OF_2 = ("1 neg", 1.0), ("2 neg", 2.0)


def test_a_kill_leaves_the_old_classifier_or_the_new_one(tmp_path: Path) -> None:
    before, folder = tmp_path / "before", tmp_path / "folder"
    numbered(1).save(before)
    new = numbered(2)
    new.base  # noqa: B018 (loaded before the processes are forked)
    shutil.copytree(before, folder)
    seen = set()
    for _ in moments(lambda: new.save(folder)):
        seen.add(state(folder))
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
    assert seen == {OF_1, OF_2}
    new.save(folder)
    assert len(list(folder.iterdir())) == 3


def test_a_reader_beside_a_writer_loads_one_classifier(tmp_path: Path) -> None:
    first, second = numbered(1), numbered(2)
    first.save(tmp_path)
    second.base  # noqa: B018
    writer = os.fork()
    if not writer:
        while True:
            second.save(tmp_path)
            first.save(tmp_path)
    try:
        seen: set[tuple[str, float]] = set()
        end = time.monotonic() + 60
        while time.monotonic() < end and seen != {OF_1, OF_2}:
            seen |= {state(tmp_path) for _ in range(50)}
        assert seen == {OF_1, OF_2}
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
    assert state(tmp_path) in (OF_1, OF_2)


def test_vectors_that_another_program_put_there_are_found(tmp_path: Path) -> None:
    numbered(1).save(tmp_path)
    path = tmp_path / WEIGHTS
    values = load_file(path)
    # As PEFT writes it, without a word about the task.
    save_file(values, path, {"format": "pt"})
    assert state(tmp_path) == OF_1
    save_file({key: value + 1 for key, value in values.items()}, path, {"format": "pt"})
    with pytest.raises(BrokenFileError, match=r"another program has replaced.*remove 'vectors'"):
        load(tmp_path)
    # As the message says, and as earlier versions wrote it.
    task = json.loads((tmp_path / TASK).read_text())
    del task["vectors"]
    (tmp_path / TASK).write_text(json.dumps(task))
    assert state(tmp_path) == ("1 neg", 2.0)


def test_a_task_file_beside_is_read_and_a_missing_one_is_in_the_header(tmp_path: Path) -> None:
    numbered(1).save(tmp_path)
    task = json.loads((tmp_path / TASK).read_text())
    (tmp_path / TASK).write_text(json.dumps({**task, "labels": ["other neg", "other pos"]}))
    assert state(tmp_path) == ("other neg", 1.0)
    (tmp_path / TASK).unlink()
    assert state(tmp_path) == OF_1


def test_an_adapter_saved_over_a_classifier_is_none(tmp_path: Path) -> None:
    numbered(1).save(tmp_path)
    model = IA3Model.from_pretrained(formula_llama(), tmp_path)
    with torch.no_grad():
        for vector in model.vectors("default").values():
            vector.mul_(2)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / TASK).exists()
    with pytest.raises(FileNotFoundError, match="no classifier"):
        load(tmp_path)
