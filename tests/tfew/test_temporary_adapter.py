"""The sites of the upper blocks, and what a temporary adapter leaves behind."""

from __future__ import annotations

import pytest
import torch
from support import scoring
from support.tfew import (
    VOCABULARY,
    hook_count,
    random_base,
    state_bits,
    tiny_llama,
    tiny_t5,
    word_tokenizer,
)
from transformers import LlamaConfig

from ia3 import IA3Config, IA3Model
from ia3.base.loading import BaseModel
from ia3.errors import IA3Error
from ia3.tfew.temporary_adapter import all_linear, temporary_adapter

LLAMA = LlamaConfig(**{**scoring.LLAMA, "num_hidden_layers": 12})


def upper(base, blocks):
    return IA3Model(base.model, all_linear(base, blocks))


@pytest.mark.parametrize("count", [2, 11])
def test_peft_reads_the_same_model(tmp_path, count):
    """Block 1's name is the end of block 11's in part: neither takes the other along."""
    peft = pytest.importorskip("peft")
    model = upper(random_base(LLAMA), count)
    vectors = model.vectors("default")
    assert {name.split(".")[2] for name in vectors} == {str(i) for i in range(12 - count, 12)}
    assert len(vectors) == 7 * count
    with torch.no_grad():
        for vector in vectors.values():
            vector.uniform_(0.5, 1.5)
    model.save_pretrained(tmp_path)
    inputs = torch.randint(3, VOCABULARY, (1, 12))
    theirs = peft.PeftModel.from_pretrained(random_base(LLAMA).model, tmp_path)
    with torch.no_grad():
        expected = model(input_ids=inputs).logits
        torch.testing.assert_close(theirs(input_ids=inputs).logits, expected)
        again = IA3Model.from_pretrained(random_base(LLAMA).model, tmp_path)
        torch.testing.assert_close(again(input_ids=inputs).logits, expected)
        assert not torch.allclose(random_base(LLAMA).model(input_ids=inputs).logits, expected)


def test_all_of_the_blocks_are_all_linear_layers():
    base = random_base(scoring.SHARING["gpt2"])
    with temporary_adapter(base, all_linear(base)) as every:
        shapes = {name: vector.shape for name, vector in every.vectors("default").items()}
    found = upper(base, 2).vectors("default")
    assert {name: vector.shape for name, vector in found.items()} == shapes


@pytest.mark.parametrize("count", [0, -1, 13])
def test_a_number_of_blocks_that_the_model_has_not(count):
    message = f"upper_blocks is {count}, expected 1 to 12: .* 12 blocks"
    with pytest.raises(IA3Error, match=message):
        all_linear(random_base(LLAMA), count)


def test_upper_blocks_of_an_encoder_decoder():
    base = BaseModel(tiny_t5(), word_tokenizer(), "t5")
    with pytest.raises(IA3Error, match=r"blocks in encoder\.block, decoder\.block, expected one"):
        all_linear(base, 1)


def test_the_model_is_as_it_was_after_an_error():
    base = BaseModel(tiny_llama(), word_tokenizer(), "llama")
    base.model.train()
    base.model.lm_head.eval()
    modes = [module.training for module in base.model.modules()]
    bits = state_bits(base.model)

    def fail():
        with temporary_adapter(base, all_linear(base)) as model:
            model.eval()
            raise ValueError("within")

    with pytest.raises(ValueError, match="within"):
        fail()
    assert [module.training for module in base.model.modules()] == modes
    assert hook_count(base.model) == 0
    torch.testing.assert_close(state_bits(base.model), bits, rtol=0, atol=0)
    with pytest.raises(IA3Error), temporary_adapter(base, IA3Config(target_modules=["nothing"])):
        pass
    assert hook_count(base.model) == 0
