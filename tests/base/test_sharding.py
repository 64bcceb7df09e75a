"""Base models whose weights are spread over the processes of a job."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from support.processes import in_forks, in_processes, results_of
from support.sentences import bert, tokenizer
from support.tfew import tiny_llama, tiny_t5, word_tokenizer
from support.versions import since
from torch import distributed
from transformers import LlamaConfig, LlamaForCausalLM

from ia3 import FewShotClassifier, IA3Config, fit_many, get_peft_model
from ia3.base.loading import load_base_model
from ia3.base.sharding import is_asked
from ia3.errors import IA3Error, StateError
from ia3.model.ia3_model import IA3Model

needs_plans = since("transformers", "5.23", "a model that is spread as it is read")

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}
IDS = torch.arange(3, 19).reshape(2, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder / "llama")
    tiny_t5().save_pretrained(folder / "t5")
    return folder


def loaded(folder: Path, **options: Any) -> Any:
    return load_base_model(folder, tokenizer=word_tokenizer(), **options).model


@needs_plans
def test_each_process_has_its_part_and_computes_what_the_whole_model_does(tmp_path, folder):
    def work() -> Any:
        model = loaded(folder / "llama", shard=True)
        own = sum(value.to_local().numel() for value in model.parameters())
        again = load_base_model(folder / "llama", tokenizer=word_tokenizer(), shard=False).model
        with torch.no_grad():
            found = [each(input_ids=IDS).logits for each in (model, again)]
        return own, *found, type(next(again.parameters()).data)

    whole = tiny_llama()
    values = sum(value.numel() for value in whole.parameters())
    for own, found, alone, kind in results_of(work, tmp_path):
        assert own < 0.6 * values
        with torch.no_grad():
            expected = whole(input_ids=IDS).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        # The same name without shard is another model, which is whole.
        torch.testing.assert_close(alone, expected, rtol=0, atol=1e-5)
        assert kind is torch.Tensor


def test_one_process_has_nobody_to_spread_it_over(folder):
    assert type(next(loaded(folder / "llama", shard=True).parameters()).data) is torch.Tensor


def test_accelerates_launcher_asks_for_it_and_for_its_second_version(tmp_path, monkeypatch):
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    asked = partial(results_of, folder=tmp_path)
    assert asked(lambda: is_asked(None)) == [True, True]
    assert asked(lambda: is_asked(False)) == [False, False]
    assert is_asked(None) is False
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(StateError, match="expected --fsdp_version 2"):
        is_asked(None)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    assert asked(lambda: is_asked(None)) == [False, False]
    assert asked(lambda: is_asked(True)) == [True, True]


def test_under_accelerates_fsdp_all_processes_read_the_weights(tmp_path, folder, monkeypatch):
    """transformers would leave them to accelerate on all but the first."""
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    expected = tiny_llama().state_dict()
    for found in results_of(lambda: loaded(folder / "llama").state_dict(), tmp_path):
        torch.testing.assert_close(found, expected)


@needs_plans
def test_what_cannot_be_spread_is_refused_by_a_sentence(tmp_path, folder):
    quantized = tmp_path / "quantized"
    quantized.mkdir()
    config = json.loads((folder / "llama" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantized / "config.json").write_text(json.dumps(config))
    for name, words in ((folder / "t5", "an encoder-decoder"), (quantized, "is quantized")):
        work = partial(loaded, name, shard=True)
        for error in in_forks(work, tmp_path / "work"):
            assert isinstance(error, StateError)
            assert words in str(error)


def test_an_encoder_is_held_by_each_process(tmp_path):
    bert().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    classifier = FewShotClassifier(str(tmp_path), shard=True)
    with pytest.raises(IA3Error, match="is a sentence encoder, which each of them holds"):
        classifier.fit(["one", "two"], ["a", "b"])


@contextmanager
def own_memory() -> Iterator[list[int]]:
    """What this process alone holds, in bytes, every millisecond within the context.

    Without the weights' file, of which the system keeps one copy for all processes and maps as much
    into each as suits it.
    """

    def now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    def sample() -> None:
        while not ended.wait(0.001):
            samples.append(now())

    samples = [now()]
    ended = Event()
    sampling = Thread(target=sample)
    sampling.start()
    try:
        yield samples
    finally:
        ended.set()
        sampling.join()


LARGE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 16}
LARGE |= {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 512}


def peak(folder: Path) -> None:
    """Write by how much a process's memory has grown at most, with all it takes to train."""
    # First with a small model: what is imported then is not the model's.
    for name in ("small", "large"):
        with own_memory() as samples:
            base = loaded(folder / name, shard=True)
            model: IA3Model = get_peft_model(base, IA3Config(inference_mode=True))
            model.set_requires_grad("default")
            for _ in range(2):
                model(input_ids=IDS, labels=IDS).loss.backward()
    (folder / f"{distributed.get_rank()}.txt").write_text(str(max(samples) - samples[0]))


@needs_plans
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read in /proc")
def test_no_process_ever_holds_all(tmp_path):
    """Four of them read and train a model of 200 MB."""
    for name, layers in (("small", 1), ("large", 16)):
        model = LlamaForCausalLM(LlamaConfig(**{**LARGE, "num_hidden_layers": layers}))
        # Halves, so that what is read is not what is held.
        model.half().save_pretrained(tmp_path / name)
    whole = sum(2 * value.nbytes for value in model.parameters())
    assert whole > 200e6
    in_processes(peak, tmp_path, 4)
    for rank in range(4):
        assert int((tmp_path / f"{rank}.txt").read_text()) < 0.8 * whole


@needs_plans
def test_many_tasks_each_have_a_model_to_themselves(tmp_path, monkeypatch):
    """Also where accelerate's launcher asks for a model that is spread."""
    tiny_llama().save_pretrained(tmp_path / "llama")
    tokenizer().save_pretrained(tmp_path / "llama")
    texts = (["one two", "three four"], ["a", "b"])
    tasks = dict.fromkeys(("first", "second", "third"), texts)
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)

    def work(shard: bool | None = None) -> Any:
        classifier = FewShotClassifier(str(tmp_path / "llama"), steps=1, threads=1, shard=shard)
        fitted = fit_many(tasks, classifier)
        return fitted.failures, list(fitted.classifiers)

    assert results_of(work, tmp_path / "work") == [({}, [*tasks])] * 2
    for error in in_forks(partial(work, True), tmp_path / "work"):
        assert isinstance(error, IA3Error)
        assert "gives each of them tasks of its own" in str(error)
