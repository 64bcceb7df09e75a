"""The benchmarks' programs: what they measure by, and that they run and leave what they should."""

import asyncio
import json
import os
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats
from support.paths import DATA, REPOSITORY, needs_data
from support.tfew import word_tokenizer
from torch import nn
from transformers import AutoModel

from ia3 import AdapterBank, FewShotClassifier, classify
from ia3.base.embedded import embedded_encoder_folder
from ia3.base.loading import BaseModel

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import curves
import few_shot
import few_shot_data
import few_shot_methods
import few_shot_report
import gpu
import measuring
import mixed
import reporting
import serving
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


@pytest.mark.slow
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


@pytest.mark.slow
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


# -- few_shot.py -----------------------------------------------------------------------------------

TEXTS = ["a fine film", "dull and long", "a joy to watch", "I slept through it"]
TEXTS += ["warm and funny", "a waste of time", "the best this year", "flat jokes , no plot"]
LABELS = ["positive", "negative"] * 4
needs_setfit = pytest.mark.skipif(
    not few_shot_methods.SETFIT_PYTHON.exists(), reason="no .venv-setfit: make .venv-setfit/.ready"
)


@pytest.fixture
def reviews(tmp_path):
    """A data folder with an SST-2 of 40 training rows, some twice, and 6 test rows."""
    folder = tmp_path / "data"
    rows = [f"{text} , {n}\t{int(label == 'positive')}" for n in range(5)
            for text, label in zip(TEXTS, LABELS, strict=True)]  # fmt: skip
    (folder / "sst2").mkdir(parents=True)
    (folder / "sst2" / "train.tsv").write_text("\n".join([*rows, *rows[:9], ""]), "utf-8")
    (folder / "sst2" / "test.tsv").write_text("\n".join(rows[-6:]) + "\n", "utf-8")
    return folder


def test_a_sample_has_as_many_distinct_texts_of_each_class(reviews):
    train, test = few_shot_data.TASKS["sst2"].read(reviews)
    assert (len(train), len(test)) == (49, 6)
    sample = few_shot_data.sample_few_shot(train, 16, seed=3)
    assert Counter(label for _, label in sample) == {"positive": 16, "negative": 16}
    assert len({text for text, _ in sample}) == 32
    assert sample == few_shot_data.sample_few_shot(train, 16, seed=3)
    assert sample != few_shot_data.sample_few_shot(train, 16, seed=4)
    # Where a class has not so many, it has all.
    assert len(few_shot_data.sample_few_shot(train, 64, seed=3)) == 40


def test_every_row_is_in_one_fold_and_every_fold_has_each_class():
    rows = [(f"text {n}", "rare" if n % 3 == 0 else "often") for n in range(50)]
    folds = [few_shot_data.fold(rows, number) for number in range(few_shot_data.FOLDS)]
    assert sorted(row for _, test in folds for row in test) == sorted(rows)
    for train, test in folds:
        assert sorted(train + test) == sorted(rows)
        assert Counter(label for _, label in test)["rare"] in (3, 4)


@needs_data
@pytest.mark.parametrize("task", few_shot_data.TASKS)
def test_every_method_has_the_same_samples_of_the_real_tasks(task):
    shots = few_shot_data.TASKS[task].shots[0]
    train, test = few_shot_data.few_shot_split(task, shots, 1, DATA)
    rows = {"banking77": 300, "tickets": 200, "ade_corpus_v2": 10, "twitter_complaints": 10}
    assert len(test) == rows.get(task, 500)
    classes = Counter(label for _, label in train)
    assert {label for _, label in test} <= classes.keys()
    numbers = {"trec": 6, "banking16": 16, "banking77": 77, "tickets": 4}
    assert len(classes) == numbers.get(task, 2)
    if shots:
        assert set(classes.values()) == {shots}
        assert test == few_shot_data.few_shot_split(task, shots, 2, DATA)[1]
    assert few_shot_data.few_shot_split(task, shots, 1, DATA) == (train, test)


@needs_data
def test_timed_methods_predict_a_thousand_texts_that_they_did_not_train_on():
    train, others = few_shot_data.timed_split("trec", 16, 0, DATA)
    assert (len(train), len(others)) == (96, 1000)
    assert not {text for text, _ in train} & {text for text, _ in others}


