"""A disk that is full, or may not be written: an `OSError` that names the file, and no change."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from adapter.test_convert import vectors_of
from classify.test_fit_many import BILLS, tiny_classifier
from support.disks import full_disk, readable_folder, refused_where_read_only
from support.tfew import random_model, tiny_llama
from transformers import T5Config

from ia3 import FewShotClassifier, IA3Config, IA3Model, fit_many
from ia3.cli import app
from ia3.files.atomic import write_file
from ia3.files.records import append_record

SIZES = {"vocab_size": 48, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 2}
T5 = T5Config(**SIZES, feed_forward_proj="gated-gelu", tie_word_embeddings=False)


@cache
def fitted(steps: int) -> FewShotClassifier:
    return tiny_classifier(steps=steps).fit(*BILLS)


def save_pretrained(folder: Path) -> None:
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    IA3Model(tiny_llama(), config).save_pretrained(folder / "c")


def fit(folder: Path) -> None:
    tiny_classifier(steps=1).fit(*BILLS, checkpoints=folder / "checkpoints")


def many(folder: Path) -> None:
    fit_many({"a": BILLS, "b": BILLS}, tiny_classifier(steps=1), out=folder / "many")


def command(*arguments: object) -> None:
    app([str(argument) for argument in arguments], standalone_mode=False)


def convert(folder: Path) -> None:
    command("convert", folder / "t.pt", "--model", folder / "t5", "--out", folder / "c", "--force")


def combine(folder: Path) -> None:
    command("combine", folder / "c", folder / "d", "--out", folder / "c", "--force")


# What is written, and into what.
WORK: dict[str, tuple[Callable[[Path], object], str]] = {
    "save": (lambda folder: fitted(3).save(folder / "c"), "c"),
    "save, new folder": (lambda folder: fitted(3).save(folder / "x" / "y"), "x"),
    "save_pretrained": (save_pretrained, "c"),
    "fit": (fit, "checkpoints"),
    "fit-many": (many, "many"),
    "convert": (convert, "c"),
    "combine": (combine, "c"),
    "append_record": (lambda f: append_record(f / "r.jsonl", {"a": "x" * 2000}), "r.jsonl"),
    "write_file": (lambda folder: write_file(folder / "t.pt", b"x" * 2000), "t.pt"),
}


@pytest.fixture
def place():
    with readable_folder() as folder:
        fitted(0).save(folder / "c")
        fitted(3).save(folder / "d")
        T5.save_pretrained(folder / "t5")
        torch.save(vectors_of(random_model(T5)), folder / "t.pt")
        append_record(folder / "r.jsonl", {"a": 1})
        # What a run, or a call before, has left.
        for empty in ("checkpoints", "many"):
            (folder / empty).mkdir()
        yield folder


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.mark.parametrize(("work", "into"), WORK.values(), ids=WORK)
def test_a_full_disk(place, work, into):
    before = contents(place)
    with full_disk(200), pytest.raises(OSError) as raised:
        work(place)
    assert raised.value.filename.startswith(str(place / into))
    assert ".ia3-" not in str(raised.value)
    assert contents(place) == before


@pytest.mark.parametrize(("work", "into"), WORK.values(), ids=WORK)
def test_what_may_not_be_written(place, work, into):
    before = contents(place)
    error = refused_where_read_only(place, lambda: work(place))
    assert isinstance(error, PermissionError)
    assert contents(place) == before
    assert str(error.filename).startswith(str(place if into == "x" else place / into))
    assert ".ia3-" not in str(error)
