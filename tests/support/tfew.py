"""Small random models and tokenizers, and the slow, plain way to score answer choices."""

import os
import sys
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

from ia3.base.loading import BaseModel
from ia3.tfew.prompts.encoding import EncodedExample
from support.paths import TESTS
from support.snapshots import hooks_on

VOCABULARY = 97


def child_environment() -> dict[str, str]:
    """For another process that imports these modules and computes to the same bits."""
    paths = os.pathsep.join(filter(None, [str(TESTS), *sys.path]))
    # Sums of more threads are rounded otherwise.
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def word_tokenizer(words: Sequence[str] = (), *, end: bool = False) -> PreTrainedTokenizerFast:
    """One token a word; 0 is padding, 1 the end of a text (written by the tokenizer if `end`)."""
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    for word in words:
        vocabulary.setdefault(word, len(vocabulary))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def random_model(config: PreTrainedConfig, seed: int = 0) -> nn.Module:
    """A model of random weights without dropout's effect, the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        return kind.from_config(config).eval()


def random_base(config: PreTrainedConfig, seed: int = 0) -> BaseModel:
    """A random model with a tokenizer, for tests that give token ids."""
    return BaseModel(random_model(config, seed), word_tokenizer(), config.model_type)


def tiny_llama(seed: int = 0, vocabulary: int = VOCABULARY, **settings: object) -> nn.Module:
    """Two layers, 32 wide; the settings are `LlamaConfig`'s."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    settings = {**sizes, "initializer_range": 0.2, **settings}
    return random_model(LlamaConfig(vocab_size=vocabulary, **settings), seed)


T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2}
T5 |= {"num_heads": 4, "decoder_start_token_id": 0, "dropout_rate": 0.0}


def tiny_t5(seed: int = 0, vocabulary: int = VOCABULARY) -> nn.Module:
    """Two layers on either side, 32 wide."""
    return random_model(T5Config(**{**T5, "vocab_size": vocabulary}), seed)


def plain_token_scores(base: BaseModel, example: EncodedExample) -> list[Tensor]:
    """One choice after the other: the whole text forward, log-softmax, the choice's tokens.

    Returns:
        `[choices]` of `[length]`.
    """
    scores = []
    for choice in example.choices:
        if base.is_encoder_decoder:
            start = base.model.config.decoder_start_token_id
            logits = base.model(
                input_ids=torch.tensor([example.prompt]),
                decoder_input_ids=torch.tensor([[start, *choice[:-1]]]),
            ).logits[0]
        else:
            ids = torch.tensor([example.prompt + choice])
            logits = base.model(input_ids=ids).logits[0, len(example.prompt) - 1 : -1]
        log_probs = logits.float().log_softmax(-1)
        scores.append(log_probs.gather(1, torch.tensor(choice)[:, None])[:, 0])
    return scores


def state_bits(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything a model holds."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def hook_count(model: nn.Module) -> int:
    """Forwards put on modules, and forward, pre-forward and backward hooks, on all modules."""
    return sum(
        hooks_on(module) + len(module._backward_hooks) + len(module._backward_pre_hooks)
        for module in model.modules()
    )