@pytest.mark.slow
def test_finished_runs_are_kept_and_told_in_tables(tmp_path, capsys):
    results = tmp_path / "results"
    command = ["--data", str(tmp_path), "--results", str(results), "--methods", "tfidf"]
    # The tickets are in this repository.
    command += ["--tasks", "tickets", "--seeds", "1"]
    few_shot.main(command)
    path = results / "tickets" / "tfidf.jsonl"
    stored = path.read_bytes()
    (run,) = map(json.loads, stored.splitlines())
    assert (run["shots"], run["seed"], run["threads"], len(run["right"])) == (8, 1, 1, 200)
    assert run["accuracy"] == run["right"].count("1") / 200 > 0.4
    printed = capsys.readouterr().out
    assert f"| tickets | 8 | {100 * run['accuracy']:.1f} (1) |" in printed
    few_shot.main(command)
    assert path.read_bytes() == stored
    assert capsys.readouterr().out == printed


def test_what_a_method_needs_and_is_not_there_leaves_it_out():
    places = few_shot_methods.Places()
    left_out = {m for m in few_shot_methods.METHODS if not few_shot_methods.is_possible(m, places)}
    assert left_out == {"tfew-before", "frozen-mpnet", "setfit-mpnet", "auto-mpnet"}


def estimated(tmp_path, tiny_llama, source):
    """Two classifiers' result, and the texts that they predicted."""
    tiny_llama.save_pretrained(tmp_path / "model")
    word_tokenizer(["positive", "negative"]).save_pretrained(tmp_path / "model")
    settings = [{"model": str(tmp_path / "model"), "steps": steps} for steps in (0, 3)]
    given = {"classifiers": settings, "source": str(source)}
    given |= {"texts": TEXTS, "labels": LABELS, "test_texts": TEXTS[:3]}
    environment = os.environ | {"PYTHONPATH": str(source)}
    program = few_shot_methods.HERE / "few_shot_estimator.py"
    return settings, few_shot_methods._run([sys.executable], program, given, environment)


@pytest.mark.slow
def test_the_estimator_gives_mean_probabilities_by_the_source_that_was_named(tmp_path, tiny_llama):
    settings, found = estimated(tmp_path, tiny_llama, few_shot_methods.SOURCE)
    fitted = [FewShotClassifier(**each).fit(TEXTS, LABELS) for each in settings]
    mean = np.mean([each.predict_proba(TEXTS[:3]) for each in fitted], axis=0)
    assert found["predicted"] == fitted[0].classes_[mean.argmax(axis=1)].tolist()
    assert found["confidence"] == pytest.approx(1000 * mean.max(axis=1), abs=1)
    assert found["stored_bytes"] > 1000
    (tmp_path / "other").mkdir()
    with pytest.raises(RuntimeError, match="ia3 is imported from"):
        estimated(tmp_path, tiny_llama, tmp_path / "other")


@needs_setfit
@pytest.mark.parametrize("method", ["frozen-minilm", "setfit-minilm"])
def test_a_rival_answers_in_its_own_environment(method, monkeypatch):
    monkeypatch.setattr(few_shot_methods, "SETFIT_MOST_SECONDS", 0.0)
    given = (TEXTS, LABELS, TEXTS, 0, few_shot_methods.Places())
    found = few_shot_methods.run_method(method, *given, stops=True)
    assert len(found["predicted"]) == len(TEXTS)
    assert sum(a == b for a, b in zip(found["predicted"], LABELS, strict=True)) > 4
    assert found.get("was_stopped", False) == (method == "setfit-minilm")
    assert min(found["train_seconds"], found["predict_seconds"], found["stored_bytes"]) > 0


def made_runs(method, task, accuracies, shots=(16,), rows=20):
    """Runs of these accuracies, in twentieths, one a seed."""
    return [
        {"method": method, "task": task, "shots": number, "seed": seed, "accuracy": right / rows,
         "right": "1" * right + "0" * (rows - right)}
        for seed, right in enumerate(accuracies)
        for number in shots
    ]  # fmt: skip


OWN_RIGHT, RIVAL_RIGHT = [18, 17, 19, 16, 18], [15, 17, 15, 14, 13]


def test_differences_are_paired_by_seed():
    runs = made_runs("auto", "sst2", OWN_RIGHT, shots=(8, 16))
    runs += made_runs("tfidf", "sst2", [*RIVAL_RIGHT, 20], shots=(8, 16))
    found = few_shot_report.difference_on("sst2", runs, "auto", "tfidf")
    # By SciPy's paired test of the accuracies; both numbers of examples are the same here.
    paired = stats.ttest_rel(np.array(OWN_RIGHT) * 5.0, np.array(RIVAL_RIGHT) * 5.0)
    low, high = paired.confidence_interval(0.95)
    assert found.mean - found.half == pytest.approx(low)
    assert found.mean + found.half == pytest.approx(high)
    assert few_shot_report.difference_on("trec", runs, "auto", "tfidf") is None
    # Samples of other tasks have the same numbers.
    more = [*runs, *made_runs("auto", "trec", [3] * 5, shots=(8, 16))]
    assert few_shot_report.difference_on("sst2", more, "auto", "tfidf") == found
    assert few_shot_report.difference(runs, "auto", "tfidf").mean == pytest.approx(found.mean)


