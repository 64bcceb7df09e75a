"""The file that a classifier has beside its adapter: what is asked, and how it was trained.

Format 1 is that of a language model before there were other engines; it is read as it was. Format 3
is that of a task whose texts may have several labels: who reads format 2 would give one each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from ..errors import BrokenFileError, IA3Error, MissingExtraError, did_you_mean, shown
from ..files.json import parse_object
from ..tfew.prompts.labels import Label, check_labels
from ..tfew.prompts.templates import MOST_TEMPLATES, Template

try:
    from pydantic import (
        AfterValidator,
        BaseModel,
        BeforeValidator,
        ConfigDict,
        Field,
        ValidationError,
        model_validator,
    )
except ImportError as error:
    raise MissingExtraError("pydantic", "tfew", "reading a classifier's task file") from error

TASK_FORMAT = 2
MULTILABEL_FORMAT = 3
_FORMATS = (1, TASK_FORMAT, MULTILABEL_FORMAT)
_KNOWN_FORMATS = "1, 2 or 3"
# What format 1 lacks.
_ADDED = ("engine", "temperature", "threads", "selection", "embedding", "max_words", "head")
MOST_THREADS = 4096
# As many candidates as `selection` may have.
MOST_CANDIDATES = 8
# Of a candidate's model, in characters.
LONGEST_NAME = 4096

EngineName = Literal["language-model", "encoder"]
_ENGINES = "'language-model' or 'encoder'"
_SHA256 = "^[0-9a-f]{64}$"


def _check_format(value: Any) -> Any:
    # The literal type would take True and 1.0 for 1.
    if type(value) is not int or value not in _FORMATS:
        raise IA3Error(
            f"has format {shown(value)}, expected {_KNOWN_FORMATS}: it was "
            "written by another version of ia3"
        )
    return value


def _check_templates(sources: list[str]) -> list[str]:
    if len(sources) > MOST_TEMPLATES:
        raise IA3Error(f"templates has {len(sources):,}, expected at most {MOST_TEMPLATES:,}")
    for index, source in enumerate(sources):
        Template(source, name=f"templates[{index}]")
    return sources


def _check_fields(names: list[str]) -> list[str]:
    _check_once("fields", names)
    return names


def _check_choices(choices: list[str]) -> list[str]:
    for index, words in enumerate(choices):
        if not words.strip():
            raise IA3Error(f"choices[{index}] is {shown(words)}, expected words")
    return choices


def _check_labels(labels: list[Any]) -> list[Label]:
    check_labels(labels, "labels[{}]".format)
    _check_once("labels", labels)
    return labels


def _check_once(name: str, values: list[Any]) -> None:
    seen = set()
    for index, value in enumerate(values):
        if value in seen:
            raise IA3Error(f"{name}[{index}] is {shown(value)} a second time")
        seen.add(value)


class Candidate(BaseModel):
    """What the choice among engines saw of one of them.

    Attributes:
        engine: which one.
        name: its model's; `None` where it had none.
        accuracy: on held-out examples, 0 to 1.
        error: its standard error, at least 0.
        note: more, in words.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    engine: EngineName = Field(description=_ENGINES)
    name: str | None = Field(
        max_length=LONGEST_NAME,
        description=f"a text of at most {LONGEST_NAME:,} characters, or null",
    )
    accuracy: float = Field(ge=0, le=1, allow_inf_nan=False, description="a number, 0 to 1")
    error: float = Field(ge=0, allow_inf_nan=False, description="a number, at least 0")
    note: str = Field(max_length=1000, description="a text of at most 1,000 characters")

    def __str__(self) -> str:
        return f"{self.engine} {100 * self.accuracy:.0f} ± {100 * self.error:.0f} ({self.note})"


