"""Which modules of a model train whole by its task, and what is said of those that do not."""

import warnings

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from support.architectures import ARCHITECTURES, build
from torch import nn

import ia3
from ia3 import IA3Config, PeftModel, get_peft_model
from ia3.model.heads import fresh_modules

LABELS = 3
SIZES = {"vocab_size": 48, "num_labels": LABELS, "pad_token_id": 0}
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 2, "max_position_embeddings": 16}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BERT = {**SIZES, **SMALL, **NO_DROPOUT}
BART = {**SIZES, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "dropout": 0.0}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24}
BART |= {"decoder_ffn_dim": 24, "max_position_embeddings": 16}
T5 = {**SIZES, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
T5 |= {"decoder_start_token_id": 0, "dropout_rate": 0.0}
WAV2VEC2 = {**SMALL, "vocab_size": 32, "conv_dim": (8, 8), "conv_stride": (2, 2)}
WAV2VEC2 |= {"conv_kernel": (3, 3), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4}
WAV2VEC2 |= {"num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8}
WHISPER = {**BART, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}
WHISPER |= {"suppress_tokens": None, "begin_suppress_tokens": None, "classifier_proj_size": 8}
K_V = {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []}

IDS = torch.randint(3, 48, (6, 7), generator=torch.Generator().manual_seed(1))
# BART's classifier wants as many ends of text in every row.
IDS[:, -1] = 2
GOLD = IDS[:, 0] % LABELS


def bert():
    return hf.BertForSequenceClassification(hf.BertConfig(**BERT))


def bart():
    return hf.BartForSequenceClassification(hf.BartConfig(**BART))


def audio(kind=hf.Wav2Vec2ForSequenceClassification):
    config = hf.Wav2Vec2Config(**WAV2VEC2)
    return kind(config)


class Around(nn.Module):
    """A model of transformers as a part of another."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids, **options):
        result = self.model(input_ids)
        return getattr(result, "logits", result)


class Own(hf.PreTrainedModel):
    """A model of the user's own, whose body has no name that transformers knows."""

    config_class = hf.BertConfig

    def __init__(self, encoder, head="out"):
        super().__init__(hf.BertConfig(**BERT))
        self.embed = nn.Embedding(48, 16)
        self.encoder = encoder
        self.add_module(head, nn.Linear(16, LABELS))
        self.head = head
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, **options):
        hidden = self.embed(input_ids)
        if isinstance(self.encoder, hf.PreTrainedModel):
            hidden = self.encoder(inputs_embeds=hidden).last_hidden_state
        else:
            hidden = self.encoder(hidden)
        return self.get_submodule(self.head)(hidden[:, 0])


class Plain(nn.Module):
    """The same, and no model of transformers."""

    def __init__(self, head):
        super().__init__()
        self.config = hf.BertConfig(**BERT)
        self.encoder = hf.BertModel(self.config)
        self.add_module(head, nn.Linear(16, LABELS))
        self.head = head

    def forward(self, input_ids, **options):
        return self.get_submodule(self.head)(self.encoder(input_ids).last_hidden_state[:, 0])


def layers():
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))


DENSE = {"target_modules": ["encoder.0", "encoder.2"], "feedforward_modules": ["encoder.2"]}
# What has its head in a place of its own -> how it is made, its targets, and what is to be trained.
MODELS = {
    "BERT in a module": (lambda: Around(bert()), {}, ["model.classifier"]),
    "BERT in two": (lambda: Around(Around(bert())), {}, ["model.model.classifier"]),
    "BART in a module": (lambda: Around(bart()), K_V, ["model.classification_head"]),
    "BART in two": (lambda: Around(Around(bart())), K_V, ["model.model.classification_head"]),
    "a plain module": (lambda: Plain("my_classifier"), {}, ["my_classifier"]),
    "an own model": (lambda: Own(hf.BertModel(hf.BertConfig(**BERT))), {}, ["out"]),
    "an own body": (lambda: Own(layers()), DENSE, ["out"]),
}
MODELS["BERT in a module"][1].update(target_modules=["key", "value"], feedforward_modules=[])
for _kind in ("BERT in two", "a plain module", "an own model"):
    MODELS[_kind][1].update(MODELS["BERT in a module"][1])
EVERY_MODEL = pytest.mark.parametrize("kind", MODELS)


