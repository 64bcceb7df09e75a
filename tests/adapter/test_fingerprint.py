"""A warning on the wrong base model, and none on the right one however it was loaded."""

import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.pairs import adapted
from torch import nn
from transformers import (
    AutoModelForSequenceClassification as SequenceClassifier,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from ia3 import IA3Config, IA3Model
from ia3.adapter.fingerprint import Fingerprint, fingerprint
from ia3.errors import BrokenFileError

WEIGHTS = "adapter_model.safetensors"
SIZES: dict[str, Any] = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 48}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
WRONG = "may be the wrong base model"


def seeded(make: Callable[[], nn.Module], seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()


def llama(seed=0):
    model = seeded(lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), seed)
    # As after training, when norms are no longer ones.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture
def adapter(tmp_path):
    """The folder of an adapter for `llama()`."""
    adapted(llama()).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def header(folder):
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return file.metadata()


def says(load: Callable[[], object]) -> list[str]:
    """What is warned about the base model."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load()
    return [str(each.message) for each in caught if WRONG in str(each.message)]


def test_the_header_holds_what_was_seen(adapter: Path) -> None:
    metadata = header(adapter)
    assert metadata["format"] == "pt"
    seen = json.loads(metadata["ia3_base_model"])
    assert seen["model_type"] == "llama"
    parameters = dict(llama().named_parameters())
    assert "model.embed_tokens.weight" in seen["samples"]
    for name, (shape, values) in seen["samples"].items():
        assert list(parameters[name].shape) == shape
        assert set(values) <= set(parameters[name].flatten().tolist())
    # An adapter stays small.
    assert len(metadata["ia3_base_model"]) < 8 * 300


def test_saved_again_unchanged(adapter: Path, tmp_path: Path) -> None:
    IA3Model.from_pretrained(llama(), adapter).save_pretrained(tmp_path / "again")
    assert header(tmp_path / "again") == header(adapter)


def resized(tokens):
    model = llama()
    model.resize_token_embeddings(tokens)
    return model


RIGHT: dict[str, Callable[[], nn.Module]] = {
    "the same": llama,
    "bfloat16": lambda: llama().bfloat16(),
    "float16": lambda: llama().half(),
    "float64": lambda: llama().double(),
    "bfloat16 and back": lambda: llama().bfloat16().float(),
    "more tokens": lambda: resized(64),
    "fewer tokens": lambda: resized(40),
    "in training": lambda: llama().train(),
    "weights not there yet": lambda: llama().to("meta"),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_no_warning_on_the_right_base(adapter: Path, kind: str) -> None:
    base = RIGHT[kind]()
    assert says(lambda: IA3Model.from_pretrained(base, adapter)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_warning_on_weights_of_another_seed(adapter, make_inputs, dtype):
    loaded = []
    base = llama(seed=1).to(dtype)
    (message,) = says(lambda: loaded.append(IA3Model.from_pretrained(base, adapter)))
    assert "'default'" in message
    assert "'model.embed_tokens.weight' are not those" in message
    # It is a warning: the adapter is there.
    inputs, alone = make_inputs("llama"), adapted(llama(seed=1).to(dtype))
    assert torch.equal(loaded[0](**inputs).logits, alone(**inputs).logits)


def test_a_warning_on_another_seed_even_with_more_tokens(adapter: Path) -> None:
    """Where the embeddings cannot be compared, the norms can."""
    base = llama(seed=1)
    base.resize_token_embeddings(64)
    (message,) = says(lambda: IA3Model.from_pretrained(base, adapter))
    assert "norm" in message


def test_norms_that_tell_nothing_make_room_for_others():
    """Eight parameters are looked at, though all but the last norms are still ones."""
    model = nn.ModuleList(nn.LayerNorm(16) for _ in range(30))
    for norm in model[22:]:
        norm.weight.data.uniform_()
    samples = fingerprint(model).samples
    assert set(samples) == {f"{number}.weight" for number in range(22, 30)}


def test_a_warning_on_another_architecture(adapter: Path) -> None:
    mistral = seeded(lambda: MistralForCausalLM(MistralConfig(**SIZES)), 0)
    (message,) = says(lambda: IA3Model.from_pretrained(mistral, adapter))
    assert "its model type is 'mistral', the adapter's base model is 'llama'" in message


def test_a_further_adapter_is_looked_at_too(adapter: Path) -> None:
    right, wrong = adapted(llama()), adapted(llama(seed=1))
    assert says(lambda: right.load_adapter(adapter, "further")) == []
    (message,) = says(lambda: wrong.load_adapter(adapter, "further"))
    assert "'further'" in message


def test_no_warning_for_files_that_say_nothing(adapter: Path) -> None:
    """PEFT's, that is."""
    for metadata in ({"format": "pt"}, None):
        save_file(load_file(adapter / WEIGHTS), adapter / WEIGHTS, metadata)
        assert says(lambda: IA3Model.from_pretrained(llama(seed=1), adapter)) == []


