"""RAFT: the benchmark's files, cross-validation, submissions, and `ia3 raft` as a process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.command import IA3, SMALL_FILES_ONLY, Place, assert_refused, said
from support.paths import SHARED
from support.raft import ADE, COLUMN, WORDS, some_labels, texts, write_csv, write_task
from support.tfew import (
    hook_count,
    plain_token_scores,
    state_bits,
    tiny_llama,
    tiny_t5,
    word_tokenizer,
)

from ia3 import FewShotClassifier
from ia3.base.loading import BaseModel
from ia3.errors import IA3Error
from ia3.experiments.raft import (
    RaftSettings,
    cross_validate,
    held_out,
    public_score,
    submission,
    work,
)
from ia3.experiments.raft_data import RaftTask, public_labels, read_raft
from ia3.tfew.prompts.encoding import EncodedExample
from ia3.tfew.prompts.tasks import RAFT_TASKS, load_templates
from ia3.tfew.training.trainer import TFewConfig

DATA = SHARED / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not here")

METHODS = ["majority", "zero-shot", "icl", "tfew"]
ENGLISH = ["advanced", "elementary", "intermediate"]


def topics() -> list[str]:
    """Banking77's labels as the benchmark writes them: with underscores."""
    (template,) = load_templates("banking_77")
    return [choice.replace(" ", "_") for choice in template.choices_of({})]


def task_of(folder, name="ade_corpus_v2", labels=ADE, of_rows=10, *, words=6, seed=0) -> RaftTask:
    """A task with these labels of its rows, or with so many rows."""
    if isinstance(of_rows, int):
        of_rows = some_labels(labels, of_rows, seed)
    train = list(zip(texts(len(of_rows), 1, words), of_rows, strict=True))
    write_task(folder, name, labels, train, texts(7, 2, words))
    (task,) = read_raft(folder, [name])
    return task


def tokenizer(*, end=False):
    """Every word of the templates, the labels and the texts is a token."""
    known = dict.fromkeys(WORDS)
    split = word_tokenizer().backend_tokenizer.pre_tokenizer
    for name in COLUMN:
        (template,) = load_templates(name)
        for source in (template.prompt.source, " ".join(template.choices_of({}))):
            known |= dict.fromkeys(word for word, _ in split.pre_tokenize_str(source))
    return word_tokenizer(list(known), end=end)


TOKENIZER = tokenizer()


def base_of(context=1024, name="tiny", seed=0) -> BaseModel:
    model = tiny_llama(seed, vocabulary=len(TOKENIZER), max_position_embeddings=context)
    return BaseModel(model, TOKENIZER, name)


def settings(*, sites="all-linear", max_prompt_tokens=None, **config) -> RaftSettings:
    config = TFewConfig(**{"steps": 3, "learning_rate": 0.05, "seed": 0, **config})
    return RaftSettings(config, sites, max_prompt_tokens)


def records(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


# -- the data --------------------------------------------------------------------------------------


@needs_data
def test_the_benchmark_is_read():
    tasks = read_raft(DATA / "raft")
    fields = json.loads((DATA / "raft" / "prompt_settings.jsonl").read_text().split("\n")[0])
    assert [task.name for task in tasks] == sorted(RAFT_TASKS)
    for task in tasks:
        assert len(task.train) == 50
        assert set(task.fields) == set(fields[task.name])
        assert [int(row["ID"]) for row in (*task.train, *task.test)] == list(
            range(50 + len(task.test))
        )
        for row in task.train:
            assert task.template.render(row).answer == task.answer(row)
        assert task.template.render(task.test[-1], labelled=False).choices == task.choices
    assert {task.name: len(task.labels) for task in tasks}["banking_77"] == 77


def test_only_the_tasks_asked_for_are_read(tmp_path):
    write_task(tmp_path, "ade_corpus_v2", ADE, [("a", label) for label in ADE * 3], ["b"])
    write_task(tmp_path, "one_stop_english", ENGLISH, [("a", "advanced")] * 5, ["b"])
    (tmp_path / "one_stop_english" / "task.json").write_text("broken")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "prompt_settings.jsonl").write_text("{}")
    (task,) = read_raft(tmp_path, ["ade_corpus_v2"])
    assert (task.name, task.labels, task.fields) == ("ade_corpus_v2", tuple(ADE), ("Sentence",))
    assert [dict(row) for row in task.test] == [{"Sentence": "b", "ID": "6"}]
    with pytest.raises(IA3Error, match=r"task\.json does not describe a RAFT task"):
        read_raft(tmp_path)


