"""The `ia3` command, as processes: what they print, write and leave behind."""

from __future__ import annotations

import csv
import datetime
import inspect
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.command import HEAVY, IA3, SMALL_FILES_ONLY, Done, Place, assert_refused, said
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ia3 import FewShotClassifier
from ia3.base.loading import embedded_model_folder

# Spreadsheets write a byte order mark and CRLF.
TRAIN = (
    '\ufefftext,label,note\r\n"late, again",slow,\r\n"on time,\r\nthank you",fast,x\r\n'
    "still waiting,slow,\r\nquick as ever,fast,y\r\n"
)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """For what ends before a model is needed."""
    return Place(tmp_path)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with the embedded model's tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_folder())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=49152,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=512,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model_place(tmp_path: Path, tiny_model: Path) -> Place:
    """For what needs a model."""
    place = Place(tmp_path, tiny_model)
    place.write("train.csv", TRAIN)
    return place


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[Place, Done]:
    """Where an adapter was fitted, and what the command said."""
    place = Place(tmp_path_factory.mktemp("fitted"), tiny_model)
    place.write("train.csv", TRAIN)
    columns = ("--text", "text", "--label", "label")
    done = place.fit("--data", "train.csv", *columns, "--out", "my-adapter", "--steps", 3, "--json")
    return place, done


COMMANDS = (
    *("", "fit", "fit-many", "predict", "evaluate", "demo", "prepare", "pretrain", "convert"),
    *("compare", "raft", "list", "inspect", "diff", "search", "combine"),
)


# -- what is loaded --------------------------------------------------------------------------------


def test_help_loads_nothing_heavy_and_says_how_long_training_is(place: Place) -> None:
    code = f"""
import sys
import ia3
from ia3.cli import main
for command in {COMMANDS}:
    sys.argv = ["ia3", *command.split(), "--help"]
    try:
        main()
    except SystemExit as end:
        assert not end.code, command
    assert not {HEAVY} & sys.modules.keys(), command
""".replace(str(HEAVY), str(set(HEAVY)))
    done = place.run(under=[sys.executable, "-c", code])
    assert (done.returncode, done.stderr) == (0, "")
    steps = inspect.signature(FewShotClassifier).parameters["steps"].default
    # Of `fit` and `compare`.
    assert " ".join(done.stdout.replace("│", " ").split()).count(f"{steps} if absent") == 2


@pytest.mark.parametrize(
    ("package", "extra"), [("typer", "cli"), ("rich", "cli"), ("sklearn", "tfew")]
)
def test_an_absent_package_is_named_with_its_extra(place: Place, package: str, extra: str) -> None:
    place.write("train.csv", TRAIN)
    blocked = f"import sys; sys.modules[{package!r}] = None; from ia3.cli import main; main()"
    under = [sys.executable, "-c", blocked]
    done = place.run("fit", "--data", "train.csv", "--out", "x", under=under)
    assert_refused(done, f"pip install 'ia3[{extra}]'")
    assert {"sklearn": "scikit-learn"}.get(package, package) in done.stderr


# -- what works ------------------------------------------------------------------------------------


def test_fit_json(fitted: Any) -> None:
    place, done = fitted
    told = said(done)
    folder = place.folder / told["adapter"]
    assert {path.name for path in folder.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "ia3_task.json")
    }
    assert told["classes"] == ["fast", "slow"]
    assert (told["examples"], told["steps"]) == (4, 3)
    assert told["adapter_bytes"] == (folder / "adapter_model.safetensors").stat().st_size
    assert place.names() == {"train.csv", "my-adapter"}


def test_predict_json(fitted: Any) -> None:
    place, _ = fitted
    rows = [{"id": 1, "body": 'naïve, "so"\n', "more": {"a": None}}, {"id": 2, "body": ""}]
    place.write("new.jsonl", "\n\n".join(map(json.dumps, rows)))
    command = ("predict", "my-adapter", "--data", "new.jsonl", "--text", "body", "--json")
    # Standard output is UTF-8 whatever the terminal is.
    done = place.run(*command, PYTHONUTF8="0", PYTHONIOENCODING="latin-1")
    assert done.returncode == 0
    assert done.stderr == "warning: new.jsonl, line 3: the text is empty\n"
    labelled = [json.loads(line) for line in done.stdout.splitlines()]
    for row, given in zip(labelled, rows, strict=True):
        assert row.pop("prediction") in ("fast", "slow")
        assert 0.5 <= row.pop("probability") <= 1
        assert row == given
    (place.folder / "new.jsonl").unlink()


