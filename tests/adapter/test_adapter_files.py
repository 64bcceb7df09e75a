"""Adapters from elsewhere: other versions' files, broken ones, hostile ones.

Whatever is wrong, the error names the file, what was found and what was expected, and the model,
with adapters of its own or not, merged or not, is what it was.
"""

import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import VOCABULARY
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.architectures import build
from support.disks import full_disk
from support.pairs import adapted, logits, randomize, relative, vectors
from support.snapshots import assert_unchanged, snapshot
from torch import Tensor
from transformers import AutoModelForCausalLM

from ia3 import IA3Config, IA3Error, IA3Model
from ia3.adapter.files import read_adapter

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PICKLED = "adapter_model.bin"
K_PROJ = "base_model.model.model.layers.0.self_attn.k_proj.ia3_l"
DOWN_PROJ = "base_model.model.model.layers.1.mlp.down_proj.ia3_l"


@pytest.fixture
def adapter(tmp_path, make_model):
    """The folder of an adapter for the tiny LLaMA."""
    adapted(make_model("llama")).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_config(folder, change):
    """Write these bytes, or set these keys."""
    path = folder / CONFIG
    if not isinstance(change, bytes):
        change = json.dumps({**json.loads(path.read_text()), **change}).encode()
    path.write_bytes(change)


# -- broken files ----------------------------------------------------------------------------------


def edit_weights(folder, changes=(), **header):
    path = folder / WEIGHTS
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    del metadata["ia3_sha256"]
    tensors = {**load_file(path), **dict(changes)}
    save_file({k: v for k, v in tensors.items() if v is not None}, path, {**metadata, **header})


def as_peft_writes_it(folder, *gone):
    """The files without copies in the header, and without these."""
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"format": "pt"})
    for name in gone:
        (folder / name).unlink()


def write_pickle(folder, content, size=None):
    (folder / WEIGHTS).unlink()
    torch.save(content, folder / PICKLED)
    (folder / PICKLED).write_bytes((folder / PICKLED).read_bytes()[:size])


def test_what_a_wrapper_of_the_whole_model_put_into_names_is_taken_out(adapter):
    stored = load_file(adapter / WEIGHTS) | {"base_model.model.lm_head.weight": torch.ones(2, 2)}
    save_file({f"_orig_mod.{key}": v for key, v in stored.items()}, adapter / WEIGHTS)
    read = read_adapter(adapter)
    assert {f"base_model.model.{name}.ia3_l" for name in read.vectors} < stored.keys()
    assert read.copies.keys() == {"lm_head.weight"}


# What the config's file holds, or keys that are changed in it -> the message.
CONFIGS: list[tuple[Any, str]] = [
    (b'{"peft_type": "IA3", "target_mo', "is not JSON"),
    (b"\x89PNG\r\n\x1a\n", "is not JSON"),
    (b'["IA3"]', "holds list, expected a JSON object"),
    ({"peft_type": "LORA"}, "peft_type is 'LORA', .*'IA3'"),
    ({"target_modules": 3}, "target_modules is 3, expected a list of names or a regular expr"),
    ({"target_modules": ["k", 3]}, r"target_modules is \['k', 3\], expected a list of names"),
    ({"feedforward_modules": 1.5}, "feedforward_modules is 1.5, expected a list of names"),
    ({"exclude_modules": True}, "exclude_modules is True, expected a list of names"),
    ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head', expected a list of names"),
    ({"inference_mode": "x"}, "inference_mode is 'x', expected True or False"),
    ({"fan_in_fan_out": 2}, "fan_in_fan_out is 2, expected True or False"),
    ({"init_ia3_weights": None}, "init_ia3_weights is None, expected True or False"),
    ({"paper_sites": True}, "paper_sites=True chooses .*leave them out"),
    ({"task_type": "CAUSAL"}, "task_type is 'CAUSAL'.*did you mean 'CAUSAL_LM'?"),
    ({"auto_mapping": "Llama"}, "auto_mapping is 'Llama', expected a mapping"),
    ({"base_model_name_or_path": ["a"]}, r"base_model_name_or_path is \['a'\], expected a string"),
    ({"revision": 7}, "revision is 7, expected a string"),
]
OTHER = "base_model.model.model.layers.9.mlp.down_proj.ia3_l"
# A tensor's key, what it is (`None`: it is not there) -> the message.
TENSORS: list[tuple[str, Tensor | None, str]] = [
    (DOWN_PROJ, None, r"no vector for 'model.layers.1.mlp.down_proj' \(1 missing, 0 not expected"),
    (OTHER, torch.ones(1, 48), r"a vector for 'model.layers.9.*\(0 missing, 1 not expected\)"),
    (K_PROJ, torch.ones(17, 1), r"'model.layers.0.self_attn.k_proj' is \[17, 1\].* \[16, 1\]"),
    (K_PROJ, torch.ones(16), r"'model.layers.0.self_attn.k_proj' is \[16\].*expected \[16, 1\]"),
    (DOWN_PROJ, torch.ones(48, 1), r"is \[48, 1\] .*expected \[1, 48\] .*input side"),
    (K_PROJ, torch.ones(16, 1).char(), "k_proj.ia3_l' is I8, expected floating-point"),
    (K_PROJ, torch.ones(16, 1).to(torch.float8_e5m2), "k_proj.ia3_l' is F8_E5M2, expected floatin"),
    ("lm_head.lora_A.weight", torch.ones(2, 2), r"'lm_head.lora_A.weight' is not an \(IA\)³ vec"),
]


