"""A folder is read as one save left it: beside a writer, after a kill, after other programs."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.kills import moments
from support.tfew import tiny_llama

from ia3 import IA3Config, IA3Error
from ia3.adapter.files import (
    Adapter,
    adapter_files,
    read_adapter,
    unread_adapter,
    write_saved,
)
from ia3.adapter.layout import find_adapters, read_outline, read_vectors
from ia3.errors import BrokenFileError, MissingFileError
from ia3.files.saved import LARGEST_HEAD, SavedFolder, completed, copies

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
TASK = "ia3_task.json"
HEAD = "ia3_head.safetensors"


def numbered(number: int) -> Adapter:
    """Its config's name and its values say the number."""
    config = IA3Config(
        target_modules=["k_proj"],
        feedforward_modules=[],
        base_model_name_or_path=f"number {number}",
    )
    return Adapter(config, {"model.k_proj": torch.full((8, 1), float(number))})


def save(folder: Path, number: int, task: str | None = None) -> None:
    texts = {} if task is None else {TASK: task}
    write_saved(folder, adapter_files(numbered(number), lambda digest: texts))


def state(folder: Path) -> tuple[int, str, bytes | None]:
    """The number that the values say, the name in the config, and the task."""
    with SavedFolder(folder) as saved:
        task = saved.text(TASK)
    adapter = read_adapter(folder)
    assert read_outline(folder).config == adapter.config == IA3Config.from_pretrained(folder)
    values = {int(value) for value in adapter.vectors["model.k_proj"].flatten().tolist()}
    (there,) = read_vectors(read_outline(folder)).values()
    assert {int(value) for value in there.reshape(-1)} == values
    return values.pop(), adapter.config.base_model_name_or_path or "", task


def without_copies(folder: Path) -> None:
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"format": "pt"})


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / PICKLED)
    (folder / WEIGHTS).unlink()


def edited(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": "edited"}))
    (folder / TASK).write_text("edited")


def as_it_is(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    "change",
    [
        as_it_is,
        pytest.param(without_copies, marks=pytest.mark.slow),
        pytest.param(pickled, marks=pytest.mark.slow),
        pytest.param(edited, marks=pytest.mark.slow),
    ],
)
def test_a_kill_leaves_what_was_there_or_what_is_new(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    before, folder = tmp_path / "before", tmp_path / "folder"
    save(before, 1, "labels of 1")
    change(before)
    name, task = ("edited", b"edited") if change is edited else ("number 1", b"labels of 1")
    old, new = (1, name, task), (2, "number 2", None)
    seen = set()

    def put_back() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder)

    put_back()
    assert state(folder) == old
    for _ in moments(lambda: save(folder, 2)):
        found = state(folder)
        seen.add((found, *sorted(p.name for p in folder.iterdir() if p.name[0] != ".")))
        assert found in (old, new)
        assert list(find_adapters(tmp_path)) == [before, folder]
        put_back()
    assert {found for found, *_ in seen} == {old, new}
    assert any(CONFIG not in names for _, *names in seen)
    save(folder, 3)
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]
    assert state(folder) == (3, "number 3", None)


def test_a_kill_leaves_no_folder_or_an_adapter_in_a_new_one(tmp_path: Path) -> None:
    folder = tmp_path / "x" / "new"
    for _ in moments(lambda: save(folder, 1)):
        try:
            assert state(folder) == (1, "number 1", None)
        except MissingFileError:
            assert not (folder / WEIGHTS).exists()
        shutil.rmtree(tmp_path / "x", ignore_errors=True)


