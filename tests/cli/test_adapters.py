"""`ia3 list`, `inspect`, `diff`, `search` and `combine`, as processes."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from conftest import MakeModel
from safetensors.torch import load_file
from support.page import Page
from support.pairs import randomize, vectors
from test_cli import ONE_AFTER_THE_OTHER, Place, assert_refused

import ia3
from ia3.adapter.store import read_adapter

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_model: MakeModel) -> Path:
    """Adapters of a LLaMA and of a GPT-2, and three folders that hold none that can be read."""
    root = tmp_path_factory.mktemp("adapters")
    for kind, names in (("llama", ("a", "b", "team/c")), ("gpt2", ("other",))):
        for seed, name in enumerate(names):
            config = ia3.IA3Config(base_model_name_or_path=f"tiny/{kind}")
            model = ia3.get_peft_model(make_model(kind), config)
            randomize(vectors(model), seed)
            model.save_pretrained(root / name)
    shutil.copytree(root / "a", root / "cut")
    content = (root / "cut" / "adapter_model.safetensors").read_bytes()
    (root / "cut" / "adapter_model.safetensors").write_bytes(content[:-4])
    (root / "lora").mkdir()
    (root / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (root / "half").mkdir()
    (root / "half" / "adapter_config.json").write_text('{"peft_type":')
    return root


@pytest.fixture
def place(tmp_path: Path, folder: Path) -> Place:
    """Where the folder is `adapters`."""
    (tmp_path / "adapters").symlink_to(folder)
    return Place(tmp_path)


def said(done: Any) -> Any:
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


# -- list ------------------------------------------------------------------------------------------


def test_list_json(place: Place, folder: Path) -> None:
    listed = said(place.run("list", "adapters", "--json"))
    adapters = {each["adapter"]: each for each in listed["adapters"]}
    assert list(adapters) == [f"adapters/{n}" for n in ("a", "b", "other", "team/c")]
    for name, each in adapters.items():
        stored = read_adapter(place.folder / name)
        assert each["sites"] == len(stored.vectors)
        assert each["values"] == sum(v.numel() for v in stored.vectors.values())
        size = (place.folder / name / "adapter_model.safetensors").stat().st_size
        assert each["adapter_bytes"] == size
    kinds = [(each["base_model"], each["model_type"]) for each in adapters.values()]
    assert kinds == [("tiny/llama", "llama")] * 2 + [("tiny/gpt2", "gpt2"), kinds[0]]
    broken = {each["adapter"]: each["reason"] for each in listed["broken"]}
    assert list(broken) == ["adapters/cut", "adapters/half", "adapters/lora"]
    assert "not a whole safetensors file" in broken["adapters/cut"]
    assert "is not JSON" in broken["adapters/half"]
    assert "peft_type is 'LORA'" in broken["adapters/lora"]


@pytest.mark.parametrize("width", ["100", "24"])
def test_list_in_a_terminal(place: Place, width: str) -> None:
    done = place.run("list", "adapters", COLUMNS=width)
    assert (done.returncode, done.stderr) == (0, "")
    for expected in ("team/c", "tiny/gpt2", "values", "lora", "peft_type is 'LORA'", "KiB"):
        plain = done.stdout.translate({ord(c): None for c in "│ \n"})
        assert expected.replace(" ", "") in plain
    assert max(map(len, done.stdout.splitlines())) <= int(width)
    assert "4 adapters, 3 broken" in " ".join(done.stdout.split())


def test_neither_list_nor_inspect_load_torch(place: Place) -> None:
    """It takes seconds to import."""
    for command in (["list", "adapters"], ["inspect", "adapters/a"], ["diff", *["adapters/a"] * 2]):
        code = (
            f"import sys; sys.argv = {['ia3', *command]}\nfrom ia3.cli import main\n"
            "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
            "assert not {'torch', 'transformers'} & sys.modules.keys()"
        )
        done = place.run(under=[sys.executable, "-c", code])
        assert (done.returncode, done.stderr) == (0, "")


def test_a_folder_that_is_not_there_or_empty(place: Place) -> None:
    assert_refused(place.run("list", "nowhere"), "nowhere: No such file or directory")
    (place.folder / "empty").mkdir()
    assert said(place.run("list", "empty", "--json")) == {"adapters": [], "broken": []}
    assert place.run("list", "empty").stdout == "0 adapters, 0 broken\n"


# -- inspect ---------------------------------------------------------------------------------------


def test_inspect_json(place: Place) -> None:
    (found,) = said(place.run("inspect", "adapters/a", "--json"))["adapters"]
    stored = read_adapter(place.folder / "adapters" / "a")
    assert found["adapter"] == "adapters/a"
    assert [each["site"] for each in found["by_site"]] == sorted(stored.vectors)
    flat = torch.cat([v.flatten() for v in stored.vectors.values()]).double().numpy()
    for each, values in [
        (found, flat),
        *((one, stored.vectors[one["site"]].double().numpy().ravel()) for one in found["by_site"]),
    ]:
        size = np.abs(values)
        assert each["values"] == values.size
        assert each["mean"] == pytest.approx(np.log2(np.maximum(size, 2**-6)).mean())
        assert each["spread"] == pytest.approx(values.std())
        assert each["inhibited"] == pytest.approx((size < 0.99).mean())
        assert each["amplified"] == pytest.approx((size > 1.01).mean())


@pytest.mark.parametrize("width", ["160", "80", "40"])
def test_inspect_in_a_terminal(place: Place, width: str) -> None:
    done = place.run("inspect", "adapters/a", COLUMNS=width)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= int(width)
    titles = ("Mean amplification", "Spread", "channels inhibited", "channels amplified")
    for expected in (*titles, "tiny/llama", "down_proj", "k_proj", "v_proj"):
        assert expected in done.stdout
    words = " ".join(done.stdout.split())
    assert "|value| < 0.99" in words
    assert "|value| > 1.01" in words
    # Both layers of all four maps, each cell a number with all of its digits.
    stored = read_adapter(place.folder / "adapters" / "a").vectors
    for name, vector in stored.items():
        mean = vector.double().abs().clamp(min=2**-6).log2().mean()
        assert f" {mean:+.3f} " in done.stdout, name
    assert "\x1b[" not in done.stdout  # not a terminal


def test_colours_where_there_are_some(place: Place) -> None:
    done = place.run("inspect", "adapters/a", FORCE_COLOR="1", COLORTERM="truecolor")
    assert "\x1b[38;2;" in done.stdout
    assert ";48;2;" in done.stdout


def test_inspect_writes_a_picture_and_a_page(place: Place) -> None:
    files = ("--png", "maps.png", "--html", "maps.html")
    done = place.run("inspect", "adapters/a", *files)
    assert (done.returncode, done.stderr) == (0, "written: maps.png\nwritten: maps.html\n")
    assert (place.folder / "maps.png").read_bytes().startswith(PNG)
    page = Page((place.folder / "maps.html").read_text("utf-8"))
    assert page.count("svg") == 4
    assert "Share of channels inhibited" in page.texts["h3"]
    assert "tiny/llama" in page.texts["dd"]
    assert_refused(place.run("inspect", "adapters/a", *files), "maps.png exists already")
    again = place.run("inspect", "adapters/b", *files, "--force", "--json")
    assert said(again)["files"] == ["maps.png", "maps.html"]
    assert place.names() == {"adapters", "maps.png", "maps.html"}


def test_inspect_several(place: Place) -> None:
    names = ("adapters/a", "adapters/b", "adapters/team/c")
    done = place.run("inspect", *names, "--html", "maps.html", "--png", "maps.png")
    assert done.returncode == 0
    for expected in (*names, "Means over 3 adapters", "Mean amplification"):
        assert expected in done.stdout
    means = []
    for name in names:
        vectors = read_adapter(place.folder / name).vectors
        values = vectors["model.layers.1.self_attn.k_proj"].double()
        means.append(float(values.abs().clamp(min=2**-6).log2().mean()))
    assert f" {np.mean(means):+.3f} " in done.stdout
    page = Page((place.folder / "maps.html").read_text("utf-8"))
    assert page.count("svg") == 4 * 4  # the means, and each
    ids = [values["id"] for _, values in page.elements if values.get("id")]
    assert len(ids) == len(set(ids))
    assert page.texts["h2"] == ["Mean over 3 adapters", *names]
    assert (place.folder / "maps.png").read_bytes().startswith(PNG)


def test_inspect_refuses_what_cannot_be_read(place: Place) -> None:
    for name, message in (
        ("adapters/cut", "is not a whole safetensors file"),
        ("adapters/lora", "peft_type is 'LORA'"),
        ("adapters/team", "adapter_config.json is not there"),
        ("nowhere", "nowhere is not a folder"),
    ):
        done = place.run("inspect", "adapters/a", name, "--html", "maps.html")
        assert_refused(done, message)
    assert place.names() == {"adapters"}


# -- diff ------------------------------------------------------------------------------------------


def test_diff_json(place: Place) -> None:
    found = said(place.run("diff", "adapters/a", "adapters/b", "--top", 3, "--json"))
    a, b = (read_adapter(place.folder / "adapters" / n).vectors for n in ("a", "b"))
    assert [each["site"] for each in found["by_site"]] == sorted(a)
    changes = {}
    for each in found["by_site"]:
        x, y = a[each["site"]].double().flatten(), b[each["site"]].double().flatten()
        p, q = (v.abs().clamp(min=2**-6).log2() for v in (x, y))
        assert each["cosine"] == pytest.approx(float(torch.cosine_similarity(p, q, dim=0)))
        assert each["norm"] == pytest.approx(float((y - x).norm()))
        assert each["change"] == pytest.approx(float((q - p).mean()))
        changes.update({(each["site"], i): float(v) for i, v in enumerate(q - p)})
    largest = sorted(changes, key=lambda at: -abs(changes[at]))[:3]
    assert [(each["site"], each["index"]) for each in found["largest_changes"]] == largest
    assert found["other_base"] is None
    assert found["norm"] == pytest.approx(np.linalg.norm([e["norm"] for e in found["by_site"]]))


def test_diff_in_a_terminal_and_in_files(place: Place) -> None:
    files = ("--png", "maps.png", "--html", "maps.html")
    done = place.run("diff", "adapters/a", "adapters/b", *files, COLUMNS="50")
    assert done.returncode == 0
    for title in ("Mean change", "Norm of the difference", "Cosine of the log-scales"):
        assert title in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 50
    page = Page((place.folder / "maps.html").read_text("utf-8"))
    assert page.count("svg") == 3
    assert page.count("tr") == 11
    assert (place.folder / "maps.png").read_bytes().startswith(PNG)


def test_diff_of_different_bases(place: Place) -> None:
    done = place.run("diff", "adapters/a", "adapters/other")
    assert done.returncode == 0
    assert "warning: they are adapters of different base models" in done.stderr
    assert "'llama'" in done.stderr


def test_diff_of_an_adapter_with_itself(place: Place) -> None:
    found = said(place.run("diff", "adapters/a", "adapters/a", "--json"))
    assert (found["norm"], found["change"], found["largest_changes"]) == (0, 0, [])
    assert found["cosine"] == pytest.approx(1)


# -- search ----------------------------------------------------------------------------------------


def test_search(place: Place) -> None:
    mixed = place.run(
        *("combine", "adapters/a", "adapters/b", "--weights", "9,1"),
        *("--combination-type", "geometric_mean", "--out", "mixed"),
    )
    assert mixed.returncode == 0
    found = said(place.run("search", "adapters", "--like", "mixed", "--top", 2, "--json"))
    assert [each["adapter"] for each in found["nearest"]] == ["adapters/a", "adapters/b"]
    assert found["nearest"][0]["cosine"] > 0.98
    assert (found["compared"], found["other_base"], len(found["broken"])) == (3, 1, 3)
    itself = said(place.run("search", "adapters", "--like", "adapters/a", "--json"))
    assert "adapters/a" not in [each["adapter"] for each in itself["nearest"]]
    shown = place.run("search", "adapters", "--like", "mixed", COLUMNS="40")
    assert "team/c" in shown.stdout
    expected = "3 compared; passed over: 1 of another base model, 3 broken"
    assert expected in " ".join(shown.stdout.split())


# -- combine ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ("--combination-type", "average"),
        ("--combination-type", "geometric_mean", "--weights", "1,3"),
        ("--combination-type", "task_arithmetic", "--weights", "1,-1"),
        ("--combination-type", "ties", "--density", "0.3", "--majority-sign-method", "frequency"),
        ("--combination-type", "linear", "--weights", "0.5,0.25"),
    ],
)
def test_what_is_combined_is_what_a_model_combines_and_peft_reads(
    place: Place, make_model: MakeModel, options: tuple[str, ...]
) -> None:
    command = ("combine", "adapters/a", "adapters/b", "--out", "new/both", *options, "--json")
    made = said(place.run(*command))
    out = place.folder / "new" / "both"
    assert {path.name for path in out.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors")
    }
    assert made["adapter_bytes"] == (out / "adapter_model.safetensors").stat().st_size
    assert made["adapters"] == ["adapters/a", "adapters/b"]

    model = ia3.PeftModel.from_pretrained(make_model("llama"), place.folder / "adapters" / "a", "a")
    model.load_adapter(place.folder / "adapters" / "b", "b")
    given = dict(zip(options[::2], options[1::2], strict=True))
    model.add_weighted_adapter(
        ["a", "b"],
        made["weights"],
        "both",
        made["combination_type"],
        density=float(given["--density"]) if "--density" in given else None,
        majority_sign_method=given.get("--majority-sign-method", "total"),  # type: ignore[arg-type]
    )
    stored = load_file(out / "adapter_model.safetensors")
    for name, vector in vectors(model, "both").items():
        assert torch.equal(stored[f"base_model.model.{name}.ia3_l"], vector)
    model.set_adapter("both")
    ids = torch.arange(3, 14)[None]
    theirs = peft.PeftModel.from_pretrained(make_model("llama"), str(out))
    assert torch.allclose(theirs(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)
    said(place.run("list", "new", "--json"))


def test_combine_refuses_and_leaves_nothing(place: Place) -> None:
    both = ("adapters/a", "adapters/b")
    refusals = (
        ((*both, "--combination-type", "tie"), "did you mean 'ties'?"),
        ((*both, "--weights", "1"), "1 weights for 2 adapters"),
        ((*both, "--density", "0.3"), "density belongs to 'ties'"),
        ((*both, "--weights", "1,-1"), "add up to 0"),
        (("adapters/a", "adapters/other"), "are adapters of different base models"),
        (("adapters/a", "adapters/cut"), "is not a whole safetensors file"),
        (("adapters/a", "nowhere"), "no adapter in nowhere"),
    )
    commands = json.dumps([["combine", *given, "--out", "new/both"] for given, _ in refusals])
    done = place.run(under=[sys.executable, "-c", ONE_AFTER_THE_OTHER, commands])
    lines = iter(done.stderr.splitlines())
    for (_, message), line, code in zip(refusals, lines, lines, strict=True):
        assert line.startswith("error: ")
        assert message in line
        assert code == "1"
    assert done.stdout == ""
    done = place.run("combine", *both, "--weights", "1;2", "--out", "new")
    assert done.returncode == 2
    assert "numbers with commas" in " ".join(done.stderr.split())
    assert (
        place.run("combine", *both, "--combination-type", "linear", "--out", "new").returncode == 2
    )
    assert place.names() == {"adapters"}
    place.run("combine", *both, "--out", "new")
    before = (place.folder / "new" / "adapter_model.safetensors").read_bytes()
    again = ("combine", *both, "--combination-type", "ties", "--out", "new")
    assert_refused(place.run(*again), "new exists already")
    assert (place.folder / "new" / "adapter_model.safetensors").read_bytes() == before
    assert place.run(*again, "--force").returncode == 0
    assert (place.folder / "new" / "adapter_model.safetensors").read_bytes() != before


def test_combine_warns_where_only_names_could_tell(place: Place, folder: Path) -> None:
    """As PEFT's adapters: they have no fingerprint."""
    shutil.copytree(folder / "b", place.folder / "b")
    stored = load_file(folder / "b" / "adapter_model.safetensors")
    from safetensors.torch import save_file

    save_file(stored, place.folder / "b" / "adapter_model.safetensors")
    config = json.loads((place.folder / "b" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "elsewhere/llama"
    (place.folder / "b" / "adapter_config.json").write_text(json.dumps(config))
    done = place.run("combine", "adapters/a", "b", "--out", "new")
    assert done.returncode == 0
    assert "warning: nothing but their names tells" in done.stderr
    assert "'elsewhere/llama', 'tiny/llama'" in done.stderr


# -- names ----------------------------------------------------------------------------------------


def test_what_a_terminal_would_obey_is_escaped(place: Place, folder: Path) -> None:
    """A folder's name may hold anything but a slash, also bytes that are no UTF-8."""
    name, shown = os.fsdecode(b"x\x1b[2Jy\xff"), r"x\x1b[2Jy\udcff"
    shutil.copytree(folder / "a", place.folder / "names" / name)
    shutil.copytree(folder / "cut", place.folder / "names" / f"{name}-cut")
    path = f"names/{name}"
    runs = [
        place.run("list", "names", COLUMNS="200"),
        place.run("list", "names", COLUMNS="24"),
        place.run("inspect", path, COLUMNS="200"),
        place.run("inspect", path, "adapters/a", COLUMNS="200"),
        place.run("diff", path, "adapters/b", COLUMNS="200"),
        place.run("search", "names", "--like", "adapters/b", COLUMNS="200"),
        place.run("combine", path, "adapters/b", "--out", f"names/{name}-new"),
    ]
    for done in runs:
        assert done.returncode == 0, done.stderr
    refused = [
        place.run("inspect", f"{path}-cut"),
        place.run("combine", path, "adapters/b", "--out", f"names/{name}-new"),
    ]
    for done in refused:
        assert_refused(done, shown)
    for done in (*runs, *refused):
        printed = done.stdout + done.stderr
        assert "\x1b" not in printed
        assert shown in printed.translate({ord(c): None for c in "│ \n"})
    listed = said(place.run("list", "names", "--json"))
    assert listed["adapters"][0]["adapter"] == path


def test_names_in_a_manifest_are_escaped(place: Place) -> None:
    place.write("tasks.yaml", 'tasks: {"a\\e[2Jb": {data: none.csv}}')
    done = place.run("fit-many", "tasks.yaml", "--out", "new")
    assert done.returncode == 1
    assert "\x1b" not in done.stdout
    assert r"a\x1b[2Jb" in done.stdout
    assert place.names() == {"adapters", "tasks.yaml"}