def test_predict_into_a_file_and_evaluate(fitted: Any) -> None:
    place, _ = fitted
    place.write("out.tsv", "old")
    command = ("predict", "my-adapter", "--data", "train.csv", "--out", "out.tsv")
    assert_refused(place.run(*command), "out.tsv exists already")
    assert (place.folder / "out.tsv").read_text() == "old"
    done, evaluated = place.run_all(
        (*command, "--force"), ("evaluate", "my-adapter", "--data", "train.csv", "--json")
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with open(place.folder / "out.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [row["text"] for row in rows] == [
        *("late, again", "on time,\r\nthank you", "still waiting", "quick as ever")
    ]
    assert list(rows[0]) == ["text", "label", "note", "prediction", "probability"]
    (place.folder / "out.tsv").unlink()
    assert place.names() == {"train.csv", "my-adapter"}
    told = said(evaluated)
    assert (told["examples"], told["classes"]) == (4, ["fast", "slow"])
    assert [sum(row) for row in told["confusion"]] == [2, 2]
    # What was predicted into the file, counted by hand.
    right = sum(row["label"] == row["prediction"] for row in rows)
    assert told["accuracy"] == (told["confusion"][0][0] + told["confusion"][1][1]) / 4 == right / 4
    assert 0 <= told["macro_f1"] <= 1


def test_integer_labels_several_columns_choices_and_templates(model_place: Place) -> None:
    place = model_place
    given = [("Good", "fine", 5), ("Bad", "awful", 1), ("Best", "", 5), ("Worst", "no", 1)]
    rows = [{"subject": s, "body": b, "stars": n} for s, b, n in given]
    place.write("train.jsonl", "\n".join(map(json.dumps, rows)))
    # In CSV the same labels are strings.
    place.write("test.csv", "subject,body,stars\n[bold]Fine,really,5\nPoor,,1\n")
    columns = ("--text", "subject", "--text", "body", "--label", "stars")
    templates = ("{{ subject }}: {{ body }}\nThis is", "{{ body }}|It is")
    choices = ("1=bad", "5=so = good", "3=middling")
    fitted, evaluated = place.run_all(
        (
            *("fit", "--model", place.model, "--data", "train.jsonl", *columns, "--out", "a/b"),
            *("--steps", 2, *(part for t in templates for part in ("--template", t))),
            *(part for choice in choices for part in ("--choice", choice)),
        ),
        ("evaluate", "a/b", "--data", "test.csv", *columns),
    )
    assert (fitted.returncode, evaluated.returncode) == (0, 0)
    assert re.fullmatch(
        r"Trained on 4 examples of 3 classes in \d+ s; \d+ KiB in a/b\n", fitted.stderr
    )
    task = json.loads((place.folder / "a/b/ia3_task.json").read_text())
    assert task["labels"] == [1, 3, 5]
    assert task["choices"] == ["bad", "middling", "so = good"]
    assert len(task["templates"]) == 2
    assert re.search(r"accuracy \d+\.\d%, macro F1 \d+\.\d%, 2 rows\n$", evaluated.stdout)
    assert "rows: true label" in " ".join(evaluated.stdout.split())


def test_a_killed_fit_goes_on_from_its_checkpoint(model_place: Place) -> None:
    place = model_place
    command = ("--data", "train.csv", "--steps", 60, "--json", "--out")
    unbroken = place.fit(*command, "unbroken")
    place.killed_when("run/checkpoint-25", *command, "broken", "--checkpoints", "run")
    # A killed process leaves its temporary files.
    shutil.rmtree(place.temporary)
    place.temporary.mkdir()
    assert place.names() == {"train.csv", "unbroken", "run"}
    fit = ("fit", "--model", place.model, *command)
    done, other = place.run_all(
        (*fit, "broken", "--checkpoints", "run"),
        (*fit, "other", "--checkpoints", "run", "--learning-rate", "0.5"),
    )
    assert said(unbroken)["final_loss"] == said(done)["final_loss"]
    for name in ("adapter_model.safetensors", "adapter_config.json", "ia3_task.json"):
        written = [(place.folder / run / name).read_bytes() for run in ("unbroken", "broken")]
        assert written[0] == written[1], name
    # Another run does not go on from it.
    assert_refused(other, "learning_rate")
    assert "other" not in place.names()


def test_fit_begins_with_another_adapter_and_rescales_upper_blocks_only(
    fitted: Any, model_place: Place
) -> None:
    before, place = fitted[0].folder / "my-adapter", model_place
    fit = ("fit", "--model", place.model, "--data", "train.csv", "--out")
    *done, absent, too_many = place.run_all(
        (*fit, "same", "--steps", 0, "--init-from", before),
        (*fit, "ones", "--steps", 0),
        (*fit, "upper", "--steps", 2, "--upper-blocks", 1),
        (*fit, "x", "--init-from", "no/adapter"),
        (*fit, "x", "--upper-blocks", 3),
    )
    assert [run.returncode for run in done] == [0, 0, 0], done
    first, same, ones, upper = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (before, *(place.folder / name for name in ("same", "ones", "upper")))
    )
    assert first.keys() == same.keys() == ones.keys()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert all((vector == 1).all() for vector in ones.values())
    assert not any((vector == 1).all() for vector in first.values())
    assert len(upper) == 7
    assert all(".layers.1." in name for name in upper)
    assert_refused(absent, "no adapter at 'no/adapter'")
    assert_refused(too_many, "expected 1 to 2")
    assert "x" not in place.names()