def frozen(*ranges: object) -> str:
    return json.dumps({"model.layers.0.self_attn.k_proj": ranges})


# What the header says -> the message.
HEADERS: list[tuple[dict[str, str], str]] = [
    ({"ia3_frozen": "[["}, "'ia3_frozen' is not JSON"),
    ({"ia3_frozen": frozen([3])}, "'ia3_frozen' is malformed"),
    ({"ia3_frozen": frozen([0.5, 2.5])}, "'ia3_frozen' is malformed.*no range"),
    ({"ia3_frozen": frozen([True, 2])}, "'ia3_frozen' is malformed.*no range"),
    ({"ia3_frozen": frozen([-3, 2])}, "'ia3_frozen' is malformed.*no range"),
    ({"ia3_frozen": frozen([2, 2])}, "'ia3_frozen' is malformed.*no range"),
    ({"ia3_frozen": frozen([4, 5], [0, 3])}, "'ia3_frozen' is malformed.*no range"),
    ({"ia3_frozen": frozen([0, 1, 2])}, "'ia3_frozen' is malformed.*no range"),
    ({"ia3_frozen": '{"a": 3}'}, "'ia3_frozen' is malformed.*3 is no range"),
    ({"ia3_frozen": '{"a": [[0, ' + "9" * 5000 + "]]}"}, "'ia3_frozen'.*digits"),
    ({"ia3_frozen": "[" * 5000}, "'ia3_frozen'.*nested deeper"),
    ({"ia3_frozen": "[]"}, "'ia3_frozen'.*expected a JSON object"),
    ({"ia3_frozen": '{"lm_head": [[0, 1]]}'}, "'ia3_frozen' names 'lm_head', which has no vector"),
    ({"ia3_base_model": "llama"}, "fingerprint is not JSON"),
    ({"ia3_base_model": '{"model_type": "llama"}'}, "fingerprint is malformed.*samples"),
    ({"ia3_base_model": '{"model_type": null, "samples": {}}'}, "malformed.*model_type is None"),
    ({"ia3_base_model": '{"model_type": "a", "samples": {"a": [[2], ["x"]]}}'}, "malformed.*'x'"),
]
VECTOR = {K_PROJ: torch.ones(16, 1)}
HEAD = "base_model.model.lm_head.weight"


def with_head(folder, key, value):
    edit_config(folder, {"modules_to_save": ["lm_head"]})
    edit_weights(folder, {HEAD: torch.ones(48, 16), key: value})


