"""transformers' `Trainer` treats a model with adapters as it treats PEFT's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

import ia3
from ia3 import IA3Config, IA3Error, IA3Model, PeftModel, get_peft_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

VOCABULARY = 48
BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "num_labels": 3,
}
QUIET: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
STEPS = 4
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}
BASE_FILES = {"model.safetensors", "pytorch_model.bin", "config.json"}


def classifier() -> PreTrainedModel:
    """With dropout, so that the random state matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertForSequenceClassification(BertConfig(**BERT))


def rows(count: int = 16) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(1, VOCABULARY, (7,), generator=generator),
            "attention_mask": torch.ones(7, dtype=torch.long),
            "labels": torch.tensor(i % 3),
            "row": torch.tensor(i),  # no argument of the model
        }
        for i in range(count)
    ]


def adapted(library: Any = ia3, task_type: str | None = "SEQ_CLS") -> Any:
    return library.get_peft_model(classifier(), library.IA3Config(task_type=task_type))


def trainer(
    model: nn.Module, folder: Path, subclass: type[Trainer] = Trainer, **arguments: Any
) -> Trainer:
    given = {"max_steps": STEPS, "save_steps": 2, **QUIET, **arguments}
    return subclass(
        model=model,
        args=TrainingArguments(str(folder), **given),
        train_dataset=rows(),
        eval_dataset=rows(8),
    )


def values(model: Any) -> dict[str, Tensor]:
    library = ia3 if isinstance(model, IA3Model) else peft
    found = library.get_peft_model_state_dict(model)
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# -- as with PEFT ----------------------------------------------------------------------------------

CHOICES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bfloat16": {"bf16": True},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "accumulation": {"gradient_accumulation_steps": 2},
    "noise and smoothing": {"neftune_noise_alpha": 1.0, "label_smoothing_factor": 0.1},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
}


@pytest.mark.parametrize(
    ("task_type", "choice"), [("SEQ_CLS", choice) for choice in CHOICES] + [(None, "plain")]
)
def test_losses_are_pefts(tmp_path: Path, task_type: str | None, choice: str) -> None:
    losses, trained = [], []
    for library in (ia3, peft):
        folder = tmp_path / library.__name__
        run = trainer(
            adapted(library, task_type), folder, save_strategy="no", max_steps=2, **CHOICES[choice]
        )
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
        losses[-1].append(run.evaluate()["eval_loss"])
        trained.append(values(run.model))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    near = {"rtol": 1e-2, "atol": 1e-3} if choice == "bfloat16" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(trained[0], trained[1], **near)
    start = values(adapted(ia3, task_type))
    assert all(not torch.equal(trained[0][name], start[name]) for name in start)


def test_a_checkpoint_holds_the_adapter_alone(tmp_path: Path) -> None:
    run = trainer(adapted(), tmp_path)
    run.train()
    for step in (2, 4):
        files = {path.name for path in (tmp_path / f"checkpoint-{step}").iterdir()}
        assert files >= ADAPTER_FILES
        assert not files & BASE_FILES
    inputs = {"input_ids": rows()[0]["input_ids"][None]}
    expected = run.model.eval()(**inputs).logits
    again = PeftModel.from_pretrained(classifier().eval(), tmp_path / "checkpoint-4")
    assert torch.equal(again(**inputs).logits, expected)
    theirs = peft.PeftModel.from_pretrained(classifier().eval(), tmp_path / "checkpoint-4")
    torch.testing.assert_close(theirs(**inputs).logits, expected, rtol=1e-5, atol=1e-6)


# -- resuming --------------------------------------------------------------------------------------


class StoppedError(Exception):
    pass


class StopsAfter3(Trainer):  # type: ignore[misc]
    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.state.global_step == 3:
            raise StoppedError
        loss: Tensor = super().training_step(*args, **kwargs)
        return loss


@pytest.mark.parametrize("choice", ["plain", "bfloat16"])
def test_resuming_ends_with_the_same_bits(tmp_path: Path, choice: str) -> None:
    whole = trainer(adapted(), tmp_path / "whole", **CHOICES[choice])
    whole.train()
    with pytest.raises(StoppedError):
        trainer(adapted(), tmp_path / "parts", StopsAfter3, **CHOICES[choice]).train()
    rest = trainer(adapted(), tmp_path / "parts", **CHOICES[choice])
    rest.train(resume_from_checkpoint=True)
    steps = [entry["step"] for entry in rest.state.log_history if "loss" in entry]
    assert steps == [1, 2, 3, 4]
    assert_same(values(rest.model), values(whole.model))


def test_resuming_from_pefts_checkpoint(tmp_path: Path) -> None:
    """A run that was begun with PEFT goes on with this library."""
    whole = trainer(adapted(peft), tmp_path / "whole")
    whole.train()
    with pytest.raises(StoppedError):
        trainer(adapted(peft), tmp_path / "parts", StopsAfter3).train()
    rest = trainer(adapted(), tmp_path / "parts")
    rest.train(resume_from_checkpoint=True)
    torch.testing.assert_close(values(rest.model), values(whole.model), rtol=1e-4, atol=1e-5)