class Embedding(BaseModel):
    """How an encoder makes a text's vector, as `SentenceEncoder.described` says it.

    Attributes:
        pooling: how tokens become one vector.
        normalize: whether its length becomes 1.
        max_length: the most tokens of a text.
        prompt: is put before each text.
        prompt_tokens: so many are left out of the pooling.
        dense: SHA-256, in hex, of the layers after the pooling; `None` where there are none.
        tokens: SHA-256, in hex, of the tokens of a few words.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    pooling: str = Field(description="a text")
    normalize: bool = Field(description="true or false")
    max_length: int = Field(ge=1, description="a whole number, at least 1")
    prompt: str = Field(description="a text")
    prompt_tokens: int = Field(ge=0, description="a whole number, at least 0")
    dense: str | None = Field(pattern=_SHA256, description="64 hexadecimal digits, or null")
    tokens: str = Field(pattern=_SHA256, description="64 hexadecimal digits")


class TaskFile(BaseModel):
    """What `ia3_task.json` holds, checked: every value has its type and range.

    Attributes:
        format: 2, or 1 for a file that lacks the keys from `engine` on, but for `vectors`; 3 for
            one that has `multilabel`.
        model: the base model's name, folder or hub id; `None` or empty where it had none.
        templates: the sources of the prompts' templates, at least one; for an encoder the one that
            makes the text, or none where the fields are joined.
        fields: the names of an example's fields, each once.
        labels: the classes, at least two, all strings, all integers or all booleans.
        choices: the words ranked for each label, `[labels]`; an encoder needs none.
        chat, steps, learning_rate, seed, upper_blocks: the settings of the fit.
        engine: what the adapter is on.
        temperature: probabilities are the softmax of the scores divided by it.
        threads: how many the training took; `None` where that is not known.
        selection: what was seen of the engines before training; `None` where nothing was.
        multilabel: whether a text may have several labels, of which the head's sigmoids say each by
            itself; true, or no key.
        embedding: how an encoder embedded the texts; `None` where that is not known.
        max_words: how many words of a text's field are read; `None`, as in files of earlier
            versions, reads all.
        head: SHA-256, in hex, of the file of an encoder's head; a language model has none.
        vectors: SHA-256, in hex, of the values of the adapter that this task was fitted with; files
            of earlier versions have none.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    # The descriptions are what messages say was expected.
    format: Annotated[int, BeforeValidator(_check_format)] = Field(description=_KNOWN_FORMATS)
    model: str | None = Field(description="a model's name, or null")
    templates: Annotated[list[str], AfterValidator(_check_templates)] = Field(
        description="a list of texts, at least one"
    )
    fields: Annotated[list[str], AfterValidator(_check_fields)] = Field(
        description="a list of names"
    )
    labels: Annotated[list[Any], AfterValidator(_check_labels)] = Field(
        min_length=2, description="a list of strings, integers or booleans, at least two"
    )
    choices: Annotated[list[str], AfterValidator(_check_choices)] = Field(
        description="a list of texts, one for each label"
    )
    chat: bool = Field(description="true or false")
    steps: int = Field(ge=0, description="a whole number, at least 0")
    learning_rate: float = Field(gt=0, allow_inf_nan=False, description="a number above 0")
    seed: int = Field(ge=0, lt=2**32, description="a whole number, 0 to 2**32 - 1")
    upper_blocks: int | None = Field(
        default=None, ge=1, description="a whole number, at least 1, or null"
    )
    engine: EngineName = Field(default="language-model", description=_ENGINES)
    # Beyond these, scores would become infinite, or all of them alike.
    temperature: float = Field(
        default=1.0,
        ge=1e-6,
        le=1e6,
        allow_inf_nan=False,  # pydantic 2.0 holds no bound against what is not a number
        description="a number, 1e-6 to 1e6",
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        le=MOST_THREADS,
        description=f"a whole number, 1 to {MOST_THREADS}, or null",
    )
    selection: list[Candidate] | None = Field(
        default=None,
        max_length=MOST_CANDIDATES,
        description=f"a list of at most {MOST_CANDIDATES} objects, or null",
    )
    multilabel: bool = Field(default=False, description="true")
    embedding: Embedding | None = Field(default=None, description="an object, or null")
    max_words: int | None = Field(
        default=None, ge=1, description="a whole number, at least 1, or null"
    )
    head: str | None = Field(
        default=None, pattern=_SHA256, description="64 hexadecimal digits, or null"
    )
    vectors: str | None = Field(
        default=None, pattern=_SHA256, description="64 hexadecimal digits, or null"
    )

    @model_validator(mode="after")
    def _check_format_and_engine(self) -> Self:
        added = [name for name in _ADDED if name in self.model_fields_set]
        if self.format == 1 and added:
            raise IA3Error(f"has {added[0]!r}, which a task file of format 1 lacks")
        if self.format != 1 and "engine" not in self.model_fields_set:
            raise IA3Error(f"has no 'engine', expected {_ENGINES}")
        if self.multilabel != (self.format == MULTILABEL_FORMAT):
            found = f"multilabel is {json.dumps(self.multilabel)} in a task file of format"
            expected = f"true in format {MULTILABEL_FORMAT} alone"
            raise IA3Error(f"{found} {self.format}, expected {expected}")
        if self.multilabel and self.engine != "encoder":
            raise IA3Error("multilabel is true, expected no such key for a language model")
        if self.engine == "encoder":
            self._check_encoder()
        else:
            if not self.templates:
                raise IA3Error("templates is [], expected a list of texts, at least one")
            for value, what in ((self.head, "a head"), (self.embedding, "an embedding")):
                if value is not None:
                    raise IA3Error(f"has {what}, which a language model lacks: expected null")
        if len(self.choices) != len(self.labels) and (self.choices or self.engine != "encoder"):
            raise IA3Error(
                f"has {len(self.choices)} choices for {len(self.labels)} labels: expected one each"
            )
        return self

    def _check_encoder(self) -> None:
        if len(self.templates) > 1:
            raise IA3Error(
                f"templates has {len(self.templates):,}, expected one for an encoder, or none"
            )
        if self.head is None:
            raise IA3Error("has no 'head', which an encoder needs: expected 64 hexadecimal digits")
        if self.chat:
            raise IA3Error("chat is True, expected false for an encoder")
        if self.upper_blocks is not None:
            raise IA3Error(f"upper_blocks is {self.upper_blocks}, expected null for an encoder")

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> TaskFile:
        """What a task file holds; `where` it is from begins the message.

        Raises:
            BrokenFileError: it is no JSON object, lacks a key or has one too many, or a value is of
                another type or out of its range.
        """
        values = parse_object(text, where)
        try:
            return cls.of(values)
        except IA3Error as error:
            raise BrokenFileError(f"{where}: {error}") from error

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> TaskFile:
        """The task file that has these values.

        Raises:
            IA3Error: one is missing, or of another type or out of its range.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first, *others = error.errors()
            more = f" (and {len(others)} more to correct)" if others else ""
            raise IA3Error(f"{_in_words(first)}{more}") from error

    def to_json(self) -> str:
        """The file's text. Keys are in the order of the attributes; what is not known is no key."""
        may_lack = ("embedding", "max_words", "head", "vectors")
        left_out = {name for name in may_lack if getattr(self, name) is None}
        if not self.multilabel:
            left_out.add("multilabel")
        if self.format == 1:
            left_out.update(_ADDED)
        return json.dumps(self.model_dump(exclude=left_out), indent=2, ensure_ascii=False) + "\n"


# What a task file has parts of, by the key that they are under.
_PARTS: dict[str, type[BaseModel]] = {"selection": Candidate, "embedding": Embedding}


def _in_words(fault: Any) -> str:
    """What pydantic found, in a sentence of ours."""
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    *above, name = fault["loc"]
    if isinstance(name, int):
        (of,) = above
        expected = TaskFile.model_fields[of].description
        return f"{of}[{name}] is {shown(fault['input'])}; {of} is to be {expected}"
    known = (_PARTS[above[0]] if above else TaskFile).model_fields
    place = "".join([*above[:1], *(f"[{index}]" for index in above[1:])])
    if name not in known:
        what = _PARTS[above[0]].__name__.lower() if above else "task file"
        hint = did_you_mean(name[:60], known)
        return f"{place} has {shown(name)}, which no {what} has{hint}".lstrip()
    expected = known[name].description
    if fault["type"] == "missing":
        return f"{place} has no {name!r}, expected {expected}".lstrip()
    return f"{place}.{name} is {shown(fault['input'])}, expected {expected}".lstrip(".")