# What is done to the folder -> the message.
BROKEN: list[tuple[Callable[[Path], object], str]] = [
    *((lambda to, v=v: edit_config(to, v), f"{CONFIG}.*{m}") for v, m in CONFIGS),
    *((lambda to, k=k, v=v: edit_weights(to, {k: v}), m) for k, v, m in TENSORS),
    *((lambda to, v=v: edit_weights(to, **v), f"{WEIGHTS}.*{m}") for v, m in HEADERS),
    (lambda to: edit_config(to, {"target_modules": "(k"}), r"'\(k' is not a regular expression"),
    (lambda to: with_head(to, HEAD, None), r"lacks 'lm_head.weight'.*\(1 missing, 0 not expected"),
    (lambda to: with_head(to, HEAD, torch.ones(5, 16)), r"'lm_head.weight' is \[5, 16\].*expected"),
    (lambda to: with_head(to, f"{HEAD[:-6]}bias", torch.ones(3)), "holds 'lm_head.bias' .*1 not"),
    (lambda to: edit_weights(to, ia3_frozen=frozen([8, 17])), "values 8 to 17.* its output has 16"),
    (lambda to: edit_weights(to, ia3_frozen=frozen([5, 2])), r"\[5, 2\] is no range of values"),
    (lambda to: edit_weights(to, ia3_frozen=frozen([-2, 2])), r"\[-2, 2\] is no range of values"),
    (lambda to: (to / WEIGHTS).write_bytes(b""), f"{WEIGHTS} is not a whole safetensors file"),
    (lambda to: write_pickle(to, VECTOR, -100), f"{PICKLED} is not a whole file of tensors alone"),
    (lambda to: write_pickle(to, [torch.ones(1)]), f"{PICKLED}.* named tensors"),
    (lambda to: write_pickle(to, {"a": 1}), f"{PICKLED}.* named tensors"),
    (lambda to: adapted(build("gpt2")).save_pretrained(to), "LlamaForCausalLM"),
    (lambda to: adapted(build("t5")).save_pretrained(to), "LlamaForCausalLM"),
    (lambda to: as_peft_writes_it(to, CONFIG), f"{CONFIG} is not there"),
    (lambda to: (to / WEIGHTS).unlink(), f"{WEIGHTS} is not there"),
]


@pytest.fixture(params=["plain", "adapted", "merged"])
def target(request, make_model):
    """A model, and how to load an adapter onto it."""
    base = make_model("llama")
    if request.param == "plain":
        next(base.parameters()).requires_grad_(False)
        yield base, lambda folder: IA3Model.from_pretrained(base, folder)
    else:
        model = adapted(base, seed=5)
        if request.param == "merged":
            model.merge_adapter()
        yield model, lambda folder: model.load_adapter(folder, "further")
        assert list(model.peft_config) == model.active_adapters == ["default"]


@pytest.mark.parametrize(("damage", "message"), BROKEN)
def test_broken_files(adapter, target, damage, message):
    model, load = target
    damage(adapter)
    before = snapshot(model)
    with pytest.raises((IA3Error, FileNotFoundError), match=message) as error:
        load(adapter)
    assert str(adapter) in str(error.value)
    assert_unchanged(model, before)


class Hostile(str):
    """Unpickled carelessly, it makes a folder of this name."""

    def __reduce__(self):
        return os.mkdir, (str(self),)


@pytest.mark.parametrize("write", [torch.save, lambda content, file: pickle.dump(content, file)])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickles_run_no_code(adapter, tmp_path, tiny_llama, write):
    (adapter / WEIGHTS).unlink()
    with open(adapter / PICKLED, "wb") as file:
        write({"base_model.model.lm_head.ia3_l": Hostile(tmp_path / "made")}, file)
    with pytest.raises(IA3Error, match=r"adapter_model\.bin is not a whole file of tensors"):
        IA3Model.from_pretrained(tiny_llama, adapter)
    assert not (tmp_path / "made").exists()


# -- other versions' files -------------------------------------------------------------------------

