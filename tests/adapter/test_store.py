"""Adapters on disk: round trips, files that are broken or foreign, and failed writes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from conftest import VOCABULARY, MakeInputs, MakeModel
from safetensors.torch import load, load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ia3 import IA3Config, IA3Error, IA3Model
from ia3.adapter.store import Adapter, adapter_files

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
K_PROJ = "base_model.model.model.layers.0.self_attn.k_proj.ia3_l"


def with_random_vectors(base: PreTrainedModel, seed: int = 0) -> IA3Model:
    model = IA3Model(base, IA3Config())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for vector in model.vectors("default").values():
            vector.copy_(torch.randn(vector.shape, generator=generator))
    return model


@pytest.fixture
def adapter(tmp_path: Path, make_model: MakeModel) -> Path:
    """The folder of an adapter for the tiny LLaMA."""
    folder = tmp_path / "adapter"
    with_random_vectors(make_model("llama")).save_pretrained(folder)
    return folder


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# -- the config ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(),
        IA3Config(task_type="CAUSAL_LM", target_modules="all-linear", feedforward_modules=[]),
        IA3Config(
            target_modules=["k", "v", "wo"],
            feedforward_modules=("wo",),
            exclude_modules=r"decoder\..*",
            base_model_name_or_path="some/model",
            revision="abc",
            init_ia3_weights=False,
        ),
    ],
)
def test_config_round_trip(config: IA3Config, tmp_path: Path) -> None:
    path = tmp_path / CONFIG
    path.write_text(config.to_json(), "utf-8")
    assert IA3Config.from_json(path) == config
    assert IA3Config.from_json(path).to_json() == config.to_json()


def test_unknown_keys_are_kept_and_named_once(
    adapter: Path, make_model: MakeModel, tmp_path: Path
) -> None:
    edit_config(adapter, from_the_future={"depth": 3}, peft_version="9.9.9")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = IA3Model.from_pretrained(make_model("llama"), adapter)
        model.save_pretrained(tmp_path / "copy")
    named = [str(w.message) for w in caught if "from_the_future" in str(w.message)]
    assert len(named) == 1
    assert str(adapter / CONFIG) in named[0]
    assert "peft_version" not in named[0]
    saved = json.loads((tmp_path / "copy" / CONFIG).read_text())
    assert saved["from_the_future"] == {"depth": 3}
    assert saved["peft_version"] == "9.9.9"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{'peft_type': 'IA3'}", "is not JSON"),
        (b"", "is not JSON"),
        (b'\xff\xfe{"peft_type": "IA3"}', "is not JSON"),
        (b"[1, 2]", "holds list, expected a JSON object"),
        (b'{"peft_type": "LORA", "r": 8}', "peft_type is 'LORA', expected 'IA3'"),
        (b'{"peft_type": "IA3", "target_modules": 7}', "target_modules is 7"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_configs_that_are_not_ours(
    adapter: Path, tiny_llama: PreTrainedModel, text: bytes, message: str
) -> None:
    (adapter / CONFIG).write_bytes(text)
    keys = list(tiny_llama.state_dict())
    with pytest.raises(IA3Error) as error:
        IA3Model.from_pretrained(tiny_llama, adapter)
    assert message in str(error.value)
    assert str(adapter / CONFIG) in str(error.value)
    assert list(tiny_llama.state_dict()) == keys


# -- the vectors -----------------------------------------------------------------------------------


def test_vectors_round_trip_bit_for_bit(tmp_path: Path, make_model: MakeModel) -> None:
    model = with_random_vectors(make_model("t5"))
    model.save_pretrained(tmp_path / "deep" / "er")
    loaded = IA3Model.from_pretrained(make_model("t5"), tmp_path / "deep" / "er")
    expected = model.vectors("default")
    found = loaded.vectors("default")
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not any(vector.requires_grad for vector in found.values())
    trained = IA3Model.from_pretrained(make_model("t5"), tmp_path / "deep/er", is_trainable=True)
    assert all(vector.requires_grad for vector in trained.vectors("default").values())


def test_values_that_are_conjugates_of_others() -> None:
    """Of which only a mark says that they are."""
    complex_ = torch.tensor([1 + 2j, -3j], dtype=torch.complex128)
    copies = {"conjugate": complex_.to(torch.complex64).conj(), "negative": complex_.conj().imag}
    assert copies["negative"].is_neg()
    written = adapter_files(Adapter(IA3Config(), {}, copies))["adapter_model.safetensors"]
    found = {name.rpartition(".")[2]: value for name, value in load(written).items()}
    assert all(torch.equal(found[name], value) for name, value in copies.items())


def test_files_that_begin_alike(tmp_path: Path, make_model: MakeModel) -> None:
    """A header that was read before is not read again: its file's own values are."""
    seeds = {f"a{seed}": seed for seed in range(3)}
    base = make_model("llama")
    expected = {}
    for name, seed in seeds.items():
        model = with_random_vectors(make_model("llama"), seed)
        model.save_pretrained(tmp_path / name)
        expected[name] = {key: vector.clone() for key, vector in model.vectors("default").items()}
    contents = [(tmp_path / name / WEIGHTS).read_bytes() for name in seeds]
    length = 8 + int.from_bytes(contents[0][:8], "little")
    assert contents[0][:length] == contents[1][:length] != contents[1]
    # One longer, one shorter, one of another dtype in between, which begin alike or nearly so.
    for change in (contents[0] + b"    ", contents[0][:-4], contents[0].replace(b"F32", b"I32")):
        damaged = tmp_path / "damaged"
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(tmp_path / "a1", damaged)
        model = IA3Model.from_pretrained(base, tmp_path / "a0")
        (damaged / WEIGHTS).write_bytes(change)
        with pytest.raises(IA3Error):
            model.load_adapter(damaged, "damaged")
        for name in seeds:
            model.load_adapter(tmp_path / name, name)
        for name in seeds:
            found = model.vectors(name)
            assert list(found) == list(expected[name])
            assert all(torch.equal(found[key], expected[name][key]) for key in found)
        # Each has memory of its own.
        before = model.vectors("a1")
        next(iter(model.vectors("a0").values())).data.fill_(7.0)
        assert all(torch.equal(before[key], expected["a1"][key]) for key in before)
        model.unload()


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights(adapter: Path, tiny_llama: PreTrainedModel, keep: int) -> None:
    path = adapter / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    keys = list(tiny_llama.state_dict())
    with pytest.raises(IA3Error, match="not a whole safetensors file") as error:
        IA3Model.from_pretrained(tiny_llama, adapter)
    assert str(path) in str(error.value)
    assert list(tiny_llama.state_dict()) == keys


