"""Templates in promptsource's format: YAML files that bring prompt, target and answer choices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import IA3Error
from ...files.yaml import read_yaml
from .templates import SEPARATOR, Template

FILE_NAME = "templates.yaml"
_TAGS = ("!Template", "!TemplateMetadata")
_SHOWN = 300


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
        name: what messages and results call it.
        prompt: the prompt's template, whose `|||` begins the target.
        choices: renders the answer choices with `|||` between them; `None` where the target is
            free text, which nothing here can rank.
        original_task: whether it poses the data set's own task, as opposed to one made from it.
        metrics: names of the scores it is meant for.
    """

    name: str
    prompt: Template
    choices: Template | None
    original_task: bool = True
    metrics: tuple[str, ...] = ("Accuracy",)

    @property
    def fixed_choices(self) -> tuple[str, ...] | None:
        """The choices, where they are the same for every example."""
        if self.choices is None or not self.choices.is_constant:
            return None
        return self.choices_of({})

    def choices_of(self, example: Mapping[str, Any]) -> tuple[str, ...]:
        """The answer choices of one example.

        Raises:
            IA3Error: there are none, one is empty, two are equal, or they do not render.
        """
        if self.choices is None:
            raise self._error("has no answer choices, so there is nothing to rank", example)
        try:
            choices = tuple(self.choices.parts(example, ()))
        except IA3Error as error:
            raise IA3Error(f"{error}, in its answer choices for {shown(example)}") from error
        if not any(choices):
            raise self._error("renders no answer choices", example)
        for index, choice in enumerate(choices):
            if not choice:
                raise self._error(f"renders an empty choice (number {index + 1})", example)
            if choice in choices[:index]:
                raise self._error(f"renders the choice {choice!r} twice", example)
        return choices

    def render(self, example: Mapping[str, Any], *, labelled: bool = True) -> Rendered | None:
        """Prompt, choices and answer of one example.

        Args:
            example: field name -> value.
            labelled: `False` leaves the target unrendered, whose fields may then be missing.

        Returns:
            `None` where the template has nothing to ask of this example: its prompt is empty. The
            answer is `None` where the target is empty, as promptsource's files have it for a label
            that is not known.

        Raises:
            IA3Error: a field is missing, the choices are unusable (see `choices_of`), the target is
                none of them, or the template reaches for Python internals.
        """
        choices = self.choices_of(example)
        try:
            if not labelled:
                prompt = self.prompt.render(example, choices)
                return Rendered(prompt, choices, None) if prompt else None
            parts = self.prompt.parts(example, choices)
        except IA3Error as error:
            raise IA3Error(f"{error}, for {shown(example)}") from error
        if not parts[0]:
            return None
        if len(parts) != 2:
            raise self._error(
                f"renders {len(parts)} parts, expected a prompt, '{SEPARATOR}' and a target",
                example,
            )
        prompt, target = parts
        if not target:
            return Rendered(prompt, choices, None)
        if target not in choices:
            raise self._error(
                f"renders the target {target!r}, which is not among the choices {list(choices)}",
                example,
            )
        return Rendered(prompt, choices, choices.index(target))

    def _error(self, problem: str, example: Mapping[str, Any]) -> IA3Error:
        return IA3Error(f"template {self.name!r} {problem}, for {shown(example)}")


def read_promptsource(path: str | Path) -> list[PromptTemplate]:
    """The templates of one of promptsource's files, or of one in its format.

    Nothing but plain data and the two tags of the format is built from the YAML. Unlike
    promptsource, rendering never shortens a field: the encoder cuts a prompt to the model's length.

    Args:
        path: the file, or a folder with a `templates.yaml`.

    Returns:
        Sorted by name, which is the order the T-Few authors number them in.

    Raises:
        FileNotFoundError: there is no such file.
        IA3Error: it is not YAML of this format, or a template is not Jinja.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    content = read_yaml(path, "a file of templates", tags=_TAGS)
    entries = content.get("templates") if isinstance(content, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise IA3Error(f"{path} has no templates, expected a mapping under 'templates'")
    templates: dict[str, PromptTemplate] = {}
    for key, entry in entries.items():
        template = _template(path, key, entry)
        if template.name in templates:
            raise IA3Error(f"{path} has two templates of the name {template.name!r}")
        templates[template.name] = template
    return [templates[name] for name in sorted(templates)]


def _template(path: Path, key: Any, entry: Any) -> PromptTemplate:
    if not isinstance(entry, dict):
        raise IA3Error(f"{path}: template {key!r} is {type(entry).__name__}, expected a mapping")
    name = entry.get("name")
    if not isinstance(name, str) or not name:
        raise IA3Error(f"{path}: the name of template {key!r} is {name!r}, expected a text")
    jinja, choices = entry.get("jinja"), entry.get("answer_choices")
    if not isinstance(jinja, str):
        raise IA3Error(f"{path}: jinja of template {name!r} is {jinja!r}, expected a text")
    if SEPARATOR not in jinja:
        raise IA3Error(f"{path}: template {name!r} has no '{SEPARATOR}' before its target")
    if not isinstance(choices, str | None):
        raise IA3Error(
            f"{path}: answer_choices of template {name!r} is {choices!r}, expected a text with "
            f"'{SEPARATOR}' between the choices (put it in quotes)"
        )
    metadata = entry.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise IA3Error(f"{path}: metadata of template {name!r} is {metadata!r}")
    try:
        return PromptTemplate(
            name,
            Template(jinja, name),
            Template(choices, name) if choices else None,
            bool(metadata.get("original_task")),
            tuple(str(metric) for metric in metadata.get("metrics") or ()),
        )
    except IA3Error as error:
        raise IA3Error(f"{path}: {error}") from error


def shown(example: Mapping[str, Any]) -> str:
    """The example for a message: where it stands, if it says so, and its fields, cut short."""
    where = getattr(example, "where", None)
    text = repr(dict(example))
    text = text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
    return f"the example {text}" if where is None else f"the example of {where}: {text}"
