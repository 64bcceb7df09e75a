"""Adapters in folders and on the hub: what is written where, and what is read."""

import copy
import subprocess
import sys
import threading

import peft
import pytest
import torch
from safetensors.torch import load_file
from support import pairs
from support.hub import Hub
from support.pairs import randomize, vectors

import ia3
from ia3 import IA3Config, IA3Error, PeftConfig, PeftModel, get_peft_model

FILES = {"adapter_config.json", "adapter_model.safetensors"}
IDS = torch.arange(3, 11)[None]


def logits(model):
    return pairs.logits(model, input_ids=IDS)


def adapted(base, seed=0):
    return pairs.adapted(copy.deepcopy(base), seed, task_type="CAUSAL_LM")


def snapshot(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# -- several adapters in one folder ----------------------------------------------------------------


@pytest.mark.parametrize(("writer", "reader"), [(ia3, peft), (peft, ia3), (ia3, ia3)])
def test_default_at_the_root_others_in_folders(tiny_llama, tmp_path, writer, reader):
    model = writer.get_peft_model(copy.deepcopy(tiny_llama), writer.IA3Config())
    other = writer.IA3Config(target_modules=["q_proj", "down_proj"])
    model.add_adapter("other", other)
    expected = {}
    for seed, name in enumerate(("default", "other")):
        model.set_adapter(name)
        randomize(vectors(model, name), seed)
        expected[name] = logits(model)
    model.save_pretrained(tmp_path)
    assert snapshot(tmp_path) - {"README.md"} == FILES | {f"other/{file}" for file in FILES}
    again = reader.PeftModel.from_pretrained(copy.deepcopy(tiny_llama), tmp_path)
    again.load_adapter(tmp_path / "other", "other")
    again.load_adapter(str(tmp_path), "by_subfolder", subfolder="other")
    for adapter, saved in (("default", "default"), ("other", "other"), ("by_subfolder", "other")):
        again.set_adapter(adapter)
        torch.testing.assert_close(logits(again), expected[saved], rtol=1e-5, atol=1e-5)


def test_selected_adapters_only(tiny_llama, tmp_path):
    for library in (ia3, peft):
        model = library.get_peft_model(copy.deepcopy(tiny_llama), library.IA3Config(), "first")
        model.add_adapter("second", library.IA3Config())
        model.save_pretrained(tmp_path / library.__name__, selected_adapters=["second"])
    found = [snapshot(tmp_path / name) - {"README.md"} for name in ("ia3", "peft")]
    assert found[0] == found[1] == {f"second/{file}" for file in FILES}
    with pytest.raises(IA3Error, match="'third'"):
        adapted(tiny_llama).save_pretrained(tmp_path / "no", selected_adapters=["third"])
    assert not (tmp_path / "no").exists()


def test_only_the_main_process_writes_and_no_pickles(tiny_llama, tmp_path):
    adapted(tiny_llama).save_pretrained(tmp_path / "a", is_main_process=False)
    with pytest.raises(IA3Error, match="safe_serialization is False"):
        adapted(tiny_llama).save_pretrained(tmp_path / "a", safe_serialization=False)
    with pytest.raises(IA3Error, match="there is nothing to convert"):
        adapted(tiny_llama).save_pretrained(
            tmp_path / "a", path_initial_model_for_weight_conversion="initial"
        )
    assert not (tmp_path / "a").exists()


def test_a_subfolder(tiny_llama, tmp_path):
    model = adapted(tiny_llama)
    model.save_pretrained(tmp_path / "runs" / "best")
    again = PeftModel.from_pretrained(copy.deepcopy(tiny_llama), tmp_path, subfolder="runs/best")
    assert torch.equal(logits(again), logits(model))
    assert PeftConfig.from_pretrained(tmp_path, subfolder="runs/best").task_type == "CAUSAL_LM"
    with pytest.raises(FileNotFoundError, match="no subfolder 'worst'"):
        PeftModel.from_pretrained(copy.deepcopy(tiny_llama), tmp_path, subfolder="worst")


def test_pefts_old_files_are_read(tiny_llama, tmp_path):
    theirs = peft.get_peft_model(copy.deepcopy(tiny_llama), peft.IA3Config())
    randomize(vectors(theirs), 3)
    theirs.save_pretrained(tmp_path, safe_serialization=False)
    assert "adapter_model.bin" in snapshot(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(tiny_llama), tmp_path)
    torch.testing.assert_close(logits(again), logits(theirs), rtol=1e-5, atol=1e-5)
    # Safetensors go before a pickle.
    again.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"not a pickle")
    newest = PeftModel.from_pretrained(copy.deepcopy(tiny_llama), tmp_path)
    assert torch.equal(logits(newest), logits(again))


