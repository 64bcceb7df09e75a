"""Methods compared on the same samples: what they score and cost, what is kept, what is refused."""

import json
import random
import re
import sys
import warnings
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import fields, replace

import pytest
from hypothesis import given, strategies as st
from support.command import Place, assert_refused, said
from support.paths import REPOSITORY
from support.raft import write_csv
from support.tfew import tiny_llama, tiny_t5, word_tokenizer

from ia3.adapter.files import adapter_files
from ia3.classify.estimator import FewShotClassifier
from ia3.errors import BrokenFileError, IA3Error
from ia3.experiments.comparison import Run, Sample, Settings, compare, draw_samples, summaries
from ia3.experiments.in_context import InContextClassifier
from ia3.experiments.setfit import SetFit
from ia3.report.comparison import cells, markdown, notes, picture

SETFIT_PYTHON = REPOSITORY / ".venv-setfit" / "bin" / "python"

WORDS = ["the", "bill", "was", "wrong", "charged", "twice", "for", "van", "came", "late", "box"]
WORDS += ["where", "is", "my", "rain", "paid", "no", "invoice", "driver", "left"]
TEMPLATE = "question : {{ text }}\nabout"
TEMPLATE_WORDS = 3
CHOICES = {"bill": "money", "van": "the delivery"}
CHOICE_WORDS = 3
TOKENIZER = word_tokenizer([*WORDS, "money", "the", "delivery", "question", ":", "about"])


