"""The benchmarks' programs: what they measure by, and that they run and leave what they should."""

import json
import sys

import pytest
import torch
from support.paths import REPOSITORY
from support.tfew import word_tokenizer
from torch import nn

from ia3.base.loading import BaseModel

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import curves
import gpu
import measuring
import mixed
import reporting
import speed

TINY = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def test_everybody_has_as_many_turns_and_a_clean_up_each():
    ran = []
    steps = {name: lambda name=name: ran.append(name) for name in "ab"}
    timings = measuring.take_turns(steps, 3, after={"a": lambda: ran.append("after a")}, warm_up=2)
    assert [len(timings.seconds[name]) for name in "ab"] == [3, 3]
    assert ran.count("a") == ran.count("b") == 5
    assert all(ran[i + 1] == "after a" for i, name in enumerate(ran) if name == "a")


def test_a_ratio_is_of_the_same_turn():
    # In one turn the machine is ten times slower.
    timings = measuring.Timings({"own": [2.0, 30.0, 2.0], "base": [1.0, 10.0, 1.0]})
    assert timings.ratio("own", "base") == timings.median("own") == 2.0


def test_saved_bytes_are_storages_counted_once_without_parameters():
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU())
    states = torch.randn(4, 8, requires_grad=True)

    def twice():
        result = model(states)
        return result.view(2, 2, 16).square() + result.view(2, 2, 16).square()

    # ReLU keeps its result, and both squares keep views of it; a weight's gradient needs the input.
    for trained, inputs in ((False, 0), (True, 4 * 8)):
        model.requires_grad_(trained)
        assert measuring.saved_bytes(model, twice) == 4 * (4 * 16 + inputs)


@pytest.fixture
def base(tiny_llama):
    return BaseModel(tiny_llama, word_tokenizer(), "tiny")


def test_the_table_has_every_contestant_and_is_json(base, monkeypatch):
    for name, value in {"BATCH": (2, 16), "OTHERS": (2, 4), "META_LAYERS": (1, 2)}.items():
        monkeypatch.setattr(speed, name, value)
    monkeypatch.setattr(measuring, "CACHED", 16)
    groups = [name for name in speed.GROUPS if name != "start"]
    rows, left_out = speed.measure(base, groups, 1, None)
    assert list(left_out) == ["tfew"]
    rows = {row.name: row for row in rows}
    assert rows.keys() == {*groups} - {"tfew"}
    for row in rows.values():
        assert row.values["ia3"] > 0
        assert "PEFT" in row.values or row.against == "PEFT"
        assert set(row.ratios) <= set(row.values)
    lines = speed.in_markdown(list(rows.values()), list(left_out.values())).splitlines()
    cells = {line.count(" | ") for line in lines if line.startswith("|")}
    assert cells == {len(speed.CONTESTANTS) + 3}
    assert lines[-1].startswith("Left out: T-Few")
    json.dumps([vars(row) for row in rows.values()], allow_nan=False)
    # The plain product keeps the scaled activation besides the one it scales.
    assert rows["saved"].ratios["PEFT"] > 1


def test_what_was_aimed_at_is_reached_by_ratios_where_there_are_any():
    for ratio, reached in ((1.01, True), (1.03, False)):
        figures = {"ia3": 50.0}, {"ia3": 1.02}, "", 49.5, {"ia3": ratio}
        assert speed.Row("step", "", "ms", *figures).reached is reached
    assert speed.Row("save", "", "ms", {"ia3": 3.0}, {"ia3": 2.0}).reached is False
    assert speed.Row("save", "", "ms", {"PEFT": 3.0}, {"ia3": 2.0}).reached is None


def test_the_hand_written_rest_of_a_document_stays(tmp_path):
    document = tmp_path / "benchmarks.md"
    document.write_text("above\n<!-- m -->\nold\n<!-- end of m -->\nbelow\n", "utf-8")
    reporting.write_between(document, "m", "new \\1")
    written = "above\n<!-- m -->\n\nnew \\1\n\n<!-- end of m -->\nbelow\n"
    assert document.read_text("utf-8") == written
    with pytest.raises(ValueError, match="<!-- other -->"):
        reporting.write_between(document, "other", "text")
    # The real one has the places that are written.
    text = reporting.DOCUMENT.read_text("utf-8")
    for mark in (speed.MARK, curves.MARK):
        assert text.count(f"<!-- {mark} -->") == text.count(f"<!-- end of {mark} -->") == 1