def test_one_sample_has_an_interval_over_its_rows():
    runs = made_runs("auto", "sst2", [18]) + made_runs("tfidf", "sst2", [13])
    found = few_shot_report.difference_on("sst2", runs, "auto", "tfidf")
    rows = [100.0] * 5 + [0.0] * 15
    low, high = stats.ttest_1samp(rows, 0).confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))


def test_the_mean_over_tasks_has_welchs_interval():
    first, second = [5.0, 10.0, 0.0, 20.0, 15.0], [10.0, -5.0, 5.0]
    runs = []
    for task, differences in (("sst2", first), ("tickets", second)):
        runs += made_runs("auto", task, [10 + round(d / 5) for d in differences], shots=(8,))
        runs += made_runs("tfidf", task, [10] * len(differences), shots=(8,))
    found = few_shot_report.difference(runs, "auto", "tfidf")
    # The sum of two means is a difference from the other's negative.
    negative = [-each for each in second]
    welch = stats.ttest_ind(first, negative, equal_var=False).confidence_interval(0.95)
    half = (welch.high - welch.low) / 4
    assert found.mean == pytest.approx((welch.high + welch.low) / 4)
    assert found.half == pytest.approx(half)
    assert found.tasks == ("sst2", "tickets")


def test_methods_that_were_tested_on_other_rows_are_not_compared():
    runs = made_runs("auto", "sst2", [18]) + made_runs("tfidf", "sst2", [13], rows=21)
    with pytest.raises(ValueError, match="argument 2 is longer"):
        few_shot_report.difference_on("sst2", runs, "auto", "tfidf")


def test_calibration_error_is_of_bins_of_equal_mass():
    # 15 bins of 4 rows, of which 3 are right.
    confidence = [round(0.5 + n / 100, 2) for n in range(15) for _ in range(4)]
    right = [True, True, True, False] * 15
    expected = np.mean([abs(0.5 + n / 100 - 0.75) for n in range(15)])
    assert few_shot_report.calibration_error(confidence, right) == pytest.approx(expected)
    # The order of the rows makes no difference.
    backwards = few_shot_report.calibration_error(confidence[::-1], right[::-1])
    assert backwards == pytest.approx(expected)
    assert few_shot_report.calibration_error([1.0, 1.0], [True, False]) == pytest.approx(0.5)


def test_few_rows_have_a_calibration_error_by_chance():
    few, many = ([0.8] * rows for rows in (50, 20_000))
    assert few_shot_report.error_by_chance(few) > 0.1
    assert few_shot_report.error_by_chance(many) < 0.02


def test_an_aim_is_reached_missed_or_lacks_runs():
    runs = made_runs("auto", "tickets", [18, 17, 19, 16, 18], shots=(8,))
    times = [{"method": m, "task": "sst2", "shots": 16, "seed": seed, "load": 0.5, **figures}
             for seed in range(2)
             for m, figures in {
                 "encoder": {"train_seconds": 10, "predict_seconds": 3, "stored_bytes": 5},
                 "setfit-minilm": {"train_seconds": 90, "predict_seconds": 2, "stored_bytes": 400},
             }.items()]  # fmt: skip
    found = {each.what: each for each in few_shot_report.reaches(runs, times)}
    tickets = found["auto on the tickets, 8 a class"]
    assert (tickets.found, tickets.in_words) == ("88.0", "yes")
    ratios = {what: each for what, each in found.items() if what.startswith("encoder by setfit")}
    assert {what.partition(": ")[2]: (each.found, each.holds) for what, each in ratios.items()} == {
        "time to train": ("1/9.0", True),
        "bytes stored": ("1/80.0", False),
        "time to predict 1,000 texts": ("1.50", False),
    }
    assert found["auto on sst2, against the best there"].in_words == "no runs"
    # Another rival's single run: there is a difference, and most of what it is of is missing.
    runs += made_runs("tfidf", "tickets", [18], shots=(8,))
    on_tickets = few_shot_report.reaches(runs, times)[5]
    # Four of tfidf's, and all five of each other rival's.
    assert on_tickets.in_words == "yes, so far: 19 runs are missing"
    assert "beside other work" not in few_shot_report.times_table(times)
    times[0]["load"] = 2.0
    assert "beside other work (load 2.0)" in few_shot_report.times_table(times)


