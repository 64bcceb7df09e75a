"""The bank: adapters from files and memory, as rows; what becomes of files that change."""

import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.architectures import VOCABULARY, batch, build
from support.pairs import logits, randomize, vectors

import ia3
from ia3 import AdapterBank, IA3Error
from ia3.bank.bank import Refreshed, _after_fork, _before_fork

BASE = "__base__"
WEIGHTS = "adapter_model.safetensors"

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning"),
]


def write(folder, seed, kind="llama", **config):
    """An adapter of random vectors, in a folder of its own."""
    model = ia3.get_peft_model(build(kind), ia3.IA3Config(**config))
    randomize(vectors(model), seed)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Eight adapters of the tiny LLaMA; those with even numbers have other sites."""
    root = tmp_path_factory.mktemp("adapters")
    other = {"target_modules": ["q_proj", "v_proj"], "feedforward_modules": []}
    return {f"a{i}": write(root / f"a{i}", i, **(other if i % 2 == 0 else {})) for i in range(8)}


def bank_of(folders, dtype=torch.float32, **options) -> AdapterBank:
    bank = AdapterBank(build("llama", dtype), **options)
    for name, folder in folders.items():
        bank.add(name, folder)
    return bank


def rows_of(count):
    ids = torch.randint(3, VOCABULARY, (count, 7), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def expected(written, names, dtype=torch.float32):
    """Each row with its adapter, loaded on a model of its own, active."""
    inputs = rows_of(len(names))
    whole = {}
    for name in set(names):
        base = build("llama", dtype)
        model = base if name == BASE else ia3.IA3Model.from_pretrained(base, written[name])
        whole[name] = logits(model, **inputs)
    return torch.stack([whole[name][row] for row, name in enumerate(names)])


def assert_rows(bank, written, names, **options):
    found = logits(bank.model, **rows_of(len(names)), adapter_names=names)
    assert torch.equal(found, expected(written, names, **options)), names


def resident(bank: AdapterBank) -> set[str]:
    return {each.name for each in bank.list() if each.resident}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_different_adapters(written, dtype):
    bank = bank_of(written, dtype, capacity=8)
    for names in (list(written), ["a3", BASE, "a3", "a0"], ["a1"], [BASE, BASE]):
        assert_rows(bank, written, names, dtype=dtype)
    assert [each.name for each in bank.list()] == list(written)
    assert bank.list()[2].source == written["a2"]
    # A row is all values of its adapter, and ones elsewhere.
    assert bank.values.shape == (9, 2 * (16 + 16 + 48 + 32))
    assert len(bank) == 8


def test_half_precision_rows_are_rounded_once(written):
    bank = AdapterBank(build("llama"), dtype=torch.bfloat16)
    bank.add("a1", written["a1"])
    model = ia3.IA3Model.from_pretrained(build("llama"), written["a1"])
    for vector in vectors(model).values():
        vector.data.copy_(vector.bfloat16())
    found = logits(bank.model, **rows_of(2), adapter_names=["a1", "a1"])
    assert torch.equal(found, logits(model, **rows_of(2)))


def test_a_bank_beside_a_models_own_adapters(written):
    model = ia3.IA3Model.from_pretrained(build("llama"), written["a1"], "own")
    bank = AdapterBank(model)
    bank.add("a2", written["a2"])
    bank.add("memory", model.adapter("own"))
    all_of_them = {**written, "own": written["a1"], "memory": written["a1"]}
    for names in (["own", "a2", BASE], ["a2", "memory"], ["own", "own"]):
        assert_rows(bank, all_of_them, names)
    # Trained beside those of the bank, which are not.
    model.set_adapter("own")
    inputs = rows_of(3)
    model(**inputs, adapter_names=["own", "a2", BASE]).logits.square().sum().backward()
    found = {name: vector.grad.clone() for name, vector in vectors(model, "own").items()}
    model.zero_grad()
    model(**{k: v[:1] for k, v in inputs.items()}).logits.square().sum().backward()
    for name, vector in vectors(model, "own").items():
        torch.testing.assert_close(found[name], vector.grad, rtol=1e-4, atol=1e-5)
    # Without an adapter of its own the bank's still have their places.
    model.delete_adapter("own")
    assert_rows(bank, all_of_them, ["a2", "memory", BASE])


def test_what_is_in_memory_is_a_copy(written):
    model = ia3.IA3Model.from_pretrained(build("llama"), written["a1"], "own")
    bank = AdapterBank(model, capacity=1)
    bank.add("memory", model.adapter("own"))
    randomize(vectors(model, "own"), seed=99)
    bank.add("a3", written["a3"])
    assert_rows(bank, {**written, "memory": written["a1"]}, ["memory", "memory"])
    assert_rows(bank, written, ["a3", BASE])
    assert_rows(bank, {**written, "memory": written["a1"]}, ["memory", BASE])


def test_generation_keeps_the_rows_it_began_with(written):
    bank = bank_of({name: written[name] for name in ("a1", "a3")})
    inputs = rows_of(2)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    wanted = bank.model.generate(**inputs, **options, adapter_names=["a1", "a3"])

    def remove(*_):
        if "a3" in bank:
            bank.remove("a3")
            bank.add("a5", written["a5"])  # into its slot

    handle = bank.model.get_base_model().register_forward_hook(remove)
    found = bank.model.generate(**inputs, **options, adapter_names=["a1", "a3"])
    handle.remove()
    assert "a3" not in bank
    assert torch.equal(found, wanted)


def test_files_of_peft_and_fused_layers(tmp_path):
    theirs = peft.get_peft_model(build("llama"), peft.IA3Config(task_type="CAUSAL_LM"))
    randomize(vectors(theirs))
    theirs.save_pretrained(tmp_path / "peft")
    half, some = write(tmp_path / "half", 3), write(tmp_path / "some", 4)
    narrow = {half: lambda name, v: v.bfloat16(), some: lambda n, v: v.half() if "k_" in n else v}
    for folder, change in narrow.items():
        tensors = load_file(folder / WEIGHTS)
        save_file({n: change(n, value) for n, value in tensors.items()}, folder / WEIGHTS)
    bank = AdapterBank(build("llama"))
    bank.model.fuse_mlp()
    folders = {"peft": tmp_path / "peft", "narrow": half, "some": some}
    for name, folder in folders.items():
        bank.add(name, folder)
    names = ["peft", "narrow", BASE, "some"]
    found = logits(bank.model, **rows_of(4), adapter_names=names)
    torch.testing.assert_close(found, expected(folders, names), rtol=1e-5, atol=1e-5)


def test_frozen_values_are_ones(tmp_path):
    model = ia3.get_peft_model(build("gpt2"), ia3.IA3Config(paper_sites=True))
    assert model.adapter("default").frozen  # queries stand before keys and values
    randomize(vectors(model))
    model.save_pretrained(tmp_path / "a")
    bank = AdapterBank(build("gpt2"))
    bank.add("file", tmp_path / "a")
    bank.add("memory", model.adapter("default"))
    inputs = batch("gpt2")
    for name in ("file", "memory"):
        found = logits(bank.model, **inputs, adapter_names=[name] * 3)
        assert torch.equal(found, logits(model, **inputs))


def test_the_least_recently_used_makes_room(written):
    bank = bank_of(written, capacity=3)
    assert resident(bank) == {"a0", "a1", "a2"}
    assert_rows(bank, written, ["a0", "a5"])
    assert resident(bank) == {"a0", "a2", "a5"}
    bank.pin("a2")
    assert_rows(bank, written, ["a6", "a7"])
    assert resident(bank) == {"a2", "a6", "a7"}
    bank.unpin("a2")
    assert_rows(bank, written, ["a7", "a6", "a1"])
    assert resident(bank) == {"a1", "a6", "a7"}
    bank.remove("a6")
    assert resident(bank) == {"a1", "a7"}
    assert_rows(bank, written, ["a2", "a7"])
    assert resident(bank) == {"a1", "a2", "a7"}


def test_a_batch_that_has_no_room_is_refused(written):
    bank = bank_of(written, capacity=2)
    with pytest.raises(IA3Error, match=r"no room for adapter 'a3': of 2 slots 0 are pinned and 2"):
        logits(bank.model, **rows_of(3), adapter_names=["a1", "a2", "a3"])
    bank.pin("a0")
    bank.pin("a1")
    with pytest.raises(IA3Error, match="of 2 slots 2 are pinned"):
        logits(bank.model, **rows_of(1), adapter_names=["a2"])
    assert_rows(bank, written, ["a0", "a1", BASE])
    bank.unpin("a0")
    assert_rows(bank, written, ["a1", "a2"])
    assert bank.list()[1].pinned


def test_an_adapter_that_ran_out_of_memory_can_be_added_again(written, monkeypatch):
    bank = AdapterBank(build("llama"))
    monkeypatch.setattr(torch.Tensor, "new_empty", Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        bank.add("a1", written["a1"])
    monkeypatch.undo()
    assert bank.names() == []
    bank.add("a1", written["a1"])
    assert_rows(bank, written, ["a1", BASE])


def test_an_adapter_that_cannot_be_pinned_leaves_no_trace(written: dict[str, Path]) -> None:
    bank = AdapterBank(build("llama"), capacity=1)
    bank.add("a2", written["a2"], pinned=True)
    values, modules = bank.values.clone(), [name for name, _ in bank.model.named_modules()]
    # Has more sites.
    in_memory = ia3.IA3Model.from_pretrained(build("llama"), written["a1"], "own").adapter("own")
    for source in (written["a1"], in_memory):
        with pytest.raises(IA3Error, match="no room for adapter 'a1': of 1 slots 1 are pinned"):
            bank.add("a1", source, pinned=True)
    assert bank.names() == ["a2"]
    assert torch.equal(bank.values, values)
    assert [name for name, _ in bank.model.named_modules()] == modules


@pytest.mark.parametrize("capacity", [8, 1])
def test_bad_names_and_sources_change_nothing(written, tmp_path, capacity):
    model = ia3.IA3Model.from_pretrained(build("llama"), written["a1"], "own")
    bank = AdapterBank(model, capacity)
    bank.add("a1", written["a1"])
    values = bank.values.clone()
    head = write(tmp_path / "head", 1, modules_to_save=["lm_head"])
    other = write(tmp_path / "gpt2", 1, kind="gpt2")
    short = Path(shutil.copytree(written["a3"], tmp_path / "short"))
    os.truncate(short / WEIGHTS, 1000)
    no_config = Path(shutil.copytree(written["a3"], tmp_path / "no_config"))
    (no_config / "adapter_config.json").unlink()
    save_file(load_file(no_config / WEIGHTS), no_config / WEIGHTS)  # nor a copy of it
    file = written["a3"] / WEIGHTS
    bad = [
        ("a1", written["a1"], IA3Error, "exists already"),
        ("own", written["a1"], IA3Error, "exists already"),
        ("a.b", written["a1"], IA3Error, "no dot"),
        ("new", tmp_path / "none", FileNotFoundError, "none: adapter_config.json is not there"),
        ("new", no_config, FileNotFoundError, "no_config: adapter_config.json is not there"),
        ("new", file, IA3Error, f"{WEIGHTS} is not a folder: expected the one that"),
        ("new", None, IA3Error, r"source is None \(NoneType\), expected an adapter's folder"),
        ("new", head, IA3Error, "modules_to_save"),
        ("new", other, IA3Error, "no module of LlamaForCausalLM"),
        ("new", short, IA3Error, "not a whole safetensors file"),
    ]
    for name, folder, error, message in bad:
        with pytest.raises(error, match=message):
            bank.add(name, folder)
    assert [each.name for each in bank.list()] == ["a1"]
    assert bank.values.shape == values.shape
    assert torch.equal(bank.values[:2], values[:2])
    with pytest.raises(IA3Error, match="bank has an adapter 'a1' already"):
        model.add_adapter("a1", ia3.IA3Config())
    with pytest.raises(IA3Error, match=r"no adapter 'a11'.*bank of 1.*did you mean 'a1'"):
        logits(model, **rows_of(1), adapter_names=["a11"])
    with pytest.raises(IA3Error, match="has a bank already"):
        AdapterBank(model)


def test_bad_arguments_are_refused(written):
    bank = AdapterBank(build("llama"))
    bank.add("a1", written["a1"])
    for capacity in (0, 2.5, "3", True):
        with pytest.raises(IA3Error, match=f"capacity is {capacity!r}, expected a whole number"):
            AdapterBank(build("llama"), capacity=capacity)
    with pytest.raises(IA3Error, match="dtype is 'float32', expected a floating dtype"):
        AdapterBank(build("llama"), dtype="float32")
    base = build("llama")
    with pytest.raises(RuntimeError, match="nowhere"):
        AdapterBank(base, device="nowhere")
    # A number is one of torch's, too, which there may not be here.
    with pytest.raises(RuntimeError, match="device -1 is unknown"):
        AdapterBank(base, device=-1)
    assert all(parameter.requires_grad for parameter in base.parameters())
    for call in (bank.pin, bank.unpin, bank.remove, lambda name: bank.refresh([name])):
        with pytest.raises(IA3Error, match="no adapter 'a11' in this bank of 1; did you mean 'a1'"):
            call("a11")


def test_a_name_that_is_given_twice_takes_one_slot(written):
    bank = bank_of({name: written[name] for name in ("a1", "a3", "a5")}, capacity=2)
    rows = torch.cat([*bank.gather(["a5", "a5", BASE], [0, 1, 2]).values()], 1)
    assert torch.equal(rows[0], rows[1])
    assert_rows(bank, written, ["a5", "a1"])
    assert resident(bank) == {"a1", "a5"}


def test_a_relative_folder_is_found_from_elsewhere(written, tmp_path, monkeypatch):
    bank = AdapterBank(build("llama"), capacity=1)
    monkeypatch.chdir(written["a1"].parent)
    bank.add("a1", "a1")
    bank.add("a3", Path("a3"))
    monkeypatch.chdir(tmp_path)
    assert bank.refresh().failed == {}
    assert_rows(bank, written, ["a3"])
    assert_rows(bank, written, ["a1"])
    assert [each.source for each in bank.list()] == [written["a1"], written["a3"]]


def test_without_its_bank_a_model_is_what_it_was(written):
    base = build("llama")
    before = list(base.state_dict()), [*base.named_modules()]
    wanted = logits(base, **rows_of(2))
    bank = AdapterBank(base)
    model = bank.model
    for name, folder in written.items():
        bank.add(name, folder)
    assert list(base.state_dict()) == before[0]
    assert torch.equal(logits(model, **rows_of(2)), wanted)
    with model.route(["a1", "a2"]), pytest.raises(IA3Error, match="a route of this model is on"):
        bank.close()
    bank.close()
    bank.close()
    assert [*base.named_modules()] == before[1]
    with pytest.raises(IA3Error, match="no adapter 'a1'"):
        logits(model, **rows_of(1), adapter_names=["a1"])
    with pytest.raises(IA3Error, match="was closed"):
        bank.add("a1", written["a1"])
    again = AdapterBank(model)
    again.add("a1", written["a1"])
    assert_rows(again, written, ["a1", BASE])
    assert model.unload() is base
    assert [*base.named_modules()] == before[1]
    with pytest.raises(IA3Error, match="unloaded"):
        again.pin("a1")


def test_a_replaced_file_is_taken_up_when_refreshed(written, tmp_path):
    folders = {n: Path(shutil.copytree(written[n], tmp_path / n)) for n in ("a1", "a2", "a3")}
    bank = bank_of(folders, capacity=2, host_bytes=0)
    assert bank.refresh().changed == []
    write(folders["a1"], 21)  # resident: the old values, until refreshed
    assert_rows(bank, {**folders, "a1": written["a1"]}, ["a1", "a2"])
    write(folders["a2"], 22)  # with other sites than before
    write(folders["a3"], 23)  # not in memory: the new ones at once
    assert bank.refresh(["a1"]) == Refreshed(["a1"], {})
    assert_rows(bank, {**folders, "a2": written["a2"]}, ["a2", "a1"])
    assert_rows(bank, folders, ["a3", "a1"])
    assert bank.refresh() == Refreshed(["a2"], {})
    assert_rows(bank, folders, ["a1", "a2"])
    # The whole folder may be another one.
    os.rename(folders["a1"], tmp_path / "old")
    shutil.copytree(written["a5"], folders["a1"])
    assert bank.refresh().changed == ["a1"]
    assert_rows(bank, folders, ["a1", "a2"])


@pytest.mark.parametrize("was_resident", [True, False])
@pytest.mark.parametrize("content", [b"", b"x" * 50, None])
def test_a_broken_file_is_an_error_for_its_adapter(written, tmp_path, content, was_resident):
    """Empty, foreign or cut short."""
    folder = Path(shutil.copytree(written["a1"], tmp_path / "a1"))
    names = ("a1", "a3", "a5") if was_resident else ("a3", "a5", "a1")
    folders = {name: {**written, "a1": folder}[name] for name in names}
    bank = bank_of(folders, capacity=2, host_bytes=0)
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-8] if content is None else content)
    if was_resident:
        assert_rows(bank, written, ["a1", "a3"])  # what was read is whole
        found = bank.refresh()
        assert found.changed == []
        assert "not a whole safetensors file" in found.failed["a1"]
    for _ in range(2):
        with pytest.raises(IA3Error, match=r"adapter 'a1' cannot be used: .*not a whole safetens"):
            logits(bank.model, **rows_of(2), adapter_names=["a1", "a3"])
        assert_rows(bank, written, ["a3", BASE])
    shutil.rmtree(folder)
    assert "no adapter in" in bank.refresh().failed["a1"]
    shutil.copytree(written["a7"], folder)
    assert bank.refresh().changed == ["a1"]
    assert_rows(bank, {**written, "a1": folder}, ["a1", "a3"])


def test_a_pinned_adapter_comes_back_when_it_is_mended(written, tmp_path):
    folder = Path(shutil.copytree(written["a1"], tmp_path / "a1"))
    bank = AdapterBank(build("llama"), capacity=2)
    bank.add("a1", folder, pinned=True)

    def cut():
        (folder / WEIGHTS).write_bytes(b"cut off")
        assert list(bank.refresh().failed) == ["a1"]

    def state():
        return bank.list()[0].resident, bank.list()[0].pinned

    cut()
    assert state() == (False, True)
    # Its place is kept.
    for name in ("a3", "a5"):
        bank.add(name, written[name])
        assert_rows(bank, written, [name, BASE])
    assert resident(bank) == {"a5"}
    write(folder, 31)
    assert bank.refresh().changed == ["a1"]
    assert state() == (True, True)
    assert_rows(bank, {**written, "a1": folder}, ["a5", "a1"])
    # Until it is unpinned.
    cut()
    bank.unpin("a1")
    assert_rows(bank, written, ["a3", "a5"])
    write(folder, 32)
    assert bank.refresh().changed == ["a1"]
    assert state() == (False, False)
    assert_rows(bank, {**written, "a1": folder}, ["a1", "a5"])


def test_an_adapter_that_is_gone_serves_while_it_is_resident(written, tmp_path):
    folder = Path(shutil.copytree(written["a1"], tmp_path / "a1"))
    bank = bank_of({"a1": folder, "a3": written["a3"]}, capacity=1, host_bytes=0)
    shutil.rmtree(folder)
    assert list(bank.refresh().failed) == ["a1"]
    assert_rows(bank, written, ["a1", BASE])
    assert_rows(bank, written, ["a3", BASE])
    with pytest.raises(IA3Error, match="'a1' cannot be used: no adapter in"):
        logits(bank.model, **rows_of(1), adapter_names=["a1"])


def test_a_disk_that_does_not_answer_is_asked_again(written, monkeypatch):
    bank = bank_of({name: written[name] for name in ("a1", "a3")}, capacity=1, host_bytes=0)
    with monkeypatch.context() as full:
        full.setattr("ia3.bank.bank.open_folder", Mock(side_effect=OSError(24, "too many files")))
        with pytest.raises(IA3Error, match=r"'a3' cannot be used: .*too many files"):
            logits(bank.model, **rows_of(1), adapter_names=["a3"])
    assert_rows(bank, written, ["a3", BASE])


def test_what_waits_in_memory_needs_no_file(written, tmp_path):
    """Adapters that made room, or found none, come back as they were."""
    folders = {n: Path(shutil.copytree(written[n], tmp_path / n)) for n in ("a1", "a3", "a5", "a2")}
    # The last one brings columns while others wait.
    bank = bank_of({n: folders[n] for n in ("a1", "a3", "a5")}, capacity=1)
    bank.add("a2", folders["a2"])
    write(folders["a1"], 41)  # taken up when refreshed
    shutil.rmtree(folders["a3"])
    (folders["a5"] / WEIGHTS).write_bytes(b"cut off")
    for _ in range(2):
        for name in folders:
            assert_rows(bank, written, [name, BASE])
    assert resident(bank) == {"a2"}
    assert (bank.hits, bank.misses, bank.evictions) == (1, 7, 7)
    found = bank.refresh()
    assert found.changed == ["a1"]
    assert sorted(found.failed) == ["a3", "a5"]
    assert_rows(bank, {**written, "a1": folders["a1"]}, ["a1", BASE])
    assert_rows(bank, written, ["a3", BASE])  # gone, and in memory still
    with pytest.raises(IA3Error, match=r"adapter 'a5' cannot be used: .*not a whole safetens"):
        logits(bank.model, **rows_of(1), adapter_names=["a5"])
    bank.remove("a3")
    bank.add("a3", written["a7"])
    assert_rows(bank, {**written, "a3": written["a7"]}, ["a3", BASE])


def test_what_waits_takes_no_more_memory_than_was_said(written):
    names = [f"a{i}" for i in range(8)]
    row = 4 * bank_of(written).values.shape[1]
    for most in (0, row - 1, row, 3 * row, 100 * row):
        bank = bank_of(written, capacity=1, host_bytes=most)
        for name in (*names, *reversed(names), *names):
            assert_rows(bank, written, [name, BASE])
            assert bank._waiting.bytes <= most
        waiting = [name for name in names if name in bank._waiting]
        # The most recent ones; the last one is resident.
        assert waiting == names[7 - min(most // row, 7) : 7]
        for name in names:
            bank.remove(name)
        assert bank._waiting.bytes == 0
    with pytest.raises(IA3Error, match="host_bytes is -1, expected at least 0"):
        AdapterBank(build("llama"), host_bytes=-1)


def test_no_batch_mixes_two_versions(tmp_path):
    """Every value of a version is its number, while one thread replaces and others gather."""
    folder, template = tmp_path / "a", ia3.get_peft_model(build("llama"), ia3.IA3Config())

    def write_version(number):
        for vector in vectors(template).values():
            vector.data.fill_(number)
        template.save_pretrained(folder)

    write_version(2)
    bank = AdapterBank(build("llama"), capacity=2)
    for name in ("a", "b", "c"):
        bank.add(name, folder)
    done = threading.Event()

    def replace() -> None:
        for number in range(3, 40):
            write_version(number)
            bank.refresh(["a"])
        done.set()

    def gather() -> set[float]:
        seen = set()
        while not done.is_set():
            for name in ("a", "b", "c"):
                row, base = torch.cat([*bank.gather([name, BASE], [0, 1]).values()], 1)
                assert (row == row[0]).all()
                assert (base == 1).all()
                seen.add(row[0].item())
        return seen

    with ThreadPoolExecutor(3) as pool:
        replacing, *gathering = pool.submit(replace), pool.submit(gather), pool.submit(gather)
        replacing.result(timeout=60)
        seen = set().union(*(each.result(timeout=60) for each in gathering))
    assert len(seen) > 3
    bank.refresh()
    assert all((part == 39).all() for part in bank.gather(["a"], [0]).values())


def test_many_threads_share_a_small_bank(written):
    bank = bank_of(written, capacity=4)
    mixes = [["a0", "a1"], ["a2", BASE], ["a3", "a4"], ["a5", "a6"], ["a7", "a0"]]
    wanted = [expected(written, names) for names in mixes]

    def run(turn):
        found = logits(bank.model, **rows_of(2), adapter_names=mixes[turn % len(mixes)])
        return torch.equal(found, wanted[turn % len(mixes)])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(60)))
    assert len(resident(bank)) == 4


def test_threads_that_fork_at_once_wait_for_each_other():
    class SlowLock:
        """Whoever releases it goes on when another has it."""

        def __init__(self):
            self.lock = threading.RLock()

        def acquire(self):
            return self.lock.acquire(timeout=10)

        def release(self):
            self.lock.release()
            time.sleep(0.05)

    bank = AdapterBank(build("llama"))
    bank._lock = SlowLock()

    def fork():
        _before_fork()
        time.sleep(0.3)
        _after_fork()

    with ThreadPoolExecutor(2) as pool:
        for each in [pool.submit(fork) for _ in range(2)]:
            each.result()
    assert bank._lock.acquire()
