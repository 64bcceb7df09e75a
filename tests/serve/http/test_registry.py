"""The adapters of a folder: what is listed, taken up, replaced and removed."""

from __future__ import annotations

import json
import os
import shutil
import time

import pytest

pytest.importorskip("fastapi")

from safetensors import safe_open
from safetensors.torch import load_file, save
from support.served import TEXTS, files_of

import ia3
from ia3.errors import BrokenFileError, IA3Error, StateError, UnknownNameError
from ia3.serve.http.keys import Access
from ia3.serve.http.registry import Registry, bases_named


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made.adapters, tmp_path / "adapters")


@pytest.fixture
def registry(folder, bases):
    registry = Registry(folder, bases)
    yield registry
    for name in [each.name for each in registry.list()]:
        registry.delete(name)
    assert not [name for base in bases for name in base.bank.names()]


def looked_at(registry):
    registry.look(60)
    return registry


def answer(registry, name, text=TEXTS[0]):
    served = registry.find(name)
    registry.use(served)
    (found,) = ia3.classify(served.base.bank, [text], [name], tokenizer=served.base.base.tokenizer)
    return found.probabilities


def names(registry):
    return [each.name for each in registry.list()]


def test_a_start_reads_configs_and_loads_nothing(registry, bases):
    # The one that is cut is not known yet; one of another base model is.
    assert names(registry) == ["cut", "later", "plain", "sorted", "tickets"]
    assert registry.skipped().keys() == {"stranger"}
    assert not any(len(base.bank) for base in bases)
    assert registry.find("later").labels is None
    looked_at(registry)
    assert registry.skipped().keys() == {"cut", "stranger"}
    assert registry.find("later").labels == ["billing", "delivery"]
    assert not any(len(base.bank) for base in bases)
    with pytest.raises(
        StateError, match=r"'cut' cannot be used: cut/adapter_model\.safetensors is"
    ):
        registry.find("cut")


def test_thousands_of_adapters_are_listed_in_seconds(folder, made, bases):
    for number in range(2000):
        copied = folder / f"copied-{number}"
        copied.mkdir()
        for path in (made.adapters / "later").iterdir():
            os.link(path, copied / path.name)
    began = time.monotonic()
    registry = Registry(folder, bases)
    # Half a second; reading their files takes ten.
    assert time.monotonic() - began < 8
    assert len(registry) == 2005
    assert bases_named(folder)[0] == made.model
    with pytest.raises(UnknownNameError, match=r"no adapter 'copied-x' here$"):
        registry.find("copied-x")  # in the event loop, where comparing them all would take long
    registry.use(registry.find("copied-1999"))
    assert bases[0].bank.names() == ["copied-1999"]
    bases[0].bank.remove("copied-1999")


def test_the_models_of_a_folder_are_those_that_its_adapters_name(folder, made, tmp_path):
    found = bases_named(folder)
    assert found[0] == made.model
    assert made.encoder in found
    assert {"smollm2-135m-instruct", "all-minilm-l6-v2"} >= {*bases_named(tmp_path / "none")}


def test_a_name_is_looked_up_among_those_that_may_be_used(registry):
    some = Access(frozenset({"later", "cut"}))
    assert registry.find("later", some).name == "later"
    for name in ("tickets", "laterr", "stranger"):
        with pytest.raises(UnknownNameError) as raised:
            registry.find(name, some)
        assert "tickets" not in str(raised.value).replace(repr(name), "")
    assert [each.name for each in registry.list(some)] == ["cut", "later"]
    assert registry.base_named("later") is None


def test_an_adapter_may_move_to_another_base_model(registry, folder):
    looked_at(registry)
    tickets, sorted_ = files_of(folder / "tickets"), files_of(folder / "sorted")
    expected = [answer(registry, name) for name in ("tickets", "sorted")]
    registry.put("moving", tickets)
    assert answer(registry, "moving") == pytest.approx(expected[0], abs=1e-6)
    served = registry.put("moving", sorted_)
    assert served.base.kind == "encoder"
    assert answer(registry, "moving") == pytest.approx(expected[1], abs=1e-6)
    # What belonged to the other kind is gone.
    registry.put("moving", tickets)
    assert not (folder / "moving/ia3_head.safetensors").exists()
    assert answer(registry, "moving") == pytest.approx(expected[0], abs=1e-6)