BROKEN = [
    ("task.json", None, None, "task.json does not exist"),
    ("train.csv", None, None, "train.csv does not exist"),
    ("test_unlabeled.csv", None, None, "test_unlabeled.csv does not exist"),
    ("task.json", "label_columns", "x", "KeyError: 'label_columns'"),
    ("task.json", '"ADE-related"', '"ADE-related", "maybe"', "has 3 labels, expected the bench"),
    ("task.json", json.dumps(ADE), json.dumps(ADE[::-1]), "the benchmark's labels in its order"),
    (
        *("train.csv", "one,ADE-related", "one,ADE-rleated"),
        "train.csv, line 2: the label 'ADE-rleated' is not in task.json; did you mean 'ADE-related",
    ),
    ("train.csv", "Sentence,", "Text,", "no column 'Sentence' among"),
    ("task.json", '"Sentence"', '"Text"', "'Sentence' is undefined"),
    ("train.csv", ",Label,", ",Lable,", "no column 'Label' among"),
    ("test_unlabeled.csv", ",ID", ",Number", "no column 'ID' among"),
]


@pytest.mark.parametrize(("name", "old", "new", "message"), BROKEN)
def test_broken_data(tmp_path, name, old, new, message):
    train = list(zip(["one", "two", "three", "four", "five", "six"], ADE * 3, strict=True))
    path = write_task(tmp_path, "ade_corpus_v2", ADE, train, ["seven", "eight"]) / name
    read_raft(tmp_path)
    if old is None:
        path.unlink()
    else:
        content = path.read_text()
        assert old in content
        path.write_text(content.replace(old, new))
    with pytest.raises((IA3Error, FileNotFoundError), match=message):
        read_raft(tmp_path)


