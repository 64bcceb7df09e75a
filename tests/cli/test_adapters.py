"""`ia3 list`, `inspect`, `diff`, `search` and `combine`, as processes."""

import json
import os
import re
import shutil

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command import Place, assert_refused, said
from support.page import Page
from support.pairs import randomize, vectors

import ia3
from ia3.adapter.files import read_adapter

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_model):
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
def place(tmp_path, folder):
    """Where the folder is `adapters`."""
    (tmp_path / "adapters").symlink_to(folder)
    return Place(tmp_path)


def mean_octaves(vector):
    return float(vector.double().abs().clamp(min=2**-6).log2().mean())


def test_list_json(place, folder):
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
def test_list_in_a_terminal(place, width):
    (place.folder / "empty").mkdir()
    commands = [("list", name) for name in ("adapters", "nowhere", "empty")]
    done, absent, empty = place.run_all(*commands, COLUMNS=width)
    assert (done.returncode, done.stderr) == (0, "")
    plain = done.stdout.translate({ord(c): None for c in "│ \n"})
    for expected in ("team/c", "tiny/gpt2", "values", "lora", "peft_typeis'LORA'", "KiB"):
        assert expected in plain
    assert max(map(len, done.stdout.splitlines())) <= int(width)
    assert "4 adapters, 3 broken" in " ".join(done.stdout.split())
    assert_refused(absent, "nowhere: No such file or directory")
    assert " ".join(empty.stdout.split()) == "0 adapters, 0 broken"


def test_one_adapter_is_no_several(place):
    listed, combined = place.run_all(
        ("list", "adapters/team"), ("combine", "adapters/a", "--out", "one")
    )
    assert "1 adapter, 0 broken" in listed.stdout
    assert "average of 1 adapter: " in combined.stderr


def test_neither_list_nor_inspect_nor_diff_load_torch(place):
    runs = place.run_all(
        ("list", "adapters"),
        ("inspect", "adapters/a"),
        ("inspect", "adapters/a", "--json"),
        ("diff", "adapters/a", "adapters/a"),
    )
    assert {(run.returncode, run.stderr) for run in runs} == {(0, "")}
    assert not {"torch", "transformers"} & place.loaded


def test_inspect_json(place):
    (found,) = said(place.run("inspect", "adapters/a", "--json"))["adapters"]
    stored = read_adapter(place.folder / "adapters" / "a")
    assert found["adapter"] == "adapters/a"
    assert [each["site"] for each in found["by_site"]] == sorted(stored.vectors)
    flat = torch.cat([v.flatten() for v in stored.vectors.values()]).double().numpy()
    of_sites = [(e, stored.vectors[e["site"]].double().numpy().ravel()) for e in found["by_site"]]
    for each, values in [(found, flat), *of_sites]:
        size = np.abs(values)
        assert each["values"] == values.size
        assert each["mean"] == pytest.approx(np.log2(np.maximum(size, 2**-6)).mean())
        assert each["spread"] == pytest.approx(values.std())
        assert each["inhibited"] == pytest.approx((size < 0.99).mean())
        assert each["amplified"] == pytest.approx((size > 1.01).mean())


@pytest.mark.parametrize("width", ["160", "40"])
def test_inspect_in_a_terminal(place, width):
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
        assert f" {mean_octaves(vector):+.3f} " in done.stdout, name
    assert "\x1b[" not in done.stdout  # not a terminal


def test_inspect_in_colour_writes_a_picture_and_a_page(place):
    inspect = ("inspect", "adapters/a", "--png", "maps.png", "--html", "maps.html")
    colours = {"FORCE_COLOR": "1", "COLORTERM": "truecolor"}
    done, refused, again = place.run_all(inspect, inspect, (*inspect, "--force"), **colours)
    assert (done.returncode, again.returncode) == (0, 0)
    assert "\x1b[38;2;" in done.stdout
    assert ";48;2;" in done.stdout
    assert re.sub(r"\x1b\[[\d;?]*\w", "", done.stderr) == "written: maps.png\nwritten: maps.html\n"
    assert refused.returncode == 1
    assert "maps.png exists already" in refused.stderr
    assert (place.folder / "maps.png").read_bytes().startswith(PNG)
    page = Page((place.folder / "maps.html").read_text("utf-8"))
    assert page.count("svg") == 4
    assert "Share of channels inhibited" in page.texts["h3"]
    assert "tiny/llama" in page.texts["dd"]
    assert place.names() == {"adapters", "maps.png", "maps.html"}


