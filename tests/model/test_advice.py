"""What is said when a Trainer begins: a learning rate of LoRA's, and weight decay, on vectors."""

import re
import subprocess
import sys
import warnings

import pytest
import torch
import transformers as hf
from support.tfew import VOCABULARY, child_environment, tiny_llama
from torch import nn

import ia3
from ia3 import IA3Config, IA3Model

SAID = {
    "rate": r"learning rate of 5e-05, as is usual for LoRA.* wants 1e-3 to 1e-2",
    "decay": r"weight decay of 0\.01 pulls the vectors towards 0",
}


def rows():
    ids = torch.arange(6) % VOCABULARY
    return [{"input_ids": ids, "labels": ids}] * 2


def trained(model, folder, **given):
    """Train a step, and return what was said of vectors."""
    settings = {"max_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    optimizers = given.pop("optimizers", (None, None))
    arguments = hf.TrainingArguments(str(folder), **{**settings, "save_strategy": "no", **given})
    trainer = hf.Trainer(model, arguments, train_dataset=rows(), optimizers=optimizers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    told = [each for each in caught if "the vectors" in str(each.message)]
    assert all((each.category, each.filename) == (UserWarning, __file__) for each in told)
    return [str(each.message) for each in told]


def adapted(**config):
    return IA3Model(tiny_llama(), IA3Config(**config))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"learning_rate": 3e-3}, []),
        ({"learning_rate": 1e-3}, []),
        ({}, ["rate"]),  # the Trainer's own, 5e-5
        ({"learning_rate": 5e-5, "warmup_steps": 10}, ["rate"]),
        ({"learning_rate": 3e-3, "warmup_steps": 10}, []),  # it begins at 0
        ({"learning_rate": 3e-3, "lr_scheduler_type": "cosine"}, []),
        ({"learning_rate": 3e-3, "weight_decay": 0.01}, ["decay"]),
        ({"weight_decay": 0.01}, ["rate", "decay"]),
        ({"optim": "adafactor"}, ["rate"]),
        ({"optim": "sgd"}, []),  # of another scale
    ],
)
def test_the_settings_of_a_trainer(tmp_path, settings, expected):
    said = trained(adapted(), tmp_path, **settings)
    assert len(said) == len(expected)
    for sentence, name in zip(said, expected, strict=True):
        assert re.search(SAID[name], sentence), sentence


def test_an_optimizer_of_the_users_own(tmp_path):
    """Its groups count, not the arguments; AdamW's own weight decay is 0.01."""
    model = adapted(modules_to_save=["lm_head"])
    vectors = [*model.vectors("default").values()]
    head = [p for p in model.parameters() if p.requires_grad and all(p is not v for v in vectors)]
    assert head
    for groups, said in (
        ([{"params": vectors, "lr": 3e-3, "weight_decay": 0}, {"params": head, "lr": 5e-5}], 0),
        ([{"params": vectors, "lr": 5e-5, "weight_decay": 0}, {"params": head, "lr": 3e-3}], 1),
        ([{"params": [*vectors, *head], "lr": 3e-3}], 1),
        ([{"params": head, "lr": 5e-5}], 0),
    ):
        optimizer = torch.optim.AdamW(groups)
        assert len(trained(model, tmp_path, optimizers=(optimizer, None))) == said


def test_nothing_is_said_where_no_vector_trains(tmp_path):
    adapted()  # a Trainer gives advice from now on
    assert trained(tiny_llama(), tmp_path) == []
    head_alone = adapted(modules_to_save=["lm_head"])
    for vector in head_alone.vectors("default").values():
        vector.requires_grad = False
    assert trained(head_alone, tmp_path) == []


def test_models_with_adapters_and_no_wrapper(tmp_path):
    injected = ia3.inject_adapter_in_model(IA3Config(), tiny_llama())
    assert len(trained(injected, tmp_path)) == 1

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = adapted()

        def forward(self, input_ids, labels):
            return self.inner(input_ids=input_ids, labels=labels)

    assert len(trained(Wrapper(), tmp_path)) == 1


CHILD = """
import sys, torch, warnings
from support.tfew import tiny_llama
from ia3 import IA3Config, IA3Model
assert "transformers.trainer" not in sys.modules
model = IA3Model(tiny_llama(), IA3Config())
from transformers import Trainer, TrainingArguments
settings = {"max_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
args = TrainingArguments(sys.argv[1], save_strategy="no", **settings)
ids = torch.arange(6)
warnings.simplefilter("error", UserWarning)
Trainer(model, args, train_dataset=[{"input_ids": ids, "labels": ids}]).train()
"""


def test_a_trainer_that_is_imported_after_the_model_was_made(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        env=child_environment(),
        capture_output=True,
        text=True,
    )
    assert "UserWarning: the vectors train at a learning rate of 5e-05" in done.stderr
    assert done.returncode == 1
