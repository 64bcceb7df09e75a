"""`ia3 --version`, shell completion, `ia3 doctor` and `ia3 models`, as a person types them."""

from __future__ import annotations

import json
import re
from importlib import metadata

import pytest
from support.command import Place, said
from support.paths import REPOSITORY

import ia3
from ia3.cli.models import MEASURED, RECOMMENDED

RESULTS = REPOSITORY / "benchmarks" / "results" / "few_shot"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("machine"))
    place.light = place.run_all(("--version",), ("models",), ("models", "--json"), COLUMNS="80")
    place.light_loaded = place.loaded
    place.doctored = place.run_all(("doctor",), ("doctor", "--json"), COLUMNS="80")
    return place


def test_version_is_one_line_and_loads_nothing_heavy(place):
    done = place.light[0]
    assert (done.returncode, done.stdout, done.stderr) == (0, f"ia3 {ia3.__version__}\n", "")
    assert not place.light_loaded


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_can_be_told_to_complete(place, shell):
    done = place.run(_IA3_COMPLETE=f"source_{shell}")
    assert done.returncode == 0, done.stderr
    assert "_IA3_COMPLETE" in done.stdout


def test_bash_completes_commands_and_options(place):
    for words, found in (("ia3 su", ["suggest"]), ("ia3 fit --unl", ["--unlabelled"])):
        asked = {"_IA3_COMPLETE": "complete_bash", "COMP_WORDS": words}
        done = place.run(**asked, COMP_CWORD=str(len(words.split()) - 1))
        assert (done.returncode, done.stdout.split()) == (0, found), done.stderr


def test_doctor_says_what_this_machine_has(place):
    done, as_json = place.doctored
    assert done.returncode == 0, done.stdout
    told = said(as_json)
    assert told["problems"] == []
    for name in ("torch", "transformers", "scikit-learn"):
        assert told["versions"][name] == metadata.version(name)
        assert f"│ {name} " in done.stdout
    assert told["threads"] == 1  # by OMP_NUM_THREADS
    assert told["environment"]["OMP_NUM_THREADS"] == "1"
    assert {"all-minilm-l6-v2", "smollm2-135m-instruct"} <= {m["name"] for m in told["models"]}
    assert "nothing is amiss" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_doctor_says_what_is_amiss_and_what_mends_it(place, tmp_path):
    # A package of another version, whose metadata comes first.
    other = tmp_path / "site" / "jinja2-2.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: jinja2\nVersion: 2.0\n")
    (tmp_path / "no-folder").write_text("")
    environment = {"PYTHONPATH": f"{tmp_path / 'site'}:{REPOSITORY / 'src'}"}
    environment |= {"IA3_HOME": str(tmp_path / "no-folder"), "COLUMNS": "80"}
    done = place.run("doctor", **environment)
    assert done.returncode == 1
    said = " ".join(done.stdout.split())
    assert re.search(r"jinja2 is 2\.0, expected (>=\S+): pip install 'jinja2\1'", said), said
    assert f"the cache {tmp_path / 'no-folder'} cannot be written" in said
    assert "set IA3_HOME to a folder that can" in said
    assert place.run("doctor", "--json", **environment).returncode == 1


def test_models_are_for_sizes_of_machines_and_each_figure_has_a_source(place):
    _, shown, as_json = place.light
    assert shown.returncode == 0, shown.stderr
    told = said(as_json)["recommended"]
    assert [each["machine"] for each in told] == [each.machine for each in RECOMMENDED]
    for each in told:
        assert each["source"].startswith(("measured: docs/", "cited: "))
        assert each["model"] in " ".join(shown.stdout.replace("│", " ").split())
    assert max(map(len, shown.stdout.splitlines())) <= 80


def test_measured_figures_are_those_stored():
    """The runs of 16 examples a class, first sample, that the benchmark has stored."""
    stored = {}
    for task, method in (("trec", "encoder"), ("banking16", "encoder"), ("sst2", "auto")):
        for line in (RESULTS / task / f"{method}.jsonl").read_text("utf-8").splitlines():
            run = json.loads(line)
            if (run["shots"], run["seed"]) == (16, 0):
                stored[task] = f"{100 * run['accuracy']:.1f}", f"{run['train_seconds']:.0f} s"
    measured = [each for each in RECOMMENDED if each.source == MEASURED]
    figures = [re.findall(r"(\d\d\.\d)", each.accuracy) for each in measured]
    seconds = [re.findall(r"\d+ s", each.training) for each in measured]
    expected = [[stored["trec"], stored["banking16"]], [stored["sst2"]]]
    assert figures == [[accuracy for accuracy, _ in of] for of in expected]
    assert seconds == [[taken for _, taken in of] for of in expected]
