"""The `ia3` command, as processes: what they print, write and leave behind."""

import contextlib
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

import pytest
import torch
from safetensors.torch import load_file
from support.command import IA3, SMALL_FILES_ONLY, Place, assert_refused, said

from ia3 import FewShotClassifier

# Spreadsheets write a byte order mark and CRLF.
TRAIN = (
    '\ufefftext,label,note\r\n"late, again",slow,\r\n"on time,\r\nthank you",fast,x\r\n'
    "still waiting,slow,\r\nquick as ever,fast,y\r\n"
)


@pytest.fixture
def place(tmp_path):
    """For what ends before a model is needed."""
    return Place(tmp_path)


@pytest.fixture
def model_place(tmp_path, tiny_model):
    """For what needs a model."""
    place = Place(tmp_path, tiny_model)
    place.write("train.csv", TRAIN)
    return place


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, tiny_model):
    """Where an adapter was fitted, and what the command said."""
    place = Place(tmp_path_factory.mktemp("fitted"), tiny_model)
    place.write("train.csv", TRAIN)
    columns = ("--text", "text", "--label", "label")
    done = place.fit("--data", "train.csv", *columns, "--out", "my-adapter", "--steps", 3, "--json")
    return place, done


COMMANDS = (
    *(
        "",
        "check",
        "fit",
        "fit-many",
        "predict",
        "evaluate",
        "demo",
        "prepare",
        "pretrain",
        "convert",
    ),
    *("compare", "raft", "list", "inspect", "diff", "search", "combine", "suggest", "doctor"),
    *("models", "serve", "merge", "export"),
)


# -- what is loaded --------------------------------------------------------------------------------


def test_help_loads_nothing_heavy_and_says_how_long_training_is(place):
    runs = place.run_all(*((*command.split(), "--help") for command in COMMANDS))
    assert {(run.returncode, run.stderr) for run in runs} == {(0, "")}
    assert not place.loaded
    parameters = inspect.signature(FewShotClassifier).parameters
    shown = " ".join("".join(run.stdout for run in runs).replace("│", " ").split())
    # Of `fit` and `compare`.
    assert shown.count(f"[default: {parameters['steps'].default}]") == 2
    assert shown.count(f"[default: {parameters['model'].default}]") >= 2  # and of `demo`
    for name in ("encoder", "language_model"):
        assert f"[default: {parameters[name].default}]" in shown


@pytest.mark.parametrize(
    ("package", "extra"), [("typer", "cli"), ("rich", "cli"), ("sklearn", "tfew")]
)
def test_an_absent_package_is_named_with_its_extra(place, package, extra):
    place.write("train.csv", TRAIN)
    blocked = f"import sys; sys.modules[{package!r}] = None; from ia3.cli import main; main()"
    under = [sys.executable, "-c", blocked]
    done = place.run("fit", "--data", "train.csv", "--out", "x", under=under)
    assert_refused(done, f"pip install 'ia3[{extra}]'")
    assert {"sklearn": "scikit-learn"}.get(package, package) in done.stderr


# -- what works ------------------------------------------------------------------------------------


def test_fit_json(fitted):
    place, done = fitted
    told = said(done)
    folder = place.folder / told["adapter"]
    assert {path.name for path in folder.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "ia3_task.json", "ia3_report.html")
    }
    assert told["report"] == "my-adapter/ia3_report.html"
    # Two texts a class are too few to hold some out, and it was not asked for.
    assert told["measured"] is None
    assert told["classes"] == ["fast", "slow"]
    assert (told["examples"], told["steps"], told["head_bytes"]) == (4, 3, 0)
    # A language model that was named is compared with nothing.
    assert (told["engine"], told["model"]) == ("language-model", str(place.model))
    assert told["candidates"] == []
    assert told["adapter_bytes"] == (folder / "adapter_model.safetensors").stat().st_size
    assert place.names() == {"train.csv", "my-adapter"}