def missing(tensors: dict[str, Tensor]) -> None:
    del tensors[K_PROJ]


def extra(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.model.layers.7.self_attn.k_proj.ia3_l"] = torch.ones(16, 1)


def too_long(tensors: dict[str, Tensor]) -> None:
    tensors[K_PROJ] = torch.ones(17, 1)


def other_side(tensors: dict[str, Tensor]) -> None:
    tensors[K_PROJ] = torch.ones(1, 16)


def integers(tensors: dict[str, Tensor]) -> None:
    tensors[K_PROJ] = torch.ones(16, 1, dtype=torch.int64)


def foreign(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.ones(2, 2)


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (missing, ["has no vector for 'model.layers.0.self_attn.k_proj'", "1 missing", "Llama"]),
        (extra, ["has a vector for 'model.layers.7.self_attn.k_proj'", "1 not expected"]),
        (too_long, ["'model.layers.0.self_attn.k_proj'", "[17, 1]", "expected [16, 1]"]),
        (other_side, ["'model.layers.0.self_attn.k_proj'", "[1, 16]", "expected [16, 1]"]),
        (integers, ["'model.layers.0.self_attn.k_proj'", "int64", "expected [16, 1]"]),
        (foreign, ["'base_model.model.lm_head.lora_A.weight'", "is not an (IA)³ vector"]),
    ],
)
def test_vectors_that_do_not_fit(
    adapter: Path,
    make_model: MakeModel,
    damage: Callable[[dict[str, Tensor]], None],
    parts: list[str],
) -> None:
    tensors = load_file(adapter / WEIGHTS)
    damage(tensors)
    save_file(tensors, adapter / WEIGHTS)

    base = make_model("llama")
    keys = list(base.state_dict())
    with pytest.raises(IA3Error) as first:
        IA3Model.from_pretrained(base, adapter)
    assert list(base.state_dict()) == keys
    assert all(parameter.requires_grad for parameter in base.parameters())

    model = IA3Model(base, IA3Config())
    keys = list(model.state_dict())
    with pytest.raises(IA3Error) as second:
        model.load_adapter(adapter, "further")
    assert list(model.state_dict()) == keys
    assert list(model.peft_config) == ["default"]

    for error in (first, second):
        for part in [str(adapter), *parts]:
            assert part in str(error.value)


def test_adapter_of_another_model(adapter: Path, tiny_gpt2: PreTrainedModel) -> None:
    keys = list(tiny_gpt2.state_dict())
    with pytest.raises(IA3Error, match="GPT2LMHeadModel"):
        IA3Model.from_pretrained(tiny_gpt2, adapter)
    assert list(tiny_gpt2.state_dict()) == keys


