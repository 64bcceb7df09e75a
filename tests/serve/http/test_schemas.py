"""What is wrong with a body is told in few words, however much is wrong."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")

from pydantic import ValidationError

from ia3.serve.http.learning import LearnRequest
from ia3.serve.http.schemas import LONGEST_TEXT, MOST_KEYS, Chat, Classify, Completion

MANY = 100_000
KEYS = {str(i): [] for i in range(MANY)}
WRONG = [0.5] * MANY
MESSAGE = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (Classify, {"adapter": "a", "texts": WRONG}),
        (Classify, {"adapter": "a", "texts": [dict(list(KEYS.items())[:MOST_KEYS])] * 1000}),
        (Classify, {"adapter": "a", "text": KEYS}),
        (Classify, {"text": "x", "adapters": WRONG}),
        (Classify, {"text": "x", "adapter": "a", **KEYS}),
        (Classify, {"adapter": "a", "text": "x" * (LONGEST_TEXT + 1)}),
        (Classify, {"adapter": "a", "text": {"title": "x" * (LONGEST_TEXT + 1)}}),
        (Completion, {"model": "m", "prompt": WRONG}),
        (Completion, {"model": "m", "prompt": [WRONG] * 64}),
        (Completion, {"model": "m", "prompt": "x", "stop": WRONG}),
        (Completion, {"model": "m", "prompt": "x", "logit_bias": KEYS}),
        (Chat, {"model": "m", "messages": WRONG}),
        (Chat, {"model": "m", "messages": [{"role": "user", "content": WRONG}]}),
        (Chat, {"model": "m", "messages": [{**MESSAGE, **KEYS}]}),
        (Chat, {"model": "m", "messages": [MESSAGE], "metadata": KEYS}),
        (LearnRequest, {"name": "a", "csv": "x", **KEYS}),
    ],
)
def test_of_many_wrong_values_few_are_told(kind, given):
    with pytest.raises(ValidationError) as found:
        kind.model_validate(given)
    assert 0 < found.value.error_count() < 1000


def test_as_many_as_are_taken_are_taken():
    fields = {str(i): "x" for i in range(MOST_KEYS)}
    assert Classify(adapter="a", texts=[fields] * 1024).texts is not None
    assert len(Completion(model="m", prompt=[7] * MANY).prompt) == MANY
    assert Completion(model="m", prompt="x", logit_bias={}, suffix="").logit_bias == {}
