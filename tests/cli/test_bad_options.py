"""Every option of every command with wrong values: one line on standard error, and no more."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
import typer
from support.command import IA3, Place
from transformers import LlamaConfig, LlamaForCausalLM

import ia3
from ia3.cli import app

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
BAD = ["x", "-1", "9" * 400, "a\udcffb"]
TABLE = "text,label\nlost,delivery\nlate,delivery\ncharged,billing\n"
MANIFEST = "model: no/model\ntasks: {a: {data: data.csv}}\n"
SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
# What a command needs, so that it gets as far as the model, which is not there.
NEEDED = {
    "check": ["data.csv"],
    "fit": ["--data", "data.csv", "--out", "out", "--model", "no/model"],
    "fit-many": ["manifest.yaml", "--out", "out"],
    "predict": ["adapter", "--data", "data.csv"],
    "evaluate": ["adapter", "--data", "data.csv"],
    "suggest": ["adapter", "--data", "data.csv"],
    "demo": ["--model", "no/model", "--out", "out"],
    "prepare": ["--model", "no/model"],
    "pretrain": ["manifest.yaml", "--out", "out", "--model", "no/model"],
    "convert": ["adapter", "--out", "out"],
    "compare": ["--data", "data.csv", "--test", "data.csv", "--out", "out", "--model", "no/model"],
    "raft": ["--data", "data", "--out", "out", "--model", "no/model"],
    "list": ["."],
    "inspect": ["adapter"],
    "diff": ["adapter", "adapter"],
    "search": ["adapter", "."],
    "combine": ["adapter", "adapter", "--out", "out"],
    "merge": ["adapter", "--out", "out", "--model", "no/model"],
    "export": ["adapter", "--lora", "1", "--lossy", "--out", "out", "--model", "no/model"],
    "serve": ["--adapters", "adapters", "--model", "no/model"],
    "doctor": [],
    "models": [],
}


def batched(calls: list, size: int) -> Iterator[list]:
    for start in range(0, len(calls), size):
        yield calls[start : start + size]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("bad"))
    place.write("data.csv", TABLE)
    place.write("manifest.yaml", MANIFEST)
    base = LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2))
    ia3.get_peft_model(base, ia3.IA3Config()).save_pretrained(place.folder / "adapter")
    return place


def test_the_table_has_all_commands():
    assert NEEDED.keys() == COMMANDS.keys()


@pytest.mark.slow
def test_a_wrong_value_is_one_line_on_standard_error(place):
    calls = []
    for name, command in COMMANDS.items():
        for parameter in command.params:
            options = [each for each in getattr(parameter, "opts", ()) if each.startswith("--")]
            for option in options[:1]:
                flag = getattr(parameter, "is_flag", False)
                values = [[option, value] for value in BAD] if not flag else [[f"{option}=x"]]
                calls += [(name, *NEEDED[name], *value) for value in values if option != "--help"]
        calls += [(name, *NEEDED[name], "x"), (name, *NEEDED[name], "a\udcffb"), (name, "--x")]
    calls += [(value,) for value in BAD]
    wrong = []
    # The arguments of one process may not be longer than 128 kilobytes.
    for done in (done for some in batched(calls, 500) for done in place.run_all(*some)):
        if done.returncode == 0:
            continue
        # Before it there may be a warning, or what the demo does.
        last = done.stderr.splitlines()[-1:] or [""]
        errors = done.stderr.count("error: ")
        if done.returncode not in (1, 2) or errors != 1 or not last[0].startswith("error: "):
            wrong.append((done.args, done.returncode, done.stderr[-300:]))
    assert wrong == []


@pytest.mark.parametrize("command", [["list", "."], ["inspect", "adapter", "--json"], ["--help"]])
def test_a_reader_who_leaves_is_no_traceback(place, command):
    process = subprocess.Popen(
        [str(IA3), *command],
        cwd=place.folder,
        env=place.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(120) in (0, 1)
    assert b"Traceback" not in said
    assert b"Exception" not in said
