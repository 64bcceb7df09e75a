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
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ia3 import FewShotClassifier
from ia3.base.loading import embedded_model_folder

IA3 = Path(sys.executable).parent / "ia3"
# Spreadsheets write a byte order mark and CRLF.
TRAIN = (
    '\ufefftext,label,note\r\n"late, again",slow,\r\n"on time,\r\nthank you",fast,x\r\n'
    "still waiting,slow,\r\nquick as ever,fast,y\r\n"
)


# Runs the command several times: most of a run's time is spent on importing torch.
ONE_AFTER_THE_OTHER = """
import json, sys
from ia3.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["ia3", *arguments]
    try:
        main()
    except SystemExit as end:
        print(end.code, file=sys.stderr)
"""


class Place:
    """A folder to run the command in."""

    def __init__(self, folder: Path, model: Path | None = None) -> None:
        self.folder = folder
        self.model = model
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "TMPDIR": str(self.temporary),
        }

    def write(self, name: str, content: str | bytes) -> str:
        encoded = content.encode() if isinstance(content, str) else content
        (self.folder / name).write_bytes(encoded)
        return name

    def run(
        self, *command: Any, under: list[str] | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run `ia3` with these arguments, as an argument of `under` if given."""
        return subprocess.run(
            [*(under or [str(IA3)]), *map(str, command)],
            cwd=self.folder,
            env=self.environment | environment,
            capture_output=True,
            encoding="utf-8",
            timeout=120,
        )

    def fit(
        self, *command: Any, under: list[str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """`ia3 fit` of the tiny model."""
        return self.run("fit", "--model", self.model, *command, under=under)

    def killed_when(self, seen: str, *command: Any) -> None:
        """`ia3 fit` of the tiny model, killed as soon as a path is there."""
        process = subprocess.Popen(
            [str(IA3), "fit", "--model", str(self.model), *map(str, command)],
            cwd=self.folder,
            env=self.environment,
        )
        try:
            while process.poll() is None and not list(self.folder.glob(seen)):
                time.sleep(0.01)
        finally:
            process.kill()
        assert process.wait(60) == -signal.SIGKILL

    def names(self) -> set[str]:
        """What is in the folder; nothing may be left in the temporary one."""
        assert not list(self.temporary.iterdir())
        return {path.name for path in self.folder.iterdir()} - {"tmp"}


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
def fitted(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Any:
    """Where an adapter was fitted, and what the command said."""
    place = Place(tmp_path_factory.mktemp("fitted"), tiny_model)
    place.write("train.csv", TRAIN)
    done = place.fit(
        *("--data", "train.csv", "--text", "text", "--label", "label", "--out", "my-adapter"),
        *("--steps", 3, "--json"),
    )
    return place, done


def assert_refused(
    done: subprocess.CompletedProcess[str], message: str, start: str = "error: "
) -> None:
    """One line on standard error that says this, exit code 1, nothing on standard output."""
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert done.stderr.startswith(start)
    assert message in done.stderr


COMMANDS = (
    *("fit", "fit-many", "predict", "evaluate", "demo", "prepare", "pretrain", "convert"),
    *("list", "inspect", "diff", "search", "combine"),
)


# -- what is loaded --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    ["import ia3", *(f"--help {c}" for c in ("", *COMMANDS))],
)
def test_help_loads_nothing_heavy(place: Place, code: str) -> None:
    if code.startswith("--help"):
        arguments = ["ia3", *code.split()[1:], "--help"]
        code = f"import sys; sys.argv = {arguments}; from ia3.cli import main; main()"
    check = (
        f"import sys\ntry:\n    {code}\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'sklearn', 'matplotlib'}\n"
        "assert not heavy & sys.modules.keys()"
    )
    done = place.run(under=[sys.executable, "-c", check])
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", ["fit", "compare"])
def test_help_says_how_long_training_is(place: Place, command: str) -> None:
    steps = inspect.signature(FewShotClassifier).parameters["steps"].default
    said = place.run(command, "--help").stdout.replace("│", " ")
    assert f"{steps} if absent" in " ".join(said.split())


@pytest.mark.parametrize(
    ("package", "extra"), [("typer", "cli"), ("rich", "cli"), ("sklearn", "tfew")]
)
def test_an_absent_package_is_named_with_its_extra(place: Place, package: str, extra: str) -> None:
    place.write("train.csv", TRAIN)
    blocked = f"import sys; sys.modules[{package!r}] = None; from ia3.cli import main; main()"
    done = place.run(
        "fit", "--data", "train.csv", "--out", "x", under=[sys.executable, "-c", blocked]
    )
    assert_refused(done, f"pip install 'ia3[{extra}]'")
    assert {"sklearn": "scikit-learn"}.get(package, package) in done.stderr


# -- what works ------------------------------------------------------------------------------------


def test_fit_json(fitted: Any) -> None:
    place, done = fitted
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    folder = place.folder / said["adapter"]
    assert {path.name for path in folder.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "ia3_task.json")
    }
    assert said["classes"] == ["fast", "slow"]
    assert (said["examples"], said["steps"]) == (4, 3)
    assert said["adapter_bytes"] == (folder / "adapter_model.safetensors").stat().st_size
    assert place.names() == {"train.csv", "my-adapter"}


def test_predict_json(fitted: Any) -> None:
    place, _ = fitted
    rows = [
        {"id": 1, "body": 'naïve, "so"\n', "more": {"a": None}},
        {"id": 2, "body": ""},
    ]
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


def test_predict_into_a_file(fitted: Any) -> None:
    place, _ = fitted
    place.write("out.tsv", "old")
    command = ("predict", "my-adapter", "--data", "train.csv", "--out", "out.tsv")
    assert_refused(place.run(*command), "out.tsv exists already")
    assert (place.folder / "out.tsv").read_text() == "old"
    done = place.run(*command, "--force")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with open(place.folder / "out.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [row["text"] for row in rows] == [
        *("late, again", "on time,\r\nthank you", "still waiting", "quick as ever")
    ]
    assert list(rows[0]) == ["text", "label", "note", "prediction", "probability"]
    (place.folder / "out.tsv").unlink()
    assert place.names() == {"train.csv", "my-adapter"}


def test_evaluate_json(fitted: Any) -> None:
    place, _ = fitted
    done = place.run("evaluate", "my-adapter", "--data", "train.csv", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    assert (said["examples"], said["classes"]) == (4, ["fast", "slow"])
    confusion = said["confusion"]
    assert [sum(row) for row in confusion] == [2, 2]
    assert said["accuracy"] == (confusion[0][0] + confusion[1][1]) / 4
    assert 0 <= said["macro_f1"] <= 1


def test_integer_labels_several_columns_choices_and_templates(model_place: Place) -> None:
    place = model_place
    rows = [
        {"subject": s, "body": b, "stars": n}
        for s, b, n in [
            ("Good", "fine", 5),
            ("Bad", "awful", 1),
            ("Best", "", 5),
            ("Worst", "no", 1),
        ]
    ]
    place.write("train.jsonl", "\n".join(map(json.dumps, rows)))
    columns = ("--text", "subject", "--text", "body")
    done = place.fit(
        *("--data", "train.jsonl", *columns, "--label", "stars", "--out", "a/b", "--steps", 2),
        *("--template", "{{ subject }}: {{ body }}\nThis is", "--template", "{{ body }}|It is"),
        *("--choice", "1=bad", "--choice", "5=so = good", "--choice", "3=middling"),
    )
    assert done.returncode == 0
    assert re.fullmatch(
        r"Trained on 4 examples of 3 classes in \d+ s; \d+ KiB in a/b\n", done.stderr
    )
    task = json.loads((place.folder / "a/b/ia3_task.json").read_text())
    assert task["labels"] == [1, 3, 5]
    assert task["choices"] == ["bad", "middling", "so = good"]
    assert len(task["templates"]) == 2

    # In CSV the same labels are strings.
    place.write("test.csv", "subject,body,stars\n[bold]Fine,really,5\nPoor,,1\n")
    done = place.run("evaluate", "a/b", "--data", "test.csv", *columns, "--label", "stars")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"accuracy \d+\.\d%, macro F1 \d+\.\d%, 2 rows\n$", done.stdout)
    assert "rows: true label" in " ".join(done.stdout.split())


def test_a_killed_fit_goes_on_from_its_checkpoint(model_place: Place) -> None:
    place = model_place
    command = ("--data", "train.csv", "--steps", 60, "--json", "--out")
    unbroken = place.fit(*command, "unbroken")
    assert unbroken.returncode == 0, unbroken.stderr
    place.killed_when("run/checkpoint-25", *command, "broken", "--checkpoints", "run")
    # A killed process leaves its temporary files.
    shutil.rmtree(place.temporary)
    place.temporary.mkdir()
    assert place.names() == {"train.csv", "unbroken", "run"}
    done = place.fit(*command, "broken", "--checkpoints", "run")
    assert (done.returncode, done.stderr) == (0, "")
    said = [json.loads(run.stdout) for run in (unbroken, done)]
    assert said[0]["final_loss"] == said[1]["final_loss"]
    for name in ("adapter_model.safetensors", "adapter_config.json", "ia3_task.json"):
        written = [(place.folder / run / name).read_bytes() for run in ("unbroken", "broken")]
        assert written[0] == written[1], name
    # Another run does not go on from it.
    done = place.fit(*command, "other", "--checkpoints", "run", "--learning-rate", "0.5")
    assert_refused(done, "learning_rate")
    assert "other" not in place.names()


def test_fit_begins_with_another_adapter(fitted: Any, model_place: Place) -> None:
    before = fitted[0].folder / "my-adapter"
    place = model_place
    command = ("--data", "train.csv", "--steps", 0, "--out")
    for name, options in (("same", ("--init-from", before)), ("ones", ())):
        done = place.fit(*command, name, *options)
        assert done.returncode == 0, done.stderr
    first, same, ones = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (before, place.folder / "same", place.folder / "ones")
    )
    assert first.keys() == same.keys() == ones.keys()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert all((vector == 1).all() for vector in ones.values())
    assert not any((vector == 1).all() for vector in first.values())
    done = place.fit(*command, "x", "--init-from", "no/adapter")
    assert_refused(done, "no adapter at 'no/adapter'")
    assert "x" not in place.names()


def test_fit_rescales_upper_blocks_only(model_place: Place) -> None:
    place = model_place
    command = ("--data", "train.csv", "--steps", 2, "--out")
    done = place.fit(*command, "upper", "--upper-blocks", 1)
    assert done.returncode == 0, done.stderr
    vectors = load_file(place.folder / "upper" / "adapter_model.safetensors")
    assert len(vectors) == 7
    assert all(".layers.1." in name for name in vectors)
    assert_refused(place.fit(*command, "x", "--upper-blocks", 3), "expected 1 to 2")
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
    done = model_place.run("fit-many", "tasks.yaml", "--out", "many", "--json")
    assert done.returncode == 1, done.stderr
    tasks = {task["task"]: task for task in json.loads(done.stdout)["tasks"]}
    assert list(tasks) == ["pace", "seeded", "absent", "unlabelled", "unknown"]
    assert [tasks[name].get("steps") for name in tasks] == [2, 3, None, None, None]
    assert "none.csv does not exist" in tasks["absent"]["error"]
    assert "no column 'queue'" in tasks["unlabelled"]["error"]
    assert "'fast'" in tasks["unknown"]["error"]
    alone = model_place.fit("--data", "train.csv", "--out", "alone", "--seed", 4, "--steps", 3)
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
    command = ("my-adapter", "--data", "train.csv", "--json")
    answers = []
    for options in ((), ("--max-tokens", 1)):
        done = place.run("predict", *command, *options)
        assert (done.returncode, done.stderr) == (0, "")
        answers.append([json.loads(line) for line in done.stdout.splitlines()])
    for at_once, in_parts in zip(*answers, strict=True):
        assert at_once["prediction"] == in_parts["prediction"]
        assert at_once["probability"] == pytest.approx(in_parts["probability"], abs=1e-4)
    scores = [
        json.loads(place.run("evaluate", *command, *options).stdout)
        for options in ((), ("--max-tokens", 1))
    ]
    assert scores[0] == scores[1]
    again = ("--data", "train.csv", "--out", "in-parts", "--steps", 3, "--max-tokens", 1)
    done = place.fit(*again, "--json")
    assert done.returncode == 0, done.stderr
    loss = json.loads(trained.stdout)["final_loss"]
    assert json.loads(done.stdout)["final_loss"] == pytest.approx(loss, rel=1e-4)
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
    fits = [["fit", "--model", "x", "--out", "x", "--data", *o] for o in refused.values()]
    done = place.run(json.dumps(fits), under=[sys.executable, "-c", ONE_AFTER_THE_OTHER])
    for message, line in zip(refused, done.stderr.splitlines()[::2], strict=True):
        assert line.startswith("error: ")
        assert message in line
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
    "[b]:boom:[/b]": ("[b]:boom:.csv", "", "data file [b]:boom:.csv is empty"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(place: Place, case: str) -> None:
    name, content, message = BAD_DATA[case]
    place.write(name, content)
    # The name of no model: it would not get that far.
    assert_refused(place.run("fit", "--data", name, "--out", "x", "--model", "none"), message)
    assert place.names() == {name}


def test_output_is_refused_before_the_data_is_read(place: Place) -> None:
    place.write("file", "old")
    (place.folder / "folder").mkdir()
    fit = ("fit", "--data", "none.csv", "--out")
    assert_refused(place.run(*fit, "folder"), "folder exists already: choose another --out, or")
    assert_refused(place.run(*fit, "file", "--force"), "file: Not a directory")
    assert_refused(place.run(*fit, "file/x"), "file: Not a directory")
    assert_refused(place.run(*fit, "x", "--checkpoints", "file/x"), "file: Not a directory")
    assert_refused(place.run(*fit, "x"), "data file none.csv does not exist")
    predict = ("predict", "folder", "--data", "none.csv", "--out")
    assert_refused(place.run(*predict, "x.txt"), "x.txt ends in '.txt'")
    assert_refused(place.run(*predict, "file/x.csv"), "file: Not a directory")
    assert place.names() == {"file", "folder"}


@pytest.mark.parametrize("column", ["prediction", "probability"])
def test_columns_that_predict_adds(place: Place, column: str) -> None:
    place.write("a.csv", f"text,{column}\na,b\n")
    done = place.run("predict", "x", "--data", "a.csv")
    assert_refused(done, f"a.csv, line 2: there is a column '{column}' already")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", "-1"), "--steps"),
        (("--learning-rate", "0"), "0.0 is not a number above 0"),
        (("--learning-rate", "-0.1"), "-0.1 is not a number above 0"),
        (("--learning-rate", "nan"), "nan is not a number above 0"),
        (("--seed", "-1"), "--seed"),
        (("--max-tokens", "0"), "--max-tokens"),
        (("--choice", "a"), "'a', expected LABEL=WORDS"),
        (("--choice", "a=x", "--choice", "a=y"), "'a' is given more than once"),
        (("--label", "text"), "'text' is the text and the label at once"),
        (("--stepz", "1"), "--stepz"),
    ],
)
def test_usage_errors(place: Place, arguments: tuple[str, ...], message: str) -> None:
    place.write("a.csv", "text,label\nx,a\ny,b\n")
    done = place.run("fit", "--data", "a.csv", "--out", "x", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert place.names() == {"a.csv"}


def test_json_into_a_csv_file_is_a_usage_error(place: Place) -> None:
    done = place.run("predict", "x", "--data", "a.csv", "--out", "b.csv", "--json")
    assert done.returncode == 2
    assert "b.csv would not be JSON Lines" in done.stderr


def test_choice_for_a_label_of_another_type(place: Place) -> None:
    place.write("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": 2}\n')
    done = place.run("fit", "--data", "a.jsonl", "--out", "x", "--choice", "one=good")
    assert_refused(done, "no label 'one' among ['1', '2']")


# -- what is refused later -------------------------------------------------------------------------


def test_refused_with_one_line(fitted: Any) -> None:
    place, _ = fitted
    place.write("a.csv", "text,label,same\none,a,x\ntwo,b,x\n")
    place.write("b.jsonl", '{"text": "a", "label": "slow"}\n\n{"text": "a", "label": "slwo"}\n')
    before = place.names()
    model = str(place.model)
    fit = ["fit", "--data", "a.csv", "--out", "x", "--model", model]
    cases = [
        ([*fit, "--model", "no-such-model"], "no model 'no-such-model'"),
        (
            [*fit, "--template", "{{ txt }}"],
            "'txt' is undefined; the example has the fields ['text']",
        ),
        ([*fit, "--template", "{{ text.__class__.__mro__ }}"], "is refused: access to attribute"),
        ([*fit, "--label", "same"], "all labels are 'x'"),
        (["predict", model, "--data", "a.csv"], "ia3_task.json is not there"),
        (
            ["evaluate", "my-adapter", "--data", "b.jsonl"],
            "b.jsonl, line 3: the label 'slwo' is not among the choices ['fast', 'slow']; did you "
            "mean 'slow'?",
        ),
    ]
    arguments = json.dumps([arguments for arguments, _ in cases])
    done = place.run(arguments, under=[sys.executable, "-c", ONE_AFTER_THE_OTHER])
    lines = done.stderr.splitlines()
    assert done.stdout == ""
    assert len(lines) == 2 * len(cases), done.stderr
    for (_, message), line, code in zip(cases, lines[::2], lines[1::2], strict=True):
        assert line.startswith("error: ")
        assert message in line
        assert code == "1"
    assert place.names() == before
    for name in ("a.csv", "b.jsonl"):
        (place.folder / name).unlink()


# -- full disks ------------------------------------------------------------------------------------

# One block of at most 1024 bytes a file.
SMALL_FILES_ONLY = ["sh", "-c", 'ulimit -f 1 && exec "$0" "$@"', str(IA3)]


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
    place, _ = fitted
    to_full = ["sh", "-c", 'exec "$0" "$@" > /dev/full', str(IA3)]
    done = place.run("predict", "my-adapter", "--data", "train.csv", under=to_full)
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


def test_interrupted_training(model_place: Place) -> None:
    place = model_place
    command = ["fit", "--model", place.model, "--data", "train.csv", "--out", "x"]
    code, shown = interrupted(place, [*command, "--steps", 100_000], rb"[1-9]\d*/100000")
    assert code == 130
    assert "Traceback" not in shown
    assert "Exception" not in shown
    assert place.names() == {"train.csv"}


def test_interrupted_prediction(fitted: Any) -> None:
    place, _ = fitted
    place.write("many.csv", "text\n" + f"{'late again ' * 40}\n" * 5_000)
    before = place.names()
    command = ["predict", "my-adapter", "--data", "many.csv", "--out", "out.csv"]
    code, shown = interrupted(place, command, rb"[1-9]\d*/5000")
    assert code == 130
    assert "Traceback" not in shown
    assert "Exception" not in shown
    assert place.names() == before
    (place.folder / "many.csv").unlink()
