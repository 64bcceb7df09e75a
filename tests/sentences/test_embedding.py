"""Embeddings against plain formulas: one text at a time, in float64, with ids from the words."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.encoders import (
    HIDDEN,
    encoder_folder,
    mpnet,
    random_encoder,
    t5,
    tokenizer,
    vocabulary,
)
from torch import Tensor, nn

from ia3 import AdapterBank, IA3Config, IA3Error, IA3Model
from ia3.base.encoders import SentenceEncoder, load_encoder
from ia3.errors import InvalidTypeError
from ia3.sentences.embedding import embed, embeddings, tokenized

TEXTS = ["the quick brown fox", "", "a dog", "the lazy fox jumps over " * 9, "The Fox", "fox"]
PROMPT = "query : "
PROMPTS = {"prompts": {"query": PROMPT, "passage": "passage : "}, "default_prompt_name": "query"}


def words_ids(text: str, most: int = 32, *, pad: int = 0, ends: bool = True) -> list[int]:
    known = vocabulary(pad)
    ids = [known.get(word, known["<unk>"]) for word in text.split()]
    return [known["<s>"], *ids[: most - 2], known["</s>"]] if ends else ids[:most]


def formula(pooling: str, states: Tensor, first: int) -> Tensor:
    """The pooling of one text's states, of which those from `first` on count."""
    left = states[first:]
    weights = torch.arange(first + 1, len(states) + 1, dtype=torch.float64)
    values = {
        "cls": left[0],
        "max": left.max(0).values,
        "mean": left.mean(0),
        "mean_sqrt_len_tokens": left.sum(0) / math.sqrt(len(left)),
        "weightedmean": (left * weights[:, None]).sum(0) / weights.sum(),
        "lasttoken": left[-1],
    }
    return torch.cat([values[name] for name in pooling.split("+")])


def expected(
    encoder: SentenceEncoder, ids: list[list[int]], pooling: str, first: int = 0
) -> Tensor:
    # Float64 of the same random weights.
    model = random_encoder(encoder.model.config).double()
    rows = []
    with torch.no_grad():
        for row in ids:
            states = model(input_ids=torch.tensor([row])).last_hidden_state[0]
            rows.append(formula(pooling, states, first))
    return torch.stack(rows)


def new(*modes: str, **more: Any) -> dict[str, Any]:
    mode: Any = modes[0] if len(modes) == 1 else list(modes)
    return {"embedding_dimension": HIDDEN, "pooling_mode": mode, **more}


def old(**flags: bool) -> dict[str, Any]:
    return {"word_embedding_dimension": HIDDEN, **flags}


@pytest.mark.parametrize(
    ("pooling", "name"),
    [
        (old(pooling_mode_mean_tokens=True, pooling_mode_cls_token=False), "mean"),
        (old(pooling_mode_cls_token=True), "cls"),
        (old(pooling_mode_max_tokens=True, pooling_mode_lasttoken=True), "max+lasttoken"),
        (old(pooling_mode_weightedmean_tokens=True), "weightedmean"),
        (old(pooling_mode_mean_sqrt_len_tokens=True), "mean_sqrt_len_tokens"),
        (old(), "mean"),
        (new("max"), "max"),
        (new("lasttoken", "mean"), "lasttoken+mean"),
        (new("mean", pooling_mode_cls_token=True), "mean"),
        ({"pooling_mode": "cls"}, "cls"),
    ],
)
def test_each_pooling_in_each_form_is_the_formula(
    tmp_path: Path, pooling: dict[str, Any], name: str
) -> None:
    encoder = load_encoder(encoder_folder(tmp_path, pooling=pooling))
    assert encoder.pooling == name
    ids = [words_ids(text) for text in TEXTS]
    assert tokenized(encoder, TEXTS) == ids
    vectors = embeddings(encoder, ids)
    torch.testing.assert_close(vectors.double(), expected(encoder, ids, name), rtol=0, atol=1e-5)
    assert vectors.shape == (len(TEXTS), encoder.dimension)


