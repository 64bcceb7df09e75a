"""Embeddings of a vocabulary that was resized: saved with the adapter, read, and not resized."""

import copy
import pickle

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from support.snapshots import assert_unchanged, snapshot
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import ia3
from ia3 import AdapterBank, IA3Config, IA3Error, PeftModel, get_peft_model

TOKENS, NEW = 64, 66
SIZES = {"vocab_size": TOKENS, "hidden_size": 16, "intermediate_size": 32}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
GPT2 = {"vocab_size": TOKENS, "n_embd": 16, "n_head": 2, "n_layer": 1}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 1}
T5 = {"vocab_size": TOKENS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
T5 |= {"decoder_start_token_id": 0, "dropout_rate": 0.0}
BERT = {**SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Models whose parts know how many tokens they were made with, tied ones, others.
MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
    # It scales its output where both are tied.
    "umt5": lambda: hf.UMT5ForConditionalGeneration(hf.UMT5Config(**T5)),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**BERT)),
    "bert in a module": lambda: Around(hf.BertForMaskedLM(hf.BertConfig(**BERT))),
}
K_V_DOWN = {"target_modules": ["k_proj", "v_proj", "down_proj"]}
K_V_DOWN |= {"feedforward_modules": ["down_proj"]}
EVERY_MODEL = pytest.mark.parametrize("kind", MODELS)
IDS = torch.tensor([[3, 64, 5, 65]])
BOTH = pytest.mark.parametrize("writer", [ia3, peft], ids=["ours", "peft's"])


class Around(torch.nn.Module):
    """A model of transformers as a part of another."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, **inputs):
        return self.model(**inputs)


@pytest.fixture
def base(tmp_path):
    """`base(kind, tokens, seed)` -> the same model, loaded, its new rows drawn by the seed."""

    def make(kind="llama", tokens=NEW, seed=0):
        folder = tmp_path / "base"
        if not folder.exists():
            torch.manual_seed(0)
            model = MODELS[kind]()
            inner = model.model if isinstance(model, Around) else model
            inner.save_pretrained(folder)
        named = MODELS[kind]()
        inner = named.model if isinstance(named, Around) else named
        inner = type(inner).from_pretrained(folder).eval()
        if tokens != TOKENS:
            torch.manual_seed(seed)
            inner.resize_token_embeddings(tokens)
            with torch.no_grad():
                inner.get_input_embeddings().weight[TOKENS:].normal_()
                if inner.get_output_embeddings() is not None:
                    inner.get_output_embeddings().weight[TOKENS:].normal_()
        return (Around(inner) if isinstance(named, Around) else inner).eval()

    return make


def inputs(model):
    encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
    return {"input_ids": IDS, **({"decoder_input_ids": IDS} if encoder_decoder else {})}


def result(model):
    with torch.no_grad():
        return model(**inputs(model)).logits


def disturbed(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tensors_in(folder):
    return load_file(folder / "adapter_model.safetensors")


# -- saving and reading ----------------------------------------------------------------------------


@EVERY_MODEL
def test_new_rows_are_saved_and_read(kind, base, tmp_path):
    model = disturbed(get_peft_model(base(kind), IA3Config()))
    expected = result(model)
    model.save_pretrained(tmp_path / "adapter")
    other = base(kind, seed=1)
    before = snapshot(other)
    assert not torch.equal(result(other), result(base(kind)))
    again = PeftModel.from_pretrained(other, tmp_path / "adapter")
    assert torch.equal(result(again), expected)
    again.save_pretrained(tmp_path / "again")
    assert_same(tensors_in(tmp_path / "again"), tensors_in(tmp_path / "adapter"))
    again.unload()
    assert_unchanged(other, before)
    merged = PeftModel.from_pretrained(other, tmp_path / "adapter").merge_and_unload()
    torch.testing.assert_close(result(merged), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2", "t5", "bert"])
def test_both_libraries_save_the_same_and_read_each_other(kind, base, tmp_path):
    saved = {}
    for library in (ia3, peft):
        model = disturbed(library.get_peft_model(base(kind), library.IA3Config()))
        expected = result(model)
        model.save_pretrained(tmp_path / library.__name__)
        saved[library] = tensors_in(tmp_path / library.__name__)
        for reader in (ia3, peft):
            folder = tmp_path / library.__name__
            again = reader.PeftModel.from_pretrained(base(kind, seed=1), folder)
            torch.testing.assert_close(result(again), expected, rtol=1e-5, atol=1e-6)
    assert saved[ia3].keys() == saved[peft].keys()
    assert any("ia3_l" not in key for key in saved[ia3])


def test_a_model_that_was_never_loaded_knows_too(tmp_path):
    """LLaMA's inner model keeps the number of tokens that it was made with."""
    torch.manual_seed(0)
    model = MODELS["llama"]()
    model.resize_token_embeddings(NEW)
    get_peft_model(model, IA3Config()).save_pretrained(tmp_path)
    keys = {key for key in tensors_in(tmp_path) if "ia3_l" not in key}
    beside = ("model.embed_tokens.weight", "lm_head.weight")
    assert keys == {f"base_model.model.{name}" for name in beside}