def test_predict_json(fitted):
    place, _ = fitted
    rows = [{"id": 1, "body": 'naïve, "so"\n', "more": {"a": None}}, {"id": 2, "body": ""}]
    place.write("new.jsonl", "\n\n".join(map(json.dumps, rows)))
    command = ("predict", "my-adapter", "--data", "new.jsonl", "--text", "body", "--json")
    # Standard output is UTF-8 whatever the terminal is.
    done = place.run(*command, PYTHONUTF8="0", PYTHONIOENCODING="latin-1")
    assert (done.returncode, done.stderr) == (0, "warning: new.jsonl, line 3: the text is empty\n")
    for line, given in zip(done.stdout.splitlines(), rows, strict=True):
        row = json.loads(line)
        assert row.pop("prediction") in ("fast", "slow")
        assert 0.5 <= row.pop("probability") <= 1
        assert row == given
    (place.folder / "new.jsonl").unlink()


def test_predict_into_a_file_and_evaluate(fitted):
    place, _ = fitted
    for name in ("old.csv", "out.tsv"):
        place.write(name, "old")
    predict = ("predict", "my-adapter", "--data", "train.csv", "--out")
    refused, done, evaluated = place.run_all(
        (*predict, "old.csv"),
        (*predict, "out.tsv", "--force"),
        ("evaluate", "my-adapter", "--data", "train.csv", "--max-tokens", 1, "--json"),
    )
    assert_refused(refused, "old.csv exists already")
    assert (place.folder / "old.csv").read_text() == "old"
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with open(place.folder / "out.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    texts = ["late, again", "on time,\r\nthank you", "still waiting", "quick as ever"]
    assert [row["text"] for row in rows] == texts
    assert list(rows[0]) == ["text", "label", "note", "prediction", "probability"]
    for name in ("old.csv", "out.tsv"):
        (place.folder / name).unlink()
    assert place.names() == {"train.csv", "my-adapter"}
    told = said(evaluated)
    assert (told["examples"], told["classes"]) == (4, ["fast", "slow"])
    assert [sum(row) for row in told["confusion"]] == [2, 2]
    # What was predicted into the file, counted by hand.
    right = sum(row["label"] == row["prediction"] for row in rows)
    assert told["accuracy"] == (told["confusion"][0][0] + told["confusion"][1][1]) / 4 == right / 4
    assert 0 <= told["macro_f1"] <= 1


@pytest.mark.slow
def test_integer_labels_several_columns_choices_and_templates(model_place):
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
        r"Trained on 4 examples of 3 classes in \d+ s; \d+ KiB in a/b\n"
        r"the trained adapter was not measured: .*\nthe report is a/b/ia3_report.html\n",
        fitted.stderr,
    )
    task = json.loads((place.folder / "a/b/ia3_task.json").read_text())
    assert task["labels"] == [1, 3, 5]
    assert task["choices"] == ["bad", "middling", "so = good"]
    assert len(task["templates"]) == 2
    said_first = r"accuracy \d+\.\d% ± \d+\.\d \(\d of 2\), macro F1 \d+\.\d%; on test.csv\n"
    assert re.match(said_first, evaluated.stdout)
    assert "rows: true label" in " ".join(evaluated.stdout.split())


@pytest.mark.slow
def test_a_killed_fit_goes_on_from_its_checkpoint(model_place):
    place = model_place
    command = ("--data", "train.csv", "--steps", 30, "--json", "--out")
    place.killed_when("run/checkpoint-25", *command, "broken", "--checkpoints", "run")
    # A killed process leaves its temporary files.
    shutil.rmtree(place.temporary)
    place.temporary.mkdir()
    assert place.names() == {"train.csv", "run"}
    fit = ("fit", "--model", place.model, *command)
    unbroken, done, other = place.run_all(
        (*fit, "unbroken"),
        (*fit, "broken", "--checkpoints", "run"),
        (*fit, "other", "--checkpoints", "run", "--learning-rate", "0.5"),
    )
    assert said(unbroken)["final_loss"] == said(done)["final_loss"]
    for name in ("adapter_model.safetensors", "adapter_config.json", "ia3_task.json"):
        written = [(place.folder / run / name).read_bytes() for run in ("unbroken", "broken")]
        assert written[0] == written[1], name
    # Another run does not go on from it.
    assert_refused(other, "--learning-rate=0.01")
    assert "other" not in place.names()


