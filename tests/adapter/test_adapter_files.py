"""Adapters from elsewhere: other versions' files, broken ones, hostile ones.

Whatever is wrong, the error names the file, what was found and what was expected, and the model,
with adapters of its own or not, merged or not, is what it was.
"""

from __future__ import annotations

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
from conftest import MakeInputs, MakeModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.pairs import adapted, logits, randomize, relative, vectors
from support.snapshots import assert_unchanged, snapshot
from torch import Tensor
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedModel

from ia3 import IA3Config, IA3Error, IA3Model

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PICKLED = "adapter_model.bin"
K_PROJ = "base_model.model.model.layers.0.self_attn.k_proj.ia3_l"
DOWN_PROJ = "base_model.model.model.layers.1.mlp.down_proj.ia3_l"


@pytest.fixture
def adapter(tmp_path: Path, make_model: MakeModel) -> Path:
    """The folder of an adapter for the tiny LLaMA."""
    folder = tmp_path / "adapter"
    adapted(make_model("llama")).save_pretrained(folder)
    return folder


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / WEIGHTS
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


# -- broken files ----------------------------------------------------------------------------------


def set_header(folder: Path, **changes: str) -> None:
    path = folder / WEIGHTS
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, {**metadata, **changes})


def set_tensor(folder: Path, key: str, value: Tensor | None) -> None:
    edit_weights(folder, lambda tensors: tensors.pop(key) if value is None else None)
    if value is not None:
        edit_weights(folder, lambda tensors: tensors.update({key: value}))


def write_pickle(folder: Path, content: object, size: int | None = None) -> None:
    (folder / WEIGHTS).unlink()
    torch.save(content, folder / PICKLED)
    (folder / PICKLED).write_bytes((folder / PICKLED).read_bytes()[:size])


# What the config's file holds, or keys that are changed in it -> the message.
CONFIGS: list[tuple[Any, str]] = [
    (b'{"peft_type": "IA3", "target_mo', "is not JSON"),
    (b"", "is not JSON"),
    (b"{'peft_type': 'IA3'}", "is not JSON"),
    (b"\x89PNG\r\n\x1a\n", "is not JSON"),
    (b'["IA3"]', "holds list, expected a JSON object"),
    (b'"IA3"', "holds str, expected a JSON object"),
    (b"null", "holds NoneType, expected a JSON object"),
    (b'{"peft_type": "LORA", "r": 8, "target_modules": ["q"]}', "peft_type is 'LORA', .*'IA3'"),
    ({"peft_type": 3}, "peft_type is 3, expected 'IA3'"),
    ({"target_modules": 3}, "target_modules is 3, expected a list of names or a regular expr"),
    ({"target_modules": ["k", 3]}, r"target_modules is \['k', 3\], expected a list of names"),
    ({"target_modules": {"k": True}}, "target_modules is {'k': True}, expected a list of names"),
    ({"feedforward_modules": 1.5}, "feedforward_modules is 1.5, expected a list of names"),
    ({"exclude_modules": True}, "exclude_modules is True, expected a list of names"),
    ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head', expected a list of names"),
    ({"modules_to_save": 3}, "modules_to_save is 3, expected a list of names"),
    ({"modules_to_save": [3]}, r"modules_to_save is \[3\], expected a list of names"),
    ({"inference_mode": "x"}, "inference_mode is 'x', expected True or False"),
    ({"fan_in_fan_out": 2}, "fan_in_fan_out is 2, expected True or False"),
    ({"init_ia3_weights": None}, "init_ia3_weights is None, expected True or False"),
    (
        {"paper_sites": "yes", "target_modules": None, "feedforward_modules": None},
        "paper_sites is 'yes', expected True or False",
    ),
    ({"paper_sites": True}, "paper_sites=True chooses .*leave them out"),
    ({"task_type": "CAUSAL"}, "task_type is 'CAUSAL'.*did you mean 'CAUSAL_LM'?"),
    ({"task_type": 1}, "task_type is 1.*SEQ_CLS"),
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
    (K_PROJ, torch.ones(16, 1).char(), r"is \[16, 1\] torch.int8, expected \[16, 1\]"),
    ("lm_head.lora_A.weight", torch.ones(2, 2), r"'lm_head.lora_A.weight' is not an \(IA\)³ vec"),
]