def test_inspect_several(place):
    names = ("adapters/a", "adapters/b", "adapters/team/c")
    done = place.run("inspect", *names, "--html", "maps.html", "--png", "maps.png")
    assert done.returncode == 0
    for expected in (*names, "Means over 3 adapters", "Mean amplification"):
        assert expected in done.stdout
    key = "model.layers.1.self_attn.k_proj"
    means = [mean_octaves(read_adapter(place.folder / name).vectors[key]) for name in names]
    assert f" {np.mean(means):+.3f} " in done.stdout
    page = Page((place.folder / "maps.html").read_text("utf-8"))
    assert page.count("svg") == 4 * 4  # the means, and each
    ids = [values["id"] for _, values in page.elements if values.get("id")]
    assert len(ids) == len(set(ids))
    assert page.texts["h2"] == ["Mean over 3 adapters", *names]
    assert (place.folder / "maps.png").read_bytes().startswith(PNG)


def test_inspect_refuses_what_cannot_be_read(place):
    refusals = {
        "adapters/cut": "is not a whole safetensors file",
        "adapters/lora": "peft_type is 'LORA'",
        "adapters/team": "adapter_config.json is not there",
        "nowhere": "nowhere is not a folder",
    }
    runs = place.run_all(*(("inspect", "adapters/a", n, "--html", "m.html") for n in refusals))
    for done, message in zip(runs, refusals.values(), strict=True):
        assert_refused(done, message)
    assert place.names() == {"adapters"}


def test_diff_json(place):
    whole, itself, others = place.run_all(
        ("diff", "adapters/a", "adapters/b", "--top", 3, "--json"),
        ("diff", "adapters/a", "adapters/a", "--json"),
        ("diff", "adapters/a", "adapters/other"),
    )
    found = said(whole)
    a, b = (read_adapter(place.folder / "adapters" / n).vectors for n in ("a", "b"))
    assert [each["site"] for each in found["by_site"]] == sorted(a)
    for each in found["by_site"]:
        x, y = a[each["site"]].double().flatten(), b[each["site"]].double().flatten()
        p, q = (v.abs().clamp(min=2**-6).log2() for v in (x, y))
        assert each["cosine"] == pytest.approx(float(torch.cosine_similarity(p, q, dim=0)))
        assert each["norm"] == pytest.approx(float((y - x).norm()))
        assert each["change"] == pytest.approx(float((q - p).mean()))
    sizes = [abs(each["change"]) for each in found["largest_changes"]]
    assert len(sizes) == 3
    assert sizes == sorted(sizes, reverse=True)
    assert found["other_base"] is None
    same = said(itself)
    assert (same["norm"], same["change"], same["largest_changes"]) == (0, 0, [])
    assert others.returncode == 0
    assert "warning: they are adapters of different base models" in others.stderr
    assert "'llama'" in others.stderr


def test_diff_in_a_terminal_and_in_files(place):
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


def test_search(place):
    mix = ("adapters/a", "adapters/b", "--weights", "9,1", "--combination-type", "geometric_mean")
    like = ("search", "adapters", "--like")
    mixed, two, itself, shown = place.run_all(
        ("combine", *mix, "--out", "mixed"),
        (*like, "mixed", "--top", 2, "--json"),
        (*like, "adapters/a", "--json"),
        (*like, "mixed"),
        COLUMNS="40",
    )
    assert mixed.returncode == 0
    found = said(two)
    assert [each["adapter"] for each in found["nearest"]] == ["adapters/a", "adapters/b"]
    assert found["nearest"][0]["cosine"] > 0.98
    assert (found["compared"], found["other_base"], len(found["broken"])) == (3, 1, 3)
    assert "adapters/a" not in [each["adapter"] for each in said(itself)["nearest"]]
    assert "team/c" in shown.stdout
    expected = "3 compared; passed over: 1 of another base model, 3 broken"
    assert expected in " ".join(shown.stdout.split())


COMBINATIONS = [
    ("--combination-type", "average"),
    ("--combination-type", "geometric_mean", "--weights", "1,3"),
    ("--combination-type", "task_arithmetic", "--weights", "1,-1"),
    ("--combination-type", "ties", "--density", "0.3", "--majority-sign-method", "frequency"),
    ("--combination-type", "linear", "--weights", "0.5,0.25"),
]