@pytest.mark.slow
def test_fit_begins_with_another_adapter_rescales_upper_blocks_or_replaces(fitted, model_place):
    before, place = fitted[0].folder / "my-adapter", model_place
    (place.folder / "ones").mkdir()
    for name in ("adapter_model.safetensors", "ia3_task.json", "other"):
        (place.folder / "ones" / name).write_bytes(b"old")
    fit = ("fit", "--model", place.model, "--data", "train.csv", "--out")
    *done, absent, too_many = place.run_all(
        (*fit, "same", "--steps", 0, "--init-from", before),
        (*fit, "ones", "--steps", 0, "--force"),
        (*fit, "upper", "--steps", 2, "--upper-blocks", 1),
        (*fit, "x", "--init-from", "no/adapter"),
        (*fit, "x", "--upper-blocks", 3),
    )
    assert [run.returncode for run in done] == [0, 0, 0], done
    folders = (before, *(place.folder / name for name in ("same", "ones", "upper")))
    first, same, ones, upper = (load_file(f / "adapter_model.safetensors") for f in folders)
    assert first.keys() == same.keys() == ones.keys()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert all((vector == 1).all() for vector in ones.values())
    assert not any((vector == 1).all() for vector in first.values())
    assert len(upper) == 7
    assert all(".layers.1." in name for name in upper)
    # Replaced are the adapter's files, not others.
    assert json.loads((place.folder / "ones" / "ia3_task.json").read_text())["steps"] == 0
    assert (place.folder / "ones" / "other").read_bytes() == b"old"
    assert len(list((place.folder / "ones").iterdir())) == 5
    assert_refused(absent, "no adapter at 'no/adapter'")
    assert_refused(too_many, "expected 1 to 2")
    assert "x" not in place.names()


@pytest.mark.slow
def test_fit_many(model_place):
    tasks = """
        model: {model}
        defaults: {{data: train.csv, steps: 2}}
        tasks:
          pace: {{choices: {{slow: it is late, fast: it is quick}}, steps: 1}}
          absent: {{data: {data}}}
          unlabelled: {{label: {label}}}
          unknown: {{choices: {{slow: late}}}}
    """
    manifest = {"model": model_place.model, "data": "none.csv", "label": "queue"}
    model_place.write("tasks.yaml", tasks.format(**manifest))
    done = model_place.run("fit-many", "tasks.yaml", "--out", "many", "--json")
    assert done.returncode == 1, done.stderr
    found = {task["task"]: task for task in json.loads(done.stdout)["tasks"]}
    assert list(found) == ["pace", "absent", "unlabelled", "unknown"]
    assert [found[name].get("steps") for name in found] == [1, None, None, None]
    assert "none.csv does not exist" in found["absent"]["error"]
    assert "no column 'queue'" in found["unlabelled"]["error"]
    assert "'fast'" in found["unknown"]["error"]
    # Again, with mistakes mended: what is finished stays as it is.
    manifest |= {"data": "train.csv", "label": "label"}
    mended = tasks.format(**manifest).replace("{slow: late}", "{slow: late, fast: quick}")
    model_place.write("tasks.yaml", mended)
    pace = model_place.folder / "many" / "pace" / "adapter_model.safetensors"
    written = pace.stat().st_mtime_ns
    # Wide enough that no name is broken.
    done = model_place.run("fit-many", "tasks.yaml", "--out", "many", COLUMNS="120")
    assert done.returncode == 0, done.stderr
    assert all(f"many/{name}" in done.stdout for name in found)
    assert pace.stat().st_mtime_ns == written