def make(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[kind][0]().eval()


def train(model, steps=3):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(steps):
        nn.functional.cross_entropy(model(IDS), GOLD).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return model(IDS)


def copied(model):
    """The modules that have a copy for the adapter."""
    names = [n.split(".ia3_l.default.")[0] for n, p in model.named_parameters() if ".ia3_l." in n]
    ours = [n.split(".ia3_l.default")[0] for n in model.vectors("default")]
    return sorted({n.removeprefix("model.") for n in names if ".ia3_l" not in n} - set(ours))


# -- the head is found -----------------------------------------------------------------------------


@EVERY_MODEL
def test_the_head_trains_and_is_saved_wherever_it_is(kind, tmp_path):
    _, modules, heads = MODELS[kind]
    model = get_peft_model(make(kind), IA3Config(task_type="SEQ_CLS", **modules))
    assert copied(model) == heads
    start = model(IDS)
    expected = train(model)
    assert not torch.equal(expected, start)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(kind), tmp_path)
    assert torch.equal(again(IDS), expected)
    theirs = peft.PeftModel.from_pretrained(make(kind), tmp_path)
    torch.testing.assert_close(theirs(IDS), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["BERT in a module", "BERT in two", "a plain module"])
def test_what_peft_finds_is_what_trains(kind, tmp_path):
    results = []
    for library in (ia3, peft):
        config = library.IA3Config(task_type="SEQ_CLS", **MODELS[kind][1])
        model = library.get_peft_model(make(kind), config)
        results.append(train(model))
        model.save_pretrained(tmp_path / library.__name__)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    ours, theirs = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("ia3", "peft"))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    again = PeftModel.from_pretrained(make(kind), tmp_path / "peft")
    torch.testing.assert_close(again(IDS), results[1], rtol=1e-5, atol=1e-6)


def test_a_part_that_is_named_is_trained_instead_of_the_whole_head():
    config = IA3Config(task_type="SEQ_CLS", modules_to_save=["classification_head.out_proj"], **K_V)
    assert copied(get_peft_model(bart(), config)) == ["classification_head.out_proj"]


def test_a_head_around_what_pefts_names_find_can_be_named_whole():
    """BigBird's `qa_classifier` has two layers before its `qa_outputs`."""
    sizes = {**BERT, "attention_type": "original_full", "num_labels": 2}
    base = hf.BigBirdForQuestionAnswering(hf.BigBirdConfig(**sizes), add_pooling_layer=False)
    modules = {"target_modules": ["key", "value"], "feedforward_modules": []}
    with pytest.warns(UserWarning, match=r"'qa_classifier.intermediate.dense', .*modules_to_save"):
        model = get_peft_model(base, IA3Config(task_type="QUESTION_ANS", **modules))
    assert copied(model) == ["qa_classifier.qa_outputs"]
    config = IA3Config(task_type="QUESTION_ANS", modules_to_save=["qa_classifier"], **modules)
    assert copied(get_peft_model(model.unload(), config)) == ["qa_classifier"]


def test_a_head_whose_name_ends_modules_of_the_body_takes_none_of_them():
    """SwiftFormer has a `norm` beside its body, and many in it."""
    sizes = {"image_size": 32, "depths": [1, 1], "embed_dims": [8, 16], "num_labels": LABELS}
    base = hf.SwiftFormerForImageClassification(hf.SwiftFormerConfig(**sizes))
    config = IA3Config(task_type="SEQ_CLS", target_modules=[r"proj"], feedforward_modules=[])
    assert copied(get_peft_model(base, config)) == ["dist_head", "head"]


# -- there is none ---------------------------------------------------------------------------------


LLAMA = hf.LlamaConfig(**{**SMALL, "vocab_size": 48})
NO_HEAD = {
    "a causal language model": lambda: hf.LlamaForCausalLM(LLAMA),
    "a tied one": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=48, n_embd=16, n_head=2)),
    "an encoder-decoder": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
    "a masked one": lambda: hf.BertForMaskedLM(hf.BertConfig(**BERT)),
    "a body alone": lambda: hf.BertModel(hf.BertConfig(**BERT)),
}