# -- what a hub id means, with no network ----------------------------------------------------------


def cached(cache, repository, revision, commit, **models):
    """Put models, by subfolder, into a commit of a repository in huggingface_hub's cache."""
    folder = cache / f"models--someone--{repository}"
    for name, model in models.items():
        model.save_pretrained(folder / "snapshots" / commit / name.removeprefix("root"))
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / revision).write_text(commit)


@pytest.fixture
def cache(tiny_llama, tmp_path):
    """huggingface_hub's cache with two revisions of one adapter: (its folder, their logits)."""
    results = {}
    for seed, (revision, commit) in enumerate((("main", "a" * 40), ("v2", "b" * 40))):
        model, nested = adapted(tiny_llama, seed), adapted(tiny_llama, seed + 10)
        cached(tmp_path, "adapter", revision, commit, root=model, nested=nested)
        results[revision] = logits(model)
        results[f"{revision}/nested"] = logits(nested)
    return tmp_path, results


def test_ids_and_revisions(tiny_llama, cache):
    folder, expected = cache
    for given, revision in ((None, "main"), ("main", "main"), ("v2", "v2"), ("b" * 40, "v2")):
        for library in (ia3, peft):
            model = library.PeftModel.from_pretrained(
                copy.deepcopy(tiny_llama), "someone/adapter", revision=given, cache_dir=folder
            )
            torch.testing.assert_close(logits(model), expected[revision], rtol=1e-5, atol=1e-5)
    options = {"revision": "v2", "subfolder": "nested", "cache_dir": folder}
    model = PeftModel.from_pretrained(copy.deepcopy(tiny_llama), "someone/adapter", **options)
    assert torch.equal(logits(model), expected["v2/nested"])
    model.load_adapter("someone/adapter", "main", cache_dir=folder, local_files_only=True)
    model.set_adapter("main")
    assert torch.equal(logits(model), expected["main"])
    config = PeftConfig.from_pretrained("someone/adapter", revision="v2", cache_dir=folder)
    assert config.task_type == "CAUSAL_LM"
    with pytest.raises(FileNotFoundError, match="no adapter at 'someone/adapter'"):
        PeftModel.from_pretrained(tiny_llama, "someone/adapter", revision="v9", cache_dir=folder)


def test_an_adapter_brings_its_base_model_at_its_revision(tiny_llama, tmp_path):
    """Both by id: the adapter's revision is the caller's, the base model's stands in the config."""
    cached(tmp_path, "base", "main", "c" * 40, root=tiny_llama)
    tiny_llama.lm_head.weight.data.mul_(2)
    cached(tmp_path, "base", "v1", "d" * 40, root=tiny_llama)
    config = IA3Config(task_type="CAUSAL_LM", base_model_name_or_path="someone/base")
    model = get_peft_model(tiny_llama, config, revision="v1")
    randomize(vectors(model))
    cached(tmp_path, "adapter", "best", "e" * 40, root=model)
    for library in (ia3, peft):
        again = library.AutoPeftModelForCausalLM.from_pretrained(
            "someone/adapter", revision="best", cache_dir=tmp_path
        )
        torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("someone/nothing", "no adapter at 'someone/nothing': no such folder, and not to be had"),
        ("no/such/folder", "no adapter at 'no/such/folder': no such folder, and not a hub id"),
        ("nothing", "no adapter at 'nothing'"),
    ],
)
def test_what_is_nowhere(tiny_llama, tmp_path, name, message):
    with pytest.raises(FileNotFoundError, match=message):
        PeftModel.from_pretrained(tiny_llama, name, cache_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=message):
        PeftConfig.from_pretrained(name, cache_dir=tmp_path)