@pytest.mark.datasets
def test_data_in_parquet_and_in_folders_of_datasets(fitted, model_place):
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
    fit, few = ("fit", "--model", place.model, "--data"), ("--steps", 3)
    evaluate = ("evaluate", "of-several", "--data", "several", "--json")
    *fits, of_test, of_train, predicted = place.run_all(
        (*fit, "train.parquet", "--out", "of-train.parquet", *few),
        (*fit, "several", "--out", "of-several", *few),
        evaluate,
        (*evaluate, "--split", "train"),
        ("predict", "of-several", "--data", "several"),
    )
    for name, done in zip(("of-train.parquet", "of-several"), fits, strict=True):
        assert done.returncode == 0, done.stderr
        folders = (place.folder / name, from_csv)
        assert len({(f / "adapter_model.safetensors").read_bytes() for f in folders}) == 1
    assert json.loads(of_test.stdout)["examples"] == 2, of_test.stderr
    assert json.loads(of_train.stdout)["examples"] == 4, of_train.stderr
    (first, _) = csv.DictReader(io.StringIO(predicted.stdout))
    assert (first["text"], first["day"]) == ("late, again", "2026-01-02")
    assert place.names() == {*before, "of-train.parquet", "of-several"}


# -- what is refused -------------------------------------------------------------------------------


def test_refused_before_any_model(place):
    (place.folder / "folder").mkdir()
    (place.folder / "folder" / "mine").write_bytes(b"")
    (place.folder / "nowhere").symlink_to("no/such/folder")
    files = {
        "file": "old",
        "a.csv": "text,prediction\na,b\n",
        "b.csv": "text,probability\na,b\n",
        "c.jsonl": '{"text": "a", "label": 1}\n{"text": "b", "label": 2}\n',
        "d.csv": "text,labels\na,b\n",
        "[b]:boom:.csv": "",
        "e.csv": b"text,label\na,b\ncaf\xe9,b\n",
        "f.jsonl": '{"text": "a", "label": 1}\n{"te',
    }
    for name, content in files.items():
        place.write(name, content)
    before = place.names()
    fit = ("fit", "--data", "none.csv", "--out")
    predict = ("predict", "folder", "--data", "none.csv", "--out")
    # The name of no model: it would not get that far.
    unfit = ("fit", "--out", "x", "--model", "none", "--data")
    refusals = {
        (*fit, "folder"): "folder exists already: choose another --out, or",
        (*fit, "nowhere"): "nowhere: this link leads to nothing that exists",
        (*fit, "file", "--force"): "file: Not a directory",
        (*fit, "file/x"): "file: Not a directory",
        (*fit, "x", "--checkpoints", "file/x"): "file: Not a directory",
        (*fit, "x"): "data file none.csv does not exist",
        (*predict, "x.txt"): "x.txt ends in '.txt'",
        (*predict, "file/x.csv"): "file: Not a directory",
        ("predict", "x", "--data", "a.csv"): "line 2: there is a column 'prediction' already",
        ("predict", "x", "--data", "b.csv"): "line 2: there is a column 'probability' already",
        (*unfit, "c.jsonl", "--choice", "one=good"): "no label 'one' among ['1', '2']",
        (*unfit, "d.csv"): "did you mean 'labels'?",
        (*unfit, "[b]:boom:.csv"): "[b]:boom:.csv is empty",
        (*unfit, "e.csv"): "e.csv, line 3: byte 0xe9 is not UTF-8",
        (*unfit, "f.jsonl"): "f.jsonl, line 2 is not JSON",
    }
    for done, message in zip(place.run_all(*refusals), refusals.values(), strict=True):
        assert_refused(done, message)
    assert place.names() == before


USAGE_ERRORS = {
    ("--steps", "-1"): "--steps",
    ("--learning-rate", "0"): "0.0 is not a number above 0",
    ("--learning-rate", "nan"): "nan is not a number above 0",
    ("--seed", "-1"): "--seed",
    ("--max-tokens", "0"): "--max-tokens",
    ("--choice", "a"): "'a', expected LABEL=WORDS",
    ("--choice", "a=x", "--choice", "a=y"): "'a' is given more than once",
    ("--label", "text"): "'text' is the text and the label at once",
    ("--stepz", "1"): "--stepz",
}


def test_usage_errors(place):
    place.write("a.csv", "text,label\nx,a\ny,b\n")
    fit = ("fit", "--data", "a.csv", "--out", "x")
    *fits, predict = place.run_all(
        *((*fit, *arguments) for arguments in USAGE_ERRORS),
        ("predict", "x", "--data", "a.csv", "--out", "b.csv", "--json"),
    )
    messages = [*USAGE_ERRORS.values(), "b.csv would not be JSON Lines"]
    for done, message in zip([*fits, predict], messages, strict=True):
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert place.names() == {"a.csv"}