def test_a_mean_over_tasks_says_that_runs_are_missing():
    runs = []
    for task, about in few_shot_data.TASKS.items():
        runs += made_runs("tfidf", task, [10] * 5, shots=about.shots)
    assert few_shot_report.accuracy_table(runs).endswith("| mean over tasks |  | 50.0 |")
    assert few_shot_report.accuracy_table(runs[1:]).endswith("| 50.0 so far |")
    without = [run for run in runs if run["task"] != "banking77"]
    assert few_shot_report.accuracy_table(without).endswith("| mean over tasks |  |  |")


def test_more_examples_are_a_table_of_their_own():
    runs = made_runs("setfit-minilm", "sst2", [18], shots=(16, 250))
    runs[1] |= {"was_stopped": True, "train_seconds": 1800.0}
    told = few_shot_report.report(runs, [])
    accuracy, more = told.split("### More examples")
    assert "| sst2 | 16 | 90.0 (1) |" in accuracy
    assert "250" not in accuracy
    assert "| sst2 | 250 | 90.0 (1800 s, stopped) |" in more


def test_classifiers_in_one_batch_are_timed(tmp_path):
    folders = mixed.write_classifiers("all-minilm-l6-v2", tmp_path, 2)
    model = AutoModel.from_pretrained(embedded_encoder_folder())
    timings = mixed.time_classifiers(model, folders, 2, 1, time.process_time)
    assert timings.ratio("many tasks", mixed.ONE) > 0


def test_of_what_reaches_beyond_a_turn_the_share_of_its_time_counts():
    done = [serving.Done(0.0, 4.0, 8), serving.Done(3.0, 4.0, 5), serving.Done(5.0, 9.0, 4)]
    assert serving.within(done, 2.0, 6.0) == 8 / 2 + 5 + 4 / 4
    assert serving.within(done, 10.0, 12.0) == 0


def test_clients_send_the_next_request_when_the_last_is_answered():
    busy, most, kinds = 0, 0, Counter()

    async def answer(reader, writer):
        nonlocal busy, most
        while head := await reader.readuntil(b"\r\n\r\n"):
            body = await reader.readexactly(int(head.split(b"Content-Length: ")[1].split()[0]))
            kinds[json.loads(body)["adapter"]] += 1
            busy, most = busy + 1, max(most, busy + 1)
            await asyncio.sleep(0.02)
            busy -= 1
            found = b'{"results": [{"label": "a"}]}'
            # By turns of a length and in chunks, as servers do.
            if kinds.total() % 2:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 29\r\n\r\n" + found)
            else:
                head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
                writer.write(head + b"1d\r\n" + found + b"\r\n0\r\n\r\n")

    async def loaded():
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        ask = serving.classifying(["x", "y"])
        found = await serving.under_load(port, ask, 4, seconds=0.5, seed=1, warm_up=0.1)
        server.close()
        return found

    a_second = asyncio.run(loaded())
    assert most == 4
    assert kinds.keys() == {"x", "y"}
    # 4 clients, each at most 50 a second.
    assert 10 < a_second <= 201


def test_copies_of_a_classifier_are_other_classifiers_of_the_same_kind(tmp_path):
    texts, labels = serving.TICKETS[:1], serving.LABELS
    serving.save_copies(FewShotClassifier("all-minilm-l6-v2", steps=0), tmp_path, "copy", 2)
    bank = AdapterBank(AutoModel.from_pretrained(embedded_encoder_folder()))
    for name in ("copy0", "copy1"):
        bank.add(name, tmp_path / name)
    found = classify(bank, texts * 2, ["copy0", "copy1"])
    assert found[0].probability != found[1].probability
    assert {*found[0].probabilities} == {*labels}


def test_a_figure_of_a_server_is_reached_from_its_own_side():
    assert serving.Row("texts/s", 0.96, 0.95, at_least=True).reached
    assert not serving.Row("time", 0.96, 0.6, at_least=False).reached
    shown = serving.in_markdown([serving.Row("HTTP", 5.2, 5.0, False, " ms", "HTTP 12 ms")])
    assert shown.splitlines()[-1] == "| HTTP | 5.20 ms | ≤ 5 ms | **no** | HTTP 12 ms |"