def test_folders_that_are_not_the_benchmark(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent with the tasks of RAFT does not exist"):
        read_raft(tmp_path / "absent")
    (tmp_path / "rte").mkdir()
    with pytest.raises(IA3Error, match="no task of RAFT in it: expected folders named ade_corpus"):
        read_raft(tmp_path)
    task_of(tmp_path)
    with pytest.raises(IA3Error, match=r"no task 'ade_corpus'.*did you mean 'ade_corpus_v2'"):
        read_raft(tmp_path, ["ade_corpus"])


# -- what is held out ------------------------------------------------------------------------------


@given(st.integers(5, 60), st.integers(0, 2**32 - 1))
def test_every_row_is_held_out_once(examples, seed):
    folds = held_out(examples, 5, seed)
    assert sorted(i for fold in folds for i in fold) == list(range(examples))
    assert {len(fold) for fold in folds} <= {examples // 5, -(-examples // 5)}
    assert [held_out(examples, n, seed) for n in range(1, 6)] == [folds[:n] for n in range(1, 6)]


def test_ten_of_fifty_are_held_out_and_the_seed_draws_them():
    assert [len(fold) for fold in held_out(50, 5, 0)] == [10] * 5
    assert held_out(50, 1, 0) != held_out(50, 1, 1)


# -- methods ---------------------------------------------------------------------------------------


def test_macro_f1_of_the_majority_by_hand(tmp_path):
    # Whatever two are held out, most of the others are "not": all ten are predicted so.
    task = task_of(tmp_path, of_rows=[ADE[0]] * 3 + [ADE[1]] * 7)
    (score,) = cross_validate(base_of(), task, methods=["majority"])
    assert score.macro_f1 == pytest.approx((0 + 2 * 7 / (7 + 10)) / 2)
    assert (score.accuracy, score.examples) == (0.7, 10)
    # A label that neither occurs nor is predicted does not count.
    task = task_of(tmp_path, "one_stop_english", ENGLISH, [ENGLISH[1]] * 8 + [ENGLISH[0]] * 2)
    (score,) = cross_validate(base_of(), task, methods=["majority"])
    assert score.macro_f1 == pytest.approx((0 + 2 * 8 / (8 + 10)) / 2)


def test_the_majority_is_that_of_the_other_rows(tmp_path):
    of_rows = some_labels(ENGLISH, 15, 3)
    task = task_of(tmp_path, "one_stop_english", ENGLISH, of_rows)
    cross_validate(base_of(), task, methods=["majority"], results=tmp_path / "out")
    kept = records(tmp_path / "out")
    assert [record["split"] for record in kept] == [0, 1, 2, 3, 4]
    for record in kept:
        counts = Counter(label for i, label in enumerate(of_rows) if str(i) not in record["ids"])
        # Of several that are the most frequent, the first in the benchmark's order.
        expected = next(label for label in ENGLISH if counts[label] == max(counts.values()))
        assert record["predictions"] == [expected] * 3


def plain_prediction(base: BaseModel, task: RaftTask, prompt: str) -> str:
    """By whole texts, one choice after the other."""
    ids = base.tokenizer(prompt)["input_ids"]
    choices = [base.tokenizer(choice)["input_ids"] for choice in task.choices]
    with torch.no_grad():
        scores = plain_token_scores(base, EncodedExample(tuple(ids), tuple(map(tuple, choices))))
    best = max(range(len(choices)), key=lambda i: float(scores[i].mean()))
    return task.labels[best]


def written(task: RaftTask, ids: Sequence[str]) -> str:
    """The demonstrations made of these rows."""
    rows = [task.train[int(i)] for i in ids]
    return "".join(
        f"{task.template.render(row).prompt} {task.choices[task.answer(row)]}\n\n" for row in rows
    )


def test_the_untuned_model_ranks_the_choices(tmp_path):
    task = task_of(tmp_path, "one_stop_english", ENGLISH)
    base = base_of()
    cross_validate(base, task, methods=["zero-shot"], results=tmp_path / "out")
    for record in records(tmp_path / "out"):
        prompts = [task.template.render(task.train[int(i)]).prompt for i in record["ids"]]
        assert record["predictions"] == [plain_prediction(base, task, p) for p in prompts]


@pytest.mark.parametrize("context", [150, 1024, "an encoder-decoder's"])
def test_as_many_demonstrations_as_the_context_holds(tmp_path, context):
    task = task_of(tmp_path)
    if isinstance(context, int):
        base = base_of(context)
    else:
        base = BaseModel(tiny_t5(vocabulary=len(TOKENIZER)), tokenizer(end=True), "t5")
        context = 1024
    (score,) = cross_validate(base, task, methods=["icl"], results=tmp_path / "out")
    answers = [len(TOKENIZER(choice)["input_ids"]) for choice in task.choices]
    prompts = [task.template.render(row).prompt for row in task.train]

    for record in records(tmp_path / "out"):
        shown, asked = record["demonstrations"], [prompts[int(i)] for i in record["ids"]]
        assert not {*shown} & {*record["ids"]}
        room = context - max(len(TOKENIZER(p)["input_ids"]) for p in asked) - max(answers)
        assert len(TOKENIZER(written(task, shown))["input_ids"]) <= room
        for row in task.train:
            if row["ID"] not in (*shown, *record["ids"]):
                assert len(TOKENIZER(written(task, [*shown, row["ID"]]))["input_ids"]) > room
        assert record["predictions"] == [
            plain_prediction(base, task, written(task, shown) + prompt) for prompt in asked
        ]
    counts = [len(record["demonstrations"]) for record in records(tmp_path / "out")]
    assert score.demonstrations == tuple(counts)
    assert 0 < counts[0] < 8 if context == 150 else counts == [8] * 5


def test_without_room_for_a_demonstration_the_untuned_model_is_asked(tmp_path):
    task = task_of(tmp_path)
    untuned, in_context = cross_validate(base_of(80), task, methods=["icl", "zero-shot"])
    assert in_context.demonstrations == (0,) * 5
    assert (untuned.method, in_context.method) == ("zero-shot", "icl")
    assert untuned.macro_f1 == in_context.macro_f1


def test_tfew_is_a_classifier_fitted_on_the_other_rows(tmp_path):
    task = task_of(tmp_path, "one_stop_english", ENGLISH)
    base = base_of()
    steps = settings(steps=6)
    cross_validate(base, task, steps, methods=["tfew"], folds=2, results=tmp_path / "out")
    kept = records(tmp_path / "out")
    assert len(kept) == 2
    for record in kept:
        held = [row for row in task.train if row["ID"] in record["ids"]]
        others = [row for row in task.train if row["ID"] not in record["ids"]]
        classifier = FewShotClassifier(
            base.model,
            task.template.prompt.source,
            dict(zip(task.labels, task.choices, strict=True)),
            tokenizer=TOKENIZER,
            steps=6,
            learning_rate=0.05,
        ).fit(others, [row["Label"] for row in others])
        predicted = zip([row["ID"] for row in held], classifier.predict(held), strict=True)
        assert sorted(zip(record["ids"], record["predictions"], strict=True)) == sorted(predicted)


def test_all_77_topics_are_in_the_prompt_and_in_the_loss(tmp_path):
    labels = topics()
    task = task_of(tmp_path, "banking_77", labels, labels[:7])
    scores = cross_validate(base_of(), task, settings(steps=1), folds=1)
    assert [score.method for score in scores] == METHODS
    assert {score.examples for score in scores} == {1}
    predicted = submission(base_of(), task, settings(steps=1))
    assert len(predicted) == len(task.test)
    assert {*predicted} <= {*labels}


@pytest.mark.parametrize("sites", ["all-linear", "paper"])
def test_the_model_is_left_as_it_was(tmp_path, sites):
    task = task_of(tmp_path)
    base = base_of()
    before, hooks = state_bits(base.model), hook_count(base.model)
    cross_validate(base, task, settings(sites=sites), folds=1)
    submission(base, task, settings(sites=sites))
    after = base.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert hook_count(base.model) == hooks
    assert not base.model.training


def test_work_is_what_progress_counts(tmp_path):
    task = task_of(tmp_path, of_rows=11)
    given = settings(steps=4)
    out = tmp_path / "out"
    for _ in range(2):  # computed, and read
        done: list[int] = []
        cross_validate(base_of(), task, given, folds=3, results=out, progress=done.append)
        assert sum(done) == work(task, given, METHODS, 3)
        done.clear()
        submission(base_of(), task, given, results=out, progress=done.append)
        assert sum(done) == 4 + len(task.test)


def test_long_texts_are_cut_to_the_limit(tmp_path):
    task = task_of(tmp_path, words=60)
    base, cut = base_of(512), settings(max_prompt_tokens=70)
    with pytest.warns(UserWarning, match="10 of 10 prompts are longer than 70 tokens"):
        (score,) = cross_validate(base, task, cut, methods=["icl"], folds=1)
    (whole,) = cross_validate(base, task, methods=["icl"], folds=1)
    assert score.demonstrations[0] > whole.demonstrations[0]
    with pytest.warns(UserWarning, match="7 of 7 prompts are longer than 70 tokens"):
        submission(base, task, settings(max_prompt_tokens=70, steps=1))
    with pytest.raises(IA3Error, match="without any text; max_prompt_tokens is 5"):
        cross_validate(base, task, settings(max_prompt_tokens=5), methods=["zero-shot"])


# -- what is kept ----------------------------------------------------------------------------------


def test_what_is_kept_is_not_computed_again(tmp_path):
    task = task_of(tmp_path)
    out = tmp_path / "out"
    scores = cross_validate(base_of(), task, settings(), folds=2, results=out)
    predicted = submission(base_of(), task, settings(), results=out)
    content = (out / "results.jsonl").read_bytes()
    unable = base_of()
    unable.model.forward = Mock(side_effect=RuntimeError("computed again"))
    assert cross_validate(unable, task, settings(), folds=2, results=out) == scores
    assert submission(unable, task, settings(), results=out) == predicted
    assert (out / "results.jsonl").read_bytes() == content
    with pytest.raises(RuntimeError, match="computed again"):
        cross_validate(unable, task, settings(), folds=3, results=out)
    # Further folds are added to those before.
    more = cross_validate(base_of(), task, settings(), folds=3, results=out)
    assert (out / "results.jsonl").read_bytes().startswith(content)
    assert [score.examples for score in more] == [6] * 4
    assert {path.name for path in out.iterdir()} == {"results.jsonl"}


def test_other_settings_are_refused_by_name(tmp_path):
    task = task_of(tmp_path)
    out = tmp_path / "out"
    cross_validate(base_of(), task, settings(), folds=1, results=out)
    content = (out / "results.jsonl").read_bytes()
    for changed, named in [
        (settings(steps=4), "of tfew have steps=3, this run 4"),
        (settings(learning_rate=0.1), "of tfew have learning_rate=0.05, this run 0.1"),
        (settings(sites="paper"), "of tfew have sites='all-linear', this run 'paper'"),
        (settings(max_prompt_tokens=99), "of zero-shot have max_prompt_tokens=None, this run 99"),
        (settings(seed=1), "of majority have seed=0, this run 1"),
    ]:
        with pytest.raises(IA3Error, match=f"results.jsonl: its results {named}"):
            cross_validate(base_of(), task, changed, folds=1, results=out)
    with pytest.raises(IA3Error, match="have steps=3, this run 4"):
        submission(base_of(), task, settings(steps=4), results=out)
    with pytest.raises(IA3Error, match="have model='tiny', this run 'other'"):
        cross_validate(base_of(name="other"), task, settings(), folds=1, results=out)
    assert (out / "results.jsonl").read_bytes() == content
    # What does not depend on a setting does not mind it.
    rivals = ["majority", "zero-shot", "icl"]
    cross_validate(base_of(), task, settings(steps=4), methods=rivals, folds=1, results=out)
    assert (out / "results.jsonl").read_bytes() == content


def test_other_data_is_refused(tmp_path):
    task, out = task_of(tmp_path), tmp_path / "out"
    cross_validate(base_of(), task, methods=["majority"], results=out)
    other = task_of(tmp_path / "other", seed=1)
    with pytest.raises(IA3Error, match="results of ade_corpus_v2 were computed on other data"):
        cross_validate(base_of(), other, methods=["majority"], results=out)
    # Another task is not this one's data.
    another = task_of(tmp_path, "one_stop_english", ENGLISH)
    cross_validate(base_of(), another, methods=["majority"], results=out)
    assert len(records(out)) == 10


def test_broken_results_and_those_of_another_model_are_refused(tmp_path):
    task, out = task_of(tmp_path), tmp_path / "out"
    path = out / "results.jsonl"
    first = cross_validate(base_of(), task, methods=["zero-shot"], results=out)
    content = path.read_bytes()
    # Half a line is computed again, and so is a line of other rows.
    for changed in (content[:-40], content.replace(b'"ids": ["', b'"ids": ["x', 1)):
        path.write_bytes(changed)
        assert cross_validate(base_of(), task, methods=["zero-shot"], results=out) == first
    with pytest.raises(IA3Error, match="of zero-shot have base model="):
        cross_validate(base_of(seed=1), task, methods=["zero-shot"], results=out)
    path.write_text('{"task": 1}\n')
    with pytest.raises(IA3Error, match="line 1: not a result of RAFT"):
        cross_validate(base_of(), task, methods=["zero-shot"], results=out)


# -- Banking77's public labels ---------------------------------------------------------------------


def public_folder(folder, rows, name="test.csv"):
    folder.mkdir(exist_ok=True)
    write_csv(folder / name, ("text", "category"), rows)
    return folder


@pytest.fixture
def banking(tmp_path):
    labels = topics()
    train = [(text, labels[0]) for text in texts(5, 1)]
    test = ["where is  my card?", "who\nare you ", "any topic", "unknown"]
    write_task(tmp_path / "raft", "banking_77", labels, train, test)
    (task,) = read_raft(tmp_path / "raft")
    return task


def test_public_labels_are_found_by_text(banking, tmp_path):
    once = [("where is my card?", "Card arrival?"), ("who are you", "verify_my_identity")]
    once += [("any topic", "atm_support"), ("Unknown", "age_limit")]
    folder = public_folder(tmp_path / "public", once)
    again = [(" where is my\tcard?", "CARD-ARRIVAL"), ("any topic", "age_limit")]
    public_folder(folder, again, "train.csv")
    # One text has two labels, and case tells texts apart.
    assert public_labels(banking, folder) == ["card_arrival", "verify_my_identity", None, None]
    score = public_score(
        ["card_arrival", "verify_my_identity", None, None],
        ["card_arrival", "age_limit", "age_limit", "age_limit"],
    )
    assert (score.matched, score.rows, score.accuracy) == (2, 4, 0.5)
    # Of three labels in truth or prediction, one is right.
    assert score.macro_f1 == pytest.approx(1 / 3)


def test_public_labels_that_are_none(banking, tmp_path):
    folder = tmp_path / "public"
    with pytest.raises(FileNotFoundError, match=r"neither .*test.csv nor .*train.csv exists"):
        public_labels(banking, folder)
    public_folder(folder, [("who are you", "verify_me")])
    with pytest.raises(IA3Error, match=r"test\.csv, line 2: the category 'verify_me' is none of"):
        public_labels(banking, folder)
    public_folder(folder, [("something else", "age_limit")])
    with pytest.raises(IA3Error, match="none of the test texts of banking_77 is in"):
        public_labels(banking, folder)


@needs_data
def test_the_benchmarks_banking_texts_are_all_public():
    (task,) = read_raft(DATA / "raft", ["banking_77"])
    truth = public_labels(task, DATA / "banking77")
    assert len(truth) == 5000
    assert {*truth} == {*task.labels}


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model and two tasks of the benchmark; one has a test set of two parts."""
    folder = tmp_path_factory.mktemp("raft")
    base = base_of()
    base.model.save_pretrained(folder / "model")
    TOKENIZER.save_pretrained(folder / "model")
    train = list(zip(texts(10, 1), some_labels(ADE, 10), strict=True))
    write_task(folder / "data", "ade_corpus_v2", ADE, train, texts(130, 2))
    labels = topics()
    train = list(zip(texts(5, 3), labels, strict=False))
    write_task(folder / "data", "banking_77", labels, train, [*texts(3, 4), 'a "b", c'])
    public_folder(folder / "public", [(texts(3, 4)[0], "Automatic Top Up")])
    return Place(folder)


RAFT = ("raft", "--data", "data", "--model", "model")
SETTINGS = ("--steps", 28, "--learning-rate", 0.03, "--folds", 2, "--banking77", "public")


@pytest.fixture(scope="module")
def unbroken(place):
    """What a run in one go says."""
    return said(place.run(*RAFT, "--out", "unbroken", *SETTINGS, "--json"))


def test_what_the_command_says_and_submits(place, unbroken):
    folder = place.folder / unbroken["submission"]
    assert sorted(path.name for path in folder.iterdir()) == ["ade_corpus_v2", "banking_77"]
    for task in read_raft(place.folder / "data"):
        of_task = [score for score in unbroken["scores"] if score["task"] == task.name]
        assert [score["method"] for score in of_task] == METHODS
        # Two fifths of the labelled rows.
        assert {score["examples"] for score in of_task} == {2 * len(task.train) // 5}
        assert [len(score.get("demonstrations", "")) for score in of_task] == [0, 0, 2, 0]
        # Submissions have the benchmark's form.
        lines = (folder / task.name / "predictions.csv").read_bytes().decode().split("\n")
        assert (lines[0], lines[-1]) == ("ID,Label", "")
        for line, row in zip(lines[1:-1], task.test, strict=True):
            number, _, label = line.partition(",")
            assert number == row["ID"]
            assert label in task.labels
    for method in METHODS:
        of_method = [s["macro_f1"] for s in unbroken["scores"] if s["method"] == method]
        assert unbroken["mean"][method] == pytest.approx(sum(of_method) / 2)
    assert (unbroken["banking77"]["matched"], unbroken["banking77"]["rows"]) == (1, 4)


FILES = {"results.jsonl", "table.md", "raft.png", "submission"}


def test_table_and_figure(place, unbroken):
    out = place.folder / "unbroken"
    table = (out / "table.md").read_text()
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    macro_f1 = {row[0].strip("| "): row[1:] for row in rows[: len(rows) // 2]}
    assert list(macro_f1) == ["task", "---", "ade_corpus_v2", "banking_77", "mean"]
    for score in unbroken["scores"]:
        column = [name.strip("| ") for name in macro_f1["task"]].index(score["method"])
        shown = macro_f1[score["task"]][column].strip("| ")
        expected = f"{100 * score['macro_f1']:.1f}"
        # The numbers of demonstrations follow in-context learning's.
        assert shown.startswith(f"{expected} (") if score["method"] == "icl" else shown == expected
    assert "1 of 4 labels known" in table
    assert (out / "raft.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in out.iterdir()} == FILES


def killed(place, when):
    """Kill a run into `broken` as soon as this is so."""
    command = [str(part) for part in (IA3, *RAFT, "--out", "broken", *SETTINGS)]
    given = {"cwd": place.folder, "env": place.environment, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **given)
    until = time.monotonic() + 240
    while not when():
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_killed_run_goes_on(place, unbroken):
    once, out = (place.folder / name for name in ("unbroken", "broken"))

    def kept(part):
        path = out / "results.jsonl"
        return path.exists() and part in path.read_text()

    def training_the_second_fold():
        found = out.glob("checkpoints/ade_corpus_v2-1/checkpoint-*")
        return any(found) or kept('"method": "tfew", "split": 1')

    killed(place, training_the_second_fold)
    assert len(records(out)) < len(records(once))
    with open(out / "results.jsonl", "a") as file:
        file.write('{"task": "ade_cor')
    killed(place, lambda: kept('"split": "test", "part": 0'))
    done = place.run(*RAFT, "--out", "broken", *SETTINGS)
    assert done.returncode == 0, done.stderr
    assert "tfew" in done.stdout
    for name in ("results.jsonl", "table.md"):
        lines = [sorted((folder / name).read_text().splitlines()) for folder in (once, out)]
        assert lines[0] == lines[1]
    for task in ("ade_corpus_v2", "banking_77"):
        path = Path("submission", task, "predictions.csv")
        assert (out / path).read_bytes() == (once / path).read_bytes()
    assert {path.name for path in out.iterdir()} == FILES


def test_a_full_disk_leaves_whole_lines(place):
    command = (*RAFT, "--out", "full", "--methods", "majority")
    done = place.run(*command, under=SMALL_FILES_ONLY)
    assert_refused(done, "full/results.jsonl: File too large")
    assert all(record["method"] == "majority" for record in records(place.folder / "full"))


def test_refused_before_anything_is_computed(place):
    cases = {
        ("--task", "ade_corpus"): (1, "did you mean 'ade_corpus_v2'"),
        ("--data", "nowhere"): (1, "folder nowhere with the tasks of RAFT does not exist"),
        ("--methods", "lora"): (1, "no method 'lora'"),
        ("--methods", "zero-shop,tfew"): (1, "did you mean 'zero-shot'"),
        ("--methods", ","): (1, "there are no methods"),
        ("--folds", "6"): (2, "--folds"),
        ("--task", "ade_corpus_v2", "--banking77", "public"): (2, "this run does not make"),
        ("--no-submit", "--banking77", "public"): (2, "this run does not make"),
        ("--methods", "zero-shot", "--banking77", "public"): (2, "this run does not make"),
        ("--banking77", "data"): (1, "they are Banking77's"),
        ("--out", "data/ade_corpus_v2/task.json"): (1, "task.json: Not a directory"),
    }
    # The name of no model: it would not get that far.
    raft = ("raft", "--data", "data", "--out", "refused", "--model", "none")
    runs = place.run_all(*((*raft, *more) for more in cases), COLUMNS="200")
    for done, (code, message) in zip(runs, cases.values(), strict=True):
        assert (done.returncode, done.stdout) == (code, "")
        assert "Traceback" not in done.stderr
        assert message in " ".join(done.stderr.replace("│", " ").split())
    blocked = "import sys; sys.modules['matplotlib'] = None; from ia3.cli import main; main()"
    assert_refused(place.run(*raft, under=[sys.executable, "-c", blocked]), "'ia3[report]'")
    assert not (place.folder / "refused").exists()