def frozen(*ranges: object) -> str:
    return json.dumps({"model.layers.0.self_attn.k_proj": ranges})


# What the header says -> the message.
HEADERS: list[tuple[dict[str, str], str]] = [
    ({"ia3_frozen": "[["}, "'ia3_frozen' is malformed"),
    ({"ia3_frozen": "[]"}, "'ia3_frozen' is malformed"),
    ({"ia3_frozen": frozen([3])}, "'ia3_frozen' is malformed"),
    ({"ia3_frozen": frozen("12")}, "'ia3_frozen' is malformed"),
    ({"ia3_frozen": frozen([0.5, 2.5])}, "'ia3_frozen' is malformed.*whole numbers"),
    ({"ia3_frozen": '{"lm_head": [[0, 1]]}'}, "'ia3_frozen' names 'lm_head', which has no vector"),
    ({"ia3_base_model": "llama"}, "fingerprint is malformed"),
    ({"ia3_base_model": "[]"}, "fingerprint is malformed"),
    ({"ia3_base_model": '{"model_type": "llama"}'}, "fingerprint is malformed.*samples"),
    ({"ia3_base_model": '{"model_type": null, "samples": {}}'}, "malformed.*model_type is None"),
    ({"ia3_base_model": '{"model_type": "a", "samples": {"a": [[2], ["x"]]}}'}, "malformed.*'x'"),
]
VECTOR = {K_PROJ: torch.ones(16, 1)}
# What is done to the folder -> the message.
BROKEN: list[tuple[Callable[[Path], object], str]] = [
    *(
        (lambda to, v=v: (to / CONFIG).write_bytes(v), f"{CONFIG}.*{m}")
        for v, m in CONFIGS
        if type(v) is bytes
    ),
    *(
        (lambda to, v=v: edit_config(to, **v), f"{CONFIG}.*{m}")
        for v, m in CONFIGS
        if type(v) is dict
    ),
    *((lambda to, k=k, v=v: set_tensor(to, k, v), m) for k, v, m in TENSORS),
    *((lambda to, v=v: set_header(to, **v), f"{WEIGHTS}.*{m}") for v, m in HEADERS),
    (
        lambda to: edit_config(to, target_modules="(k"),
        r"target_modules '\(k' is not a regular expression",
    ),
    (
        lambda to: edit_config(to, modules_to_save=["lm_head"]),
        r"lacks 'lm_head.weight'.*\(1 missing, 0 not expected\)",
    ),
    (
        lambda to: set_header(to, ia3_frozen=frozen([8, 17])),
        "'model.*k_proj': values 8 to 17.* its output has 16",
    ),
    (lambda to: set_header(to, ia3_frozen=frozen([5, 2])), "values 5 to 2.* its output has 16"),
    (lambda to: set_header(to, ia3_frozen=frozen([-2, 2])), "values -2 to 2"),
    (lambda to: (to / WEIGHTS).write_bytes(b""), f"{WEIGHTS} is not a whole safetensors file"),
    (lambda to: write_pickle(to, VECTOR, -100), f"{PICKLED} is not a whole file of tensors alone"),
    (lambda to: write_pickle(to, [torch.ones(1)]), f"{PICKLED}.* named tensors"),
    (lambda to: write_pickle(to, {"a": 1}), f"{PICKLED}.* named tensors"),
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
    with pytest.raises(IA3Error, match=message) as error:
        load(adapter)
    assert str(adapter) in str(error.value)
    assert_unchanged(model, before)


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_adapters_of_other_architectures(tmp_path, target, make_model, kind):
    model, load = target
    adapted(make_model(kind)).save_pretrained(tmp_path)
    before = snapshot(model)
    with pytest.raises(IA3Error, match="LlamaForCausalLM") as error:
        load(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert_unchanged(model, before)


@pytest.mark.parametrize("present", [[], [CONFIG], [WEIGHTS], ["README.md"]])
def test_folders_without_an_adapter(adapter, target, present):
    model, load = target
    (adapter / "README.md").touch()
    for path in list(adapter.iterdir()):
        if path.name not in present:
            path.unlink()
    before = snapshot(model)
    with pytest.raises(
        FileNotFoundError, match=WEIGHTS if present == [CONFIG] else CONFIG
    ) as error:
        load(adapter)
    assert str(adapter) in str(error.value)
    assert_unchanged(model, before)


def classifier(labels: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForSequenceClassification(
            LlamaConfig(
                vocab_size=16,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_labels=labels,
                pad_token_id=0,
            )
        ).eval()


SCORE = "base_model.model.score.weight"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (SCORE, None, r"lacks 'score.weight'.*\(1 missing, 0 not expected\)"),
        (SCORE.replace("weight", "bias"), torch.ones(3), "holds 'score.bias' .*1 not expected"),
        (SCORE, torch.ones(5, 16), r"'score.weight' is \[5, 16\].*expected \[3, 16\]"),
    ],
)
def test_broken_heads(tmp_path: Path, key: str, value: Tensor | None, message: str) -> None:
    adapted(classifier(3), task_type="SEQ_CLS").save_pretrained(tmp_path)
    assert SCORE in load_file(tmp_path / WEIGHTS)
    set_tensor(tmp_path, key, value)
    model = classifier(3)
    before = snapshot(model)
    with pytest.raises(IA3Error, match=message) as error:
        IA3Model.from_pretrained(model, tmp_path)
    for part in (str(tmp_path), "LlamaForSequenceClassification"):
        assert part in str(error.value)
    assert_unchanged(model, before)


class Hostile:
    """Unpickled carelessly, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickles_run_no_code(adapter: Path, tmp_path: Path, tiny_llama: PreTrainedModel) -> None:
    made = tmp_path / "made"
    content = {"base_model.model.lm_head.ia3_l": Hostile(made)}
    (adapter / WEIGHTS).unlink()
    for write in (
        lambda file: torch.save(content, file),
        lambda file: pickle.dump(content, file),
    ):
        with open(adapter / "adapter_model.bin", "wb") as file:
            write(file)
        with pytest.raises(IA3Error, match=r"adapter_model\.bin is not a whole file of tensors"):
            IA3Model.from_pretrained(tiny_llama, adapter)
        assert not made.exists()


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
VERSIONS: dict[str, dict[str, Any]] = {
    "by hand": {"peft_type": "IA3"},
    "before 0.4": {
        key: value
        for key, value in IN_0_4.items()
        if key not in ("auto_mapping", "revision", "init_ia3_weights")
    },
    "0.4": IN_0_4,
    "0.14": {**IN_0_4, "exclude_modules": None},
    "0.18": {**IN_0_4, "exclude_modules": None, "peft_version": "0.18.0"},
    "0.21": {
        **IN_0_4,
        "exclude_modules": None,
        "peft_version": "0.21.2",
        "auto_mapping": {
            "base_model_class": "LlamaForCausalLM",
            "parent_library": "transformers.models.llama.modeling_llama",
        },
        "task_type": None,
    },
}
MODULES: dict[str, dict[str, Any]] = {
    "lists": {
        "target_modules": ["v_proj", "k_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    },
    "expressions": {
        "target_modules": r".*\.(k_proj|v_proj|down_proj)",
        "feedforward_modules": r".*\.down_proj",
    },
    "a list and an expression": {
        "target_modules": ["v_proj", "k_proj", "down_proj"],
        "feedforward_modules": ".*down_proj",
    },
    # Whatever the targets, PEFT wrote its own default.
    "more feed-forward modules than targets": {
        "target_modules": ["v_proj", "k_proj", "mlp.down_proj"],
        "feedforward_modules": ["down_proj"],
    },
}


@pytest.mark.parametrize("pickled", [True, False])
@pytest.mark.parametrize("modules", MODULES)
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.filterwarnings("error")
def test_files_of_all_versions_of_peft(
    adapter: Path,
    make_model: MakeModel,
    make_inputs: MakeInputs,
    tmp_path: Path,
    version: str,
    modules: str,
    pickled: bool,
) -> None:
    expected = load_file(adapter / WEIGHTS)
    (adapter / CONFIG).write_text(json.dumps({**VERSIONS[version], **MODULES[modules]}, indent=2))
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


def test_vectors_of_any_floating_dtype_become_float32(adapter: Path, make_model: MakeModel) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        edit_weights(
            adapter,
            lambda tensors, dtype=dtype: tensors.update(
                {key: value.to(dtype) for key, value in tensors.items()}
            ),
        )
        found = IA3Model.from_pretrained(make_model("llama"), adapter).vectors("default")
        for key, stored in load_file(adapter / WEIGHTS).items():
            name = key.removeprefix("base_model.model.").removesuffix(".ia3_l")
            assert found[name].dtype == torch.float32
            assert torch.equal(found[name], stored.float())


def test_what_a_future_version_says_is_kept(adapter, make_model, make_inputs, tmp_path):
    future = {"ia4": {"depth": [1, None]}, "use_rsia3": True, "peft_version": "1.2.3"}
    edit_config(adapter, **future)
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


def test_folders_new_and_old(tmp_path: Path, make_model: MakeModel) -> None:
    """As PEFT does it: "default" in the folder itself, others in a folder of their name."""
    model = adapted(make_model("llama"))
    model.add_adapter("second", IA3Config(target_modules=["q_proj"]))
    randomize(vectors(model, "second"), seed=2)
    for folder in (tmp_path / "new" / "deep", tmp_path / "old"):
        if folder.name == "old":
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
    assert (tmp_path / "old" / "second" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["..", "../second", "a/b", "/tmp/x", "a\\b", ".", ".hidden", "a b"]
)
def test_adapter_names_lead_nowhere(adapter: Path, tiny_llama: PreTrainedModel, name: str) -> None:
    """A name becomes the name of a folder."""
    model = adapted(tiny_llama)
    before = snapshot(model)
    with pytest.raises(IA3Error, match="must have no dot, slash or white space"):
        model.load_adapter(adapter, name)
    with pytest.raises(IA3Error, match="must have no dot, slash or white space"):
        model.add_adapter(name, IA3Config())
    assert_unchanged(model, before)


@pytest.mark.parametrize("way", ["up", "absolute", "link", "through"])
def test_subfolders_lead_nowhere_else(adapter, tmp_path, tiny_llama, way):
    outside = tmp_path / "outside"
    shutil.copytree(adapter, outside)
    subfolder = {
        "up": "../outside",
        "absolute": str(outside),
        "link": "link",
        "through": "inside/../../outside",
    }[way]
    (adapter / "inside").mkdir()
    (adapter / "link").symlink_to(outside)
    before = snapshot(tiny_llama)
    with pytest.raises(FileNotFoundError, match="leads out of"):
        IA3Model.from_pretrained(tiny_llama, adapter, subfolder=subfolder)
    with pytest.raises(FileNotFoundError, match="leads out of"):
        IA3Config.from_pretrained(adapter, subfolder=subfolder)
    assert_unchanged(tiny_llama, before)


def test_no_such_subfolder(adapter: Path, tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(FileNotFoundError, match="has no subfolder 'second'"):
        IA3Model.from_pretrained(tiny_llama, adapter, subfolder="second")