def test_entries_that_match_nothing_do_not_keep_an_adapter_from_loading(
    adapter: Path, make_model: MakeModel
) -> None:
    """PEFT writes such configs for models where only some of the names occur."""
    edit_config(adapter, target_modules=["k_proj", "v_proj", "down_proj", "fc2"])
    loaded = IA3Model.from_pretrained(make_model("llama"), adapter)
    expected = load_file(adapter / WEIGHTS)
    found = loaded.vectors("default")
    assert len(found) == len(expected)
    assert torch.equal(found["model.layers.0.self_attn.k_proj"], expected[K_PROJ])


@pytest.mark.parametrize("absent", [WEIGHTS, CONFIG])
def test_half_an_adapter(adapter: Path, tiny_llama: PreTrainedModel, absent: str) -> None:
    (adapter / absent).unlink()
    with pytest.raises(FileNotFoundError, match=absent):
        IA3Model.from_pretrained(tiny_llama, adapter)


@pytest.mark.parametrize("name", ["no/such", "no/such/folder/at/all"])
def test_no_such_adapter(tiny_llama: PreTrainedModel, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="no/such"):
        IA3Model.from_pretrained(tiny_llama, name)


# -- writing ---------------------------------------------------------------------------------------


def test_writing_into_a_folder_keeps_its_other_files(adapter: Path, make_model: MakeModel) -> None:
    (adapter / "README.md").write_text("mine")
    replacement = with_random_vectors(make_model("llama"), seed=1)
    replacement.save_pretrained(adapter)
    assert sorted(path.name for path in adapter.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    assert (adapter / "README.md").read_text() == "mine"
    found = IA3Model.from_pretrained(make_model("llama"), adapter).vectors("default")
    for name, vector in replacement.vectors("default").items():
        assert torch.equal(found[name], vector)


def test_new_folders_are_as_readable_as_any(adapter: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    assert adapter.stat().st_mode == plain.stat().st_mode


def test_a_file_where_the_folder_should_be(tmp_path: Path, tiny_llama: PreTrainedModel) -> None:
    path = tmp_path / "taken"
    path.write_text("mine")
    with pytest.raises(NotADirectoryError, match="taken"):
        with_random_vectors(tiny_llama).save_pretrained(path)
    assert path.read_text() == "mine"


# Writing fails for real in there: no file may grow beyond `limit` bytes, as on a disk that is full.
FAILING_WRITE = """
import resource, signal, sys
import torch
from torch import nn
from ia3 import IA3Config, IA3Model

folder, limit = sys.argv[1], int(sys.argv[2])
model = IA3Model(
    nn.Sequential(nn.Linear(8, 4000), nn.Linear(4000, 8)),
    IA3Config(target_modules=["0", "1"], feedforward_modules=["1"]),
)
model.save_pretrained(folder + "/before")
with torch.no_grad():
    for vector in model.vectors("default").values():
        vector.fill_(2.0)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
for name in ("before", "new"):
    try:
        model.save_pretrained(folder + "/" + name)
    except OSError:
        print("OSError", name)
    else:
        print("written", name)
"""


# The weights fail at the first limit; at the second, shrunk weights would leave only the config.
@pytest.mark.parametrize("limit", [20_000, 100])
def test_a_failed_write_changes_nothing(tmp_path: Path, limit: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAILING_WRITE, str(tmp_path), str(limit)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["OSError before", "OSError new"]
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert left == ["before", f"before/{CONFIG}", f"before/{WEIGHTS}"]
    vectors = load_file(tmp_path / "before" / WEIGHTS)
    assert [tuple(vector.shape) for vector in vectors.values()] == [(4000, 1), (1, 4000)]
    assert all(torch.equal(vector, torch.ones_like(vector)) for vector in vectors.values())
    assert IA3Config.from_json(tmp_path / "before" / CONFIG).target_modules == {"0", "1"}


@pytest.mark.parametrize("rescaled", ["k_proj", "lm_head"])
def test_pefts_files_with_embeddings_in_them(
    make_model: MakeModel, make_inputs: MakeInputs, tmp_path: Path, rescaled: str
) -> None:
    """PEFT puts embeddings beside the vectors where tokens were added or the head is rescaled."""

    def base() -> PreTrainedModel:
        make_model("llama").save_pretrained(tmp_path / "base")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        if rescaled != "lm_head":
            torch.manual_seed(1)
            model.resize_token_embeddings(VOCABULARY + 3)
        return model

    config = peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=[rescaled],
        feedforward_modules=[],
        init_ia3_weights=False,
    )
    theirs = peft.get_peft_model(base(), config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours = IA3Model.from_pretrained(base(), tmp_path / "adapter")
    inputs = make_inputs("llama")
    with torch.no_grad():
        assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)