@pytest.mark.parametrize("kind", NO_HEAD)
def test_without_a_head_vectors_alone_train_and_a_warning_says_so(kind):
    base = NO_HEAD[kind]()
    config, sentence = IA3Config(task_type="SEQ_CLS"), "SEQ_CLS trains a head, and .* has none"
    with pytest.warns(UserWarning, match=sentence):
        model = get_peft_model(base, config)
    with pytest.warns(UserWarning, match=sentence) as said:
        model.add_adapter("more", config)
    assert [each.filename for each in said] == [__file__]
    model.delete_adapter("more")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"model.{n}.ia3_l.default" for n in model.vectors("default")}
    theirs = peft.get_peft_model(NO_HEAD[kind](), peft.IA3Config(task_type="SEQ_CLS"))
    assert sum(p.requires_grad for p in theirs.parameters()) == len(trained)


# -- what stays as it was initialised --------------------------------------------------------------


def warned(make_model):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        make_model()
    return [str(each.message) for each in said if "in no checkpoint" in str(each.message)]


def whisper(kind=hf.WhisperForAudioClassification):
    return kind(hf.WhisperConfig(**WHISPER))


FRESH = {
    "Wav2Vec2": (audio, hf.Wav2Vec2Model, "projector"),
    "Whisper": (whisper, hf.WhisperModel, "projector"),
    "BERT": (bert, hf.BertForMaskedLM, "bert.pooler.dense"),
}


@pytest.mark.parametrize("kind", FRESH)
def test_what_the_checkpoint_lacks_and_no_one_trains_is_named(kind, tmp_path):
    new, pretrained, name = FRESH[kind]
    config = new().config
    pretrained(config).save_pretrained(tmp_path)
    base = type(new()).from_pretrained(tmp_path)
    modules = K_V if kind != "BERT" else {}

    def adapt(**more):
        model = get_peft_model(base, IA3Config(**modules, **more))
        model.save_pretrained(tmp_path / "adapter")
        model.unload()

    (said,) = warned(lambda: adapt(task_type="SEQ_CLS"))
    assert said.startswith(f"{name!r} of {type(base).__name__}")
    # Loaded onto the base model, whose values are others every time.
    (said,) = warned(lambda: PeftModel.from_pretrained(base, tmp_path / "adapter").unload())
    assert repr(name) in said
    # Without a task the head stays too.
    (said,) = warned(adapt)
    assert repr(name) in said
    assert "'classifier'" in said
    assert warned(lambda: adapt(task_type="SEQ_CLS", modules_to_save=[name])) == []


@pytest.mark.parametrize("new", [audio, whisper])
def test_what_was_never_loaded_has_parts_beside_its_body_named(new):
    """No one knows what is new in a model that came from no checkpoint, but its body is known."""
    (said,) = warned(lambda: get_peft_model(new(), IA3Config(task_type="SEQ_CLS", **K_V)))
    assert said.startswith("'projector' of ")


@pytest.mark.parametrize("kind", [*FRESH, "a causal language model", "a tied one"])
def test_what_was_loaded_whole_is_not_spoken_of(kind, tmp_path):
    new = FRESH[kind][0] if kind in FRESH else NO_HEAD[kind]
    new().save_pretrained(tmp_path)
    base = type(new()).from_pretrained(tmp_path)
    modules = K_V if kind in ("Wav2Vec2", "Whisper") else {}
    for task in [None] + ["SEQ_CLS"] * (kind in FRESH):
        config = IA3Config(task_type=task, **modules)
        assert warned(lambda config=config: get_peft_model(base, config).unload()) == []
    # Copies of modules keep no marks of their parameters.
    model = get_peft_model(
        base, IA3Config(task_type="SEQ_CLS" if kind in FRESH else None, **modules)
    )
    assert warned(lambda: model.add_adapter("other", IA3Config(**modules))) == []
    if kind not in FRESH:
        base.resize_token_embeddings(50, mean_resizing=False)
        assert warned(lambda: get_peft_model(model.unload(), IA3Config())) == []


MARIAN = hf.MarianConfig(**BART, decoder_start_token_id=0, bos_token_id=1, eos_token_id=2)


@pytest.mark.parametrize("kind", [*ARCHITECTURES, "marian"])
def test_what_checkpoints_leave_out_on_purpose_is_not_new(kind, tmp_path):
    """Tied weights, and positions that are computed."""
    model = hf.MarianMTModel(MARIAN) if kind == "marian" else build(kind)
    model.save_pretrained(tmp_path)
    assert fresh_modules(type(model).from_pretrained(tmp_path)) == []