def test_three_digits():
    texts = {0.04321: "0.0432", 1.5: "1.50", 58196.2: "58,196", 0: "0", 99.96: "100.0"}
    assert {value: reporting.digits(value) for value in texts} == texts


def test_runs_that_are_missing_are_run_and_kept(tmp_path, capsys):
    program, results = tmp_path / "program.py", tmp_path / "results.jsonl"
    program.write_text(
        "import json, sys\n_, name, seed, option = sys.argv[1:]\nassert seed != '2', 'bad seed'\n"
        "print('more')\nprint(json.dumps({'method': name, 'seed': int(seed), 'option': option}))"
    )
    keys = [{"method": "tfew", "seed": seed} for seed in range(3)]
    runs = reporting.run_missing(str(program), keys, results, ["x"], workers=2, threads=1)
    assert sorted(run["seed"] for run in runs) == [0, 1]
    assert {run["option"] for run in runs} == {"x"}
    assert "bad seed" in capsys.readouterr().err
    content = results.read_text()
    assert reporting.run_missing(str(program), keys[:2], results, ["y"]) == runs
    assert results.read_text() == content


def test_curves_are_drawn_and_say_where_they_bend(tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "small", lambda layers=1: measuring.llama(**TINY, layers=layers))
    monkeypatch.setattr(curves, "LAYERS", (1, 2))
    monkeypatch.setattr(curves, "ADAPTERS", (1, 3))
    drawn = [*curves.layer_curves(1), *curves.adapter_curves(1)]
    assert {curve.name for curve in drawn} == {"layers", "adapters"}
    for curve in drawn:
        assert {"ia3", "PEFT"} <= set(curve.points)
        assert all(len(points) == 2 and min(points)[1] > 0 for points in curve.points.values())
    curves.draw(drawn, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    bent = curves.Curve("tokens", "tokens", "ms", {"ia3": [(1, 1.0), (2, 2.0), (4, 8.0)]})
    assert bent.last_power("ia3") == pytest.approx(2)
    assert "2.00 (upward)" in curves.in_markdown([bent])


def test_scoring_with_shared_prompts_has_more_points_than_expanded(base, monkeypatch):
    monkeypatch.setattr(curves, "CHOICES", (1, 2))
    monkeypatch.setattr(curves, "PROMPTS", (4, 8))
    monkeypatch.setattr(curves, "MOST_EXPANDED", 16 * (4 + curves.CHOICE_TOKENS))
    by_choices, by_prompt = curves.scoring_curves_of(base, 1)
    points = [by_choices.points["ia3"], *(by_prompt.points[n] for n in ("ia3", "expanded"))]
    assert [[x for x, _ in line] for line in points] == [[1, 2], [4, 8], [4]]
    # A line of one point has no slope.
    assert "at 4 |" in curves.in_markdown([by_prompt])


def test_the_gpu_program_runs_without_one_and_says_so(monkeypatch):
    monkeypatch.setattr(gpu, "SMALL", {**TINY, "layers": 2})
    methods = {name: gpu.measured(name, 1, "cpu") for name in gpu.METHODS}
    for figures in methods.values():
        assert not figures["failed"], figures
        assert min(figures["tokens_per_second"], figures["decode_ms"]) > 0
    assert methods["ia3"]["trained"] == methods["PEFT (IA)³"]["trained"] == 2 * (16 + 16 + 48)
    circumstances = {"card": None, **reporting.circumstances()}
    assert "Without a GPU" in gpu.in_markdown(json.loads(json.dumps(methods)), circumstances)


def test_mixed_batches_are_timed_and_adapters_registered(tiny_llama, tmp_path):
    folders = mixed.write_adapters(tiny_llama.requires_grad_(False), tmp_path, 6)
    found = mixed.contestants(tiny_llama, folders, rows=3)
    timings = mixed.time_batches(found, rows=3, length=4, repeats=2)
    assert len(timings) == 2
    assert all(each.seconds.keys() == found.keys() for each in timings.values())
    # The bank and the model's own adapters are the same adapters.
    ids = torch.arange(12).view(3, 4)
    chosen = [found[name] for name in ("ia3 bank", "ia3 own adapters", "base")]
    with torch.no_grad():
        bank, own, base = (model(input_ids=ids, **options).logits for model, options in chosen)
    assert torch.equal(bank, own)
    assert not torch.equal(bank, base)
    registered = mixed.register(tiny_llama, folders)
    assert (registered["adapters"], registered["values each"]) == (6, 2 * (16 + 16 + 48))
