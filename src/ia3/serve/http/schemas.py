"""The bodies of requests, checked by pydantic, and of answers, for the description of the API."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

# A larger number of any of these is a slip, and would take the machine for itself: pydantic tells
# of each value that is wrong, in a kilobyte, and of millions for minutes. What may be longer fails
# with its first wrong value.
MOST_TEXTS = 1024
MOST_CHOICES = 16
MOST_PROMPTS = 64
MOST_STOPS = 16
LONGEST_STOP = 1000
MOST_TOKENS = 1_000_000
MOST_LOGPROBS = 20
MOST_ADAPTERS = 1024
MOST_KEYS = 100
# Characters of a text to classify: a megabyte takes a second of all others' to be made tokens, of
# which a model reads the first.
LONGEST_TEXT = 2**17

Name = Annotated[str, Field(min_length=1, max_length=4096)]


def _check_keys(given: Any) -> Any:
    """A dict's `max_length` would be looked at behind all its values."""
    if isinstance(given, dict) and len(given) > MOST_KEYS:
        raise ValueError(f"there are {len(given):,} keys: expected at most {MOST_KEYS}")
    return given


def _check_length(text: str) -> str:
    # Not by a `max_length`: half a character would then be refused in words of pydantic's code.
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"it has {len(text):,} characters: expected at most {LONGEST_TEXT:,}")
    return text


FewKeys = BeforeValidator(_check_keys)
Text = Annotated[str, AfterValidator(_check_length)]
Value = Text | int | float | bool | None
Fields = Annotated[dict[str, Value], FewKeys]
TextIn = Annotated[Text | Fields, Field(description="a text, or the values of its fields")]


class Body(BaseModel):
    """What a client sends: a key that means nothing is an error, not passed over.

    One that is `null` is as good as none: OpenAI's client sends a message that it was answered back
    with all that it did not have.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, given: Any) -> Any:
        given = _check_keys(given)
        if not isinstance(given, dict):
            return given
        return {key: value for key, value in given.items() if value is not None}


class Classify(Body):
    """Texts to classify: by one adapter, by one each, or one text by several.

    `adapters` is `"*"` for all classifiers, of which `limit` are asked at most, by name.
    """

    texts: list[TextIn] | None = Field(
        default=None, min_length=1, max_length=MOST_TEXTS, fail_fast=True
    )
    text: TextIn | None = None
    adapter: Name | None = None
    adapters: (
        Annotated[list[Name], Field(min_length=1, max_length=MOST_ADAPTERS)] | Literal["*"] | None
    ) = None
    limit: int = Field(default=20, ge=1, le=MOST_ADAPTERS)
    untuned: bool = False

    @model_validator(mode="after")
    def _check_one_of_each(self) -> Self:
        if (self.texts is None) == (self.text is None):
            raise ValueError("give either 'texts' or 'text'")
        if (self.adapter is None) == (self.adapters is None):
            raise ValueError("give either 'adapter' or 'adapters'")
        if self.texts is not None and self.adapters is not None:
            if self.adapters == "*":
                raise ValueError("\"adapters\": \"*\" takes one 'text', not 'texts'")
            if len(self.adapters) != len(self.texts):
                raise ValueError(
                    f"there are {len(self.texts)} texts and {len(self.adapters)} adapters: "
                    "expected one each; for one text with many adapters give 'text'"
                )
        return self


class StreamOptions(Body):
    """What a stream has besides its pieces."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _Generate(Body):
    """What completions and chats have in common. What would change nothing may be there."""

    model: Name
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    n: int | None = Field(default=None, ge=1, le=MOST_CHOICES)
    max_tokens: int | None = Field(default=None, ge=1, le=MOST_TOKENS)
    stop: (
        Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
        | Annotated[
            list[Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]],
            Field(max_length=MOST_STOPS),
        ]
        | None
    ) = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], FewKeys, Field(max_length=0)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


class Completion(_Generate):
    """OpenAI's `POST /v1/completions`."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    echo: Literal[False] | None = None
    best_of: int | None = Field(default=None, ge=1, le=1)
    suffix: Annotated[str, Field(max_length=0)] | None = None


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Body):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]
    name: str | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class TextFormat(Body):
    """The only form of an answer."""

    type: Literal["text"]


class Chat(_Generate):
    """OpenAI's `POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MOST_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    response_format: TextFormat | None = None
    # Some clients always say that there are none.
    tools: list[Any] | None = Field(default=None, max_length=0)
    tool_choice: Literal["none", "auto"] | None = None
    store: bool | None = None
    metadata: Annotated[dict[str, str], FewKeys] | None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs 'logprobs': true")
        return self


class _Answer(BaseModel):
    """What the server sends."""

    model_config = ConfigDict(extra="allow")


class ErrorDetails(_Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(_Answer):
    error: ErrorDetails


class LabelProbability(_Answer):
    label: str | int | bool
    probability: float


class Result(_Answer):
    """What an adapter says of a text; only `adapter` and `error` where it can say nothing."""

    adapter: str
    label: str | int | bool | None = None
    probability: float | None = None
    probabilities: list[LabelProbability] | None = None
    labels: list[str | int | bool] | None = None
    untuned: dict[str, Any] | None = None
    error: ErrorDetails | None = None


class TextsUsed(_Answer):
    texts: int


class Classifications(_Answer):
    results: list[Result]
    usage: TextsUsed


class AdapterListed(_Answer):
    name: str
    base: str
    kind: Literal["classifier", "adapter"]
    engine: Literal["encoder", "language-model"]
    labels: list[Any] | None
    fields: list[str] | None
    bytes: int
    resident: bool


class AdapterSkipped(_Answer):
    name: str
    error: str


class Adapters(_Answer):
    adapters: list[AdapterListed]
    skipped: list[AdapterSkipped]


class Reloaded(_Answer):
    added: list[str]
    changed: list[str]
    removed: list[str]
    failed: dict[str, str]


class Busy(_Answer):
    running: int
    waiting: int
    tokens_per_second: float
    texts_per_second: float
    resident: int
    adapters: int