def test_what_is_combined_is_what_a_model_combines_and_peft_reads(place, make_model):
    both = ("combine", "adapters/a", "adapters/b")
    combine = [(*both, *o, "--out", f"new/{n}", "--json") for n, o in enumerate(COMBINATIONS)]
    *runs, listed = place.run_all(*combine, ("list", "new", "--json"))
    model = ia3.PeftModel.from_pretrained(make_model("llama"), place.folder / "adapters" / "a", "a")
    model.load_adapter(place.folder / "adapters" / "b", "b")
    for number, (options, done) in enumerate(zip(COMBINATIONS, runs, strict=True)):
        made, name = said(done), f"both{number}"
        out = place.folder / "new" / str(number)
        weights = out / "adapter_model.safetensors"
        assert {path.name for path in out.iterdir()} == {"adapter_config.json", weights.name}
        assert made["adapter_bytes"] == weights.stat().st_size
        assert made["adapters"] == ["adapters/a", "adapters/b"]
        given = dict(zip(options[::2], options[1::2], strict=True))
        density = float(given["--density"]) if "--density" in given else None
        more = {"density": density, "majority_sign_method": "frequency" if density else "total"}
        kind = made["combination_type"]
        model.add_weighted_adapter(["a", "b"], made["weights"], name, kind, **more)
        stored = load_file(weights)
        for site, vector in vectors(model, name).items():
            assert torch.equal(stored[f"base_model.model.{site}.ia3_l"], vector)
        model.set_adapter(name)
        ids = torch.arange(3, 14)[None]
        theirs = peft.PeftModel.from_pretrained(make_model("llama"), str(out))
        assert torch.allclose(theirs(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)
    assert len(said(listed)["adapters"]) == len(COMBINATIONS)


def test_combine_refuses_and_leaves_nothing(place):
    both = ("adapters/a", "adapters/b")
    refusals = {
        (*both, "--combination-type", "tie"): "did you mean 'ties'?",
        (*both, "--weights", "1"): "1 weight for 2 adapters",
        (*both, "--density", "0.3"): "density belongs to 'ties'",
        (*both, "--weights", "1,-1"): "add up to 0",
        ("adapters/a", "adapters/other"): "are adapters of different base models",
        ("adapters/a", "adapters/cut"): "is not a whole safetensors file",
        ("adapters/a", "nowhere"): "no adapter in nowhere",
    }
    *runs, not_numbers, linear = place.run_all(
        *(("combine", *given, "--out", "new/both") for given in refusals),
        ("combine", *both, "--weights", "1;2", "--out", "new"),
        ("combine", *both, "--combination-type", "linear", "--out", "new"),
    )
    for done, message in zip(runs, refusals.values(), strict=True):
        assert_refused(done, message)
    assert (not_numbers.returncode, linear.returncode) == (2, 2)
    assert "numbers with commas" in " ".join(not_numbers.stderr.split())
    assert place.names() == {"adapters"}


def test_combine_replaces_only_when_it_is_told_to(place):
    weights = place.folder / "new" / "adapter_model.safetensors"
    average = ("combine", "adapters/a", "adapters/b", "--out", "new")
    first, refused = place.run_all(average, ("combine", "adapters/a", "--out", "new"))
    assert first.returncode == 0
    before = weights.read_bytes()
    assert_refused(refused, "new exists already")
    forced = place.run(*average, "--combination-type", "ties", "--force")
    assert forced.returncode == 0
    assert weights.read_bytes() != before


def test_combine_warns_where_only_names_could_tell(place, folder):
    """As PEFT's adapters: they have no fingerprint."""
    shutil.copytree(folder / "b", place.folder / "b")
    stored = load_file(folder / "b" / "adapter_model.safetensors")
    save_file(stored, place.folder / "b" / "adapter_model.safetensors")
    config = json.loads((place.folder / "b" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "elsewhere/llama"
    (place.folder / "b" / "adapter_config.json").write_text(json.dumps(config))
    done = place.run("combine", "adapters/a", "b", "--out", "new")
    assert done.returncode == 0
    assert "warning: nothing but their names tells" in done.stderr
    assert "'elsewhere/llama', 'tiny/llama'" in done.stderr


def test_what_a_terminal_would_obey_is_escaped(place, folder):
    """A folder's name may hold anything but a slash, also bytes that are no UTF-8."""
    name, shown = os.fsdecode(b"x\x1b[2Jy\xff"), r"x\x1b[2Jy\udcff"
    shutil.copytree(folder / "a", place.folder / "names" / name)
    shutil.copytree(folder / "cut", place.folder / "names" / f"{name}-cut")
    path = f"names/{name}"
    place.write("tasks.yaml", 'tasks: {"a\\e[2Jb": {data: none.csv}}')
    *runs, cut, listed, many = place.run_all(
        ("list", "names"),
        ("inspect", path),
        ("inspect", path, "adapters/a"),
        ("diff", path, "adapters/b"),
        ("search", "names", "--like", "adapters/b"),
        ("combine", path, "adapters/b", "--out", f"names/{name}-new"),
        ("inspect", f"{path}-cut"),
        ("list", "names", "--json"),
        ("fit-many", "tasks.yaml", "--out", "new"),
        COLUMNS="200",
    )
    runs.append(place.run("list", "names", COLUMNS="24"))
    assert {done.returncode for done in runs} == {0}
    assert_refused(cut, shown)
    for done in (*runs, cut):
        printed = done.stdout + done.stderr
        assert "\x1b" not in printed
        assert shown in printed.translate({ord(c): None for c in "│ \n"})
    assert said(listed)["adapters"][0]["adapter"] == path
    assert many.returncode == 1
    assert "\x1b" not in many.stdout
    assert r"a\x1b[2Jb" in many.stdout
