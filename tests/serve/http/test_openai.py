"""OpenAI's routes, asked with OpenAI's own client."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

import openai
import torch
from support.served import Server
from transformers import AutoModelForCausalLM, AutoTokenizer

import ia3

PROMPT = "the parcel was late"


@pytest.fixture(scope="module")
def client(server: Server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def likeliest(made):
    """The likeliest tokens after a text, as words: of the model alone, or with an adapter."""

    def generate(prompt: str, count: int, adapter: str | None = None) -> list[str]:
        tokenizer = AutoTokenizer.from_pretrained(made.model)
        model = AutoModelForCausalLM.from_pretrained(made.model).eval()
        if adapter is not None:
            model = ia3.IA3Model.from_pretrained(model, made.adapters / adapter)
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            found = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=count,
            )
        return tokenizer.convert_ids_to_tokens(found[0, ids.shape[1] :], skip_special_tokens=True)

    return generate


def test_models_are_the_base_models_and_every_adapter(client, made):
    models = {each.id: each for each in client.models.list()}
    assert models.keys() == {made.model, made.encoder, "tickets", "later", "sorted", "plain"}
    assert models["later"].owned_by == made.model
    assert client.models.retrieve("sorted").owned_by == made.encoder
    with pytest.raises(openai.NotFoundError, match="no adapter 'none' here"):
        client.models.retrieve("none")


@pytest.mark.parametrize("name", ["later", "plain", None])
def test_a_completion_goes_on_as_the_model_with_that_adapter(client, made, likeliest, name):
    said = client.completions.create(
        model=name or made.model, prompt=PROMPT, max_tokens=5, temperature=0
    )
    expected = likeliest(PROMPT, 5, name)
    assert said.object == "text_completion"
    assert said.choices[0].text.split() == expected
    assert said.choices[0].finish_reason in ("length", "stop")
    assert said.usage.prompt_tokens == 4
    assert said.usage.completion_tokens >= len(expected)
    assert said.usage.total_tokens == 4 + said.usage.completion_tokens


def test_prompts_may_be_texts_or_tokens_and_several(client, likeliest):
    ids = [4, 5, 6]
    options = {"model": "later", "max_tokens": 3, "temperature": 0}
    by_ids = client.completions.create(prompt=ids, **options).choices[0].text
    several = client.completions.create(prompt=[PROMPT, "the"], **options)
    assert [choice.index for choice in several.choices] == [0, 1]
    assert several.choices[0].text.split() == likeliest(PROMPT, 3, "later")
    assert several.choices[1].text.split() == likeliest("the", 3, "later")
    assert several.usage.prompt_tokens == 5
    both = client.completions.create(prompt=[ids, ids], **options)
    assert [choice.text for choice in both.choices] == [by_ids, by_ids]
    said = client.completions.create(prompt="the", n=2, **options)
    assert len(said.choices) == 2
    assert said.usage.prompt_tokens == 1


def test_a_chat_is_asked_in_the_models_template(client, made, likeliest):
    messages = [{"role": "user", "content": "the parcel"}]
    said = client.chat.completions.create(
        model="later", messages=messages, max_tokens=4, temperature=0
    )
    assert said.object == "chat.completion"
    assert said.choices[0].message.role == "assistant"
    assert said.choices[0].message.content.split() == likeliest("user the parcel the", 4, "later")
    assert said.usage.prompt_tokens == 4
    parts = [{"role": "user", "content": [{"type": "text", "text": "the parcel"}]}]
    again = client.chat.completions.create(
        model="later", messages=parts, max_completion_tokens=4, temperature=0
    )
    assert again.choices[0].message.content == said.choices[0].message.content


def test_a_stream_has_the_same_text_in_pieces(client):
    options = {"model": "later", "max_tokens": 6, "temperature": 0}
    whole = client.completions.create(prompt=PROMPT, **options)
    events = [
        *client.completions.create(
            prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **options
        )
    ]
    assert "".join(e.choices[0].text for e in events if e.choices) == whole.choices[0].text
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] is not None
    assert events[-1].choices == []
    assert events[-1].usage == whole.usage
    messages = [{"role": "user", "content": "the parcel"}]
    whole = client.chat.completions.create(messages=messages, **options)
    events = [*client.chat.completions.create(messages=messages, stream=True, **options)]
    assert events[0].choices[0].delta.role == "assistant"
    said = "".join(e.choices[0].delta.content or "" for e in events)
    assert said == whole.choices[0].message.content
    assert events[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len({e.id for e in events}) == 1


def test_several_texts_stream_with_an_index_each(client):
    options = {"model": "later", "max_tokens": 4, "temperature": 0}
    prompts = [PROMPT, "the"]
    whole = client.completions.create(prompt=prompts, **options)
    texts = {0: "", 1: ""}
    for event in client.completions.create(prompt=prompts, stream=True, **options):
        texts[event.choices[0].index] += event.choices[0].text
    assert [*texts.values()] == [choice.text for choice in whole.choices]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"model": "sorted"}, "on a sentence encoder, which cannot go on with a text"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": [99_999]}, "the token 99,999, expected tokens below"),
        ({"prompt": ["the", ""]}, "empty"),
        ({"max_tokens": 0}, "max_tokens is 0: expected greater than or equal to 1"),
        ({"temperature": 3}, "temperature is 3: expected less than or equal to 2"),
        ({"temperature": "hot"}, "temperature is 'hot': expected a valid number"),
        ({"top_p": 0}, "top_p is 0"),
        ({"presence_penalty": 1}, "presence_penalty is 1"),
        ({"extra_body": {"beams": 3}}, "beams means nothing here"),
        ({"stop": [""]}, "stop.0 is ''"),
    ],
)
def test_what_cannot_be_done_is_a_bad_request(client, more, words):
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(**{"model": "later", "prompt": PROMPT, **more})
    assert words in str(raised.value), raised.value
    assert raised.value.body.keys() == {"message", "type", "param", "code"}


def test_an_unknown_model_is_not_found(client):
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError) as raised:
            client.chat.completions.create(
                model="laterr", messages=[{"role": "user", "content": "x"}], stream=stream
            )
        assert raised.value.code == "model_not_found"
        assert "did you mean 'later'?" in raised.value.message