# -- a hub on this machine -------------------------------------------------------------------------


@pytest.fixture
def hub():
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


ON_THE_HUB = """
import sys
import torch
from transformers import LlamaForCausalLM
from ia3 import PeftModel

base, adapter, results = sys.argv[1:]
model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter)
print(model.push_to_hub("someone/adapter", private=True, commit_message="First"))
model.unload()
again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), "someone/adapter")
torch.save(again(input_ids=torch.arange(3, 11)[None]).logits, results)
"""


WITH_EVERY_ARGUMENT = """
import sys
from transformers import LlamaForCausalLM
from ia3 import PeftModel

base, adapter, _ = sys.argv[1:]
model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter)
options = {"commit_message": "First", "commit_description": "all of it", "private": True}
options |= {"token": "hf_another", "revision": "v2", "create_pr": True, "max_shard_size": "5GB"}
print(model.push_to_hub("someone/adapter", tags=["mine"], **options))
print(model.active_peft_config.push_to_hub("someone/adapter", tags=["mine"], **options))
print(model.active_peft_config.push_to_hub("someone/adapter"))
"""


def push(tmp_path, hub, script=ON_THE_HUB):
    """Run a script against this hub, and return what it printed."""
    environment = hub.environment(tmp_path / "home")
    environment |= {"HF_TOKEN": "hf_of_nobody", "OMP_NUM_THREADS": "1"}
    arguments = [str(tmp_path / name) for name in ("base", "adapter", "results")]
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_pushed_and_loaded_again(tiny_llama, tmp_path, hub):
    model = adapted(tiny_llama)
    tiny_llama.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    hub.files["model.safetensors"] = b"a large file of the same repository"
    hub.files["checkpoint-10/optimizer.pt"] = b"another one"
    printed = push(tmp_path, hub)
    assert "someone/adapter/commit/" in printed
    assert hub.files.keys() >= FILES
    pushed = tmp_path / "pushed.safetensors"
    pushed.write_bytes(hub.files["adapter_model.safetensors"])
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    torch.testing.assert_close(load_file(pushed), saved, rtol=0, atol=0)
    results = torch.load(tmp_path / "results")
    torch.testing.assert_close(results, logits(model), rtol=1e-5, atol=1e-5)
    # The adapter alone was fetched.
    assert set(hub.downloaded) == FILES
    card = hub.files["README.md"].decode()
    assert "library_name: peft" in card
    # The hub refuses a base model that is a folder of this machine.
    assert str(tmp_path) not in card


@pytest.mark.slow
def test_a_card_that_is_there_is_kept(tiny_llama, tmp_path, hub):
    tiny_llama.save_pretrained(tmp_path / "base")
    adapted(tiny_llama).save_pretrained(tmp_path / "adapter")
    hub.files["README.md"] = b"# What I wrote about this adapter\n"
    push(tmp_path, hub)
    assert hub.files["README.md"] == b"# What I wrote about this adapter\n"
    assert hub.files.keys() == FILES | {"README.md"}


@pytest.mark.slow
def test_pushing_takes_pefts_arguments(tiny_llama, tmp_path, hub):
    tiny_llama.save_pretrained(tmp_path / "base")
    adapted(tiny_llama).save_pretrained(tmp_path / "adapter")
    printed = push(tmp_path, hub, WITH_EVERY_ARGUMENT)
    assert printed.count("someone/adapter/commit/") == 3
    assert hub.branches == ["v2", "v2"]
    assert hub.files.keys() == FILES | {"README.md"}
    assert "- mine" in hub.files["README.md"].decode()
    said = [(commit["summary"], commit["description"]) for commit in hub.commits]
    assert said == [("First", "all of it")] * 2 + [("Upload (IA)³ config", "")]
    assert all("/commit/v2?create_pr=1" in commit["path"] for commit in hub.commits[:2])
