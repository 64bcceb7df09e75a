"""Labelled texts and answer choices, as the command line names them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import IA3Error, MissingFileError, counted, did_you_mean, naming
from ..files.labelled_data import EMPTY, LONG, ONE_CLASS, Finding, check_examples
from ..files.saved import TASK_NAME, weights_file
from ..files.tables import fields_of
from .options import warn

if TYPE_CHECKING:
    from ..classify.task_file import TaskFile
    from ..files.tables import Row


def check_columns(text: Sequence[str], label: str) -> None:
    """Refuse a column that is the text and the label at once."""
    if label in text:
        problem = f"{label!r} is the text and the label at once"
        raise typer.BadParameter(problem, param_hint="--label")


def check_added(rows: Sequence[Row], command: str) -> None:
    """Refuse a column of a name that `with_predictions` adds."""
    for column in ("prediction", "probability"):
        for row in rows:
            if column in row:
                taken = f"there is a column {column!r} already, which {command} adds: rename it"
                raise IA3Error(f"{row.where}: {taken}")


def with_predictions(
    rows: Iterable[Row], labels: Iterable[Any], probabilities: Iterable[float]
) -> list[dict[str, Any]]:
    """The rows, each with the label that was predicted and its probability."""
    return [
        {**row, "prediction": label, "probability": round(float(probability), 6)}
        for row, label, probability in zip(rows, labels, probabilities, strict=True)
    ]


def by_name(labels: Iterable[Any]) -> dict[str, Any]:
    """Labels by how CSV and the command line, which have only strings, write them."""
    named = {str(label): label for label in labels}
    # Python's True is JSON's true.
    named |= {str(label).lower(): label for label in labels if isinstance(label, bool)}
    return named


def labels_among(rows: Sequence[Row], column: str, known: Sequence[Any]) -> list[Any]:
    """The rows' labels, as the known ones are: CSV and JSON Lines may differ in their types."""
    named = by_name(known)
    return [known_label(row, row[column], named, known) for row in rows]


def known_label(row: Row, label: Any, named: Mapping[str, Any], known: Sequence[Any]) -> Any:
    """A row's label, as the known one of this name is."""
    if str(label) not in named:
        raise IA3Error(
            f"{row.where}: the label {label!r} is not among the choices "
            f"{list(known)}{did_you_mean(str(label), named)}"
        )
    return named[str(label)]


def label_named(name: str, labels: Sequence[Any]) -> Any:
    """The label of this name, of the labels' type; a whole number may be one without examples."""
    named = by_name(labels)
    label = named.get(name, name)
    if label == name and type(labels[0]) is int and name.lstrip("-").isdecimal():
        label = int(name)
    if type(label) is not type(labels[0]):
        raise IA3Error(f"no label {name!r} among {sorted(named)}")
    return label


def check_choices(choices: Mapping[Any, str], labels: Sequence[Any], called: str) -> None:
    """Refuse choices that lack the words of a label, by the name that may be mistyped for it."""
    lacking = [label for label in dict.fromkeys(labels) if label not in choices]
    if not lacking:
        return
    known = set(labels)
    for label in choices:
        hint = did_you_mean(str(label), map(str, lacking))
        if label not in known and hint:
            raise IA3Error(f"{called} {str(label)!r}: no example has this label{hint}")
    lacks = ", ".join(map(repr, lacking[:5])) + (", ..." if lacking[5:] else "")
    more = next((f"; no example has {str(label)!r}" for label in choices if label not in known), "")
    raise IA3Error(
        f"{called} has no words for {lacks}: a language model ranks the words of all labels, so "
        f"give them for each or for none{more}"
    )


def parse_choices(pairs: list[str] | None, labels: list[Any]) -> dict[Any, str] | None:
    """The words of `--choice LABEL=WORDS`, by label; the labels are of one type."""
    if not pairs:
        return None
    choices: dict[Any, str] = {}
    # The longest label that a pair begins with is meant.
    with_equals = sorted((name for name in by_name(labels) if "=" in name), key=len)
    for pair in pairs:
        name, equals, words = pair.partition("=")
        for label in with_equals:
            if pair.startswith(f"{label}="):
                name, words = label, pair[len(label) + 1 :]
        if not equals or not words.strip():
            problem = f"{pair!r}, expected LABEL=WORDS, e.g. 'pos=great'"
            raise typer.BadParameter(problem, param_hint="--choice")
        try:
            label = label_named(name, labels)
        except IA3Error as error:
            raise IA3Error(f"--choice {pair!r}: {error}") from error
        if label in choices:
            raise typer.BadParameter(f"{name!r} is given more than once", param_hint="--choice")
        choices[label] = words.strip()
    check_choices(choices, labels, "--choice")
    return choices