def test_fit_many(model_place: Place) -> None:
    model_place.write(
        "tasks.yaml",
        f"""
        model: {model_place.model}
        defaults: {{data: train.csv, steps: 3}}
        tasks:
          pace: {{choices: {{slow: it is late, fast: it is quick}}, steps: 2}}
          seeded: {{seed: 4}}
          absent: {{data: none.csv}}
          unlabelled: {{label: queue}}
          unknown: {{choices: {{slow: late}}}}
        """,
    )
    fit = ("fit", "--model", model_place.model, "--data", "train.csv", "--steps", 3)
    done, alone = model_place.run_all(
        ("fit-many", "tasks.yaml", "--out", "many", "--json"), (*fit, "--out", "alone", "--seed", 4)
    )
    assert done.returncode == 1, done.stderr
    tasks = {task["task"]: task for task in json.loads(done.stdout)["tasks"]}
    assert list(tasks) == ["pace", "seeded", "absent", "unlabelled", "unknown"]
    assert [tasks[name].get("steps") for name in tasks] == [2, 3, None, None, None]
    assert "none.csv does not exist" in tasks["absent"]["error"]
    assert "no column 'queue'" in tasks["unlabelled"]["error"]
    assert "'fast'" in tasks["unknown"]["error"]
    assert alone.returncode == 0, alone.stderr
    found = load_file(model_place.folder / tasks["seeded"]["adapter"] / "adapter_model.safetensors")
    expected = load_file(model_place.folder / "alone" / "adapter_model.safetensors")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    # Again, with the mistakes mended: what is finished stays as it is.
    manifest = (model_place.folder / "tasks.yaml").read_text()
    manifest = manifest.replace("none.csv", "train.csv").replace("label: queue", "seed: 5")
    model_place.write("tasks.yaml", manifest.replace("{slow: late}", "{slow: late, fast: quick}"))
    written = (model_place.folder / "many" / "pace" / "adapter_model.safetensors").stat()
    done = model_place.run("fit-many", "tasks.yaml", "--out", "many")
    assert done.returncode == 0, done.stderr
    for name in tasks:
        assert f"many/{name}" in done.stdout
    again = (model_place.folder / "many" / "pace" / "adapter_model.safetensors").stat()
    assert again.st_mtime_ns == written.st_mtime_ns


def test_few_tokens_at_once_change_nothing_but_rounding(fitted: Any) -> None:
    place, trained = fitted
    data, few = ("my-adapter", "--data", "train.csv", "--json"), ("--max-tokens", 1)
    steps = ("--out", "in-parts", "--steps", 3, "--json")
    *predicted, one, other, refitted = place.run_all(
        ("predict", *data),
        ("predict", *data, *few),
        ("evaluate", *data),
        ("evaluate", *data, *few),
        ("fit", "--model", place.model, "--data", "train.csv", *steps, *few),
    )
    answers = [[json.loads(line) for line in done.stdout.splitlines()] for done in predicted]
    for at_once, in_parts in zip(*answers, strict=True):
        assert at_once["prediction"] == in_parts["prediction"]
        assert at_once["probability"] == pytest.approx(in_parts["probability"], abs=1e-4)
    assert said(one) == said(other)
    loss = json.loads(trained.stdout)["final_loss"]
    assert said(refitted)["final_loss"] == pytest.approx(loss, rel=1e-4)
    shutil.rmtree(place.folder / "in-parts")