def test_a_reader_beside_a_writer_sees_whole_states(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    save(folder, 1, "labels of 1")
    writer = os.fork()
    if not writer:
        for number in range(1, 100_000):
            save(folder, number % 3 + 1, [None, "labels of 2", "labels of 3"][number % 3])
        os._exit(0)
    try:
        seen = set()
        end = time.monotonic() + 60
        while len(seen) < 3 and time.monotonic() < end:
            for _ in range(50):
                with SavedFolder(folder) as saved:
                    content, task = saved.text(CONFIG), saved.text(TASK)
                    value = int(torch.frombuffer(saved.content()[-4:], dtype=torch.float32)[0])
                assert content is not None
                assert json.loads(content)["base_model_name_or_path"] == f"number {value}"
                if value > 1:
                    assert task == f"labels of {value}".encode()
                seen.add(value)
        assert seen == {1, 2, 3}
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
    assert state(folder)[0] in seen


def test_files_replaced_without_end_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    monkeypatch.setattr(SavedFolder, "_is_current", lambda self: False)
    with pytest.raises(BrokenFileError, match="replaces its files again and again"):
        read_adapter(tmp_path)


def test_a_file_that_is_there_counts_and_a_missing_one_is_in_the_header(tmp_path: Path) -> None:
    save(tmp_path, 1, "labels")
    edited(tmp_path)
    assert state(tmp_path) == (1, "edited", b"edited")
    (tmp_path / CONFIG).unlink()
    (tmp_path / TASK).unlink()
    assert state(tmp_path) == (1, "number 1", b"labels")
    assert list(find_adapters(tmp_path)) == [tmp_path]
    without_copies(tmp_path)
    assert list(find_adapters(tmp_path)) == []
    for read in (read_adapter, read_outline, IA3Config.from_pretrained):
        with pytest.raises(FileNotFoundError, match=f"{CONFIG} is not there"):
            read(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"broken")
    assert list(find_adapters(tmp_path)) == []


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    save(tmp_path, 1, "labels")
    (tmp_path / CONFIG).unlink()
    (tmp_path / TASK).unlink()
    (tmp_path / TASK).mkdir()
    os.mkfifo(tmp_path / CONFIG)  # whose reader would wait for a writer
    assert state(tmp_path) == (1, "number 1", b"labels")


def test_what_belonged_to_other_vectors_goes_and_what_is_a_persons_stays(tmp_path: Path) -> None:
    save(tmp_path, 1, "labels")
    torch.save({"a": torch.ones(1)}, tmp_path / PICKLED)
    (tmp_path / "README.md").write_text("mine")
    save(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    assert state(tmp_path) == (2, "number 2", None)


def test_a_persons_card_outlives_a_kill(tmp_path: Path) -> None:
    """No header has a copy of it, and what a killed writer has moved away is removed."""
    card = tmp_path / "README.md"
    save(tmp_path, 1)
    card.write_text("mine")
    files = {**adapter_files(numbered(2)), card.name: b"completed, and mine"}
    for _ in moments(lambda: write_saved(tmp_path, files)):
        assert card.read_text().endswith("mine")
        save(tmp_path, 1)
        card.write_text("mine")


def test_files_that_no_header_can_hold_are_not_copied_into_it(tmp_path: Path) -> None:
    """The adapter could not be read any more after a kill."""
    save(tmp_path, 1)
    without_copies(tmp_path)
    (tmp_path / HEAD).write_bytes(b"x" * (LARGEST_HEAD + 1))
    assert copies(tmp_path).keys() == {"ia3_config"}
    (tmp_path / HEAD).write_bytes(b"x" * LARGEST_HEAD)
    whole = completed(tmp_path)
    assert whole is not None
    (tmp_path / WEIGHTS).write_bytes(whole)
    (tmp_path / HEAD).unlink()
    with SavedFolder(tmp_path) as saved:
        assert saved.text(HEAD) == b"x" * LARGEST_HEAD
    # Beside a head of that size a config of many names has no place left.
    without_copies(tmp_path)
    (tmp_path / HEAD).write_bytes(b"x" * LARGEST_HEAD)
    (tmp_path / TASK).write_bytes(b"x" * 2_000_000)
    assert completed(tmp_path) is None
    pickled(tmp_path)
    save(tmp_path, 2)
    assert state(tmp_path) == (2, "number 2", None)


def test_pefts_save_over_ours_counts(tmp_path: Path) -> None:
    save(tmp_path, 1)
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    theirs = peft.get_peft_model(tiny_llama(), config)
    theirs.save_pretrained(tmp_path)
    names = {name.removeprefix("model.") for name in read_adapter(tmp_path).vectors}
    assert len(names) == 2
    assert read_outline(tmp_path).config.base_model_name_or_path != "number 1"
    # And ours over theirs is read by PEFT.
    save_over = read_adapter(tmp_path)
    write_saved(tmp_path, adapter_files(save_over))
    assert peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).peft_config


def test_a_file_that_is_written_into_while_it_is_read(tmp_path: Path) -> None:
    """As other programs save over an adapter: the file stays the same one."""
    save(tmp_path, 1)
    without_copies(tmp_path)
    path = tmp_path / WEIGHTS
    os.utime(path, (1, 1))
    content = path.read_bytes()
    with SavedFolder(tmp_path) as saved:
        adapter = unread_adapter(saved)
        path.write_bytes(content[:-4] + bytes(4))
        with pytest.raises(BrokenFileError, match="was written to while it was read"):
            adapter.whole()


def test_a_vector_file_replaced_between_outline_and_values(tmp_path: Path) -> None:
    save(tmp_path, 1)
    outline = read_outline(tmp_path)
    save(tmp_path, 2)
    assert read_vectors(outline)["model.k_proj"].max() == 2
    other = numbered(3)
    other.vectors = {"model.k_proj": torch.ones(4, 1)}
    write_saved(tmp_path, adapter_files(other))
    with pytest.raises(IA3Error, match="another adapter's than it was"):
        read_vectors(outline)