def test_refused_with_one_line(fitted):
    place, _ = fitted
    place.write("a.csv", "text,label,same\none,a,x\ntwo,b,x\n")
    place.write("b.jsonl", '{"text": "a", "label": "slow"}\n\n{"text": "a", "label": "slwo"}\n')
    before = place.names()
    model = str(place.model)
    fit = ("fit", "--data", "a.csv", "--out", "x", "--model", model)
    cases = {
        (*fit, "--model", "no-such-model"): "no model 'no-such-model'",
        (*fit, "--template", "{{ txt }}"): "'txt' is undefined; the example has the fields",
        (*fit, "--template", "{{ text.__class__.__mro__ }}"): "is refused: access to attribute",
        (*fit, "--label", "same"): "all labels are 'x'",
        ("predict", model, "--data", "a.csv"): "it holds a whole model without an adapter",
        ("evaluate", "my-adapter", "--data", "b.jsonl"): "b.jsonl, line 3: the label 'slwo' is not "
        "among the choices ['fast', 'slow']; did you mean 'slow'?",
    }
    for done, message in zip(place.run_all(*cases), cases.values(), strict=True):
        assert_refused(done, message)
    assert place.names() == before
    for name in ("a.csv", "b.jsonl"):
        (place.folder / name).unlink()


# -- full disks ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_full_disk_in_fit(model_place):
    place = model_place
    command = ("--data", "train.csv", "--steps", 1, "--out")
    done = place.fit(*command, "parent/new", under=SMALL_FILES_ONLY)
    assert re.fullmatch(r"error: parent/new/\S+: File too large\n", done.stderr), done.stderr
    assert done.returncode == 1
    assert place.names() == {"train.csv"}


@pytest.mark.slow
def test_full_disk_in_predict(fitted):
    place, _ = fitted
    place.write("many.csv", "text\n" + "late again\n" * 100)
    command = ("predict", "my-adapter", "--data", "many.csv", "--out", "out.csv")
    done = place.run(*command, under=SMALL_FILES_ONLY)
    assert_refused(done, "out.csv: File too large")
    assert place.names() == {"train.csv", "many.csv", "my-adapter"}
    (place.folder / "many.csv").unlink()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
@pytest.mark.parametrize(
    ("shell", "said"),
    [
        ('"$0" "$@" > /dev/full', "error: standard output: No space left on device\n"),
        # A reader that is gone is no error to speak of.
        ('("$0" "$@"; echo $? >&2) | true', "1\n"),
    ],
)
@pytest.mark.slow
def test_standard_output_into_a_full_disk_or_closed_early(fitted, shell, said):
    under = ["sh", "-c", shell, str(IA3)]
    done = fitted[0].run("predict", "my-adapter", "--data", "train.csv", under=under)
    assert done.stderr == said


# -- Ctrl-C ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_interrupted(model_place):
    # Tests may run where the signal is ignored, which would be inherited.
    listening = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    fit = ["fit", "--model", str(model_place.model), "--data", "train.csv", "--out", "x"]
    terminal, stderr = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", listening, str(IA3), *fit, "--steps", "100000"],
        cwd=model_place.folder,
        env=model_place.environment | {"TERM": "xterm", "COLUMNS": "100"},
        stdout=subprocess.DEVNULL,
        stderr=stderr,
    )
    os.close(stderr)
    shown = b""
    try:
        while not re.search(rb"[1-9]\d*/100000", shown):
            shown += os.read(terminal, 65536)
        process.send_signal(signal.SIGINT)
        # How Linux says that the other end is closed.
        with contextlib.suppress(OSError):
            while read := os.read(terminal, 65536):
                shown += read
        assert process.wait(60) == 130
    finally:
        process.kill()
        os.close(terminal)
    assert not re.search(rb"Traceback|Exception", shown)
    assert model_place.names() == {"train.csv"}
