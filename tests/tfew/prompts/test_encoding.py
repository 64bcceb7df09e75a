"""From fields to token ids, with the embedded model's own tokenizer."""

from functools import partial

import pytest
from hypothesis import example, given, settings, strategies as st
from support.tfew import tiny_llama, tiny_t5, word_tokenizer

from ia3.base.loading import EMBEDDED_MODEL, BaseModel, load_base_model
from ia3.errors import IA3Error
from ia3.tfew.prompts.encoding import Encoder
from ia3.tfew.prompts.templates import Template

TOKENIZER = load_base_model(EMBEDDED_MODEL).tokenizer

TEMPLATE = Template("{{ text }}\nCategory:")
CHOICES = ["billing", "card arrival", "lost or stolen phone"]


def base_of(context=512):
    """A tiny model with the embedded model's tokenizer and a context of so many tokens."""
    model = tiny_llama(vocabulary=64, max_position_embeddings=context)
    return BaseModel(model, TOKENIZER, "tiny")


BASE = base_of()


def encoder(choices=CHOICES, *, base=BASE, chat=False):
    return Encoder(base, choices, chat=chat)


def ids_of(text):
    return tuple(TOKENIZER(text)["input_ids"])


def is_whole(text):
    """Whether the tokenizer can write it: its vocabulary lacks a few bytes."""
    return bool(text.strip()) and TOKENIZER.decode(ids_of(text)) == text


def characters(*excluded):
    """Characters that the tokenizer can write: hardly a long text of others would be whole."""
    drawn = st.characters(codec="utf-8", exclude_categories=["Cs", *excluded])
    return drawn.filter(lambda character: is_whole(f"a{character}a"))


words = st.text(characters("Cc"), min_size=1, max_size=30).filter(
    lambda text: is_whole(text) and not text[0].isspace()
)


@given(text=words, ending=st.sampled_from(["", ":", " =", "?", "\nAnswer:", " 12", "'", "é", "→"]))
@settings(max_examples=150, deadline=None)
def test_tokens_are_those_of_the_joined_text_whatever_it_is(text, ending):
    template = Template("{{ text }}" + ending)
    prompt = (text + ending).rstrip()
    encoded = encoder().encode({"text": text}, template)
    for choice, answer in zip(encoded.choices, CHOICES, strict=True):
        assert encoded.prompt + choice == ids_of(f"{prompt} {answer}")


def test_a_prompt_of_nothing_is_refused():
    with pytest.raises(IA3Error, match="renders nothing"):
        encoder().encode({"text": "  "}, Template("{{ text }}"))


# -- truncation ------------------------------------------------------------------------------------


NARROW = base_of(40)


@given(st.text(characters(), min_size=40, max_size=300).filter(is_whole))
@example("word " * 400)
@example("日本語のテキスト" * 200)
@example("👩‍🚀🏳️‍🌈" * 100)
@example("<|im_end|>" * 300)
@settings(max_examples=60, deadline=None)
def test_any_text_fits_and_only_its_end_is_cut(text):
    shortening = encoder(base=NARROW)
    encoded = shortening.encode({"text": text}, Template("Text: {{ text }}\nCategory:"))
    room = 40 - max(map(len, encoded.choices))
    assert len(encoded.prompt) <= room
    prompt = TOKENIZER.decode(encoded.prompt)
    assert prompt.startswith("Text: ")
    assert prompt.endswith("\nCategory:")
    if shortening.truncated:
        assert len(encoded.prompt) > room - 12  # no more was cut than needed
        assert text.startswith(prompt.removeprefix("Text: ").removesuffix("\nCategory:"))


def test_the_longest_field_of_the_prompt_is_cut():
    fields = {"title": "a title", "body": "word " * 300, "unread": "y " * 5000}
    template = Template("{{ title }}\n{{ body }}\nCategory:")
    encoded = encoder(base=base_of(64)).encode(fields, template)
    prompt = TOKENIZER.decode(encoded.prompt)
    assert prompt.startswith("a title\nword word")
    assert prompt.endswith("\nCategory:")
    assert len(fields["body"]) == 1500  # the caller's example is as it was


def limited(tokens, base=BASE):
    return Encoder(base, CHOICES, chat=False, max_prompt_tokens=tokens)