@EVERY_MODEL
def test_new_rows_within_wrappers_are_saved_and_read(kind, base, tmp_path):
    def wrapped(model):
        inner = model.model if isinstance(model, Around) else model
        embeddings = inner.get_input_embeddings()
        owner = next(m for m in inner.modules() if embeddings in m._modules.values())
        name = next(name for name, m in owner._modules.items() if m is embeddings)
        setattr(owner, name, checkpoint_wrapper(embeddings))
        return model

    expected = disturbed(get_peft_model(wrapped(base(kind)), IA3Config()))
    expected.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(wrapped(base(kind, seed=1)), tmp_path / "adapter")
    assert torch.equal(result(again), result(expected))


@EVERY_MODEL
def test_a_vocabulary_that_is_what_it_was_is_not_saved(kind, base, tmp_path):
    get_peft_model(base(kind, TOKENS), IA3Config()).save_pretrained(tmp_path / "adapter")
    assert all("ia3_l" in key for key in tensors_in(tmp_path / "adapter"))
    # A checkpoint that was saved after it had been resized.
    resized = base(kind)
    inner = resized.model if isinstance(resized, Around) else resized
    inner.save_pretrained(tmp_path / "resized")
    loaded = type(inner).from_pretrained(tmp_path / "resized")
    get_peft_model(loaded, IA3Config()).save_pretrained(tmp_path / "again")
    assert all("ia3_l" in key for key in tensors_in(tmp_path / "again"))


@pytest.mark.parametrize(("wish", "tokens"), [(True, TOKENS), (False, NEW)])
def test_embeddings_are_saved_as_asked_for(wish, tokens, base, tmp_path):
    keys = []
    for library in (ia3, peft):
        model = library.get_peft_model(base(tokens=tokens), library.IA3Config())
        model.save_pretrained(tmp_path / library.__name__, save_embedding_layers=wish)
        keys.append(tensors_in(tmp_path / library.__name__).keys())
        state = library.get_peft_model_state_dict(model, save_embedding_layers=wish)
        keys.append(state.keys())
    assert all(each == keys[0] for each in keys)
    assert any("ia3_l" not in key for key in keys[0]) is wish


@BOTH
@pytest.mark.parametrize("merged", [False, True])
def test_a_rescaled_output_layer_keeps_its_weights_beside_its_vector(
    writer, merged, base, tmp_path
):
    modules = {"target_modules": ["lm_head", "v_proj"], "feedforward_modules": []}
    model = disturbed(writer.get_peft_model(base(), writer.IA3Config(**modules)))
    expected = result(model)
    if merged and writer is ia3:
        model.merge_adapter()
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert "base_model.model.lm_head.base_layer.weight" in tensors_in(tmp_path / "adapter")
    other = base(seed=1)
    with torch.no_grad():
        # PEFT saves no other embeddings where it rescales some.
        other.get_input_embeddings().weight.copy_(base().get_input_embeddings().weight)
    before = snapshot(other)
    ours = PeftModel.from_pretrained(other, tmp_path / "adapter")
    torch.testing.assert_close(result(ours), expected, rtol=1e-5, atol=1e-6)
    ours.unload()
    assert_unchanged(other, before)
    kept = PeftModel.from_pretrained(other, tmp_path / "adapter").merge_and_unload()
    torch.testing.assert_close(result(kept), expected, rtol=1e-5, atol=1e-5)
    other = base(seed=1)
    with torch.no_grad():
        other.get_input_embeddings().weight.copy_(base().get_input_embeddings().weight)
    theirs = peft.PeftModel.from_pretrained(other, tmp_path / "adapter")
    torch.testing.assert_close(result(theirs), expected, rtol=1e-5, atol=1e-6)


@BOTH
@pytest.mark.parametrize("kind", ["llama", "tied"])
@pytest.mark.parametrize("saved", [["embed_tokens", "lm_head"], ["embed_tokens"], ["lm_head"]])
def test_trained_embeddings_of_a_resized_vocabulary(writer, kind, saved, base, tmp_path):
    """PEFT writes those it trains three times, under as many names."""
    model = writer.get_peft_model(base(kind), writer.IA3Config(modules_to_save=saved))
    expected = result(disturbed(model))
    model.save_pretrained(tmp_path / "adapter")
    for reader in (ia3, peft):
        again = reader.PeftModel.from_pretrained(base(kind, seed=1), tmp_path / "adapter")
        torch.testing.assert_close(result(again), expected, rtol=1e-5, atol=1e-6)


