"""T-Few against the authors' own code: losses, gradients, and 20 optimizer steps with the trainer.

Their vectors multiply the output of `wi_1`, ours the input of `wo`: the same product.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.paths import SHARED
from support.tfew import word_tokenizer
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from ia3 import IA3Model
from ia3.adapter.convert import convert_tfew_authors
from ia3.base.loading import BaseModel
from ia3.tfew import TFewConfig, TrainingExample, tfew_loss, train
from ia3.tfew.prompts.encoding import EncodedExample
from ia3.tfew.scoring.choices import token_scores
from ia3.tfew.training.losses import token_loss

GOLDEN = SHARED / "golden"
SUFFIX = ".multi_lora_b"
STEPS = 20


@dataclass
class Case:
    """One of the authors' runs, and our model with their first vectors on it."""

    figures: dict[str, Any]
    tensors: dict[str, Tensor]
    examples: list[EncodedExample]
    base: BaseModel
    ia3_model: IA3Model

    @property
    def labels(self):
        return torch.tensor(self.figures["labels"])

    @property
    def weights(self):
        terms = self.figures["config"]
        return {
            "lm": 1.0,
            "length_norm": float(terms["mc_loss"]),
            "unlikelihood": float(terms["unlikely_loss"]),
        }

    @property
    def constant(self):
        """What their unlikelihood has less than ours, and the total with it.

        Their sum runs over padding and the right answers too, where p is 0: −log(1.01) each.
        """
        targets = torch.tensor(self.figures["answer_choices_ids"])
        of_wrong = targets != 0
        of_wrong[torch.arange(len(targets)), self.labels] = False
        counted = int(of_wrong.sum())
        return (targets.numel() - counted) / counted * math.log(1.01)

    def theirs(self, prefix):
        """Our module name -> their tensor, flat."""
        return {
            name.removeprefix(f"{prefix}.").removesuffix(SUFFIX).replace("wi_1", "wo"): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(f"{prefix}.")
        }

    def loss(self):
        """From the prompts and choices, as the trainer computes it."""
        return token_loss(token_scores(self.base, self.examples), self.labels, **self.weights)

    def loss_of_logits(self):
        """From the model's own logits of everything, padding included."""
        prompts = torch.tensor(self.figures["input_ids"])
        targets = torch.tensor(self.figures["answer_choices_ids"])
        batch, choices, length = targets.shape
        repeated = prompts.repeat_interleave(choices, 0)
        rows = targets.flatten(0, 1)
        logits = self.base.model(
            input_ids=repeated,
            attention_mask=repeated != 0,
            decoder_input_ids=torch.cat([torch.zeros_like(rows[:, :1]), rows[:, :-1]], 1),
        ).logits
        logits = logits.reshape(batch, choices, length, -1)
        return tfew_loss(logits, targets, self.labels, pad_token_id=0, **self.weights)


@pytest.fixture(params=["lm+ln+ul", "lm only scored", "lm+ln"])
def case(request, tmp_path):
    path = GOLDEN / "tfew_losses.json"
    if not path.is_file():
        pytest.skip(f"the authors' figures are not there: {path}")
    figures = next(c for c in json.loads(path.read_text())["cases"] if c["name"] == request.param)
    tensors = load_file(GOLDEN / figures["vectors"])
    model = AutoModelForSeq2SeqLM.from_pretrained(GOLDEN / "tiny-t5-gated").eval()
    first = {
        name.removeprefix("init."): tensor[:, None]
        for name, tensor in tensors.items()
        if name.startswith("init.")
    }
    torch.save(first, tmp_path / "first.pt")
    config, vectors = convert_tfew_authors(tmp_path / "first.pt", model)
    examples = [
        EncodedExample(
            tuple(t for t in prompt if t), tuple(tuple(t for t in c if t) for c in choices)
        )
        for prompt, choices in zip(figures["input_ids"], figures["answer_choices_ids"], strict=True)
    ]
    base = BaseModel(model, word_tokenizer(), "tiny-t5-gated")
    return Case(figures, tensors, examples, base, IA3Model(model, config, vectors=vectors))


@pytest.mark.parametrize("way", ["loss", "loss_of_logits"])
def test_every_term_equals_the_authors(case, way):
    loss = getattr(case, way)()
    figures, weights = case.figures["losses"], case.weights
    assert loss.lm.item() == pytest.approx(figures["lm_loss"], abs=1e-5)
    total = figures["loss"]
    if weights["length_norm"]:
        assert loss.length_norm.item() == pytest.approx(figures["mc_loss"], abs=1e-5)
    if weights["unlikelihood"]:
        theirs = figures["unlikely_loss"] + case.constant
        assert loss.unlikelihood.item() == pytest.approx(theirs, abs=1e-5)
        total += case.constant
    assert loss.total.item() == pytest.approx(total, abs=1e-5)


# Their own gradients are up to 2.5e-5 from those in float64. The trainer sums in their order; the
# model's logits of every prompt once a choice are summed in another.
@pytest.mark.parametrize(("way", "tolerance"), [("loss", 1e-5), ("loss_of_logits", 3e-5)])
def test_the_gradient_of_every_vector_equals_the_authors(case, way, tolerance):
    vectors = case.ia3_model.vectors("default")
    gradients = torch.autograd.grad(getattr(case, way)().total, list(vectors.values()))
    theirs = case.theirs("grad")
    assert theirs.keys() == vectors.keys()
    for name, gradient in zip(vectors, gradients, strict=True):
        error = (gradient.flatten() - theirs[name]).norm() / theirs[name].norm()
        assert error < tolerance, name


def test_ranking_equals_the_authors(case):
    scores = token_scores(case.base, case.examples)
    # Without length normalisation they rank by the plain sum. Their scores are negated.
    normalised = case.figures["config"]["length_norm"]
    ranked = scores.mean_log_probs() if normalised else scores.log_probs.sum(-1)
    assert ranked.argmax(1).tolist() == case.figures["prediction"]
    labels = case.labels[:, None]
    ours = -ranked.gather(1, labels)[:, 0]
    theirs = torch.tensor(case.figures["score_of_label"])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    others = -ranked.scatter(1, labels, -torch.inf).amax(1)
    theirs = torch.tensor(case.figures["best_score_of_others"])
    torch.testing.assert_close(others, theirs, atol=1e-5, rtol=1e-5)


def test_twenty_steps_of_the_trainer_equal_the_authors(case):
    steps = train(
        case.base,
        case.ia3_model,
        [
            TrainingExample((example,), label)
            for example, label in zip(case.examples, case.figures["labels"], strict=True)
        ],
        TFewConfig(steps=STEPS, batch_size=4, **case.weights),
    )
    constant = case.constant if case.weights["unlikelihood"] else 0.0
    expected = [loss + constant for loss in case.figures["trajectory_20_steps"]]
    assert [step.loss for step in steps] == pytest.approx(expected, abs=1e-4)
    theirs = case.theirs("final20")
    for name, vector in case.ia3_model.vectors("default").items():
        torch.testing.assert_close(vector.detach().flatten(), theirs[name], atol=1e-4, rtol=0)