@pytest.mark.parametrize(
    "mode", ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
)
@pytest.mark.parametrize("included", [True, False])
def test_a_prompt_is_before_each_text_and_in_the_pooling_or_not(
    tmp_path: Path, mode: str, included: bool
) -> None:
    pooling = new(mode, include_prompt=included)
    encoder = load_encoder(encoder_folder(tmp_path, pooling=pooling, prompts=PROMPTS))
    ids = [words_ids(PROMPT + text) for text in TEXTS]
    assert tokenized(encoder, TEXTS) == ids
    # The start's token is before the prompt's words.
    right = expected(encoder, ids, mode, first=0 if included else 3)
    torch.testing.assert_close(embeddings(encoder, ids).double(), right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [mpnet, t5])
def test_other_architectures_are_embedded_as_bert_is(tmp_path: Path, config: Any) -> None:
    made = config()
    encoder = load_encoder(encoder_folder(tmp_path, made))
    pad = made.pad_token_id
    ids = [words_ids(text, encoder.max_length, pad=pad) for text in TEXTS]
    assert tokenized(encoder, TEXTS) == ids
    right = expected(encoder, ids, "mean")
    torch.testing.assert_close(embeddings(encoder, ids).double(), right, rtol=0, atol=1e-5)


def test_dense_modules_and_normalising_are_the_formula(tmp_path: Path) -> None:
    identity = "torch.nn.modules.linear.Identity"
    dense = [
        {"in_features": HIDDEN, "out_features": 5},
        {"in_features": 5, "out_features": 7, "bias": False, "activation_function": identity},
    ]
    encoder = load_encoder(encoder_folder(tmp_path, dense=dense, normalize=True))
    ids = [words_ids(text) for text in TEXTS]
    one, two = (load_file(tmp_path / f"{n}_Dense/model.safetensors") for n in (2, 3))
    right = expected(encoder, ids, "mean") @ one["linear.weight"].double().T
    right = torch.tanh(right + one["linear.bias"]) @ two["linear.weight"].double().T
    right = right / right.pow(2).sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(embeddings(encoder, ids).double(), right, rtol=0, atol=1e-5)
    assert encoder.dimension == 7


def test_a_texts_case_and_length_are_as_the_settings_say(tmp_path: Path) -> None:
    settings = {"max_seq_length": 5, "do_lower_case": True}
    encoder = load_encoder(encoder_folder(tmp_path / "lower", settings=settings))
    assert tokenized(encoder, TEXTS) == [words_ids(text.lower(), 5) for text in TEXTS]
    # More than the model has positions for.
    settings = {"max_seq_length": 1000, "do_lower_case": False}
    encoder = load_encoder(encoder_folder(tmp_path / "long", settings=settings))
    assert encoder.max_length == 32
    assert tokenized(encoder, ["fox " * 99]) == [words_ids("fox " * 99, 32)]


def test_gradients_flow_and_float32_comes_of_bfloat16(tmp_path: Path) -> None:
    encoder = load_encoder(encoder_folder(tmp_path), dtype="bfloat16")
    ids = tokenized(encoder, TEXTS)
    vectors = embed(encoder, ids)
    assert vectors.dtype == torch.float32
    vectors.sum().backward()
    assert all(p.grad is not None for n, p in encoder.model.named_parameters() if "pooler" not in n)
    right = expected(encoder, ids, "mean").float()
    assert (vectors - right).abs().max() < 0.1


def test_what_is_embedded_without_gradients_may_be_learned_from(tmp_path: Path) -> None:
    encoder = load_encoder(encoder_folder(tmp_path))
    vectors = embeddings(encoder, tokenized(encoder, TEXTS))
    assert not vectors.requires_grad
    head = nn.Linear(HIDDEN, 2)
    head(vectors).sum().backward()
    assert head.weight.grad is not None


def test_batches_are_small_enough_and_a_text_twice_is_computed_once(tmp_path: Path) -> None:
    encoder = load_encoder(encoder_folder(tmp_path))
    ids = tokenized(encoder, [*TEXTS, "fox", *TEXTS])
    shapes, said = [], []
    hook = encoder.model.register_forward_hook(
        lambda module, args, given, out: shapes.append(tuple(given["input_ids"].shape)),
        with_kwargs=True,
    )
    vectors = embeddings(encoder, ids, max_tokens=16, progress=said.append)
    hook.remove()
    assert sum(rows for rows, _ in shapes) == len(TEXTS)
    assert all(rows * width <= 16 or rows == 1 for rows, width in shapes)
    assert sum(said) == len(ids)
    assert torch.equal(vectors[: len(TEXTS)], vectors[len(TEXTS) + 1 :])
    torch.testing.assert_close(vectors, embeddings(encoder, ids), rtol=0, atol=1e-5)