@BOTH
@pytest.mark.parametrize("injected", [False, True])
def test_states_hold_the_rows_too(writer, injected, base):
    def adapted(library, seed):
        config = library.IA3Config(**K_V_DOWN)
        if injected:
            return library.inject_adapter_in_model(config, base(seed=seed))
        return library.get_peft_model(base(seed=seed), config)

    model = disturbed(adapted(writer, 0))
    expected = result(model)
    # A model with injected adapters has no config that would tell PEFT.
    state = writer.get_peft_model_state_dict(model, save_embedding_layers=True)
    for reader in (ia3, peft):
        again = adapted(reader, 1).eval()
        report = reader.set_peft_model_state_dict(again, state)
        assert report.unexpected_keys == []
        torch.testing.assert_close(result(again), expected, rtol=1e-5, atol=1e-6)
    ours, theirs = adapted(ia3, 0), adapted(peft, 0)
    automatic = ia3.get_peft_model_state_dict(ours).keys()
    assert automatic == peft.get_peft_model_state_dict(theirs, save_embedding_layers=True).keys()


def test_two_adapters_have_their_own_rows(base, tmp_path):
    expected = {}
    for seed in (0, 1):
        model = disturbed(get_peft_model(base(seed=seed), IA3Config()))
        expected[str(seed)] = result(model)
        model.save_pretrained(tmp_path / str(seed))
    model = PeftModel.from_pretrained(base(), tmp_path / "0", "0")
    model.load_adapter(tmp_path / "1", "1")
    for name in ("1", "0", "1"):
        model.set_adapter(name)
        assert torch.equal(result(model), expected[name])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(result(twin), expected["1"])
    model.delete_adapter("1")
    assert torch.equal(result(model), expected["0"])


def test_rows_that_came_with_an_adapter_do_not_train(base, tmp_path):
    get_peft_model(base(), IA3Config()).save_pretrained(tmp_path / "adapter")
    trained = []
    for library in (ia3, peft):
        model = library.PeftModel.from_pretrained(
            base(seed=1), tmp_path / "adapter", is_trainable=True
        )
        trained.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
        model.set_adapter("default")
    assert trained[0] == trained[1]


def test_a_checkpoint_is_loaded_into_the_adapter_that_is_there(base, tmp_path):
    model = disturbed(get_peft_model(base(), IA3Config()))
    expected = result(model)
    model.save_pretrained(tmp_path / "adapter")
    vectors = model.vectors("default")
    disturbed(model)
    # The same rows: nothing but the vectors changes.
    model.load_adapter(tmp_path / "adapter", "default", is_trainable=True)
    assert torch.equal(result(model), expected)
    assert model.vectors("default").keys() == vectors.keys()
    assert not any(".embed_tokens.ia3_l" in name for name, _ in model.named_parameters())
    # Other rows, and then none.
    model = get_peft_model(base(seed=1), IA3Config())
    plain = result(model)
    model.save_pretrained(tmp_path / "plain", save_embedding_layers=False)
    model.load_adapter(tmp_path / "adapter", "default")
    assert torch.equal(result(model), expected)
    model.load_adapter(tmp_path / "plain", "default")
    assert torch.equal(result(model), plain)


def test_a_bank_takes_rows_that_are_the_models(base, tmp_path):
    for seed in (0, 1):
        model = get_peft_model(base(seed=seed), IA3Config())
        disturbed(model).save_pretrained(tmp_path / str(seed))
        if seed == 0:
            expected = result(model)
    model = get_peft_model(base(), IA3Config(), "own")
    bank = AdapterBank(model, 2)
    bank.add("0", tmp_path / "0")
    mixed = model(IDS, adapter_names=["0"]).logits
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(IA3Error, match=r"'1' has a copy of 'model.embed_tokens'"):
        bank.add("1", tmp_path / "1")


def test_rows_that_do_not_fit_change_nothing(base, tmp_path):
    get_peft_model(base(), IA3Config()).save_pretrained(tmp_path / "adapter")
    small = base(tokens=TOKENS)
    before = snapshot(small)
    with pytest.raises(IA3Error, match=r"\[66, 16\], expected \[64, 16\].*embeddings\(66\) first"):
        PeftModel.from_pretrained(small, tmp_path / "adapter")
    assert_unchanged(small, before)