# What the versions of PEFT wrote beside the modules: (IA)³ came with 0.4.
IN_0_4: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": "tiny/llama",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_ia3_weights": True,
    "modules_to_save": None,
    "peft_type": "IA3",
    "revision": None,
    "task_type": "CAUSAL_LM",
}
LATER = ("auto_mapping", "revision", "init_ia3_weights")
VERSIONS: dict[str, dict[str, Any]] = {
    "by hand": {"peft_type": "IA3"},
    "before 0.4": {key: value for key, value in IN_0_4.items() if key not in LATER},
    "0.4": IN_0_4,
    "0.21": {**IN_0_4, "exclude_modules": None, "peft_version": "0.21.2", "task_type": None}
    | {"auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"}},
}
NAMES = ["v_proj", "k_proj", "down_proj"]
# (targets, feed-forward modules)
MODULES: dict[str, tuple[Any, Any]] = {
    "lists": (NAMES, ["down_proj"]),
    "expressions": (r".*\.(k_proj|v_proj|down_proj)", r".*\.down_proj"),
    "a list and an expression": (NAMES, ".*down_proj"),
    "entries that match nothing": ([*NAMES, "fc2"], ["down_proj"]),
    # Whatever the targets, PEFT wrote its own default.
    "more feed-forward modules than targets": (["v_proj", "k_proj", "mlp.down_proj"], NAMES[2:]),
}


@pytest.mark.parametrize("pickled", [True, False])
@pytest.mark.parametrize("modules", MODULES)
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.filterwarnings("error")
def test_files_of_every_peft(adapter, make_model, make_inputs, tmp_path, version, modules, pickled):
    expected = load_file(adapter / WEIGHTS)
    targets, feedforward = MODULES[modules]
    config = {"target_modules": targets, "feedforward_modules": feedforward, **VERSIONS[version]}
    (adapter / CONFIG).write_text(json.dumps(config, indent=2))
    if pickled:
        write_pickle(adapter, expected)
    else:
        save_file(expected, adapter / WEIGHTS, {"format": "pt"})  # no header of ours
    model = IA3Model.from_pretrained(make_model("llama"), adapter)
    assert {f"base_model.model.{name}.ia3_l" for name in model.vectors("default")} == set(expected)
    inputs = make_inputs("llama")
    reference = logits(adapted(make_model("llama")), **inputs)
    assert torch.equal(logits(model, **inputs), reference)
    # And on to today's PEFT.
    model.save_pretrained(tmp_path / "again")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        theirs = peft.PeftModel.from_pretrained(make_model("llama"), str(tmp_path / "again"))
    assert relative(logits(theirs, **inputs), reference) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_vectors_of_any_floating_dtype_become_float32(adapter, make_model, dtype):
    stored = {key: value.to(dtype) for key, value in load_file(adapter / WEIGHTS).items()}
    save_file(stored, adapter / WEIGHTS)
    found = IA3Model.from_pretrained(make_model("llama"), adapter).vectors("default")
    for name, vector in found.items():
        assert vector.dtype == torch.float32
        assert torch.equal(vector, stored[f"base_model.model.{name}.ia3_l"].float())


def test_what_a_future_version_says_is_kept(adapter, make_model, make_inputs, tmp_path):
    future = {"ia4": {"depth": [1, None]}, "use_rsia3": True, "peft_version": "1.2.3"}
    edit_config(adapter, future)
    inputs = make_inputs("llama")
    with pytest.warns(UserWarning, match=r"unknown keys \['ia4', 'use_rsia3'\] are kept") as caught:
        model = IA3Model.from_pretrained(make_model("llama"), adapter)
    assert len(caught) == 1
    assert str(adapter / CONFIG) in str(caught[0].message)
    assert torch.equal(logits(model, **inputs), logits(adapted(make_model("llama")), **inputs))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "copy")
    saved = json.loads((tmp_path / "copy" / CONFIG).read_text())
    assert {key: saved[key] for key in future} == future
    with pytest.warns(UserWarning, match="ia4"):  # PEFT names them too, and drops them
        theirs = peft.PeftModel.from_pretrained(make_model("llama"), str(tmp_path / "copy"))
    assert relative(logits(theirs, **inputs), logits(model, **inputs)) < 1e-6


