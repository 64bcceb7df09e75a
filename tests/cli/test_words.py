"""The words of the command: known to whoever knows scikit-learn, and in the right number."""

from __future__ import annotations

import re

import pytest
import typer

from ia3.cli import app
from ia3.cli.options import as_options
from ia3.errors import counted

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
# What only readers of this project's documentation know.
UNKNOWN = r"\b(sites?|log-?scales?|octaves?|instead of ones|identity|rescaled?s?|uppermost|draws)\b"


def helps():
    for name, command in COMMANDS.items():
        yield name, command.help or ""
        for parameter in command.params:
            yield f"{name} {parameter.name}", getattr(parameter, "help", None) or ""


def test_no_help_has_a_word_that_only_this_project_has():
    texts = dict(helps())
    assert len(texts) > 100
    assert {n: t for n, t in texts.items() if re.search(UNKNOWN, t.replace("--sites", ""))} == {}
    options = {
        f"{name} {parameter.name}"
        for name, command in COMMANDS.items()
        for parameter in command.params
        if parameter.param_type_name == "option"  # of arguments older versions of typer keep none
    }
    without = {name for name, text in texts.items() if not text}
    assert without & options <= {f"{n} help" for n in COMMANDS}


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("upper_blocks is 3, and init_from brings", "--upper-blocks is 3, and --init-from brings"),
        ("a larger max_words has more read", "a larger --max-words has more read"),
        ("said in choices={label: words}, helps", "said in --choice LABEL=WORDS, helps"),
        # Not the names of files, fields and keys.
        ("no field 'max_words': it has", "no field 'max_words': it has"),
        ("data/init_from/max_tokens.csv does not", "data/init_from/max_tokens.csv does not"),
        ("my_max_tokens is", "my_max_tokens is"),
    ],
)
def test_a_message_of_python_names_the_option(message, shown):
    assert as_options(message) == shown


def test_one_thing_is_no_several_things():
    assert [counted(n, "adapter") for n in (0, 1, 2, 1000)] == [
        *("0 adapters", "1 adapter", "2 adapters", "1,000 adapters")
    ]
    assert [counted(n, "class", "classes") for n in (1, 2)] == ["1 class", "2 classes"]