def test_nothing_and_texts_without_tokens_have_vectors(tmp_path: Path) -> None:
    encoder = load_encoder(encoder_folder(tmp_path, pooling=new("cls", "max", "mean"), ends=False))
    assert tokenized(encoder, []) == []
    assert embed(encoder, []).shape == embeddings(encoder, []).shape == (0, 3 * HIDDEN)
    ids = tokenized(encoder, ["", "fox"])
    assert ids[0] == []
    vectors = embeddings(encoder, ids)
    assert torch.equal(vectors[0], torch.zeros(3 * HIDDEN))
    assert vectors[1].abs().max() > 0
    assert torch.equal(embeddings(encoder, [[]]), vectors[:1])


def test_one_batch_mixes_the_adapters_of_a_bank(tmp_path: Path) -> None:
    encoder = load_encoder(encoder_folder(tmp_path / "encoder"))
    ids = tokenized(encoder, TEXTS)
    right = {"__base__": embeddings(encoder, ids)}
    config = IA3Config(target_modules=["value", "intermediate.dense"], feedforward_modules=[])
    model = IA3Model(encoder.model, config)
    for seed, name in enumerate(["one", "two"]):
        generator = torch.Generator().manual_seed(seed)
        for key, vector in model.named_parameters():
            if "ia3" in key:
                vector.data = 1 + 0.3 * torch.randn(vector.shape, generator=generator)
        right[name] = embeddings(encoder, ids, model=model)
        # What was computed without gradients is not in the way of them.
        embed(encoder, ids, model=model).sum().backward()
        assert all(v.grad is not None for k, v in model.named_parameters() if "ia3" in k)
        model.save_pretrained(tmp_path / name)
    bank = AdapterBank(model.unload())
    bank.add("one", tmp_path / "one")
    bank.add("two", tmp_path / "two")
    names = ["one", "two", "__base__", "two", "two", "one"] * 2
    rows = torch.stack([right[name][row % len(ids)] for row, name in enumerate(names)])
    mixed = embeddings(encoder, [*ids, *ids], model=bank.model, adapter_names=names)
    torch.testing.assert_close(mixed, rows, rtol=0, atol=1e-5)
    batch = embed(encoder, [*ids, *ids], model=bank.model, adapter_names=names)
    torch.testing.assert_close(batch.detach(), rows, rtol=0, atol=1e-5)
    assert (right["one"] - right["two"]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("texts", "kind", "says"),
    [
        ("a text", InvalidTypeError, "a list of texts"),
        (None, InvalidTypeError, "a list of texts"),
        (["a", 3], InvalidTypeError, "texts has 3"),
        (["a", "\ud800"], IA3Error, "half a character"),
    ],
)
def test_what_is_no_text_is_named(tmp_path: Path, texts: Any, kind: type, says: str) -> None:
    encoder = load_encoder(encoder_folder(tmp_path))
    with pytest.raises(kind, match=says):
        tokenized(encoder, texts)


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    encoder = load_encoder(encoder_folder(tmp_path))
    with pytest.raises(IA3Error, match="max_tokens is 0"):
        embeddings(encoder, [[1]], max_tokens=0)
    with pytest.raises(InvalidTypeError, match="progress"):
        embeddings(encoder, [[1]], progress=3)  # type: ignore[arg-type]
    with pytest.raises(IA3Error, match="adapter_names has 2 names, expected 1"):
        embeddings(encoder, [[1]], adapter_names=["a", "b"])


def test_a_tokenizer_that_is_given_is_used(tmp_path: Path) -> None:
    folder = encoder_folder(tmp_path, settings={"max_seq_length": 8, "do_lower_case": True})
    given = tokenizer(ends=False)
    encoder = load_encoder(folder, tokenizer=given)
    assert encoder.tokenizer is given
    assert tokenized(encoder, ["The Fox"]) == [words_ids("The Fox", ends=False)]


def test_several_threads_tokenize_at_once(tmp_path: Path) -> None:
    encoder = load_encoder(encoder_folder(tmp_path))
    texts = ["the quick brown fox jumps over a lazy dog"] * 999
    # The first calls of a tokenizer, of which none may change it under another.
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: tokenized(encoder, texts), range(16)))
    assert found == [[words_ids(text) for text in texts]] * 16