def test_other_weights_under_a_vector_that_is_in_use_are_refused(base, tmp_path):
    config = IA3Config(target_modules=["lm_head"], feedforward_modules=[])
    get_peft_model(base(), config).save_pretrained(tmp_path / "adapter")
    model = get_peft_model(base(seed=1), config, "first")
    before = snapshot(model)
    with pytest.raises(IA3Error, match=r"other weights of 'lm_head'.*other adapters"):
        model.load_adapter(tmp_path / "adapter", "second")
    assert_unchanged(model, before)


@pytest.fixture
def rescaled_heads(base, tmp_path):
    """The folders of two adapters that rescale the output layer, one with weights of its own."""
    config = IA3Config(target_modules=["lm_head", "v_proj"], feedforward_modules=[])
    for name, seed in (("own", 1), ("plain", 0)):
        model = base(seed=seed)
        with torch.no_grad():
            model.get_input_embeddings().weight.copy_(base().get_input_embeddings().weight)
        model = disturbed(get_peft_model(model, config))
        model.save_pretrained(tmp_path / name, save_embedding_layers=name == "own")
    return tmp_path / "own", tmp_path / "plain"


def test_weights_under_a_vector_stay_with_their_adapter(rescaled_heads, base, tmp_path):
    own, plain = rescaled_heads
    model = PeftModel.from_pretrained(base(), own)
    expected = result(model)
    model.save_pretrained(tmp_path / "again", save_embedding_layers=False)
    assert torch.equal(result(PeftModel.from_pretrained(base(), tmp_path / "again")), expected)
    with pytest.raises(IA3Error, match=r"other weights of 'lm_head'.*other adapters"):
        model.load_adapter(plain, "second")
    # A new one is for the weights that are there, and keeps them.
    config = IA3Config(target_modules=["lm_head"], feedforward_modules=[])
    model.add_adapter("new", config)
    model.set_adapter("new")
    expected = result(model)
    model.delete_adapter("default")
    assert torch.equal(result(model), expected)
    assert "lm_head.weight" in model.adapter("new").copies


def test_weights_under_a_vector_go_with_their_adapter(rescaled_heads, base):
    own, plain = rescaled_heads
    unadapted, expected = result(base()), result(PeftModel.from_pretrained(base(), plain))
    model = PeftModel.from_pretrained(base(), own)
    model.load_adapter(plain, "default")
    assert torch.equal(result(model), expected)
    model.load_adapter(own, "default")
    model.delete_adapter("default")
    assert torch.equal(result(model), unadapted)
    model.load_adapter(plain, "default")
    model.set_adapter("default")
    assert torch.equal(result(model), expected)


def test_combinations_have_the_rows_of_all(base, tmp_path):
    model = disturbed(get_peft_model(base(), IA3Config()))
    model.add_adapter("other", IA3Config())
    both = [model.adapter("default"), model.adapter("other")]
    combined = ia3.combine([("a", both[0]), ("b", both[1])], [0.5, 0.5], "average")
    assert combined.copies.keys() == both[0].copies.keys()
    assert any("embed_tokens" in key for key in combined.copies)


# -- resizing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "module"),
    [
        ({"modules_to_save": ["embed_tokens"]}, "model.embed_tokens"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"target_modules": ["lm_head"], "feedforward_modules": []}, "lm_head"),
    ],
)
@pytest.mark.parametrize("around", [False, True])
def test_what_adapters_hold_is_not_resized_under_them(config, module, around, base):
    inner = base(tokens=TOKENS)
    model = get_peft_model(Around(inner) if around else inner, IA3Config(**config))
    before = snapshot(model)
    whose = [inner, copy.deepcopy(model).get_base_model()] + [model] * (not around)
    for each in whose:
        each = each.model if isinstance(each, Around) else each
        with pytest.raises(IA3Error, match=rf"'{module}'.*64 tokens.*unload\(\), resize"):
            each.resize_token_embeddings(NEW)
        with pytest.raises(IA3Error, match="64 tokens"):
            each.resize_token_embeddings(TOKENS, pad_to_multiple_of=48)
        each.resize_token_embeddings()
        each.resize_token_embeddings(TOKENS)
        each.resize_token_embeddings(TOKENS - 2, pad_to_multiple_of=32)
    assert_unchanged(model, before)
    model.unload()
    inner.resize_token_embeddings(NEW)
    assert inner.config.vocab_size == NEW


def test_embeddings_without_a_copy_may_be_resized(base):
    model = disturbed(get_peft_model(base(tokens=TOKENS), IA3Config()))
    before = result_of_old(model)
    model.resize_token_embeddings(NEW)
    torch.testing.assert_close(result_of_old(model), before)
    assert model(IDS).logits.shape[-1] == NEW


def result_of_old(model):
    with torch.no_grad():
        return model(torch.tensor([[3, 5, 7]])).logits[..., :TOKENS]


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
