"""Adapters of ten thousand vectors and names: in the time of ten thousand, not of their square."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ia3 import IA3Config
from ia3.adapter.combining import combine
from ia3.adapter.files import Adapter, adapter_files, read_adapter, renamed
from ia3.adapter.layout import mapped, name_tensors, read_outline
from ia3.errors import BrokenFileError, IA3Error

COUNT = 10_000
NAMES = [f"layers.{i // 100}.experts.{i % 100}.down_proj" for i in range(COUNT)]


def many() -> Adapter:
    """All names in both lists, and frozen values."""
    config = IA3Config(target_modules=NAMES, feedforward_modules=NAMES)
    vectors = {name: torch.full((1, 2), 1.5) for name in NAMES}
    return Adapter(config, vectors, frozen=dict.fromkeys(NAMES, ((0, 1),)))


def test_reading_renaming_and_combining(tmp_path: Path) -> None:
    start = time.process_time()
    for name, content in adapter_files(many()).items():
        (tmp_path / name).write_bytes(content)
    assert len(read_outline(tmp_path).shapes) == COUNT
    read = read_adapter(tmp_path)
    assert read.vectors.keys() == {*NAMES}
    new = renamed(read, {name: f"model.{name}x" for name in NAMES})
    assert new.config.feedforward_modules == {f"model.{name}x" for name in NAMES}
    both = combine([("one", read), ("other", many())], [0.5, 0.5])
    assert both.vectors[NAMES[-1]].tolist() == [[1.0, 1.5]]
    saved = IA3Config(target_modules=["k"], feedforward_modules=[], modules_to_save=NAMES[:1000])
    with pytest.raises(IA3Error, match=r"'layers\.0\..* which is part of 'layers\.0\."):
        combine([("one", read), ("other", Adapter(saved, {}))], [1, 1])
    assert time.process_time() - start < 60


def test_names_of_copies() -> None:
    """Each was compared with a copy of the set of all."""
    config = IA3Config(modules_to_save=["head"])
    keys = [f"base_model.model.part{i}.head.weight" for i in range(50_000)]
    again = [key.replace(".weight", ".modules_to_save.weight") for key in keys]
    start = time.process_time()
    _, copies = name_tensors([*keys, *again], config, Path("a"))
    assert list(copies) == keys
    assert time.process_time() - start < 20


def test_a_tensors_name_of_a_hundred_thousand_characters(tmp_path: Path) -> None:
    key = f"base_model.model.{'a.' * 50_000}ia3_l"
    save_file({key: torch.ones(2, 1)}, tmp_path / "adapter_model.safetensors")
    IA3Config(target_modules=["a"], feedforward_modules=[]).save_pretrained(tmp_path)
    for read in (read_adapter, read_outline):
        with pytest.raises(BrokenFileError, match="a tensor's name has 100,022 characters"):
            read(tmp_path)


@pytest.mark.parametrize(
    "mapping", [{"(": "a"}, {"layers": r"\g<x>"}, {"layers": r"\5"}, {"layers": 3}, {3: "a"}]
)
def test_replacements_that_are_malformed(mapping: Any) -> None:
    with pytest.raises(IA3Error, match=r"key_mapping .* is malformed"):
        mapped("layers.0.down_proj", mapping)