@pytest.mark.datasets
def test_data_in_parquet_and_in_folders_of_datasets(fitted: Any, model_place: Place) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    from_csv, place = fitted[0].folder / "my-adapter", model_place
    rows = list(csv.DictReader(io.StringIO(TRAIN.removeprefix("\ufeff"), newline="")))
    for row in rows:
        row["day"] = datetime.date(2026, 1, 2)
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(place.folder / "train.parquet")
    datasets.DatasetDict({"train": data, "test": data.select([0, 3])}).save_to_disk(
        place.folder / "several"
    )
    before = place.names()
    for source in ("train.parquet", "several"):
        done = place.fit("--data", source, "--out", f"of-{source}", "--steps", 3)
        assert done.returncode == 0, done.stderr
        written = [
            (folder / "adapter_model.safetensors").read_bytes()
            for folder in (place.folder / f"of-{source}", from_csv)
        ]
        assert written[0] == written[1]
    for options, count in (((), 2), (("--split", "train"), 4)):
        done = place.run("evaluate", "of-several", "--data", "several", "--json", *options)
        assert json.loads(done.stdout)["examples"] == count, done.stderr
    done = place.run("predict", "of-several", "--data", "train.parquet", "--json")
    labelled = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["text"] for row in labelled] == [row["text"] for row in rows]
    assert {row["day"] for row in labelled} == {"2026-01-02"}
    done = place.run("predict", "of-several", "--data", "several")
    (first, _) = csv.DictReader(io.StringIO(done.stdout))
    assert (first["text"], first["day"]) == ("late, again", "2026-01-02")

    refused = {
        "several has no split 'dev', only train, test": ("several", "--split", "dev"),
        "train.parquet: no column 'txt' among": ("train.parquet", "--text", "txt"),
        "row 0: the label 'day' is \"2026-01-02\", expected": ("several", "--label", "day"),
    }
    fits = [
        ("fit", "--model", "x", "--out", "x", "--data", *options) for options in refused.values()
    ]
    for message, done in zip(refused, place.run_all(*fits), strict=True):
        assert_refused(done, message)
    assert place.names() == {*before, "of-train.parquet", "of-several"}


