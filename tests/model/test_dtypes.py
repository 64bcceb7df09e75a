"""The dtypes of vectors: float32, or with `autocast_adapter_dtype=False` those of their modules."""

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file
from support import architectures, pairs
from support.pairs import randomize, vectors

import ia3
from ia3 import AdapterBank, IA3Config, get_peft_model

IDS = torch.arange(3, 11)[None]
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
FOLLOWS = {"autocast_adapter_dtype": False}


def dtypes(model, name="default"):
    return {vector.dtype for vector in vectors(model, name).values()}


def pair(base, dtype):
    """Ours and PEFT's, with vectors of the base's dtype."""
    models = []
    for library in (ia3, peft):
        own = copy.deepcopy(base).to(dtype)
        models.append(library.get_peft_model(own, library.IA3Config(), **FOLLOWS))
        randomize(vectors(models[-1]))
    models[0].use_plain_product()
    return models


@HALF
def test_vectors_have_their_modules_dtypes_as_pefts(tiny_llama, tmp_path, dtype):
    models = pair(tiny_llama, dtype)
    outputs = [pairs.logits(model, input_ids=IDS) for model in models]
    assert torch.equal(*outputs)
    gradients = []
    for model in models:
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: v.grad for name, v in vectors(model).items()})
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    for model, library in zip(models, (ia3, peft), strict=True):
        assert dtypes(model) == {dtype}
        folder = tmp_path / library.__name__
        model.save_pretrained(folder)
        # Saved as they are; loaded as is asked for, by whichever library.
        saved = load_file(folder / "adapter_model.safetensors")
        assert {value.dtype for value in saved.values()} == {dtype}
        for reader in (ia3, peft):
            base = copy.deepcopy(tiny_llama).to(dtype)
            again = reader.PeftModel.from_pretrained(base, folder, **FOLLOWS)
            assert dtypes(again) == {dtype}
            again.load_adapter(folder, "wide")
            again.load_adapter(folder, "follows", **FOLLOWS)
            assert dtypes(again, "wide") == {torch.float32}
            assert dtypes(again, "follows") == {dtype}
            torch.testing.assert_close(
                pairs.logits(again, input_ids=IDS), outputs[0], rtol=0.02, atol=0.02
            )


def test_vectors_are_cast_with_the_base_model_or_stay(tiny_llama):
    theirs = peft.get_peft_model(copy.deepcopy(tiny_llama), peft.IA3Config(), **FOLLOWS)
    model = get_peft_model(tiny_llama, IA3Config(), **FOLLOWS)
    model.add_adapter("wide", IA3Config())
    model.set_adapter(["default", "wide"])
    model(input_ids=IDS, labels=IDS).loss.backward()
    for cast in ("half", "bfloat16", "float", "double"):
        for each in (model, theirs):
            getattr(each, cast)()
        assert dtypes(model) == dtypes(theirs)
        assert all(v.grad.dtype == v.dtype for v in vectors(model).values())
        wide = torch.float64 if cast == "double" else torch.float32
        assert dtypes(model, "wide") == {wide}
        assert {v.grad.dtype for v in vectors(model, "wide").values()} == {wide}
    assert dtypes(copy.deepcopy(model).half()) == {torch.float16}
    model.delete_adapter("default")
    model.add_adapter("default", IA3Config())
    assert dtypes(model.half()) == {torch.float32}


@pytest.mark.parametrize("kind", ["mixtral", "gpt2", "t5", "whisper"])
def test_all_kinds_of_modules(kind):
    """Computed, and merged, as vectors in float32 of the same values."""
    outputs = []
    for options in (FOLLOWS, {}):
        base = architectures.build(kind, torch.bfloat16)
        config = IA3Config(**architectures.ARCHITECTURES[kind].modules)
        if kind == "mixtral":
            config = IA3Config(
                target_modules=["v_proj", "experts"], feedforward_modules=["experts"]
            )
        model = get_peft_model(base, config, **options)
        for i, vector in enumerate(vectors(model).values()):
            generator = torch.Generator().manual_seed(i)
            value = (torch.rand(vector.shape, generator=generator) + 0.5).bfloat16()
            with torch.no_grad():
                vector.copy_(value)
        results = [architectures.output(kind, model)]
        model.merge_adapter()
        results.append(architectures.output(kind, model))
        model.unmerge_adapter()
        results.append(architectures.output(kind, model))
        outputs.append([result.detach() for result in results])
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


def test_rows_of_vectors_of_several_dtypes(tiny_llama):
    base = tiny_llama.bfloat16()
    model = get_peft_model(base, IA3Config(), "narrow", **FOLLOWS)
    model.add_adapter("wide", IA3Config())
    for seed, name in enumerate(("narrow", "wide")):
        randomize(model.vectors(name), seed)
    names = ["narrow", "wide", "__base__", "narrow"]
    rows = IDS.repeat(4, 1)
    expected = []
    for name in names:
        if name == "__base__":
            with model.disable_adapter():
                expected.append(pairs.logits(model, input_ids=rows)[:1])
        else:
            model.set_adapter(name)
            expected.append(pairs.logits(model, input_ids=rows)[:1])
    for trained in (True, False):
        for name in ("narrow", "wide"):
            for vector in model.vectors(name).values():
                vector.requires_grad_(trained)
        found = pairs.logits(model, input_ids=rows, adapter_names=names)
        torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=0)


def test_combined_banked_and_fused(tiny_llama, tmp_path):
    model = get_peft_model(tiny_llama.bfloat16(), IA3Config(), "narrow", **FOLLOWS)
    randomize(model.vectors("narrow"))
    model.add_weighted_adapter(["narrow"], [1.0], "same")
    assert dtypes(model, "same") == {torch.float32}
    for name, vector in model.vectors("narrow").items():
        assert torch.equal(model.vectors("same")[name], vector.float())
    expected = pairs.logits(model, input_ids=IDS)
    model.save_pretrained(tmp_path)
    bank = AdapterBank(model)
    bank.add("row", tmp_path / "narrow")
    found = pairs.logits(model, input_ids=IDS, adapter_names=["row"])
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    bank.close()
    model.fuse_mlp()
    torch.testing.assert_close(pairs.logits(model, input_ids=IDS), expected, rtol=0.02, atol=0.02)