def test_what_was_uploaded_is_there_after_a_new_start(registry, folder, bases):
    registry.put("kept", files_of(folder / "later"))
    before = answer(registry, "kept")
    bases[0].bank.remove("kept")
    again = Registry(folder, bases)
    assert answer(again, "kept") == before
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_refused_upload_leaves_folder_and_bank_as_they_were(registry, folder, bases):
    good = files_of(folder / "later")
    before = answer(registry, "later")
    listed = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    in_bank = [base.bank.names() for base in bases]
    wrong = {
        "adapter_model.safetensors": good["adapter_model.safetensors"][:-1],
        "adapter_config.json": b"[]",
        "ia3_task.json": b"\xff",
    }
    for name, content in wrong.items():
        for target in ("later", "new"):
            with pytest.raises(BrokenFileError):
                registry.put(target, {**good, name: content})
    with pytest.raises(IA3Error, match="its base model is"):
        registry.put("later", files_of(folder / "stranger"))
    with pytest.raises(StateError, match="'later' already"):
        registry.put("later", good, replace=False)
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == listed
    assert [base.bank.names() for base in bases] == in_bank
    assert answer(registry, "later") == before


def test_a_base_model_of_a_name_that_no_file_can_have_is_refused(registry, folder):
    files = files_of(folder / "plain")
    config = {**json.loads(files["adapter_config.json"]), "base_model_name_or_path": "a" * 3000}
    files["adapter_config.json"] = json.dumps(config).encode()
    with pytest.raises(IA3Error, match="its base model is"):
        registry.put("new", files)


def test_an_upload_from_another_model_of_the_same_name_changes_nothing(registry, folder):
    before, held = answer(registry, "later"), files_of(folder / "later")
    # Its header says what the model's weights were.
    weights = "adapter_model.safetensors"
    tensors = load_file(folder / "stranger" / weights)
    with safe_open(folder / "stranger" / weights, "pt") as file:
        said = {"format": "pt", "ia3_base_model": file.metadata()["ia3_base_model"]}
    wrong = {"adapter_config.json": held["adapter_config.json"], weights: save(tensors, said)}
    for name in ("later", "new"):
        with pytest.raises(IA3Error, match="it was fitted on another model than"):
            registry.put(name, wrong)
    assert files_of(folder / "later") == held
    assert not (folder / "new").exists()
    assert answer(registry, "later") == before


def test_a_folder_that_holds_no_adapter_is_not_removed(registry, folder):
    (folder / "notes").mkdir()
    (folder / "notes/mine.txt").write_text("mine")
    assert "no adapter in notes" in registry.reload().failed["notes"]
    with pytest.raises(StateError, match="something else than an adapter"):
        registry.delete("notes")
    assert (folder / "notes/mine.txt").read_text() == "mine"


def test_a_folder_that_holds_something_else_is_neither_written_into_nor_removed(registry, folder):
    (folder / "theses").mkdir()
    (folder / "theses/mine.txt").write_text("years of work")
    for listed in (False, True):
        assert ("theses" in registry.skipped()) == listed
        with pytest.raises(StateError, match="something else than an adapter"):
            registry.put("theses", files_of(folder / "later"))
        with pytest.raises(StateError if listed else UnknownNameError):
            registry.delete("theses")
        registry.reload()
    assert [path.name for path in (folder / "theses").iterdir()] == ["mine.txt"]
    (folder / "theses/mine.txt").unlink()
    registry.put("theses", files_of(folder / "later"))
    assert answer(registry, "theses") == answer(registry, "later")


def test_links_that_lead_nowhere_are_passed_over(registry, folder, bases):
    for name in ("itself", "nowhere"):
        (folder / name).symlink_to(name if name == "itself" else folder / "none")
    assert registry.reload().added == []
    assert names(Registry(folder, bases)) == names(registry)


def test_a_link_is_removed_and_not_what_it_leads_to(registry, folder, made):
    (folder / "linked").symlink_to(made.adapters / "later")
    assert registry.reload().added == ["linked"]
    registry.delete("linked")
    assert not (folder / "linked").is_symlink()
    assert (made.adapters / "later/adapter_config.json").exists()
    assert [name for name in os.listdir(folder) if name.startswith(".")] == []


def test_what_killed_servers_left_is_removed_at_the_next_start(registry, folder, bases):
    left = folder / ".later.ia3-0123456789ab"
    shutil.copytree(folder / "later", left / "adapter")
    other = folder / ".cache"
    other.mkdir()
    assert ".later" not in str(names(Registry(folder, bases)))
    assert not left.exists()
    assert other.exists()


def test_files_that_were_broken_and_mended_are_taken_up(registry, folder):
    looked_at(registry)
    before = answer(registry, "later")
    path = folder / "later/adapter_model.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    changed = registry.reload()
    assert "are not those that were saved" in changed.failed["later"]
    with pytest.raises(StateError):
        registry.find("later")
    path.write_bytes(good)
    assert registry.reload().added == ["later"]
    assert answer(registry, "later") == before