def rows_of(count, seed):
    """Texts of 3 to 8 words, half of them of either label."""
    draw = random.Random(seed)
    labels = ["bill", "van"] * (count // 2)
    texts = [" ".join([label, *draw.choices(WORDS, k=draw.randint(2, 7))]) for label in labels]
    return texts, labels


TRAIN = rows_of(12, 1)
TEST = rows_of(10, 2)
SHOTS, SEEDS, STEPS = 2, 2, 3
PARAMETERS = sum(p.numel() for p in tiny_llama().parameters())


def settings_of(model, **changed) -> Settings:
    given = {"template": TEMPLATE, "choices": CHOICES, "tokenizer": TOKENIZER, "steps": STEPS}
    return Settings(model, **{**given, **changed})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model and data."""
    place = Place(tmp_path_factory.mktemp("comparison"))
    tiny_llama().save_pretrained(place.folder / "model")
    TOKENIZER.save_pretrained(place.folder / "model")
    for name, rows in (("train", TRAIN), ("test", TEST)):
        write_csv(place.folder / f"{name}.csv", ("text", "label"), [*zip(*rows, strict=True)])
    return place


def run_in(place, *commands, choices=CHOICES):
    """`ia3 compare` of the tiny model, with further options each."""
    pairs = [x for label, words in choices.items() for x in ("--choice", f"{label}={words}")]
    given = ("--model", "model", "--data", "train.csv", "--template", TEMPLATE, *pairs)
    return place.run_all(*(("compare", *given, *c) for c in commands), COLUMNS="100")


ASKED = ("--test", "test.csv", "--shots", SHOTS, "--seeds", SEEDS, "--steps", STEPS)


@pytest.fixture(scope="module")
def compared(place):
    """What `--json` printed of a comparison in `out`."""
    (done,) = run_in(place, (*ASKED, "--out", "out", "--json"))
    return said(done)


def the_samples() -> list[Sample]:
    train, test = ([{"text": text} for text in texts] for texts, _ in (TRAIN, TEST))
    return draw_samples(train, TRAIN[1], (test, TEST[1]), shots=SHOTS, seeds=SEEDS)


def run_of(compared, method, seed):
    (run,) = (r for r in compared["runs"] if (r["method"], r["seed"]) == (method, seed))
    return run


def mean_words(texts):
    return sum(len(text.split()) for text in texts) / len(texts)


def lines_of(results):
    return [json.loads(line) for line in results.read_text().splitlines()]


# -- the command -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_method_runs_on_every_sample_as_its_classifier_does_alone(compared, place):
    # The untuned model once.
    runs = Counter(run["method"] for run in compared["runs"])
    assert runs == {"zero-shot": 1, "icl": SEEDS, "tfew": SEEDS}
    assert [summary["method"] for summary in compared["methods"]] == list(runs)
    model = str(place.folder / "model")
    for sample in the_samples():
        common = {"model": model, "template": TEMPLATE, "choices": CHOICES}
        trained = FewShotClassifier(**common, steps=STEPS, seed=sample.seed)
        for method, seed, classifier in (
            ("zero-shot", 0, FewShotClassifier(**common, steps=0)),
            ("icl", sample.seed, InContextClassifier(**common, seed=sample.seed)),
            ("tfew", sample.seed, trained),
        ):
            classifier.fit(sample.texts, sample.labels)
            run = run_of(compared, method, seed)
            assert run["accuracy"] == classifier.score(sample.test_texts, sample.test_labels)
            assert run["answers"] == len(TEST[0])
        size = sum(map(len, adapter_files(trained.adapter_).values()))
        # The model's name is in the config, and here it is the whole path.
        assert abs(run_of(compared, "tfew", sample.seed)["stored_bytes"] - size) < len(model) + 100


@pytest.mark.slow
def test_the_costs_are_those_of_the_paper_by_hand(compared):
    answer = 2 * PARAMETERS * (mean_words(TEST[0]) + TEMPLATE_WORDS + CHOICE_WORDS)
    for sample in the_samples():
        texts = [text["text"] for text in sample.texts]
        answers = [len(CHOICES[label].split()) for label in sample.labels]
        shown = len(texts) * (mean_words(texts) + TEMPLATE_WORDS) + sum(answers)
        trained = STEPS * 2 * SHOTS * (mean_words(texts) + TEMPLATE_WORDS + CHOICE_WORDS)
        tfew, icl = (run_of(compared, method, sample.seed) for method in ("tfew", "icl"))
        assert tfew["flops_an_answer"] == pytest.approx(answer)
        assert tfew["flops_before"] == pytest.approx(6 * PARAMETERS * trained)
        assert icl["flops_an_answer"] == pytest.approx(answer)
        assert icl["flops_before"] == pytest.approx(2 * PARAMETERS * shown)
        assert icl["flops_uncached"] == pytest.approx(answer + 2 * PARAMETERS * shown)
        assert icl["stored_bytes"] == pytest.approx(4 * shown)
        assert (icl["examples_used"], icl["examples"]) == (4, 4)
    zero_shot = run_of(compared, "zero-shot", 0)
    assert zero_shot["flops_an_answer"] == pytest.approx(answer)
    nothing = ("flops_before", "train_seconds", "stored_bytes", "examples")
    assert [zero_shot[name] for name in nothing] == [0] * 4


@pytest.mark.slow
def test_the_files_say_what_was_printed(compared, place):
    out = place.folder / "out"
    files = {"results.jsonl", "table.md", "comparison.png", "comparison.svg"}
    assert {path.name for path in out.iterdir()} == files
    kept = lines_of(out / "results.jsonl")
    assert [{k: v for k, v in run.items() if k != "conditions"} for run in kept] == compared["runs"]
    found = summaries([Run(**run) for run in compared["runs"]])
    assert (out / "table.md").read_text() == markdown(found)
    assert (out / "comparison.svg").read_bytes() == picture(found, "svg")
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.slow
def test_without_test_data_the_rest_is_answered_and_nothing_is_repeated(place):
    command = ("--shots", 4, "--seeds", 2, "--methods", "zero-shot, icl", "--out", "rest")
    done, again = run_in(place, command, command)
    assert done.returncode == 0, done.stderr
    assert "in-context" in done.stdout
    assert (again.returncode, again.stdout) == (0, done.stdout)
    results = place.folder / "rest" / "results.jsonl"
    before = lines_of(results)
    # Each seed has test texts of its own, for the untuned model too.
    expected = [("zero-shot", 0), ("icl", 0), ("zero-shot", 1), ("icl", 1)]
    assert [(run["method"], run["seed"]) for run in before] == expected
    assert {run["answers"] for run in before} == {12 - 2 * 4}
    (anew,) = run_in(place, (*command, "--force"))
    assert anew.returncode == 0, anew.stderr
    assert len(lines_of(results)) == 4
    assert lines_of(results) != before


@pytest.mark.slow
def test_labels_may_be_numbers_in_one_file_and_text_in_the_other(place):
    numbers = {"bill": 0, "van": 1}
    rows = [{"text": text, "label": numbers[label]} for text, label in zip(*TRAIN, strict=True)]
    place.write("numbers.jsonl", "\n".join(map(json.dumps, rows)))
    rows = [(text, numbers[label]) for text, label in zip(*TEST, strict=True)]
    write_csv(place.folder / "numbers.csv", ("text", "label"), rows)
    given = ("--data", "numbers.jsonl", "--test", "numbers.csv", "--methods", "zero-shot")
    choices = {numbers[label]: words for label, words in CHOICES.items()}
    (done,) = run_in(place, (*given, "--out", "numbered", "--json"), choices=choices)
    untuned = FewShotClassifier(str(place.folder / "model"), TEMPLATE, CHOICES, steps=0).fit(*TRAIN)
    assert said(done)["runs"][0]["accuracy"] == untuned.score(*TEST)


@pytest.mark.slow
def test_the_command_refuses_before_anything_is_written(place):
    write_csv(place.folder / "strange.csv", ("text", "label"), [("my bill", "bill"), ("my", "vam")])
    (place.folder / "other").mkdir()
    place.write("other/precious.txt", "mine")
    refusals = {
        ("--test", "strange.csv", "--out", "refused"): "strange.csv, line 3: the label 'vam'",
        ("--shots", 1, "--ensemble", "ordering", "--out", "refused"): "did you mean 'orderings'?",
        (*ASKED, "--out", "other"): "--force",
    }
    for done, message in zip(run_in(place, *refusals), refusals.values(), strict=True):
        assert_refused(done, message)
    assert not (place.folder / "refused").exists()
    assert [path.name for path in (place.folder / "other").iterdir()] == ["precious.txt"]


# -- going on --------------------------------------------------------------------------------------


def test_a_run_that_was_cut_off_is_repeated_and_no_other(tmp_path):
    settings, samples, results = settings_of(tiny_llama()), the_samples(), tmp_path / "r.jsonl"
    *first, last = compare(samples, ["zero-shot", "tfew"], settings, results=results)
    whole = results.read_bytes().splitlines(keepends=True)
    results.write_bytes(b"".join(whole[:2]) + whole[2][:40])
    *again, repeated = compare(samples, ["zero-shot", "tfew"], settings, results=results)
    kept = results.read_bytes().splitlines(keepends=True)
    assert (kept[:2], len(kept), again) == (whole[:2], 3, first)
    # The same training, timed again.
    assert (repeated.seed, repeated.accuracy) == (last.seed, last.accuracy)


def test_a_method_runs_again_when_its_own_settings_change(tmp_path):
    samples, results = the_samples()[:1], tmp_path / "results.jsonl"
    every = ["zero-shot", "icl", "tfew"]
    compare(samples, every, settings_of(tiny_llama(), steps=1), results=results)
    done = len(every)
    for changed, repeated in [
        ({}, set()),
        ({"steps": 2}, {"tfew"}),
        ({"learning_rate": 1e-3}, {"tfew"}),
        ({"calibrate": True}, {"icl"}),
        ({"ensemble": "one-shot"}, {"icl"}),
        ({"template": "{{ text }} about"}, {*every}),
        ({"model": tiny_llama(seed=1)}, {*every}),
        ({"choices": {**CHOICES, "rain": "rain"}}, {*every}),
    ]:
        other = {"model": tiny_llama(), "steps": 1, **changed}
        compare(samples, every, settings_of(**other), results=results)
        lines = lines_of(results)
        assert sorted(line["method"] for line in lines[done:]) == sorted(repeated), changed
        done = len(lines)


def test_other_test_texts_are_answered_anew(tmp_path):
    settings, results = settings_of(tiny_llama()), tmp_path / "results.jsonl"
    (sample,) = draw_samples(*TRAIN, TEST, seeds=1)
    fewer = replace(sample, test_texts=sample.test_texts[:3], test_labels=sample.test_labels[:3])
    # Other examples change nothing for the untuned model.
    others = Sample(0, *rows_of(4, 9), *TEST)
    for asked in (sample, fewer, others):
        (run,) = compare([asked], ["zero-shot"], settings, results=results)
        assert run.answers == len(asked.test_texts)
    assert len(lines_of(results)) == 2


def test_an_answer_costs_as_many_prompts_as_there_are_templates():
    templates = [TEMPLATE, "question : {{ text }}\nabout the"]
    answer = 2 * PARAMETERS * (2 * (mean_words(TEST[0]) + CHOICE_WORDS + TEMPLATE_WORDS) + 1)
    samples = draw_samples(*TRAIN, TEST, seeds=1)
    settings = settings_of(tiny_llama(), template=templates, ensemble="one-shot")
    zero_shot, icl, tfew = compare(samples, ["zero-shot", "icl", "tfew"], settings)
    assert zero_shot.flops_an_answer == tfew.flops_an_answer == pytest.approx(answer)
    assert icl.flops_an_answer == pytest.approx(len(TRAIN[0]) * answer)
    # In training a text meets one template, in a batch of 8 or of what is left.
    trained = mean_words(TRAIN[0]) + CHOICE_WORDS + TEMPLATE_WORDS + 0.5
    batch = len(TRAIN[0]) / -(-len(TRAIN[0]) // 8)
    assert tfew.flops_before == pytest.approx(6 * PARAMETERS * trained * STEPS * batch)


def test_an_encoder_decoder_reads_its_demonstrations_for_every_answer():
    samples = draw_samples(*TRAIN, TEST, shots=1, seeds=1)
    settings = settings_of(tiny_t5(), tokenizer=word_tokenizer(WORDS, end=True))
    (run,) = compare(samples, ["icl"], settings)
    assert (run.flops_an_answer, run.flops_before) == (run.flops_uncached, 0)
    assert notes(summaries([run])) == []


def shown(context, **changed) -> InContextClassifier:
    model = tiny_llama(max_position_embeddings=context)
    given = {"template": TEMPLATE, "choices": CHOICES, "tokenizer": TOKENIZER, "leave_out": True}
    return InContextClassifier(model, **{**given, **changed})


def test_a_long_demonstration_does_not_keep_the_short_ones_out():
    texts = [*["it was late"] * 9, "it was late " * 50]
    labels = [["bill", "van"][i % 2] for i in range(10)]
    for seed in range(4):
        assert shown(200, seed=seed, choices=None).fit(texts, labels).examples_used_ == 9
    # Nor does a text that takes all of the context.
    texts, labels = TRAIN
    classifier = shown(100).fit([*texts, "rain " * 200], [*labels, "van"])
    assert 2 <= classifier.examples_used_ < len(texts)


@pytest.mark.parametrize("ensemble", ["none", "orderings", "one-shot"])
@pytest.mark.parametrize("context", [36, 50, 77, 100, 400])
def test_as_many_demonstrations_stay_as_fit(context, ensemble):
    classifier = shown(context, ensemble=ensemble).fit(*TRAIN)
    used = classifier.examples_used_
    longest = max(len(text.split()) for text in TRAIN[0]) + TEMPLATE_WORDS
    (members,) = classifier.demonstration_tokens_
    # The last token of a choice predicts nothing, and is not read.
    room = context - longest - max(len(words.split()) for words in CHOICES.values())
    assert max(members) <= room + 1
    shots = [f"{text} {CHOICES[label]}".split() for text, label in zip(*TRAIN, strict=True)]
    each = [len(shot) + TEMPLATE_WORDS for shot in shots]
    if ensemble == "one-shot":
        assert used == len(members) == sum(tokens <= room for tokens in each)
    else:
        (texts,) = classifier.demonstrations_
        assert all(text.count("question") == used for text in texts)
        assert abs(texts[0].count("about money") - texts[0].count("about the delivery")) <= 1
        # The next one would not have fitted, or there is none.
        assert used == len(each) or max(members) + max(each) > room
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classifier.predict(TRAIN[0])


def test_leaving_out_changes_nothing_where_all_fit_and_cannot_help_where_none_does():
    every = shown(512, seed=3, leave_out=False).fit(*TRAIN)
    assert shown(512, seed=3).fit(*TRAIN).demonstrations_ == every.demonstrations_
    with pytest.raises(IA3Error, match="0 demonstrations fit"):
        shown(12).fit(*TRAIN)


def test_a_comparison_says_how_many_demonstrations_fit():
    settings = settings_of(tiny_llama(max_position_embeddings=77))
    runs = icl, tfew = compare(draw_samples(*TRAIN, TEST, seeds=1), ["icl", "tfew"], settings)
    assert 0 < icl.examples_used < icl.examples == len(TRAIN[0])
    assert tfew.examples_used == tfew.examples == len(TRAIN[0])
    said = f"{icl.examples_used} of {len(TRAIN[0])}"
    assert cells(summaries(runs)[0])[-1] == said
    assert said in markdown(summaries(runs))


# -- samples ---------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from("abc"), min_size=6, max_size=30), st.integers(1, 4))
def test_a_sample_has_its_shots_of_each_label_and_leaves_the_rest(labels, shots):
    texts = [f"text {i}" for i in range(len(labels))]
    counts = Counter(labels)
    if min(counts.values()) < shots or sum(counts.values()) == shots * len(counts):
        with pytest.raises(IA3Error, match="shots is"):
            draw_samples(texts, labels, shots=shots, seeds=2)
        return
    samples = draw_samples(texts, labels, shots=shots, seeds=2)
    assert [sample.seed for sample in samples] == [0, 1]
    for sample in samples:
        assert Counter(sample.labels) == dict.fromkeys(counts, shots)
        pairs = [*zip(sample.texts, sample.labels, strict=True)]
        pairs += zip(sample.test_texts, sample.test_labels, strict=True)
        assert sorted(pairs) == sorted(zip(texts, labels, strict=True))
    assert draw_samples(texts, labels, shots=shots, seeds=2) == samples


def test_seeds_draw_different_samples_and_what_cannot_be_drawn_is_refused():
    samples = draw_samples(*rows_of(40, 3), shots=5, seeds=3)
    assert len({tuple(sample.texts) for sample in samples}) == 3
    refused = {None: "nothing to test on", 6: "leaves none to test", 7: "'bill' has 6 examples"}
    for shots, message in refused.items():
        with pytest.raises(IA3Error, match=message):
            draw_samples(*TRAIN, shots=shots)


def test_what_cannot_be_compared_is_refused_before_anything_runs(tmp_path):
    results = tmp_path / "results.jsonl"
    unknown = draw_samples(*TRAIN, (["my bill"], ["bil"]), seeds=1)
    message = "'bil' is not among the choices ['bill', 'van']; did you mean 'bill'"
    with pytest.raises(IA3Error, match=re.escape(message)):
        compare(unknown, ["tfew"], settings_of(tiny_llama()))
    for methods, changed, message in [
        (["zero-shot", "tfw"], {}, "did you mean 'tfew'?"),
        (["tfew", "tfew"], {}, "more than once"),
        ([], {}, "no methods"),
        (["setfit"], {}, "setfit-requirements.txt"),
        (["setfit"], {"setfit": SetFit(sys.executable)}, "setfit==1.2.0"),
        (["setfit"], {"setfit": SetFit("no-python")}, "interpreter that runs"),
        (["setfit"], {"setfit": SetFit(sys.executable, "./no")}, "is not a folder"),
        (["icl"], {"ensemble": "ordering"}, "did you mean 'orderings'?"),
    ]:
        with pytest.raises(IA3Error, match=re.escape(message)):
            compare(the_samples(), methods, settings_of(tiny_llama(), **changed), results=results)
        assert not results.exists()
    whole = dict.fromkeys([field.name for field in fields(Run)], 1)
    whole |= {"method": "tfew", "conditions": {}}
    for change in ({"seed": "1"}, {"accuracy": None}, {"answers": 1.5}, {"conditions": 1}):
        lines = json.dumps(whole) + "\n" + json.dumps({**whole, **change}) + "\n"
        results.write_text(lines)
        with pytest.raises(BrokenFileError, match="line 2: not a run"):
            compare(the_samples(), ["zero-shot"], settings_of(tiny_llama()), results=results)
        assert results.read_text() == lines


# -- table and picture -----------------------------------------------------------------------------


def run(method, seed=0, **changed) -> Run:
    values = (0.5, 60.0, 0.05, 1e15, 1e10, None, 1000, 32, 32, 10)
    return replace(Run(method, seed, *values), **changed)


def test_a_summary_has_the_median_and_the_quartiles():
    pairs = zip([0.9, 0.5, 0.7, 0.6, 0.8], [10.0, 1.0, 99.0, 2.0, 3.0], strict=True)
    runs = [run("tfew", i, accuracy=a, train_seconds=s) for i, (a, s) in enumerate(pairs)]
    (summary,) = summaries(runs)
    assert cells(summary)[:5] == ["T-Few", "70.0", "60.0 to 80.0", "5", "3"]
    # One run has no quartiles to show.
    (alone,) = summaries([run("zero-shot")])
    assert cells(alone)[2] == "-"


@pytest.mark.parametrize("methods", [["tfew"], ["zero-shot", "icl"], ["icl", "tfew", "setfit"]])
def test_a_picture_names_what_is_compared_and_is_the_same_each_time(methods):
    found = summaries([run(m, flops_uncached=1e12 if m == "icl" else None) for m in methods])
    svg = picture(found, "svg")
    text = "".join(ET.fromstring(svg).itertext())
    for summary in found:
        assert cells(summary)[0] in text
    for other in {"T-Few", "SetFit", "in-context", "zero-shot"} - {cells(s)[0] for s in found}:
        assert other not in text
    assert ("nothing cached" in text) == ("icl" in methods)
    assert "$" not in text  # powers of ten are drawn
    assert picture(found, "svg") == svg
    assert picture(found, "png") == picture(found, "png")


@pytest.mark.skipif(not SETFIT_PYTHON.exists(), reason="no .venv-setfit: make .venv-setfit/.ready")
def test_setfit_answers_the_same_sample(tmp_path):
    samples = draw_samples(*TRAIN, TEST, shots=2, seeds=1)
    settings = Settings(setfit=SetFit(SETFIT_PYTHON), device="cpu")
    results = tmp_path / "results.jsonl"
    (found,) = compare(samples, ["setfit"], settings, results=results)
    assert (found.method, found.examples, found.answers) == ("setfit", 4, len(TEST[0]))
    # The labels are words of the texts.
    assert found.accuracy > 0.5
    assert found.train_seconds > 0
    assert found.stored_bytes > 1e6
    # 20 iterations make 2 · 20 pairs of each of the 4 examples; a text has 5 tokens at least.
    assert found.flops_before > found.flops_an_answer * 100
    assert compare(samples, ["setfit"], settings, results=results) == [found]