def field_of(
    rows: Sequence[Row],
    columns: Sequence[str],
    templates: Sequence[str] | None,
    words: Iterable[str],
) -> str:
    """The field that a text of one column is: `text`, or the column where templates name it so.

    The templates are tried on the first row, with the `words` that answer.

    Raises:
        IA3Error: a template is broken, or names a field that there is not, or no column.
    """
    if not templates:
        return "text"
    from ..tfew.prompts.templates import Template

    first = {column: str(rows[0][column]) for column in columns}
    if len(columns) == 1:
        first = {"text": first[columns[0]], **first}
    answers, named = list(words), set()
    for source in templates:
        template = Template(source)
        template.render(first, answers)
        if not any(map(template.reads, first)):
            raise IA3Error(
                f"the template {source!r} names no column of the text, {', '.join(first)}: it "
                f"would ask the same of every text; write {{{{ {columns[0]} }}}} in it"
            )
        named |= {field for field in first if template.names(field)}
    if len(columns) > 1 or len(named) < 2:
        return next(iter(named)) if len(columns) == 1 and named else "text"
    raise IA3Error(
        f"the templates name the text both {' and '.join(map(repr, first))}: use one of the two"
    )


def check_fields_given(
    adapter: Path, fields: Sequence[str], templates: Sequence[str], columns: Sequence[str]
) -> None:
    """Refuse columns that lack a field which a classifier of these templates reads."""
    if len(fields) == len(columns) == 1:
        return
    from ..tfew.prompts.templates import Template

    parsed = [Template(source) for source in templates]
    read = [f for f in fields if not parsed or any(each.reads(f) for each in parsed)]
    lacking = [field for field in read if field not in columns]
    if lacking:
        given = " ".join(f"--text {field}" for field in read)
        raise IA3Error(
            f"{adapter} reads the {'fields' if read[1:] else 'field'} {', '.join(read)}, and "
            f"--text names {', '.join(columns)}: give {given}, of columns with these names"
        )


def examples_for(
    adapter: Path, task: TaskFile, rows: Sequence[Row], columns: Sequence[str]
) -> list[dict[str, Any]]:
    """The rows' texts as a classifier reads them; raises as `check_fields_given`."""
    check_fields_given(adapter, task.fields, task.templates, columns)
    return fields_of(rows, columns, next(iter(task.fields), "text"))


def read_task(adapter: Path) -> TaskFile:
    """The task of a classifier, read without torch; all mistakes in its folder are not seen."""
    from ..adapter.layout import open_folder
    from ..classify.task_file import TaskFile

    with naming(f"no classifier in {adapter}"):
        saved_folder = open_folder(adapter)
    with saved_folder as saved:
        text = saved.text(TASK_NAME)
    if text is None:
        raise MissingFileError(f"no classifier in {adapter}: {TASK_NAME} is not there")
    return TaskFile.from_json(text, str(adapter / TASK_NAME))


def check_begins_with(init_from: str | None) -> None:
    """Refuse a folder for `--init-from` that is not there, or holds no adapter; hub ids pass."""
    if init_from is None:
        return
    path = Path(init_from)
    with naming("--init-from"):
        if path.is_dir():
            weights_file(path)
        elif path.is_absolute() or path.parts[:1] == ("..",) or init_from.startswith("./"):
            raise MissingFileError(f"{path} does not exist: expected an adapter's folder")


def findings_in(
    rows: Sequence[Row],
    text: Sequence[str],
    labels: Sequence[Any],
    tests: Sequence[Row] = (),
    test_labels: Sequence[Any] = (),
    max_words: int | None = None,
) -> list[Finding]:
    """What is wrong with the rows of a file, and with those that are to test on.

    The labels are those of each row: one, or a list of them.
    """

    def texts_of(some: Sequence[Row]) -> list[dict[str, str]]:
        return [{column: str(row[column]) for column in text} for row in some]

    more: dict[str, Any] = {"where": [row.where for row in rows], "max_words": max_words}
    if tests:
        more |= {"test_texts": texts_of(tests), "test_labels": test_labels}
        more["test_where"] = [row.where for row in tests]
    return check_examples(texts_of(rows), labels, **more)


def warn_of(findings: Sequence[Finding], strict: bool = False, of: str = "") -> None:
    """Say what is wrong with the data, after what it is `of`; with `strict` it is an error.

    Of empty texts the reading of the file has warned; training warns of those that it cuts, and
    refuses a single class.
    """
    for finding in findings:
        if finding.kind != EMPTY and (strict or finding.kind not in (LONG, ONE_CLASS)):
            warn(f"{of}{finding.message}")
    if strict and findings:
        raise IA3Error(
            f"the data has {counted(len(findings), 'problem')}, and --strict takes none: mend the "
            "data, or leave --strict out"
        )