def test_an_untrained_head_is_no_other_base(tmp_path: Path) -> None:
    """Each time a body is loaded for classification, its head is new."""

    def with_head(seed):
        model = seeded(lambda: SequenceClassifier.from_config(LlamaConfig(**SIZES)), seed)
        model.model.load_state_dict(llama().model.state_dict())
        return model

    adapted(with_head(0), task_type="SEQ_CLS").save_pretrained(tmp_path)
    assert not torch.equal(with_head(0).score.weight, with_head(1).score.weight)
    assert says(lambda: IA3Model.from_pretrained(with_head(1), tmp_path)) == []


NETS = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), ["embed_tokens", "lm_head"]),
    "linear layers alone": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), ["0", "1"]),
}


@pytest.mark.parametrize("kind", NETS)
def test_merged_weights_are_not_the_bases(kind, tmp_path):
    """Saved while merged, loaded onto a base that has another adapter merged: still the same."""
    make, modules = NETS[kind]
    config = {"target_modules": modules, "feedforward_modules": []}
    model = adapted(seeded(make, 0), **config)
    model.save_pretrained(tmp_path / "plain")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    other = adapted(seeded(make, 0), **config)
    other.merge_adapter()
    for folder in (tmp_path / "plain", tmp_path / "merged"):
        base = seeded(make, 0)
        assert says(partial(IA3Model.from_pretrained, base, folder)) == []
        assert says(partial(other.load_adapter, folder, f"saved_{folder.name}")) == []
    wrong = seeded(make, 1)
    (message,) = says(lambda: IA3Model.from_pretrained(wrong, tmp_path / "plain"))
    assert "are not those of the adapter's base model" in message


def test_a_rescaled_model_is_seen_as_its_base(make_model: MakeModel, tmp_path: Path) -> None:
    plain = fingerprint(make_model("llama"))
    config = {"target_modules": ["embed_tokens", "k_proj"], "feedforward_modules": []}
    model = adapted(make_model("llama"), **config)
    model.add_adapter("second", IA3Config(modules_to_save=["lm_head"]))
    assert fingerprint(model.model) == plain
    assert plain.difference(model.model) is None
    # Merged modules are passed over only where they are named.
    model.merge_adapter()
    assert "'model.embed_tokens.weight'" in str(plain.difference(model.model))
    merged = list(model.vectors("default"))
    assert plain.difference(model.model, merged) is None
    assert "model.embed_tokens.weight" not in fingerprint(model.model, merged).samples


def test_fingerprints_are_compared_where_both_looked() -> None:
    def seen(kind: str = "llama", **samples: tuple[list[int], list[float]]) -> Fingerprint:
        return Fingerprint(kind, samples)

    one = seen(embed=([4, 2], [1.0, -2.0]), norm=([2], [0.5, 0.25]))
    assert one.difference_from(one) is None
    # Rounding, a parameter that the other did not look at, and one that was given another size.
    assert one.difference_from(seen(embed=([4, 2], [1.004, -1.996]))) is None
    assert one.difference_from(seen(head=([4, 2], [9.0, 9.0]))) is None
    assert one.difference_from(seen(embed=([5, 2], [9.0, 9.0]))) is None
    said = one.difference_from(seen(embed=([4, 2], [1.0, 2.0])))
    assert said == "the values of 'embed' are not the same in both"
    said = one.difference_from(seen("gpt2", embed=([4, 2], [1.0, -2.0])))
    assert said == "one's model type is 'llama', the other's 'gpt2'"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
SAMPLES = st.dictionaries(st.text(max_size=9), st.tuples(JSON, JSON) | JSON, max_size=3) | JSON


@given(st.fixed_dictionaries({"samples": SAMPLES}, optional={"model_type": JSON}) | JSON)
@settings(deadline=None, max_examples=300, derandomize=True)
def test_any_header_is_a_fingerprint_that_can_be_compared_or_an_error(read):
    try:
        found = Fingerprint.from_json(json.dumps(read), "a file")
    except BrokenFileError as error:
        assert str(error).startswith("a file: the base model's fingerprint")  # noqa: PT017
        return
    assert found.difference_from(found) is None or found.samples
    assert Fingerprint.from_json(found.to_json(), "a file") == found


@pytest.mark.parametrize(
    "entry",
    [
        "[[2], [true]]", "[[true], [1.0]]", "[[-2], [1.0]]", "[[2.0], [1.0]]", "[2, [1.0]]",
        "[[2], [1.0], 3]", "[[2], [1e999]]", "[[2], [NaN]]", '["ab", "12"]', "[[[2]], [1.0]]",
        f"[[2], [1{'0' * 400}]]", f"[[2], [{'9' * 5000}]]", f"[{[1] * 1000}, [1.0]]",
        f"[[2], {[1.0] * 100_000}]", "null", "{}",
    ],
)  # fmt: skip
def test_numbers_of_another_kind_are_refused(entry):
    with pytest.raises(BrokenFileError, match="fingerprint") as caught:
        Fingerprint.from_json(f'{{"model_type": "a", "samples": {{"w": {entry}}}}}', "a file")
    assert len(str(caught.value)) < 400


def test_whole_and_negative_numbers_are_values():
    text = '{"model_type": "a", "samples": {"w": [[2], [1, -2, 0.5]]}}'
    assert Fingerprint.from_json(text, "a file").samples == {"w": ([2], [1.0, -2.0, 0.5])}
