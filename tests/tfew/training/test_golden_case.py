"""This project's forward, losses and gradients against figures from the paper's formulas."""

import json

import pytest
import tfew_golden_case as formulas
import torch
from support.tfew import word_tokenizer
from transformers import OPTConfig, OPTForCausalLM

from ia3 import IA3Config, IA3Model
from ia3.base.loading import BaseModel
from ia3.tfew import tfew_loss
from ia3.tfew.prompts.encoding import EncodedExample
from ia3.tfew.scoring.choices import shares_prompt, token_scores
from ia3.tfew.scoring.expanded import expanded_scores
from ia3.tfew.training.losses import token_loss

GOLDEN = json.loads(formulas.PATH.read_text("utf-8"))
LABELS = torch.tensor([label for _, _, label in formulas.EXAMPLES])
SHAPE = (len(formulas.EXAMPLES), 3, 3)


def flat(values):
    return [x for value in values for x in flat(value)] if isinstance(values, list) else [values]


def assert_losses(loss, expected):
    for term, value in expected.items():
        assert getattr(loss, term).item() == pytest.approx(value, rel=1e-10), term


def test_the_file_is_what_the_formulas_give():
    found = formulas.figures()
    for part in ("logits", "model"):
        assert found[part]["losses"] == pytest.approx(GOLDEN[part]["losses"], rel=1e-12)
    assert flat(found["model"]["log_probs"]) == pytest.approx(
        flat(GOLDEN["model"]["log_probs"]), rel=1e-12
    )


def test_losses_and_gradient_of_logits():
    logits = torch.full((*SHAPE, formulas.VOCABULARY), torch.nan, dtype=torch.float64)
    targets = torch.full(SHAPE, -1)
    expected = torch.zeros_like(logits)
    of_examples = zip(
        formulas.given_logits(), formulas.EXAMPLES, GOLDEN["logits"]["gradient"], strict=True
    )
    for i, (rows, (_, choices, _), gradients) in enumerate(of_examples):
        for c, choice in enumerate(choices):
            logits[i, c, : len(choice)] = torch.from_numpy(rows[c])
            targets[i, c, : len(choice)] = torch.tensor(choice)
            expected[i, c, : len(choice)] = torch.tensor(gradients[c], dtype=torch.float64)
    loss = tfew_loss(logits.requires_grad_(), targets, LABELS, pad_token_id=-1)
    assert_losses(loss, GOLDEN["logits"]["losses"])
    (gradient,) = torch.autograd.grad(loss.total, logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)


def golden_model():
    config = OPTConfig(
        vocab_size=formulas.VOCABULARY,
        hidden_size=formulas.DIM,
        word_embed_proj_dim=formulas.DIM,
        ffn_dim=formulas.INNER,
        num_hidden_layers=1,
        num_attention_heads=formulas.HEADS,
        max_position_embeddings=formulas.LENGTH,
        dropout=0.0,
        pad_token_id=0,
    )
    model = OPTForCausalLM(config).double().eval()
    state = {f"model.decoder.{name}": torch.from_numpy(w) for name, w in formulas.weights().items()}
    state["lm_head.weight"] = state["model.decoder.embed_tokens.weight"]
    model.load_state_dict(state)
    sites = IA3Config(target_modules=["k_proj", "v_proj", "fc2"], feedforward_modules=["fc2"])
    ia3_model = IA3Model(model, sites)
    ia3_model.double()
    with torch.no_grad():
        for name, value in formulas.vectors().items():
            vector = ia3_model.vectors("default")[f"model.decoder.{name}"]
            vector.copy_(torch.from_numpy(value).view_as(vector))
    return BaseModel(model, word_tokenizer(), "golden"), ia3_model


@pytest.mark.parametrize("scorer", [token_scores, expanded_scores])
def test_a_block_with_ia3(scorer):
    base, ia3_model = golden_model()
    assert shares_prompt(base)
    examples = [EncodedExample(tuple(p), tuple(map(tuple, c))) for p, c, _ in formulas.EXAMPLES]
    scores = scorer(base, examples)
    golden = GOLDEN["model"]
    expected = torch.tensor(flat(golden["log_probs"]), dtype=torch.float64)
    torch.testing.assert_close(scores.log_probs[scores.mask], expected, rtol=1e-10, atol=1e-10)
    loss = token_loss(scores, LABELS)
    assert_losses(loss, golden["losses"])
    found = ia3_model.vectors("default")
    gradients = torch.autograd.grad(loss.total, list(found.values()))
    for name, gradient in zip(found, gradients, strict=True):
        differences = golden["gradient"][name.removeprefix("model.decoder.")]
        theirs = torch.tensor(differences, dtype=torch.float64)
        torch.testing.assert_close(gradient.flatten(), theirs, rtol=1e-5, atol=1e-7)
