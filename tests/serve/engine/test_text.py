"""Text of tokens that come one at a time."""

import random

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ia3 import load_base_model
from ia3.serve.engine.text import Detokenizer, StopTexts, TokenTexts

TEXTS = [
    "Plain words, and a second line.\n\n  Spaces   stay.",
    "Grüße aus München: 日本語, 한국어, Ελληνικά",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, e\u0301 accent, 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "don 't I 'm . , !",
]


@pytest.fixture(scope="module")
def embedded():
    return load_base_model("smollm2-135m-instruct").tokenizer


@pytest.fixture(scope="module")
def byte_tokens():
    """As LLaMA's first tokenizers: a space begins a word, and bytes stand for what is no word."""
    words = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁a", "▁Hello", "▁world", "lo"]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def pieces_of(tokenizer, ids, prompt=()):
    detokenizer = Detokenizer(tokenizer, prompt)
    return [*(detokenizer.add(token) for token in ids), detokenizer.end()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_together_the_text(embedded, text):
    ids = embedded(text, add_special_tokens=False).input_ids
    pieces = pieces_of(embedded, ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_any_tokens_are_what_the_tokenizer_makes_of_all_of_them(embedded):
    draw = random.Random(0)
    for _ in range(300):
        ids = draw.choices(range(len(embedded)), k=12)
        expected = embedded.decode(ids, skip_special_tokens=True)
        assert "".join(pieces_of(embedded, ids)) == expected


def test_bytes_that_never_become_a_character_are_not_held_back_for_ever(embedded):
    (token,) = [i for i in range(len(embedded)) if embedded.convert_ids_to_tokens(i) == "ģ"]
    pieces = pieces_of(embedded, [token] * 200)
    assert "".join(pieces) == "\ufffd" * 200
    assert sum(map(bool, pieces)) >= 10


def test_a_space_before_the_first_word_stays(byte_tokens):
    prompt = byte_tokens.encode("Hello", add_special_tokens=False)
    ids = byte_tokens.convert_tokens_to_ids(["▁world", "▁Hello"])
    assert byte_tokens.decode(ids) == "world Hello"
    assert "".join(pieces_of(byte_tokens, ids, prompt)) == " world Hello"


def test_a_character_of_several_byte_tokens_comes_whole(byte_tokens):
    ids = byte_tokens.convert_tokens_to_ids([f"<0x{b:02X}>" for b in "é€👋".encode()])
    assert [piece for piece in pieces_of(byte_tokens, ids) if piece] == ["é", "€", "👋"]


def test_a_character_that_began_in_the_prompt_comes_whole(embedded):
    ids = embedded("👋", add_special_tokens=False).input_ids
    assert len(ids) > 1
    assert "".join(pieces_of(embedded, ids[1:], ids[:1])) == "👋"


def test_texts_of_tokens_together_are_the_text(embedded, byte_tokens):
    ids = embedded(TEXTS[0], add_special_tokens=False).input_ids
    assert "".join(TokenTexts(embedded)[token] for token in ids) == TEXTS[0]
    assert TokenTexts(embedded)[embedded.eos_token_id] == "<|im_end|>"
    ids = byte_tokens.convert_tokens_to_ids(["▁Hello", "▁world"])
    assert [TokenTexts(byte_tokens)[token] for token in ids] == [" Hello", " world"]


# -- stop texts ------------------------------------------------------------------------------------


def stopped(pieces, stops):
    """What comes through, piece by piece, and whether a text ended it."""
    texts, through = StopTexts(stops), []
    for piece in pieces:
        text, over = texts.add(piece)
        through.append(text)
        if over:
            return through, True
    return [*through, texts.end()], False


def cut_by_character(text, stops):
    """The same, from the definition: the first place where one of them has ended."""
    for end in range(len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            return text[: end - max(map(len, ended))], True
    return text, False


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("abc", max_size=4), max_size=8),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_a_text_ends_before_the_first_stop_text_however_it_is_cut(pieces, stops):
    through, over = stopped(pieces, stops)
    assert ("".join(through), over) == cut_by_character("".join(pieces), stops)


def test_only_what_may_become_a_stop_text_is_held_back():
    assert stopped(["one EN", "D two"], ["END"]) == (["one ", ""], True)
    assert stopped(["one EN", "Y two"], ["END"]) == (["one ", "ENY two", ""], False)
    assert stopped(["one EN"], ["END"]) == (["one ", "EN"], False)