def test_resuming_with_several_adapters(tmp_path: Path) -> None:
    def two_adapters() -> IA3Model:
        model: IA3Model = adapted()
        model.add_adapter("other", IA3Config(target_modules=["query"], feedforward_modules=[]))
        with torch.no_grad():
            for vector in model.vectors("other").values():
                vector.fill_(1.5)
        model.set_adapter("other")
        return model

    whole = trainer(two_adapters(), tmp_path / "whole")
    whole.train()
    with pytest.raises(StoppedError):
        trainer(two_adapters(), tmp_path / "parts", StopsAfter3).train()
    assert {
        path.name for path in (tmp_path / "parts/checkpoint-2/other").iterdir()
    } == ADAPTER_FILES
    rest = trainer(two_adapters(), tmp_path / "parts")
    rest.train(resume_from_checkpoint=True)
    assert rest.model.active_adapters == ["other"]
    for name in ("default", "other"):
        for module, vector in whole.model.vectors(name).items():
            assert torch.equal(rest.model.vectors(name)[module], vector), (name, module)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    scores = iter([1.0, 0.0])
    model = adapted()
    run = Trainer(
        model=model,
        args=TrainingArguments(
            str(tmp_path),
            max_steps=STEPS,
            save_steps=2,
            eval_steps=2,
            eval_strategy="steps",
            load_best_model_at_end=True,
            metric_for_best_model="score",
            **QUIET,
        ),
        train_dataset=rows(),
        eval_dataset=rows(8),
        compute_metrics=lambda _: {"score": next(scores)},
    )
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    file = tmp_path / "checkpoint-2" / "adapter_model.safetensors"
    assert_same(values(model), load_file(file))
    last = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    assert any(not torch.equal(last[name], value) for name, value in values(model).items())
    assert run.model is model
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_loading_into_an_adapter_changes_its_values_in_place(tmp_path: Path) -> None:
    """What the Trainer does on resuming: the optimizer holds these very parameters."""
    source = adapted()
    with torch.no_grad():
        for parameter in source.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    source.save_pretrained(tmp_path)
    model = adapted()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    config = model.peft_config["default"]
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert_same(values(model), values(source))
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == parameters.keys()
    assert all(found[name] is parameter for name, parameter in parameters.items())
    assert model.peft_config["default"] is config


@pytest.mark.parametrize("spoiled", ["ia3_l", "classifier.weight"])
@pytest.mark.parametrize("how", ["gone", "shape", "extra"])
def test_loading_what_does_not_fit_changes_nothing(tmp_path: Path, spoiled: str, how: str) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {name: tensor + 1 for name, tensor in load_file(file).items()}
    name = next(name for name in sorted(tensors) if name.endswith(spoiled))
    if how == "gone":
        del tensors[name]
    elif how == "shape":
        tensors[name] = torch.ones(7, 7)
    else:
        tensors[name.replace("base_model.model.", "base_model.model.no.")] = tensors[name].clone()
    save_file(tensors, file)
    before = values(model)
    with pytest.raises(IA3Error, match="does not fit"):
        model.load_adapter(tmp_path, "default", is_trainable=True)
    model.merge_adapter()
    with pytest.raises(IA3Error, match=r"'default' is merged: unmerge_adapter\(\) first"):
        model.load_adapter(tmp_path, "default", is_trainable=True)
    assert_same(values(model), before)


def test_loading_where_other_values_stay_one_changes_nothing(
    tmp_path: Path, tiny_gpt2: PreTrainedModel
) -> None:
    """PEFT's sites and the paper's differ on GPT-2 in what of the vectors is trained alone."""
    model = get_peft_model(tiny_gpt2, IA3Config())
    with torch.no_grad():
        for vector in model.vectors("default").values():
            vector.fill_(2.0)
    model.save_pretrained(tmp_path)
    paper = get_peft_model(model.unload(), IA3Config(paper_sites=True))
    with pytest.raises(IA3Error, match="stay one"):
        paper.load_adapter(tmp_path, "default")
    assert all(bool((v == 1).all()) for v in paper.vectors("default").values())


# -- columns and labels ----------------------------------------------------------------------------


@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
def test_columns_are_those_of_the_base_model(tmp_path: Path, task_type: str | None) -> None:
    seen: list[set[str]] = []
    model = adapted(ia3, task_type)
    forward = type(model.model).forward

    class Watched(Trainer):  # type: ignore[misc]
        def training_step(self, model: nn.Module, inputs: Any, *args: Any) -> Tensor:
            seen.append(set(inputs))
            loss: Tensor = super().training_step(model, inputs, *args)
            return loss

    trainer(model, tmp_path, Watched, max_steps=1, save_strategy="no").train()
    assert seen == [{"input_ids", "attention_mask", "labels"}]
    assert type(model.model).forward is forward