def test_stdout_closed_early(fitted: Any) -> None:
    place, _ = fitted
    place.write("many.csv", "text\n" + "late again\n" * 20)
    command = [str(IA3), "predict", "my-adapter", "--data", "many.csv"]
    process = subprocess.Popen(
        command,
        cwd=place.folder,
        env=place.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(60) == 1
    (place.folder / "many.csv").unlink()


# -- what is refused before any model --------------------------------------------------------------

BAD_DATA = {
    "missing column": ("a.csv", "txt,label\na,b\n", "no column 'text' among"),
    "near miss": ("a.csv", "text,labels\na,b\n", "did you mean 'labels'?"),
    "empty": ("a.csv", "", "a.csv is empty"),
    "header only": ("a.csv", "text,label\n", "a.csv has no rows"),
    "ragged": ("a.csv", "text,label\na,b\na,b,c\n", "a.csv, line 3: 3 values, expected 2"),
    "latin-1": ("a.csv", b"text,label\na,b\ncaf\xe9,b\n", "a.csv, line 3: byte 0xe9 is not UTF-8"),
    "not JSON": ("a.jsonl", '{"text": "a", "label": 1}\n{"te', "a.jsonl, line 2: not JSON"),
    "null label": ("a.jsonl", '{"text": "a", "label": null}', "line 1: the label 'label' is null"),
    "empty label": ("a.csv", "text,label\na,b\nc,\n", "line 3: the label 'label' is empty"),
    "[b]:boom:[/b]": ("[b]:boom:.csv", "", "[b]:boom:.csv is empty"),
}


def test_bad_data(place: Place) -> None:
    # The name of no model: it would not get that far.
    rest = ("--out", "x", "--model", "none")
    commands = []
    for case, (name, content, _) in enumerate(BAD_DATA.values()):
        # Each file in a folder of its own, as several have the same name.
        (place.folder / str(case)).mkdir()
        place.write(f"{case}/{name}", content)
        commands.append(("fit", "--data", f"{case}/{name}", *rest))
    messages = [message for _, _, message in BAD_DATA.values()]
    for done, message in zip(place.run_all(*commands), messages, strict=True):
        assert_refused(done, message)
    assert not (place.folder / "x").exists()


def test_output_is_refused_before_the_data_is_read(place: Place) -> None:
    place.write("file", "old")
    (place.folder / "folder").mkdir()
    fit = ("fit", "--data", "none.csv", "--out")
    predict = ("predict", "folder", "--data", "none.csv", "--out")
    refusals = {
        (*fit, "folder"): "folder exists already: choose another --out, or",
        (*fit, "file", "--force"): "file: Not a directory",
        (*fit, "file/x"): "file: Not a directory",
        (*fit, "x", "--checkpoints", "file/x"): "file: Not a directory",
        (*fit, "x"): "data file none.csv does not exist",
        (*predict, "x.txt"): "x.txt ends in '.txt'",
        (*predict, "file/x.csv"): "file: Not a directory",
    }
    for done, message in zip(place.run_all(*refusals), refusals.values(), strict=True):
        assert_refused(done, message)
    assert place.names() == {"file", "folder"}


def test_columns_and_labels_that_do_not_go_together(place: Place) -> None:
    place.write("a.csv", "text,prediction\na,b\n")
    place.write("b.csv", "text,probability\na,b\n")
    place.write("c.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": 2}\n')
    first, second, third = place.run_all(
        ("predict", "x", "--data", "a.csv"),
        ("predict", "x", "--data", "b.csv"),
        ("fit", "--data", "c.jsonl", "--out", "x", "--choice", "one=good"),
    )
    assert_refused(first, "a.csv, line 2: there is a column 'prediction' already")
    assert_refused(second, "b.csv, line 2: there is a column 'probability' already")
    assert_refused(third, "no label 'one' among ['1', '2']")


USAGE_ERRORS = {
    ("--steps", "-1"): "--steps",
    ("--learning-rate", "0"): "0.0 is not a number above 0",
    ("--learning-rate", "-0.1"): "-0.1 is not a number above 0",
    ("--learning-rate", "nan"): "nan is not a number above 0",
    ("--seed", "-1"): "--seed",
    ("--max-tokens", "0"): "--max-tokens",
    ("--choice", "a"): "'a', expected LABEL=WORDS",
    ("--choice", "a=x", "--choice", "a=y"): "'a' is given more than once",
    ("--label", "text"): "'text' is the text and the label at once",
    ("--stepz", "1"): "--stepz",
}


def test_usage_errors(place: Place) -> None:
    place.write("a.csv", "text,label\nx,a\ny,b\n")
    fit = ("fit", "--data", "a.csv", "--out", "x")
    *fits, predict = place.run_all(
        *((*fit, *arguments) for arguments in USAGE_ERRORS),
        ("predict", "x", "--data", "a.csv", "--out", "b.csv", "--json"),
    )
    for done, message in zip(
        [*fits, predict], [*USAGE_ERRORS.values(), "b.csv would not be JSON Lines"], strict=True
    ):
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert place.names() == {"a.csv"}


# -- what is refused later -------------------------------------------------------------------------


def test_refused_with_one_line(fitted: Any) -> None:
    place, _ = fitted
    place.write("a.csv", "text,label,same\none,a,x\ntwo,b,x\n")
    place.write("b.jsonl", '{"text": "a", "label": "slow"}\n\n{"text": "a", "label": "slwo"}\n')
    before = place.names()
    model = str(place.model)
    fit = ("fit", "--data", "a.csv", "--out", "x", "--model", model)
    cases = {
        (*fit, "--model", "no-such-model"): "no model 'no-such-model'",
        (
            *fit,
            "--template",
            "{{ txt }}",
        ): "'txt' is undefined; the example has the fields ['text']",
        (*fit, "--template", "{{ text.__class__.__mro__ }}"): "is refused: access to attribute",
        (*fit, "--label", "same"): "all labels are 'x'",
        ("predict", model, "--data", "a.csv"): "ia3_task.json is not there",
        ("evaluate", "my-adapter", "--data", "b.jsonl"): (
            "b.jsonl, line 3: the label 'slwo' is not among the choices ['fast', 'slow']; did you "
            "mean 'slow'?"
        ),
    }
    for done, message in zip(place.run_all(*cases), cases.values(), strict=True):
        assert_refused(done, message)
    assert place.names() == before
    for name in ("a.csv", "b.jsonl"):
        (place.folder / name).unlink()


# -- full disks ------------------------------------------------------------------------------------


def test_full_disk_in_fit(model_place: Place) -> None:
    place = model_place
    command = ("--data", "train.csv", "--steps", 1, "--out")
    done = place.fit(*command, "parent/new", under=SMALL_FILES_ONLY)
    assert_refused(done, "parent/new/adapter_model.safetensors: File too large")
    assert place.names() == {"train.csv"}


def test_force_replaces_an_adapter(model_place: Place) -> None:
    place = model_place
    (place.folder / "a").mkdir()
    for name in ("adapter_model.safetensors", "ia3_task.json", "other"):
        (place.folder / "a" / name).write_bytes(b"old")
    done = place.fit("--data", "train.csv", "--steps", 1, "--out", "a", "--force")
    assert done.returncode == 0
    assert len(list((place.folder / "a").iterdir())) == 4
    assert json.loads((place.folder / "a" / "ia3_task.json").read_text())["steps"] == 1
    assert (place.folder / "a" / "adapter_model.safetensors").stat().st_size > 1024
    assert (place.folder / "a" / "other").read_bytes() == b"old"


def test_full_disk_in_predict(fitted: Any) -> None:
    place, _ = fitted
    place.write("many.csv", "text\n" + "late again\n" * 100)
    command = ("predict", "my-adapter", "--data", "many.csv", "--out", "out.csv")
    done = place.run(*command, under=SMALL_FILES_ONLY)
    assert_refused(done, "out.csv: File too large")
    assert place.names() == {"train.csv", "many.csv", "my-adapter"}
    (place.folder / "many.csv").unlink()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
def test_standard_output_into_a_full_disk(fitted: Any) -> None:
    to_full = ["sh", "-c", 'exec "$0" "$@" > /dev/full', str(IA3)]
    done = fitted[0].run("predict", "my-adapter", "--data", "train.csv", under=to_full)
    assert_refused(done, "standard output: No space left on device")


# -- Ctrl-C ----------------------------------------------------------------------------------------


def interrupted(place: Place, command: list[Any], seen: bytes) -> tuple[int, str]:
    """Exit code, and what the terminal showed, of a command interrupted once this was seen."""
    # Tests may run where the signal is ignored, which would be inherited.
    listening = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    terminal, stderr = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", listening, str(IA3), *map(str, command)],
        cwd=place.folder,
        env=place.environment | {"TERM": "xterm", "COLUMNS": "100"},
        stdout=subprocess.DEVNULL,
        stderr=stderr,
    )
    os.close(stderr)
    shown = b""
    signalled = False
    try:
        while True:
            try:
                read = os.read(terminal, 65536)
            except OSError:  # how Linux says that the other end is closed
                break
            if not read:
                break
            shown += read
            if not signalled and re.search(seen, shown):
                process.send_signal(signal.SIGINT)
                signalled = True
        return process.wait(30), shown.decode()
    finally:
        process.kill()
        os.close(terminal)


@pytest.mark.parametrize("command", ["fit", "predict"])
def test_interrupted(fitted: Any, model_place: Place, command: str) -> None:
    place = model_place
    place.write("many.csv", "text\n" + f"{'late again ' * 40}\n" * 5_000)
    given, seen = {
        "fit": (
            ["--model", place.model, "--data", "train.csv", "--out", "x", "--steps", 100_000],
            rb"[1-9]\d*/100000",
        ),
        "predict": (
            [fitted[0].folder / "my-adapter", "--data", "many.csv", "--out", "out.csv"],
            rb"[1-9]\d*/5000",
        ),
    }[command]
    code, shown = interrupted(place, [command, *given], seen)
    assert code == 130
    assert "Traceback" not in shown
    assert "Exception" not in shown
    assert place.names() == {"train.csv", "many.csv"}
