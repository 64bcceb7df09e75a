"""The file that a classifier has beside its adapter: what is asked, and how it was trained."""

from __future__ import annotations

import json
from typing import Annotated, Any, Self

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

TASK_FORMAT = 1


def _check_format(value: Any) -> Any:
    # The literal type would take True and 1.0 for 1.
    if type(value) is not int or value != TASK_FORMAT:
        raise IA3Error(
            f"has format {shown(value)}, expected {TASK_FORMAT}: it was written by another "
            "version of ia3"
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


class TaskFile(BaseModel):
    """What `ia3_task.json` holds, checked: every value has its type and range.

    Attributes:
        format: 1.
        model: the base model's name, folder or hub id; `None` or empty where it had none.
        templates: the sources of the prompts' templates, at least one.
        fields: the names of an example's fields, each once.
        labels: the classes, at least two, all strings, all integers or all booleans.
        choices: the words ranked for each label, `[labels]`.
        chat, steps, learning_rate, seed, upper_blocks: the settings of the fit.
        vectors: SHA-256, in hex, of the values of the adapter that this task was fitted with; files
            of earlier versions have none.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    # The descriptions are what messages say was expected.
    format: Annotated[int, BeforeValidator(_check_format)] = Field(description="1")
    model: str | None = Field(description="a model's name, or null")
    templates: Annotated[list[str], AfterValidator(_check_templates)] = Field(
        min_length=1, description="a list of texts, at least one"
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
    vectors: str | None = Field(
        default=None, pattern="^[0-9a-f]{64}$", description="64 hexadecimal digits, or null"
    )

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if len(self.labels) != len(self.choices):
            raise IA3Error(
                f"has {len(self.choices)} choices for {len(self.labels)} labels: expected one each"
            )
        return self

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> TaskFile:
        """What a task file holds; `where` it is from begins the message.

        Raises:
            BrokenFileError: it is no JSON object, lacks a key or has one too many, or a value is of
                another type or out of its range.
        """
        values = parse_object(text, where)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first, *others = error.errors()
            more = f" (and {len(others)} more to correct)" if others else ""
            raise BrokenFileError(f"{where}: {_in_words(first)}{more}") from error

    def to_json(self) -> str:
        """The file's text. Keys are in the order of the attributes; no `vectors` is no key."""
        left_out = {"vectors"} if self.vectors is None else set()
        return json.dumps(self.model_dump(exclude=left_out), indent=2, ensure_ascii=False) + "\n"


def _in_words(fault: Any) -> str:
    """What pydantic found, in a sentence of ours."""
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    name, *inside = fault["loc"]
    known = TaskFile.model_fields
    if name not in known:
        return f"has {shown(name)}, which no task file has{did_you_mean(name[:60], known)}"
    expected = known[name].description
    if fault["type"] == "missing":
        return f"has no {name!r}, expected {expected}"
    path = name + "".join(f"[{step}]" for step in inside)
    so = f"; {name} is to be {expected}" if inside else f", expected {expected}"
    return f"{path} is {shown(fault['input'])}{so}"