def test_labels_are_those_of_the_base_model(tmp_path: Path) -> None:
    data = [
        {name: row[name] for name in ("input_ids", "attention_mask")}
        | {"start_positions": torch.tensor(i % 7), "end_positions": torch.tensor(i % 5)}
        for i, row in enumerate(rows(8))
    ]
    found = []
    for library in (ia3, peft):
        torch.manual_seed(0)
        model = library.get_peft_model(
            BertForQuestionAnswering(BertConfig(**{**BERT, "num_labels": 2})),
            library.IA3Config(task_type="QUESTION_ANS"),
        )
        run = Trainer(
            model=model,
            args=TrainingArguments(str(tmp_path), max_steps=2, save_strategy="no", **QUIET),
            train_dataset=data,
        )
        run.train()
        prediction = run.predict(data)
        assert run.label_names == ["start_positions", "end_positions"]
        found.append((prediction.metrics["test_loss"], prediction.label_ids))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    np.testing.assert_equal(found[0][1], found[1][1])


def test_generating_while_evaluating(tmp_path: Path, tiny_t5: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (8, 2, 5), generator=generator).tolist()
    data = [
        {"input_ids": prompt, "attention_mask": [1] * 5, "labels": answer} for prompt, answer in ids
    ]
    model = get_peft_model(tiny_t5, IA3Config(task_type="SEQ_2_SEQ_LM"))
    run = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            str(tmp_path),
            max_steps=2,
            save_steps=1,
            predict_with_generate=True,
            generation_max_length=6,
            **QUIET,
        ),
        train_dataset=data,
    )
    run.train()
    prediction = run.predict(data)
    inputs = torch.tensor([row["input_ids"] for row in data])
    expected = model.generate(input_ids=inputs, max_length=6)
    assert torch.equal(torch.tensor(prediction.predictions)[:, : expected.shape[1]], expected)
    assert {path.name for path in (tmp_path / "checkpoint-1").iterdir()} >= ADAPTER_FILES


# -- every other model is left alone ---------------------------------------------------------------


def test_other_models_are_saved_as_ever(tmp_path: Path) -> None:
    trainer(classifier(), tmp_path / "base", max_steps=2).train()
    files = {path.name for path in (tmp_path / "base/checkpoint-2").iterdir()}
    assert files >= {"model.safetensors", "config.json"}
    trainer(adapted(peft), tmp_path / "peft", max_steps=2).train()
    files = {path.name for path in (tmp_path / "peft/checkpoint-2").iterdir()}
    assert files >= ADAPTER_FILES
    assert not files & BASE_FILES

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Embedding(VOCABULARY, 3)

        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            scores = self.score(input_ids).mean(1)
            assert labels is not None
            return {"loss": nn.functional.cross_entropy(scores, labels), "logits": scores}

    trainer(Other(), tmp_path / "other", max_steps=2).train()
    files = {path.name for path in (tmp_path / "other/checkpoint-2").iterdir()}
    assert "model.safetensors" in files
    assert "config.json" not in files


def test_unloaded_and_merged_models_are_saved_whole(tmp_path: Path) -> None:
    merged = adapted().merge_and_unload()
    trainer(merged, tmp_path, max_steps=2).train()
    files = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert files >= {"model.safetensors", "config.json"}
    assert not files & ADAPTER_FILES


# -- with and without peft, before and after -------------------------------------------------------

WITHOUT_PEFT = """
import importlib.util, sys

class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "peft":
            raise ModuleNotFoundError("No module named 'peft'", name="peft")

sys.meta_path.insert(0, Nowhere())
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name.split(".")[0] == "peft" else found(name, package)
)
"""

TRAINER = """
from transformers import Trainer, TrainingArguments
"""

MODEL = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
base = LlamaForCausalLM(LlamaConfig(
    vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
))
before = "transformers.trainer" in sys.modules
import ia3
model = ia3.get_peft_model(base, ia3.IA3Config(task_type="CAUSAL_LM"))
assert ("transformers.trainer" in sys.modules) == before
"""

TRAIN = """
from pathlib import Path
row = {"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([1, 2, 3]), "row": 0}
folder = Path(sys.argv[1])
def run(steps, resume):
    arguments = TrainingArguments(
        str(folder), max_steps=steps, save_steps=1, report_to="none", disable_tqdm=True,
        use_cpu=True, per_device_train_batch_size=2,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=[row] * 8)
    assert trainer.label_names == ["labels"]
    trainer.train(resume_from_checkpoint=resume)
run(1, None)
run(2, True)
names = {path.name for path in (folder / "checkpoint-2").iterdir()}
assert {"adapter_config.json", "adapter_model.safetensors"} <= names, names
assert not {"model.safetensors", "config.json"} & names, names
print("peft" in sys.modules)
"""


@pytest.mark.parametrize(
    ("script", "peft_is_there"),
    [
        (WITHOUT_PEFT + TRAINER + MODEL + TRAIN, False),
        (WITHOUT_PEFT + MODEL + TRAINER + TRAIN, False),
        (MODEL + TRAINER + TRAIN, True),
    ],
    ids=["no peft, Trainer first", "no peft, model first", "peft, model first"],
)
def test_in_any_order(tmp_path: Path, script: str, peft_is_there: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == str(peft_is_there)
