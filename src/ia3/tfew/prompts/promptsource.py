"""Templates in promptsource's format: YAML files that bring prompt, target and answer choices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ...arguments import flag, instance, path_of
from ...errors import BrokenFileError, IA3Error, naming, shown
from ...files.yaml import read_yaml
from .templates import SEPARATOR, Template, UnknownLabelError


@dataclass(frozen=True)
class Rendered:
    """What a template makes of one example; `answer` is the right choice's index, if known."""

    prompt: str
    choices: tuple[str, ...]
    answer: int | None


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt, its target and the answer choices, all rendered from an example's fields.

    Attributes:
        name: for messages and results.
        prompt: the prompt's template, whose `|||` begins the target.
        choices: renders the answer choices with `|||` between them; `None` where the target is
            free text, which cannot be ranked.
        original_task: whether it asks for the data set's own labels.
    """

    name: str
    prompt: Template
    choices: Template | None
    original_task: bool = True

    def choices_of(self, example: Mapping[str, Any]) -> tuple[str, ...]:
        """The answer choices of one example.

        Raises:
            InvalidTypeError: it is no mapping.
            IA3Error: there are none, one is empty, two are equal, or they do not render.
        """
        instance("example", example, Mapping, "a mapping from field names to values")
        if self.choices is None:
            raise self._error("has no answer choices, so there is nothing to rank", example)
        try:
            choices = tuple(self.choices.parts(example, ()))
        except IA3Error as error:
            raise IA3Error(f"{error}, in its answer choices for {described(example)}") from error
        if not any(choices):
            raise self._error("renders no answer choices", example)
        seen: set[str] = set()
        for index, choice in enumerate(choices):
            if not choice:
                raise self._error(f"renders an empty choice (number {index + 1})", example)
            if choice in seen:
                raise self._error(f"renders the choice {shown(choice)} twice", example)
            seen.add(choice)
        return choices

    def render(self, example: Mapping[str, Any], *, labelled: bool = True) -> Rendered | None:
        """Prompt, choices and answer of one example.

        Args:
            example: field name -> value.
            labelled: `False` leaves the target unrendered, whose fields may then be missing.

        Returns:
            `None` where the prompt is empty: the template asks nothing of this example. The answer
            is `None` where the target is empty, as in promptsource's files for an unknown label,
            or takes the choice by a label that is unknown: below 0, blank or `None`.

        Raises:
            InvalidTypeError: an argument is of another type.
            IA3Error: a field is missing, the choices are unusable, or the target is none of them.
        """
        labelled = flag("labelled", labelled)
        choices = self.choices_of(example)
        try:
            if not labelled:
                prompt = self.prompt.render(example, choices)
                return Rendered(prompt, choices, None) if prompt else None
            try:
                parts = self.prompt.parts(example, choices)
            except UnknownLabelError:
                # Unless the prompt itself depends on the label.
                parts = [self.prompt.render(example, choices), ""]
        except IA3Error as error:
            raise IA3Error(f"{error}, for {described(example)}") from error
        if not parts[0]:
            return None
        if len(parts) != 2:
            problem = f"renders {len(parts)} parts, expected a prompt, '{SEPARATOR}' and a target"
            raise self._error(problem, example)
        prompt, target = parts
        if target and target not in choices:
            problem = f"renders the target {shown(target)}, which is not among the choices"
            raise self._error(f"{problem} {shown(list(choices))}", example)
        return Rendered(prompt, choices, choices.index(target) if target else None)

    def _error(self, problem: str, example: Mapping[str, Any]) -> IA3Error:
        return IA3Error(f"template {self.name!r} {problem}, for {described(example)}")


def read_promptsource(path: str | Path) -> list[PromptTemplate]:
    """The templates of one of promptsource's files, or of one in its format.

    Nothing but plain data and the two tags of the format is built from the YAML.

    Args:
        path: the file, or a folder with a `templates.yaml`.

    Returns:
        Sorted by name, which is the order the T-Few authors number them in.

    Raises:
        InvalidTypeError: an argument is of another type.
        MissingFileError: there is no such file.
        BrokenFileError: it is not YAML of this format.
        IA3Error: a template is not Jinja.
    """
    path = path_of("path", path)
    path = path / "templates.yaml" if path.is_dir() else path
    content = read_yaml(path, "a file of templates", tags=("!Template", "!TemplateMetadata"))
    entries = content.get("templates") if isinstance(content, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise BrokenFileError(f"{path} has no templates, expected a mapping under 'templates'")
    with naming(str(path)):
        templates = sorted((_template(*item) for item in entries.items()), key=lambda t: t.name)
        for one, following in pairwise(templates):
            if one.name == following.name:
                twice = f"there are two templates of the name {shown(one.name)}"
                raise BrokenFileError(twice)
    return templates


def _template(key: Any, entry: Any) -> PromptTemplate:
    if not isinstance(entry, dict):
        raise BrokenFileError(
            f"template {shown(key)} is {type(entry).__name__}, expected a mapping"
        )
    name = entry.get("name")
    if not isinstance(name, str) or not name:
        raise BrokenFileError(
            f"the name of template {shown(key)} is {shown(name)}, expected a text"
        )
    jinja, choices = entry.get("jinja"), entry.get("answer_choices")
    if not isinstance(jinja, str):
        raise BrokenFileError(f"jinja of template {shown(name)} is {shown(jinja)}, expected a text")
    if SEPARATOR not in jinja:
        raise BrokenFileError(f"template {shown(name)} has no '{SEPARATOR}' before its target")
    if not isinstance(choices, str | None):
        raise BrokenFileError(
            f"answer_choices of template {shown(name)} is {shown(choices)}, expected a "
            f"text with '{SEPARATOR}' between the choices (put it in quotes)"
        )
    metadata = entry.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise BrokenFileError(
            f"metadata of template {shown(name)} is {shown(metadata)}, expected a mapping"
        )
    return PromptTemplate(
        name,
        Template(jinja, name),
        Template(choices, name) if choices else None,
        bool(metadata.get("original_task")),
    )


def described(example: Mapping[str, Any]) -> str:
    """An example for a message: its place, if it says so, and its fields, cut short."""
    where = getattr(example, "where", None)
    text = repr(dict(example))
    text = text if len(text) <= 300 else f"{text[:297]}..."
    return f"the example {text}" if where is None else f"the example of {where}: {text}"