@given(text=words.map(lambda text: f"{text} " * 12), tokens=st.integers(8, 60))
@settings(max_examples=60, deadline=None)
def test_a_prompt_is_cut_to_a_limit_below_the_context(text, tokens):
    whole = encoder().encode({"text": text}, TEMPLATE)
    cutting = limited(tokens)
    encoded = cutting.encode({"text": text}, TEMPLATE)
    assert encoded.choices == whole.choices
    assert len(encoded.prompt) <= tokens
    kept = TOKENIZER.decode(encoded.prompt)
    assert kept.endswith("\nCategory:")
    assert text.startswith(kept.removesuffix("\nCategory:"))
    assert cutting.truncated == (len(whole.prompt) > tokens)
    if not cutting.truncated:
        assert encoded == whole


@pytest.mark.parametrize(
    ("shortening", "text", "source", "message"),
    [
        (encoder(base=base_of(32)), "hello", "word " * 50 + "{{ text }}:", "context has room for"),
        (encoder(base=base_of(32)), list(range(100)), "{{ text }}:", "context has room for"),
        (limited(20), "hello", "word " * 50 + "{{ text }}:", "max_prompt_tokens is 20"),
    ],
)
def test_what_cannot_be_cut_is_an_error(shortening, text, source, message):
    with pytest.raises(IA3Error, match=f"without any text; .*{message}"):
        shortening.encode({"text": text}, Template(source))


def test_a_limit_below_one_is_an_error():
    with pytest.raises(IA3Error, match="max_prompt_tokens is 0, expected at least 1"):
        limited(0)


# -- chat ------------------------------------------------------------------------------------------


def test_chat_puts_the_prompt_into_the_chat_template():
    encoded = encoder(chat=True).encode({"text": "Where is my card?"}, TEMPLATE)
    conversation = [{"role": "user", "content": "Where is my card?\nCategory:"}]
    ids = partial(TOKENIZER.apply_chat_template, tokenize=True, return_dict=False)
    assert list(encoded.prompt) == ids(conversation, add_generation_prompt=True)
    # The answer is the assistant's turn: it begins at once, without a space.
    assert [TOKENIZER.decode(c) for c in encoded.choices] == CHOICES
    spoken = ids([*conversation, {"role": "assistant", "content": CHOICES[1]}])
    answered = list(encoded.prompt + encoded.choices[1])
    assert spoken[: len(answered)] == answered


def test_chat_keeps_the_template_whole_when_the_text_is_cut():
    shortening = encoder(chat=True, base=base_of(80))
    encoded = shortening.encode({"text": "word " * 500}, TEMPLATE)
    prompt = TOKENIZER.decode(encoded.prompt)
    assert prompt.startswith("<|im_start|>system\n")
    assert prompt.endswith("\nCategory:<|im_end|>\n<|im_start|>assistant\n")
    assert "word word" in prompt
    assert shortening.truncated == 1


def test_chat_without_a_chat_template_is_an_error():
    with pytest.raises(IA3Error, match=r"no chat template.*chat=False"):
        Encoder(BaseModel(tiny_llama(), word_tokenizer(), "words"), ["a", "b"], chat=True)


# -- encoder-decoder -------------------------------------------------------------------------------


def test_encoder_decoder_choices_stand_alone_with_their_end():
    tokenizer = word_tokenizer(["is", "it", "good", "bad", "not"], end=True)
    base = BaseModel(tiny_t5(), tokenizer, "t5")
    encoding = Encoder(base, ["good", "not bad"], chat=False)
    encoded = encoding.encode({"text": "it is"}, Template("{{ text }}"))
    ids = tokenizer.get_vocab()
    assert encoded.prompt == (ids["it"], ids["is"], ids["</s>"])
    good, not_bad = encoded.choices
    assert good == (ids["good"], ids["</s>"])
    assert not_bad == (ids["not"], ids["bad"], ids["</s>"])


def test_encoder_decoder_choices_take_no_room_from_the_prompt():
    tokenizer = word_tokenizer(["a", "b", "c"], end=True)
    tokenizer.model_max_length = 10
    base = BaseModel(tiny_t5(), tokenizer, "t5")
    cutting = Encoder(base, ["b " * 9, "c"], chat=False)
    assert len(cutting.encode({"text": "a " * 9}, Template("{{ text }}")).prompt) == 10
    assert cutting.truncated == 0
    assert len(cutting.encode({"text": "a " * 50}, Template("{{ text }}")).prompt) == 10
    assert cutting.truncated == 1


def test_an_end_written_by_the_tokenizer_does_not_stand_between_prompt_and_answer():
    base = BaseModel(tiny_llama(), word_tokenizer(["a", "b", "c"], end=True), "words")
    encoded = Encoder(base, ["b", "c"], chat=False).encode({"text": "a"}, Template("{{ text }}"))
    end = base.tokenizer.eos_token_id
    assert end not in encoded.prompt
    assert all(end not in choice for choice in encoded.choices)