# -- where files lie -------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [False, True])
def test_default_is_in_the_folder_itself_and_others_in_their_own(tmp_path, make_model, old):
    model = adapted(make_model("llama"))
    model.add_adapter("second", IA3Config(target_modules=["q_proj"]))
    randomize(vectors(model, "second"), seed=2)
    folder = tmp_path / "new" / "deep"
    if old:
        (folder / "second").mkdir(parents=True)
        (folder / WEIGHTS).write_text("an adapter that was there before")
        (folder / "second" / "notes.txt").write_text("mine")
    model.save_pretrained(folder)
    again = IA3Model.from_pretrained(make_model("llama"), folder)
    again.load_adapter(folder / "second", "by_path")
    again.load_adapter(folder, "by_subfolder", subfolder="second")
    for name in ("default", "by_path", "by_subfolder"):
        expected = model.vectors("default" if name == "default" else "second")
        found = again.vectors(name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not old or (folder / "second" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["..", "../second", "a/b", "/tmp/x", "a\\b", ".hidden", "a b"])
def test_adapter_names_lead_nowhere(adapter, tiny_llama, name):
    """A name becomes the name of a folder."""
    model = adapted(tiny_llama)
    before = snapshot(model)
    with pytest.raises(IA3Error, match="must have no dot, slash or white space"):
        model.load_adapter(adapter, name)
    with pytest.raises(IA3Error, match="must have no dot, slash or white space"):
        model.add_adapter(name, IA3Config())
    assert_unchanged(model, before)


@pytest.mark.parametrize("way", ["../outside", "/outside", "link", "inside/../../outside"])
def test_subfolders_lead_nowhere_else(adapter, tmp_path, tiny_llama, way):
    outside = tmp_path / "outside"
    shutil.copytree(adapter, outside)
    (adapter / "inside").mkdir()
    (adapter / "link").symlink_to(outside)
    subfolder = str(outside) if way == "/outside" else way
    with pytest.raises(FileNotFoundError, match="leads out of"):
        IA3Model.from_pretrained(tiny_llama, adapter, subfolder=subfolder)
    with pytest.raises(FileNotFoundError, match="leads out of"):
        IA3Config.from_pretrained(adapter, subfolder=subfolder)


def test_no_such_adapter(adapter, tiny_llama):
    with pytest.raises(FileNotFoundError, match="has no subfolder 'second'"):
        IA3Model.from_pretrained(tiny_llama, adapter, subfolder="second")
    for name in ("no/such", "no/such/folder/at/all"):
        with pytest.raises(FileNotFoundError, match="no/such"):
            IA3Model.from_pretrained(tiny_llama, name)


# -- writing and reading ---------------------------------------------------------------------------


def test_vectors_round_trip_bit_for_bit(tmp_path, make_model):
    model = adapted(make_model("t5"))
    model.save_pretrained(tmp_path / "deep" / "er")
    expected = model.vectors("default")
    for trainable in (False, True):
        base = make_model("t5")
        loaded = IA3Model.from_pretrained(base, tmp_path / "deep" / "er", is_trainable=trainable)
        found = loaded.vectors("default")
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert {vector.requires_grad for vector in found.values()} == {trainable}


# The weights fail at the first limit; at the second, the config would be the only file left.
@pytest.mark.parametrize("limit", [1000, 100])
def test_a_failed_write_changes_nothing(tmp_path, make_model, limit):
    model = adapted(make_model("llama"))
    model.save_pretrained(tmp_path / "before")
    before = {p.name: p.read_bytes() for p in (tmp_path / "before").iterdir()}
    assert len(before[WEIGHTS]) > 1000 > len(before[CONFIG]) > 100
    randomize(vectors(model), seed=7)
    for name in ("before", "new"):
        with full_disk(limit), pytest.raises(OSError):
            model.save_pretrained(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["before"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "before").iterdir()} == before


@pytest.mark.parametrize("rescaled", ["k_proj", "lm_head"])
def test_pefts_files_with_embeddings_in_them(make_model, make_inputs, tmp_path, rescaled):
    """PEFT puts embeddings beside the vectors where tokens were added or the head is rescaled."""

    def base():
        make_model("llama").save_pretrained(tmp_path / "base")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        if rescaled != "lm_head":
            torch.manual_seed(1)
            model.resize_token_embeddings(VOCABULARY + 3)
        return model

    modules = {"target_modules": [rescaled], "feedforward_modules": []}
    config = peft.IA3Config(task_type="CAUSAL_LM", **modules)
    theirs = peft.get_peft_model(base(), config).eval()
    randomize(vectors(theirs))
    theirs.save_pretrained(tmp_path / "adapter")
    ours = IA3Model.from_pretrained(base(), tmp_path / "adapter")
    inputs = make_inputs("llama")
    assert torch.equal(logits(ours, **inputs), logits(theirs, **inputs))
